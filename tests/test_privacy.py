"""Nothing private leaks: what stands in notes, ids and kept columns is in the tables where it belongs and nowhere else.

Marks stand in every place of every input. After each command all that it printed, every file that it left and every
file's name is searched for them.
"""

from __future__ import annotations

import bz2
import fcntl
import gzip
import json
import logging
import os
import pty
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medner import annotate, cli, decode, run, runtime, sinks, sources, testing, windows
from medner.annotate import Annotator

TINY = str(testing.bundle())
COMMAND = (sys.executable, "-P", "-m", "medner.cli")

#: All begin alike, so that a piece of one is found, too.
NOTE, ID, KEPT, NAME = "zqxnote", "zqxid", "zqxkept", "zqxname"
MARK = b"zqx"
TEXT = f"Patient {NOTE} has fever and {NOTE}, no asthma."


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a directory of its own, without the variable that asks for tracebacks, and with progress at every step."""
    monkeypatch.delenv("MEDNER_DEBUG", raising=False)
    monkeypatch.setattr(run, "_LINE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)


Medner = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Medner:
    """Call ``medner`` in this process; its exit code, and all that it printed or logged, tracebacks included."""
    caplog.set_level(logging.DEBUG)

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        sys.stdout.flush()
        printed = "".join(capfd.readouterr()) + caplog.text
        caplog.clear()
        return int(caught.value.code or 0), printed

    return call


def holds_mark(content: str | bytes) -> bool:
    """Whether a mark, or a piece of one, stands there."""
    return MARK in (content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")).lower()


def values(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """All leaves of a value of Python with the names that lead to them."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from values(below, f"{place}.{name}")
    elif isinstance(value, list):
        for below in value:
            yield from values(below, place)
    else:
        yield place, str(value)


def content(file: Path) -> Iterator[tuple[str, str]]:
    """What stands in a file, by column for tables and by field for JSON; whatever is compressed is read."""
    raw = file.read_bytes()
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        yield "metadata", repr(pq.read_metadata(file).metadata) + repr(table.schema.metadata)
        for row in table.to_pylist():
            yield from values(row, "row")
        return
    if file.suffix in (".gz", ".zst"):
        raw = pa.CompressedInputStream(pa.BufferReader(raw), {".gz": "gzip", ".zst": "zstd"}[file.suffix]).read()
    if {".jsonl", ".json"} & set(file.suffixes):
        for line in raw.splitlines() if ".jsonl" in file.suffixes else [raw]:
            yield from values(json.loads(line), "row" if ".jsonl" in file.suffixes else "")
    else:
        yield "bytes", raw.decode("latin-1")


def marks(path: Path) -> dict[str, set[str]]:
    """Of the files below a path, each mark's places: the column or field, or ``name`` for the name of a file."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in [path, *path.rglob("*")]:
        if holds_mark(os.fsencode(file.name)):
            found[file.name].add("name")
        if file.is_file():
            for place, value in content(file):
                if holds_mark(value):
                    found[next((m for m in (NOTE, ID, KEPT, NAME) if m in value), value)].add(place)
    return dict(found)


def outputs(stem: str) -> Path:
    """A folder with all that a run wrote, ``-o`` inside it."""
    folder = Path(stem)
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The search itself


def test_the_search_finds_marks(tmp_path: Path) -> None:
    """In each kind of file that a run writes, in its name, and in its metadata."""
    table = pa.table({"a": [[{"b": NOTE}]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert marks(tmp_path) == {NOTE: {"row.a.b"}}
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"k": ID}), tmp_path / "a.parquet")
    assert marks(tmp_path) == {ID: {"metadata"}}
    (tmp_path / "a.parquet").unlink()
    for name, opener in (
        ("b.jsonl.gz", gzip.compress),
        ("b.jsonl.zst", lambda c: pa.compress(c, "zstd", asbytes=True)),
    ):
        with pa.CompressedOutputStream(str(tmp_path / name), name.rpartition(".")[2].replace("gz", "gzip")
                                       .replace("zst", "zstd")) as file:  # fmt: skip
            file.write(json.dumps({"k": [KEPT]}).encode() + b"\n")
        assert opener(b"x")
        assert marks(tmp_path) == {KEPT: {"row.k"}}
        (tmp_path / name).unlink()
    (tmp_path / "run.json").write_text(json.dumps({"x": {"y": NAME}}))
    (tmp_path / f".{NAME}.tmp").write_text("")
    assert marks(tmp_path) == {NAME: {".x.y"}, f".{NAME}.tmp": {"name"}}


# ---------------------------------------------------------------------------------------------------------------------
# Runs that end well


def rows() -> list[str]:
    """JSON lines of four good notes, and of one bad row for every reason that a line can have."""
    good = [{"note_id": f"{ID}-{n}", "text": TEXT, "extra": f"{KEPT} {n}"} for n in range(4)]
    bad: list[dict[str, Any]] = [
        {"note_id": f"{ID}-5", "extra": KEPT},
        {"note_id": f"{ID}-6", "text": None, "extra": KEPT},
        {"note_id": f"{ID}-7", "text": [NOTE], "extra": KEPT},
        {"note_id": {NOTE: 1}, "text": TEXT, "extra": KEPT},
        {"note_id": 2**70, "text": TEXT, "extra": KEPT},
        {"note_id": f"{ID}-0", "text": TEXT, "extra": KEPT},
        {"note_id": f"{ID}-8", "text": TEXT * 2_000, "extra": KEPT},
    ]
    raw = [f'{{"note_id": "{ID}-9", "text": {NOTE}', f'["{NOTE}"]', f'{{"text": "{NOTE} \\ud800"}}', f'{NOTE}"']
    return [*map(json.dumps, good + bad), *raw]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A JSONL file of these, and a line that does not decode."""
    path = tmp_path / "notes.jsonl"
    path.write_bytes("\n".join(rows()).encode() + f'\n{{"text": "{NOTE} '.encode() + b'\xff"}\n')
    return path


FORMS = ("dir", "dir --format jsonl", "one.parquet", "one.jsonl", "one.jsonl.gz", "one.jsonl.zst")
OPTIONS = {
    "": {ID: {"row.note_id"}},
    "--no-text": {ID: {"row.note_id"}},
    "--keep extra": {ID: {"row.note_id"}, KEPT: {"row.extra"}},
    "--nested": {ID: {"row.note_id"}},
    "--nested --no-text --keep extra": {ID: {"row.note_id"}, KEPT: {"row.extra"}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_what_an_output_holds(notes: Path, call: Medner, form: str, options: str) -> None:
    """Ids stand in ``note_id``, kept values in their column, of a note its mentions alone, or with --no-text nothing.

    Rows of every reason are among the notes. Summary, progress, manifest, ``run.json`` and all else hold no mark.
    """
    folder = outputs("out")
    limits = ("--max-rejected", "all", "--unique-ids", "--max-note-bytes", "10000", "--part-rows", "3")
    name, *more = form.split()
    code, said = call("annotate", notes, "-o", folder / name, "--model", TINY, *limits, *more, *options.split())
    assert (code, holds_mark(said)) == (0, False)
    assert marks(folder) == OPTIONS[options]
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = [(place, value) for file in files for place, value in content(file)]
    reasons = {value for place, value in found if place == "row.reason" and value != "None"}
    assert reasons == {
        "malformed JSON", "JSON is not an object", "text is missing", "text is null", "text is not a string",
        "undecodable bytes", "lone surrogates", "id is beyond 64 bits", "id is not a string or number",
        "note is too large", "id is repeated",
    }  # fmt: skip
    texts = {value for place, value in found if place in ("row.text", "row.spans.text")}
    assert texts == (set() if "--no-text" in options else {"fever", "asthma"})
    if "--no-text" in options:
        assert not [place for place, value in found if "fever" in value or "asthma" in value]


def test_what_standard_output_holds(notes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The records of ``-o -`` hold what the tables would; the summary beside them holds nothing."""
    with pytest.raises(SystemExit):
        cli.main(["annotate", str(notes), "-o", "-", "--model", TINY, "--max-rejected", "all", "--keep", "extra"])
    printed, said = capfd.readouterr()
    assert not holds_mark(said)
    found: dict[str, set[str]] = defaultdict(set)
    for place, value in (leaf for line in printed.splitlines() for leaf in values(json.loads(line), "row")):
        found[place].add(value)
    assert {place for place, all_values in found.items() if any(map(holds_mark, all_values))} == {
        "row.note_id", "row.extra"
    }  # fmt: skip
    assert not [value for value in found["row.note_id"] | found["row.extra"] if NOTE in value]
    assert found["row.spans.text"] == {"fever", "asthma"}


def test_names_of_text_files_are_ids(call: Medner) -> None:
    """They stand in ``source`` and ``note_id`` of the tables, and in no manifest, message or file name."""
    Path("texts").mkdir()
    for number in range(3):
        Path("texts", f"{NAME}-{number}.txt").write_text(TEXT)
    for number, given in enumerate((["texts"], [f"texts/{NAME}-0.txt", f"texts/{NAME}-1.txt"], ["texts/*.txt"])):
        folder = outputs(f"out{number}")
        for form in ("dir", "one.jsonl"):
            code, said = call("annotate", *given, "-o", folder / form, "--model", TINY)
            assert (code, holds_mark(said)) == (0, False)
        assert marks(folder) == {NAME: {"row.source", "row.note_id"}}
        assert call("annotate", *given, "-o", folder / "dir", "--model", TINY, "--resume")[1].count(NAME) == 0


@pytest.mark.skipif("verify" not in cli.cli.commands, reason="this medner has no verify")
def test_verify(notes: Path, call: Medner) -> None:
    """Neither a whole output nor a contradiction is told with a mark, with and without the notes at hand."""
    arguments = ("--model", TINY, "--max-rejected", "all", "--part-rows", "4", "--keep", "extra")
    assert call("annotate", notes, "-o", "out", *arguments)[0] == 0
    for more in ((), ("--notes", notes)):
        code, said = call("verify", "out", *more)
        assert (code, holds_mark(said)) == (0, False)
    part = Path("out/spans/part-000000.parquet")
    whole = part.read_bytes()
    for column, new in (
        ("text", NOTE),
        ("label", NOTE),
        ("note_id", f"{ID}-x"),
        ("source", f"{ID}.jsonl"),
        ("start", 1),
    ):
        table = pq.read_table(part)
        index = table.column_names.index(column)
        changed = pa.array([new] * table.num_rows, table.schema.field(column).type)
        pq.write_table(table.set_column(index, table.schema.field(column), changed), part)
        for more in ((), ("--notes", notes)):
            code, said = call("verify", "out", *more)
            assert (code, holds_mark(said)) == (1, False)
        part.write_bytes(whole)
    other = Path("other.jsonl")
    other.write_text(notes.read_bytes().decode("latin-1").replace("fever", "favor"), encoding="latin-1")
    code, said = call("verify", "out", "--notes", other)
    assert (code in (1, 4), holds_mark(said)) == (True, False)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that cannot be used


def unusable(folder: Path) -> dict[str, tuple[str, set[int]]]:
    """Files that are full of marks and no input, written there: the arguments that read each, and the exit codes.

    Every way in which ``medner.sources`` refuses a file or a row is among them.
    """
    write = {name: folder / name for name in (
        "columns.jsonl", "ids.jsonl", "s.csv", "header.csv", "long.csv", "two.csv", "odd.csv", "keep.csv")}  # fmt: skip
    lines = "\n".join(row for row in rows() if len(row) < 1_000).encode()
    write["columns.jsonl"].write_text(json.dumps({"body": TEXT, "id": ID}))
    write["ids.jsonl"].write_text(json.dumps({"text": TEXT, "id": ID}))
    write["s.csv"].write_text(f'note_id,text\n{ID},"{TEXT}"\n{ID},{NOTE},{NOTE}\n{ID},"{TEXT}')
    write["header.csv"].write_text(f'{ID},"{TEXT}"\n{ID},"{TEXT}"\n')
    write["long.csv"].write_text(f'note_id,text\n{ID},"{TEXT * 30_000}')
    write["two.csv"].write_text(f"text,text,{NOTE}\n{TEXT},{TEXT},{NOTE}\n")
    write["odd.csv"].write_bytes(f"note_id,text\n{ID},{NOTE} ".encode() + b"\xff\xfe\x00" + f"\n{NOTE}".encode())
    write["keep.csv"].write_text(f"text,{KEPT}\n{TEXT},{KEPT}\n")
    for suffix, packed in (("gz", gzip.compress(lines * 50, 0)), ("bz2", bz2.compress(lines * 50)),
                           ("zst", pa.Codec("zstd").compress(lines * 50, asbytes=True))):  # fmt: skip
        (folder / f"cut.jsonl.{suffix}").write_bytes(packed[:-20])
        (folder / f"plain.jsonl.{suffix}").write_bytes(lines)
    good = pa.table({"text": [TEXT] * 9, "note_id": [ID] * 9, "extra": [KEPT] * 9})
    pq.write_table(good, folder / "good.parquet", compression="none", use_dictionary=False)
    raw = (folder / "good.parquet").read_bytes()
    (folder / "damaged.parquet").write_bytes(raw[:4] + raw[4:].replace(b"fever", b"\xff\xff\xff\xff\xff"))
    (folder / "short.parquet").write_bytes(raw[:-9])
    (folder / "text.parquet").write_text(TEXT)
    pq.write_table(pa.table({"text": [[TEXT]]}), folder / "list.parquet")
    pq.write_table(pa.table({"text": [TEXT], "note_id": [{"a": ID}]}), folder / "struct.parquet")
    pq.write_table(pa.table({"text": [TEXT], "note_id": [b"\xff" + ID.encode()]}), folder / "binary.parquet")
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 8], np.int32)), pa.py_buffer(b"zqxkept\xff"))
    nested = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), broken)
    pq.write_table(pa.table({"text": [TEXT], "extra": nested}), folder / "nested.parquet")
    pq.write_table(pa.table({"text": broken, "note_id": broken, "extra": broken}), folder / "undecodable.parquet")
    return {
        "columns": ("columns.jsonl", {4}), "ids": ("ids.jsonl --id-column mrn", {4}),
        "csv": ("s.csv", {3}), "csv keep": ("s.csv --keep note", {4}), "header": ("header.csv", {4}),
        "long": ("long.csv --max-note-bytes 9", {4}), "two": ("two.csv", {4}), "odd": ("odd.csv", {3}),
        "keep": ("keep.csv --keep note_id", {2}), "as utf-16": ("good.parquet odd.csv --encoding utf-16", {2, 4}),
        "utf-16": ("odd.csv --encoding utf-16", {3, 4}), "ascii": ("ids.jsonl --encoding idna", {2}),
        "delimiter": (f"s.csv --delimiter {NOTE[0]}", {4}),
        **{f"cut {s}": (f"cut.jsonl.{s}", {4}) for s in ("gz", "bz2", "zst")},
        **{f"plain {s}": (f"plain.jsonl.{s}", {4}) for s in ("gz", "bz2", "zst")},
        "damaged": ("damaged.parquet --keep extra", {3, 4}), "short": ("short.parquet", {4}),
        "no parquet": ("text.parquet", {4}), "list": ("list.parquet", {4}), "struct": ("struct.parquet", {4}),
        "binary": ("binary.parquet", {4}), "nested": ("nested.parquet --keep extra", {4}),
        "undecodable": ("undecodable.parquet --keep extra", {3}),
        "types": ("nested.parquet good.parquet --keep extra", {4}),
        "repeated": ("good.parquet --unique-ids --id-column text", {3}),
        "twice": ("good.parquet good.parquet", {2}), "nowhere": ("good.parquet --id-column mrn", {4}),
        "none": ("none.jsonl", {4}),
    }  # fmt: skip


CASES = (
    "columns", "ids", "csv", "csv keep", "header", "long", "two", "odd", "keep", "as utf-16", "utf-16", "ascii",
    "delimiter", "cut gz", "cut bz2", "cut zst", "plain gz", "plain bz2", "plain zst", "damaged", "short", "no parquet",
    "list", "struct", "binary", "nested", "undecodable", "types", "repeated", "twice", "nowhere", "none",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_inputs_that_cannot_be_used(tmp_path: Path, call: Medner, case: str) -> None:
    """However a file or a row cannot be read, the message holds nothing of it, nor does any file that was begun."""
    cases = unusable(tmp_path)
    assert set(cases) == set(CASES)
    arguments, codes = cases[case]
    folder = outputs("out")
    for form in ("dir", "one.jsonl.gz", "two.parquet"):
        code, said = call("annotate", *arguments.split(), "-o", folder / form, "--model", TINY)
        assert code in codes, said
        assert not holds_mark(said)
    allowed = {"row.note_id", "row.extra"}
    assert all(places <= allowed for places in marks(folder).values()), marks(folder)
    # The text of a note was asked for as its id there.
    assert NOTE not in marks(folder) or case == "repeated"


LABELLED = {
    "words.tsv": f"{NOTE}\n{NOTE} {NOTE}\n",
    "mixed.tsv": f"{NOTE}\tB-X\n{NOTE}\tO\n{NOTE}\t{NOTE}\n",
    "one.jsonl": f'{{"text": "{TEXT}"',
    "list.jsonl": f'["{TEXT}"]',
    "unlabelled.jsonl": json.dumps({"text": TEXT, "id": ID}),
    "outside.jsonl": json.dumps({"id": ID, "text": TEXT, "spans": [[0, 10_000, "X"]]}),
    "other.jsonl": json.dumps({"id": ID, "text": TEXT, "spans": [{"start": 0, "end": 3, "label": "X", "text": NOTE}]}),
    "kind.jsonl": json.dumps({"id": ID, "text": TEXT, "spans": [[NOTE, NOTE, NOTE]]}),
    "twice.txt": f"{ID}|t|{TEXT}\n{ID}|a|\n\n{ID}|t|{TEXT}\n{ID}|a|\n{ID}\t0\t3\t{NOTE}\tX\n",
    "moved.txt": f"{ID}|t|{TEXT}\n{ID}|a|\n{ID}\t0\t3\t{NOTE}\tX\n",
    "abstract.txt": f"{ID}|t|{TEXT}\n{ID}9|a|{TEXT}\n",
    "fields.txt": f"{ID}|t|{TEXT}\n{NOTE}\t{NOTE}\n",
    "empty.jsonl": "\n",
    "latin.jsonl": f"{NOTE} ä",
}


@pytest.mark.filterwarnings("ignore")  # of torch, transformers and datasets, which are not under test here
def test_labelled_data_that_cannot_be_used(
    tmp_path: Path, call: Medner, small_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring, training, exporting and comparing say no more about their data, and log no more."""
    pytest.importorskip("seqeval", reason="needs the extra train")
    pytest.importorskip("datasets", reason="needs the extra train")
    for name, text in LABELLED.items():
        Path(name).write_text(text, encoding="latin-1")
    for name in ("columns", "numbers", "damaged", "lengths"):
        Path(name).mkdir()
        table = pa.table({"tokens": [[NOTE]], "ner_tags": [[7]] if name == "numbers" else [["O", NOTE]]})
        pq.write_table(table.rename_columns(["words", "tags"]) if name == "columns" else table, f"{name}/test.parquet")
    Path("damaged/test.parquet").write_bytes(Path("columns/test.parquet").read_bytes()[:-9] + NOTE.encode())
    checkpoint = small_bert.parent / "checkpoint"
    for data in (*LABELLED, "columns", "numbers", "damaged", "lengths"):
        usable = data in ("twice.txt", "moved.txt")
        code, said = call("evaluate", "--model", TINY, "--data", data)
        assert (code, holds_mark(said)) == (0 if usable else 4, False), said
        splits = Path(f"splits of {data}") if Path(data).is_file() else Path(data)
        splits.mkdir(exist_ok=True)
        for split in ("train", "devel") if Path(data).is_file() else ():
            shutil.copyfile(data, splits / f"{split}{Path(data).suffix}")
        for arguments in (
            ("train", "--data", splits, "--base", checkpoint, "-o", "trained"),
            ("export", checkpoint, "-o", "exported", "--parity-data", data, "--window", "40", "--precision", "fp32"),
            ("compare", "--checkpoint", checkpoint, "--bundle", small_bert, "--notes", data, "-o", "compared",
             "--rounds", "1", "--limit", "1"),
        ):  # fmt: skip
            if not usable:
                code, said = call(*arguments)
                assert (code == 4 or data == "unlabelled.jsonl", holds_mark(said)) == (True, False), (arguments, said)


@pytest.mark.filterwarnings("ignore")  # of datasets, which is not under test here
def test_labelled_data_stays_where_it_is(tmp_path: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of Parquet files is not copied into the cache of Hugging Face."""
    datasets = pytest.importorskip("datasets", reason="needs the extra train")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("labelled").mkdir()
    for split in ("train", "validation", "test"):
        table = pa.table({"tokens": [["no", "fever", NOTE]], "ner_tags": [["O", "B-X", "O"]]})
        pq.write_table(table, f"labelled/{split}.parquet")
    code, said = call("evaluate", "--model", TINY, "--data", "labelled")
    assert (code, holds_mark(said)) == (0, False)
    assert [file for file in Path("cache").rglob("*") if file.is_file() and file.stat().st_size] == []


# ---------------------------------------------------------------------------------------------------------------------
# Defects


class Defect(Exception):
    """An error of a library that quotes what it choked on."""


class Panic(BaseException):
    """What a panic of Rust code looks like to Python: no Exception."""


DEFECTS = {
    "reader": (sources, "_json_records"),
    "stream": (Annotator, "stream"),
    "pieces": (windows, "pieces"),
    "segments, in the planning thread": (windows, "segments"),
    "tokens, in the planning thread": (windows.WordTokenizer, "tokenize"),
    "inference, in its threads": (Annotator, "_infer"),
    "decoder": (decode, "spans"),
    "spans table": (sinks, "explode"),
    "notes table": (sinks, "notes_table"),
}


@pytest.mark.parametrize("kind", [Defect, Panic, UnicodeDecodeError])
@pytest.mark.parametrize("place", DEFECTS)
def test_defects(
    notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch, place: str, kind: type[BaseException]
) -> None:
    """Of an error that nobody foresaw the type and the place are shown; its message may hold anything."""

    def fail(*_: object, **__: object) -> None:
        raise UnicodeDecodeError("utf-8", TEXT.encode(), 0, 1, NOTE) if kind is UnicodeDecodeError else kind(TEXT)

    monkeypatch.setattr(*DEFECTS[place], fail)
    folder = outputs("out")
    # What cannot be decoded is an error that the reader expects; a table that is not made is no defect of a stream.
    forms = ("dir", "one.parquet", "one.jsonl.gz") + (() if place == "spans table" else ("-",))
    for form in forms:
        output = form if form == "-" else folder / form
        code, said = call("annotate", notes, "-o", output, "--model", TINY)
        assert not holds_mark(said)
        assert code == (4 if kind is UnicodeDecodeError and place == "reader" else 1), said
        assert "Traceback" not in said
        if code == 1:
            line = said.splitlines()[-1]  # progress may stand before it
            assert line.startswith(f"medner: internal error: {kind.__name__} in test_privacy.py:")
    assert marks(folder) == {}


def test_what_onnxruntime_says(notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of a failed inference may hold values of a note; its type is shown."""

    def fail(*_: object) -> None:
        raise RuntimeError(f"[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : {NOTE} of '{TEXT}'")

    session = runtime.Session.__init__

    def spoilt(self: runtime.Session, graph: Path, device: str) -> None:
        session(self, graph, device)
        self._session = type("Broken", (), {"run": fail})()

    monkeypatch.setattr(runtime.Session, "__init__", spoilt)
    code, said = call("annotate", notes, "-o", "out", "--model", TINY, "--quiet")
    assert code == 4
    assert said.startswith("medner: onnxruntime failed on a batch of (")
    assert said.endswith("): RuntimeError\n")
    assert marks(Path("out")) == {}


def test_what_tokenizers_says(notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for an engine behind ``evaluate``: labelled text is text, too."""
    Path("data.jsonl").write_text(json.dumps({"text": TEXT, "spans": []}))

    def fail(*_: object) -> None:
        raise Defect(TEXT)

    monkeypatch.setattr(annotate.windows, "segments", fail)
    code, said = call("evaluate", "--model", TINY, "--data", "data.jsonl")
    assert (code, holds_mark(said)) == (1, False)
    assert said.startswith("medner: internal error: Defect in test_privacy.py:")


# ---------------------------------------------------------------------------------------------------------------------
# Outputs that fail


def spawn(*arguments: object, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Call ``medner`` as a process of its own."""
    more = {"capture_output": True, "check": False} | more
    return subprocess.run([*COMMAND, *map(str, arguments)], **more)


def test_outputs_that_cannot_be_written(notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the way, a disk that is full at the end, and one that is full in the middle."""
    Path("file").write_text("")
    for output in ("file", "file/out", "none/one.jsonl", "file/one.parquet"):
        code, said = call("annotate", notes, "-o", output, "--model", TINY)
        assert (code, holds_mark(said)) == (6, False)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", TEXT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for output in ("out", "one.parquet", "one.jsonl.gz"):
            code, said = call("annotate", notes, "-o", output, "--model", TINY)
            assert (code, holds_mark(said)) == (6, False)
    Path("many.jsonl").write_bytes(lines(600))
    for output in ("out2", "two.parquet", "two.jsonl", "two.jsonl.gz"):
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))  # noqa: E731
        done = spawn("annotate", "many.jsonl", "-o", output, "--model", TINY, preexec_fn=limit)
        assert done.returncode == 6, done.stderr
        assert not holds_mark(done.stdout + done.stderr)
        assert b"Traceback" not in done.stderr
    assert sorted(path.name for path in Path().rglob("*.tmp")) == []
    assert marks(Path("out2")) == {}


def lines(count: int) -> bytes:
    """JSON lines that keep a run busy."""
    return b"".join(
        json.dumps({"note_id": f"{ID}-{number}", "text": f"{number} {TEXT} " * 12}).encode() + b"\n"
        for number in range(count)
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("output", ["out", "out.jsonl.gz", "out.parquet"])
def test_runs_that_are_stopped(tmp_path: Path, number: signal.Signals, code: int, output: str) -> None:
    """A run that is interrupted, or killed, prints no mark; what it leaves behind is private, as are the names."""
    folder = outputs("folder")
    arguments = [*COMMAND, "annotate", "-", "-o", str(folder / output), "--model", TINY, "--part-rows", "100"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, umask=0o022
    ) as process:
        assert process.stdin is not None
        process.stdin.write(lines(1_200))
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not (list(folder.glob("out/notes/part-*")) if output == "out" else list(folder.glob(".out*.tmp"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, holds_mark(printed + said)) == (code, False)
    assert b"Traceback" not in said
    temporary = list(folder.rglob("*.tmp"))
    assert [oct(stat.S_IMODE(path.stat().st_mode)) for path in temporary] == ["0o600"] * len(temporary)
    assert not [path for path in folder.rglob("*") if holds_mark(path.name)]
    if number != signal.SIGKILL:
        assert temporary == []
    elif output != "out":
        assert len(temporary) == 2
    for path in temporary:
        path.unlink()
    assert set(marks(folder)) <= {ID}


def test_what_a_terminal_shows(tmp_path: Path) -> None:
    """The live bar holds no mark."""
    Path("many.jsonl").write_bytes(lines(1_500))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {**os.environ, "TQDM_MININTERVAL": "0"}
    with subprocess.Popen(
        [*COMMAND, "annotate", "many.jsonl", "-o", "out", "--model", TINY],
        stdout=subprocess.PIPE, stderr=theirs, env=environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert b"notes/s" in shown
    assert not holds_mark(shown + printed)


def test_a_closed_pipe(tmp_path: Path) -> None:
    """A reader that goes away hears its records, and nothing else does."""
    Path("many.jsonl").write_bytes(lines(3_000))
    with subprocess.Popen(
        [*COMMAND, "annotate", "many.jsonl", "-o", "-", "--model", TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, holds_mark(said)) == (0, False)


# ---------------------------------------------------------------------------------------------------------------------
# Permissions


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_the_users(tmp_path: Path, mask: int) -> None:
    """Files and folders of an output have the permissions that the user's umask gives to any other."""
    Path("notes.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    folder = outputs("out")
    for form in ("dir", "one.parquet", "two.jsonl.gz"):
        assert spawn("annotate", "notes.jsonl", "-o", folder / form, "--model", TINY, umask=mask).returncode == 0
    found = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert len(found) == 13
    assert found == {name: (0o777 if (folder / name).is_dir() else 0o666) & ~mask for name in found}


def test_files_are_private_while_they_are_written(notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else reads a file before it is whole and has its name."""
    seen: dict[str, int] = {}
    close = sinks._Draft.close

    def look(draft: sinks._Draft) -> None:
        seen[draft.path.name] = stat.S_IMODE(os.fstat(draft.file.fileno()).st_mode)
        close(draft)

    monkeypatch.setattr(sinks._Draft, "close", look)
    for form in ("out", "one.parquet", "two.jsonl.gz"):
        assert call("annotate", notes, "-o", form, "--model", TINY, "--max-rejected", "all")[0] == 0
    assert set(seen) == {
        "run.json", "manifest.json", "part-000000.parquet", "one.parquet", "one.notes.parquet", "one.manifest.json",
        "two.jsonl.gz", "two.notes.jsonl.gz", "two.manifest.json",
    }  # fmt: skip
    assert set(seen.values()) == {0o600}
