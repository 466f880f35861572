"""Annotated batches to tables, JSON lines and files: values against plain Python, files complete or absent."""

import datetime
import decimal
import errno
import gc
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partialmethod
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from medner import schema, sinks, testing
from medner.errors import InputError, OutputError, UsageError
from medner.sinks import DirectorySink, FileSink, StreamSink, TableOptions

RUN = {"what": "is run"}
MANIFEST = {"counts": {"rows": 3}}


def annotated(rows: list[tuple[str | None, list[tuple[int, int]]]], keep: list[int] | None = None) -> pa.RecordBatch:
    """A batch as the annotator gives it: rows of text and (start, end), a rejected one has no text."""
    spans = [
        None if text is None else [{"start": a, "end": b, "label": "D", "score": 1 / (a + b + 1)} for a, b in found]
        for text, found in rows
    ]
    columns: dict[str, Any] = {
        "source": ["s.jsonl"] * len(rows),
        "row": list(range(len(rows))),
        "note_id": [f"id-{row}" for row in range(len(rows))],
        "text": [text for text, _ in rows],
        "reason": ["malformed JSON" if text is None else None for text, _ in rows],
        "kept": keep or [0] * len(rows),
        "spans": spans,
        "n_chars": [len(text or "") for text, _ in rows],
        "n_tokens": [len((text or "").split()) for text, _ in rows],
        "n_unknown": [0] * len(rows),
        "n_windows": [1] * len(rows),
        "n_spans": [len(found or []) for found in spans],
        "text_sha256": [None if text is None else "aa" for text, _ in rows],
    }
    wanted = schema.annotated_schema(schema.source_schema([pa.field("kept", pa.int16())]))
    return pa.RecordBatch.from_arrays([pa.array(columns[field.name], field.type) for field in wanted], schema=wanted)


@st.composite
def batches(draw: st.DrawFn) -> pa.RecordBatch:
    """Annotated batches, often cut from the middle of a larger one."""
    rows: list[tuple[str | None, list[tuple[int, int]]]] = []
    for _ in range(draw(st.integers(0, 6))):
        text = draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
        edges = sorted(draw(st.sets(st.integers(0, len(text or "")), max_size=6)))
        rows.append((text, list(zip(edges[::2], edges[1::2], strict=False)) if text else []))
    batch = annotated(rows, keep=list(range(len(rows))))
    start = draw(st.integers(0, len(rows)))
    return batch.slice(start, draw(st.integers(0, len(rows) - start)))


def plain_spans(batch: pa.RecordBatch, text: bool) -> list[dict[str, Any]]:
    """What ``explode`` shall give, one Python object after another."""
    rows = []
    for note in batch.to_pylist():
        for span in note["spans"] or []:
            row = {name: note[name] for name in ("source", "row", "note_id")}
            row |= {"start": span["start"], "end": span["end"]}
            if text:
                row["text"] = note["text"][span["start"] : span["end"]]
            rows.append(row | {"label": span["label"], "score": span["score"], "kept": note["kept"]})
    return rows


KEPT = (pa.field("kept", pa.int16()),)


@settings(deadline=None, max_examples=150)
@given(batches(), st.booleans())
def test_explode_is_a_loop_over_notes_and_their_spans(batch: pa.RecordBatch, text: bool) -> None:
    """A row per span in input order, with code-point text, and exactly the declared schema; slices honoured."""
    table = sinks.explode(batch, TableOptions(text=text, keep=KEPT))
    assert table.schema.equals(schema.spans_schema(text=text, keep=KEPT), check_metadata=True)
    assert table.to_pylist() == plain_spans(batch, text)
    table.validate(full=True)


def test_explode_takes_views() -> None:
    """Of which Arrow picks no rows."""
    batch = annotated([("fever, gout", [(0, 5), (7, 11)]), ("", [])], keep=[7, 8])
    kept = pa.field("seen", pa.string_view())
    viewed = batch.append_column(kept, pa.array(["a", "b"], kept.type))
    place = viewed.schema.get_field_index("source")
    viewed = viewed.set_column(place, "source", viewed.column(place).cast(pa.string_view()))
    table = sinks.explode(viewed, TableOptions(keep=(kept,)))
    assert table.column("seen").to_pylist() == ["a", "a"]
    assert table.schema.field("seen") == kept
    assert table.drop_columns("seen").equals(sinks.explode(batch))


@settings(deadline=None, max_examples=150)
@given(batches(), st.booleans())
def test_nest_keeps_every_note(batch: pa.RecordBatch, text: bool) -> None:
    """A row per note: an empty list where nothing was found, null where the note was rejected."""
    table = sinks.nest(batch, TableOptions(text=text, nested=True, keep=KEPT))
    assert table.schema.equals(schema.nested_schema(text=text, keep=KEPT), check_metadata=True)
    names = ("start", "end", *(("text",) if text else ()), "label", "score")
    per_note: dict[int, list[Any]] = {note["row"]: [] for note in batch.to_pylist()}
    for span in plain_spans(batch, text):
        per_note[span["row"]].append({name: span[name] for name in names})
    assert table.to_pylist() == [
        {
            "source": note["source"],
            "row": note["row"],
            "note_id": note["note_id"],
            "spans": None if note["text"] is None else per_note[note["row"]],
            "kept": note["kept"],
        }
        for note in batch.to_pylist()
    ]
    table.validate(full=True)


@pytest.mark.parametrize("nested", [False, True])
def test_row_groups_depend_on_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    """A group of spans ends when its copies of kept values come to a size, wherever batches are cut."""
    monkeypatch.setattr(sinks, "GROUP_BYTES", 1_000)
    keep = (pa.field("kept", pa.large_string()),)
    rows = [("a" * 20, [(i, i + 1) for i in range(n)]) for n in (3, 0, 20, 1, 7, 2)] + [(None, [])]
    base = annotated(rows)
    kept = pa.array(["x" * n for n in (10, 5_000, 120, 3_000, 0, 40, 7)], pa.large_string())
    batch = base.set_column(base.schema.get_field_index("kept"), keep[0], kept)
    written = []
    for number, cuts in enumerate(([7], [1, 1, 1, 1, 1, 1, 1], [2, 5])):
        sink = DirectorySink(tmp_path / str(number), "parquet", TableOptions(nested=nested, keep=keep))
        sink.start(RUN)
        starts = [sum(cuts[:i]) for i in range(len(cuts))]
        sink.write(0, [batch.slice(start, length) for start, length in zip(starts, cuts, strict=True)])
        sink.finish({})
        sink.close()
        written.append((tmp_path / str(number) / "spans" / "part-000000.parquet").read_bytes())
    assert written[0] == written[1] == written[2]
    file = pq.ParquetFile(io.BytesIO(written[0]))
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    # A value with source and id is 21 bytes longer: 3 spans of 31 bytes, 20 of 141, one of 3,021, 7 of 21, 2 of 61.
    assert groups == ([2, 2, 3] if nested else [10, 8, 6, 9])
    assert file.read().to_pylist() == sinks.spans_table(batch, TableOptions(nested=nested, keep=keep)).to_pylist()


def test_columns_that_are_not_there() -> None:
    """Named; and the text of a span is that of the column that was annotated."""
    batch = annotated([("a fever", [(2, 7)])])
    other = batch.rename_columns(["report" if name == "text" else name for name in batch.schema.names])
    for table in (sinks.explode, sinks.nest):
        with pytest.raises(InputError, match="the batch has no column 'text'; needed are source, row, note_id, text, "):
            table(other, TableOptions())
        with pytest.raises(InputError, match="the batch has no column 'source'"):
            table(batch.select(["text", "spans", "n_spans"]), TableOptions())
    both = other.append_column("text", pa.array(["something"]))
    assert sinks.explode(both, TableOptions(text_column="report"))["text"].to_pylist() == ["fever"]
    assert sinks.explode(other, TableOptions(text=False)).num_rows == 1


def test_sizes_of_values() -> None:
    """What each value takes of the memory, whatever its type."""
    for array, sizes in (
        (pa.array([1, None], pa.int16()), [2, 2]),
        (pa.array([True, None]), [1, 1]),
        (pa.array(["ab", None, ""]), [2, 0, 0]),
        (pa.array(["ab", "c"], pa.large_string())[1:], [1]),
        (pa.array(["a" * 99] * 2).dictionary_encode(), [4, 4]),
    ):
        assert sinks._sizes(array).tolist() == sizes
    lists = sinks._sizes(pa.array([["a" * 1_000], []]))
    assert lists[0] > 1_000 > lists[1]


@settings(deadline=None, max_examples=80)
@given(batches())
def test_notes_table_says_what_became_of_each_row(batch: pa.RecordBatch) -> None:
    """A row per input row with its counts; ``rejected`` exactly where there is a reason."""
    table = sinks.notes_table(batch, TableOptions(keep=KEPT))
    assert table.schema.equals(schema.notes_schema(KEPT), check_metadata=True)
    names = [name for name in schema.notes_schema(KEPT).names if name != "status"]
    assert table.to_pylist() == [
        {name: note[name] for name in names} | {"status": "rejected" if note["reason"] else "annotated"}
        for note in batch.to_pylist()
    ]


@settings(deadline=None, max_examples=80)
@given(batches(), st.booleans())
def test_json_lines_hold_the_table(batch: pa.RecordBatch, nested: bool) -> None:
    """A line per row with the table's columns in order; scores read back as the same float32 numbers."""
    options = TableOptions(nested=nested, keep=KEPT)
    table = sinks.spans_table(batch, options)
    rows = [orjson.loads(line) for line in sinks.json_lines(table)]
    assert [list(row) for row in rows] == [options.spans_schema().names] * table.num_rows
    for row in rows:
        for span in (row["spans"] or []) if nested else [row]:
            assert len(repr(span["score"])) <= 12  # as short as float32 allows, not 17 digits
            span["score"] = float(np.float32(span["score"]))
    assert rows == table.to_pylist()


def test_json_lines_of_kept_columns() -> None:
    """Kept Parquet types are written as JSON has them, and as Arrow prints them where it has none, nested ones too."""
    nanoseconds = pa.timestamp("ns")
    fields = {
        "when": pa.array([datetime.datetime(2024, 2, 29, 12), None], nanoseconds),
        "day": pa.array([datetime.date(2024, 2, 29), None]),
        "price": pa.array([decimal.Decimal("1.10"), None]),
        "share": pa.array([0.25, float("nan")]),
        "sure": pa.array([True, None]),
        "tags": pa.array([["a", None], []]),
        "ward": pa.array(["x", None]).dictionary_encode(),
        "list": pa.array([[1, None], None], pa.list_(nanoseconds)),
        "large": pa.array([[decimal.Decimal("1.10")], None], pa.large_list(pa.decimal128(5, 2))),
        "pair": pa.array([[1, 2], None], pa.list_(nanoseconds, 2)),
        "struct": pa.array([{"a": 1, "b": [2]}, None], pa.struct({"a": pa.int8(), "b": pa.list_(pa.duration("ns"))})),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.date32())),
        "raw": pa.array([b"\xff\x00", None]),
        "raws": pa.array([[b"fever"], None]),
        "short": pa.array([0.1, None], pa.float32()),
    }
    first = "1970-01-01 00:00:00.00000000"
    assert [orjson.loads(line) for line in sinks.json_lines(pa.table(fields))] == [
        {"when": "2024-02-29 12:00:00.000000000", "day": "2024-02-29", "price": "1.10", "share": 0.25, "sure": True,
         "tags": ["a", None], "ward": "x", "list": [f"{first}1", None], "large": ["1.10"],
         "pair": [f"{first}1", f"{first}2"], "struct": {"a": 1, "b": ["2"]}, "map": [["k", "1970-01-02"]],
         "raw": "/wA=", "raws": ["ZmV2ZXI="], "short": 0.1},
        {"when": None, "day": None, "price": None, "share": None, "sure": None, "tags": [], "ward": None, "list": None,
         "large": None, "pair": None, "struct": None, "map": None, "raw": None, "raws": None, "short": None},
    ]  # fmt: skip


def test_json_lines_of_times_in_an_unknown_zone() -> None:
    """They are written as those of UTC, which is how they are stored."""
    times = pa.array([10**15, None], pa.timestamp("us", tz="Foo/Bar"))
    assert [orjson.loads(line) for line in sinks.json_lines(pa.table({"when": times}))] == [
        {"when": "2001-09-09 01:46:40.000000Z"},
        {"when": None},
    ]
    naive = pa.timestamp("us")
    kinds = pa.struct([("at", times.type), ("all", pa.list_(times.type)), ("day", pa.date32()), ("naive", naive)])
    nested = pa.array([{"at": 10**15, "all": [0, None], "day": 1, "naive": 0}, None], kinds)
    assert [orjson.loads(line)["when"] for line in sinks.json_lines(pa.table({"when": nested}))] == [
        {
            "at": "2001-09-09 01:46:40.000000Z",
            "all": ["1970-01-01 00:00:00.000000Z", None],
            "day": "1970-01-02",
            "naive": "1970-01-01 00:00:00.000000",
        },
        None,
    ]


def test_a_column_kept_twice_is_refused() -> None:
    """A table has no two columns of one name."""
    with pytest.raises(UsageError, match=r"^a column was kept twice; name each --keep once$"):
        TableOptions(keep=KEPT + KEPT).notes_schema()


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask that differs from the usual one."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(path: Path) -> list[str]:
    """Everything below a directory, hidden files too."""
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def test_atomic_is_private_until_it_is_complete(tmp_path: Path, umask: None) -> None:
    """Nobody else may read the temporary file; the final one has the permissions of any new file."""
    target = tmp_path / "a.json"
    with sinks.atomic(target) as file:
        file.write(b"half")
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_mode & 0o777 == 0o600
        assert not target.exists()
    assert names(tmp_path) == ["a.json"]
    assert target.read_bytes() == b"half"
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_leaves_nothing_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    """Neither the file nor a temporary one stays, and an older file stays as it was."""
    target = tmp_path / "a.json"
    target.write_bytes(b"old")

    def write() -> None:
        with sinks.atomic(target) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["a.json"]
    assert target.read_bytes() == b"old"


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Let flushing to the disk fail as on a full one, after some calls that succeed."""
    calls = iter(range(after))

    def fsync(descriptor: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file and the reason; no temporary file stays."""
    fill_disk(monkeypatch)
    target = tmp_path / "a.json"
    with pytest.raises(OutputError) as caught:
        sinks.write_json(target, {})
    assert str(caught.value) == f"{target}: cannot be written: No space left on device"
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where a directory is needed is an output error, in the output's path or above it."""
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "file", "exists and is no directory; choose another -o"),
        (tmp_path / "file" / "run", "cannot be written: Not a directory"),
    ):
        with pytest.raises(OutputError) as caught:
            DirectorySink(path, "parquet", TableOptions())
        assert str(caught.value) == f"{path}: {said}"


def two_rows() -> pa.RecordBatch:
    """An annotated note and a rejected one."""
    return annotated([("no fever", [(3, 8)]), (None, [])])


def test_directory_sink_writes_in_order(tmp_path: Path) -> None:
    """First run.json, then each part's spans and notes, and manifest.json at the end."""
    path = tmp_path / "new" / "run"
    sink = DirectorySink(path, "parquet", TableOptions())
    assert names(path) == ["lock.json"]
    sink.start(RUN)
    assert names(path) == ["lock.json", "notes", "run.json", "spans"]
    sink.write(0, [two_rows()])
    sink.write(1, [])
    assert names(path / "spans") == names(path / "notes") == ["part-000000.parquet", "part-000001.parquet"]
    sink.finish(MANIFEST)
    sink.close()
    assert names(path) == [
        "manifest.json", "notes", "notes/part-000000.parquet", "notes/part-000001.parquet", "run.json", "spans",
        "spans/part-000000.parquet", "spans/part-000001.parquet",
    ]  # fmt: skip
    assert orjson.loads((path / "run.json").read_bytes()) == RUN
    tables = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in names(path) if "part" in file}
    assert orjson.loads((path / "manifest.json").read_bytes()) == MANIFEST | {"files": tables}
    assert pq.read_table(path / "spans/part-000000.parquet").to_pylist()[0]["text"] == "fever"
    assert pq.read_table(path / "notes/part-000001.parquet").schema.equals(schema.notes_schema(), check_metadata=True)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_spans_are_committed_before_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A part whose notes file cannot be written has its spans file, but not the mark that it is complete."""
    sink = DirectorySink(tmp_path, form, TableOptions())
    sink.start(RUN)
    fill_disk(monkeypatch, after=2)  # the spans file and its directory
    with pytest.raises(OutputError) as caught:
        sink.write(0, [two_rows()])
    assert str(caught.value) == f"{tmp_path}/notes/part-000000.{form}: cannot be written: No space left on device"
    sink.close()
    gc.collect()  # what pyarrow still held complains here, if at all
    assert names(tmp_path) == ["notes", "run.json", "spans", f"spans/part-000000.{form}"]


def test_directory_sink_refuses_and_overwrites(tmp_path: Path) -> None:
    """Unfinished and finished runs are told apart and replaced only on demand, foreign directories never."""
    path = tmp_path / "run"
    sink = DirectorySink(path, "parquet", TableOptions())
    sink.start(RUN)
    sink.write(0, [two_rows()])
    sink.close()
    with pytest.raises(OutputError) as caught:
        DirectorySink(path, "parquet", TableOptions())
    assert str(caught.value) == f"{path}: holds an unfinished run; choose another -o, or pass --resume or --overwrite"
    (path / "manifest.json").write_text("{}")
    with pytest.raises(OutputError) as caught:
        DirectorySink(path, "jsonl", TableOptions())
    assert str(caught.value) == f"{path}: holds a finished run; choose another -o, or pass --resume or --overwrite"

    (path / "mine.txt").write_text("kept")
    (path / "spans" / ".part-000001.parquet.0badcafe.tmp").write_text("left by a run that was killed")
    new = DirectorySink(path, "jsonl", TableOptions(), overwrite=True)
    assert names(path) == ["lock.json", "mine.txt", "notes", "run.json", "spans"]
    new.start({"another": "run"})
    assert orjson.loads((path / "run.json").read_bytes()) == {"another": "run"}
    new.close()

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("")
    for overwrite in (False, True):
        with pytest.raises(OutputError) as caught:
            DirectorySink(tmp_path / "foreign", "parquet", TableOptions(), overwrite=overwrite)
        assert str(caught.value) == f"{tmp_path}/foreign: not empty, and no run of medner; choose another -o"
    assert names(tmp_path / "foreign") == ["thesis.txt"]


@pytest.mark.parametrize("suffix", sinks.FILE_SUFFIXES)
def test_file_sink_shows_nothing_before_the_end(tmp_path: Path, suffix: str, umask: None) -> None:
    """Three files appear together; until then there are two private temporary ones."""
    path = tmp_path / f"out{suffix}"
    sink = FileSink(path, TableOptions())
    sink.start(RUN)
    sink.write(0, [two_rows()])
    sink.write(1, [two_rows(), two_rows()])
    assert [entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()] == [0o600] * 2
    assert all(name.startswith(".out") and name.endswith(".tmp") for name in names(tmp_path))
    sink.finish(MANIFEST)
    sink.close()
    assert names(tmp_path) == sorted([f"out{suffix}", f"out.notes{suffix}", "out.manifest.json"])
    assert [entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()] == [0o640] * 3
    assert [row["text"] for row in read(path)] == ["fever"] * 3
    assert [row["status"] for row in read(tmp_path / f"out.notes{suffix}")] == ["annotated", "rejected"] * 3


@pytest.mark.parametrize("taken", ["out.jsonl", "out.notes.jsonl", "out.manifest.json"])
def test_file_sink_replaces_nothing_that_came_meanwhile(tmp_path: Path, taken: str) -> None:
    """Of two runs that write one file, the second to finish fails and leaves the first one's output."""
    sink = FileSink(tmp_path / "out.jsonl", TableOptions())
    sink.start(RUN)
    sink.write(0, [two_rows()])
    (tmp_path / taken).write_text("theirs")
    with pytest.raises(OutputError) as caught:
        sink.finish(MANIFEST)
    sink.close()
    assert str(caught.value) == f"{tmp_path / taken}: exists already; choose another -o, or pass --overwrite"
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {taken: "theirs"}


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of an output file of any format."""
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    with pa.input_stream(str(path)) as stream:
        return [orjson.loads(line) for line in stream.read().splitlines()]


@pytest.mark.parametrize("suffix", sinks.FILE_SUFFIXES)
@pytest.mark.parametrize("flushed", [0, 1])
def test_file_sink_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, flushed: int) -> None:
    """Neither of the two files takes its name before both are safe on the disk; an older output stays whole."""
    path = tmp_path / f"out{suffix}"
    for name in (f"out{suffix}", f"out.notes{suffix}", "out.manifest.json"):
        (tmp_path / name).write_text("old")
    sink = FileSink(path, TableOptions(), overwrite=True)
    sink.write(0, [two_rows()])
    fill_disk(monkeypatch, after=flushed)
    with pytest.raises(OutputError) as caught:
        sink.finish(MANIFEST)
    assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    sink.close()
    gc.collect()
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {
        f"out{suffix}": "old", f"out.notes{suffix}": "old", "out.manifest.json": "old"
    }  # fmt: skip


def write_parts(sink: DirectorySink | FileSink, batch: pa.RecordBatch) -> None:
    """A run of three parts; a compressor may hold the first."""
    for part in range(3):
        sink.write(part, [batch])
    sink.finish(MANIFEST)


@pytest.mark.parametrize("output", ["run.parquet-parts", "run.jsonl-parts", *(f"x{s}" for s in sinks.FILE_SUFFIXES)])
def test_a_write_that_fails_half_way(
    tmp_path: Path,
    files_of_at_most: Callable[[int], AbstractContextManager[None]],
    output: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An output error and no temporary file; the writers that are given up do not complain when they are freed."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 30).tolist()).decode() for _ in range(5_000)]
    batch = annotated([(word, [(0, 30)]) for word in words])
    path = tmp_path / output
    sink: DirectorySink | FileSink
    if output.endswith("-parts"):
        sink = DirectorySink(path, output.split("-")[0][4:], TableOptions())
    else:
        sink = FileSink(path, TableOptions())
    sink.start(RUN)

    with files_of_at_most(2**15), pytest.raises(OutputError, match=r": cannot be written: File too large$"):
        write_parts(sink, batch)
    sink.close()
    del sink
    gc.collect()
    assert capfd.readouterr() == ("", "")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.json"]
    assert left == []


@pytest.mark.parametrize("output", ["run", "x.parquet"])
def test_an_interrupted_write_leaves_no_complaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """Ctrl-C in the middle of a Parquet file: pyarrow does not try to finish it when the writer is freed."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupt)
    sink = sink_of(tmp_path / output)
    sink.start(RUN)
    with pytest.raises(KeyboardInterrupt):
        sink.write(0, [two_rows()])
    sink.close()
    del sink
    gc.collect()
    assert [name for name in names(tmp_path) if name.endswith(("tmp", "parquet"))] == []


def sink_of(path: Path) -> DirectorySink | FileSink:
    """A sink for a Parquet run directory or file."""
    return FileSink(path, TableOptions()) if path.suffix else DirectorySink(path, "parquet", TableOptions())


@pytest.mark.parametrize("suffix", sinks.FILE_SUFFIXES)
def test_file_sink_given_up(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing stays of a run that failed, and pyarrow does not complain afterwards."""
    sink = FileSink(tmp_path / f"out{suffix}", TableOptions())
    sink.write(0, [two_rows()])
    sink.close()
    del sink
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert names(tmp_path) == []


@pytest.mark.parametrize("taken", ["out.parquet", "out.notes.parquet", "out.manifest.json"])
def test_file_sink_refuses_what_exists(tmp_path: Path, taken: str) -> None:
    """Each of the three files is protected."""
    (tmp_path / taken).write_text("precious")
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "out.parquet", TableOptions())
    assert str(caught.value) == f"{tmp_path / taken}: exists already; choose another -o, or pass --overwrite"
    assert names(tmp_path) == [taken]


def test_file_sink_needs_its_directory_and_suffix(tmp_path: Path) -> None:
    """A missing directory and an unknown suffix are said at once."""
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "none" / "out.parquet", TableOptions())
    assert str(caught.value) == f"{tmp_path}/none: no such directory; create it first"
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "out.csv", TableOptions())
    assert str(caught.value) == (
        f"{tmp_path}/out.csv: a single output file ends in .parquet, .jsonl, .jsonl.gz, .jsonl.zst"
    )


def test_file_sink_that_fails_to_open_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file cannot be opened: the first temporary one goes, too."""
    open_file, opened = os.open, []

    def failing(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".tmp"):
            opened.append(path)
            if len(opened) == 2:
                raise OSError(errno.EMFILE, "Too many open files")
        return open_file(path, *rest, **more)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "out.jsonl", TableOptions())
    assert str(caught.value) == f"{tmp_path}/out.jsonl: cannot be written: Too many open files"
    assert names(tmp_path) == []


def test_stream_sink_writes_a_record_per_row() -> None:
    """Rejected rows too; ``--nested`` changes nothing, ``--no-text`` and kept columns do."""
    stream = io.BytesIO()
    sink = StreamSink(stream, TableOptions(text=False, keep=KEPT))
    sink.start(RUN)
    sink.write(0, [two_rows()])
    sink.finish(MANIFEST)
    sink.close()
    score = float(str(np.float32(1 / 12)))
    assert [orjson.loads(line) for line in stream.getvalue().splitlines()] == [
        {"source": "s.jsonl", "row": 0, "note_id": "id-0", "status": "annotated", "reason": None,
         "spans": [{"start": 3, "end": 8, "label": "D", "score": score}], "kept": 0},
        {"source": "s.jsonl", "row": 1, "note_id": "id-1", "status": "rejected", "reason": "malformed JSON",
         "spans": None, "kept": 0},
    ]  # fmt: skip


def test_stream_sink_translates_all_but_a_closed_pipe() -> None:
    """A full device is an output error; a closed pipe stays one, since it is no failure."""

    class Full(io.BytesIO):
        error: OSError = OSError(errno.ENOSPC, "No space left on device")

        def write(self, *_: Any) -> int:
            raise self.error

    stream = Full()
    with pytest.raises(OutputError) as caught:
        StreamSink(stream, TableOptions()).write(0, [two_rows()])
    assert str(caught.value) == "standard output: cannot be written: No space left on device"
    stream.error = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        StreamSink(stream, TableOptions()).write(0, [two_rows()])


@pytest.mark.parametrize(
    ("name", "form", "beside"),
    [
        ("run", None, ["run"]),
        ("out.parquet", "parquet", ["out.parquet", "out.notes.parquet", "out.manifest.json"]),
        ("a.b.JSONL.gz", "jsonl", ["a.b.JSONL.gz", "a.b.notes.JSONL.gz", "a.b.manifest.json"]),
        ("old.jsonl", None, ["old.jsonl"]),
    ],
)
def test_what_an_output_path_stands_for(tmp_path: Path, name: str, form: str | None, beside: list[str]) -> None:
    """A known suffix means a file with two beside it, unless there is a directory of that name."""
    (tmp_path / "old.jsonl").mkdir()
    assert sinks.file_format(tmp_path / name) == form
    assert [path.name for path in sinks.paths(tmp_path / name)] == beside


def test_a_real_batch_goes_through() -> None:
    """The annotator's own batches have the columns that the tables take."""
    columns = [["s"], [0], ["a"], ["Type 2 diabetes, fever."], pa.nulls(1, pa.string())]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema.source_schema(), strict=True)]
    batch = testing.annotator()(pa.RecordBatch.from_arrays(arrays, schema=schema.source_schema()))
    assert [(row["text"], row["start"], row["end"]) for row in sinks.explode(batch).to_pylist()] == [
        ("Type 2 diabetes", 0, 15),
        ("fever", 17, 22),
    ]


def test_file_sink_takes_no_manifest_of_other_files(tmp_path: Path) -> None:
    """Files of all suffixes have one name for their manifest, which stays beside those that it tells of."""
    for overwrite in (False, True):
        sink = FileSink(tmp_path / "out.parquet", TableOptions(), overwrite=overwrite)
        sink.write(0, [two_rows()])
        sink.finish(MANIFEST)
        sink.close()
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "out.jsonl", TableOptions(), overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path / 'out.manifest.json'}: belongs to out.parquet; choose another -o, or remove it"
    )
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_file_sink_beside_another_run_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has the hashes of what this run wrote, not of what another put under the name meanwhile."""
    commit = sinks._Draft.commit

    def replaced(draft: sinks._Draft) -> None:
        commit(draft)
        draft.path.write_bytes(b"another run's")

    sink = FileSink(tmp_path / "out.parquet", TableOptions())
    sink.write(0, [two_rows()])
    expected = {draft.path.name: draft for draft in sink._drafts}
    monkeypatch.setattr(sinks._Draft, "commit", replaced)
    manifest = sink.finish(MANIFEST)
    assert manifest["files"].keys() == expected.keys()
    assert hashlib.sha256(b"another run's").hexdigest() not in manifest["files"].values()


def test_file_sink_beside_what_is_no_manifest(tmp_path: Path) -> None:
    """Another program's file of that name, and one that cannot be read, are the output's errors."""
    manifest = tmp_path / "out.manifest.json"
    manifest.write_text('{"files": {}}')
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "out.jsonl", TableOptions(), overwrite=True)
    assert str(caught.value) == f"{manifest}: belongs to another program; choose another -o, or remove it"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(OutputError, match=rf"^{manifest}: .+Is a directory"):
        FileSink(tmp_path / "out.jsonl", TableOptions(), overwrite=True)


def test_a_run_that_was_taken_over_keeps_its_manifest(tmp_path: Path) -> None:
    """Who lost the lock meanwhile removes nothing of what the other run has finished."""
    sink = DirectorySink(tmp_path / "run", "parquet", TableOptions())
    (tmp_path / "run" / "lock.json").unlink()
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(OutputError, match=r"its lock\.json is gone"):
        sink.write(0, [two_rows()])
    assert manifest.is_file()


def test_a_run_that_begins_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory in which another process begins a run while it is looked at is not taken for something else."""
    path = tmp_path / "run"
    path.mkdir()
    seen: list[Path] = []
    real = {name: getattr(Path, name) for name in ("is_file", "is_dir")}

    def look(name: str, file: Path) -> bool:
        found: bool = real[name](file)
        if not seen and file.is_relative_to(path):
            seen.append(file)
            (path / "run.json").write_text("{}")
            (path / "spans").mkdir()
        return found

    for name in real:
        monkeypatch.setattr(Path, name, partialmethod(lambda file, name: look(name, file), name))
    assert sinks._state(path) in ("no run", "an unfinished run")
    assert seen
