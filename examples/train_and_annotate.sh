#!/usr/bin/env bash
# The whole path in one go: fine-tune, export with proof, score, annotate.
#
#   BASE=emilyalsentzer/Bio_ClinicalBERT DATA=ncbi_disease OUT=runs/mine examples/train_and_annotate.sh
#
# BASE    checkpoint directory or hub name
# DATA    labelled data for training: hub name, or a directory of CoNLL, PubTator or JSONL files, one a split
# PARITY  real text for the parity gate; whole labelled documents also choose the window (default: DATA, whose sentences
#         cannot choose it: then it is 128 tokens, unless EXPORT says another)
# NOTES   notes to annotate (default: the example notes)
# TRAIN, EXPORT, EVALUATE  further options for each command
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${BASE:?name a checkpoint or hub model}" "${DATA:?name a data set}" "${OUT:?name an output directory}"

if [ -n "${PARITY:-}" ]; then window=auto; else window=128; fi

# shellcheck disable=SC2086  # the further options are meant to be split
medner train --data "$DATA" --base "$BASE" -o "$OUT/checkpoint" --epochs 2 --lr 2e-4 ${TRAIN:-}
medner export "$OUT/checkpoint" -o "$OUT/bundle" --parity-data "${PARITY:-$DATA}" --window $window ${EXPORT:-}
medner evaluate --model "$OUT/bundle" --data "$DATA" --json "$OUT/scores.json" ${EVALUATE:-}
medner annotate "${NOTES:-$here/notes.jsonl}" -o "$OUT/spans" --model "$OUT/bundle"
