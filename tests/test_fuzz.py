"""Bad input to the end: a short form of ``fuzz_inputs.py``, properties of single files, and a corpus worked by hand."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medner import Annotator, Options, cli, sinks, sources, testing
from medner.errors import InputError
from medner.run import RunOptions, run
from medner.sources import Reader, ReadOptions, Reason, discover

SEED = 7
CASES = 300


def load_harness() -> Any:
    """The module ``fuzz_inputs``, which stands beside this file and in no package."""
    spec = importlib.util.spec_from_file_location("fuzz_inputs", Path(__file__).with_name("fuzz_inputs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


harness = load_harness()


@pytest.fixture(scope="module")
def annotator() -> Annotator:
    """One annotator for all cases."""
    return testing.annotator(Options(threads=1))


def agrees(folder: Path, annotator: Annotator, data: bytes, name: str, **options: Any) -> None:
    """A whole run over a file of these bytes does what the second reader says, or the AssertionError tells."""
    case = harness.Case("one", (harness.File(name, data),), ReadOptions(**options), "out.jsonl")
    harness.judge(case, folder, annotator, harness.Report())


# ---------------------------------------------------------------------------------------------------- seeded cases


def test_seeded_cases(tmp_path: Path, annotator: Annotator) -> None:
    """Some hundred whole runs agree with the second reader; they see every outcome, and all reasons but one."""
    report = harness.Report()
    harness.fuzz(SEED, range(CASES), tmp_path, annotator, report)
    assert report.failures == []
    assert report.cases.total() == CASES
    seen = {name for _, name in report.outcomes}
    rare = {Reason.STRAY_QUOTE}  # which the corpus below has
    assert {"exit 0", "exit 2", "exit 3", "exit 4", *Reason} - rare <= seen
    assert not list(tmp_path.iterdir())


def test_a_case_follows_from_its_number() -> None:
    """A failing case can be made again."""
    for number in range(30):
        assert harness.make_case(SEED, number) == harness.make_case(SEED, number)
    assert harness.make_case(SEED, 1) != harness.make_case(SEED + 1, 1)


def lose_malformed(patch: pytest.MonkeyPatch) -> None:
    """Malformed lines are no rows."""
    records = sources._json_records
    patch.setattr(sources, "_json_records", lambda *a: (r for r in records(*a) if r[2] is not Reason.MALFORMED))


def lose_the_last_row(patch: pytest.MonkeyPatch) -> None:
    """A CSV file's last record is dropped."""
    records = sources._csv_records
    patch.setattr(sources, "_csv_records", lambda *a: iter(list(records(*a))[:-1]))


def replace_bytes(patch: pytest.MonkeyPatch) -> None:
    """Bytes that do not decode become text."""
    admit = Reader._admit

    def mend(self: Reader, source: str, row: int, note_id: Any, text: str | None, *rest: Any) -> Any:
        return admit(self, source, row, note_id, text and text.replace("\udcff", "?"), *rest)

    patch.setattr(Reader, "_admit", mend)


def translate_line_ends(patch: pytest.MonkeyPatch) -> None:
    """Line ends within text become line feeds."""
    decoded = sources._decoded

    def translate(*arguments: Any) -> io.TextIOWrapper:
        text = decoded(*arguments)
        text.reconfigure(newline=None)
        return text

    patch.setattr(sources, "_decoded", translate)


def shift_spans(patch: pytest.MonkeyPatch) -> None:
    """The text of a mention is cut one character further."""
    mentions = sinks._mentions
    patch.setattr(sinks, "_mentions", lambda *a: pa.array([text[1:] + " " for text in mentions(*a).to_pylist()]))


def tell_data(patch: pytest.MonkeyPatch) -> None:
    """A message quotes the file."""
    patch.setattr(sources, "_no_column", lambda file, *_: InputError(f"{file}: {file.path.read_bytes()!r}"))


def ignore_repeats(patch: pytest.MonkeyPatch) -> None:
    """Ids are never compared."""
    patch.setattr(Reader, "_admit", lambda self, *a, admit=Reader._admit: (self._ids.clear(), admit(self, *a))[1])


@pytest.mark.parametrize(
    "defect",
    [
        lose_malformed,
        lose_the_last_row,
        replace_bytes,
        translate_line_ends,
        shift_spans,
        tell_data,
        ignore_repeats,
    ],
    ids=lambda defect: defect.__name__,
)
def test_a_defect_does_not_go_unseen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    annotator: Annotator,
    defect: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """The cases are worth something: each of these defects makes one of the first hundred fail."""
    defect(monkeypatch)
    report = harness.Report()
    for number in range(100):
        harness.fuzz(SEED, [number], tmp_path, annotator, report)
        if report.failures:
            break
    (failure,) = report.failures
    assert failure.startswith(f"--seed {SEED} --only {number}: ")
    assert "AssertionError" in failure


# ------------------------------------------------------------------------------------------------------- properties

NAMES = ("n.jsonl", "n.csv", "n.tsv", "n.txt", "n.parquet", "n.jsonl.gz", "n.csv.bz2", "n.txt.zst")
BYTES = st.binary(max_size=200) | st.lists(st.sampled_from(harness._TOKENS), max_size=30).map(b"".join)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": harness.zst_frame,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.sampled_from(("text", "note_id", "x")), some),
    max_leaves=6,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\r\n\0",;\t\ufeff🤒é '), max_size=20)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=BYTES, pack=st.booleans())
def test_arbitrary_bytes(
    name: str, data: bytes, pack: bool, annotator: Annotator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in a file of any format, it is rows, reasons or an error, as the second reader has it."""
    if pack:
        data = PACK.get(name.rpartition(".")[2], bytes)(data)
    if name == "n.parquet":
        truth = harness.Truth(None, harness.parquet_rows(data), "perhaps")
        case = harness.Case("one", (harness.File(name, data, truth),), ReadOptions(), "out.jsonl")
        harness.judge(case, tmp_path_factory.mktemp("bytes"), annotator, harness.Report())
    else:
        agrees(tmp_path_factory.mktemp("bytes"), annotator, data, name)


@pytest.mark.parametrize("head", ["text\n", "note_id,text,x\n", '"text",note_id\r\n'])
@settings(max_examples=60, deadline=None)
@given(data=BYTES)
def test_arbitrary_bytes_behind_a_header(
    head: str, data: bytes, annotator: Annotator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same where a CSV file has the columns that it needs, so that all the rest are records."""
    agrees(tmp_path_factory.mktemp("bytes"), annotator, head.encode() + data, "n.csv")


@settings(max_examples=80, deadline=None)
@given(values=st.lists(JSON, max_size=6))
def test_arbitrary_json(values: list[Any], annotator: Annotator, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every JSON value on a line of its own is one row, and a note exactly where it is an object with a text."""
    objects = [value for value in values if isinstance(value, dict)]
    # An object that has the text keeps the rest from being a file without the column.
    values = [*values, {"text": "fever"}]
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    folder = tmp_path_factory.mktemp("json")
    agrees(folder / "whole", annotator, data, "n.jsonl")
    (folder / "n.jsonl").write_bytes(data)
    batches = Reader(discover([str(folder / "n.jsonl")]).files, ReadOptions()).batches()
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert len(rows) == len(values)
    # What is no standard JSON, as NaN, or no Unicode, may reject a row that has a text; nothing makes one up.
    allowed = [value.get("text") if isinstance(value, dict) else None for value in values]
    assert all(row["text"] in (None, text) for row, text in zip(rows, allowed, strict=True))
    plain = [type(value.get("text")) is str and set(value) == {"text"} for value in objects]
    assert sum(row["reason"] is None for row in rows) > sum(plain)


@settings(max_examples=80, deadline=None)
@given(
    table=st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(TEXT, min_size=width, max_size=width), max_size=6)),
    delimiter=st.sampled_from([",", ";", "\t", "|", "\x1f", " ", "é"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"]),
)
def test_what_the_csv_writer_writes(
    table: list[list[str]], delimiter: str, end: str, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every field of every row comes back as it was, whatever the delimiter, the line end and the encoding."""
    width = len(table[0]) if table else 1
    header = ["text", *(f"column {number}" for number in range(1, width))]
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *table])
    path = tmp_path_factory.mktemp("csv") / "n.csv"
    path.write_bytes(sink.getvalue().encode(encoding))
    options = ReadOptions(delimiter=delimiter, encoding=encoding, keep=tuple(header[1:]))
    rows = [row for batch in Reader(discover([str(path)]).files, options).batches() for row in batch.to_pylist()]
    assert [[row[name] for name in header] for row in rows] == table
    assert all(row["reason"] is None for row in rows)


# ------------------------------------------------------------------------------------------------ worked by hand


def call(*arguments: str) -> int:
    """The exit code of ``medner annotate`` with the tiny model."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["annotate", *arguments, "--model", "tiny", "--quiet"])
    return int(caught.value.code or 0)


def corpus(folder: Path) -> None:
    """Files of all formats that hold, between them, everything that is rejected and some notes that are not."""
    (folder / "deep").mkdir(parents=True)
    lines = [
        b'{"note_id": 7, "text": "no fever"}\r\n',
        b"\n",
        b'{"note_id": 7, "text": "fever again"}\n',
        b'{"note_id": 36893488147419103232, "text": "fever"}\n',
        b'{"note_id": "b", "text": "one", "text": "heart failure"}\r\n',
        b'{"note_id": "c", "text": "fever"\n',
        b"[" * 50_000 + b"\n",
        b'{"note_id": "d", "text": "f\xe9ver"}\n',
        b'{"note_id": "e", "text": "\\ud83e fever"}\n',
        b'{"note_id": "f", "text": ["fever"]}\n',
        b'{"note_id": "g", "text": "' + b"fever " * 50 + b'"}\n',
        b'{"note_id": [1], "text": "fever"}\n',
        b'{"note_id": "h"}\n',
        b'["fever"]',
    ]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:5])) + gzip.compress(b"".join(lines[5:])))
    (folder / "b.csv").write_bytes(
        b'\xef\xbb\xbfnote_id,text\r\n1,fever\n2,"no\rasthma\r\n"\r3\n\n4,f\xe9ver\n8,"fever" asthma\n'
        b'9,"fever\n10,"asthma"\n5,"fever\n'
    )
    (folder / "deep/c.tsv.bz2").write_bytes(bz2.compress(b"text\tnote_id\n\ttsv\n"))
    table = {"note_id": [2**63 - 1, None, 0], "text": ["Type 2 diabetes\r\n", None, ""]}
    pq.write_table(pa.table(table), folder / "deep/d.parquet")


#: Each row of the corpus: source, row, id, reason, mentions.
CORPUS: list[tuple[str, int, str, str | None, list[str]]] = [
    ("a.jsonl.gz", 0, "7", None, ["fever"]),
    ("a.jsonl.gz", 1, "7", "id is repeated", []),
    ("a.jsonl.gz", 2, "a.jsonl.gz:2", "id is beyond 64 bits", []),
    ("a.jsonl.gz", 3, "b", None, ["heart failure"]),
    ("a.jsonl.gz", 4, "a.jsonl.gz:4", "malformed JSON", []),
    ("a.jsonl.gz", 5, "a.jsonl.gz:5", "malformed JSON", []),
    ("a.jsonl.gz", 6, "d", "undecodable bytes", []),
    ("a.jsonl.gz", 7, "e", "lone surrogates", []),
    ("a.jsonl.gz", 8, "f", "text is not a string", []),
    ("a.jsonl.gz", 9, "g", "note is too large", []),
    ("a.jsonl.gz", 10, "a.jsonl.gz:10", "id is not a string or number", []),
    ("a.jsonl.gz", 11, "h", "text is missing", []),
    ("a.jsonl.gz", 12, "a.jsonl.gz:12", "JSON is not an object", []),
    ("b.csv", 0, "1", None, ["fever"]),
    ("b.csv", 1, "2", None, ["asthma"]),
    ("b.csv", 2, "b.csv:2", "wrong number of fields", []),
    ("b.csv", 3, "4", "undecodable bytes", []),
    ("b.csv", 4, "b.csv:4", "text follows a closed quote", []),
    ("b.csv", 5, "b.csv:5", "text follows a quote closed lines below, which may hold notes", []),
    ("b.csv", 6, "b.csv:6", "a quote is not closed", []),
    ("deep/c.tsv.bz2", 0, "tsv", None, []),
    ("deep/d.parquet", 0, "9223372036854775807", None, ["Type 2 diabetes"]),
    ("deep/d.parquet", 1, "deep/d.parquet:1", "text is null", []),
    ("deep/d.parquet", 2, "0", None, []),
]


def test_a_corpus_with_everything_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 3: each record is a row with its file, number and reason, and the notes are annotated."""
    corpus(tmp_path / "in")
    code = call(str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--unique-ids", "--max-note-bytes", "200")
    notes = pq.read_table(tmp_path / "out/notes").to_pylist()
    spans = pq.read_table(tmp_path / "out/spans").to_pylist()
    mentions: dict[tuple[str, int], list[str]] = {(row["source"], row["row"]): [] for row in notes}
    for span in spans:
        mentions[span["source"], span["row"]].append(span["text"])
    columns = ("source", "row", "note_id", "reason")
    assert [(*(row[name] for name in columns), mentions[row["source"], row["row"]]) for row in notes] == CORPUS
    rejected = Counter(reason for _, _, _, reason, _ in CORPUS if reason)
    assert set(rejected) == set(Reason)
    assert [row["status"] for row in notes] == ["rejected" if row[3] else "annotated" for row in CORPUS]
    counts = json.loads((tmp_path / "out/manifest.json").read_bytes())["counts"]
    assert (counts["rows"], counts["annotated"], counts["rejected"], counts["spans"]) == (24, 7, 17, 5)
    assert (code, *capsys.readouterr()) == (
        3,
        "",
        "medner: 17 of 24 rows were rejected, more than --max-rejected 0 allows; "
        "the output is complete and gives each one's reason\n",
    )


def test_a_hundred_thousand_empty_notes(tmp_path: Path) -> None:
    """Each is a row, annotated, without a span."""
    path = tmp_path / "n.jsonl"
    path.write_text('{"text": ""}\n' * 100_000)
    counts = run(RunOptions((str(path),), str(tmp_path / "out"), model="tiny", quiet=True))["counts"]
    assert (counts["rows"], counts["annotated"], counts["spans"], counts["chars"]) == (100_000, 100_000, 0, 0)
    assert pq.read_table(tmp_path / "out/notes", columns=["row"]).column("row").to_pylist() == list(range(100_000))
    assert len(list((tmp_path / "out/notes").iterdir())) == 20


@pytest.mark.parametrize("change", ["grows", "ends"])
def test_a_file_that_changes_under_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """The command ends with 4 and names the file, and nothing says that the run is finished."""
    path = tmp_path / "n.jsonl"
    path.write_text('{"text": "fever %s"}\n' % ("x" * 900) * 3_000)
    batches = Reader.batches

    def meddle(self: Reader) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(batches(self)):
            if number == 2 and change == "grows":
                with path.open("a") as file:
                    file.write('{"text": "asthma"}\n')
            elif number == 2:
                os.truncate(path, path.stat().st_size - 100)
            yield batch

    monkeypatch.setattr(Reader, "batches", meddle)
    code = call(str(path), "-o", str(tmp_path / "out"), "--part-rows", "100")
    assert (code, *capsys.readouterr()) == (
        4,
        "",
        f"medner: {path} changed while it was read; run again once nothing writes to it; --resume goes on with "
        f"{tmp_path / 'out'}\n",
    )
    assert not (tmp_path / "out/manifest.json").exists()


def test_the_summary_of_cases(tmp_path: Path, annotator: Annotator) -> None:
    """What the long form prints is a table of formats and outcomes."""
    report = harness.Report()
    harness.fuzz(SEED, range(3), tmp_path, annotator, report)
    head, cases, *_ = harness.summary(report).splitlines()
    assert head.split() == [*sorted(report.cases), "all"]
    assert cases.split() == ["cases", *(str(report.cases[kind]) for kind in sorted(report.cases)), "3"]


def test_what_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that hangs fails with its number, and the next one runs."""
    monkeypatch.setattr(harness, "GUARD_SECONDS", 0.2)

    def forever() -> Iterator[int]:
        while True:
            yield 1

    with pytest.raises(harness.Hung), harness.guarded():
        sum(forever())
    with harness.guarded():
        assert replace(ReadOptions(), limit=1).limit == 1
