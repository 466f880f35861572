"""Score a model on labelled data: on the data set's own tokens where it has them, else on exact offsets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from medner import bundle as bundles
from medner import datasets, score
from medner.annotate import Annotator, Options
from medner.datasets import Document, Span

#: Spans that an annotator found in each document: (start, end, label) in code points of its text.
Found = list[list[Span]]


def open_model(model: str, options: Options | None = None) -> Annotator:
    """An annotator for a bundle, a foreign ONNX model, or a PyTorch checkpoint directory."""
    path = Path(model)
    if (
        not bundles.ships(model)
        and holds_weights(path)
        and not any(path.glob("*.onnx"))
        and not any(path.glob("onnx/*.onnx"))
    ):
        from medner.pytorch import torch_annotator

        return torch_annotator(path, options)
    return Annotator.load(model, options)


def holds_weights(checkpoint: Path) -> bool:
    """Whether a directory has weights that PyTorch can load."""
    names = [f"{name}{part}" for name in ("model.safetensors", "pytorch_model.bin") for part in ("", ".index.json")]
    # Not Path.is_file, which raises where nobody can tell.
    return any(os.path.isfile(checkpoint / name) for name in names)  # noqa: PTH113


def evaluate(annotator: Annotator, documents: Sequence[Document]) -> score.Scores:
    """Strict scores, on the labels of :func:`fit_labels`."""
    return score.evaluate(fit_labels(annotator, documents), find(annotator, documents))


def fit_labels(annotator: Annotator, documents: Sequence[Document]) -> list[Document]:
    """The documents with the labels that a model of a single label can find.

    Where the data set has that label, too, the others are of something else and left out; where it has not, its labels
    are finer ones and all count as the model's.
    """
    if len(annotator.types) != 1:
        return list(documents)
    (label,) = annotator.types
    own = [document.of_label(label) for document in documents]
    return own if any(document.spans for document in own) else datasets.relabel(documents, label)


def find(annotator: Annotator, documents: Sequence[Document]) -> Found:
    """The spans of each document's text."""
    return [[(start, end, label) for start, end, label, _ in spans] for spans in find_scored(annotator, documents)]


def find_scored(annotator: Annotator, documents: Sequence[Document]) -> list[list[tuple[int, int, str, float]]]:
    """The spans of each document's text with their scores."""
    column = pa.array([document.text for document in documents], pa.large_string())
    batch = pa.record_batch({annotator.options.text_column: column})
    return [
        [(span["start"], span["end"], span["label"], span["score"]) for span in spans]
        for spans in annotator(batch).column("spans").to_pylist()
    ]


def hard_wrapped(documents: Sequence[Document], width: int) -> list[Document]:
    """The documents with lines broken after at most ``width`` characters, as clinical systems do; offsets stay."""
    return [replace(document, text=wrap(document.text, width)) for document in documents]


def wrap(text: str, width: int) -> str:
    """Turn the last space of each stretch of ``width`` characters into a line break; longer words stay whole."""
    characters = list(text)
    start = last = 0
    for position, character in enumerate(text):
        if character == "\n":
            start = position + 1
        elif character == " ":
            last = position
        if position - start >= width and last > start:
            characters[last] = "\n"
            start = last + 1
    return "".join(characters)
