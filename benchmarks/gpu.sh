#!/usr/bin/env bash
# What a machine with a GPU does, in one call of under 8 minutes: doctor, training, export, equal spans, the model alone
# beside PyTorch, file to Parquet, medner compare. Everything goes to one folder; results.md sums it up.
#
#   pip install -c constraints-gpu.txt ".[gpu,train,export]"
#   bash benchmarks/gpu.sh OUT [--devices 0,1] [--models base,minilm]
#
# It needs nothing else: notes are generated, and weights are random and then trained for a minute, or those of
# --checkpoint base=DIR.
set -euo pipefail
out=${1:?where the results go}
shift
exec python "$(dirname "$0")/gpu.py" -o "$out" "$@"
