"""Writes ``medner/bundles/tiny``: a model small enough to read, whose answers follow from its rule.

A token is inside a mention if it is one of ``MENTION_WORDS``; it is ``B-Disease`` unless the token before it is inside
one, too. Run it with the ``export`` extra installed; a test checks that the shipped files are what it writes.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from medner import bundle

LABELS = ("O", "B-Disease", "I-Disease")
MENTION_WORDS = ("asthma", "breast", "cancer", "diabetes", "fever", "heart", "failure", "mellitus", "type", "2")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WINDOW = 32


def vocabulary() -> dict[str, int]:
    """Special tokens, the mention words, and every ASCII character alone and as a continuation."""
    characters = [c for c in string.printable.lower() if not c.isspace()]
    tokens = [*SPECIALS, *MENTION_WORDS, *characters, *(f"##{c}" for c in characters if c.isalnum())]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def tokenizer(vocab: dict[str, int]) -> Tokenizer:
    """A BERT tokenizer, uncased."""
    made = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    made.add_special_tokens(list(SPECIALS))
    made.normalizer = BertNormalizer(lowercase=True)
    made.pre_tokenizer = BertPreTokenizer()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return made


def graph(vocab: dict[str, int]) -> onnx.ModelProto:
    """``logits = now[ids] + before[ids of the token before]``; float32 [batch, length, 3]."""
    now = np.tile(np.array([4.0, -4.0, -4.0], np.float32), (len(vocab), 1))
    before = np.zeros((len(vocab), 3), np.float32)
    for number, word in enumerate(MENTION_WORDS):
        # A little different for each word, so that scores tell the words apart.
        now[vocab[word]] = [-1.0, 3.0 + 0.1 * number, 1.0]
        before[vocab[word]] = [0.0, -2.0, 2.0]
    nodes = [
        helper.make_node("Gather", ["now", "input_ids"], ["here"]),
        helper.make_node("Gather", ["before", "input_ids"], ["left"]),
        helper.make_node("Pad", ["left", "pads"], ["shifted"]),
        helper.make_node("Slice", ["shifted", "first", "last", "axis"], ["context"]),
        helper.make_node("Add", ["here", "context"], ["logits"]),
    ]
    constants = {
        "now": now,
        "before": before,
        "pads": np.array([0, 1, 0, 0, 0, 0], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([-1], np.int64),
        "axis": np.array([1], np.int64),
    }
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 3])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
        producer_name="medner",
    )
    onnx.checker.check_model(model)
    return model


def build(path: Path) -> None:
    """Write the bundle."""
    vocab = vocabulary()
    (path / "onnx").mkdir(parents=True, exist_ok=True)
    tokenizer(vocab).save(str(path / "tokenizer.json"))
    config = {
        "model_type": "bert",
        "architectures": ["BertForTokenClassification"],
        "max_position_embeddings": 512,
        "id2label": {str(i): label for i, label in enumerate(LABELS)},
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    onnx.save(graph(vocab), str(path / bundle.VARIANT_FILES["fp32"]))
    bundle.write_manifest(path, name="tiny", labels=LABELS, window=WINDOW, packed=True, card={"licence": "Apache-2.0"})


if __name__ == "__main__":
    build(Path(sys.argv[1]))
