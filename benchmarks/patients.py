"""Corpora: reads real notes, writes notes files, and generates patients whose later notes repeat earlier ones.

    python benchmarks/patients.py OUT.jsonl [--patients 125] [--notes 8] [--seed 13]

Text is carried from note to note in clinical records: in 104 million notes 50.1 % of all text repeated earlier text
about the same patient (Steinkamp et al., JAMA Netw Open 2022, e2233348). The generator copies whole runs of sentences,
as people do. Every distinct text of MTSamples serves at most one note, so that the new half of a note is new.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import pyarrow as pa

from medner import sources

PATIENTS = 125
NOTES_EACH = 8
SEED = 13
#: What a later note is to repeat of its patient's earlier notes, measured by :func:`repeated_share`.
SHARE = (0.45, 0.55)

ACI_BENCH = common.DATA / "aci-bench" / "notes.jsonl"
MTSAMPLES = common.DATA / "mtsamples" / "mtsamples.csv"
MTSAMPLES_COLUMN = "transcription"

#: Not medner's own rule, which would let copies end exactly where windows do. MTSamples' line breaks became commas.
_SENTENCE_END = re.compile(r"(?<=[.!?]),?\s+|\n+")
#: Sentences that are copied together, or that stand together as new, make one line.
_LONGEST_RUN = 8


@dataclass(frozen=True, slots=True)
class Note:
    """One generated note; a patient's notes are numbered in the order of their making."""

    patient: int
    number: int
    text: str

    @property
    def id(self) -> str:
        """The note's id, such as ``p0007-n2``."""
        return f"p{self.patient:04d}-n{self.number}"


# ---------------------------------------------------------------------------------------------------------------------
# Notes files


def read_texts(path: Path, column: str = "text") -> list[str]:
    """The texts of a notes file in any format that medner reads; rows without one are left out."""
    reader = sources.Reader(sources.discover([str(path)]).files, sources.ReadOptions(text_column=column))
    return [text for text in pa.Table.from_batches(reader.batches()).column("text").to_pylist() if text]


def distinct_mtsamples() -> list[str]:
    """MTSamples' texts, each once, in their first order."""
    return list(dict.fromkeys(read_texts(MTSAMPLES, MTSAMPLES_COLUMN)))


def write_notes(path: Path, notes: Iterable[tuple[str, str]]) -> Path:
    """Write pairs of id and text as JSONL; returns the path."""
    with path.open("w", encoding="utf-8") as file:
        for name, text in notes:
            file.write(json.dumps({"note_id": name, "text": text}, ensure_ascii=False) + "\n")
    return path


def write_copies(path: Path, texts: Sequence[str], copies: int) -> Path:
    """Write the texts over and over, each copy with an id of its own; returns the path."""
    return write_notes(path, ((f"{copy}-{i}", text) for copy in range(copies) for i, text in enumerate(texts)))


# ---------------------------------------------------------------------------------------------------------------------
# Patients


def sentences(text: str) -> list[str]:
    """Sentences and lines, without the white space between them."""
    return [part for piece in _SENTENCE_END.split(text) if (part := piece.strip())]


def generate(
    texts: Sequence[str], patients: int = PATIENTS, notes_each: int = NOTES_EACH, seed: int = SEED
) -> list[Note]:
    """Patients one after another, each with ``notes_each`` notes, from distinct texts in an order drawn by ``seed``.

    A first note is a text as it is. A later one takes about half of a new text, and as many characters again in runs of
    sentences from the patient's earlier notes; both keep their own order. Raises ValueError where the texts do not
    suffice.
    """
    if len(texts) < patients * notes_each:
        raise ValueError(
            f"{patients} patients with {notes_each} notes need {patients * notes_each} texts, not {len(texts)}"
        )
    rng = random.Random(seed)
    fresh = iter(rng.sample(list(texts), patients * notes_each))
    return [
        note for patient in range(patients) for note in _record([next(fresh) for _ in range(notes_each)], patient, rng)
    ]


def _record(texts: Sequence[str], patient: int, rng: random.Random) -> list[Note]:
    """One patient's notes."""
    notes = [Note(patient, 1, texts[0])]
    # A dict, since a sentence that came again is one sentence, and the first order is kept.
    earlier = dict.fromkeys(sentences(texts[0]))
    for number, text in enumerate(texts[1:], start=2):
        budget = min(len(text) // 2, _size(earlier))
        new = _runs(_up_to(sentences(text), budget), rng)
        copied = _copied(list(earlier), sum(map(_size, new)), rng)
        lines = [" ".join(line) for line in _merged(copied, new, rng)]
        notes.append(Note(patient, number, "\n".join(lines)))
        earlier |= dict.fromkeys(sentences(notes[-1].text))
    return notes


def _copied(pool: Sequence[str], budget: int, rng: random.Random) -> list[list[str]]:
    """Runs of neighbouring sentences, none twice, of about ``budget`` characters in all."""
    taken: set[int] = set()
    size = 0
    while size < budget and len(taken) < len(pool):
        start, length = rng.randrange(len(pool)), rng.randint(1, _LONGEST_RUN)
        run = [i for i in range(start, min(start + length, len(pool))) if i not in taken]
        run = run[: len(_up_to([pool[i] for i in run], budget - size))]
        taken.update(run)
        size += _size(pool[i] for i in run)
    return _neighbours(pool, taken)


def _neighbours(pool: Sequence[str], taken: set[int]) -> list[list[str]]:
    """The sentences taken, in order; those that follow one another make one run."""
    runs: list[list[str]] = []
    for i in sorted(taken):
        if i - 1 in taken:
            runs[-1].append(pool[i])
        else:
            runs.append([pool[i]])
    return runs


def _up_to(parts: Sequence[str], budget: int) -> list[str]:
    """The first sentences, as many as bring their characters nearest to ``budget``; at least one where there is one."""
    taken: list[str] = []
    size = 0
    for part in parts:
        if taken and size + len(part) - budget > budget - size:
            break
        taken.append(part)
        size += len(part)
    return taken


def _runs(parts: Sequence[str], rng: random.Random) -> list[list[str]]:
    """Cut a sequence of sentences into runs of random length."""
    runs: list[list[str]] = []
    start = 0
    while start < len(parts):
        end = start + rng.randint(1, _LONGEST_RUN)
        runs.append(list(parts[start:end]))
        start = end
    return runs


def _merged(a: list[list[str]], b: list[list[str]], rng: random.Random) -> list[list[str]]:
    """Both in one random order that keeps each one's own."""
    sides = [0] * len(a) + [1] * len(b)
    rng.shuffle(sides)
    queues = iter(a), iter(b)
    return [next(queues[side]) for side in sides]


def _size(parts: Iterable[str]) -> int:
    return sum(map(len, parts))


def repeated_share(notes: Sequence[Note]) -> float:
    """Share of the characters of later notes that stand in sentences of the same patient's earlier notes.

    Measured on the finished texts, whatever the generator meant to copy. White space between sentences does not count,
    nor does a patient's first note. Raises ValueError where there is no later note.
    """
    seen: dict[int, set[str]] = {}
    repeated = total = 0
    for note in notes:
        parts = sentences(note.text)
        if note.patient in seen:
            total += _size(parts)
            repeated += _size(part for part in parts if part in seen[note.patient])
        seen.setdefault(note.patient, set()).update(parts)
    if not total:
        raise ValueError("no patient has a later note")
    return repeated / total


def generate_file(
    path: Path, patients: int = PATIENTS, notes_each: int = NOTES_EACH, seed: int = SEED
) -> dict[str, float]:
    """Generate from MTSamples into a JSONL file; its facts, for the record.

    Exits where the measured share lies outside :data:`SHARE`.
    """
    notes = generate(distinct_mtsamples(), patients, notes_each, seed)
    share = repeated_share(notes)
    if not SHARE[0] <= share <= SHARE[1]:
        raise SystemExit(f"later notes repeat {share:.1%} of their text, not {SHARE[0]:.0%} to {SHARE[1]:.0%}")
    write_notes(path, ((note.id, note.text) for note in notes))
    return {"patients": patients, "notes_each": notes_each, "seed": seed, "repeated_share": round(share, 4)}


def main() -> None:
    """Write a corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--patients", type=int, default=PATIENTS)
    parser.add_argument("--notes", type=int, default=NOTES_EACH, help="notes of each patient")
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    facts = generate_file(given.output, given.patients, given.notes, given.seed)
    print(f"{given.output}: later notes repeat {facts['repeated_share']:.1%} of their text")


if __name__ == "__main__":
    main()
