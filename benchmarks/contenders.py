"""The pipelines that medner is timed against, as commands: notes in (JSONL), spans out (Parquet).

    python benchmarks/contenders.py NOTES -o SPANS.parquet --engine transformers --form stock ...

engine: ``transformers`` runs the PyTorch checkpoint, ``optimum`` the bundle's fp32 graph on onnxruntime. form:
``stock`` gives the pipeline whole notes, as its documentation shows; ``skilled`` gives it the windows that medner
cuts, as texts, sorted by length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Tokens that neighbouring chunks of a whole note share.
STRIDE = 32
SPANS = pa.schema(
    [
        ("note_id", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("text", pa.string()),
        ("label", pa.string()),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Note:
    """One line of a corpus: ``{"note_id": ..., "text": ...}``."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Slice:
    """One of medner's windows as a slice of its note: code points ``start:end``.

    Spans that start in ``own_start:own_end`` are the window's. tokens: how many the window has. whole: it holds whole
    segments; else it is cut, with overlap, from a segment longer than a window, where a text cannot stand for the
    window exactly: the first word may be half a word, which as a text has other tokens.
    """

    start: int
    end: int
    own_start: int
    own_end: int
    tokens: int
    whole: bool


def read_notes(path: Path) -> list[Note]:
    """The notes of a JSONL file; those without an id get their line's number."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return [Note(str(row.get("note_id", number)), row["text"]) for number, row in enumerate(rows)]


def cutter(bundle_path: Path) -> Callable[[str], list[Slice]]:
    """A function that cuts a note's text where medner does with this bundle."""
    # Not at the top: the stock forms do without medner.
    from tokenizers import Tokenizer

    from medner import bundle as bundles
    from medner import windows

    bundle = bundles.load(bundle_path)
    words = windows.WordTokenizer(bundle.tokenizer_json())
    capacity = bundle.window - len(words.prefix) - len(words.suffix)
    offsets = Tokenizer.from_str(bundle.tokenizer_json())
    offsets.no_truncation()
    offsets.no_padding()

    def cut_piece(text: str, origin: int) -> Iterator[Slice]:
        chars = windows.segments(text)
        tokens = words.tokenize([text[a:b] for a, b in pairwise(chars)])
        edges = tokens.bounds.tolist()
        for w in windows.pack(tokens.bounds, 0, len(edges) - 1, capacity, packed=bundle.packed):
            # Of segments at one edge only the last has tokens.
            first, last = bisect_right(edges, w.start) - 1, bisect_left(edges, w.end)
            if (w.start, w.end) == (w.own_start, w.own_end):
                start, end = origin + chars[first], origin + chars[last]
                yield Slice(start, end, start, end, w.end - w.start, True)
                continue
            segment = offsets.encode(text[chars[first] : chars[last]], add_special_tokens=False).offsets
            at, low = origin + chars[first], edges[first]
            yield Slice(
                at + segment[w.start - low][0],
                at + segment[w.end - 1 - low][1],
                at + segment[w.own_start - low][0],
                at + segment[w.own_end - 1 - low][1],
                w.end - w.start,
                False,
            )

    return lambda text: [s for a, b in windows.pieces(text) for s in cut_piece(text[a:b], a)]


def load(engine: str, checkpoint: Path, bundle: Path, dtype: str, threads: int, **options: Any) -> Any:
    """The engine's token classification pipeline with strategy ``first``; its arithmetic is fp32, or dtype ``bf16``."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, pipeline

    torch.set_num_threads(threads)
    limit = AutoConfig.from_pretrained(bundle).max_position_embeddings
    # Where a tokenizer names no limit, the pipeline would cut nothing and fail on a long note.
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    options |= {"tokenizer": tokenizer, "aggregation_strategy": "first", "device": "cpu"}
    if engine == "transformers":
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        return pipeline("token-classification", model=str(checkpoint), dtype=kind, **options)

    import onnxruntime
    from optimum.onnxruntime import ORTModelForTokenClassification
    from optimum.onnxruntime import pipeline as optimum_pipeline

    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = threads
    model = ORTModelForTokenClassification.from_pretrained(
        bundle, subfolder="onnx", file_name="model.onnx", session_options=session
    )
    return optimum_pipeline("token-classification", model=model, **options)


def stock(pipeline: Any, notes: Sequence[Note], batch_size: int) -> Iterator[dict[str, Any]]:
    """Rows of :data:`SPANS`; the pipeline was loaded with a stride, and cuts whole notes itself."""
    for note, found in zip(notes, pipeline([note.text for note in notes], batch_size=batch_size), strict=True):
        for entity in found:
            yield row(note, entity["start"], entity["end"], entity)


def skilled(
    pipeline: Any, notes: Sequence[Note], batch_size: int, cut: Callable[[str], list[Slice]]
) -> Iterator[dict[str, Any]]:
    """Rows of :data:`SPANS`, found in medner's windows, longest first."""
    slices = [(note, s) for note in notes for s in cut(note.text)]
    slices.sort(key=lambda pair: -pair[1].tokens)
    texts = [note.text[s.start : s.end] for note, s in slices]
    for (note, s), found in zip(slices, pipeline(texts, batch_size=batch_size), strict=True):
        for entity in found:
            if s.own_start <= s.start + entity["start"] < s.own_end:
                yield row(note, s.start + entity["start"], s.start + entity["end"], entity)


def row(note: Note, start: int, end: int, entity: dict[str, Any]) -> dict[str, Any]:
    """One row of :data:`SPANS` for what a pipeline found; start and end in code points of the note."""
    return {
        "note_id": note.id,
        "start": start,
        "end": end,
        "text": note.text[start:end],
        "label": entity["entity_group"],
        "score": float(entity["score"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Annotate a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notes", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--engine", choices=["transformers", "optimum"], required=True)
    parser.add_argument("--form", choices=["stock", "skilled"], required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights for transformers")
    parser.add_argument("--bundle", type=Path, required=True, help="tokenizer, windows, and the graph for optimum")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "autocast"], default="fp32")
    parser.add_argument("--batch-size", type=int, required=True, help="chunks or windows")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args(arguments)

    import torch

    notes = read_notes(given.notes)
    options = {"stride": STRIDE} if given.form == "stock" else {}
    pipeline = load(given.engine, given.checkpoint, given.bundle, given.dtype, given.threads, **options)
    arithmetic = torch.autocast("cpu", torch.bfloat16) if given.dtype == "autocast" else contextlib.nullcontext()
    with arithmetic:
        if given.form == "stock":
            found = list(stock(pipeline, notes, given.batch_size))
        else:
            found = list(skilled(pipeline, notes, given.batch_size, cutter(given.bundle)))
    pq.write_table(pa.Table.from_pylist(found, SPANS), given.output)


if __name__ == "__main__":
    main()
