"""One run: parts by rows alone, whole output directories and files, the record of what was run, and no note text."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from medner import run as running
from medner import schema, sinks, sources, testing
from medner.annotate import Annotator, Options
from medner.errors import InputError, MednerError, OutputError, TooManyRejected, UsageError
from medner.run import RunOptions, check_rejected, cut_parts, run, summary
from medner.sources import ReadOptions
from medner.verify import verify

NOTES: list[dict[str, Any]] = [
    {"note_id": "a", "text": "Type 2 diabetes, no fever.", "extra": "ICU"},
    {"note_id": 7, "text": ""},
    {"text": "Höart – heart failure 😀 fever"},
    {"note_id": 12345678901234567890123, "text": "id too large"},
    {"note_id": "b", "text": None},
    {"note_id": "c", "text": "ok"},
]
#: What the tiny model's rule gives for NOTES, in the head: row -> mentions.
MENTIONS = {0: ["Type 2 diabetes", "fever"], 2: ["heart failure", "fever"]}
REASONS = [None, None, None, "id is beyond 64 bits", "text is null", None, "malformed JSON"]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A JSONL file of seven rows: four that can be annotated, three that cannot, a blank line between them."""
    path = tmp_path / "notes.jsonl"
    lines = [json.dumps(note, ensure_ascii=False) for note in NOTES]
    path.write_text("\n".join([*lines[:3], "", *lines[3:], "{nope"]) + "\n", encoding="utf-8")
    return path


def go(inputs: Path | str, output: Path | str, **changes: Any) -> dict[str, Any]:
    """One quiet run with the tiny model."""
    options = RunOptions((str(inputs),), str(output), model=str(testing.bundle()), quiet=True)
    return run(replace(options, **changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a table, its parts one after another."""
    found: list[dict[str, Any]] = []
    for file in sorted(folder.iterdir()):
        if file.suffix == ".parquet":
            found += pq.read_table(file).to_pylist()
        else:
            found += map(orjson.loads, file.read_bytes().splitlines())
    return found


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of every file of both tables."""
    return {str(file.relative_to(path)): file.read_bytes() for t in ("spans", "notes") for file in (path / t).iterdir()}


def listing(path: Path) -> list[str]:
    """Everything below a directory, hidden files too."""
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def plain_parts(texts: Iterable[str | None], part_rows: int, part_bytes: int) -> list[int]:
    """The part of each row, worked out one row after another."""
    parts, part, held, size = [], 0, 0, 0
    for text in texts:
        parts.append(part)
        held, size = held + 1, size + len((text or "").encode())
        if held >= part_rows or size >= part_bytes:
            part, held, size = part + 1, 0, 0
    return parts


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=30),
    st.lists(st.integers(0, 30), max_size=6),
    st.integers(1, 8),
    st.integers(1, 40),
)
def test_parts_end_where_the_rows_say(
    texts: list[str | None], cuts: list[int], part_rows: int, part_bytes: int
) -> None:
    """Whatever the batches, each row is in the part that a plain count gives it, and rows keep their order."""
    edges = sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})
    whole = pa.record_batch({"row": pa.array(range(len(texts)), pa.int64()), "text": pa.array(texts, pa.string())})
    batches = [whole.slice(start, end - start) for start, end in pairwise(edges)]
    cut = list(cut_parts(batches, part_rows, part_bytes))
    assert [row for _, batch in cut for row in batch.column("row").to_pylist()] == list(range(len(texts)))
    assert [part for part, batch in cut for _ in range(batch.num_rows)] == plain_parts(texts, part_rows, part_bytes)
    assert all(batch.num_rows for _, batch in cut)


def test_the_shipped_limits() -> None:
    """5,000 rows or 32 MiB of text."""
    short = pa.record_batch({"text": ["x"] * 5_001})
    assert [(part, batch.num_rows) for part, batch in cut_parts([short], running.PART_ROWS)] == [(0, 5_000), (1, 1)]
    large = pa.record_batch({"text": ["x" * 2**24] * 3})
    assert [(part, batch.num_rows) for part, batch in cut_parts([large], running.PART_ROWS)] == [(0, 2), (1, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Run directories


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_run_directory(tmp_path: Path, notes: Path, form: str) -> None:
    """Every row is in ``notes``, every mention in ``spans``; ids, hashes and counts agree with the input."""
    out = tmp_path / "out"
    manifest = go(notes, out, form=form, part_rows=3)
    numbers = [f"part-{number:06d}.{form}" for number in range(3)]
    tables = [f"{table}/{name}" for table in ("notes", "spans") for name in numbers]
    assert listing(out) == sorted(["manifest.json", "notes", "run.json", "spans", *tables])
    texts = [note["text"] for note in NOTES]
    spans = rows(out / "spans")
    assert [(span["row"], span["text"]) for span in spans] == [(r, m) for r, found in MENTIONS.items() for m in found]
    assert all(texts[span["row"]][span["start"] : span["end"]] == span["text"] for span in spans)
    assert {span["label"] for span in spans} == {"Disease"}
    table = rows(out / "notes")
    assert [(note["source"], note["row"]) for note in table] == [("notes.jsonl", row) for row in range(7)]
    assert [note["note_id"] for note in table] == [
        "a",
        "7",
        "notes.jsonl:2",
        "notes.jsonl:3",
        "b",
        "c",
        "notes.jsonl:6",
    ]
    assert [note["reason"] for note in table] == REASONS
    assert [note["status"] for note in table] == ["rejected" if reason else "annotated" for reason in REASONS]
    good = [
        text if text is not None and reason is None else None
        for text, reason in zip([*texts, None], REASONS, strict=True)
    ]
    assert [note["text_sha256"] for note in table] == [
        None if text is None else hashlib.sha256(text.encode()).hexdigest() for text in good
    ]
    assert [note["n_chars"] for note in table] == [len(text or "") for text in good]
    assert [note["n_spans"] for note in table] == [2, 0, 2, 0, 0, 0, 0]
    counts = manifest["counts"]
    assert counts["rows"] == len(table) == counts["annotated"] + counts["rejected"]
    assert counts["rejected"] == 3
    assert counts["spans"] == len(spans)
    for name in ("chars", "tokens", "unknown", "windows"):
        assert counts[name] == sum(note[f"n_{name}"] for note in table)
    assert counts["windows"] == counts["windows_inferred"] + counts["windows_reused"]
    assert counts["parts"] == 3
    assert json.loads((out / "manifest.json").read_bytes()) == manifest


def test_both_formats_hold_the_same_rows_in_the_declared_schemas(tmp_path: Path, notes: Path) -> None:
    """Parquet has exactly the schemas of ``schema`` with their version, and the first row starts with the key."""
    cases: list[dict[str, Any]] = [{}, {"text": False}, {"nested": True}, {"read": ReadOptions(keep=("extra",))}]
    for options in cases:
        keep = [pa.field(name, pa.string()) for name in options.get("read", ReadOptions()).keep]
        outs = [tmp_path / f"{form}-{'-'.join(options)}" for form in ("parquet", "jsonl")]
        for out in outs:
            go(notes, out, form=out.name.partition("-")[0], **options)
        make = schema.nested_schema if "nested" in options else schema.spans_schema
        wanted = {"spans": make(text=options.get("text", True), keep=keep), "notes": schema.notes_schema(keep)}
        for table, columns in wanted.items():
            found = pq.read_schema(outs[0] / table / "part-000000.parquet")
            assert found.equals(columns)  # the items of a list are called as Parquet prescribes
            assert found.metadata == {b"medner.schema_version": b"1.0"}
            same = pa.array(rows(outs[1] / table), pa.struct(list(columns)))  # JSON's numbers as the columns hold them
            assert same.to_pylist() == rows(outs[0] / table)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_equal_runs_write_equal_bytes(tmp_path: Path, notes: Path, form: str) -> None:
    """Also with other threads, other batches and without reuse: only what decides the spans decides the bytes."""
    outputs = []
    for number, annotate in enumerate(
        [Options(), Options(), Options(threads=1), Options(batch_tokens=1), Options(threads=3, reuse=False)]
    ):
        go(notes, tmp_path / str(number), form=form, part_rows=2, annotate=annotate)
        outputs.append(contents(tmp_path / str(number)))
    assert len(outputs[0]) == 8
    assert all(output == outputs[0] for output in outputs)


def test_what_was_run_is_recorded(tmp_path: Path, notes: Path) -> None:
    """``run.json`` is there before the first part, and the manifest begins with all that it says."""
    out = tmp_path / "out"
    manifest = go(notes, out, annotate=Options(threads=2, batch_tokens=100, min_score=0.25), max_rejected="50%")
    assert list(manifest) == [
        "medner",
        "versions",
        "model",
        "options",
        "inputs",
        "counts",
        "seconds",
        "stages",
        "files",
    ]
    description = json.loads((out / "run.json").read_bytes())
    sizes = [{"source": "notes.jsonl", "bytes": notes.stat().st_size}]
    assert description == {name: manifest[name] for name in ("medner", "versions", "model", "options")} | {
        "inputs": sizes
    }
    assert list(manifest["versions"]) == ["onnxruntime", "tokenizers", "sentencex", "pyarrow", "numpy", "python"]
    model = manifest["model"]
    digest = hashlib.sha256((testing.bundle() / "onnx/model.onnx").read_bytes()).hexdigest()
    assert model["files"]["onnx/model.onnx"] == digest
    assert set(model["files"]) == {"config.json", "medner.json", "tokenizer.json", "onnx/model.onnx"}
    assert [model[name] for name in ("name", "precision", "window", "device", "provider")] == [
        "tiny", "fp32", 32, "cpu", "CPUExecutionProvider"
    ]  # fmt: skip
    assert manifest["options"] == {
        "inputs": [str(notes)], "output": str(out), "model": str(testing.bundle()), "format": "parquet", "text": True,
        "nested": False, "part_rows": 5000, "max_rejected": "50%", "threads": 2, "batch_tokens": 100,
        "min_score": 0.25, "reuse": True,
        "read": {"text_column": "text", "id_column": None, "encoding": "utf-8", "delimiter": None, "quotes": True,
                 "keep": [], "limit": None, "max_note_bytes": 67108864, "unique_ids": False},
    }  # fmt: skip
    content = notes.read_bytes()
    assert manifest["inputs"] == [
        {"source": "notes.jsonl", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": 7}
    ]


def test_names_of_text_files_stay_out_of_the_record(tmp_path: Path) -> None:
    """A text file's name may be an id: it is in the tables alone, whether a folder or each file is named."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("ID-4711.txt", "ID-4712.txt"):
        (folder / name).write_text("fever")
    files = tuple(str(folder / name) for name in ("ID-4711.txt", "ID-4712.txt"))
    lines = "".join(f"ID-471{n}.txt\0{hashlib.sha256(b'fever').hexdigest()}\n" for n in (1, 2))
    for number, inputs in enumerate([(str(folder),), files]):
        out = tmp_path / str(number)
        manifest = run(RunOptions(inputs, str(out), model=str(testing.bundle()), quiet=True))
        assert manifest["inputs"] == [
            {"text_files": 2, "bytes": 10, "sha256": hashlib.sha256(lines.encode()).hexdigest()}
        ]
        assert "ID-" not in (out / "manifest.json").read_text() + (out / "run.json").read_text()
        assert [note["note_id"] for note in rows(out / "notes")] == ["ID-4711.txt", "ID-4712.txt"]
    assert json.loads((tmp_path / "1" / "run.json").read_text())["options"]["inputs"] == ["(2 text files)"]


def test_a_file_name_that_is_no_utf_8(tmp_path: Path) -> None:
    """It is read, and recorded with its odd bytes escaped."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    with open(path, "w") as file:  # noqa: PTH123
        file.write('{"text": "fever"}')
    manifest = go(path, tmp_path / "out")
    assert manifest["options"]["inputs"] == [f"{tmp_path}/caf\\xe9.jsonl"]
    assert rows(tmp_path / "out" / "notes")[0]["source"] == "caf\\xe9.jsonl"


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_no_rows_at_all(tmp_path: Path, form: str) -> None:
    """An empty input gives one empty part, so that what reads the tables finds their columns."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    manifest = go(tmp_path / "empty.jsonl", tmp_path / "out", form=form)
    assert contents(tmp_path / "out").keys() == {f"spans/part-000000.{form}", f"notes/part-000000.{form}"}
    assert rows(tmp_path / "out" / "spans") == rows(tmp_path / "out" / "notes") == []
    assert (manifest["counts"]["rows"], manifest["counts"]["parts"]) == (0, 1)
    assert summary({**manifest, "seconds": 0.0}) == (
        "0 notes: 0 annotated, 0 rejected, 0 spans\ntiny fp32 on cpu, 0.0 s, 0.0 notes/s, 0 of 0 windows reused"
    )


def test_the_summary() -> None:
    """Two lines for a person; of a resumed run, the rate is that of its own work."""
    manifest: dict[str, Any] = {
        "model": {"name": "default", "precision": "int8", "device": "cpu"},
        "seconds": 20.0,
        "counts": {"rows": 12345, "annotated": 12300, "rejected": 45, "spans": 67890, "windows": 50000,
                   "windows_reused": 1234, "rows_kept": 0, "windows_kept": 0},
    }  # fmt: skip
    assert summary(manifest) == (
        "12,345 notes: 12,300 annotated, 45 rejected, 67,890 spans\n"
        "default int8 on cpu, 20.0 s, 617.2 notes/s, 1,234 of 50,000 windows reused"
    )
    manifest["counts"] |= {"rows_kept": 10_000, "windows_kept": 40_000}
    assert summary(manifest).splitlines()[1] == (
        "default int8 on cpu, 20.0 s, 117.2 notes/s, 1,234 of 10,000 windows reused; 10,000 notes were annotated before"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_kept_columns(tmp_path: Path) -> None:
    """Kept columns stand in both tables: Parquet types as they are, everything else as strings."""
    table = pa.table({"text": ["fever", "ok"], "age": pa.array([61, None], pa.int16()), "ward": ["x", "y"]})
    pq.write_table(table, tmp_path / "in.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "in.csv")
    read = ReadOptions(keep=("age", "ward"))
    go(tmp_path / "in.parquet", tmp_path / "typed", read=read)
    for name, kept in (("spans", [(61, "x")]), ("notes", [(61, "x"), (None, "y")])):
        file = tmp_path / "typed" / name / "part-000000.parquet"
        assert pq.read_schema(file).field("age").type == pa.int16()
        assert [(row["age"], row["ward"]) for row in pq.read_table(file).to_pylist()] == kept
    go(tmp_path / "in.csv", tmp_path / "strings", form="jsonl", read=read)
    assert [(row["age"], row["ward"]) for row in rows(tmp_path / "strings" / "notes")] == [("61", "x"), ("", "y")]


def test_limit_unique_ids_and_min_score(tmp_path: Path) -> None:
    """The first rows only; a second row of one id rejected; spans below a score left out."""
    path = tmp_path / "in.jsonl"
    texts = ["fever", "asthma", "mellitus", "ok"]
    path.write_text("".join(json.dumps({"note_id": i % 3, "text": text}) + "\n" for i, text in enumerate(texts)))
    assert go(path, tmp_path / "limit", read=ReadOptions(limit=2))["counts"]["rows"] == 2
    go(path, tmp_path / "unique", read=ReadOptions(unique_ids=True))
    assert [note["reason"] for note in rows(tmp_path / "unique" / "notes")] == [None, None, None, "id is repeated"]
    go(path, tmp_path / "all")
    scores = {row["text"]: row["score"] for row in rows(tmp_path / "all" / "spans")}
    assert scores["asthma"] < scores["fever"] < scores["mellitus"]
    go(path, tmp_path / "sure", annotate=Options(min_score=scores["fever"]))
    assert [row["text"] for row in rows(tmp_path / "sure" / "spans")] == ["fever", "mellitus"]


@pytest.mark.parametrize(
    ("given", "rejected", "total", "allowed"),
    [
        ("0", 0, 9, True), ("0", 1, 9, False), ("2", 2, 9, True), ("2", 3, 9, False), ("10%", 1, 10, True),
        ("10%", 1, 9, False), ("0.57%", 57, 10_000, True), ("0.57%", 58, 10_000, False), ("0%", 0, 0, True),
        ("all", 9, 9, True), ("100%", 9, 9, True),
    ],
)  # fmt: skip
def test_max_rejected(given: str, rejected: int, total: int, allowed: bool) -> None:
    """A count, an exact percentage of the rows, or all."""
    manifest = {"counts": {"rows": total, "rejected": rejected}, "options": {"max_rejected": given}}
    if allowed:
        check_rejected(manifest)
        return
    with pytest.raises(TooManyRejected) as caught:
        check_rejected(manifest)
    assert str(caught.value) == (
        f"{rejected} of {total} rows were rejected, more than --max-rejected {given} allows; "
        "the output is complete and gives each one's reason"
    )


@pytest.mark.parametrize(
    "given", ["", "-1", "1.5", "%", "x%", "-1%", "nan", "nan%", "inf", "inf%", "1e3", "ALL", "1 %"]
)
def test_max_rejected_that_says_nothing(tmp_path: Path, notes: Path, given: str) -> None:
    """Anything else is refused before a file is touched."""
    with pytest.raises(UsageError) as caught:
        go(notes, tmp_path / "out", max_rejected=given)
    assert str(caught.value) == f"--max-rejected {given}: use a count, a percentage such as 0.5%, or all"
    assert listing(tmp_path) == ["notes.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Single files and streams


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_single_file(tmp_path: Path, notes: Path, suffix: str) -> None:
    """The spans, the notes and the manifest side by side hold what a run directory holds; runs repeat to the byte."""
    go(notes, tmp_path / "dir", form="parquet" if suffix == "parquet" else "jsonl", part_rows=2)
    out = tmp_path / "one"
    out.mkdir()
    manifest = go(notes, out / f"x.{suffix}", part_rows=2)
    assert listing(out) == sorted([f"x.{suffix}", f"x.notes.{suffix}", "x.manifest.json"])
    assert json.loads((out / "x.manifest.json").read_bytes()) == manifest
    for name, table in ((f"x.{suffix}", "spans"), (f"x.notes.{suffix}", "notes")):
        if suffix == "parquet":
            found = pq.read_table(out / name).to_pylist()
        else:
            with pa.input_stream(str(out / name)) as stream:
                found = [orjson.loads(line) for line in stream.read().splitlines()]
        assert found == rows(tmp_path / "dir" / table)
    before = (out / f"x.{suffix}").read_bytes()
    with pytest.raises(OutputError) as caught:
        go(notes, out / f"x.{suffix}")
    assert str(caught.value) == f"{out}/x.{suffix}: exists already; choose another -o, or pass --overwrite"
    go(notes, out / f"x.{suffix}", part_rows=2, overwrite=True)
    assert (out / f"x.{suffix}").read_bytes() == before


def test_a_stream(notes: Path) -> None:
    """A record for each input row, rejected ones included, from a stream to a stream."""
    stdout = io.BytesIO()
    options = RunOptions(("-",), "-", model=str(testing.bundle()), quiet=True)
    manifest = run(options, stdin=io.BytesIO(notes.read_bytes()), stdout=stdout)
    records = [orjson.loads(line) for line in stdout.getvalue().splitlines()]
    assert [list(record) for record in records] == [["source", "row", "note_id", "status", "reason", "spans"]] * 7
    assert [(record["source"], record["row"], record["reason"]) for record in records] == [
        ("-", row, reason) for row, reason in enumerate(REASONS)
    ]
    assert [record["spans"] is None for record in records] == [reason is not None for reason in REASONS]
    found = {record["row"]: [span["text"] for span in record["spans"]] for record in records if record["spans"]}
    assert found == MENTIONS
    assert manifest["options"]["format"] == "jsonl"


def test_a_stream_does_not_wait_for_a_part(tmp_path: Path) -> None:
    """Records are written as batches are done, long before 5,000 rows are."""
    seen: list[int] = []

    class Stream(io.BytesIO):
        def flush(self) -> None:
            seen.append(len(self.getvalue().splitlines()))

    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "fever"}\n' * 2_500)
    run(RunOptions((str(path),), "-", model=str(testing.bundle()), quiet=True), stdout=Stream())
    # Short batches first, each twice the one before.
    assert seen == [8, 24, 56, 120, 248, 504, 1_016, 2_016, 2_500]


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def fail_late(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """Let the source or the annotator fail after a few batches."""
    owner, name = (sources.Reader, "batches") if where == "source" else (Annotator, "stream")
    original = getattr(owner, name)

    count = itertools.count()

    def failing(*arguments: Any) -> Iterator[pa.RecordBatch]:
        for batch in original(*arguments):
            if next(count) == 3:
                raise error
            yield batch

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("where", ["source", "annotator"])
@pytest.mark.parametrize("error", [InputError("late"), RuntimeError("late"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", ["out", "out.parquet", "out.jsonl", "out.jsonl.gz"])
def test_a_failure_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, output: str
) -> None:
    """Single files leave nothing; a directory keeps the parts that were committed, which are those of a whole run."""
    work = tmp_path / "work"
    work.mkdir()
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"fever {n}"}) + "\n" for n in range(40)))
    monkeypatch.setattr(sources, "BATCH_ROWS", 10)
    monkeypatch.setattr(sources, "_FIRST_ROWS", 10)
    go(path, tmp_path / "whole", part_rows=10)
    fail_late(monkeypatch, where, error)
    with pytest.raises(type(error)) as caught:
        go(path, work / output, part_rows=10)
    assert caught.value is error
    if output != "out":
        assert listing(work) == []
        return
    assert not (work / "out" / "manifest.json").exists()
    assert (work / "out" / "run.json").is_file()
    assert not [name for name in listing(work) if name.endswith(".tmp")]
    kept = contents(work / "out")
    # The source is read one batch ahead, where the next part begins.
    assert len(kept) == (4 if where == "source" else 6)
    assert kept.items() <= contents(tmp_path / "whole").items()


def test_a_truncated_file_keeps_the_parts_before_it(tmp_path: Path) -> None:
    """Compressed data that ends early is an error at its place; whole parts read before it stay."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = b"".join(b'{"text": "%d %s"}\n' % (n, b"fever and no asthma " * 50) for n in range(1_500))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines)[:-50])
    with pytest.raises(InputError) as caught:
        go(folder, tmp_path / "out", part_rows=100, annotate=Options(threads=1))
    assert str(caught.value) == (
        f"cannot read {folder}/b.jsonl.gz: its gz data is damaged or ends early; copy or write it again"
    )
    parts = listing(tmp_path / "out" / "notes")
    assert parts[:2] == ["part-000000.parquet", "part-000001.parquet"]
    assert listing(tmp_path / "out" / "spans") == parts


def test_an_input_that_grew_before_its_turn(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is recorded, in ``run.json``, too: the run is whole, and finished for ``--resume``."""
    other = tmp_path / "other.jsonl"
    other.write_bytes(b'{"text": "fever"}\n')
    sizes = sources.sizes
    options = RunOptions(
        (str(notes), str(other)), str(tmp_path / "out"), model=str(testing.bundle()), quiet=True, part_rows=2
    )

    def grow(files: Iterable[sources.InputFile]) -> list[dict[str, Any]]:
        found = sizes(files)
        other.write_bytes(b'{"text": "fever"}\n{"text": "asthma"}\n')
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sources, "sizes", grow)
        manifest = run(options)
    assert manifest["inputs"][1]["rows"] == 2
    written = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert [each["bytes"] for each in written["inputs"]] == [each["bytes"] for each in manifest["inputs"]]
    verify(tmp_path / "out", [str(notes), str(other)])
    assert run(replace(options, resume=True)) == manifest


def test_a_dangling_link_is_an_input_error(tmp_path: Path) -> None:
    """The progress, which asks for sizes, leaves it to the reader to say so."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to("nowhere")
    with pytest.raises(InputError) as caught:
        go(folder, tmp_path / "out", quiet=False)
    assert str(caught.value) == f"cannot read {folder}/a.jsonl: No such file or directory"


@pytest.mark.parametrize(
    ("output", "form", "said"),
    [
        ("-", "parquet", "-o - writes JSON lines; --format parquet needs a file or a directory"),
        ("x.parquet", "jsonl", "--format jsonl and -o x.parquet contradict each other; drop one"),
        ("x.jsonl.gz", "parquet", "--format parquet and -o x.jsonl.gz contradict each other; drop one"),
        ("", None, "-o is empty; name a directory, a file, or -"),
        *(
            (
                name,
                None,
                f"-o {name}: a file ends in {', '.join(sinks.FILE_SUFFIXES)}; a run directory has no such suffix",
            )
            for name in ("spans.csv", "spans.JSON", "spans.parquet.gz")
        ),
    ],
)
def test_outputs_that_cannot_be(
    notes: Path, monkeypatch: pytest.MonkeyPatch, output: str, form: str | None, said: str
) -> None:
    """The suffix of the output and --format must agree, and a name is no other format's."""
    monkeypatch.chdir(notes.parent)
    with pytest.raises(UsageError) as caught:
        go(notes, output, form=form)
    assert str(caught.value) == said
    assert listing(notes.parent) == ["notes.jsonl"]


def test_input_and_output_are_kept_apart(tmp_path: Path, notes: Path) -> None:
    """A run that would replace its input, or read its own spans as notes, is refused, and changes nothing."""
    before = notes.read_bytes()
    with pytest.raises(UsageError) as caught:
        go(notes, notes, overwrite=True)
    assert str(caught.value) == f"{notes} is an input and lies in the output {notes}; choose another -o"
    beside = tmp_path / "x.notes.jsonl"
    beside.write_bytes(before)
    with pytest.raises(UsageError) as caught:
        go(beside, tmp_path / "x.jsonl", overwrite=True)
    assert str(caught.value) == f"{beside} is an input and lies in the output {tmp_path}/x.jsonl; choose another -o"
    beside.unlink()
    out = tmp_path / "run"
    for output in (out, tmp_path / "x.jsonl", tmp_path):  # nothing of it is there yet, but with --resume it would be
        with pytest.raises(UsageError) as caught:
            go(tmp_path, output)
        assert str(caught.value) == (
            f"-o {output} lies in the input {tmp_path}; choose another -o, or name files or another glob"
        )
    assert not out.exists()
    go(notes, out)
    parts = contents(out)
    with pytest.raises(UsageError) as caught:
        go(f"{tmp_path}/**/*", out, overwrite=True)
    assert str(caught.value) == (
        f"-o {out} lies in the input {tmp_path}/**/*; choose another -o, or name files or another glob"
    )
    first = out / "notes" / "part-000000.parquet"
    with pytest.raises(UsageError) as caught:
        go(first, out, overwrite=True)
    assert str(caught.value) == f"{first} is an input and lies in the output {out}; choose another -o"
    assert contents(out) == parts
    assert notes.read_bytes() == before


@pytest.mark.parametrize(
    ("pattern", "output", "refused"),
    [
        ("d*", "data/out", True), ("*", "data/out", True), ("data/*", "data/out", True), ("data/*", "data/.out", False),
        ("data/.o*", "data/.out", True), ("data/*.jsonl", "data/out", False), ("**/*", "out", True),
        ("data/**/*.parquet", "data/out", True), ("data/**/*.jsonl", "data/out", False), ("data/**", "data/x/y", True),
        ("data/*/*/*.parquet", "data/out", True), ("data/*/*.parquet", "data/out", False),
        ("data/*.jsonl", "data/out.jsonl", True), ("data/*.jsonl", "out.jsonl", False), ("link/*", "data/out", True),
        ("[dx]ata", "data/out", True),
    ],
)  # fmt: skip
def test_a_glob_that_would_read_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, output: str, refused: bool
) -> None:
    """A run whose parts its input would match, so that it could not be resumed, is refused before it is there."""
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    form = "jsonl" if output.endswith(".jsonl") else "parquet"
    with pytest.raises(UsageError, match="lies in the input") if refused else contextlib.nullcontext():
        running._check_apart([pattern], [], output, form)


@pytest.mark.parametrize("error", [OutputError("no"), ValueError("no")])
def test_nothing_is_touched_before_the_inputs_and_the_model_are_known(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An earlier output is not cleared for a run that cannot begin."""
    go(notes, tmp_path / "out")
    before = contents(tmp_path / "out")
    for changes in ({"model": "nowhere"}, {"read": ReadOptions(encoding="klingon")}):
        with pytest.raises(MednerError):
            go(notes, tmp_path / "out", overwrite=True, **changes)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(running, "_description", fail)
    with pytest.raises(type(error)):
        go(notes, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out" / "manifest.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def test_progress_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A line now and then on standard error, and nothing on standard output."""
    path = tmp_path / "in" / "in.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "fever"}\n' * 2_000)
    (path.parent / "other.doc").write_text("")
    monkeypatch.setattr(running, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(sources, "_FIRST_ROWS", 1_000)
    go(path.parent, tmp_path / "out", quiet=False)
    output, error = capfd.readouterr()
    assert output == ""
    lines = error.splitlines()
    assert lines[0] == "medner: 1 file of unknown suffix skipped"
    # Two batches of 1,000 rows are cut by no part.
    assert [re.sub(r"[0-9,.]+ notes/s", "R notes/s", line) for line in lines[1:]] == [
        "medner: 100 % of the input read, 1,000 notes, R notes/s, 1,000 spans",
        "medner: 100 % of the input read, 2,000 notes, R notes/s, 2,000 spans",
    ]
    go(path, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    go(path.parent, tmp_path / "folder")
    assert capfd.readouterr() == ("", "medner: 1 file of unknown suffix skipped\n")


def test_a_window_that_was_assumed_is_said(tmp_path: Path, notes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A foreign model gets a notice, unless --window was given."""
    foreign = tmp_path / "foreign"
    (foreign / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "onnx/model.onnx"):
        (foreign / name).write_bytes((testing.bundle() / name).read_bytes())
    manifest = go(notes, tmp_path / "a", model=str(foreign), quiet=False)
    assert capfd.readouterr().err == (
        "medner: foreign does not say its window; using 128 tokens (--window overrides)\n"
    )
    assert manifest["model"]["window"] == 128
    go(notes, tmp_path / "b", model=str(foreign), quiet=False, annotate=Options(window=64))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_a_log_that_nobody_reads_stops_nothing(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, stderr: str | None
) -> None:
    """A closed or missing standard error is no reason to give up a run."""

    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed() if stderr else None)
    monkeypatch.setattr(running, "_LINE_SECONDS", 0.0)
    stdout = io.StringIO()
    monkeypatch.setattr("sys.stdout", stdout)
    go(notes, tmp_path / "out", quiet=False)
    assert stdout.getvalue() == ""
    assert (tmp_path / "out" / "manifest.json").is_file()
