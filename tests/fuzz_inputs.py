"""Bad input in quantity: seeded cases over all formats go through whole runs, and a second reader says what is right.

    python tests/fuzz_inputs.py --cases 20000          # the long form; --first N begins further on
    python tests/fuzz_inputs.py --seed 1 --only 137    # one case again; its files are kept and named

A case is some files and the options to read them with, drawn from its seed and number alone. The second reader works
on whole files in memory, with the standard library: it says which rows there are, what text each one holds or which
reasons there are to reject it, and whether the files can be used at all. The run has to agree, row by row.
"""

from __future__ import annotations

import argparse
import bz2
import codecs
import csv
import faulthandler
import gzip
import hashlib
import io
import json
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from medner import sources, testing
from medner.annotate import Annotator, Options
from medner.errors import InputError, MednerError, TooManyRejected, UsageError
from medner.run import RunOptions, check_rejected, run
from medner.sources import ReadOptions, Reason

#: Stands in every note, in ids, in kept values and in headers that are notes; no message may hold it.
MARKER = "zqxmark"
#: Seconds that a case may take. It takes some hundredths.
GUARD_SECONDS = 20
_UNREADABLE = "\udcee"
_SURROGATE = re.compile("[\ud800-\udfff]")
codecs.register_error("fuzz", lambda error: (_UNREADABLE, cast(UnicodeDecodeError, error).end))


@dataclass(frozen=True)
class Row:
    """What a record has to become: a note of this text, a row rejected for one of these reasons, or either.

    ids: what its id may be read as, without the default; kept: its kept value, None where that is not checked.
    """

    text: str | None = None
    reasons: frozenset[Reason] = frozenset()
    ids: frozenset[str] = frozenset()
    kept: str | None = None


@dataclass(frozen=True)
class Truth:
    """What is to be read from a file.

    rows: None where they are not known; count: their number, None where not even that is known. refused: ``at once``
    before anything is read, ``at the end`` once everything before it was read, ``perhaps``, perhaps ``beside others``,
    or ``never``.
    """

    rows: list[Row] | None
    count: int | None
    refused: str = "never"


@dataclass(frozen=True)
class File:
    """One input file. truth: known by construction; None where the second reader is asked."""

    name: str
    data: bytes
    truth: Truth | None = None


@dataclass(frozen=True)
class Case:
    """Files, how to read them, and where to write.

    planted: the texts that were written, where nothing was damaged. chunk: what ``sources`` reads at once. misused: the
    call is wrong, whatever the files are.
    """

    kind: str
    files: tuple[File, ...]
    read: ReadOptions
    output: str
    planted: list[str] | None = None
    form: str | None = None
    nested: bool = False
    part_rows: int = 5000
    chunk: int = sources._CHUNK
    stdin: bool = False
    misused: bool = False


@dataclass
class Report:
    """What happened, by format."""

    cases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- the second reader


def unpacked(data: bytes, name: str) -> bytes:
    """The content of a compressed file. Raises ValueError where it is damaged, or ends early."""
    suffix = name.rpartition(".")[2]
    if suffix not in ("gz", "bz2", "zst"):
        return data
    if not data:
        raise ValueError("no compressed file is empty")
    if suffix == "zst":  # the standard library has none; its frames hold no checksum either
        try:
            return bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read())
        except (OSError, pa.ArrowException) as exc:
            raise ValueError("damaged") from exc
    content = b""
    while data:
        member: Any = zlib.decompressobj(31) if suffix == "gz" else bz2.BZ2Decompressor()
        try:
            content += member.decompress(data)
        except (zlib.error, OSError) as exc:
            raise ValueError("damaged") from exc
        if not member.eof:
            raise ValueError("ends early")
        data = member.unused_data
    return content


def truth_of(file: File, options: ReadOptions, chunk: int) -> Truth:
    """What is to be read from the file, worked out from its bytes."""
    if file.truth is not None:
        return file.truth
    is_csv = ".csv" in file.name or ".tsv" in file.name
    is_text = ".txt" in file.name
    try:
        # Not `bytes.decode`, which takes UTF-16 without a mark; the reader asks for the mark, or for the byte order.
        decoder = codecs.getincrementaldecoder(options.encoding)("fuzz")
        text = decoder.decode(unpacked(file.data, file.name), final=True)
    except ValueError:
        # Where the damage lies beyond a note that is too large, or beyond the header, it need not be met at once.
        return Truth(None, None, "at the end" if not is_text else "perhaps")
    if options.encoding not in ("utf-8-sig", "utf-16"):
        text = text.removeprefix("\ufeff")
    most = sources.HELD_PER_NOTE * options.max_note_bytes + chunk
    if is_text:
        if options.keep or options.id_column is not None:
            return Truth(None, None, "at once")
        rows = [_sized(Row(text, _reasons(UNDECODABLE=_UNREADABLE in text), frozenset([file.name])), options)]
        return Truth(rows, 1)
    if is_csv:
        found = csv_truth(text, _delimiter(file.name, options), options)
        return replace(found, refused="perhaps") if len(text) > most and found.refused == "never" else found
    found = json_truth(text, options, most)
    # Standard input is looked at when its turn comes.
    return replace(found, refused="at once") if found.refused == "at the end" and file.name != "-" else found


def _delimiter(name: str, options: ReadOptions) -> str:
    return {None: "\t" if ".tsv" in name else ",", "\\t": "\t"}.get(options.delimiter, options.delimiter or "")


def _reasons(**holds: bool) -> frozenset[Reason]:
    return frozenset(Reason[name] for name, does in holds.items() if does)


def _sized(row: Row, options: ReadOptions) -> Row:
    """The row, rejected if its text is too large; text goes where there is a reason."""
    if row.text is not None and len(row.text.encode("utf-8", "replace")) > options.max_note_bytes:
        row = replace(row, reasons=row.reasons | {Reason.TOO_LARGE})
    return replace(row, text=None) if row.reasons else row


def json_truth(text: str, options: ReadOptions, most: int) -> Truth:
    """What is to be read from the text of a JSONL file. Lines of more than ``most`` characters are not held."""
    rows: list[Row] = []
    found: list[set[str]] = []
    for line in text.split("\n"):
        if len(line) > most:
            rows.append(Row(reasons=_reasons(TOO_LARGE=True)))
        elif line.strip():
            row, names = json_row(line, options)
            if len(line) >= most - 2:  # just about the limit, which counts line ends and marks
                row = replace(row, reasons=row.reasons | {Reason.TOO_LARGE})
            rows.append(row)
            found += [names] if names is not None else []
    named = {options.text_column, *options.keep} | ({options.id_column} if options.id_column is not None else set())
    if found and named - set().union(*found):
        return Truth(rows, len(rows), "at the end")
    # With a limit, no more objects than that are looked at.
    return Truth(rows, len(rows), "perhaps" if options.limit and any(named - names for names in found) else "never")


def json_row(line: str, options: ReadOptions) -> tuple[Row, set[str] | None]:
    """What a line has to become, and the names of its members where it is a good object."""
    value, pairs = _lenient(line), _strict(line)
    id_column = options.id_column or "note_id"
    note_id, bad_id = id_of(value.get(id_column)) if isinstance(value, dict) else (None, None)
    ids = frozenset([note_id] if note_id else [])
    if _SURROGATE.search(line):
        return Row(reasons=_reasons(UNDECODABLE=True), ids=ids), None
    also = frozenset([bad_id] if bad_id else [])
    surrogates = bool(_SURROGATE.search(json.dumps(pairs if pairs is not _BAD else value, ensure_ascii=False)))
    if pairs is _BAD or surrogates:
        return Row(reasons=_reasons(MALFORMED=True, LONE_SURROGATES=surrogates) | also, ids=ids), None
    if not isinstance(value, dict):
        return Row(reasons=_reasons(NOT_OBJECT=True)), None
    text = value.get(options.text_column)
    missing, null = options.text_column not in value, text is None
    reasons = also | _reasons(
        TEXT_MISSING=missing, TEXT_NULL=null and not missing, TEXT_TYPE=not null and not isinstance(text, str)
    )
    kept = value.get(options.keep[0]) if options.keep else None
    kept = str(kept) if type(kept) is int else kept if isinstance(kept, str) else None
    return _sized(Row(text if isinstance(text, str) else None, reasons, ids, kept), options), set(value)


_BAD = object()


def _lenient(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _strict(line: str) -> Any:
    """Standard JSON with objects as lists of pairs, so that members of one name are all there; else ``_BAD``."""

    def finite(number: str) -> float | int:
        if math.isinf(float(number)):
            raise ValueError
        return float(number)

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(line, object_pairs_hook=list, parse_float=finite, parse_int=finite, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _BAD


def id_of(value: object) -> tuple[str | None, Reason | None]:
    """An id as text, None where there is none, and why it cannot be one."""
    if isinstance(value, bool | list | dict):
        return None, Reason.ID_TYPE
    if isinstance(value, int):
        return (str(value), None) if -(2**63) <= value < 2**64 else (None, Reason.ID_RANGE)
    if isinstance(value, str) and _SURROGATE.search(value):
        return None, Reason.UNDECODABLE
    if isinstance(value, float) and math.isnan(value):
        return None, None
    return (None, None) if value is None or value == "" else (str(value), None)


def _csv_lists(lines: Sequence[str], delimiter: str, *, quotes: bool) -> list[tuple[list[str] | None, int]]:
    """Records, None for one with text behind a closed quote; and how many lines of each are not blank."""
    if not quotes:
        split = [line.rstrip("\r\n") for line in lines]
        return [(line.split(delimiter) if line else [], int(bool(line.strip()))) for line in split]
    records: list[tuple[list[str] | None, int]] = []
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            return records
        except csv.Error:
            fields = None
        records.append((fields, sum(not line.isspace() for line in lines[start : reader.line_num])))


def csv_truth(text: str, delimiter: str, options: ReadOptions) -> Truth:
    """What is to be read from the text of a CSV file."""
    # A last line that cannot be mistaken for anything else becomes a record of its own unless a quote is open.
    end = "fuzz\u2603end"
    lines = io.StringIO(f"{text}\r\n{end}", newline="").readlines()
    records = _csv_lists(lines, delimiter, quotes=options.quotes)
    is_open = records[-1][0] != [end]
    if not is_open:
        del records[-1]
    while records and not records[0][1]:  # blank lines
        del records[0]
    header = (records[0][0] or []) if records else []
    id_column = options.id_column or "note_id"
    named = [options.text_column, *options.keep, *([id_column] if options.id_column is not None else [])]
    if any(name not in header for name in named) or any(header.count(name) > 1 for name in [*named, id_column]):
        return Truth(None, None, "at once")
    if is_open and len(records) == 1:
        return Truth(None, None, "at once")
    if is_open and records[-1][1] > 2:  # with the end
        return Truth(None, None, "at the end")
    rows = []
    for number, (fields, count) in enumerate(records[1:], 2):
        if fields is not None and not count and len(fields) < 2 and len(fields) != len(header):
            continue
        if is_open and number == len(records):
            rows.append(Row(reasons=_reasons(OPEN_QUOTE=True)))
        elif fields is None:
            rows.append(Row(reasons=_reasons(STRAY_QUOTE=count == 1, STRAY_QUOTE_BELOW=count > 1)))
        elif len(fields) != len(header):
            rows.append(Row(reasons=_reasons(WIDTH=True)))
        else:
            record = dict(zip(header, fields, strict=True))
            note_id, reason = id_of(record.get(id_column))
            note = record[options.text_column]
            reasons = frozenset([reason] if reason else []) | _reasons(UNDECODABLE=_UNREADABLE in note)
            kept = record[options.keep[0]] if options.keep else None
            kept = None if kept and _UNREADABLE in kept else kept
            rows.append(_sized(Row(note, reasons, frozenset([note_id] if note_id else []), kept), options))
    return Truth(rows, len(rows))


# ------------------------------------------------------------------------------------------------------ making cases

_WORDS = (
    *("fever", "type 2 diabetes", "no", "of the left foot", "asthma", "heart failure", MARKER, MARKER, "mg", "b.i.d."),
    *("Ödem", "ß", "🤒", "e\u0301", "١٢", "熱", "\u2028", "\x85", "\u200b", "\ufeff", "\ud7ff", "\U0010fffd", "\xa0"),
    *("\n", "\r\n", "\r", "\n\n", "\t", "\0", "\x1f", "\x7f", '"', '""', "'", ",", ";", "|", "\\", "\\n", "{", "}]"),
)
_TOKENS = (
    *(b'"', b'""', b"\0", b"\n", b"\r", b"\r\n", b"\n\n", b",", b"\t", b" ", b"{", b"}", b"[", b"]", b"\\", b"\x1a"),
    *(b"\xff", b"\xc3", b"\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00\xd8", b"\x81"),
    *(b"\\ud800", b"\\u0000", b"\\x", b"NaN", b"1e999", b"null", b'{"text":"x"}', b"[" * 3000, MARKER.encode()),
)
_IDS = (
    *('"A1"', '"b-2"', f'"{MARKER}"', '"ä 🤒"', '""', "null", "7", "7", "007", "-1", "-0", "-0.0", "0.10", "1e3"),
    *("1e400", "9007199254740993", "9223372036854775808", "18446744073709551615", "18446744073709551616", "true", "[]"),
    *(
        "NaN",
        "-9223372036854775809",
        "1" + "0" * 400,
        "1" + "0" * 5000,
        '{"a":[1]}',
        '"\\ud800"',
        '"\\u0000"',
        '"a\\nb"',
    ),
)
_BAD_TEXTS = ("null", "5", "-1.5", '["x"]', '{"text":"x"}', "true", '"\\ud800"', "NaN", '"a\\q"', '"', '"\t"', "")
_BAD_LINES = (
    *("", " ", "\t \t", "\x0b\x0c", "\u2028", "\x1c", "\ufeff", "[]", "null", "17", '"text"', "{", "}", "{}", "nope"),
    *('{"text"', '{"text":', '["text":"x"]', '{"text":"x"}{', '{"text":"x",}', "{'text':'x'}", '{"text":"x"} // no'),
    *("[" * 200, "[" * 100_000, '{"a":' * 5000, "[" * 5000 + "]" * 5000, f'{{"{MARKER}":1}}', "-", "Infinity"),
)
_DEEP = ("[" * 3 + "]" * 3, "[" * 200 + "]" * 200, '{"a":' * 100 + "1" + "}" * 100, "[" * 2000 + "]" * 2000)
_ENCODINGS = ("utf-8",) * 8 + ("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "ascii", "utf-7", "shift_jis")
_MISUSES: tuple[dict[str, Any], ...] = (
    {"delimiter": '"'}, {"delimiter": "::"}, {"max_note_bytes": 0}, {"limit": -1},
    {"keep": ("label",)}, {"keep": ("ward", "ward")},
)  # fmt: skip
_OUTPUTS = ("out", "out", "out.parquet", "out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "-")


def note(rng: random.Random) -> str:
    """A note: words that are mentions, and whatever else has ever stood in one."""
    size = rng.choice((0, 1, 3, 8, 8, 20, 20, 60, 2000 if rng.random() < 0.02 else 5))
    return rng.choice((" ", " ", "")).join(rng.choice(_WORDS) for _ in range(size))


def make_case(seed: int, number: int) -> Case:
    """The case of this number."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(("jsonl", "jsonl", "csv", "csv", "tsv", "parquet", "parquet", "txt", "mixed"))
    read = ReadOptions(
        text_column=rng.choice(("text",) * 9 + ("body",)),
        id_column=rng.choice((None, None, None, None, "note_id", "mrn")),
        encoding=rng.choice(_ENCODINGS),
        delimiter=rng.choice((None,) * 6 + ("\\t", ";", "|", "\x1f", " ", "é")) if kind in ("csv", "tsv") else None,
        keep=rng.choice(((), (), ("ward",))),
        limit=rng.choice((None,) * 15 + (0, 1, 2, 5, 9)),
        max_note_bytes=rng.choice((64 * 2**20,) * 8 + (1, 20, 60, 300)),
        unique_ids=rng.random() < 0.3,
        quotes=random.Random(f"{seed} {number} quotes").random() < 0.9,
    )
    if kind == "txt":
        read = replace(read, id_column=None, keep=()) if rng.random() < 0.95 else read
    misused = rng.random() < 0.02
    whole = rng.random() < 0.3
    makers: dict[str, Callable[..., tuple[File, list[str] | None]]]
    makers = {"jsonl": make_jsonl, "csv": make_csv, "tsv": make_csv, "txt": make_text, "parquet": make_parquet}
    made = []
    for place in range(rng.choice((1, 1, 1, 2, 3))):
        chosen = rng.choice(("jsonl", "csv", "parquet")) if kind == "mixed" else kind
        made.append(makers[chosen](rng, f"{place}.{chosen}", read, whole))
    texts = [texts for _, texts in made]
    planted = [text for some in texts for text in some or ()]
    plain = whole and all(some is not None for some in texts) and read.limit is None
    stdin = kind == "jsonl" and len(made) == 1 and made[0][0].name == "0.jsonl" and rng.random() < 0.2
    return Case(
        kind=kind,
        files=tuple(File("-", file.data, file.truth) if stdin else file for file, _ in made),
        read=replace(read, **rng.choice(_MISUSES)) if misused else read,
        output=rng.choice(_OUTPUTS),
        planted=planted if plain else None,
        form=rng.choice((None, "jsonl")),
        nested=rng.random() < 0.2,
        part_rows=rng.choice((5000, 5000, 3)),
        chunk=rng.choice((sources._CHUNK, 200)) if kind in ("jsonl", "txt") else sources._CHUNK,
        stdin=stdin,
        misused=misused,
    )


def make_jsonl(rng: random.Random, name: str, read: ReadOptions, whole: bool) -> tuple[File, list[str] | None]:
    """Lines that are notes, lines that are nearly so, and lines that are anything else."""
    texts: list[str] = []
    lines: list[str] = []
    for _ in range(rng.choice((0, 1, 2, 6, 6, 30))):
        texts.append(note(rng))
        good = json.dumps(texts[-1], ensure_ascii=rng.random() < 0.4)
        members = [(read.text_column, good), ("note_id", rng.choice(_IDS)), ("mrn", rng.choice(_IDS)), ("x", "1")]
        members.append(("ward", rng.choice((f'"{MARKER}"', '"ICU"', "7", "null", "1e400", '{"n":[1,"ö"]}', "1.0"))))
        if whole:
            members = [(read.text_column, good), ("note_id", str(len(lines))), ("mrn", '"m"'), ("ward", '"ICU"')]
        else:
            members.append(("deep", rng.choice(_DEEP)))
            if rng.random() < 0.3:
                members.append((rng.choice((read.text_column, "note_id")), rng.choice(_BAD_TEXTS)))
            rng.shuffle(members)
            members = members[: rng.choice((2, 4, 6, 7))]
        gap = rng.choice(("", " ", "\t", "\r"))
        line = "{" + ",".join(f'{gap}"{key}"{gap}:{gap}{value}' for key, value in members) + gap + "}"
        lines.append(line if whole or rng.random() < 0.8 else rng.choice(_BAD_LINES))
    text = joined(rng, lines, ("\n", "\r\n") if whole else ("\n", "\r\n", "\n\n", "\r\r\n", "\n \n", "\r"))
    file, intact = packed(rng, name, text, read, whole)
    return file, texts if intact and not read.unique_ids else None


def make_csv(rng: random.Random, name: str, read: ReadOptions, whole: bool) -> tuple[File, list[str] | None]:
    """Records that a writer wrote, some of them of the wrong width, with line ends and quotes of all kinds."""
    header = ["note_id", "mrn", "ward", read.text_column]
    if not whole:
        rng.shuffle(header)
        header = header[: rng.choice((2, 3, 4, 4, 4))] + rng.choice(([], [], [], ["x"], [MARKER], ["", ""], ["text"]))
    sink = io.StringIO(newline="")
    ends = rng.choice(("\n", "\r\n", "\r"))
    # Anything less leaves out quotes around line ends that are not the writer's own.
    quoting: Any = csv.QUOTE_ALL if whole else rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC))
    writer = csv.writer(sink, delimiter=_delimiter(name, read), quoting=quoting, lineterminator=ends)
    if whole or rng.random() < 0.95:
        writer.writerow(header)
    texts = []
    for place in range(rng.choice((0, 1, 2, 6, 6, 30))):
        texts.append(note(rng))
        values = {"note_id": str(place), "mrn": rng.choice(("", "m", MARKER)), "ward": "ICU"}
        values[read.text_column] = texts[-1]
        fields = [values.get(column, rng.choice(("", "y", MARKER))) for column in header]
        if not whole and rng.random() < 0.2:
            fields = fields[: rng.randrange(len(fields) + 1)] + [""] * rng.choice((0, 1, 3))
        writer.writerow(fields)
        if not whole and rng.random() < 0.1:
            sink.write(rng.choice(("\n", "\r\n", "\r", " \n", '"\n', '""\n', f'a"b{MARKER}\n', ",,,\n", "\t\n")))
    file, intact = packed(rng, name, sink.getvalue(), read, whole)
    return file, texts if intact and read.quotes and not read.unique_ids else None


def make_text(rng: random.Random, name: str, read: ReadOptions, whole: bool) -> tuple[File, list[str] | None]:
    """A file that is a note."""
    text = note(rng)
    file, intact = packed(rng, name, text, read, whole)
    # The codec or the reader takes a leading mark for the file's.
    return file, [text] if intact and not text.startswith("\ufeff") and not read.keep and not read.id_column else None


def joined(rng: random.Random, lines: Sequence[str], ends: Sequence[str]) -> str:
    """The lines, each with an end, but for the last one perhaps."""
    text = "".join(line + rng.choice(ends) for line in lines)
    return text.rstrip("\r\n") if rng.random() < 0.3 else text


def packed(rng: random.Random, name: str, text: str, read: ReadOptions, whole: bool) -> tuple[File, bool]:
    """The text as a file, encoded and compressed, and damaged before or after that; and whether it says the same."""
    try:
        data = text.encode(read.encoding)
        intact = whole and data.decode(read.encoding) == text and len(data) <= read.max_note_bytes
    except ValueError:
        data, intact = text.encode(read.encoding, "replace"), False
    if rng.random() < 0.1 and read.encoding == "utf-8":
        data = b"\xef\xbb\xbf" + data
    if not whole and rng.random() < 0.5:
        data = damaged(rng, data)
    suffix = rng.choice((None, None, None, "gz", "zst", "bz2"))
    if suffix is None:
        return File(name, data), intact
    pack = {"gz": lambda part: gzip.compress(part, 1, mtime=0), "bz2": bz2.compress, "zst": zst_frame}[suffix]
    middle = rng.randrange(len(data) + 1)
    parts = [data] if rng.random() < 0.7 else [data[:middle], data[middle:]]
    data = b"".join(map(pack, parts))
    if not whole and rng.random() < 0.4:
        data = damaged(rng, data)
    return File(f"{name}.{suffix}", data), intact


def zst_frame(data: bytes) -> bytes:
    """The data as one Zstandard frame."""
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue().to_pybytes())


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The data with a few bytes flipped, put in, cut out, doubled, moved or lost at the end."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        other = min(len(changed), place + rng.choice((1, 1, 2, 8, 100)))
        match rng.randrange(9):
            case 0 | 1 | 2 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 3 if place < len(changed):
                changed[place] = rng.randrange(256)
            case 4:
                del changed[place:other]
            case 5:
                changed[place:place] = changed[place:other]
            case 6:
                changed[place:other] = bytes(other - place)
            case 7 if rng.random() < 0.5:
                del changed[place:]
            case 8 if rng.random() < 0.2:
                changed = changed[place:] + changed[:place]
            case _:
                changed[place:place] = rng.choice(_TOKENS)
    return bytes(changed)


def make_parquet(rng: random.Random, name: str, read: ReadOptions, whole: bool) -> tuple[File, list[str] | None]:
    """A table whose text, id and kept columns have any type, cut and compressed in any way; its rows are known."""
    size = rng.choice((0, 1, 2, 6, 6, 30))
    texts = [note(rng) for _ in range(size)]
    raw: list[bytes | None] = [text.encode() for text in texts]
    if not whole:
        raw = [None if (draw := rng.random()) < 0.1 else b"a\xff" if draw < 0.2 else value for value in raw]
    text_array = text_column(rng, raw, usable=whole or rng.random() < 0.85)
    if pa.types.is_null(text_array.type):  # usable: every text is missing
        raw = [None] * size
    ids, id_values = id_array(rng, size, usable=whole or rng.random() < 0.85)
    kept, kept_values, carried = kept_array(rng, size)
    columns: list[tuple[str, pa.Array]] = [(read.text_column, text_array), ("ward", kept), ("x", pa.nulls(size))]
    columns += [(id_name, ids) for id_name in ("note_id", "mrn") if whole or rng.random() < 0.8]
    if not whole and rng.random() < 0.05:
        columns.append((rng.choice((read.text_column, "ward", "x", "y.z")), pa.array([MARKER] * size)))
    if not whole:
        rng.shuffle(columns)
    table = pa.Table.from_arrays([array for _, array in columns], names=[column for column, _ in columns])
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=rng.choice((1, 3, 1000)),
        compression=rng.choice(("none", "snappy", "gzip", "zstd", "brotli", "lz4")),
        use_dictionary=rng.random() < 0.7,
        data_page_version=rng.choice(("1.0", "2.0")),
        data_page_size=rng.choice((64, 2**20)),
        write_page_checksum=rng.random() < 0.5,
        store_schema=True,
    )
    data = sink.getvalue()
    if not whole and rng.random() < 0.5:
        data = damaged(rng, data)
        return File(name, data, Truth(None, parquet_rows(data), "perhaps")), None
    names = [column for column, _ in columns]
    id_column = read.id_column or "note_id"
    needed = [read.text_column, *read.keep, *([read.id_column] if read.id_column is not None else [])]
    if (
        any(column not in names for column in needed)
        or any(names.count(column) > 1 for column in [*needed, id_column])
        or not is_usable_text(text_array.type)
        or (id_column in names and id_values is None)
        or (read.keep and not carried)
    ):
        return File(name, data, Truth(None, None, "at once")), None
    if id_column not in names or id_values is None:
        id_values = [None] * size
    rows = [parquet_row(*values, read) for values in zip(raw, id_values, kept_values, strict=True)]
    # Beside a file in which its type differs, a kept column has to be a string.
    truth = Truth(rows, size, "beside others" if read.keep else "never")
    planted = texts if whole and read.max_note_bytes > 2**20 and not read.unique_ids else None
    return File(name, data, truth), planted


def parquet_row(raw: bytes | None, note_id: object, kept: str | None, read: ReadOptions) -> Row:
    """What has to become of a row whose text has these bytes."""
    text_id, reason = id_of(format(note_id, "f") if isinstance(note_id, Decimal) else note_id)
    text = None if raw is None else raw.decode("utf-8", "fuzz")
    reasons = frozenset([reason] if reason else []) | _reasons(
        TEXT_NULL=raw is None, UNDECODABLE=text is not None and _UNREADABLE in text
    )
    return _sized(Row(text, reasons, frozenset([text_id] if text_id else []), kept), read)


def parquet_rows(data: bytes) -> int | None:
    """The number of rows that the file says it has."""
    try:
        return int(pq.read_metadata(pa.BufferReader(data)).num_rows)
    except (OSError, pa.ArrowException, UnicodeError):
        return None


def is_usable_text(kind: pa.DataType) -> bool:
    """Whether a column of this type is text."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return plain in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def text_column(rng: random.Random, raw: list[bytes | None], *, usable: bool) -> pa.Array:
    """The bytes as a column of one of the types that text has, or of another one."""
    if not usable:
        some = [None if value is None else "x" for value in raw]
        return rng.choice(
            [
                pa.array(raw, pa.binary()),
                pa.nulls(len(raw)),
                pa.array([[value] for value in some], pa.list_(pa.string())),
                pa.array([{"text": value} for value in some], pa.struct([("text", pa.string())])),
                pa.array(range(len(raw)), pa.int64()),
                pa.array([[("text", value)] for value in some], pa.map_(pa.string(), pa.string())),
            ]
        )
    kind, binary = rng.choice(
        [(pa.string(), pa.binary()), (pa.large_string(), pa.large_binary()), (pa.string_view(), pa.binary_view())]
    )
    array = pa.array(raw, binary)
    unchecked = pa.Array.from_buffers(kind, len(array), array.buffers(), array.null_count)
    if kind == pa.string() and rng.random() < 0.3:
        places = pa.array([None if value is None else place for place, value in enumerate(raw)], pa.int32())
        return pa.DictionaryArray.from_arrays(places, unchecked.fill_null("x"))
    return unchecked


def id_array(rng: random.Random, size: int, *, usable: bool) -> tuple[pa.Array, list[Any] | None]:
    """A column of ids, and the values that it holds; None where its type cannot be an id's."""
    numbers = [rng.choice((None, 0, 1, 7, 100)) for _ in range(size)]
    if not usable:
        kinds = [pa.bool_(), pa.list_(pa.int64()), pa.timestamp("s"), pa.binary(), pa.struct([("a", pa.int64())])]
        return pa.nulls(size, rng.choice(kinds)), None
    kind = rng.choice([pa.int8(), pa.uint64(), pa.int64(), pa.float64(), pa.decimal128(38, 2), pa.string(), pa.null()])
    if pa.types.is_null(kind):
        return pa.nulls(size), [None] * size
    values: list[Any] = list(numbers)
    if kind == pa.uint64():
        values = [None if value is None else 2**64 - 1 - value for value in numbers]
    elif kind == pa.float64():
        values = [None if value is None else rng.choice((value / 7, math.nan, math.inf, -0.0)) for value in numbers]
    elif kind == pa.decimal128(38, 2):
        values = [None if value is None else Decimal(f"{10**30 + value}.05") for value in numbers]
    elif kind == pa.string():
        values = [None if value is None else rng.choice(("", "a", MARKER, "ä", "0")) for value in numbers]
        if rng.random() < 0.3:
            return pa.array(values, pa.string()).dictionary_encode(), values
    return pa.array(values, kind, from_pandas=False), values


def kept_array(rng: random.Random, size: int) -> tuple[pa.Array, list[str | None], bool]:
    """A column to keep, its values where they are strings, and whether it can be carried into the output."""
    texts = [rng.choice((None, "ICU", MARKER)) for _ in range(size)]
    numbers = [rng.choice((None, 1, 2)) for _ in range(size)]
    raw = pa.array([None if text is None else text.encode() + b"\xff" for text in texts], pa.binary())
    mended = [None if text is None else f"{text}\ufffd" for text in texts]
    unknown: list[str | None] = [None] * size
    return rng.choice(
        [
            (pa.array(texts, pa.string()), texts, True),
            (pa.array(texts, pa.string()).dictionary_encode(), texts, True),
            (pa.array(texts, pa.string_view()), texts, True),
            (pa.Array.from_buffers(pa.string(), size, raw.buffers(), raw.null_count), mended, True),
            (raw, unknown, True),
            (pa.array(numbers, pa.int16()), unknown, True),
            (pa.array(numbers, pa.timestamp("us", "UTC")), unknown, True),
            (pa.array(numbers, pa.date32()), unknown, True),
            (pa.array(numbers, pa.duration("s")), unknown, True),
            (pa.array(numbers, pa.int64()).cast(pa.decimal128(21, 2)), unknown, True),
            (pa.array([[text] for text in texts], pa.list_(pa.string())), unknown, True),
            (pa.array([{"a": number} for number in numbers], pa.struct([("a", pa.int8())])), unknown, True),
            (pa.nulls(size), unknown, True),
            (pa.array([[text] for text in texts], pa.list_(pa.string_view())), unknown, False),
        ]
    )


# ------------------------------------------------------------------------------------------------- running and judging


class Hung(BaseException):
    """A case took too long. No Exception, so that nothing catches it."""


@contextmanager
def guarded() -> Iterator[None]:
    """Raise in a case that takes too long, and end the process, telling where it is, if even that does not help."""

    def ring(*_: object) -> None:
        raise Hung(f"more than {GUARD_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, GUARD_SECONDS)
    faulthandler.dump_traceback_later(3 * GUARD_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case, folder: Path, annotator: Annotator, report: Report) -> None:
    """Run the case in an empty folder. Raises AssertionError where the run does not what it has to."""
    inputs, outputs = folder / "in", folder / "out"
    inputs.mkdir(parents=True)
    outputs.mkdir()
    if not case.stdin:
        for file in case.files:
            (inputs / file.name).write_bytes(file.data)
    truths = [] if case.misused else [truth_of(file, case.read, case.chunk) for file in case.files]
    output = case.output if case.output == "-" else str(outputs / case.output)
    single = case.output != "out"
    options = RunOptions(
        ("-",) if case.stdin else (str(inputs),),
        output,
        model="tiny",
        form=None if single else case.form,
        read=case.read,
        part_rows=case.part_rows,
        nested=case.nested,
        quiet=True,
    )
    stdout = io.BytesIO()
    report.cases[case.kind] += 1
    refusal: MednerError | None = None
    with (
        mock.patch.object(Annotator, "load", return_value=annotator),
        mock.patch.object(sources, "_CHUNK", case.chunk),
        mock.patch("os.fsync"),  # most of the time of a small run, for what is thrown away
    ):
        try:
            manifest = run(options, io.BytesIO(case.files[0].data), stdout)
        except MednerError as exc:
            refusal = exc
    if refusal is not None:
        judge_error(refusal)
        report.outcomes[case.kind, f"exit {refusal.exit_code}"] += 1
        assert case.misused == isinstance(refusal, UsageError), f"whose fault: {refusal}"
        beside = "never" if len(case.files) > 1 else "beside others"
        reasons = {truth.refused for truth in truths} - {"never", beside}
        assert case.misused or reasons, f"refused, though all is well: {refusal}"
        assert not single or not list(outputs.iterdir()), "an output without its end"
        assert not list(outputs.glob("*/manifest.json")), "a manifest of an unfinished run"
        return
    assert not case.misused, "finished, though the call was wrong"
    late = "at the end" if case.read.limit is None else "at once"
    assert all(truth.refused not in ("at once", late) for truth in truths), "finished, though it had to be refused"
    notes, spans = written(outputs / case.output, case, stdout.getvalue())
    texts = judge_rows(case, truths, notes)
    judge_spans(case, notes, spans, texts)
    judge_manifest(case, manifest, notes, spans)
    rejected = Counter(row["reason"] for row in notes if row["reason"])
    report.outcomes[case.kind, "finished"] += 1
    report.outcomes[case.kind, "annotated"] += len(notes) - rejected.total()
    for reason, count in rejected.items():
        report.outcomes[case.kind, reason] += count
    code = 0
    try:
        check_rejected(manifest)
    except TooManyRejected as exc:
        judge_error(exc)
        code = exc.exit_code
    report.outcomes[case.kind, f"exit {code}"] += 1
    assert code == (3 if rejected else 0), f"exit {code} with {rejected.total()} rows rejected"


def judge_error(exc: MednerError) -> None:
    """An error has a message of a line or two without anything from the file, and the right exit code."""
    message = str(exc)
    assert type(exc) in (InputError, UsageError, TooManyRejected), f"{type(exc).__name__}: {message}"
    assert MARKER not in message, "the message holds a value"
    assert message.count("\n") <= 1, "the message is long"
    assert len(message) < 1000, "the message is long"
    assert message.isprintable() or "\n" in message, "the message holds control characters"


def written(path: Path, case: Case, stdout: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of both tables as they were written; of a stream, its records in the place of notes."""
    if case.output == "-":
        notes = [json.loads(line) for line in stdout.splitlines()]
        return notes, [{**note, **span} for note in notes for span in note["spans"] or ()]
    if case.output == "out":
        spans, notes = (
            [row for file in sorted((path / name).iterdir()) for row in table(file)] for name in ("spans", "notes")
        )
    else:
        suffix = case.output.removeprefix("out")
        spans, notes = table(path), table(path.with_name(f"out.notes{suffix}"))
    if not case.nested:
        return notes, spans
    assert [(row["source"], row["row"]) for row in spans] == [(row["source"], row["row"]) for row in notes]
    assert [row["spans"] is None for row in spans] == [row["reason"] is not None for row in notes]
    return notes, [{**row, **span} for row in spans for span in row["spans"] or ()]


def table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of either format."""
    if path.suffix == ".parquet":
        return cast(list[dict[str, Any]], pq.read_table(path).to_pylist())
    return [json.loads(line) for line in unpacked(path.read_bytes(), path.name).splitlines()]


def judge_rows(case: Case, truths: Sequence[Truth], notes: Sequence[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Every record is a row in its place, a note or rejected, as the second reader has it; gives the known texts."""
    left = math.inf if case.read.limit is None else case.read.limit
    texts: dict[tuple[str, int], str] = {}
    seen: set[str] = set()
    rest = list(notes)
    for file, truth in zip(case.files, truths, strict=True):
        got = [row for row in rest if row["source"] == file.name]
        assert rest[: len(got)] == got, "the rows of a file do not follow one another"
        rest = rest[len(got) :]
        assert [row["row"] for row in got] == list(range(len(got))), "rows are not counted from 0"
        assert len(got) <= left, "more rows than --limit"
        if truth.count is not None:
            wanted = int(min(left, truth.count))
            assert len(got) == wanted, f"{file.name}: {len(got)} rows of {wanted}"
        left -= len(got)
        for row, right in zip(got, truth.rows if truth.rows is not None else repeat(None), strict=False):
            place = f"{file.name}:{row['row']}"
            repeated = case.read.unique_ids and row["note_id"] in seen
            seen.add(row["note_id"])
            judge_row(place, row, right, repeated)
            if right is not None and right.text is not None and not row["reason"]:
                texts[file.name, row["row"]] = right.text
                if "ward" in row and right.kept is not None:
                    assert row["ward"] == right.kept, f"{place}: another kept value"
    assert not rest, "rows of no file"
    if case.planted is not None and case.read.max_note_bytes > 2**20 and not case.read.unique_ids:
        assert list(texts.values()) == case.planted, "other texts than were written"
    return texts


def judge_row(place: str, row: dict[str, Any], right: Row | None, repeated: bool) -> None:
    """A row keeps the rules of all rows, and is what the second reader has it to be."""
    reason = row["reason"]
    assert row["status"] == ("rejected" if reason else "annotated"), f"{place}: {row['status']} for {reason}"
    assert reason is None or reason in set(Reason), f"{place}: no such reason: {reason}"
    assert bool(row["note_id"]), f"{place}: no id"
    counts = [value for name, value in row.items() if name.startswith("n_")]
    assert not (reason and (any(counts) or row.get("text_sha256"))), f"{place}: rejected with counts"
    assert not (repeated and reason is None), f"{place}: a repeated id"
    assert repeated or reason != Reason.REPEATED_ID, f"{place}: no repeated id"
    if right is None:
        return
    if reason is None:
        assert right.text is not None, f"{place}: annotated, not rejected for {sorted(right.reasons)}"
        assert {row["note_id"]} == (right.ids or {place}), f"{place}: another id"
        if "n_chars" in row:
            assert row["n_chars"] == len(right.text), f"{place}: {row['n_chars']} characters, not {len(right.text)}"
            assert row["text_sha256"] == hashlib.sha256(right.text.encode()).hexdigest(), f"{place}: another text"
    else:
        assert reason in right.reasons or repeated, f"{place}: {reason}, not {sorted(right.reasons) or 'annotated'}"
        assert row["note_id"] in right.ids | {place}, f"{place}: another id"


def judge_spans(
    case: Case,
    notes: Sequence[dict[str, Any]],
    spans: Sequence[dict[str, Any]],
    texts: dict[tuple[str, int], str],
) -> None:
    """Each span is what stands at its place, in order, and no fever that stands alone was passed over."""
    places = {(row["source"], row["row"]): place for place, row in enumerate(notes)}
    keys = [(row["source"], row["row"]) for row in spans]
    assert [(places[key], row["start"]) for key, row in zip(keys, spans, strict=True)] == sorted(
        (places[key], row["start"]) for key, row in zip(keys, spans, strict=True)
    ), "spans are out of order"
    counts = Counter(keys)
    for row in notes:
        key = row["source"], row["row"]
        assert row.get("n_spans", counts[key]) == counts[key], "n_spans is not the number of spans"
        assert not (row["reason"] and counts[key]), "spans of a rejected row"
    covered = {key: set[int]() for key in places}
    for key, row in zip(keys, spans, strict=True):
        assert 0 <= row["start"] < row["end"], "an empty span"
        covered[key].update(range(row["start"], row["end"]))
        if key in texts:
            assert texts[key][row["start"] : row["end"]] == row["text"], "a span is not what stands at its place"
    for key, text in texts.items():
        for match in re.finditer(r"(?<![^ \n])fever(?![^ \n])", text):
            assert match.start() in covered[key], "a mention was passed over"


def judge_manifest(
    case: Case, manifest: dict[str, Any], notes: Sequence[dict[str, Any]], spans: Sequence[dict[str, Any]]
) -> None:
    """The counts are those of the tables, the hashes those of the files, and nothing is told of the notes."""
    counts = manifest["counts"]
    rejected = sum(row["reason"] is not None for row in notes)
    found = (counts["rows"], counts["annotated"], counts["rejected"], counts["spans"])
    assert found == (len(notes), len(notes) - rejected, rejected, len(spans)), "counts do not reconcile"
    assert MARKER not in json.dumps(manifest), "the manifest holds a value"
    read = manifest["inputs"]
    assert sum(one.get("rows", one.get("text_files", 0)) for one in read) == len(notes), "inputs do not reconcile"
    for one in read:
        if one.get("sha256") and "text_files" not in one:
            data = next(file.data for file in case.files if file.name == one["source"])
            assert one["sha256"] == hashlib.sha256(data).hexdigest(), "another hash"
    assert case.read.limit is not None or all(one["sha256"] for one in read), "a file that was not read to its end"


def fuzz(seed: int, numbers: Sequence[int], folder: Path, annotator: Annotator, report: Report) -> None:
    """Run these cases; what fails is reported with its number. A failing case keeps its folder."""
    for number in numbers:
        case = make_case(seed, number)
        place = folder / str(number)
        try:
            with guarded():
                judge(case, place, annotator, report)
        except (Exception, Hung) as exc:
            what = f"{type(exc).__name__}: {exc}"
            report.failures.append(f"--seed {seed} --only {number}: {case.kind} {case.read} {case.output}: {what}")
        else:
            shutil.rmtree(place)


def summary(report: Report) -> str:
    """The report as a table: a line for each outcome, a column for each format."""
    kinds = sorted(report.cases)
    firsts = ["exit 0", "exit 3", "exit 2", "exit 4", "finished", "annotated"]
    names = [*firsts, *sorted({name for _, name in report.outcomes} - set(firsts))]
    lines = [("cases", [report.cases[kind] for kind in kinds])]
    lines += [(name, [report.outcomes[kind, name] for kind in kinds]) for name in names]
    head = " " * 28 + "".join(f"{kind:>9}" for kind in kinds) + f"{'all':>10}"
    return "\n".join([head, *(f"{name:<28}" + "".join(f"{n:>9}" for n in ns) + f"{sum(ns):>10}" for name, ns in lines)])


def main() -> int:
    """Run the cases that the arguments name; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    faulthandler.enable()
    numbers = range(given.first, given.first + given.cases) if given.only is None else [given.only]
    folder = Path(tempfile.mkdtemp(prefix="medner-fuzz-"))
    report = Report()
    fuzz(given.seed, numbers, folder, testing.annotator(Options(threads=1)), report)
    print(f"seed {given.seed}, cases {numbers[0]} to {numbers[-1]}")
    print(summary(report))
    for failure in report.failures:
        print(failure)
    if report.failures:
        print(f"{len(report.failures)} cases failed; their files are in {folder}")
        return 1
    folder.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
