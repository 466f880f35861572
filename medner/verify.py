"""Is the output of a finished run whole and right? Both tables are read again, against the manifest and the notes.

The output is read a thousand notes at a time, fewer where they have many spans, whatever its size. What a part says is
checked before its hash, so that the first contradiction is the most telling one. A message names a file and the 0-based
row in it, and no value of a table: sources may be ids, and a label that was tampered with may be anything.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medner import decode, schema, sinks, sources
from medner.errors import CheckFailed, InputError, ModelError
from medner.resume import FREE
from medner.run import PART_BYTES

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: Rows of a table that are held at a time, of ``notes`` with their spans; with kept columns, whose values may be long.
_ROWS, _KEPT_ROWS = 1_000, 50
#: Spans of notes that are checked together, unless one has more; bytes of lines that are parsed together, likewise.
_SPANS, _BYTES = 50_000, 2**22
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_REASONS = pa.array(list(map(str, sources.Reason)), pa.string())
_NO_TEXT = schema.text_sha256("")

#: What to do about an output that is wrong, and about notes that are not those of the run.
_AGAIN = "restore the output from a copy, or annotate again with --overwrite"
_OTHER_NOTES = "give --notes what was annotated, or annotate again"


def verify(path: Path, notes: Sequence[str] = (), stdin: BinaryIO | None = None) -> str:
    """Check all that a finished run wrote, and return a summary of one or two lines.

    path: a run directory, or the spans file of a run that wrote a single file. notes: the INPUT arguments of the run,
    to compare every note and span with its text. Raises :class:`CheckFailed` at the first contradiction, and
    :class:`InputError` where there is no run or a file cannot be read.
    """
    run = _open(path)
    given = _Given(notes, run, stdin) if notes else None
    check = _Check(run, given)
    for number in range(len(run.parts)):
        check.part(number)
    check.end()
    return _summary(path, run, compared=given is not None)


def _summary(path: Path, run: _Run, *, compared: bool) -> str:
    counts = run.manifest["counts"]
    parts = f"{counts['parts']:,} part{'s' if counts['parts'] != 1 else ''}"
    return (
        f"{path}: {counts['rows']:,} notes ({counts['rejected']:,} rejected) and {counts['spans']:,} spans in {parts} "
        "are whole and agree with the manifest\n"
    ) + (
        "every note and every span was compared with the notes given"
        if compared
        else "the notes themselves were not read; --notes compares every span with its text"
    )


def _wrong(place: Path | str, what: str, step: str = _AGAIN) -> CheckFailed:
    return CheckFailed(f"{place}: {what}; {step}")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The border where errors of reading a file of the output are translated; their own texts may hold data."""
    try:
        yield
    except FileNotFoundError as exc:
        raise _wrong(path, "is missing") from exc
    except OSError as exc:
        if exc.errno is None:  # pyarrow's own, from a decompressor or the Parquet reader
            raise _wrong(path, "is damaged or cut short") from exc
        raise InputError(f"cannot read {path}: {exc.strerror}") from exc
    except (pa.ArrowException, UnicodeError) as exc:
        raise _wrong(path, "is damaged or cut short") from exc


# ---------------------------------------------------------------------------------------------------------------------
# The run: its manifest and its files


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished run.

    path: of its manifest; parts: the files of spans and of notes, a pair for each part, one pair for a single file;
    part_rows: None for a single file, where the ends of parts are not to be seen. listed: the inputs of its
    ``run.json``, which a single file has not.
    """

    path: Path
    manifest: dict[str, Any]
    parts: tuple[tuple[Path, Path], ...]
    part_rows: int | None
    listed: list[dict[str, Any]]


#: What each row of ``notes`` counts, as ``n_chars`` and so on.
_COUNTED = ("chars", "tokens", "unknown", "windows", "spans")
_SUMS = ("rows", "annotated", "rejected", *_COUNTED)
_COUNTS = (*_SUMS, "parts", "parts_kept", "rows_kept", "windows_inferred", "windows_reused", "windows_kept")
_TEXT, _NUMBER = (str,), (int,)
_DIGEST = re.compile("[0-9a-f]{64}")
_ABSENT = object()

#: The values that a manifest must have, with the types that each may have. Numbers without a point are neither negative
#: nor beyond 63 bits.
_DESCRIPTION = {
    "medner": _TEXT,
    "versions": dict.fromkeys(("onnxruntime", "tokenizers", "sentencex", "pyarrow", "numpy", "python"), _TEXT),
    "model": {
        **dict.fromkeys(("name", "precision", "device", "provider", "instruction_set"), _TEXT),
        "labels": [_TEXT],
        "window": _NUMBER,
        "packed": (bool,),
        "files": {},
    },
    "options": {
        "format": _TEXT,
        "text": (bool,),
        "nested": (bool,),
        "part_rows": _NUMBER,
        "min_score": (int, float),
        "reuse": (bool,),
        "read": {
            "text_column": _TEXT,
            "id_column": (str, type(None)),
            "encoding": _TEXT,
            "delimiter": (str, type(None)),
            "quotes": (bool,),
            "keep": [_TEXT],
            "limit": (int, type(None)),
            "max_note_bytes": _NUMBER,
            "unique_ids": (bool,),
        },
    },
    "inputs": [{}],
}
_MANIFEST = _DESCRIPTION | {"counts": dict.fromkeys(_COUNTS, _NUMBER), "files": {}, "seconds": (float,)}
_TABLE_INPUT = {"source": _TEXT, "bytes": (int, type(None)), "sha256": (str, type(None)), "rows": _NUMBER}
_TEXT_INPUT = {"text_files": _NUMBER, "bytes": _NUMBER, "sha256": _TEXT}


def _open(path: Path) -> _Run:
    """The run at a path, its manifest checked, and its files there, neither too many nor too few."""
    with _translated(path):
        if not path.exists():
            raise InputError(f"{path}: no such run; give the directory or the file that medner annotate wrote")
        is_directory = path.is_dir()
        if not is_directory and sinks.file_format(path) is None:
            raise InputError(f"{path}: no run directory, and no file ending in {', '.join(sinks.FILE_SUFFIXES)}")
        manifest_path = path / sinks.MANIFEST if is_directory else sinks.paths(path)[-1]
        finished, begun = manifest_path.is_file(), is_directory and (path / sinks.RUN).is_file()
    if not finished and begun:
        raise CheckFailed(f"{path}: holds an unfinished run; finish it with medner annotate --resume")
    if not finished:
        raise InputError(f"{path}: no finished run of medner; {manifest_path} is missing")
    manifest = _load(manifest_path, _MANIFEST)
    _check_manifest(manifest_path, manifest, manifest["counts"]["parts"] if is_directory else 1)
    form = manifest["options"]["format"]
    listed: list[dict[str, Any]] = []
    if is_directory:
        listed = _check_description(path / sinks.RUN, manifest)
        parts = _parts(path, form, manifest["counts"]["parts"])
    elif form != sinks.file_format(path):
        raise _wrong(manifest_path, f"options.format is not {sinks.file_format(path)}, the format of {path}")
    else:
        parts = ((path, sinks.paths(path)[1]),)
    run = _Run(manifest_path, manifest, parts, manifest["options"]["part_rows"] if is_directory else None, listed)
    if manifest["files"].keys() != {_name(run, file) for pair in parts for file in pair}:
        if not is_directory:
            named, name = min(manifest["files"], key=len, default=""), schema.printable(path.name)
            raise _wrong(manifest_path, f"files names {named}, not {name}; was it written under that name?")
        raise _wrong(manifest_path, "files does not name the files of both tables")
    return run


def _name(run: _Run, file: Path) -> str:
    """What the manifest calls a file of the output."""
    return schema.printable(file.relative_to(run.path.parent).as_posix())


def _load(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file whose values are of a shape."""
    with _translated(path):
        content = path.read_bytes()
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as exc:
        raise _wrong(path, "is no JSON") from exc
    misfit = _misfit(value, shape)
    if misfit is not None:
        raise _wrong(path, f"{misfit or 'its content'} is missing or of a wrong type")
    return cast(dict[str, Any], value)


def _misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """The dotted name of the first value that is absent or not of its shape; None if all are right."""
    if isinstance(shape, tuple):
        # Not `isinstance`, for which True is an integer.
        return None if type(value) in shape and not (type(value) is int and not 0 <= value < 2**63) else name
    if type(value) is not type(shape):
        return name
    inner = (
        [(f"{name}.{key}".lstrip("."), value.get(key, _ABSENT), below) for key, below in shape.items()]
        if isinstance(value, dict)
        else [(name, item, shape[0]) for item in value]
    )
    return next((bad for where, item, below in inner if (bad := _misfit(item, below, where)) is not None), None)


def _check_manifest(path: Path, manifest: dict[str, Any], pairs: int) -> None:
    """What a manifest says twice must agree. pairs: of a file of spans and one of notes, that there must be."""
    options, counts, inputs = manifest["options"], manifest["counts"], manifest["inputs"]
    if options["format"] not in ("parquet", "jsonl"):
        raise _wrong(path, "options.format is neither parquet nor jsonl")
    for record in inputs:
        if _misfit(record, _TEXT_INPUT if "text_files" in record else _TABLE_INPUT) is not None:
            raise _wrong(path, "an entry of inputs is incomplete or of wrong types")
        if not _is_digest(record["sha256"]) and (record["sha256"] is not None or options["read"]["limit"] is None):
            raise _wrong(path, "sha256 of an entry of inputs is none")
    read = sum(map(_rows_read, inputs))
    windows = sum(counts[f"windows_{how}"] for how in ("inferred", "reused", "kept"))
    for name, what, total in (
        ("rows", "the rows of inputs", read),
        ("rows", "annotated and rejected ones", counts["annotated"] + counts["rejected"]),
        ("windows", "inferred, reused and kept ones", windows),
    ):
        if counts[name] != total:
            raise _wrong(path, f"counts.{name} is {counts[name]}, but {what} add up to {total}")
    for what, holds in (
        ("counts.rows is above options.read.limit", counts["rows"] <= _most(options["read"]["limit"])),
        ("counts.rows_kept is above counts.rows", counts["rows_kept"] <= counts["rows"]),
        ("counts.parts_kept is above counts.parts", counts["parts_kept"] <= counts["parts"]),
        ("counts.windows_reused is not 0 without options.reuse", options["reuse"] or not counts["windows_reused"]),
        ("model.files is empty", bool(manifest["model"]["files"])),
        ("model.files holds what is no SHA-256", all(map(_is_digest, manifest["model"]["files"].values()))),
        ("model.window is none", 0 < manifest["model"]["window"] < 2**31),
        ("options.min_score is not between 0 and 1", 0 <= options["min_score"] <= 1),
    ):
        if not holds:
            raise _wrong(path, what)
    # The last part may be shorter, and a run without a row has one part.
    fewest, most = -(-counts["rows"] // max(options["part_rows"], 1)), counts["rows"]
    if not max(fewest, 1) <= counts["parts"] <= max(most, 1):
        raise _wrong(path, f"counts.parts is {counts['parts']}, which cannot hold {counts['rows']} rows")
    if len(manifest["files"]) != 2 * pairs:
        raise _wrong(path, f"files lists {len(manifest['files'])} files, not {2 * pairs}")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _most(limit: int | None) -> float:
    return math.inf if limit is None else limit


def _rows_read(record: Mapping[str, Any]) -> int:
    """Rows that came from an entry of ``inputs``; a text file is one."""
    return int(record["text_files"] if "text_files" in record else record["rows"])


def _check_description(path: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """``run.json`` must describe the run that the manifest describes; what a resumed run may change is free.

    Gives its inputs.
    """
    run = _load(path, _DESCRIPTION)
    begun, ended = _described(run), _described(manifest)
    for name in dict.fromkeys([*begun, *ended]):
        if name not in FREE and (name not in begun or name not in ended or begun[name] != ended[name]):
            raise _wrong(path, f"{name} is not that of {sinks.MANIFEST}")
    # The limit may have ended the run before the last of what was to be read.
    to_read, read = run["inputs"], manifest["inputs"]
    whole = manifest["options"]["read"]["limit"] is None
    fits = len(to_read) == len(read) if whole else len(to_read) >= len(read)
    if not fits or not all(_is_input(*pair, whole=whole) for pair in zip(to_read, read, strict=False)):
        raise _wrong(path, f"inputs are not those of {sinks.MANIFEST}")
    return cast(list[dict[str, Any]], to_read)


def _is_input(to_read: Mapping[str, Any], read: Mapping[str, Any], *, whole: bool) -> bool:
    """Whether an entry of ``inputs`` before a run can be one after it; of a stream no size is known.

    whole: no limit can have ended the run before the last of text files.
    """
    as_many = to_read.get("text_files") == read.get("text_files")
    unknown = None in (to_read.get("bytes"), read["bytes"]) or not as_many
    names = ("text_files" in to_read, to_read.get("source")) == ("text_files" in read, read.get("source"))
    return names and (as_many or not whole) and (unknown or to_read["bytes"] == read["bytes"])


def _described(record: dict[str, Any]) -> dict[str, Any]:
    sections = ("versions", "model", "options")
    named = {f"{section}.{key}": value for section in sections for key, value in record[section].items()}
    return {"medner": record["medner"], **named}


def _parts(path: Path, form: str, count: int) -> tuple[tuple[Path, Path], ...]:
    """The files of a run directory's parts; none may be missing, and nothing else may lie among them."""
    names = [f"part-{number:06d}.{form}" for number in range(count)]
    for folder in sinks.FOLDERS:
        with _translated(path / folder):
            # Hidden are the draft of a writer that was killed, and what a file browser leaves: neither is a part.
            found = {file.name for file in (path / folder).iterdir() if not file.name.startswith(".")}
        if missing := sorted(set(names) - found):
            step = "medner annotate --resume writes it again"
            raise _wrong(path / folder / missing[0], f"is missing; the run has {count} parts", step)
        if unknown := sorted(found - set(names)):
            raise _wrong(path / folder / unknown[0], f"is none of the run's {count} parts", "move it away")
    return tuple((path / "spans" / name, path / "notes" / name) for name in names)


def _table_options(run: _Run) -> sinks.TableOptions:
    """How the tables must look. Kept columns have the types of the first ``notes`` file, or are JSON values as text."""
    options = run.manifest["options"]
    keep, notes = options["read"]["keep"], run.parts[0][1]
    if options["format"] == "jsonl" or not keep:
        kept = [pa.field(name, pa.string(), nullable=False) for name in keep]
    else:
        with _translated(notes), notes.open("rb") as file:
            found = pq.read_schema(file)
        for name in keep:
            if found.get_field_index(name) < 0:
                raise _wrong(notes, f"has no column {name}, which --keep names")
        kept = [found.field(name) for name in keep]
    return sinks.TableOptions(options["text"], options["nested"], tuple(kept))


def _entity_types(run: _Run) -> tuple[str, ...]:
    """The labels that a span may have."""
    try:
        return decode.tag_set(tuple(run.manifest["model"]["labels"])).types
    except ModelError as exc:
        raise _wrong(run.path, "model.labels are of no scheme that is known") from exc


def _check_hash(run: _Run, file: Path) -> None:
    with _translated(file), file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != run.manifest["files"][_name(run, file)]:
        raise _wrong(file, f"its SHA-256 is not the one in {run.path.name}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one file, or spans out of them. numbers: the row of the file that each is or stands in, int64 [n]."""

    path: Path
    batch: pa.RecordBatch
    numbers: Ints

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def column(self, name: str) -> pa.Array:
        """One column."""
        return self.batch.column(name)

    def ints(self, name: str) -> Ints:
        """One column of integers without nulls, int64 [n]."""
        return cast(Ints, self.column(name).to_numpy().astype(np.int64))

    def slice(self, low: int, high: int) -> _Rows:
        """The rows from ``low`` to before ``high``."""
        return _Rows(self.path, self.batch.slice(low, high - low), self.numbers[low:high])

    def wrong(self, index: int, what: str, step: str = _AGAIN) -> CheckFailed:
        """The error that names a row."""
        return _wrong(f"{self.path}, row {self.numbers[index]}", what, step)

    def require(self, right: Bools, what: str, step: str = _AGAIN) -> None:
        """Raise for the first row that is not right; bool [n]."""
        if not right.all():
            raise self.wrong(int(np.argmin(right)), what, step)


class _Stream:
    """Rows of one file, as many at a time as are wanted, wherever its batches are cut."""

    def __init__(self, path: Path, batches: Iterable[pa.RecordBatch], columns: pa.Schema) -> None:
        self.path = path
        self._batches = iter(batches)
        self.columns = columns
        self._held = self.empty = pa.RecordBatch.from_pylist([], columns)
        #: Rows given out so far.
        self.taken = 0

    def pieces(self, count: int) -> Iterator[pa.RecordBatch]:
        """The next ``count`` rows, fewer at the end, in pieces of the batches."""
        while count:
            while self._held.num_rows == 0:
                batch = next(self._batches, None)
                if batch is None:
                    return
                self._held = batch
            piece = self._held.slice(0, count)
            self._held = self._held.slice(piece.num_rows)
            self.taken += piece.num_rows
            count -= piece.num_rows
            yield piece

    def take(self, count: int) -> _Rows:
        """The next ``count`` rows, fewer at the end, as one batch."""
        first = self.taken
        batch = pa.concat_batches([self.empty, *self.pieces(count)])
        return _Rows(self.path, batch, np.arange(first, self.taken))


@dataclass(frozen=True, slots=True)
class _Annotated:
    """Notes, and a row for each of their spans (``start end [text] label score``).

    parents: the note that each span lies in, int64 [n].
    """

    notes: _Rows
    spans: _Rows
    parents: Ints


def _annotated(notes: _Rows, stream: _Stream, tables: sinks.TableOptions) -> _Annotated:
    """Notes with their spans, which come next in the stream of the spans file and must be theirs."""
    parents = np.repeat(np.arange(len(notes)), notes.ints("n_spans"))
    owners = np.arange(len(notes)) if tables.nested else parents
    first = stream.taken
    copied = [*schema.KEY.names, *(field.name for field in tables.keep)]
    own = [name for name in stream.columns.names if name not in copied]
    pieces = [stream.empty.select(own)]
    for piece in stream.pieces(len(owners)):
        before = stream.taken - first - piece.num_rows
        rows = _Rows(stream.path, piece, np.arange(first + before, stream.taken))
        owned = notes.batch.take(pa.array(owners[before : before + len(rows)], pa.int64()))
        for name in copied:
            right = _same(rows.column(name), owned.column(name))
            rows.require(right, f"{name} is not that of the note whose turn it is in {notes.path}")
        pieces.append(piece.select(own))
    found = _Rows(stream.path, pa.concat_batches(pieces), np.arange(first, stream.taken))
    if len(found) < len(owners):
        raise notes.wrong(int(owners[len(found)]), f"its spans are not all in {stream.path}")
    return _Annotated(notes, _unnested(found, notes, parents) if tables.nested else found, parents)


def _unnested(nested: _Rows, notes: _Rows, parents: Ints) -> _Rows:
    """A row for each span of a nested table, which has a row for each note."""
    lists = nested.column("spans")
    rejected = notes.column("reason").is_valid()
    nested.require(
        _bools(pc.equal(lists.is_null(), rejected)), "spans is null where a note was annotated, or not null elsewhere"
    )
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    nested.require(lengths == notes.ints("n_spans"), f"holds another number of spans than n_spans in {notes.path} says")
    return _Rows(nested.path, pa.RecordBatch.from_struct_array(pc.list_flatten(lists)), nested.numbers[parents])


def _same(column: pa.Array, other: pa.Array) -> Bools:
    """Where two columns hold the same values; bool [n]."""
    if column.equals(other):
        return np.ones(len(column), np.bool_)
    # In JSON NaN equals itself, and so does the same value in dictionaries of another order.
    texts = (_as_json(_told_apart(each)) for each in (column, other))
    return np.array([x == y for x, y in zip(*texts, strict=True)], np.bool_)


def _told_apart(column: pa.Array) -> pa.ChunkedArray:
    """A column with text in the place of floating-point numbers, of which JSON has neither infinite ones nor NaN."""
    kind = sinks.with_leaves(column.type, lambda leaf: pa.string() if pa.types.is_floating(leaf) else leaf)
    chunked = pa.chunked_array([column])
    return chunked if kind == column.type else chunked.cast(kind)


def _as_json(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """Each value as the JSON text that stands in a JSONL output."""
    lines = sinks.json_lines(pa.table({"value": column}))
    return [orjson.dumps(orjson.loads(line)["value"]).decode() for line in lines]


def _bools(column: pa.Array) -> Bools:
    """A column of truth values as bool [n]; null is false."""
    return cast(Bools, pc.fill_null(column, False).to_numpy(zero_copy_only=False))


# ---------------------------------------------------------------------------------------------------------------------
# Reading the tables


def _read(path: Path, columns: pa.Schema, keep: Sequence[pa.Field]) -> Iterator[pa.RecordBatch]:
    """Rows of one file, which must have exactly these columns, in batches."""
    with _translated(path), path.open("rb") as file:
        most = _KEPT_ROWS if keep else _ROWS
        if path.name.lower().endswith(".parquet"):  # which may be the whole name
            yield from _read_parquet(path, file, columns, most)
        else:
            yield from _read_jsonl(path, file, columns, [field.name for field in keep], most)


def _read_parquet(path: Path, file: BinaryIO, columns: pa.Schema, most: int) -> Iterator[pa.RecordBatch]:
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    found = parquet.schema_arrow
    for number, field in enumerate(columns):
        if number == len(found) or not found.field(number).equals(field):
            null = "" if field.nullable else " not null"
            raise _wrong(path, f"column {number} is not {field.name} ({field.type}{null})")
    if len(found) > len(columns):
        raise _wrong(path, f"has {len(found)} columns, not the {len(columns)} of its table")
    if (found.metadata or {}).get(b"medner.schema_version") != schema.SCHEMA_VERSION.encode():
        raise _wrong(path, f"its medner.schema_version is not {schema.SCHEMA_VERSION}")
    for batch in parquet.iter_batches(min(most, sources.batch_rows(parquet.metadata)), use_threads=False):
        batch.validate(full=True)  # reading alone does not look whether text is UTF-8
        yield batch


def _read_jsonl(
    path: Path, file: BinaryIO, columns: pa.Schema, keep: Sequence[str], most: int
) -> Iterator[pa.RecordBatch]:
    """Batches of the lines' values; those of kept columns as JSON text, since JSON does not say their types."""
    accepts = {field.name: _accepts(field) for field in columns}
    kind = pa.struct(list(columns))
    codec = _COMPRESSIONS.get(path.suffix.lower())
    lines = io.BufferedReader(pa.CompressedInputStream(file, codec)) if codec else file
    rows, size = [], 0
    for number, line in enumerate(lines):
        row, what = _json_row(line, accepts, keep)
        if what is not None:
            raise _wrong(f"{path}, row {number}", what)
        rows.append(row)
        size += len(line)
        if len(rows) == most or size >= _BYTES:
            yield pa.RecordBatch.from_struct_array(pa.array(rows, kind))
            rows, size = [], 0
    yield pa.RecordBatch.from_struct_array(pa.array(rows, kind))


def _json_row(
    line: bytes, accepts: Mapping[str, Callable[[Any], bool]], keep: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """The values of a line, and what is wrong with them, if anything."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}, "is no JSON"
    if not line.endswith(b"\n"):
        return {}, "is cut short"
    if type(row) is not dict or list(row) != list(accepts):
        return {}, f"is no object of {', '.join(accepts)}, in this order"
    try:
        written = orjson.dumps(row) + b"\n" == line
    except orjson.JSONEncodeError:  # nested too deeply
        written = False
    if not written:  # such as a name that stands twice, of which one reader takes the first and another the last
        return {}, "is not written as medner writes it"
    for name in keep:
        row[name] = orjson.dumps(row[name]).decode()
    wrong = next((name for name, accept in accepts.items() if not accept(row[name])), None)
    return row, f"{wrong} is not of its type" if wrong is not None else None


def _accepts(field: pa.Field) -> Callable[[Any], bool]:
    """Tells whether a JSON value is one that a column holds."""
    kind, nullable = field.type, field.nullable
    if pa.types.is_list(kind):
        item = _accepts(kind.value_field)
        return lambda value: all(map(item, value)) if type(value) is list else nullable and value is None
    if pa.types.is_struct(kind):
        inner = {below.name: _accepts(below) for below in kind}
        names = list(inner)
        return lambda value: (
            type(value) is dict and list(value) == names and all(inner[name](value[name]) for name in names)
        )
    if pa.types.is_integer(kind):
        above = 2 ** (kind.bit_width - 1)
        return lambda value: type(value) is int and -above <= value < above
    wanted = float if pa.types.is_floating(kind) else str
    return lambda value: type(value) is wanted or (nullable and value is None)


# ---------------------------------------------------------------------------------------------------------------------
# What the tables say


def _check_notes(notes: _Rows, window: int, max_note_bytes: int) -> None:
    """Each row of the ``notes`` table must be consistent in itself. window: tokens that one holds at most."""
    status, reason, digest = (notes.column(name) for name in ("status", "reason", "text_sha256"))
    annotated, rejected = _bools(pc.equal(status, "annotated")), _bools(pc.equal(status, "rejected"))
    notes.require(annotated | rejected, "status is neither annotated nor rejected")
    notes.require(_bools(reason.is_valid()) == rejected, "status and reason contradict each other")
    notes.require(annotated | _bools(pc.is_in(reason, _REASONS)), "reason is none that medner gives")
    notes.require(_bools(notes.column("note_id").is_valid()), "note_id is null")
    chars, tokens, unknown, windows, spans = counts = [notes.ints(f"n_{name}") for name in _COUNTED]
    for name, count in zip(_COUNTED, counts, strict=True):
        notes.require(count >= 0, f"n_{name} is negative")
        notes.require(annotated | (count == 0), f"is rejected, but n_{name} is not 0")
    notes.require(annotated | _bools(digest.is_null()), "is rejected, but has a text_sha256")
    is_digest = _bools(pc.match_substring_regex(digest, "^[0-9a-f]{64}$"))
    notes.require(rejected | is_digest, "text_sha256 is not 64 hexadecimal digits")
    notes.require(rejected | ((chars == 0) == _bools(pc.equal(digest, _NO_TEXT))), "n_chars contradicts text_sha256")
    notes.require(chars <= max_note_bytes, "n_chars is more than max_note_bytes allows")
    notes.require(unknown <= tokens, "n_unknown is above n_tokens")
    notes.require(((windows > 0) == (tokens > 0)) & (windows <= tokens), "n_windows contradicts n_tokens")
    notes.require(tokens <= windows * window, "n_tokens is more than n_windows windows hold")
    # Spans do not overlap, and each has a character and a token at least.
    notes.require((spans <= tokens) & (spans <= chars), "n_spans is above n_tokens or n_chars")


class _Keys:
    """The source and the row of each note, which follow from the manifest's ``inputs``; names of text files do not.

    Of those ``run.json`` has a hash. listed: its inputs.
    """

    def __init__(self, inputs: Sequence[Mapping[str, Any]], listed: Sequence[Mapping[str, Any]]) -> None:
        counts = np.array([_rows_read(record) for record in inputs], np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._sources = pa.array([record.get("source") for record in inputs], pa.string())
        self._seen = set(self._sources.drop_null().to_pylist())
        self._named = {
            number: before.get("sha256")
            for number, (record, before) in enumerate(zip(inputs, listed, strict=False))
            if "text_files" in record and record["text_files"] == before.get("text_files")
        }
        self._names = hashlib.sha256()

    def check(self, notes: _Rows, first: int) -> None:
        """Check rows of the ``notes`` table; first: how many there were before them in the whole run."""
        number = np.arange(first, first + len(notes))
        record = np.searchsorted(self._ends, number, side="right")
        notes.require(record < len(self._ends), "comes after the last row of the manifest's inputs")
        wanted = self._sources.take(pa.array(record))
        is_text = _bools(wanted.is_null())
        source = notes.column("source")
        notes.require(is_text | _bools(pc.equal(source, wanted)), "source is not the input whose turn it is")
        notes.require(
            notes.ints("row") == np.where(is_text, 0, number - self._starts[record]),
            "row is not the next one of its source: a row is missing, repeated or misplaced",
        )
        notes.require(~is_text | _bools(pc.equal(source, notes.column("note_id"))), "note_id is not the file's name")
        for index in np.flatnonzero(is_text).tolist():
            name, turn = source[index].as_py(), int(record[index])
            if name in self._seen:
                raise notes.wrong(index, "source came before")
            self._seen.add(name)
            if number[index] == self._starts[turn]:
                self._names = hashlib.sha256()
            self._names.update(f"{name}\n".encode())
            is_last = number[index] == self._ends[turn] - 1
            if is_last and turn in self._named and self._named[turn] != self._names.hexdigest():
                raise notes.wrong(index, f"the sources up to here are not the text files that {sinks.RUN} lists")


def _check_unique(notes: _Rows, seen: set[str]) -> None:
    """Where ids are unique, a note whose id came before is rejected, and none for this reason whose did not."""
    ids, reasons = (notes.column(name).to_pylist() for name in ("note_id", "reason"))
    for index, (name, reason) in enumerate(zip(ids, reasons, strict=True)):
        repeated = name in seen
        if (repeated and reason is None) or (not repeated and reason == sources.Reason.REPEATED_ID):
            raise notes.wrong(index, "note_id and options.read.unique_ids contradict reason")
        seen.add(name)


def _groups(notes: _Rows) -> Iterator[_Rows]:
    """Some notes, few enough at a time that their spans can be held."""
    ends, low = np.cumsum(notes.ints("n_spans")), 0
    while low < len(notes):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _SPANS, side="right")))
        yield notes.slice(low, high)
        low = high


def _check_spans(annotated: _Annotated, types: pa.Array, min_score: float) -> None:
    """Spans must lie in their notes, in order, and be ones that the model can give."""
    spans, parents = annotated.spans, annotated.parents
    start, end = spans.ints("start"), spans.ints("end")
    spans.require((start >= 0) & (start < end), "start and end are no range of characters")
    spans.require(end <= annotated.notes.ints("n_chars")[parents], "end lies beyond the note")
    first_of_note = np.ones(len(spans), np.bool_)
    first_of_note[1:] = parents[1:] != parents[:-1]
    spans.require(first_of_note | (start >= np.roll(end, 1)), "lies before the end of the span before it")
    if "text" in spans.batch.schema.names:
        lengths = pc.utf8_length(spans.column("text")).to_numpy()
        spans.require(lengths == end - start, "text is not as long as start and end say")
        mentions = spans.column("text").to_pylist()
        spans.require(_are_mentions(mentions), "text begins or ends in white space")
    spans.require(_bools(pc.is_in(spans.column("label"), types)), "label is none of the model's")
    score = spans.column("score").to_numpy()
    spans.require((score >= min_score) & (score <= 1), f"score is not between {min_score:g} and 1")


def _are_mentions(texts: Iterable[str]) -> Bools:
    """Where a text is not empty and neither begins nor ends in white space; bool [n]."""
    return np.array([text == text.strip() != "" for text in texts], np.bool_)


def _check_not_full(notes: _Rows, chars: int, part_rows: int) -> None:
    """A part takes no row once it is full; chars: of its rows before these. A character is a byte at least."""
    notes.require(notes.numbers < part_rows, f"is beyond the {part_rows} rows of a part")
    sizes = notes.ints("n_chars")
    notes.require(chars + np.cumsum(sizes) - sizes < PART_BYTES, "belongs to another part: this one is full before it")


def _check_full(path: Path, counts: Counter[str], part_rows: int) -> None:
    """A part that is not the last one ends only when it is full. A character is four bytes at most."""
    if counts["rows"] < part_rows and 4 * counts["chars"] < PART_BYTES:
        raise _wrong(path, f"ends after {counts['rows']} rows, before the part is full: its last rows are missing")


def _counts(notes: _Rows) -> dict[str, int]:
    """What the manifest counts, of some rows of the ``notes`` table."""
    rejected = len(notes) - notes.column("reason").null_count
    sums = {name: int(notes.ints(f"n_{name}").sum()) for name in _COUNTED}
    return {"rows": len(notes), "annotated": len(notes) - rejected, "rejected": rejected, **sums}


class _Check:
    """Checks the parts of a run one after another, and counts what they hold."""

    def __init__(self, run: _Run, given: _Given | None) -> None:
        self._run = run
        self._given = given
        self._tables = _table_options(run)
        self._types = pa.array(_entity_types(run), pa.string())
        self._keys = _Keys(run.manifest["inputs"], run.listed)
        self._ids: set[str] | None = set() if run.manifest["options"]["read"]["unique_ids"] else None
        self._counts: Counter[str] = Counter()

    def part(self, number: int) -> None:
        """The next part: its notes, their spans, its end, and last the hashes of both files."""
        run, tables = self._run, self._tables
        spans_path, notes_path = run.parts[number]
        spans, notes = (
            _Stream(path, _read(path, columns, tables.keep), columns)
            for path, columns in ((spans_path, tables.spans_schema()), (notes_path, tables.notes_schema()))
        )
        counts: Counter[str] = Counter()
        while len(rows := notes.take(_KEPT_ROWS if tables.keep else _ROWS)):
            _check_notes(rows, run.manifest["model"]["window"], run.manifest["options"]["read"]["max_note_bytes"])
            self._keys.check(rows, self._counts["rows"] + counts["rows"])
            if self._ids is not None:
                _check_unique(rows, self._ids)
            if run.part_rows is not None:
                _check_not_full(rows, counts["chars"], run.part_rows)
            for few in _groups(rows):
                annotated = _annotated(few, spans, tables)
                _check_spans(annotated, self._types, run.manifest["options"]["min_score"])
                if self._given is not None:
                    self._given.check(annotated)
            counts.update(_counts(rows))
        if len(more := spans.take(1)):
            raise more.wrong(0, f"belongs to no note of {notes_path}")
        self._counts.update(counts)
        if run.part_rows is not None and number + 1 < len(run.parts):
            _check_full(notes_path, counts, run.part_rows)
        elif counts["rows"] == 0 and self._counts["rows"]:
            raise _wrong(notes_path, "is empty")
        for path in (spans_path, notes_path):
            _check_hash(run, path)

    def end(self) -> None:
        """The sums over all parts must be the manifest's, and there must be no more notes."""
        for name in _SUMS:
            if self._counts[name] != (said := self._run.manifest["counts"][name]):
                raise _wrong(self._run.path, f"counts.{name} is {said}, but the tables hold {self._counts[name]}")
        if self._given is not None:
            self._given.check_end()


# ---------------------------------------------------------------------------------------------------------------------
# The notes themselves


class _Given:
    """The notes that were annotated, read again with the options that the manifest records."""

    def __init__(self, inputs: Sequence[str], run: _Run, stdin: BinaryIO | None) -> None:
        self._run = run
        recorded = run.manifest["options"]["read"]
        options = {field.name: recorded[field.name] for field in fields(sources.ReadOptions)}
        self._keep = options["keep"] = tuple(recorded["keep"])
        self._reader = sources.Reader(sources.discover(inputs).files, sources.ReadOptions(**options), stdin)
        self._stream = _Stream(run.path, self._reader.batches(), self._reader.schema)
        self._as_json = run.manifest["options"]["format"] == "jsonl"

    def check(self, annotated: _Annotated) -> None:
        """Compare the next notes, piece by piece, since a thousand of them may be large."""
        notes, parents, low = annotated.notes, annotated.parents, 0
        for piece in self._stream.pieces(len(notes)):
            high = low + piece.num_rows
            texts = piece.column("text").to_pylist()
            for name, column in self._columns(piece, texts).items():
                right = _same(notes.column(name).slice(low, len(texts)), column)
                notes.slice(low, high).require(right, f"{name} is not that of the note given", _OTHER_NOTES)
            begin, stop = np.searchsorted(parents, [low, high]).tolist()
            _check_mentions(annotated.spans.slice(begin, stop), [texts[note - low] for note in parents[begin:stop]])
            low = high
        if low < len(notes):
            raise notes.wrong(low, "the notes given end before it", _OTHER_NOTES)

    def _columns(self, piece: pa.RecordBatch, texts: Sequence[str | None]) -> dict[str, pa.Array]:
        """What the ``notes`` table must hold of some notes."""
        columns = {name: piece.column(name) for name in (*schema.KEY.names, "reason")}
        columns["n_chars"] = pa.array([len(text or "") for text in texts], pa.int32())
        digests = (None if text is None else schema.text_sha256(text) for text in texts)
        columns["text_sha256"] = pa.array(digests, pa.string())
        for name in self._keep:
            kept = piece.column(name)
            columns[name] = pa.array(_as_json(kept), pa.string()) if self._as_json else kept
        return columns

    def check_end(self) -> None:
        """There must be no more notes, and the files must be those that were read, byte for byte."""
        if next(self._stream.pieces(1), None) is not None:
            raise _wrong(self._run.path, f"the notes given go on after its {self._stream.taken - 1} rows", _OTHER_NOTES)
        for said, found in zip_longest(self._run.manifest["inputs"], self._reader.inputs()):
            if said != found:
                name = (said or found).get("source", "the text files")
                raise _wrong(self._run.path, f"{name} given hold the same notes, but are other bytes", _OTHER_NOTES)


def _check_mentions(spans: _Rows, texts: Sequence[str]) -> None:
    """Each span must be a mention in its note; texts: the note of each span."""
    bounds = zip(texts, spans.column("start").to_pylist(), spans.column("end").to_pylist(), strict=True)
    mentions = [text[start:end] for text, start, end in bounds]
    if "text" in spans.batch.schema.names:
        spans.require(_same(spans.column("text"), pa.array(mentions, pa.string())), "text is not the note's")
    spans.require(_are_mentions(mentions), "begins or ends in white space")
