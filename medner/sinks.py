"""Annotated batches -> the two tables on disk, or JSON records on a stream.

A file appears under its final name complete or not at all: it is written to a private temporary file beside it, flushed
to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medner import schema
from medner.errors import OutputError

RUN, MANIFEST = "run.json", "manifest.json"

#: What a single output file may end in: the format and pyarrow's name of the compression.
FILE_SUFFIXES = {
    ".parquet": ("parquet", None),
    ".jsonl": ("jsonl", None),
    ".jsonl.gz": ("jsonl", "gzip"),
    ".jsonl.zst": ("jsonl", "zstd"),
}


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What the tables hold. text: the mention's text beside its offsets; nested: a row per note; keep: kept columns."""

    text: bool = True
    nested: bool = False
    keep: tuple[pa.Field, ...] = ()

    def spans_schema(self) -> pa.Schema:
        """Schema of the ``spans`` table."""
        make = schema.nested_schema if self.nested else schema.spans_schema
        return make(text=self.text, keep=self.keep)

    def notes_schema(self) -> pa.Schema:
        """Schema of the ``notes`` table."""
        return schema.notes_schema(self.keep)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def spans_table(batch: pa.RecordBatch, options: TableOptions) -> pa.Table:
    """The ``spans`` table of an annotated batch (columns of ``schema.source_schema`` and ``schema.ANNOTATION``)."""
    return (nest if options.nested else explode)(batch, options)


def explode(batch: pa.RecordBatch, options: TableOptions = TableOptions()) -> pa.Table:
    """A row per span, in input order."""
    lists = batch.column("spans")
    found = pc.list_flatten(lists)
    parents = pc.list_parent_indices(lists)
    columns = {name: batch.column(name).take(parents) for name in (*schema.KEY.names, *_names(options.keep))}
    columns |= {name: pc.struct_field(found, name) for name in schema.SPAN.names}
    if options.text:
        columns["text"] = pa.array(_mentions(batch), pa.string())
    return _as_table(columns, schema.spans_schema(text=options.text, keep=options.keep))


def nest(batch: pa.RecordBatch, options: TableOptions) -> pa.Table:
    """A row per note with its spans as a list; null for a rejected note."""
    lists = batch.column("spans")
    found = pc.list_flatten(lists)
    wanted = schema.nested_schema(text=options.text, keep=options.keep)
    kind = wanted.field("spans").type
    fields = {name: pc.struct_field(found, name) for name in schema.SPAN.names}
    if options.text:
        fields["text"] = pa.array(_mentions(batch), pa.string())
    structs = pa.StructArray.from_arrays([fields[f.name] for f in kind.value_type], fields=list(kind.value_type))
    bounds = np.concatenate([[0], np.cumsum(batch.column("n_spans").to_numpy())])
    nested = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), structs, type=kind, mask=lists.is_null())
    columns = {name: batch.column(name) for name in (*schema.KEY.names, *_names(options.keep))}
    return _as_table(columns | {"spans": nested}, wanted)


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


def _mentions(batch: pa.RecordBatch) -> list[str]:
    """Text of each span, in order."""
    mentions: list[str] = []
    spans = batch.column("spans")
    for row in np.flatnonzero(batch.column("n_spans").to_numpy()).tolist():
        text = batch.column("text")[row].as_py()
        found = spans[row].values
        starts, ends = found.field("start").to_pylist(), found.field("end").to_pylist()
        mentions.extend(text[start:end] for start, end in zip(starts, ends, strict=True))
    return mentions


def json_lines(table: pa.Table) -> Iterator[bytes]:
    """The rows of a table as JSON lines; a score is written with the digits that tell float32 numbers apart.

    Dates, times and decimals of kept columns are written as Arrow prints them.
    """
    for index, name in enumerate(table.column_names):
        column = table.column(name)
        if name in ("score", "spans"):
            table = table.set_column(index, name, _short_floats(column.combine_chunks()))
        elif pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type):
            table = table.set_column(index, name, column.cast(pa.string()))
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield orjson.dumps(row, default=str) + b"\n"


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
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its final name only if the block ends without an error. Raises :class:`OutputError`."""
    with _translated(path):
        draft = _Draft(path)
        try:
            yield draft.file
            draft.close()
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
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as file:
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
            # One row group a part, also for no rows at all: equal input gives equal bytes.
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


class DirectorySink:
    """A run directory: ``run.json``, a file for each part in ``spans/`` and ``notes/``, and ``manifest.json`` last."""

    def __init__(self, path: Path, form: str, options: TableOptions, *, overwrite: bool = False) -> None:
        """Take an absent or empty directory, or with ``overwrite`` an earlier run's. Raises :class:`OutputError`."""
        self._path = path
        self._form = form
        self._options = options
        self.name = str(path)
        with _translated(path):
            if path.exists() and not path.is_dir():
                raise OutputError(f"{path}: exists and is no directory; choose another -o")
            if path.is_dir() and any(path.iterdir()):
                _clear(path, overwrite)
            path.mkdir(parents=True, exist_ok=True)

    def start(self, run: dict[str, Any]) -> None:
        """Record what is being run, before anything else is written."""
        write_json(self._path / RUN, run)
        with _translated(self._path):
            for folder in ("spans", "notes"):
                (self._path / folder).mkdir(exist_ok=True)

    def commit(self, part: int, batches: Sequence[pa.RecordBatch]) -> None:
        """Write one part: ``spans`` first; its ``notes`` file is the mark that the part is complete."""
        name = f"part-{part:06d}.{self._form}"
        for folder, make, wanted in _tables(self._options):
            with atomic(self._path / folder / name) as file:
                table = _TableFile(file, wanted, self._form, None)
                try:
                    table.write(_concat(batches, make, wanted, self._options))
                    table.close()
                except BaseException:
                    table.abandon()
                    raise

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, the mark of a finished run."""
        write_json(self._path / MANIFEST, manifest)

    def abort(self) -> None:
        """Leave what is committed."""


def _clear(path: Path, overwrite: bool) -> None:
    """Remove an earlier run's files, and nothing else, or refuse."""
    if not (path / RUN).is_file():
        raise OutputError(f"{path}: not empty, and no run of medner; choose another -o")
    state = "a finished run" if (path / MANIFEST).is_file() else "an unfinished run"
    if not overwrite:
        raise OutputError(f"{path}: holds {state}; choose another -o, or pass --overwrite")
    # A part's notes file is its mark, so it goes before its spans. The old `run.json` stays until the new one replaces
    # it: a directory that is cleared by half is an unfinished run.
    patterns = (MANIFEST, "notes/part-*", "spans/part-*", ".*.tmp", "*/.part-*.tmp")
    for file in (file for pattern in patterns for file in path.glob(pattern)):
        file.unlink(missing_ok=True)


class FileSink:
    """One file of spans, with the notes table and the manifest beside it; all three appear at the end."""

    def __init__(self, path: Path, options: TableOptions, *, overwrite: bool = False) -> None:
        """Raises :class:`OutputError` where a file exists already and ``overwrite`` is false."""
        suffix = _file_suffix(path)
        if suffix is None:
            raise OutputError(f"{path}: a single output file ends in {', '.join(FILE_SUFFIXES)}")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such directory; create it first")
        *targets, self._manifest = paths(path)
        for existing in (*targets, self._manifest):
            if existing.exists() and not overwrite:
                raise OutputError(f"{existing}: exists already; choose another -o, or pass --overwrite")
        self.name = str(path)
        self._options = options
        self._drafts: list[_Draft] = []
        self._files: list[_TableFile] = []
        try:
            with _translated(path):
                for target, (_, _, wanted) in zip(targets, _tables(options), strict=True):
                    self._drafts.append(_Draft(target))
                    self._files.append(_TableFile(self._drafts[-1].file, wanted, *FILE_SUFFIXES[suffix]))
        except BaseException:
            self.abort()
            raise

    def start(self, run: dict[str, Any]) -> None:
        """Nothing to record before the end: the file is not resumable."""

    def commit(self, part: int, batches: Sequence[pa.RecordBatch]) -> None:  # noqa: ARG002 - the sinks' common call
        """Append one part."""
        with _translated(Path(self.name)):
            for file, (_, make, wanted) in zip(self._files, _tables(self._options), strict=True):
                file.write(_concat(batches, make, wanted, self._options))

    def finish(self, manifest: dict[str, Any]) -> None:
        """Give the files their names once both are on the disk, and write the manifest, the mark of a finished run."""
        with _translated(Path(self.name)):
            for file, draft in zip(self._files, self._drafts, strict=True):
                file.close()
                draft.close()
            self._manifest.unlink(missing_ok=True)
            for draft in self._drafts:
                draft.commit()
        write_json(self._manifest, manifest)

    def abort(self) -> None:
        """Remove the temporary files."""
        for file in self._files:
            file.abandon()
        for draft in self._drafts:
            draft.discard()


class StreamSink:
    """A JSON record for each input row, on a binary stream."""

    name = "-"

    def __init__(self, stream: IO[bytes], options: TableOptions) -> None:
        """Records have ``source, row, note_id, status, reason, spans`` and the kept columns."""
        self._stream = stream
        self._options = options

    def start(self, run: dict[str, Any]) -> None:
        """A stream records nothing but its rows."""

    def commit(self, part: int, batches: Sequence[pa.RecordBatch]) -> None:  # noqa: ARG002 - the sinks' common call
        """Write the rows and flush."""
        names = [*schema.KEY.names, "status", "reason", "spans", *_names(self._options.keep)]
        with _translated("standard output"):
            for batch in batches:
                nested, notes = nest(batch, self._options), notes_table(batch, self._options)
                columns = [(notes if name in ("status", "reason") else nested).column(name) for name in names]
                for line in json_lines(pa.Table.from_arrays(columns, names=names)):
                    self._stream.write(line)
            self._stream.flush()

    def finish(self, manifest: dict[str, Any]) -> None:
        """A stream has no manifest."""

    def abort(self) -> None:
        """What was written stays written."""


Sink = DirectorySink | FileSink | StreamSink

_Make = Callable[[pa.RecordBatch, TableOptions], pa.Table]


def _tables(options: TableOptions) -> tuple[tuple[str, _Make, pa.Schema], ...]:
    return ("spans", spans_table, options.spans_schema()), ("notes", notes_table, options.notes_schema())


def _concat(batches: Sequence[pa.RecordBatch], make: _Make, wanted: pa.Schema, options: TableOptions) -> pa.Table:
    return pa.concat_tables([wanted.empty_table(), *(make(batch, options) for batch in batches)]).combine_chunks()


def file_format(path: Path) -> str | None:
    """``parquet`` or ``jsonl`` where an output path names a single file, None where it names a run directory."""
    suffix = _file_suffix(path)
    return None if suffix is None or path.is_dir() else FILE_SUFFIXES[suffix][0]


def paths(path: Path) -> tuple[Path, ...]:
    """What an output path stands for: the run directory, or the spans file, the notes file and the manifest."""
    suffix = _file_suffix(path)
    if suffix is None or path.is_dir():
        return (path,)
    stem = path.name[: -len(suffix)]
    return path, path.with_name(f"{stem}.notes{path.name[-len(suffix) :]}"), path.with_name(f"{stem}.manifest.json")


def _file_suffix(path: Path) -> str | None:
    return next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)
