"""Notes in: JSONL, Parquet, CSV and text files, plain or compressed, as Arrow batches with ``source`` and ``row``.

Every record of every file becomes one row. A record that cannot be used is a row without text and with one of the
:class:`Reason`; a file that cannot be used is an :class:`~medner.errors.InputError`. Errors of the operating system, of
pyarrow and of the decompressors are translated here, and no message holds a value that stands in a file.
"""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, TypeAlias, cast
from uuid import UUID

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from medner.errors import InputError, UsageError
from medner.schema import check_kept, is_text, notes_schema, printable, source_schema

Kind: TypeAlias = Literal["jsonl", "parquet", "csv", "text"]
Compression: TypeAlias = Literal["gz", "zst", "bz2"]

BATCH_ROWS = 1_000
_FIRST_ROWS = 8
#: About the bytes of text, ids and kept strings in a batch, unless a single row is larger.
BATCH_BYTES = 4 * 2**20
#: JSONL objects among which a column must show up.
PROBE_OBJECTS = 1_000
#: Characters of a JSONL line or a CSV record that are held, as a multiple of the largest note: a note of control
#: characters is six times as long in JSON, and other columns stand beside it.
HELD_PER_NOTE = 8

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".bz2": "bz2"}
_CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}
_KNOWN = ".jsonl .ndjson .csv .tsv .txt, each also with .gz .zst .bz2, and .parquet"
_CHUNK = 2**20
_SHOWN_NAMES, _SHOWN_TYPE = 20, 100
#: Kinds of views, of which rows cannot be picked out, as what they view.
_VIEWED = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = "medner.mark"

_log = logging.getLogger(__name__)

# Undecodable bytes become a lone surrogate, which no text that can be encoded holds. Unlike `surrogateescape` this
# works for every codec, UTF-16 included.
codecs.register_error(_MARK, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))
# The limit is global to the process. The length of a record is bounded by `_CsvLines` instead.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


class Reason(StrEnum):
    """Why a row was rejected. The whole vocabulary: no reason ever holds data."""

    MALFORMED = "malformed JSON"
    NOT_OBJECT = "JSON is not an object"
    TEXT_MISSING = "text is missing"
    TEXT_NULL = "text is null"
    TEXT_TYPE = "text is not a string"
    UNDECODABLE = "undecodable bytes"
    LONE_SURROGATES = "lone surrogates"
    WIDTH = "wrong number of fields"
    OPEN_QUOTE = "a quote is not closed"
    STRAY_QUOTE = "text follows a closed quote"
    STRAY_QUOTE_BELOW = "text follows a quote closed lines below, which may hold notes"
    ID_RANGE = "id is beyond 64 bits"
    ID_TYPE = "id is not a string or number"
    TOO_LARGE = "note is too large"
    REPEATED_ID = "id is repeated"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the input is read.

    ``id_column=None`` uses ``note_id`` where a file has it; rows without an id are called ``SOURCE:ROW``.
    ``delimiter=None`` is a comma for ``.csv`` and a tab for ``.tsv``. ``quotes=False`` takes a quote in them for a
    character like any other, so that every line is a record. ``limit`` counts rows over all files. ``max_note_bytes``
    counts UTF-8 bytes of text. ``unique_ids`` holds every id of the run in memory.
    """

    text_column: str = "text"
    id_column: str | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    quotes: bool = True
    keep: tuple[str, ...] = ()
    limit: int | None = None
    max_note_bytes: int = 64 * 2**20
    unique_ids: bool = False


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file found by :func:`discover`; ``path=None`` is standard input. As a string: its name for messages."""

    path: Path | None
    source: str
    kind: Kind
    compression: Compression | None

    def __str__(self) -> str:
        return "standard input" if self.path is None else str(self.path)

    def size(self) -> int | None:
        """Bytes on disk; None for a stream. Whether the file can be read is for the reader to say."""
        with suppress(OSError):
            if self.path is not None and stat.S_ISREG((status := self.path.stat()).st_mode):
                return status.st_size
        return None


@dataclass(frozen=True, slots=True)
class Discovery:
    """Files in reading order, and how many files of unknown suffix were passed over."""

    files: tuple[InputFile, ...]
    skipped: int


_Kept: TypeAlias = tuple[str | None, ...]
#: What a format yields for a record: id, text, reason, kept values. Text is None exactly where there is a reason.
_Record: TypeAlias = tuple[str | None, str | None, Reason | None, _Kept]
#: A record that went through `Reader._admit`: source, row, id, text, reason, kept values, UTF-8 bytes of the text.
_Row: TypeAlias = tuple[str, int, str, str | None, Reason | None, _Kept, int]


# ---------------------------------------------------------------------------------------------------- finding files


def discover(inputs: Sequence[str]) -> Discovery:
    """Files named by INPUT arguments: files, directories, globs and ``-``, in the order of the arguments.

    Within a directory or a glob files are sorted by their relative path. Raises :class:`InputError` where an argument
    gives no file, and :class:`UsageError` for one that is empty, an unknown suffix, text files among tables, or a
    repeated source.
    """
    files: list[InputFile] = []
    skipped = 0
    for name in inputs:
        try:
            found, unknown = _expand(name)
        except OSError as exc:
            raise InputError(f"cannot read {printable(os.fspath(exc.filename or name))}: {exc.strerror}") from exc
        if not found:
            raise InputError(f"{name}: no file to read ({unknown} of unknown suffix); medner reads {_KNOWN}")
        if len({file.kind == "text" for file in found}) == 2:
            raise UsageError(f"{name} holds .txt files and tables; pass them as separate inputs, such as globs")
        files += found
        skipped += unknown
    _check_distinct(files)
    return Discovery(tuple(files), skipped)


def _expand(name: str) -> tuple[list[InputFile], int]:
    """Files that one INPUT names, sorted, and the number of those of unknown suffix."""
    if not name:  # as a path it would be the current directory
        raise UsageError("an INPUT is empty; name a file, a directory, a glob or -")
    if name == "-":
        return [InputFile(None, "-", "jsonl", None)], 0
    path = Path(name)
    if path.is_dir():
        base, paths = path, list(_walk(path))
    elif path.exists():
        kind, compression = _kind(path.name)
        if kind is None:
            pipe = "; pipe JSON lines into -" if not path.is_file() else ""
            raise UsageError(f"{name}: unknown suffix; medner reads {_KNOWN}{pipe}")
        return [InputFile(path, _source(path, path.parent), kind, compression)], 0
    elif is_address(name):
        raise UsageError(f"{name}: medner reads local files; copy it here, or pipe JSON lines into -")
    elif glob.has_magic(name):
        base = _glob_base(path)
        paths = list(_matches(name, path, base))
    else:
        raise InputError(f"{name}: no such file or directory")
    known = [
        InputFile(path, _source(path, base), kind, compression)
        for path in paths
        for kind, compression in [_kind(path.name)]
        if kind is not None and (path.is_file() or not path.exists())  # what a link does not lead to is an error
    ]
    return sorted(known, key=lambda file: file.source), len(paths) - len(known)


def is_address(name: str) -> bool:
    """Whether a name is that of something elsewhere, such as ``s3://bucket/notes``."""
    return re.match("[a-z][a-z0-9+.-]*://", name, re.IGNORECASE) is not None


def real(path: str | Path) -> Path:
    """The path without links. Not ``Path.resolve``, which raises for a link to itself."""
    return Path(os.path.realpath(path))


def _walk(directory: Path) -> Iterator[Path]:
    """All files below, without hidden ones; linked directories are followed, loops of links are not."""
    left = [(directory, frozenset[Path]())]
    while left:
        path, above = left.pop()
        if (here := real(path)) in above:
            continue
        for entry in path.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                left.append((entry, above | {here}))
            else:
                yield entry


def _matches(name: str, pattern: Path, base: Path) -> Iterator[Path]:
    """Files that a pattern matches, and all below the directories that it matches, each once.

    Raises :class:`PermissionError` for a directory on the way that cannot be read: ``glob`` passes it over in silence.
    """
    for end in range(len(base.parts), len(pattern.parts)):
        for match in glob.glob(str(Path(*pattern.parts[:end])), recursive=True):  # noqa: PTH207
            if os.path.isdir(match) and not os.access(match, os.R_OK | os.X_OK):  # noqa: PTH112
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), match)
    found = map(Path, glob.glob(name, recursive=True))  # noqa: PTH207
    yield from dict.fromkeys(chain.from_iterable(_walk(path) if path.is_dir() else [path] for path in found))


def _glob_base(pattern: Path) -> Path:
    """The leading directories of a pattern that hold no wildcard."""
    plain = next(number for number, part in enumerate(pattern.parts) if glob.has_magic(part))
    return Path(*pattern.parts[:plain])


def would_read(name: str, path: Path) -> bool:
    """Whether an INPUT names a path, or a directory on the way to it, once they are there. path: of :func:`real`."""
    if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises where nobody can tell
        return path.is_relative_to(real(name))
    if os.path.exists(name) or not glob.has_magic(name):  # noqa: PTH110
        return False
    base = _glob_base(Path(name))
    return _fits((*real(base).parts, *Path(name).parts[len(base.parts) :]), path.parts)


def _fits(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a pattern matches a path, part by part, or one that leads to it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_fits(pattern[1:], parts[number:]) for number in range(len(parts) + 1))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], pattern[0]) and _fits(pattern[1:], parts[1:])


def _source(path: Path, base: Path) -> str:
    return printable(path.relative_to(base).as_posix())


def _suffixes(name: str) -> tuple[str, Compression | None]:
    """The suffix that names the format, in lower case, and the compression."""
    return uncompressed(name).suffix.lower(), _COMPRESSIONS.get(PurePath(name).suffix.lower())


def _kind(name: str) -> tuple[Kind | None, Compression | None]:
    suffix, compression = _suffixes(name)
    kind = _KINDS.get(suffix)
    return (None if kind == "parquet" and compression else kind), compression


def _check_distinct(files: Iterable[InputFile]) -> None:
    """Refuse two files of one source, since (source, row) is the key of a row, and one file twice."""
    sources: set[str] = set()
    paths: set[Path | None] = set()
    for file in files:
        found = file.path and real(file.path)
        if found in paths:
            raise UsageError(f"{file} is given twice; pass each file once")
        paths.add(found)
        if file.source in sources:
            raise UsageError(f"two inputs would both be called {file.source}; pass their common directory instead")
        sources.add(file.source)


def sizes(files: Iterable[InputFile]) -> list[dict[str, Any]]:
    """What is to be read, before it is: ``source`` and ``bytes`` of each table.

    Text files, whose names may be ids, are one record for each run of them: ``text_files``, ``bytes`` and a ``sha256``
    over the lines ``source LF`` in order.
    """
    found: list[dict[str, Any]] = []
    for texts, group in groupby(files, key=lambda file: file.kind == "text"):
        listed = [(file.source, file.size()) for file in group]
        if texts:
            names = hashlib.sha256("".join(f"{source}\n" for source, _ in listed).encode()).hexdigest()
            total = sum(size or 0 for _, size in listed)
            found.append({"text_files": len(listed), "bytes": total, "sha256": names})
        else:
            found += [{"source": source, "bytes": size} for source, size in listed]
    return found


# ------------------------------------------------------------------------------------------------------ reading them


class Reader:
    """One pass over files as record batches.

    ``schema`` is known before the first batch. Tables are opened once at construction, so that a missing column or an
    unreadable file shows before any work is done. Raises :class:`UsageError` for options that cannot be, and
    :class:`InputError` for files that cannot be used.
    """

    schema: pa.Schema

    def __init__(self, files: Sequence[InputFile], options: ReadOptions, stdin: BinaryIO | None = None) -> None:
        _check_options(options)
        self._files = tuple(files)
        self._options = options
        self._stdin = stdin
        self.schema = source_schema(_kept_fields(self._files, options))
        self._reset()

    def _reset(self) -> None:
        self._left = self._options.limit
        self._ids: set[str] = set()
        self._inputs: list[dict[str, Any]] = []
        self._texts = hashlib.sha256()
        self._bytes_before = 0
        self._current: _Raw | None = None

    @property
    def bytes_read(self) -> int:
        """How far this pass has come, in bytes of the files as they lie on disk; for progress only."""
        return self._bytes_before + (self._current.position if self._current else 0)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows of all files in order, in batches of ``schema``; no batch is empty.

        A batch holds at most ``BATCH_ROWS`` rows and about ``BATCH_BYTES``, or one larger row. Raises
        :class:`InputError` for a file that cannot be read to its end; batches yielded until then stay valid.
        """
        self._reset()
        for is_parquet, files in groupby(self._files, key=lambda file: file.kind == "parquet"):
            if is_parquet:
                for file in files:
                    yield from self._parquet_batches(file)
            else:
                for rows in _groups(chain.from_iterable(map(self._rows, files))):
                    kept = [pa.array(column, pa.string()) for column in zip(*(row[5] for row in rows), strict=True)]
                    yield self._batch(rows, kept)

    def inputs(self) -> list[dict[str, Any]]:
        """What was read, for the manifest: ``source``, ``bytes``, ``sha256``, ``rows`` for each file opened.

        ``sha256`` is that of the file as it lies on disk, and None where the limit ended the pass within it, as are the
        bytes of a stream. Text files, whose names may be ids, are one record for each run of them: ``text_files``,
        ``bytes`` and a ``sha256`` over the lines ``source NUL sha256 LF`` in order.
        """
        return [dict(record) for record in self._inputs]

    def _rows(self, file: InputFile) -> Iterator[_Row]:
        """Rows of one file that is no Parquet file."""
        if self._left == 0:
            return
        with _translated(file), _Raw(file, self._stdin) as raw:
            self._current = raw
            rows = 0
            for record in self._records(file, _decoded(file, raw, self._options.encoding)):
                if self._left == 0:
                    self._record(raw, rows, whole=False)
                    return
                yield self._admit(file.source, rows, *record)
                rows += 1
                if self._left is not None:
                    self._left -= 1
                    if self._left == 0 and file.path is None:  # who writes a stream may have no more for long
                        self._record(raw, rows, whole=False)
                        return
            raw.drain()
            self._record(raw, rows, whole=True)

    def _records(self, file: InputFile, text: io.TextIOWrapper) -> Iterator[_Record]:
        if file.kind == "text":
            return _text_records(file, text, self._options)
        return (_json_records if file.kind == "jsonl" else _csv_records)(file, text, self._options, self._left)

    def _admit(
        self, source: str, row: int, note_id: str | None, text: str | None, reason: Reason | None, kept: _Kept
    ) -> _Row:
        """Apply the rules that all formats share: the size, what can be encoded, ids given and unique."""
        note_id = note_id or f"{source}:{row}"
        size = 0
        if text is not None:
            try:
                size = len(text) if text.isascii() else len(text.encode())
            except UnicodeEncodeError:
                reason = Reason.UNDECODABLE
            if size > self._options.max_note_bytes:
                reason = Reason.TOO_LARGE
        if self._options.unique_ids:
            if note_id in self._ids:
                reason = reason or Reason.REPEATED_ID
            self._ids.add(note_id)
        if reason is not None:
            text, size = None, 0
        return source, row, note_id, text, reason, kept, size

    def _batch(self, rows: list[_Row], kept: Sequence[pa.Array]) -> pa.RecordBatch:
        columns = list(zip(*rows, strict=True))[:5]
        fixed = [pa.array(column, self.schema.field(place).type) for place, column in enumerate(columns)]
        return pa.RecordBatch.from_arrays([*fixed, *kept], schema=self.schema)

    def _parquet_batches(self, file: InputFile) -> Iterator[pa.RecordBatch]:
        """Batches of one Parquet file; kept columns stay in Arrow."""
        if self._left == 0:
            return
        with _translated(file), _Raw(file, None) as raw:
            self._current = raw
            parquet = _parquet(raw.file)
            id_column = _check_parquet(file, parquet.schema_arrow, self._options)
            total, size = parquet.metadata.num_rows, os.fstat(raw.file.fileno()).st_size
            whole = self._left is None or self._left >= total
            wanted = total if self._left is None else min(total, self._left)
            if whole:
                raw.file.seek(0)
                raw.drain()
            names = [self._options.text_column, *([id_column] if id_column is not None else []), *self._options.keep]
            columns = list(dict.fromkeys(names))  # the text itself can be kept, too
            rows = 0
            for batch in parquet.iter_batches(batch_rows(parquet.metadata), columns=columns, use_threads=False):
                chunk = batch if self._left is None else batch.slice(0, self._left)
                yield from self._parquet_chunk(file, rows, chunk, id_column)
                rows += chunk.num_rows
                raw.position = size * rows // max(total, 1)
                if self._left is not None:
                    self._left -= chunk.num_rows
                    if self._left == 0:
                        break
            if rows != wanted:
                raise _damaged(file)
            self._record(raw, rows, whole=whole)

    def _parquet_chunk(
        self, file: InputFile, first: int, chunk: pa.RecordBatch, id_column: str | None
    ) -> Iterator[pa.RecordBatch]:
        texts = _strings(chunk.column(self._options.text_column))
        ids = [None] * len(texts) if id_column is None else _strings(chunk.column(id_column))
        kept = [_kept_array(file, chunk.column(name), self.schema.field(name)) for name in self._options.keep]
        start = 0
        for rows in _groups(
            self._admit(file.source, first + number, *_parquet_record(text, note_id))
            for number, (text, note_id) in enumerate(zip(texts, ids, strict=True))
        ):
            yield self._batch(rows, [column.slice(start, len(rows)) for column in kept])
            start += len(rows)

    def _record(self, raw: _Raw, rows: int, *, whole: bool) -> None:
        """Note what was read of a file, after checking that it did not change meanwhile."""
        size, sha256 = raw.finish(whole=whole)
        self._bytes_before, self._current = self._bytes_before + (size or 0), None
        file = raw.name
        if file.kind != "text":
            self._inputs.append({"source": file.source, "bytes": size, "sha256": sha256, "rows": rows})
            return
        if not self._inputs or "text_files" not in self._inputs[-1]:
            self._inputs.append({"text_files": 0, "bytes": 0, "sha256": None})
            self._texts = hashlib.sha256()
        self._texts.update(f"{file.source}\0{sha256}\n".encode())
        run = self._inputs[-1]
        run.update(text_files=run["text_files"] + 1, bytes=run["bytes"] + (size or 0), sha256=self._texts.hexdigest())


def texts(given: str) -> Iterator[str]:
    """The texts of ``FILE`` or ``FILE:COLUMN``, in any form that INPUT takes; without empty and rejected ones.

    The column is ``text`` unless it is named. Raises :class:`InputError` where no text is found, and as :class:`Reader`
    does.
    """
    name, column = given, "text"
    # Not Path.expanduser, which raises where there is no such user.
    if not os.path.exists(os.path.expanduser(given)) and ":" in given:  # noqa: PTH110, PTH111
        name, _, column = given.rpartition(":")
    empty, rows, rejected = True, 0, 0
    try:
        reader = Reader(
            discover([os.path.expanduser(name)]).files,  # noqa: PTH111
            ReadOptions(text_column=column),
        )
        for batch in reader.batches():
            rows, rejected = rows + batch.num_rows, rejected + batch.num_rows - batch.column("reason").null_count
            for text in filter(None, batch.column("text").to_pylist()):
                empty = False
                yield text
    except InputError as exc:
        raise InputError(str(exc).replace("name another with --text-column", "name another as FILE:COLUMN")) from exc
    if empty:
        raise InputError(f"{given}: holds no text")
    if rejected:
        _log.warning("%s: %d of %d rows have no text that can be read and are left out", given, rejected, rows)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of any file, decompressed where its suffix names a compression.

    Raises :class:`InputError` where it cannot be read, while it is read, too.
    """
    file = InputFile(path, path.name, "text", _COMPRESSIONS.get(path.suffix.lower()))
    with _translated(file), _Raw(file, None) as raw:
        yield _decompressed(file, raw)


def uncompressed(path: str | Path) -> PurePath:
    """A file's name without a suffix that names a compression: of ``notes/a.jsonl.gz`` ``a.jsonl``."""
    name = PurePath(PurePath(path).name)
    return name.with_suffix("") if name.suffix.lower() in _COMPRESSIONS else name


def _check_options(options: ReadOptions) -> None:
    named = [*_named_columns(options), (options.encoding, "--encoding"), (options.delimiter or "", "--delimiter")]
    for value, option in named:
        if _SURROGATE.search(value):
            raise UsageError(f"{option} {value!r} is no valid Unicode")
    check_kept(options.keep)
    notes_schema(pa.field(name, pa.string()) for name in options.keep)  # refuses a column that is kept twice
    if options.limit is not None and options.limit < 0:
        raise UsageError("--limit must not be negative")
    if not 1 <= options.max_note_bytes < 2**31:
        raise UsageError("--max-note-bytes must lie between 1 and 2147483647")
    if options.delimiter is not None:
        delimiter = "\t" if options.delimiter == "\\t" else options.delimiter
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise UsageError("--delimiter must be one character, or \\t for a tab, and no quote or line end")
    try:
        io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xfd"), encoding=options.encoding, errors=_MARK).read()
    except (LookupError, ValueError) as exc:  # ValueError: a codec that cannot go on after an error, as `idna`
        raise UsageError(f"--encoding {options.encoding}: no encoding of text that Python knows") from exc


def _groups(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Cut rows into lists bounded in rows and in size, which is mostly their text; a single larger row stands alone.

    The first lists are short, so that the first spans of a stream come soon.
    """
    held: list[_Row] = []
    size = 0
    limit = min(_FIRST_ROWS, BATCH_ROWS)
    for row in rows:
        added = row[6] + len(row[2]) + sum(map(len, filter(None, row[5])))
        if held and (len(held) == limit or size + added > BATCH_BYTES):
            yield held
            held, size, limit = [], 0, min(2 * limit, BATCH_ROWS)
        held.append(row)
        size += added
    if held:
        yield held


def _read_id(value: object) -> tuple[str | None, Reason | None]:
    """The id as text, or why it cannot be one. None, an empty string and NaN, pandas' missing number, are no id."""
    if value is None:
        return None, None
    if isinstance(value, str):
        return (None, Reason.UNDECODABLE) if _SURROGATE.search(value) else (value, None)
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value), None) if -(2**63) <= value < 2**64 else (None, Reason.ID_RANGE)
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value), None
    if isinstance(value, Decimal):
        return format(value, "f"), None
    if isinstance(value, UUID):
        return str(value), None
    return None, Reason.ID_TYPE


# ------------------------------------------------------------------------------------------------- bytes and decoding


class _Raw(io.RawIOBase):
    """The bytes of a file as they lie on disk, hashed as they are read."""

    def __init__(self, file: InputFile, stdin: BinaryIO | None) -> None:
        self.name = file
        self.file: BinaryIO = _standard_input(stdin) if file.path is None else file.path.open("rb")
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        #: How far the reading of rows has come, in bytes of the file.
        self.position = 0
        self._read1 = getattr(self.file, "read1", self.file.read)
        self._before = None if file.path is None else os.fstat(self.file.fileno())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._read1(len(buffer))
        buffer[: len(chunk)] = chunk
        self._sha256.update(chunk)
        self._bytes += len(chunk)
        self.position = self._bytes
        return len(chunk)

    def close(self) -> None:
        # Whoever reads from this closes it at its own end, but the file is still to be checked then.
        pass

    def __exit__(self, *_: object) -> None:
        if self.name.path is not None:
            self.file.close()

    def drain(self) -> None:
        """Hash all from where the file stands to its end."""
        while self.read(_CHUNK):
            pass

    def finish(self, *, whole: bool) -> tuple[int | None, str | None]:
        """Bytes of the file and, after a whole pass, their hash. Raises if the file changed or ended early.

        Of a stream that was not read to its end both are None: what lies behind the last row came along by chance.
        """
        if whole and self._bytes == 0 and self.name.compression:
            raise _damaged(self.name)  # no compression has an empty file
        size = self._bytes if whole else None
        # The size of a pipe or a device says nothing.
        if self._before is not None and stat.S_ISREG(self._before.st_mode):
            after = os.fstat(self.file.fileno())
            same = (after.st_size, after.st_mtime_ns) == (self._before.st_size, self._before.st_mtime_ns)
            if not same or (whole and size != after.st_size):
                raise InputError(f"{self.name} changed while it was read; run again once nothing writes to it")
            size = after.st_size
        return size, self._sha256.hexdigest() if whole else None


def _standard_input(given: BinaryIO | None) -> BinaryIO:
    if given is not None:
        return given
    # Python's is None where the process was started without one.
    if cast(object, sys.stdin) is None:
        raise InputError("cannot read standard input: it is closed; pipe JSON lines into it, or name a file")
    with suppress(OSError):  # it may have no descriptor
        os.set_blocking(sys.stdin.fileno(), True)  # else what is late would count as the end
    return sys.stdin.buffer


@contextmanager
def _translated(file: InputFile) -> Iterator[None]:
    """The border where foreign errors become :class:`InputError`. Their own texts may hold data and stay out."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:  # pyarrow's own, from a decompressor or the Parquet reader
            raise _damaged(file) from exc
        raise InputError(f"cannot read {file}: {exc.strerror}") from exc
    except UnicodeError as exc:
        if file.kind == "parquet":
            raise _damaged(file) from exc
        raise InputError(  # what bytes decode to is never an error, only that a mark is not there
            f"cannot read {file}: its text is not as --encoding says; "
            "name another encoding, such as utf-16-le for UTF-16 without a byte-order mark"
        ) from exc
    except (pa.ArrowException, csv.Error) as exc:
        if file.kind == "parquet" and "UTF8" in str(exc):  # only in a dictionary's strings is it looked for at once
            raise InputError(
                f"cannot read {file}: a dictionary of strings in it holds bytes that are no text; write that column as "
                "plain strings or bytes"
            ) from exc
        raise _damaged(file) from exc


def _damaged(file: InputFile) -> InputError:
    what = f"it is no {file.kind} file, or damaged"
    if file.compression:
        what = f"its {file.compression} data is damaged or ends early"
    return InputError(f"cannot read {file}: {what}; copy or write it again")


def _decoded(file: InputFile, raw: _Raw, encoding: str) -> io.TextIOWrapper:
    """Decompressed and decoded text with its line ends as they are; undecodable bytes are lone surrogates."""
    # "" splits CSV at \r, \n and \r\n, "\n" at \n alone; neither changes a character.
    newline = "" if file.kind == "csv" else "\n"
    return io.TextIOWrapper(_decompressed(file, raw), encoding=encoding, errors=_MARK, newline=newline)


def _decompressed(file: InputFile, raw: _Raw) -> io.BufferedReader:
    stream: Any = raw
    if file.compression:
        # All members and frames of a file are read, and a cut one is an error, for each of the three codecs.
        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), _CODECS[file.compression])
    return io.BufferedReader(stream, 2**18)


def _byte_order_mark(encoding: str) -> str:
    """The mark to drop from the start of decoded text: none where the codec does so itself."""
    return "" if "".encode(encoding) else "\ufeff"


def _most_held(options: ReadOptions) -> int:
    """Characters of a JSONL line or a CSV record that are held at most."""
    return HELD_PER_NOTE * options.max_note_bytes + _CHUNK


def _lines(text: io.TextIOWrapper, most: int) -> Iterator[str]:
    """Lines with their ends, in pieces of at most ``most`` characters, without a leading byte-order mark."""
    first = text.readline(most).removeprefix(_byte_order_mark(text.encoding))
    return chain([first] if first else [], iter(partial(text.readline, most), ""))


def _text_records(file: InputFile, text: io.TextIOWrapper, options: ReadOptions) -> Iterator[_Record]:
    """The one record of a text file. Beyond the largest note, no more is read than shows that it is too large."""
    note = text.read(options.max_note_bytes + 2).removeprefix(_byte_order_mark(text.encoding))
    yield file.source, note, None, ()


# ----------------------------------------------------------------------------------------------------------- columns


def _kept_fields(files: Sequence[InputFile], options: ReadOptions) -> list[pa.Field]:
    """Check the columns of tables and find the types of kept columns.

    Parquet types are kept where all files are Parquet and agree; everything else becomes a string.
    """
    types: dict[str, set[pa.DataType]] = {name: set() for name in options.keep}
    for file in files:
        if file.kind == "parquet":
            with _translated(file), _Raw(file, None) as raw:
                arrow = _parquet(raw.file).schema_arrow
                _check_parquet(file, arrow, options)
                for name in options.keep:
                    types[name].add(arrow.field(name).type)
        elif file.kind == "text":
            named = [options.id_column] if options.id_column is not None else []
            if absent := [*named, *options.keep]:
                raise InputError(f"{file} has no column {absent[0]!r}: a text file has no columns")
        elif file.path is not None and not file.path.is_fifo():  # a pipe can be read only once; it is checked then
            with _translated(file), _Raw(file, None) as raw:
                text = _decoded(file, raw, options.encoding)
                (_probe_csv if file.kind == "csv" else _probe_json)(file, text, options)
    only_parquet = all(file.kind == "parquet" for file in files)
    return [pa.field(name, _kept_type(name, types[name], only_parquet)) for name in options.keep]


def _kept_type(name: str, found: set[pa.DataType], only_parquet: bool) -> pa.DataType:
    if only_parquet and len(found) == 1:
        (kind,) = found
        return _carried(name, _VIEWED.get(kind, kind))
    for kind in found:
        try:
            pa.nulls(0, kind).cast(pa.string())
        except pa.ArrowNotImplementedError as exc:
            raise InputError(f"--keep {name}: its type differs between files, and {_type(kind)} is no string") from exc
    return pa.string()


def _carried(name: str, kind: pa.DataType) -> pa.DataType:
    """The type, if it can be read in pieces and rows of it can be picked out, as the table of spans needs."""
    try:
        pa.nulls(0, kind).take(pa.array([], pa.int64()))
        if any(map(_has_dictionary, _inner(kind))):
            raise pa.ArrowNotImplementedError("dictionaries that differ between row groups")
    except pa.ArrowNotImplementedError as exc:
        raise InputError(f"--keep {name}: {_type(kind)} cannot be carried into the output; cast it first") from exc
    return kind


def _has_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or any(map(_has_dictionary, _inner(kind)))


def _inner(kind: pa.DataType) -> list[pa.DataType]:
    """Types of the values inside one of a nested type."""
    return [kind.field(number).type for number in range(kind.num_fields)]


def _type(kind: pa.DataType) -> str:
    """A type in a message: a nested one names all its fields, and there may be many."""
    name = str(kind)
    return name if len(name) <= _SHOWN_TYPE else f"{name[:_SHOWN_TYPE]}..."


def _check_names(file: InputFile, names: Sequence[str], options: ReadOptions, found: str) -> str | None:
    """Refuse a table without a column that is named, or with two; returns its id column, None if it has none."""
    id_column = _id_column(options)
    for name, option in _named_columns(options):
        if name not in names:
            raise _no_column(file, name, option, found)
    for name in (options.text_column, id_column, *options.keep):
        if names.count(name) > 1:
            raise InputError(f"{file} has more than one column {name!r}; rename all but one")
    return id_column if id_column in names else None


def _id_column(options: ReadOptions) -> str:
    """The one that was named, which may have no name, else the one that is looked for."""
    return "note_id" if options.id_column is None else options.id_column


def _named_columns(options: ReadOptions) -> list[tuple[str, str]]:
    """Columns that a table must have, with the option that names each."""
    named = [(options.text_column, "--text-column")]
    if options.id_column is not None:
        named.append((options.id_column, "--id-column"))
    return [*named, *((name, "--keep") for name in options.keep)]


def _listed(names: Sequence[str]) -> str:
    """Column names in a message of a line, whatever their number and whatever stands in them."""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN_NAMES]]
    return ", ".join([*shown, *([f"and {len(names) - len(shown)} more"] if len(shown) < len(names) else [])]) or "none"


def _no_column(file: InputFile, name: str, option: str, found: str) -> InputError:
    asked = " (or has it another delimiter or encoding?)" if file.kind == "csv" else ""
    return InputError(f"{file} has no column {name!r}{found}; name another with {option}{asked}")


# ------------------------------------------------------------------------------------------------------------- JSONL


def _json_records(file: InputFile, text: io.TextIOWrapper, options: ReadOptions, left: int | None) -> Iterator[_Record]:
    """Records of a JSONL file. A named column must be in one of the first 1,000 objects, if there are any.

    Of a key that stands twice in an object the last value counts. left: records that are wanted, None for all; of those
    that follow one may be given that is not the file's.
    """
    most = _most_held(options)
    column, id_column, keep = options.text_column, _id_column(options), options.keep
    nothing: _Kept = (None,) * len(keep)
    unseen = {name for name, _ in _named_columns(options)}
    objects = 0
    lines = _lines(text, most)
    for line in lines:
        if len(line) >= most - 1 and not line.endswith("\n"):
            while (piece := text.readline(most)) and not piece.endswith("\n"):
                pass
            yield None, None, Reason.TOO_LARGE, nothing
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            if not line.isspace():
                yield *_explain(line, id_column), nothing
            continue
        if type(record) is not dict:
            yield None, None, Reason.NOT_OBJECT, nothing
            continue
        beyond = ""
        if unseen:
            objects += 1
            unseen.difference_update(record)
            is_last = objects == left
            if is_last and unseen:
                # No other record is wanted, but those behind it tell, too, whether the file has the column.
                beyond = next(filter(str.strip, lines), "")
                for another in islice(_objects(chain([beyond], lines)), PROBE_OBJECTS - objects):
                    objects += 1
                    unseen.difference_update(another)
            if is_last or objects >= PROBE_OBJECTS:
                _check_seen(file, unseen, objects, options)
        note_id, reason = _read_id(_json_value(record, id_column, line))
        note = record.get(column)
        if column not in record:
            reason = Reason.TEXT_MISSING
        elif type(note) is not str:
            reason = Reason.TEXT_NULL if note is None else Reason.TEXT_TYPE
        kept = tuple(_json_text(_json_value(record, name, line)) for name in keep) if keep else ()
        yield note_id, None if reason else note, reason, kept
        if beyond:
            yield None, None, Reason.NOT_OBJECT, nothing
    if objects:
        _check_seen(file, unseen, objects, options)


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects among lines of JSON, all else left out."""
    for line in lines:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if type(record) is dict:
            yield record


def _probe_json(file: InputFile, text: io.TextIOWrapper, options: ReadOptions) -> None:
    """Refuse a file without a named column, as :func:`_json_records` does; reads no further than up to the last one."""
    unseen = {name for name, _ in _named_columns(options)}
    objects = 0
    for record in islice(_objects(_lines(text, _most_held(options))), PROBE_OBJECTS):
        objects += 1
        unseen.difference_update(record)
        if not unseen:
            return
    if objects:
        _check_seen(file, unseen, objects, options)


def _check_seen(file: InputFile, unseen: set[str], objects: int, options: ReadOptions) -> None:
    for name, option in _named_columns(options):
        if name in unseen:
            raise _no_column(file, name, option, f" in its first {objects} objects")


def _json_value(record: dict[str, Any], name: str, line: str) -> Any:
    """A value of an object, with integers beyond 64 bits, which orjson turns into floats, as the integers they are."""
    value = record.get(name)
    if (type(value) is float and abs(value) >= 2**63) or type(value) in (dict, list):
        exact = _parse(line)
        return exact.get(name) if isinstance(exact, dict) else value
    return value


def _json_text(value: Any) -> str | None:
    """A kept value as text; null for null, and for what is nested more deeply than Python can write."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return None


def _parse(line: str) -> Any:
    """What the standard library reads, which takes lone surrogates and integers of any size; None on errors."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _explain(line: str, id_column: str) -> tuple[str | None, None, Reason]:
    """Why orjson refused a line, and its id where that can be read."""
    record = _parse(line)
    note_id, id_reason = _read_id(record.get(id_column)) if isinstance(record, dict) else (None, None)
    if _SURROGATE.search(line):
        return note_id, None, Reason.UNDECODABLE
    if isinstance(record, dict) and _SURROGATE.search(_json_text(record) or ""):
        return note_id, None, Reason.LONE_SURROGATES
    return note_id, None, id_reason or Reason.MALFORMED


# --------------------------------------------------------------------------------------------------------------- CSV


class _CsvLines:
    """Lines for the CSV parser, counted since the last record, so that an open quote cannot hold a whole file."""

    def __init__(self, file: InputFile, text: io.TextIOWrapper, options: ReadOptions) -> None:
        self._file = file
        self._most = _most_held(options)
        self._lines = _lines(text, self._most + 2)  # a piece is too long, its byte-order mark not counted
        self.held = 0
        #: Lines since the last record that are not blank.
        self.count = 0
        self.row = 0
        self.open = False

    def begin_record(self) -> None:
        """Count from here on."""
        self.held = self.count = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.held += len(line)
            self.count += not line.isspace()
            if self.held > self._most:
                raise InputError(
                    f"{self._file}: row {self.row} is longer than {self._most} characters; is a quote not closed "
                    "there, or a line end missing?"
                )
            yield line
        # The parser gives each record at its line end. Asking for more within one means that a quote is open.
        self.open = self.held > 0


def _csv_records(file: InputFile, text: io.TextIOWrapper, options: ReadOptions, limit: int | None) -> Iterator[_Record]:
    lines = _CsvLines(file, text, options)
    reader = _csv_reader(file, lines, options)
    width, column, id_column, keep = _csv_header(file, lines, reader, options)
    nothing: _Kept = (None,) * len(keep)
    lines.begin_record()
    for fields in _csv_fields(reader):
        count = lines.count
        lines.begin_record()
        if fields is not None and not count and len(fields) < 2 and len(fields) != width:  # a blank line
            continue
        # Beyond the limit it is asked for, but not taken.
        if fields is None and lines.open and count > 1 and (limit is None or lines.row < limit):
            raise InputError(
                f"{file}: row {lines.row}: a quote is not closed by the end of the file, and there may be notes in the "
                f"{count} lines from there on; close or double the quote, or pass --no-quotes if lines are records"
            )
        lines.row += 1
        if fields is None:
            stray = Reason.STRAY_QUOTE_BELOW if count > 1 else Reason.STRAY_QUOTE
            yield None, None, Reason.OPEN_QUOTE if lines.open else stray, nothing
        elif len(fields) != width:
            yield None, None, Reason.WIDTH, nothing
        else:
            note_id, reason = (None, None) if id_column is None else _read_id(fields[id_column])
            kept = tuple(_SURROGATE.sub("\ufffd", fields[index]) for index in keep) if keep else ()
            yield note_id, None if reason else fields[column], reason, kept


def _probe_csv(file: InputFile, text: io.TextIOWrapper, options: ReadOptions) -> None:
    """Refuse a file without a named column."""
    lines = _CsvLines(file, text, options)
    _csv_header(file, lines, _csv_reader(file, lines, options), options)


def _csv_reader(file: InputFile, lines: _CsvLines, options: ReadOptions) -> Iterator[list[str]]:
    # Not lenient: what follows a closed quote would join the field, often with the notes below it.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if options.quotes else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=_delimiter(file, options), quoting=quoting, strict=True)


def _csv_fields(reader: Iterator[list[str]]) -> Iterator[list[str] | None]:
    """The fields of each record; None where its quotes cannot be read, after which the next line begins a record."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _csv_header(
    file: InputFile, lines: _CsvLines, reader: Iterator[list[str]], options: ReadOptions
) -> tuple[int, int, int | None, list[int]]:
    """Read the header; its width and the places of the text, the id and the kept columns.

    Messages do not list the columns found: in a file without a header they are a note.
    """
    try:
        header = next(filter(lambda _: lines.count, reader), [])
    except csv.Error as exc:
        wrong = "is not closed" if lines.open else "stands inside a field"
        raise InputError(f"{file}: a quote in its header {wrong}; write the file again, or pass --no-quotes") from exc
    id_column = _check_names(file, header, options, "")
    return (
        len(header),
        header.index(options.text_column),
        None if id_column is None else header.index(id_column),
        [header.index(name) for name in options.keep],
    )


def _delimiter(file: InputFile, options: ReadOptions) -> str:
    if options.delimiter is None:
        return "\t" if _suffixes(file.source)[0] == ".tsv" else ","
    return "\t" if options.delimiter == "\\t" else options.delimiter


# ----------------------------------------------------------------------------------------------------------- Parquet


def _parquet(file: BinaryIO) -> pq.ParquetFile:
    # Without pre-buffering, a row group is read in pieces of the buffer's size instead of as a whole.
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK, page_checksum_verification=True)


def _check_parquet(file: InputFile, arrow: pa.Schema, options: ReadOptions) -> str | None:
    """Check the columns that the options name; returns the id column, None where the file has none."""
    id_column = _check_names(file, arrow.names, options, f" (it has {_listed(arrow.names)})")
    kind = arrow.field(options.text_column).type
    if not (is_text(kind) or pa.types.is_null(kind)):  # null: a file whose notes are all missing
        raise InputError(
            f"{file}: column {options.text_column!r} holds {_type(kind)}, not text; cast it to a string first"
        )
    if id_column is None:
        return None
    kind = arrow.field(id_column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    numbers = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_decimal(plain)
    if not (is_text(plain) or numbers or pa.types.is_null(plain) or isinstance(plain, pa.UuidType)):
        raise InputError(
            f"{file}: column {id_column!r} holds {_type(kind)}, not strings or numbers; cast it to a string, or name "
            "another"
        )
    return id_column


def batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows to decode at once: fewer where the rows of a group are large, since a batch is in memory as a whole."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=1)
    return max(1, min(BATCH_ROWS, 4 * BATCH_BYTES // max(largest, 1)))


def _strings(column: pa.Array) -> list[Any]:
    """Python values of a column; bytes that are no UTF-8 become lone surrogates."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    try:
        return cast(list[Any], plain.to_pylist())
    except UnicodeDecodeError:
        raw = plain.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


def _parquet_record(text: str | None, value: object) -> _Record:
    note_id, reason = _read_id(value)
    if text is None:
        reason = Reason.TEXT_NULL
    return note_id, None if reason else text, reason, ()


def _kept_array(file: InputFile, column: pa.Array, field: pa.Field) -> pa.Array:
    """A kept column as the field has it. Strings that do not decode are mended; in nested columns they are an error."""
    if is_text(column.type):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            mended = [None if value is None else _SURROGATE.sub("\ufffd", value) for value in _strings(column)]
            column = pa.array(mended, pa.string())
    try:
        column = column if column.type == field.type else column.cast(field.type)
        column.validate(full=True)
    except pa.ArrowInvalid as exc:
        raise InputError(
            f"{file}: --keep {field.name}: a value of {_type(column.type)} cannot be carried into the output; mend or "
            "cast it first"
        ) from exc
    return column
