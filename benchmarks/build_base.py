"""Builds a model of BERT-base's size with random weights, to time what a larger model costs.

    python benchmarks/build_base.py

The checkpoint and the bundle (fp32 and int8) go to ``models/base``, which git ignores. The parity gate is left out:
the spans of random weights mean nothing. It needs the default model's tokenizer, which ships with medner.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from common import ROOT

from medner import bundle as bundles
from medner import parity
from medner.export import convert, optimize, verify

WORK = ROOT / "models" / "base"
NOTES = ROOT / "examples" / "notes.jsonl"
SEED = 13
#: Added to the logit of O, so that spans are about as rare as a trained model's: each of them costs time.
O_BIAS = 0.9


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_checkpoint(config: transformers.BertConfig, path: Path) -> None:
    """Write a checkpoint with random weights, the default model's labels, and its tokenizer."""
    default = bundles.load("default")
    config.id2label = dict(enumerate(default.labels))
    config.label2id = {label: number for number, label in enumerate(default.labels)}
    torch.manual_seed(SEED)
    model = transformers.BertForTokenClassification(config)
    with torch.no_grad():
        model.classifier.bias[default.labels.index("O")] += O_BIAS
    model.save_pretrained(path)
    for name in TOKENIZER:
        shutil.copyfile(default.path / name, path / name)


def build() -> bundles.Bundle:
    """Write the checkpoint and the bundle; what was there is replaced."""
    default = bundles.load("default")
    checkpoint, bundle = WORK / "checkpoint", WORK / "bundle"
    shutil.rmtree(WORK, ignore_errors=True)
    write_checkpoint(transformers.BertConfig(), checkpoint)
    fp32, int8 = bundle / bundles.VARIANT_FILES["fp32"], bundle / bundles.VARIANT_FILES["int8"]
    convert.to_onnx(checkpoint, fp32)
    for name in ("config.json", *TOKENIZER):
        shutil.copyfile(checkpoint / name, bundle / name)
    sized = bundles.resized(bundles.load_checkpoint(checkpoint), default.window, packed=default.packed)
    optimize.to_int8(fp32, int8, verify.samples(sized, parity.read_parity_data(str(NOTES))))
    bundles.write_manifest(
        bundle, name="base", labels=default.labels, window=default.window, packed=default.packed, card={}
    )
    return bundles.load(bundle)


if __name__ == "__main__":
    print(bundles.describe(build()))
