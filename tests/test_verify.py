"""``medner verify``: what a run wrote passes, every kind of damage is named, and nothing of a note is said."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medner import cli, sinks, testing
from medner import verify as verifying
from medner.annotate import Options
from medner.errors import CheckFailed, InputError
from medner.run import RunOptions, run
from medner.sources import ReadOptions
from medner.verify import verify

#: Eight rows, in parts of three. The tiny model finds 4, 2 and 2 spans in them.
NOTES: list[Any] = [
    {"note_id": "a", "text": "Type 2 diabetes, no fever.", "ward": "x"},
    {"note_id": 7, "text": "", "ward": None},
    {"text": "Höart – heart failure 😀 fever", "ward": {"nested": [1.5, True]}},
    {"note_id": "b", "text": None},
    {"note_id": "c", "text": "No asthma, or breast cancer", "ward": 12345678901234567890123},
    "{nope",
    {"note_id": "d", "text": "fever"},
    {"note_id": "e", "text": "fever"},
]
AGAIN = "restore the output from a copy, or annotate again with --overwrite"
RESUME = "medner annotate --resume writes it again"
OTHER = "give --notes what was annotated, or annotate again"
FORMS = ["parquet", "jsonl"]

Row = dict[str, Any]
Edit = Callable[[list[Row]], object]
Go = Callable[..., Path]


def write_notes(path: Path, notes: list[Any] = NOTES) -> Path:
    """A JSONL file of notes; strings are lines as they are."""
    lines = [note if isinstance(note, str) else json.dumps(note, ensure_ascii=False) for note in notes]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """The file of NOTES."""
    return write_notes(tmp_path / "notes.jsonl")


def annotate(inputs: Path | str, output: Path, **changes: Any) -> Path:
    """One quiet run with the tiny model, in parts of three rows; its output."""
    options = RunOptions((str(inputs),), str(output), model=str(testing.bundle()), quiet=True, part_rows=3)
    run(replace(options, **changes))
    return output


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Annotates one file as :func:`annotate` does, but an equal run only once: its output is copied."""
    made: dict[tuple[str, ...], Path] = {}

    def copied(inputs: Path, output: Path, **changes: Any) -> Path:
        key = (inputs.read_text(encoding="utf-8"), inputs.name, output.name, repr(changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("made")
            annotate(inputs, made[key] / output.name, **changes)
        shutil.copytree(made[key], output.parent, dirs_exist_ok=True)
        return output

    return copied


def wrong(output: Path, *notes: Path) -> str:
    """What is found wrong with an output."""
    with pytest.raises(CheckFailed) as caught:
        verify(output, tuple(map(str, notes)))
    return str(caught.value)


def read(file: Path) -> list[Row]:
    """The rows of a table file."""
    if file.suffix == ".parquet":
        rows: list[Row] = pq.read_table(file).to_pylist()
        return rows
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def change(file: Path, edit: Edit) -> None:
    """Edit the rows of a table file in place."""
    rows = read(file)
    edit(rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)
    else:
        file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def change_json(file: Path, edit: Callable[[Row], None]) -> None:
    """Edit a JSON file in place."""
    value = orjson.loads(file.read_bytes())
    edit(value)
    file.write_bytes(orjson.dumps(value))


def repair(output: Path) -> None:
    """Make the manifest's hashes those of the files as they are now."""

    def edit(manifest: Row) -> None:
        for name in manifest["files"]:
            manifest["files"][name] = hashlib.sha256((output / name).read_bytes()).hexdigest()

    change_json(output / "manifest.json", edit)


def with_values(index: int, **values: Any) -> Edit:
    """Sets values of one row."""
    return lambda rows: rows[index].update(values)


# ---------------------------------------------------------------------------------------------------------------------
# What is right


RIGHT: dict[str, dict[str, Any]] = {
    "plain": {},
    "one part": {"part_rows": 5000},
    "parts of one row": {"part_rows": 1},
    "no text": {"text": False},
    "nested": {"nested": True},
    "nested without text": {"nested": True, "text": False},
    "kept": {"read": ReadOptions(keep=("ward",))},
    "nested and kept": {"nested": True, "read": ReadOptions(keep=("ward",))},
    "limited": {"read": ReadOptions(limit=4)},
    "limited to nothing": {"read": ReadOptions(limit=0)},
    "of sure spans": {"annotate": Options(min_score=0.9066)},
    "without reuse": {"annotate": Options(reuse=False)},
}


@pytest.mark.parametrize("output", ["out", "out-jsonl", "out.parquet", "out.jsonl", "out.jsonl.gz", "out.JSONL.zst"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_a_run_wrote_is_right(tmp_path: Path, go: Go, notes: Path, output: str, name: str) -> None:
    """Every form of the output passes, alone and against its notes, and the summary says what was compared."""
    form = {"out": "parquet", "out-jsonl": "jsonl"}.get(output)
    out = go(notes, tmp_path / output, form=form, **RIGHT[name])
    counts = {"limited": (4, 1, 4, 2), "limited to nothing": (0, 0, 0, 1)}.get(name, (8, 2, 8, 3))
    rows, rejected, spans, parts = counts
    parts = {"one part": 1, "parts of one row": 8}.get(name, parts)
    spans = 4 if name == "of sure spans" else spans
    said = (
        f"{out}: {rows} notes ({rejected} rejected) and {spans} spans in {parts} part{'s' if parts > 1 else ''} "
        "are whole and agree with the manifest\n"
    )
    assert verify(out) == f"{said}the notes themselves were not read; --notes compares every span with its text"
    assert verify(out, [str(notes)]) == f"{said}every note and every span was compared with the notes given"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
def test_kept_columns_of_every_type_are_right(tmp_path: Path, form: str, nested: bool) -> None:
    """Parquet inputs, whose kept columns have types of their own: numbers that are none, dates, lists, categories."""
    table = pa.table(
        {
            "text": ["fever", None, "ok", "no fever, fever"],
            "age": pa.array([61, None, 3, 4], pa.int16()),
            "weight": [1.5, float("nan"), None, float("nan")],
            "seen": pa.array([0, None, 86_400_000_000_001, 5], pa.timestamp("us", "UTC")),
            "codes": pa.array([[1.0], [], None, [float("nan"), 2.0]], pa.list_(pa.float64())),
            "ward": pa.array(["x", "y", None, "x"]).dictionary_encode(),
        }
    )
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    keep = ("age", "weight", "seen", "codes", "ward")
    inputs = str(tmp_path / "*.parquet")
    out = annotate(inputs, tmp_path / "out", form=form, nested=nested, read=ReadOptions(keep=keep))
    assert verify(out, [inputs]).startswith(f"{out}: 8 notes (2 rejected) and 6 spans in 3 parts are whole")
    # Row 1 of b.parquet has no span: where both tables agree, only the notes can tell.
    for table in ("notes", "spans") if nested else ("notes",):
        change(out / table / f"part-000001.{form}", with_values(2, age=5))
    repair(out)
    verify(out)
    place = f"{out}/notes/part-000001.{form}, row 2"
    assert wrong(out, Path(inputs)) == f"{place}: age is not that of the note given; {OTHER}"


def test_other_inputs_are_right(tmp_path: Path) -> None:
    """Text files and tables one after another, an empty table, standard input, and a moved directory."""
    texts = tmp_path / "texts"
    (texts / "below").mkdir(parents=True)
    for name in ("1.txt", "2.txt", "below/1.txt"):
        (texts / name).write_bytes("\ufeff no fever\r\n\x85fever\x85\u3000".encode())
    write_notes(tmp_path / "empty.jsonl", [])
    write_notes(tmp_path / "more.jsonl", NOTES[:2])
    inputs = tuple(str(tmp_path / name) for name in ("empty.jsonl", "texts", "more.jsonl"))
    run(RunOptions(inputs, str(tmp_path / "out"), model=str(testing.bundle()), quiet=True, part_rows=2))
    moved = (tmp_path / "out").rename(tmp_path / "moved.parquet")
    assert verify(moved, inputs).startswith(f"{moved}: 5 notes (0 rejected) and 5 spans in 3 parts are whole")
    assert wrong(moved, *map(Path, reversed(inputs))) == (
        f"{moved}/notes/part-000000.parquet, row 0: source is not that of the note given; {OTHER}"
    )
    with (tmp_path / "more.jsonl").open("rb") as stdin:
        options = RunOptions(("-",), str(tmp_path / "in"), model=str(testing.bundle()), quiet=True)
        run(options, stdin=stdin)
        stdin.seek(0)
        assert verify(tmp_path / "in", ["-"], stdin).startswith(f"{tmp_path}/in: 2 notes")


def test_a_resumed_run_is_right(tmp_path: Path, notes: Path) -> None:
    """Windows of kept parts are counted apart, and other threads than before are no contradiction."""
    out = annotate(notes, tmp_path / "out", annotate=Options(threads=1))
    (out / "manifest.json").unlink()
    (out / "notes" / "part-000001.parquet").unlink()
    assert wrong(out) == f"{out}: holds an unfinished run; finish it with medner annotate --resume"
    annotate(notes, out, resume=True, annotate=Options(threads=2))
    assert orjson.loads((out / "manifest.json").read_bytes())["counts"]["windows_kept"] > 0
    verify(out, [str(notes)])


@pytest.mark.parametrize("output", ["out", "out.jsonl"])
def test_rows_of_many_chunks(tmp_path: Path, go: Go, notes: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """Rows are checked a few at a time with equal results, wherever the readers cut them."""
    out = go(notes, tmp_path / output, part_rows=5)
    whole = verify(out, [str(notes)])
    for rows in (1, 2, 3):
        monkeypatch.setattr(verifying, "_ROWS", rows)
        assert verify(out, [str(notes)]) == whole
    for spans in (1, 2):
        monkeypatch.setattr(verifying, "_SPANS", spans)
        monkeypatch.setattr(verifying, "_BYTES", 100 * spans)
        assert verify(out, [str(notes)]) == whole
    table = out / "spans" / "part-000001.parquet" if output == "out" else out
    change(table, with_values(-1, start=1))
    row = len(read(table)) - 1
    assert wrong(out) == f"{table}, row {row}: text is not as long as start and end say; {AGAIN}"


# ---------------------------------------------------------------------------------------------------------------------
# Changed spans

#: Values of the second span, ``fever`` in [20, 25) of a note of 26 characters after a span that ends at 15.
SPANS: list[tuple[Row, str]] = [
    ({"start": 21}, "text is not as long as start and end say"),
    ({"start": 14}, "lies before the end of the span before it"),
    ({"start": -1}, "start and end are no range of characters"),
    ({"start": 25}, "start and end are no range of characters"),
    ({"end": 26}, "text is not as long as start and end say"),
    ({"end": 27}, "end lies beyond the note"),
    ({"end": 20}, "start and end are no range of characters"),
    ({"text": "fevers"}, "text is not as long as start and end say"),
    ({"text": ""}, "text is not as long as start and end say"),
    ({"text": "feve\n"}, "text begins or ends in white space"),
    ({"text": "\u3000ever"}, "text begins or ends in white space"),
    ({"label": "Drug"}, "label is none of the model's"),
    ({"label": "B-Disease"}, "label is none of the model's"),
    ({"label": ""}, "label is none of the model's"),
    ({"score": 1.25}, "score is not between 0.5 and 1"),
    ({"score": 0.25}, "score is not between 0.5 and 1"),
    ({"score": -0.5}, "score is not between 0.5 and 1"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(("values", "what"), SPANS)
def test_a_changed_span(
    tmp_path: Path, go: Go, notes: Path, form: str, nested: bool, repaired: bool, values: Row, what: str
) -> None:
    """Each value of a span alone is found, in both layouts, also where the manifest has the new file's hash."""
    out = go(notes, tmp_path / "out", form=form, nested=nested, annotate=Options(min_score=0.5))
    file = out / "spans" / f"part-000000.{form}"
    change(file, lambda rows: (rows[0]["spans"] if nested else rows)[1].update(values))
    if repaired:
        repair(out)
    assert wrong(out) == f"{file}, row {0 if nested else 1}: {what}; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "values", [{"text": "FEVER"}, {"start": 19, "end": 24}, {"start": 0, "end": 5}, {"start": 21, "end": 26}]
)
def test_a_changed_span_that_only_the_note_contradicts(
    tmp_path: Path, go: Go, notes: Path, form: str, nested: bool, values: Row
) -> None:
    """The hash tells that something changed; where that is mended, too, the note does."""
    out = go(notes, tmp_path / "out", form=form, nested=nested)
    file = out / "spans" / f"part-000000.{form}"
    index = 0 if values.get("start") == 0 else 1
    change(
        file,
        lambda rows: (rows[0]["spans"] if nested else rows)[index].update(values, text=values.get("text", "hello")),
    )
    place = f"{file}, row {0 if nested else index}"
    assert wrong(out) == f"{file}: its SHA-256 is not the one in manifest.json; {AGAIN}"
    assert wrong(out, notes) == f"{place}: text is not the note's; {AGAIN}"
    repair(out)
    verify(out)
    assert wrong(out, notes) == f"{place}: text is not the note's; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
def test_without_text_a_span_must_not_touch_white_space(
    tmp_path: Path, go: Go, notes: Path, form: str, nested: bool
) -> None:
    """That is all that the note can say of a range whose text was not written."""
    out = go(notes, tmp_path / "out", form=form, nested=nested, text=False)
    file = out / "spans" / f"part-000000.{form}"
    change(file, lambda rows: (rows[0]["spans"] if nested else rows)[1].update(start=19))
    repair(out)
    verify(out)
    assert wrong(out, notes) == f"{file}, row {0 if nested else 1}: begins or ends in white space; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("edit", "row", "what"),
    [
        (with_values(1, row=2), 1, "row is not that of the note whose turn it is in"),
        (with_values(1, source="other.jsonl"), 1, "source is not that of the note whose turn it is in"),
        (with_values(1, note_id="b"), 1, "note_id is not that of the note whose turn it is in"),
        (with_values(1, note_id=None), 1, "note_id is not that of the note whose turn it is in"),
        (with_values(0, ward="y"), 0, "ward is not that of the note whose turn it is in"),
        (lambda rows: rows.pop(0), 1, "row is not that of the note whose turn it is in"),
        (lambda rows: rows.insert(0, rows[0]), 2, "row is not that of the note whose turn it is in"),
        (lambda rows: rows.reverse(), 0, "row is not that of the note whose turn it is in"),
        (lambda rows: rows.append(rows[3]), 4, "belongs to no note of"),
    ],
)  # fmt: skip
def test_spans_of_the_wrong_note(
    tmp_path: Path, go: Go, notes: Path, form: str, repaired: bool, edit: Edit, row: int, what: str
) -> None:
    """Spans lost, repeated, moved to another note or carrying another note's values."""
    out = go(notes, tmp_path / "out", form=form, read=ReadOptions(keep=("ward",)))
    file = out / "spans" / f"part-000000.{form}"
    change(file, edit)
    if repaired:
        repair(out)
    assert wrong(out) == f"{file}, row {row}: {what} {out}/notes/part-000000.{form}; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repaired", [False, True])
def test_spans_out_of_order_within_a_note(tmp_path: Path, go: Go, notes: Path, form: str, repaired: bool) -> None:
    """A note's spans are sorted."""
    out = go(notes, tmp_path / "out", form=form)
    file = out / "spans" / f"part-000000.{form}"

    def edit(rows: list[Row]) -> None:
        rows[0], rows[1] = rows[1], rows[0]

    change(file, edit)
    if repaired:
        repair(out)
    assert wrong(out) == f"{file}, row 1: lies before the end of the span before it; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("edit", "table", "row", "what"),
    [
        (lambda rows: rows[0]["spans"].pop(), "spans", 0, "holds another number of spans than n_spans in {notes} says"),
        (with_values(1, spans=None), "spans", 1, "spans is null where a note was annotated, or not null elsewhere"),
        (lambda rows: rows.pop(1), "spans", 1, "row is not that of the note whose turn it is in {notes}"),
        (lambda rows: rows.pop(), "notes", 2, "its spans are not all in {spans}"),
        (lambda rows: rows.append(rows[2]), "spans", 3, "belongs to no note of {notes}"),
    ],
)  # fmt: skip
def test_nested_rows_of_the_wrong_note(
    tmp_path: Path, go: Go, notes: Path, form: str, repaired: bool, edit: Edit, table: str, row: int, what: str
) -> None:
    """A nested table has one row for each note, null for rejected ones only."""
    out = go(notes, tmp_path / "out", form=form, nested=True)
    files = {name: out / name / f"part-000000.{form}" for name in ("spans", "notes")}
    change(files["spans"], edit)
    if repaired:
        repair(out)
    assert wrong(out) == f"{files[table]}, row {row}: {what.format(**files)}; {AGAIN}"


# ---------------------------------------------------------------------------------------------------------------------
# Changed notes

MISPLACED = "row is not the next one of its source: a row is missing, repeated or misplaced"
#: Edits of the part of rows 0, 1 and 2; the last one has 29 characters, two spans, and tokens in one window.
EDITS: list[tuple[Edit, int, str]] = [
    (lambda rows: rows.pop(1), 1, MISPLACED),
    (lambda rows: rows.insert(1, rows[0]), 1, MISPLACED),
    (lambda rows: rows.append(rows[2]), 3, MISPLACED),
    (lambda rows: rows.reverse(), 0, MISPLACED),
    (with_values(2, row=3), 2, MISPLACED),
    (with_values(2, row=-1), 2, MISPLACED),
    (with_values(2, source="other.jsonl"), 2, "source is not the input whose turn it is"),
    (with_values(2, note_id=None), 2, "note_id is null"),
    (with_values(2, status="done"), 2, "status is neither annotated nor rejected"),
    (with_values(2, status="rejected"), 2, "status and reason contradict each other"),
    (with_values(2, reason="text is null"), 2, "status and reason contradict each other"),
    (with_values(2, status="rejected", reason="bad"), 2, "reason is none that medner gives"),
    (with_values(2, status="rejected", reason="text is null"), 2, "is rejected, but n_chars is not 0"),
    (with_values(1, status="rejected", reason="text is null"), 1, "is rejected, but has a text_sha256"),
    (with_values(2, text_sha256=None), 2, "text_sha256 is not 64 hexadecimal digits"),
    (with_values(2, text_sha256="A" * 64), 2, "text_sha256 is not 64 hexadecimal digits"),
    (with_values(2, text_sha256="a" * 64 + "\n"), 2, "text_sha256 is not 64 hexadecimal digits"),
    (with_values(1, text_sha256="a" * 64), 1, "n_chars contradicts text_sha256"),
    (with_values(2, n_chars=0), 2, "n_chars contradicts text_sha256"),
    (with_values(2, n_chars=-1), 2, "n_chars is negative"),
    (with_values(2, n_tokens=-1), 2, "n_tokens is negative"),
    (with_values(2, n_unknown=99), 2, "n_unknown is above n_tokens"),
    (with_values(2, n_windows=0), 2, "n_windows contradicts n_tokens"),
    (with_values(2, n_windows=99), 2, "n_windows contradicts n_tokens"),
    (with_values(1, n_windows=1), 1, "n_windows contradicts n_tokens"),
    (with_values(2, n_spans=99), 2, "n_spans is above n_tokens or n_chars"),
    (with_values(2, n_unknown=0, n_tokens=1), 2, "n_spans is above n_tokens or n_chars"),
    (with_values(2, n_chars=1), 2, "n_spans is above n_tokens or n_chars"),
    (with_values(2, n_spans=3), 2, "its spans are not all in {spans}"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(("edit", "row", "what"), EDITS)
def test_changed_notes(
    tmp_path: Path, go: Go, notes: Path, form: str, repaired: bool, edit: Edit, row: int, what: str
) -> None:
    """Rows lost, repeated or moved, and rows that contradict themselves, also where the hash was mended."""
    out = go(notes, tmp_path / "out", form=form)
    file = out / "notes" / f"part-000000.{form}"
    change(file, edit)
    if repaired:
        repair(out)
    said = wrong(out)
    what = what.format(spans=out / "spans" / f"part-000000.{form}")
    assert said == f"{file}, row {row}: {what}; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("values", "row", "what"),
    [
        ({"n_spans": 1}, 1, "row is not that of the note whose turn it is in {notes}"),
        ({"n_chars": 24}, 1, "end lies beyond the note"),
    ],
)
def test_notes_that_their_spans_contradict(
    tmp_path: Path, go: Go, notes: Path, form: str, repaired: bool, values: Row, row: int, what: str
) -> None:
    """A count that is too small shows in the row of spans that it leaves over."""
    out = go(notes, tmp_path / "out", form=form)
    file = out / "notes" / f"part-000000.{form}"
    change(file, with_values(0, **values))
    if repaired:
        repair(out)
    assert wrong(out) == f"{out}/spans/part-000000.{form}, row {row}: {what.format(notes=file)}; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["chars", "tokens", "unknown", "windows"])
def test_a_count_that_only_the_sums_contradict(tmp_path: Path, go: Go, notes: Path, form: str, name: str) -> None:
    """The hash tells; where that is mended, too, the manifest's sum does."""
    out = go(notes, tmp_path / "out", form=form)
    file = out / "notes" / f"part-000000.{form}"
    said = orjson.loads((out / "manifest.json").read_bytes())["counts"][name]
    change(file, lambda rows: rows[2].update({f"n_{name}": rows[2][f"n_{name}"] + 1}))
    assert wrong(out) == f"{file}: its SHA-256 is not the one in manifest.json; {AGAIN}"
    repair(out)
    assert wrong(out) == f"{out}/manifest.json: counts.{name} is {said}, but the tables hold {said + 1}; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
def test_the_last_rows_are_missing(tmp_path: Path, go: Go, notes: Path, form: str) -> None:
    """A part that ends early is told by the cut rule; the last part may be short, and the sums tell."""
    out = go(notes, tmp_path / "out", form=form)

    def drop_last(part: int, spans: int) -> None:
        change(out / "notes" / f"part-00000{part}.{form}", lambda rows: rows.__delitem__(-1))
        change(
            out / "spans" / f"part-00000{part}.{form}", lambda rows: rows.__delitem__(slice(len(rows) - spans, None))
        )
        repair(out)

    drop_last(2, spans=1)
    assert wrong(out) == f"{out}/manifest.json: counts.rows is 8, but the tables hold 7; {AGAIN}"
    drop_last(2, spans=1)
    assert wrong(out) == f"{out}/notes/part-000002.{form}: is empty; {AGAIN}"
    drop_last(1, spans=0)
    assert wrong(out) == (
        f"{out}/notes/part-000001.{form}: ends after 2 rows, before the part is full: "
        f"its last rows are missing; {AGAIN}"
    )


@pytest.mark.parametrize("form", FORMS)
def test_rows_after_the_last_one(tmp_path: Path, go: Go, notes: Path, form: str) -> None:
    """The manifest's inputs say where the run ends."""
    out = go(notes, tmp_path / "out", form=form)
    file = out / "notes" / f"part-000002.{form}"
    change(file, lambda rows: rows.append(rows[1] | {"row": 8}))
    repair(out)
    assert wrong(out) == f"{file}, row 2: comes after the last row of the manifest's inputs; {AGAIN}"


def test_the_cut_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part may end early where its text is large enough, and must end there."""
    monkeypatch.setattr("medner.run.PART_BYTES", 40)
    monkeypatch.setattr("medner.run.cut_parts.__defaults__", (40,))
    monkeypatch.setattr(verifying, "PART_BYTES", 40)
    inputs = write_notes(
        tmp_path / "in.jsonl", [{"text": text} for text in ["x" * 39, "fever", "é" * 20, "😀" * 10, "x"]]
    )
    out = annotate(inputs, tmp_path / "out", part_rows=9)
    assert [len(read(out / "notes" / f"part-00000{part}.parquet")) for part in range(4)] == [2, 1, 1, 1]
    verify(out, [str(inputs)])
    monkeypatch.setattr(verifying, "PART_BYTES", 39)
    assert wrong(out) == (
        f"{out}/notes/part-000000.parquet, row 1: belongs to another part: this one is full before it; {AGAIN}"
    )
    monkeypatch.setattr(verifying, "PART_BYTES", 81)
    assert wrong(out) == (
        f"{out}/notes/part-000001.parquet: ends after 1 rows, before the part is full: "
        f"its last rows are missing; {AGAIN}"
    )


def test_more_rows_than_a_part_takes(tmp_path: Path, go: Go, notes: Path) -> None:
    """The manifest says how many that are."""
    out = go(notes, tmp_path / "out")
    for name in ("run.json", "manifest.json"):
        change_json(out / name, lambda record: record["options"].update(part_rows=2))
    assert wrong(out) == f"{out}/manifest.json: counts.parts is 3, which cannot hold 8 rows; {AGAIN}"
    write_notes(notes, NOTES[:6])
    out = go(notes, tmp_path / "short")
    for name in ("run.json", "manifest.json"):
        change_json(out / name, lambda record: record["options"].update(part_rows=2))
    change_json(out / "manifest.json", lambda record: record["counts"].update(parts=3))
    for folder in ("spans", "notes"):
        shutil.copy(out / folder / "part-000001.parquet", out / folder / "part-000002.parquet")
    change_json(
        out / "manifest.json",
        lambda record: record["files"].update({f"{folder}/part-000002.parquet": "" for folder in ("spans", "notes")}),
    )
    assert wrong(out) == f"{out}/notes/part-000000.parquet, row 2: is beyond the 2 rows of a part; {AGAIN}"


# ---------------------------------------------------------------------------------------------------------------------
# Changed files


@pytest.mark.parametrize("form", FORMS)
def test_parts_missing_unknown_or_swapped(tmp_path: Path, go: Go, notes: Path, form: str) -> None:
    """Each part is there once, in its place, and no other file is; hidden ones do not count."""
    out = go(notes, tmp_path / "out", form=form)
    (out / "spans" / f".part-000001.{form}.abcd1234.tmp").write_text("half")
    (out / "notes" / ".DS_Store").write_text("of a file browser")
    verify(out)
    for folder in ("spans", "notes"):
        for number in range(3):
            file = out / folder / f"part-00000{number}.{form}"
            aside = file.rename(out / "aside")
            assert wrong(out) == f"{file}: is missing; the run has 3 parts; {RESUME}"
            aside.rename(file)
        for name in (f"part-000003.{form}", f"part-1.{form}", "part-000000.csv", "_SUCCESS"):
            (out / folder / name).write_text("")
            assert wrong(out) == f"{out}/{folder}/{name}: is none of the run's 3 parts; move it away"
            (out / folder / name).unlink()
    for folder in ("spans", "notes"):
        swap(out / folder / f"part-000000.{form}", out / folder / f"part-000001.{form}")
        repair(out)
        if folder == "spans":
            assert wrong(out) == (
                f"{out}/spans/part-000000.{form}, row 0: row is not that of the note whose turn it is in "
                f"{out}/notes/part-000000.{form}; {AGAIN}"
            )
    assert wrong(out) == f"{out}/notes/part-000000.{form}, row 0: {MISPLACED}; {AGAIN}"


def swap(first: Path, second: Path) -> None:
    """Exchange two files."""
    aside = first.rename(first.with_name("aside"))
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_another_run(tmp_path: Path, go: Go, notes: Path, form: str) -> None:
    """Of other options, of other notes and of another file: by the hash, by the sums and by the source."""
    out = go(notes, tmp_path / "out", form=form)
    sure = go(notes, tmp_path / "sure", form=form, annotate=Options(min_score=0.9066))
    (tmp_path / "other").mkdir()
    other = go(write_notes(tmp_path / "other" / "other.jsonl"), tmp_path / "third", form=form)
    for folder in ("spans", "notes"):
        shutil.copy(sure / folder / f"part-000001.{form}", out / folder)
    assert wrong(out) == f"{out}/spans/part-000001.{form}: its SHA-256 is not the one in manifest.json; {AGAIN}"
    repair(out)
    assert wrong(out) == f"{out}/manifest.json: counts.spans is 8, but the tables hold 6; {AGAIN}"
    for folder in ("spans", "notes"):
        shutil.copy(other / folder / f"part-000001.{form}", out / folder)
    assert wrong(out) == (f"{out}/notes/part-000001.{form}, row 0: source is not the input whose turn it is; {AGAIN}")


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("table", ["spans", "notes"])
@pytest.mark.parametrize("kept", [1.0, 0.99, 0.5, 0.0])
def test_a_truncated_parquet_file(tmp_path: Path, go: Go, notes: Path, repaired: bool, table: str, kept: float) -> None:
    """A file that ends early is damaged, wherever that is; bytes after its end are told by the hash."""
    out = go(notes, tmp_path / "out")
    file = out / table / "part-000001.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))] if kept < 1 else content + b"PAR1")
    if repaired:
        repair(out)
    assert wrong(out) == f"{file}: is damaged or cut short; {AGAIN}"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("table", ["", ".notes"])
def test_a_truncated_jsonl_file(tmp_path: Path, go: Go, notes: Path, suffix: str, table: str) -> None:
    """Lines and compressed data that end early."""
    out = go(notes, tmp_path / f"out.{suffix}")
    file = tmp_path / f"out{table}.{suffix}"
    content = file.read_bytes()
    ends = {
        "jsonl": ", row 7: is cut short",
        "jsonl.gz": ": is damaged or cut short",
        "jsonl.zst": ": is damaged or cut short",
    }
    file.write_bytes(content[:-1])
    assert wrong(out) == f"{file}{ends[suffix]}; {AGAIN}"
    if suffix == "jsonl":
        file.write_bytes(content[:-2])
        assert wrong(out) == f"{file}, row 7: is no JSON; {AGAIN}"


def test_a_flipped_bit(tmp_path: Path, go: Go, notes: Path) -> None:
    """Wherever one bit of a small file is changed, something is found, and never an error of another kind."""
    out = go(notes, tmp_path / "out", form="parquet")
    for table in ("spans", "notes"):
        file = out / table / "part-000001.parquet"
        content = file.read_bytes()
        for place in range(0, len(content), 23):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            file.write_bytes(flipped)
            assert wrong(out).startswith(str(out))
        file.write_bytes(content)
    verify(out)


# ---------------------------------------------------------------------------------------------------------------------
# Foreign schemas


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda table: table.append_column("more", table.column("row")), "has 9 columns, not the 8 of its table"),
        (lambda table: table.drop_columns("score"), "column 7 is not score (float not null)"),
        (lambda table: table.select(["row", "source", *table.column_names[2:]]),
         "column 0 is not source (string not null)"),
        (lambda table: retyped(table, "start", pa.int64()), "column 3 is not start (int32 not null)"),
        (lambda table: retyped(table, "score", pa.float64()), "column 7 is not score (float not null)"),
        (lambda table: retyped(table, "text", pa.large_string()), "column 5 is not text (string not null)"),
        (lambda table: table.rename_columns({"label": "type"}), "column 6 is not label (string not null)"),
        (lambda table: table.cast(pa.schema([field.with_nullable(True) for field in table.schema])),
         "column 0 is not source (string not null)"),
        (lambda table: table.replace_schema_metadata(None), "its medner.schema_version is not 1.0"),
        (lambda table: table.replace_schema_metadata({"medner.schema_version": "2.0"}),
         "its medner.schema_version is not 1.0"),
    ],
)  # fmt: skip
def test_a_foreign_parquet_schema(
    tmp_path: Path, go: Go, notes: Path, repaired: bool, edit: Callable[[pa.Table], pa.Table], what: str
) -> None:
    """Columns more or fewer, in another order, of another type or name; another version of the schema, or none."""
    out = go(notes, tmp_path / "out")
    file = out / "spans" / "part-000001.parquet"
    pq.write_table(edit(pq.read_table(file)), file)
    if repaired:
        repair(out)
    assert wrong(out) == f"{file}: {what}; {AGAIN}"


def retyped(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    """A table whose one column has another type."""
    schema = table.schema
    return table.cast(schema.set(schema.get_field_index(name), schema.field(name).with_type(kind)))


def test_kept_columns_of_foreign_types(tmp_path: Path) -> None:
    """A kept column has one type in all parts and in both tables."""
    pq.write_table(
        pa.table({"text": ["fever"] * 5, "age": pa.array([1, 2, 3, 4, 5], pa.int16())}), tmp_path / "in.parquet"
    )
    out = annotate(tmp_path / "in.parquet", tmp_path / "out", read=ReadOptions(keep=("age",)))
    for table, number, column in (("notes", 1, 11), ("spans", 0, 8)):
        file = out / table / f"part-00000{number}.parquet"
        before = pq.read_table(file)
        pq.write_table(retyped(before, "age", pa.int32()), file)
        assert wrong(out) == f"{file}: column {column} is not age (int16); {AGAIN}"
        pq.write_table(before, file)
    first = out / "notes" / "part-000000.parquet"
    pq.write_table(pq.read_table(first).drop_columns("age"), first)
    assert wrong(out) == f"{first}: has no column age, which --keep names; {AGAIN}"


KEYS = "source, row, note_id, start, end, text, label, score"


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (with_values(1, more=1), f"is no object of {KEYS}, in this order"),
        (lambda rows: rows[1].pop("score"), f"is no object of {KEYS}, in this order"),
        (lambda rows: rows[1].update(source=rows[1].pop("source")), f"is no object of {KEYS}, in this order"),
        (lambda rows: rows.__setitem__(1, [1]), f"is no object of {KEYS}, in this order"),  # type: ignore[call-overload]
        (with_values(1, start="20"), "start is not of its type"),
        (with_values(1, start=20.0), "start is not of its type"),
        (with_values(1, start=True), "start is not of its type"),
        (with_values(1, start=2**31), "start is not of its type"),
        (with_values(1, row=2**63), "row is not of its type"),
        (with_values(1, row=None), "row is not of its type"),
        (with_values(1, text=None), "text is not of its type"),
        (with_values(1, score=1), "score is not of its type"),
        (with_values(1, score=None), "score is not of its type"),
        (with_values(1, note_id=7), "note_id is not of its type"),
    ],
)  # fmt: skip
def test_a_foreign_json_row(tmp_path: Path, go: Go, notes: Path, repaired: bool, edit: Edit, what: str) -> None:
    """Keys more or fewer or in another order, and values of other types or beyond the column's range."""
    out = go(notes, tmp_path / "out", form="jsonl")
    file = out / "spans" / "part-000000.jsonl"
    change(file, edit)
    if repaired:
        repair(out)
    assert wrong(out) == f"{file}, row 1: {what}; {AGAIN}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"label":"Disease"', b'"label":"Other","label":"Disease"'),
        (b'"row":0', b'"row":9,"row":0'),
        (b'"row":0', b'"row": 0'),
        (b"fever", b"\\u0066ever"),
    ],
)
def test_json_that_readers_take_differently(tmp_path: Path, go: Go, notes: Path, old: bytes, new: bytes) -> None:
    """Of a name that stands twice one reader takes the first, another the last; medner writes in one way only."""
    out = go(notes, tmp_path / "out", form="jsonl")
    file = out / "spans" / "part-000000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(old, new, 1)
    file.write_bytes(b"".join(lines))
    repair(out)
    assert wrong(out) == f"{file}, row 1: is not written as medner writes it; {AGAIN}"


def test_json_that_is_nested_too_deeply(tmp_path: Path, go: Go, notes: Path) -> None:
    """What can be read and not be written is no defect of medner."""
    out = go(notes, tmp_path / "out", form="jsonl", read=ReadOptions(keep=("ward",)))
    file = out / "notes" / "part-000000.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"ward":"x"', b'"ward":' + b"[" * 300 + b"]" * 300))
    assert wrong(out) == f"{file}, row 0: is not written as medner writes it; {AGAIN}"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("was", "now"),
    [("inf", "-inf"), ("inf", None), ("inf", "nan"), ("nan", None), (None, "inf"), ("inf", "1e308")],
)
def test_kept_numbers_that_json_does_not_tell_apart(
    tmp_path: Path, was: str | None, now: str | None, nested: bool
) -> None:
    """In a Parquet output infinite numbers, NaN and null are different values, inside lists, too."""
    kind = pa.list_(pa.float64()) if nested else pa.float64()

    def value(number: str | None) -> Any:
        known = None if number is None else float(number)
        return [1.0, known] if nested else known

    table = pa.table({"text": ["no", "ok"], "x": pa.array([value(was), value("nan")], kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    out = annotate(tmp_path / "in.parquet", tmp_path / "out", read=ReadOptions(keep=("x",)))
    verify(out, [str(tmp_path / "in.parquet")])
    file = out / "notes" / "part-000000.parquet"
    change(file, with_values(0, x=value(now)))
    repair(out)
    assert wrong(out, tmp_path / "in.parquet") == f"{file}, row 0: x is not that of the note given; {OTHER}"


@pytest.mark.parametrize(
    "spans",
    [7, {}, [7], [{}], [{"start": 0, "end": 1, "text": "f", "label": "Disease", "score": "1"}],
     [{"end": 1, "start": 0, "text": "f", "label": "Disease", "score": 1.0}]],
)  # fmt: skip
def test_a_foreign_nested_json_row(tmp_path: Path, go: Go, notes: Path, spans: Any) -> None:
    """The list of spans has a schema, too."""
    out = go(notes, tmp_path / "out", form="jsonl", nested=True)
    file = out / "spans" / "part-000000.jsonl"
    change(file, with_values(1, spans=spans))
    assert wrong(out) == f"{file}, row 1: spans is not of its type; {AGAIN}"


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def put(name: str, value: Any) -> Callable[[Row], None]:
    """Sets the value of a dotted name; numbers are places in lists."""

    def edit(record: Any) -> None:
        *above, last = [int(key) if key.isdigit() else key for key in name.split(".")]
        for key in above:
            record = record[key]
        record[last] = value

    return edit


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("counts.rows", 9, "counts.rows is 9, but the rows of inputs add up to 8"),
        ("inputs.0.rows", 9, "counts.rows is 8, but the rows of inputs add up to 9"),
        ("inputs", [], "counts.rows is 8, but the rows of inputs add up to 0"),
        ("counts.annotated", 7, "counts.rows is 8, but annotated and rejected ones add up to 9"),
        ("counts.rejected", 3, "counts.rows is 8, but annotated and rejected ones add up to 9"),
        ("counts.windows_inferred", 0, "counts.windows is {windows}, but inferred, reused and kept ones add up to 1"),
        ("counts.windows_kept", 1, "counts.windows is {windows}, but inferred, reused and kept ones add up to {more}"),
        ("counts.spans", 9, "counts.spans is 9, but the tables hold 8"),
        ("counts.tokens", 0, "counts.tokens is 0, but the tables hold {tokens}"),
        ("counts.unknown", 99, "counts.unknown is 99, but the tables hold {unknown}"),
        ("counts.chars", 1, "counts.chars is 1, but the tables hold {chars}"),
        ("counts.parts", 4, "files lists 6 files, not 8"),
        ("counts.parts", 2, "counts.parts is 2, which cannot hold 8 rows"),
        ("counts.parts", 10**12, "counts.parts is 1000000000000, which cannot hold 8 rows"),
        ("counts.parts", "3", "counts.parts is missing or of a wrong type"),
        ("counts.rows", True, "counts.rows is missing or of a wrong type"),
        ("counts.rows", -8, "counts.rows is missing or of a wrong type"),
        ("counts", None, "counts is missing or of a wrong type"),
        ("options.read.keep", [1], "options.read.keep is missing or of a wrong type"),
        ("options.format", "csv", "options.format is neither parquet nor jsonl"),
        ("model.labels", ["B-Disease"], "model.labels are of no scheme that is known"),
        ("model.labels", ["O", "B-X", "X", "b-X"], "model.labels are of no scheme that is known"),
        ("model.window", 2**31, "model.window is none"),
        ("model.window", 2**63, "model.window is missing or of a wrong type"),
        ("model.provider", None, "model.provider is missing or of a wrong type"),
        ("model.files", {"a": None}, "model.files holds what is no SHA-256"),
        ("versions", {}, "versions.onnxruntime is missing or of a wrong type"),
        ("options.min_score", 1e308, "options.min_score is not between 0 and 1"),
        ("options.part_rows", 2**63, "options.part_rows is missing or of a wrong type"),
        ("seconds", None, "seconds is missing or of a wrong type"),
        ("inputs.0.sha256", None, "sha256 of an entry of inputs is none"),
        ("inputs.0.sha256", "nonsense", "sha256 of an entry of inputs is none"),
        ("files", {}, "files lists 0 files, not 6"),
        ("inputs.0.sha256", 1, "an entry of inputs is incomplete or of wrong types"),
        ("inputs.0", {"text_files": 8}, "an entry of inputs is incomplete or of wrong types"),
        ("options.read.limit", 7, "counts.rows is above options.read.limit"),
        ("counts.rows_kept", 9, "counts.rows_kept is above counts.rows"),
        ("counts.parts_kept", 4, "counts.parts_kept is above counts.parts"),
        ("options.reuse", False, "counts.windows_reused is not 0 without options.reuse"),
        ("model.files", {}, "model.files is empty"),
    ],
)  # fmt: skip
def test_a_changed_manifest(tmp_path: Path, go: Go, notes: Path, name: str, value: Any, what: str) -> None:
    """Counts that do not add up, that the tables contradict, or that are no counts; options that cannot be."""
    out = go(notes, tmp_path / "out")
    counts = orjson.loads((out / "manifest.json").read_bytes())["counts"]
    assert counts["windows_reused"] == 1  # both notes `fever`
    change_json(out / "manifest.json", put(name, value))
    if name.startswith(("options.", "model.")):
        change_json(out / "run.json", put(name, value))
    what = what.format(**counts, more=counts["windows"] + 1)
    assert wrong(out) == f"{out}/manifest.json: {what}; {AGAIN}"


def test_a_manifest_that_is_none(tmp_path: Path, go: Go, notes: Path) -> None:
    """No JSON, no object, not everything there, another set of files; each said of the file that is wrong."""
    out = go(notes, tmp_path / "out")
    content = (out / "manifest.json").read_bytes()
    for damaged, what in (
        (content[:-3], "is no JSON"),
        (b"[]", "its content is missing or of a wrong type"),
        (b"{}", "medner is missing or of a wrong type"),
        (content.replace(b"notes/part-000001", b"notes/part-000009"), "files does not name the files of both tables"),
    ):
        (out / "manifest.json").write_bytes(damaged)
        assert wrong(out) == f"{out}/manifest.json: {what}; {AGAIN}"
    (out / "manifest.json").write_bytes(content)
    (out / "run.json").rename(out / "aside")
    assert wrong(out) == f"{out}/run.json: is missing; {AGAIN}"


@pytest.mark.parametrize(
    "name", ["medner", "versions.numpy", "model.precision", "model.window", "options.min_score", "options.part_rows"]
)
def test_a_manifest_of_another_run(tmp_path: Path, go: Go, notes: Path, name: str) -> None:
    """``run.json``, written first, and the manifest, written last, describe one run."""
    out = go(notes, tmp_path / "out")
    change_json(out / "run.json", put(name, 9 if name.startswith("options") or name == "model.window" else "other"))
    assert wrong(out) == f"{out}/run.json: {name} is not that of manifest.json; {AGAIN}"


@pytest.mark.parametrize(
    ("name", "value"), [("source", "other.jsonl"), ("bytes", 1), ("source", None)], ids=["source", "bytes", "none"]
)
def test_a_manifest_of_other_inputs(tmp_path: Path, go: Go, notes: Path, name: str, value: Any) -> None:
    """What was to be read, in ``run.json``, and what was read are the same files."""
    out = go(notes, tmp_path / "out")
    change_json(out / "run.json", put(f"inputs.0.{name}", value))
    assert wrong(out) == f"{out}/run.json: inputs are not those of manifest.json; {AGAIN}"
    change_json(out / "run.json", put("inputs", []))
    assert wrong(out) == f"{out}/run.json: inputs are not those of manifest.json; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
def test_notes_that_the_options_contradict(tmp_path: Path, go: Go, notes: Path, form: str) -> None:
    """No note has more tokens than its windows hold, or more characters than bytes were allowed."""
    out = go(notes, tmp_path / "out", form=form)
    first = out / "notes" / f"part-000000.{form}"
    tokens = read(first)[0]["n_tokens"]
    change(first, with_values(0, n_tokens=tokens + 32))
    repair(out)
    assert wrong(out) == f"{first}, row 0: n_tokens is more than n_windows windows hold; {AGAIN}"
    change(first, with_values(0, n_tokens=tokens))
    repair(out)
    for name in ("run.json", "manifest.json"):
        change_json(out / name, put("options.read.max_note_bytes", 25))
    assert wrong(out) == f"{first}, row 0: n_chars is more than max_note_bytes allows; {AGAIN}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
def test_long_kept_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, nested: bool) -> None:
    """Copies of kept values are compared a few at a time; a wrong one is found wherever it stands."""
    text = "fever, no. asthma. " * 40
    notes = write_notes(tmp_path / "n.jsonl", [{"text": text, "k": f"{i}" * 999} for i in range(7)])
    monkeypatch.setattr(sinks, "GROUP_BYTES", 10_000)
    monkeypatch.setattr(verifying, "_KEPT_ROWS", 3)
    out = annotate(notes, tmp_path / "out", form=form, nested=nested, read=ReadOptions(keep=("k",)))
    verify(out, (str(notes),))
    last = out / "spans" / f"part-000002.{form}"
    change(last, with_values(-1, k="6" * 998))
    repair(out)
    row = len(read(last)) - 1
    assert wrong(out) == (
        f"{last}, row {row}: k is not that of the note whose turn it is in {out}/notes/{last.name}; {AGAIN}"
    )
    assert (row > 50) == (not nested)


@pytest.mark.parametrize("output", [".parquet", ".jsonl.gz", os.fsdecode(b"\xff.parquet"), "a\nb.jsonl"], ids=ascii)
def test_single_files_of_odd_names(tmp_path: Path, notes: Path, output: str) -> None:
    """A suffix alone, and what is no Unicode, name files, too."""
    out = annotate(notes, tmp_path / output)
    verify(out, [str(notes)])
    annotate(notes, out, overwrite=True)
    verify(out, [str(notes)])


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl.gz"])
def test_single_files(tmp_path: Path, go: Go, notes: Path, output: str) -> None:
    """A single file's manifest and notes stand beside it, under names that belong to its own."""
    out = go(notes, tmp_path / output)
    stem, _, suffix = output.partition(".")
    beside = tmp_path / f"{stem}.notes.{suffix}"
    manifest = tmp_path / f"{stem}.manifest.json"
    aside = beside.rename(tmp_path / "aside")
    assert wrong(out) == f"{beside}: is missing; {AGAIN}"
    aside.rename(beside)
    form = "jsonl" if output == "out.parquet" else "parquet"
    change_json(manifest, put("options.format", form))
    right = suffix.partition(".")[0]
    assert wrong(out) == f"{manifest}: options.format is not {right}, the format of {out}; {AGAIN}"
    change_json(manifest, put("options.format", right))
    verify(out)
    change_json(manifest, lambda record: record["files"].update({output: "0"}))
    assert wrong(out) == f"{out}: its SHA-256 is not the one in {manifest.name}; {AGAIN}"
    manifest.unlink()
    with pytest.raises(InputError) as caught:
        verify(out)
    assert str(caught.value) == f"{out}: no finished run of medner; {manifest} is missing"


def test_no_run(tmp_path: Path) -> None:
    """What is not there, is no output, or cannot be read is another error than a wrong output."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("")
    for name, what in (
        ("none", "no such run; give the directory or the file that medner annotate wrote"),
        ("none.parquet", "no such run; give the directory or the file that medner annotate wrote"),
        ("file.csv", "no run directory, and no file ending in .parquet, .jsonl, .jsonl.gz, .jsonl.zst"),
        ("empty", f"no finished run of medner; {tmp_path}/empty/manifest.json is missing"),
    ):
        with pytest.raises(InputError) as caught:
            verify(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {what}"


def test_a_file_that_cannot_be_read(tmp_path: Path, go: Go, notes: Path) -> None:
    """Is no contradiction: nothing can be said of it."""
    out = go(notes, tmp_path / "out")
    file = out / "notes" / "part-000001.parquet"
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError) as caught:
        verify(out)
    assert str(caught.value) == f"cannot read {file}: Is a directory"


# ---------------------------------------------------------------------------------------------------------------------
# The notes themselves


def changed_notes(index: int, **values: Any) -> list[Any]:
    """NOTES with other values in one of them."""
    return [{**note, **values} if number == index else note for number, note in enumerate(NOTES)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("given", "place", "what"),
    [
        (changed_notes(0, text="Type 2 diabetes, no Fever."), "part-000000.{form}, row 0",
         "text_sha256 is not that of the note given"),
        (changed_notes(7, text="fever "), "part-000002.{form}, row 1", "n_chars is not that of the note given"),
        (changed_notes(6, note_id="z"), "part-000002.{form}, row 0", "note_id is not that of the note given"),
        (changed_notes(4, ward="z"), "part-000001.{form}, row 1", "ward is not that of the note given"),
        (changed_notes(4, text=None), "part-000001.{form}, row 1", "reason is not that of the note given"),
        (changed_notes(3, text="ok"), "part-000001.{form}, row 0", "reason is not that of the note given"),
        (changed_notes(3, text=7), "part-000001.{form}, row 0", "reason is not that of the note given"),
        (NOTES[:-1], "part-000002.{form}, row 1", "the notes given end before it"),
        (NOTES[1:], "part-000000.{form}, row 0", "note_id is not that of the note given"),
        ([], "part-000000.{form}, row 0", "the notes given end before it"),
    ],
)  # fmt: skip
def test_other_notes(
    tmp_path: Path, go: Go, notes: Path, form: str, nested: bool, given: list[Any], place: str, what: str
) -> None:
    """A note with another text of the same length, another id, kept value or reason; one more or fewer."""
    out = go(notes, tmp_path / "out", form=form, nested=nested, read=ReadOptions(keep=("ward",)))
    write_notes(notes, given)
    assert wrong(out, notes) == f"{out}/notes/{place.format(form=form)}: {what}; {OTHER}"


def test_more_notes_or_other_bytes(tmp_path: Path, go: Go, notes: Path) -> None:
    """Notes after the last one, other bytes around the same notes, a file of another name."""
    out = go(notes, tmp_path / "out")
    write_notes(notes, [*NOTES, {"text": "more"}])
    assert wrong(out, notes) == f"{out}/manifest.json: the notes given go on after its 8 rows; {OTHER}"
    write_notes(notes, [*NOTES, ""])
    assert wrong(out, notes) == (
        f"{out}/manifest.json: notes.jsonl given hold the same notes, but are other bytes; {OTHER}"
    )
    other = write_notes(tmp_path / "other.jsonl")
    assert wrong(out, other) == f"{out}/notes/part-000000.parquet, row 0: source is not that of the note given; {OTHER}"
    with pytest.raises(InputError) as caught:
        verify(out, [str(tmp_path / "none.jsonl")])
    assert str(caught.value) == f"{tmp_path}/none.jsonl: no such file or directory"


def test_notes_are_read_as_they_were(tmp_path: Path) -> None:
    """The recorded options say how: columns, encoding, delimiter, quotes, limit, sizes and repeated ids."""
    table = tmp_path / "in.csv"
    table.write_bytes(
        'id;body;ward\nn1;"f\xe9tid fever;x\nn1;fever;y\nn2;fever fever fever;z\nn3;ok;z\n'.encode("latin-1")
    )
    read = ReadOptions(
        "body", "id", "latin-1", ";", quotes=False, keep=("ward",), limit=3, max_note_bytes=14, unique_ids=True
    )
    out = annotate(table, tmp_path / "out", read=read)
    assert [row["reason"] for row in rows_of(out)] == [None, "id is repeated", "note is too large"]
    verify(out, [str(table)])


def rows_of(out: Path) -> list[Row]:
    """All rows of the notes table of a Parquet run."""
    return [row for file in sorted((out / "notes").iterdir()) for row in read(file)]


def test_other_text_files(tmp_path: Path) -> None:
    """Names of text files are known by the tables alone: none may come twice, and their number must fit."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("1", "2", "3", "4"):
        (folder / f"{name}.txt").write_text("fever")
    out = annotate(folder, tmp_path / "out")
    verify(out, [str(folder)])
    (folder / "4.txt").write_bytes(b"\xef\xbb\xbffever")
    assert wrong(out, folder) == (
        f"{out}/manifest.json: the text files given hold the same notes, but are other bytes; {OTHER}"
    )
    for table in ("spans", "notes"):
        change(out / table / "part-000001.parquet", with_values(0, source="2.txt", note_id="2.txt"))
    repair(out)
    assert wrong(out) == f"{out}/notes/part-000001.parquet, row 0: source came before; {AGAIN}"
    for table in ("spans", "notes"):
        change(out / table / "part-000001.parquet", with_values(0, source="5.txt", note_id="5.txt"))
    repair(out)
    assert wrong(out) == (
        f"{out}/notes/part-000001.parquet, row 0: the sources up to here are not the text files that run.json lists; "
        f"{AGAIN}"
    )
    for table in ("spans", "notes"):
        change(out / table / "part-000001.parquet", with_values(0, source="4.txt", note_id="5.txt"))
    repair(out)
    assert wrong(out) == f"{out}/notes/part-000001.parquet, row 0: note_id is not the file's name; {AGAIN}"


def test_text_files_that_changed_places(tmp_path: Path) -> None:
    """Their order is that of ``run.json``; beside a single file none lists their names, so only the notes can tell."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("1", "2"):
        (folder / f"{name}.txt").write_text(f"fever {name}")
    run_directory, single = annotate(folder, tmp_path / "out"), annotate(folder, tmp_path / "single.parquet")
    swap = {"1.txt": "2.txt", "2.txt": "1.txt"}

    def swapped(rows: list[Row]) -> None:
        for row in rows:
            row.update(source=swap[row["source"]], note_id=swap[row["source"]])

    for file in (*run_directory.glob("*/part-*"), single, tmp_path / "single.notes.parquet"):
        change(file, swapped)
    repair(run_directory)
    change_json(
        tmp_path / "single.manifest.json",
        lambda manifest: manifest["files"].update(
            {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in manifest["files"]}
        ),
    )
    said = "row 1: the sources up to here are not the text files that run.json lists"
    assert wrong(run_directory) == f"{run_directory}/notes/part-000000.parquet, {said}; {AGAIN}"
    verify(single)
    said = "row 0: source is not that of the note given"
    assert wrong(single, folder) == f"{tmp_path}/single.notes.parquet, {said}; {OTHER}"


@pytest.mark.parametrize("form", FORMS)
def test_a_limit_that_ends_among_text_files(tmp_path: Path, form: str) -> None:
    """Of those that were not all read no hash of the names is known; of those before them it is."""
    for name in ("a/1.txt", "a/2.txt", "b.jsonl", "c/3.txt", "c/4.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "fever"}' if name == "b.jsonl" else "fever")
    inputs = tuple(str(tmp_path / "in" / name) for name in ("a", "b.jsonl", "c"))
    for limit in (None, 5, 4, 3, 2, 1):
        out = tmp_path / f"out-{limit}"
        read = ReadOptions(limit=limit)
        run(RunOptions(inputs, str(out), model=str(testing.bundle()), quiet=True, form=form, read=read))
        assert verify(out, inputs).startswith(f"{out}: {limit or 5} note")
    for name in ("text_files", "sha256"):
        out = Path(shutil.copytree(tmp_path / "out-3", tmp_path / name))
        change_json(out / "run.json", put(f"inputs.0.{name}", {"text_files": 1, "sha256": "0" * 64}[name]))
        if name == "sha256":
            assert "row 1: the sources up to here are not the text files" in wrong(out)
    out = Path(shutil.copytree(tmp_path / "out-None", tmp_path / "whole"))
    change_json(out / "run.json", put("inputs.0.text_files", 99))
    assert wrong(out) == f"{out}/run.json: inputs are not those of manifest.json; {AGAIN}"


@pytest.mark.parametrize(("row", "values"), [(2, {"note_id": "a"}), (1, {"note_id": "z"})], ids=["again", "first"])
def test_ids_that_are_not_unique(tmp_path: Path, row: int, values: Row) -> None:
    """Where ids had to be, one that came before rejects its note, and no other is rejected for that."""
    notes = write_notes(tmp_path / "notes.jsonl", [{"note_id": name, "text": "no"} for name in ("a", "a", "b")])
    out = annotate(notes, tmp_path / "out", read=ReadOptions(unique_ids=True))
    verify(out, [str(notes)])
    file = out / "notes" / "part-000000.parquet"
    change(file, with_values(row, **values))
    repair(out)
    said = "note_id and options.read.unique_ids contradict reason"
    assert wrong(out) == f"{file}, row {row}: {said}; {AGAIN}"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(tmp_path: Path, go: Go, notes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and a summary on standard output; 1 and one line on standard error; 4 where there is no run."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["verify", *map(str, arguments)])
        return int(caught.value.code or 0), *capfd.readouterr()

    out = go(notes, tmp_path / "out")
    assert call(out, "--notes", notes) == (0, f"{verify(out, [str(notes)])}\n", "")
    file = out / "spans" / "part-000000.parquet"
    change(file, with_values(1, start=21))
    what = "text is not as long as start and end say"
    assert call(out) == (1, "", f"medner: {file}, row 1: {what}; {AGAIN}\n")
    code, output, error = call(tmp_path / "none")
    assert (code, output, error.startswith(f"medner: {tmp_path}/none: no such run")) == (4, "", True)


MARKER = "zq-patient-4711"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_of_a_note_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str, nested: bool) -> None:
    """Whatever value of whatever row is exchanged for a note's text, and however it is found, the text is not shown."""
    folder = tmp_path / "in"
    folder.mkdir()
    line = {"note_id": f"{MARKER}-id", "text": f"fever {MARKER} fever", "ward": f"{MARKER}-ward"}
    write_notes(folder / "notes.jsonl", [line, {"note_id": MARKER, "text": None}])
    whole = annotate(folder, tmp_path / "whole", form=form, nested=nested, read=ReadOptions(keep=("ward",)))
    found = 0
    for table in ("spans", "notes"):
        file = whole / table / f"part-000000.{form}"
        for name in read(file)[0]:
            for value in (MARKER, MARKER + " ", 4711, None, [MARKER], {MARKER: MARKER}):
                out = tmp_path / "out"
                shutil.copytree(whole, out)
                try:
                    change(out / table / file.name, with_values(0, **{name: value}))
                except (pa.ArrowException, TypeError):
                    pass  # Parquet holds no such value in this column
                else:
                    for notes in ([], ["--notes", str(folder)]):
                        with pytest.raises(SystemExit) as caught:
                            cli.main(["verify", str(out), *notes])
                        found += caught.value.code == 1
                shutil.rmtree(out)
    assert found > (50 if form == "jsonl" else 20)
    # A table of the markers alone, a damaged line, an undecodable one, and a column of that name.
    for content in (f'{{"{MARKER}": "{MARKER}"}}\n', f'"{MARKER}"\n', f"{MARKER}\n", f'{{"source": "{MARKER}'):
        out = tmp_path / "out"
        shutil.copytree(whole, out)
        (out / "spans" / f"part-000000.{form}").write_text(content)
        with pytest.raises(SystemExit) as caught:
            cli.main(["verify", str(out)])
        assert caught.value.code == 1
        shutil.rmtree(out)
    if form == "parquet":
        out = tmp_path / "out"
        shutil.copytree(whole, out)
        pq.write_table(pa.table({MARKER: [MARKER]}), out / "notes" / "part-000000.parquet")
        with pytest.raises(SystemExit) as caught:
            cli.main(["verify", str(out)])
        assert caught.value.code == 1
    write_notes(folder / "notes.jsonl", [{**line, "text": f"FEVER {MARKER} fever"}, line])
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", str(whole), "--notes", str(folder)])
    assert caught.value.code == 1
    output, error = capfd.readouterr()
    assert len(error.splitlines()) > found
    assert "internal error" not in error
    assert MARKER not in output + error
