"""Annotated batches -> the two tables on disk, or JSON records on a stream.

A file appears under its final name complete or not at all: it is written to a private temporary file beside it, flushed
to the disk, and renamed.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medner import schema
from medner.errors import InputError, OutputError
from medner.lock import NAME as LOCK
from medner.lock import Claim, Lock

Ints = npt.NDArray[np.int64]

RUN, MANIFEST, FOLDERS = "run.json", "manifest.json", ("spans", "notes")

#: Bytes of ids and kept values after which a row group of spans ends.
GROUP_BYTES = 64 * 2**20

#: Rows of a part that are read at a time.
_READ_ROWS = 1_024

#: What a single output file may end in: the format and pyarrow's name of the compression.
FILE_SUFFIXES = {
    ".parquet": ("parquet", None),
    ".jsonl": ("jsonl", None),
    ".jsonl.gz": ("jsonl", "gzip"),
    ".jsonl.zst": ("jsonl", "zstd"),
}


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What the tables hold.

    text: the mention's text beside its offsets; nested: a row per note; keep: kept columns; text_column: the one that
    was annotated.
    """

    text: bool = True
    nested: bool = False
    keep: tuple[pa.Field, ...] = ()
    text_column: str = "text"

    def spans_schema(self) -> pa.Schema:
        """Schema of the ``spans`` table."""
        make = schema.nested_schema if self.nested else schema.spans_schema
        return make(text=self.text, keep=self.keep)

    def notes_schema(self) -> pa.Schema:
        """Schema of the ``notes`` table."""
        return schema.notes_schema(self.keep)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def spans_table(batch: pa.RecordBatch, options: TableOptions, low: int = 0, high: int | None = None) -> pa.Table:
    """The ``spans`` table of an annotated batch (columns of ``schema.source_schema`` and ``schema.ANNOTATION``).

    low, high: take only the rows of the table between, a span each or, nested, a note.
    """
    return nest(batch[low:high], options) if options.nested else explode(batch, options, low, high)


def explode(
    batch: pa.RecordBatch, options: TableOptions = TableOptions(), low: int = 0, high: int | None = None
) -> pa.Table:
    """A row per span, in input order. low, high: take only the spans between.

    batch: as :meth:`Annotator.stream` gives it, with the columns of :data:`schema.KEY` and those kept. Raises
    :class:`InputError` where it lacks one.
    """
    _check_columns(batch, options)
    lists = batch.column("spans")
    found, parents = pc.list_flatten(lists)[low:high], pc.list_parent_indices(lists)[low:high]
    columns = {name: _taken(batch.column(name), parents) for name in (*schema.KEY.names, *_names(options.keep))}
    columns |= {name: pc.struct_field(found, name) for name in schema.SPAN.names}
    if options.text:
        columns["text"] = _mentions(batch.column(options.text_column), found, parents)
    return _as_table(columns, schema.spans_schema(text=options.text, keep=options.keep))


def nest(batch: pa.RecordBatch, options: TableOptions) -> pa.Table:
    """A row per note with its spans as a list; null for a rejected note. batch, errors: as for :func:`explode`."""
    _check_columns(batch, options)
    lists = batch.column("spans")
    found = pc.list_flatten(lists)
    wanted = schema.nested_schema(text=options.text, keep=options.keep)
    kind = wanted.field("spans").type
    fields = {name: pc.struct_field(found, name) for name in schema.SPAN.names}
    if options.text:
        fields["text"] = _mentions(batch.column(options.text_column), found, pc.list_parent_indices(lists))
    structs = pa.StructArray.from_arrays([fields[f.name] for f in kind.value_type], fields=list(kind.value_type))
    bounds = np.concatenate([[0], np.cumsum(batch.column("n_spans").to_numpy())])
    nested = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), structs, type=kind, mask=lists.is_null())
    columns = {name: batch.column(name) for name in (*schema.KEY.names, *_names(options.keep))}
    return _as_table(columns | {"spans": nested}, wanted)


def _taken(column: pa.Array, rows: pa.Array) -> pa.Array:
    """The values of some rows. Rows cannot be picked out of views, but of what they view."""
    viewed = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(column.type)
    return column.take(rows) if viewed is None else column.cast(viewed).take(rows).cast(column.type)


def _check_columns(batch: pa.RecordBatch, options: TableOptions) -> None:
    texts = [options.text_column] if options.text else []
    needed = [*schema.KEY.names, *_names(options.keep), *texts, "spans", "n_spans"]
    if missing := [name for name in needed if name not in batch.schema.names]:
        raise InputError(f"the batch has no column {missing[0]!r}; needed are {', '.join(needed)}")


def notes_table(batch: pa.RecordBatch, options: TableOptions) -> pa.Table:
    """The ``notes`` table of an annotated batch: a row per input row."""
    wanted = options.notes_schema()
    columns = {name: batch.column(name) for name in wanted.names if name != "status"}
    rejected = batch.column("reason").is_valid()
    return _as_table(columns | {"status": pc.if_else(rejected, "rejected", "annotated")}, wanted)


def _as_table(columns: dict[str, Any], wanted: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays([columns[name] for name in wanted.names], schema=wanted)


def _names(fields: Iterable[pa.Field]) -> list[str]:
    return [field.name for field in fields]


def _mentions(notes: pa.Array, spans: pa.StructArray, parents: pa.Array) -> pa.Array:
    """Text of each span. parents: the note that each lies in, in order."""
    mentions: list[str] = []
    last, text = -1, ""
    for row, start, end in zip(
        parents.to_pylist(), *(spans.field(n).to_pylist() for n in ("start", "end")), strict=True
    ):
        if row != last:
            last, text = row, notes[row].as_py()
        mentions.append(text[start:end])
    return pa.array(mentions, pa.string())


def json_lines(table: pa.Table) -> Iterator[bytes]:
    """The rows of a table as JSON lines; columns of float32, as scores, have the digits that tell such numbers apart.

    Dates, times and decimals of kept columns, inside lists and structs, too, are written as Arrow prints them, and
    binary values in base64.
    """
    for index, name in enumerate(table.column_names):
        column = table.column(name)
        if name in ("score", "spans") or column.type in (pa.float16(), pa.float32()):
            table = table.set_column(index, name, _short_floats(column.combine_chunks()))
        elif (printed := _printed(column.type)) != column.type:
            table = table.set_column(index, name, _cast(column, printed))
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield orjson.dumps(row, default=_base64) + b"\n"


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _cast(column: pa.ChunkedArray, printed: pa.DataType) -> pa.ChunkedArray:
    """The column as :func:`_printed` says; of times in a zone that this system does not know, those of UTC."""
    try:
        return column.cast(printed)
    except pa.ArrowInvalid:
        return column.cast(with_leaves(column.type, _in_utc)).cast(printed)


def _in_utc(kind: pa.DataType) -> pa.DataType:
    return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) and kind.tz else kind


def _printed(kind: pa.DataType) -> pa.DataType:
    """A type with strings in the place of what neither JSON nor Python holds exactly, such as nanoseconds."""
    return with_leaves(
        kind, lambda leaf: pa.string() if pa.types.is_temporal(leaf) or pa.types.is_decimal(leaf) else leaf
    )


def with_leaves(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with others in the place of those that hold values; of dictionaries, their values'."""
    if pa.types.is_dictionary(kind):
        return with_leaves(kind.value_type, change)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(with_leaves(field.type, change)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(with_leaves(kind.key_type, change), with_leaves(kind.item_type, change))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(with_leaves(kind.value_type, change)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(with_leaves(kind.value_type, change)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(with_leaves(kind.value_type, change)), kind.list_size)
    return change(kind)


def json_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table with the values that its JSON lines have."""
    return map(orjson.loads, json_lines(table))


def read_rows(path: Path, columns: Sequence[str], wanted: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a part, Parquet or JSONL, with JSON's values. Raises :class:`OutputError` if it is damaged.

    columns: those that it must have. wanted: those that are needed, if not all; rows may have the others, too.
    """
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                if file.schema_arrow.names != list(columns):
                    raise ValueError("not this table")
                for batch in file.iter_batches(_READ_ROWS, columns=wanted):
                    yield from json_rows(pa.Table.from_batches([batch]))
        else:
            with path.open("rb") as lines:
                yield from _with_columns(map(_json_line, lines), columns)
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise _damaged(path) from exc


def _json_line(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        raise ValueError("cut short")
    return orjson.loads(line)


def _with_columns(rows: Iterable[Any], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict) or list(row) != list(columns):
            raise ValueError("not a row of this table")
        yield row


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path}: damaged or cut short; remove it, and --resume writes it again")


def _short_floats(column: pa.Array) -> pa.Array:
    """Scores, alone or inside lists of spans, as float64 numbers that print as short as float32 ones."""
    if pa.types.is_floating(column.type):
        return column.cast(pa.string()).cast(pa.float64())
    structs = column.values
    names = _names(structs.type)
    arrays = [_short_floats(structs.field(n)) if n == "score" else structs.field(n) for n in names]
    return pa.ListArray.from_arrays(
        column.offsets, pa.StructArray.from_arrays(arrays, names=names), mask=column.is_null()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


class _Draft:
    """A private temporary file, open for writing, beside the path whose name it may take in the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self.file: BinaryIO = os.fdopen(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def close(self) -> None:
        """Bring all that was written to the disk, and give the file the permissions of any other."""
        self.file.flush()
        os.fchmod(self.file.fileno(), 0o666 & ~_umask())
        os.fsync(self.file.fileno())
        self.file.close()

    def sha256(self) -> str:
        """Of the closed file, which nobody else has under its name yet."""
        return _sha256(self._temporary)

    def commit(self) -> None:
        """Give the closed file its name."""
        self._temporary.replace(self.path)
        _sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove the file, unless it was committed."""
        # What cannot be flushed any more, or lies in a directory that is gone, is not wanted anyway.
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A binary file that takes its final name only if the block ends without an error. Raises :class:`OutputError`.

    check: called when all is on the disk; what it raises stops the file from taking its name.
    """
    with _translated(path):
        draft = _Draft(path)
        try:
            yield draft.file
            draft.close()
            check()
            draft.commit()
        finally:
            draft.discard()


@contextlib.contextmanager
def _translated(place: Path | str) -> Iterator[None]:
    """The border where errors of the operating system become :class:`OutputError`; a closed pipe is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OutputError(f"{place}: cannot be written: {exc.strerror or type(exc).__name__}") from exc


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # a file system that cannot do this for directories
            raise
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with _translated(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object that was written by :func:`write_json`, None if there is none, and an empty one if it is damaged."""
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: object, check: Callable[[], None] = lambda: None) -> None:
    """Write a JSON file atomically; check: as in :func:`atomic`."""
    with atomic(path, check) as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str) + b"\n")


class _TableFile:
    """Appends tables of one schema to an open binary file."""

    def __init__(self, file: IO[bytes], wanted: pa.Schema, form: str, compression: str | None) -> None:
        self._parquet = pq.ParquetWriter(file, wanted, compression="zstd") if form == "parquet" else None
        self._lines: Any = file
        self._twin: IO[bytes] | None = None
        if compression:
            # The compressor closes what it writes to, and the caller still has to flush its file to the disk.
            self._twin = os.fdopen(os.dup(file.fileno()), "wb")
            self._lines = pa.CompressedOutputStream(self._twin, compression)

    def write(self, table: pa.Table) -> None:
        if self._parquet is not None:
            # One row group, also for no rows at all: equal input gives equal bytes.
            self._parquet.write_table(table, row_group_size=max(1, table.num_rows))
        else:
            for line in json_lines(table):
                self._lines.write(line)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        elif self._twin is not None:
            self._lines.close()

    def abandon(self) -> None:
        """Let go of the file, whose content is not wanted.

        Or else pyarrow would go on writing when it frees its objects, and complain that the file is closed.
        """
        if self._parquet is not None:
            self._parquet.is_open = False
        if self._twin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._lines.close()
            with contextlib.suppress(OSError):
                self._twin.close()


# ---------------------------------------------------------------------------------------------------------------------
# Sinks


class Sink(abc.ABC):
    """Where a run's parts go. Without an override nothing is recorded beside them, and nothing is kept.

    resumable: what is committed stays after a failure, for a later run to go on with.
    """

    name: str
    resumable = False

    def earlier(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """``run.json`` and ``manifest.json`` of an earlier run that this one continues, each None if there is none."""
        return None, None

    def start(self, run: dict[str, Any]) -> None:  # noqa: B027 - a sink need not
        """Take note of what is being run, before anything else is written."""

    def kept(self, part: int) -> list[dict[str, Any]] | None:  # noqa: ARG002 - for those that override it
        """The ``notes`` rows of a part that an earlier process committed, else None."""
        return None

    def has_every_part(self) -> bool:
        """Whether every file that the earlier run's manifest names is there."""
        return True

    @abc.abstractmethod
    def write(self, part: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Take a part's annotated batches as they come; with the last one the part is complete."""

    def check_end(self) -> None:  # noqa: B027 - a sink need not
        """Raise :class:`OutputError` where there is a part beyond the last one that was kept or written."""

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Complete the output; returns the manifest as it was written."""
        return manifest

    def close(self) -> None:  # noqa: B027 - a sink need not
        """Let go of everything; called once, after an error, too."""


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writes parts of a run directory while its lock is held, in the process that holds it or in others.

    form: ``parquet`` or ``jsonl``. It can be pickled.
    """

    path: Path
    form: str
    options: TableOptions
    claim: Claim

    def file(self, folder: str, part: int) -> Path:
        """Where one of a part's two files lies."""
        return self.path / folder / f"part-{part:06d}.{self.form}"

    def write(self, part: int, batches: Iterable[pa.RecordBatch]) -> dict[str, str]:
        """Write one part: ``spans`` first; its ``notes`` file is the mark that the part is complete.

        Returns the SHA-256 of both by their names in the directory. Raises :class:`OutputError`.
        """
        digests = {}
        for folder, (wanted, tables) in zip(FOLDERS, _tables(batches, self.options), strict=True):
            path, groups = self.file(folder, part), iter(tables)
            first = next(groups)  # which takes most of a part's time, before any file is begun
            self.claim.check()
            with _translated(self.path):
                # A finished run that is short of a part is finished no longer.
                (self.path / MANIFEST).unlink(missing_ok=True)
            with atomic(path, self.claim.check) as file:
                draft = _TableFile(file, wanted, self.form, None)
                try:
                    for table in chain([first], groups):
                        draft.write(table)
                    draft.close()
                except BaseException:
                    draft.abandon()
                    raise
            digests[f"{folder}/{path.name}"] = _sha256(path)
        return digests


class DirectorySink(Sink):
    """A run directory: ``run.json``, a file for each part in ``spans/`` and ``notes/``, and ``manifest.json`` last.

    One run at a time writes it; see :mod:`medner.lock`. parts: what writes them, here or in other processes, which then
    tell by :meth:`committed`.
    """

    resumable = True

    def __init__(
        self,
        path: Path,
        form: str,
        options: TableOptions,
        *,
        overwrite: bool = False,
        resume: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take an absent or empty directory, with ``overwrite`` or ``resume`` an earlier run's, too.

        say: gets a line where another process's lock is waited for. Raises :class:`OutputError`.
        """
        self._path = path
        self._options = options
        self._resume = resume
        self._digests: dict[str, str] = {}
        self._recorded: dict[str, str] = {}
        self._earlier: dict[str, Any] | None = None
        self.name = str(path)
        with _translated(path):
            if path.exists() and not path.is_dir():
                raise OutputError(f"{path}: exists and is no directory; choose another -o")
            if _state(path) is None:
                raise OutputError(f"{path}: not empty, and no run of medner; choose another -o")
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path, say)
            try:
                state = _state(path)
                if state != "no run" and not (overwrite or resume):
                    raise OutputError(f"{path}: holds {state}; choose another -o, or pass --resume or --overwrite")
                _clear(path, _LEFT_OVER if resume else (*_WRITTEN, *_LEFT_OVER))
            except BaseException:
                self._lock.release()
                raise
        self.parts = PartWriter(path, form, options, self._lock.claim)

    def earlier(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """As in :class:`Sink`. Raises :class:`OutputError` where one of them is damaged."""
        if not self._resume:
            return None, None
        with _translated(self._path):
            run, manifest = (_read_json(self._path / name) for name in (RUN, MANIFEST))
            if manifest is None and _is_only_described(self._path, [entry.name for entry in self._path.iterdir()]):
                return None, None
        if run == {}:
            raise OutputError(f"{self._path / RUN}: damaged or cut short; pass --overwrite to run anew")
        if manifest is not None:
            sections = {"model": dict, "inputs": list, "counts": dict, "files": dict, "seconds": float}
            if any(type(manifest.get(name)) is not kind for name, kind in sections.items()):
                raise _damaged(self._path / MANIFEST)
            self._recorded = manifest["files"]
        self._earlier = run
        return run, manifest

    def start(self, run: dict[str, Any]) -> None:
        """Record what is being run, before anything else is written; of a run that is resumed what it reads now."""
        with _translated(self._path):
            same = run == _read_json(self._path / RUN)
        if not same and (self._earlier is None or self._earlier.get("inputs") != run["inputs"]):
            write_json(self._path / RUN, run, self._lock.claim.check)
        with _translated(self._path):
            for folder in FOLDERS:
                (self._path / folder).mkdir(exist_ok=True)
            _sync_directory(self._path)

    def kept(self, part: int) -> list[dict[str, Any]] | None:
        """The ``notes`` rows of a part that is committed, else None. Raises :class:`OutputError` if it is damaged."""
        spans, notes = (self.parts.file(folder, part) for folder in FOLDERS)
        if not (self._resume and spans.is_file() and notes.is_file()):
            return None
        digests = {f"{file.parent.name}/{file.name}": _sha256(file) for file in (spans, notes)}
        for name, digest in digests.items():
            if self._recorded.get(name, digest) != digest:
                raise _damaged(self._path / name)
        rows = list(read_rows(notes, self._options.notes_schema().names))
        if not all(map(_is_note, rows)):
            raise _damaged(notes)
        owners = (_key(row) for row in rows for _ in range(1 if self._options.nested else row["n_spans"]))
        found = map(_key, read_rows(spans, self._options.spans_schema().names, ("source", "row")))
        if any(owner != key for owner, key in zip_longest(owners, found)):
            raise _damaged(spans)
        self._digests |= digests
        return rows

    def has_every_part(self) -> bool:
        """As in :class:`Sink`."""
        return self._recorded.keys() <= self._part_files()

    def write(self, part: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Write one part in this process."""
        self.committed(self.parts.write(part, batches))

    def committed(self, files: Mapping[str, str]) -> None:
        """Take note of a part's files, as :meth:`PartWriter.write` names them."""
        self._digests |= files

    def check_end(self) -> None:
        """As in :class:`Sink`; of such a part a later ``spans`` or ``notes`` file is enough."""
        if beyond := sorted(self._part_files() - self._digests.keys()):
            raise OutputError(
                f"{self._path / beyond[0]}: lies beyond the end of the input, which was longer when it was written; "
                "restore the input, choose another -o, or pass --overwrite"
            )

    def _part_files(self) -> set[str]:
        """Names of all files of parts that lie here, as the manifest names them."""
        return {f"{folder}/{file.name}" for folder in FOLDERS for file in (self._path / folder).glob("part-*")}

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, the mark of a finished run, with every file's SHA-256."""
        manifest = manifest | {"files": dict(sorted(self._digests.items()))}
        write_json(self._path / MANIFEST, manifest, self._lock.claim.check)
        return manifest

    def close(self) -> None:
        """Leave what is committed, and give the directory back."""
        self._lock.release()


_COUNTS = tuple(name for name in schema.ANNOTATION.names if name.startswith("n_"))


def _is_note(row: Mapping[str, Any]) -> bool:
    """Whether what is counted from a row of the ``notes`` table, which may be JSON of any kind, can be."""
    counted = all(type(row[name]) is int and row[name] >= 0 for name in _COUNTS)
    return counted and row["status"] == ("annotated" if row["reason"] is None else "rejected")


def _key(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["source"], row["row"]


def _state(path: Path) -> str | None:
    """What a directory holds: ``a finished run``, ``an unfinished run``, ``no run`` or, as None, something else.

    Hidden files are those of tools, such as a scheduler's, and drafts that a killed process left.
    """
    # In one look: between two of them another process may begin a run.
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if RUN in names and (path / RUN).is_file():
        if MANIFEST in names:
            return "a finished run"
        return "no run" if _is_only_described(path, names) else "an unfinished run"
    return None if {name for name in names if not name.startswith(".")} - {LOCK} else "no run"


#: What a run leaves behind when it is killed, and what it writes. A part's notes file is its mark, so it goes before
#: its spans. The old `run.json` stays until the new one replaces it: a directory that is cleared by half is an
#: unfinished run.
_LEFT_OVER = (*(f".{name}.*.tmp" for name in (LOCK, RUN, MANIFEST)), *(f"{folder}/.part-*.tmp" for folder in FOLDERS))
_WRITTEN = (MANIFEST, "notes/part-*", "spans/part-*")


def has_parts(path: Path) -> bool:
    """Whether a directory holds a part of a run, or its spans alone. Raises OSError where that cannot be seen."""
    for folder in FOLDERS:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path / folder) as entries:
            if any(entry.name.startswith("part-") for entry in entries):
                return True
    return False


def _is_only_described(path: Path, names: Iterable[str]) -> bool:
    """Whether a run wrote no more than its description, such as one that stopped over a wrong option: nothing could be
    lost. names: of all that the directory holds.
    """
    others = {name for name in names if not name.startswith(".")} - {RUN, LOCK, *FOLDERS}
    return (
        not others and not has_parts(path) and {"medner", "model", "options"} <= (_read_json(path / RUN) or {}).keys()
    )


def _clear(path: Path, patterns: Iterable[str]) -> None:
    for file in (file for pattern in patterns for file in path.glob(pattern)):
        file.unlink(missing_ok=True)


class FileSink(Sink):
    """One file of spans, with the notes table and the manifest beside it; all three appear at the end."""

    def __init__(self, path: Path, options: TableOptions, *, overwrite: bool = False) -> None:
        """Raises :class:`OutputError` where a file exists already, then or in the end, and ``overwrite`` is false."""
        suffix = _file_suffix(path)
        if suffix is None:
            raise OutputError(f"{path}: a single output file ends in {', '.join(FILE_SUFFIXES)}")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such directory; create it first")
        *targets, self._manifest = paths(path)
        self._check_free(targets, overwrite=overwrite)
        self.name = str(path)
        self._options = options
        self._overwrite = overwrite
        self._drafts: list[_Draft] = []
        self._files: list[_TableFile] = []
        try:
            with _translated(path):
                for target, wanted in zip(targets, (options.spans_schema(), options.notes_schema()), strict=True):
                    self._drafts.append(_Draft(target))
                    self._files.append(_TableFile(self._drafts[-1].file, wanted, *FILE_SUFFIXES[suffix]))
        except BaseException:
            self.close()
            raise

    def _check_free(self, targets: Iterable[Path], *, overwrite: bool) -> None:
        for existing in (*targets, self._manifest):
            with _translated(existing):
                found = existing.exists()
            if found and not overwrite:
                raise OutputError(f"{existing}: exists already; choose another -o, or pass --overwrite")
        # Files of other suffixes have the same manifest: theirs stays.
        with _translated(self._manifest):
            files = (_read_json(self._manifest) or {}).get("files")
        if isinstance(files, dict) and files.keys() != {schema.printable(target.name) for target in targets}:
            owner = min(files, key=len, default="another program")
            raise OutputError(f"{self._manifest}: belongs to {owner}; choose another -o, or remove it")

    def write(self, part: int, batches: Iterable[pa.RecordBatch]) -> None:  # noqa: ARG002 - the sinks' common call
        """Append one part."""
        with _translated(Path(self.name)):
            for file, (_, tables) in zip(self._files, _tables(batches, self._options), strict=True):
                for table in tables:
                    file.write(table)

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Give the files their names once both are on the disk, and write the manifest, the mark of a finished run."""
        with _translated(Path(self.name)):
            for file, draft in zip(self._files, self._drafts, strict=True):
                file.close()
                draft.close()
            # Again: another run may have finished in the meantime.
            self._check_free([draft.path for draft in self._drafts], overwrite=self._overwrite)
            self._manifest.unlink(missing_ok=True)
            # Before they have their names, under which another run may put its own.
            files = {schema.printable(draft.path.name): draft.sha256() for draft in self._drafts}
            for draft in self._drafts:
                draft.commit()
        manifest = manifest | {"files": files}
        write_json(self._manifest, manifest)
        return manifest

    def close(self) -> None:
        """Remove the temporary files."""
        for file in self._files:
            file.abandon()
        for draft in self._drafts:
            draft.discard()


class StreamSink(Sink):
    """A JSON record for each input row, on a binary stream."""

    name = "-"

    def __init__(self, stream: IO[bytes], options: TableOptions) -> None:
        """Records have ``source, row, note_id, status, reason, spans`` and the kept columns."""
        self._stream = stream
        self._options = options

    def write(self, part: int, batches: Iterable[pa.RecordBatch]) -> None:  # noqa: ARG002 - the sinks' common call
        """Write the rows of each batch at once: whoever reads the stream waits for them, not for parts."""
        names = [*schema.KEY.names, "status", "reason", "spans", *_names(self._options.keep)]
        for batch in batches:
            nested, notes = nest(batch, self._options), notes_table(batch, self._options)
            columns = [(notes if name in ("status", "reason") else nested).column(name) for name in names]
            with _translated("standard output"):
                for line in json_lines(pa.Table.from_arrays(columns, names=names)):
                    self._stream.write(line)
                self._stream.flush()


def _tables(batches: Iterable[pa.RecordBatch], options: TableOptions) -> Iterator[tuple[pa.Schema, Iterable[pa.Table]]]:
    """Both tables of a part, ``spans`` first: the schema, and the row groups, to be taken before the next table is.

    Each batch is made into rows as it comes, so that the notes' text is not held.
    """
    notes = [options.notes_schema().empty_table()]

    def noted() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield batch
            notes.append(notes_table(batch, options))
            # Or else what is freed piece by piece stays with the process, and memory grows over a run.
            pa.default_memory_pool().release_unused()

    yield options.spans_schema(), _groups(noted(), options)
    yield options.notes_schema(), [pa.concat_tables(notes)]


def _groups(batches: Iterable[pa.RecordBatch], options: TableOptions) -> Iterator[pa.Table]:
    """The ``spans`` table in row groups, whose ends depend on the rows alone; one at least.

    Each span has a copy of its note's kept values: a group ends with the one that brings them to :data:`GROUP_BYTES`.
    """
    held, size = [options.spans_schema().empty_table()], 0
    for batch in batches:
        ends = np.cumsum(_copied(batch, options))
        low = 0
        while low < len(ends):
            before = int(ends[low - 1]) if low else 0
            high = min(len(ends), int(np.searchsorted(ends, GROUP_BYTES - size + before)) + 1)
            held.append(spans_table(batch, options, low, high))
            size += int(ends[high - 1]) - before
            low = high
            if size >= GROUP_BYTES:
                yield pa.concat_tables(held)
                held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def _copied(batch: pa.RecordBatch, options: TableOptions) -> Ints:
    """Bytes that each row of the ``spans`` table copies of its note, int64 [n]."""
    sizes = sum(_sizes(batch.column(name)) for name in (*schema.KEY.names, *_names(options.keep)))
    return np.asarray(sizes if options.nested else np.repeat(sizes, batch.column("n_spans").to_numpy()))


def _sizes(column: pa.Array) -> Ints:
    """Bytes of each value, int64 [n]."""
    with contextlib.suppress(ValueError):  # a type whose values differ in size
        return np.full(len(column), -(-column.type.bit_width // 8))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.asarray(pc.fill_null(pc.binary_length(column), 0)).astype(np.int64)
    return np.array([column.slice(row, 1).nbytes for row in range(len(column))], np.int64)


def file_format(path: Path) -> str | None:
    """``parquet`` or ``jsonl`` where an output path names a single file, None where it names a run directory."""
    suffix = _file_suffix(path)
    return None if suffix is None or _is_directory(path) else FILE_SUFFIXES[suffix][0]


def paths(path: Path) -> tuple[Path, ...]:
    """What an output path stands for: the run directory, or the spans file, the notes file and the manifest."""
    suffix = _file_suffix(path)
    if suffix is None or _is_directory(path):
        return (path,)
    stem = path.name[: -len(suffix)]
    return path, path.with_name(f"{stem}.notes{path.name[-len(suffix) :]}"), path.with_name(f"{stem}.manifest.json")


def _is_directory(path: Path) -> bool:
    """False, too, where nobody can tell: a path that is too long, or below what may not be searched."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises there


def _file_suffix(path: Path) -> str | None:
    return next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)
