"""EDS-NLP as a command: notes in (JSONL), spans out (Parquet).

    .venv-edsnlp/bin/python benchmarks/edsnlp_contender.py NOTES -o SPANS.parquet --checkpoint CHECKPOINT

Runs in an environment of its own (constraints-edsnlp.txt), so it imports nothing of medner. The encoder is the
checkpoint's, the head has random weights: EDS-NLP labels its own words by tags of its own, so this is its speed alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WINDOW, STRIDE = 128, 96
#: As those of contenders.py, without a score, which EDS-NLP leaves out by default.
SPANS = pa.schema([("note_id", pa.string()), ("start", pa.int32()), ("end", pa.int32()), ("label", pa.string())])


def pipeline(checkpoint: str) -> Any:
    """A transformer in strided windows, and a head that labels words independently of one another."""
    import edsnlp
    import edsnlp.pipes as eds
    import torch

    torch.manual_seed(13)
    nlp = edsnlp.blank("eds")
    head = eds.ner_crf(
        embedding=eds.transformer(model=checkpoint, window=WINDOW, stride=STRIDE),
        mode="independent",
        # Tags are then taken word by word, the fastest of its ways.
        window=1,
        labels=["Disease"],
        target_span_getter={"ents": True},
        span_setter={"ents": True},
    )
    nlp.add_pipe(head, name="ner")
    nlp.post_init([])
    with torch.no_grad():
        # Tag 0 is O. A trained head says it of most words, and every span costs time.
        nlp.pipes.ner.linear.bias[0] += 0.9
    return nlp


def rows(ids: Sequence[str], docs: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """A row per entity; docs are spaCy documents in the order of the ids."""
    for note_id, doc in zip(ids, docs, strict=True):
        for span in doc.ents:
            yield {"note_id": note_id, "start": span.start_char, "end": span.end_char, "label": span.label_}


def main() -> None:
    """Annotate a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notes", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batch-words", type=int, default=2048)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()

    import torch

    torch.set_num_threads(given.threads)
    with given.notes.open(encoding="utf-8") as lines:
        notes = [json.loads(line) for line in lines]
    docs = (
        pipeline(given.checkpoint)
        .pipe([note["text"] for note in notes])
        .set_processing(batch_size=f"{given.batch_words} words", autocast=torch.bfloat16, device="cpu")
    )
    pq.write_table(pa.Table.from_pylist(list(rows([n["note_id"] for n in notes], docs)), SPANS), given.output)


if __name__ == "__main__":
    main()
