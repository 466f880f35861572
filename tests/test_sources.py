"""Reading notes: which rows come out of which bytes, and which error or reason comes out of bad ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import math
import os
import random
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medner import sources
from medner.errors import InputError, MednerError, UsageError
from medner.sources import Discovery, InputFile, Reader, ReadOptions, Reason, discover

KNOWN = ".jsonl .ndjson .csv .tsv .txt, each also with .gz .zst .bz2, and .parquet"
Row = dict[str, Any]


def pack(data: bytes, suffix: str) -> bytes:
    """The data as one member or frame of the compression that the suffix names."""
    codec: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zst_frame}
    return codec[suffix](data)


def zst_frame(data: bytes) -> bytes:
    """The data as one Zstandard frame."""
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue().to_pybytes())


def write(path: Path, data: str | bytes) -> Path:
    """Write a file with its folders; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_jsonl(path: Path, *records: Any) -> Path:
    """Write a JSON line for each record."""
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path: Path, **columns: Any) -> Path:
    """Write a Parquet file of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def reader(*paths: Path | str, stdin: io.BytesIO | None = None, **options: Any) -> Reader:
    """A reader of what the paths name."""
    return Reader(discover([str(path) for path in paths]).files, ReadOptions(**options), stdin)


def read(*paths: Path | str, stdin: io.BytesIO | None = None, **options: Any) -> list[Row]:
    """All rows as dicts, with each batch checked against the schema and the rules for every row."""
    source = reader(*paths, stdin=stdin, **options)
    rows: list[Row] = []
    for batch in source.batches():
        assert batch.schema == source.schema
        batch.validate(full=True)
        assert 0 < batch.num_rows <= sources.BATCH_ROWS
        rows += batch.to_pylist()
    assert all((row["text"] is None) == (row["reason"] is not None) for row in rows)
    assert all(row["note_id"] for row in rows)
    assert {row["reason"] for row in rows} - {None} <= set(Reason)
    return rows


def brief(rows: Sequence[Row]) -> list[tuple[str, str | None]]:
    """Each row's id, and its text or the reason why it has none."""
    return [(row["note_id"], row["text"] if row["reason"] is None else row["reason"]) for row in rows]


def refused(kind: type[MednerError], call: Callable[[], Any]) -> str:
    """The whole message of the error that the call raises."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def invalid(values: Sequence[bytes | None], kind: pa.DataType) -> pa.Array:
    """A string array whose bytes are not checked."""
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}[kind]
    array = pa.array(values, binary)
    return pa.Array.from_buffers(kind, len(array), array.buffers(), array.null_count)


# ---------------------------------------------------------------------------------------------------- finding files


def test_directory_is_read_recursively_sorted_without_hidden_files(tmp_path: Path) -> None:
    """Sources are paths relative to the directory, sorted; hidden names are skipped, unknown suffixes counted."""
    for name in ("b.jsonl", "a/z.CSV", "a/x.parquet", "a-1.ndjson.GZ", "c.tsv.zst", ".h.jsonl", ".d/x.jsonl", "n.docx"):
        write(tmp_path / name, "")
    found = discover([str(tmp_path)])
    assert [(file.source, file.kind, file.compression) for file in found.files] == [
        ("a-1.ndjson.GZ", "jsonl", "gz"),
        ("a/x.parquet", "parquet", None),
        ("a/z.CSV", "csv", None),
        ("b.jsonl", "jsonl", None),
        ("c.tsv.zst", "csv", "zst"),
    ]
    assert found.files[1].path == tmp_path / "a/x.parquet"
    assert found.skipped == 1


def test_file_glob_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is called by its name, a glob's file relative to the base of the glob, standard input is JSONL."""
    for name in ("one.jsonl", "d/two.jsonl", "d/e/three.jsonl.bz2", "d/e/notes.doc"):
        write(tmp_path / name, "")
    monkeypatch.chdir(tmp_path)
    assert discover(["d/two.jsonl", "-"]) == Discovery(
        (InputFile(Path("d/two.jsonl"), "two.jsonl", "jsonl", None), InputFile(None, "-", "jsonl", None)), 0
    )
    assert [file.source for file in discover(["*.jsonl"]).files] == ["one.jsonl"]
    assert [file.source for file in discover(["d/**/*"]).files] == ["e/three.jsonl.bz2", "two.jsonl"]
    assert discover(["d/**/*"]).skipped == 1
    assert [file.source for file in discover([f"{tmp_path}/d/*/*.bz2"]).files] == ["e/three.jsonl.bz2"]


def test_directories_that_a_glob_matches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the same directories given by the shell are; each file once, and hidden ones not."""
    for name in ("2024-01/x.jsonl", "2024-02/deep/y.jsonl", "2024-02/.z.jsonl", "2024-all.jsonl", "2023/a.jsonl"):
        write(tmp_path / name, "")
    monkeypatch.chdir(tmp_path)
    expected = ["2024-01/x.jsonl", "2024-02/deep/y.jsonl", "2024-all.jsonl"]
    assert [file.source for file in discover(["2024-*"]).files] == expected
    assert [file.source for file in discover(["**"]).files] == ["2023/a.jsonl", *expected]
    assert discover(["**"]).skipped == 0


@pytest.mark.parametrize("pattern", ["d/**/*.jsonl", "d/*/*.jsonl", "*/secret/*", "d/*"])
def test_a_directory_that_a_glob_cannot_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """It is named, where ``glob`` passes it over and its notes would be missing without a word."""
    for name in ("d/secret/x.jsonl", "d/open/y.jsonl"):
        write(tmp_path / name, "")
    monkeypatch.chdir(tmp_path)
    if os.geteuid():
        Path("d/secret").chmod(0)
    else:  # whom nothing is forbidden
        able, listed = os.access, Path.iterdir

        def iterdir(path: Path) -> Any:
            if path.name == "secret":
                raise PermissionError(13, "Permission denied", path)
            return listed(path)

        monkeypatch.setattr(os, "access", lambda path, mode: able(path, mode) and not str(path).endswith("secret"))
        monkeypatch.setattr(Path, "iterdir", iterdir)
    said = refused(InputError, lambda: discover([pattern]))
    Path("d/secret").chmod(0o700)
    assert said == "cannot read d/secret: Permission denied"


def test_a_name_with_wildcards_that_exists_is_a_file(tmp_path: Path) -> None:
    """A file whose name looks like a glob is read as that file."""
    path = write(tmp_path / "notes[1].jsonl", "")
    assert [file.source for file in discover([str(path)]).files] == ["notes[1].jsonl"]


def test_loops_of_links_end(tmp_path: Path) -> None:
    """Linked directories are followed, but not round in circles."""
    write(tmp_path / "real/a.jsonl", "")
    (tmp_path / "real/back").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "far/b.jsonl", "")
    (tmp_path / "real/far").symlink_to(tmp_path / "far", target_is_directory=True)
    assert [file.source for file in discover([str(tmp_path / "real")]).files] == ["a.jsonl", "far/b.jsonl"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """A link to itself or to nothing is an error that names it; one to a pipe, like a pipe, is passed over."""
    write(tmp_path / "d/a.jsonl", "")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "d/p.jsonl").symlink_to(tmp_path / "pipe")
    assert [(f.files[0].source, len(f.files), f.skipped) for f in [discover([str(tmp_path / "d")])]] == [
        ("a.jsonl", 1, 1)
    ]
    for target, said in (("x.jsonl", "Too many levels of symbolic links"), ("none", "No such file or directory")):
        (tmp_path / "d/x.jsonl").symlink_to(target)
        assert refused(InputError, lambda: read(tmp_path / "d")) == f"cannot read {tmp_path}/d/x.jsonl: {said}"
        (tmp_path / "d/x.jsonl").unlink()


@pytest.mark.parametrize("late", [False, True])
def test_what_a_stream_has_behind_the_limit(late: bool) -> None:
    """How much of it came along is chance: neither its bytes nor a hash are on record."""

    class Stream(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read1(24 if late else size)

    given = sources.Reader(discover(["-"]).files, ReadOptions(limit=2), Stream(b'{"text": "Fever."}\n' * 9))
    assert sum(batch.num_rows for batch in given.batches()) == 2
    assert given.inputs() == [{"source": "-", "bytes": None, "sha256": None, "rows": 2}]


def test_file_name_that_is_no_utf8(tmp_path: Path) -> None:
    """Such a name becomes a source that can be written, with the bytes as escapes."""
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.jsonl")).write_text('{"text": "Cough."}\n')
    except OSError:
        pytest.skip("the file system refuses such names")
    assert [row["source"] for row in read(tmp_path)] == ["n\\xff.jsonl"]


def test_inputs_that_cannot_be_found(tmp_path: Path) -> None:
    """A missing file, an empty directory and a glob without a match are input errors that name the argument."""
    write(tmp_path / "d/scan.pdf", "")
    assert refused(InputError, lambda: discover(["nowhere.jsonl"])) == "nowhere.jsonl: no such file or directory"
    assert refused(InputError, lambda: discover([f"{tmp_path}/d"])) == (
        f"{tmp_path}/d: no file to read (1 of unknown suffix); medner reads {KNOWN}"
    )
    assert refused(InputError, lambda: discover([f"{tmp_path}/*.csv"])) == (
        f"{tmp_path}/*.csv: no file to read (0 of unknown suffix); medner reads {KNOWN}"
    )


def test_an_empty_argument_is_not_the_current_directory() -> None:
    """A shell variable that is not set does not make medner read everything that lies about."""
    assert refused(UsageError, lambda: discover([""])) == "an INPUT is empty; name a file, a directory, a glob or -"


def test_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system says about a directory becomes an input error."""

    def deny(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)
    assert refused(InputError, lambda: discover([str(tmp_path)])) == f"cannot read {tmp_path}: Permission denied"


@pytest.mark.parametrize("name", ["notes.docx", "notes", "notes.parquet.gz", "notes.gz"])
def test_named_file_of_unknown_suffix(tmp_path: Path, name: str) -> None:
    """A file that is named itself must have a known suffix; Parquet compresses on its own."""
    path = write(tmp_path / name, "")
    assert refused(UsageError, lambda: discover([str(path)])) == f"{path}: unknown suffix; medner reads {KNOWN}"


def test_text_files_among_tables(tmp_path: Path) -> None:
    """One INPUT holds either text files or tables; two INPUTs may hold one each."""
    write(tmp_path / "a.txt.gz", gzip.compress(b"Asthma."))
    write_jsonl(tmp_path / "b.jsonl", {"text": "Gout."})
    assert refused(UsageError, lambda: discover([str(tmp_path)])) == (
        f"{tmp_path} holds .txt files and tables; pass them as separate inputs, such as globs"
    )
    assert [row["text"] for row in read(f"{tmp_path}/*.txt.gz", f"{tmp_path}/*.jsonl")] == ["Asthma.", "Gout."]


def test_sources_that_would_be_the_same(tmp_path: Path) -> None:
    """(source, row) is a key: two files of one source, and one file given twice, are refused."""
    one, two = write(tmp_path / "x/n.jsonl", ""), write(tmp_path / "y/n.jsonl", "")
    message = "two inputs would both be called n.jsonl; pass their common directory instead"
    assert refused(UsageError, lambda: discover([str(one), str(two)])) == message
    for inputs in ([str(one), str(one)], [str(tmp_path), str(one)]):
        assert (
            refused(UsageError, lambda inputs=inputs: discover(inputs)) == f"{one} is given twice; pass each file once"
        )
    for address in ("s3://bucket/notes", "https://host/*.jsonl"):
        assert refused(UsageError, lambda address=address: discover([address])) == (
            f"{address}: medner reads local files; copy it here, or pipe JSON lines into -"
        )
    assert refused(UsageError, lambda: discover(["-", "-"])) == "standard input is given twice; pass each file once"


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "klingon"}, "--encoding klingon: no encoding of text that Python knows"),
        ({"encoding": "base64"}, "--encoding base64: no encoding of text that Python knows"),
        ({"encoding": "idna"}, "--encoding idna: no encoding of text that Python knows"),
        ({"delimiter": ";;"}, "--delimiter must be one character, or \\t for a tab, and no quote or line end"),
        ({"delimiter": '"'}, "--delimiter must be one character, or \\t for a tab, and no quote or line end"),
        ({"delimiter": ""}, "--delimiter must be one character, or \\t for a tab, and no quote or line end"),
        ({"max_note_bytes": 0}, "--max-note-bytes must lie between 1 and 2147483647"),
        ({"max_note_bytes": 2**31}, "--max-note-bytes must lie between 1 and 2147483647"),
        ({"limit": -1}, "--limit must not be negative"),
        ({"delimiter": "\udcff"}, "--delimiter '\\udcff' is no valid Unicode"),
        ({"encoding": "\udcff"}, "--encoding '\\udcff' is no valid Unicode"),
        ({"text_column": "a\udcff"}, "--text-column 'a\\udcff' is no valid Unicode"),
        ({"id_column": "\ud800"}, "--id-column '\\ud800' is no valid Unicode"),
        ({"keep": ("ward", "\udcff")}, "--keep '\\udcff' is no valid Unicode"),
        ({"keep": ("label",)}, "--keep label: that is a name of medner's own columns; rename it in the input"),
        ({"keep": ("ward", "ward")}, "a column was kept twice; name each --keep once"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    """A wrong option is a usage error before any file is read."""
    assert refused(UsageError, lambda: Reader((), ReadOptions(**options))) == message


# ------------------------------------------------------------------------------------------------------------ JSONL


def test_jsonl_rows_and_ids(tmp_path: Path) -> None:
    """Rows count records and not blank lines; ids are exact text, and SOURCE:ROW where there is none."""
    path = write(
        tmp_path / "n.jsonl",
        '{"note_id": "A1", "text": "Chronic cough.\\r\\nFever."}\r\n'
        "\n  \t\n"
        '{"note_id": 9007199254740993, "text": ""}\n'
        '{"note_id": 18446744073709551615, "text": "a"}\n'
        '{"note_id": -9223372036854775808, "text": "b"}\n'
        '{"note_id": 12.0, "text": "c"}\n'
        '{"note_id": null, "text": "d"}\n'
        '{"text": "e", "text": "last"}\n'
        '{"note_id": "", "text": "f"}',
    )
    rows = read(path)
    assert [row["row"] for row in rows] == list(range(8))
    assert {row["source"] for row in rows} == {"n.jsonl"}
    assert brief(rows) == [
        ("A1", "Chronic cough.\r\nFever."),
        ("9007199254740993", ""),
        ("18446744073709551615", "a"),
        ("-9223372036854775808", "b"),
        ("12.0", "c"),
        ("n.jsonl:5", "d"),
        ("n.jsonl:6", "last"),
        ("n.jsonl:7", "f"),
    ]


@pytest.mark.parametrize(
    ("line", "note_id", "reason"),
    [
        (b'{"note_id": "A", "text": "x"', "n.jsonl:1", "malformed JSON"),
        (b"[" * 100_000, "n.jsonl:1", "malformed JSON"),
        (b'{"a":' * 100_000, "n.jsonl:1", "malformed JSON"),
        (b'{"note_id": "A", "text": NaN}', "A", "malformed JSON"),
        (b'{"note_id": "A", "text": "x"} {}', "n.jsonl:1", "malformed JSON"),
        (b'{"note_id": "A", "text": "a\0b"}', "n.jsonl:1", "malformed JSON"),
        (b'["text"]', "n.jsonl:1", "JSON is not an object"),
        (b"null", "n.jsonl:1", "JSON is not an object"),
        (b'{"note_id": "A"}', "A", "text is missing"),
        (b'{"note_id": "A", "text": null}', "A", "text is null"),
        (b'{"note_id": "A", "text": ["x"]}', "A", "text is not a string"),
        (b'{"note_id": "A", "text": 5}', "A", "text is not a string"),
        (b'{"note_id": "A", "text": "caf\xe9"}', "A", "undecodable bytes"),
        (b'{"note_id": "A\xff", "text": "x"}', "n.jsonl:1", "undecodable bytes"),
        (b'{"note_id": "A", "text": "\xed\xa0\x80"}', "A", "undecodable bytes"),
        (b'{"note_id": "A", "text": "x\\ud800y"}', "A", "lone surrogates"),
        (b'{"note_id": "A", "text": "x", "by": "\\udfff"}', "A", "lone surrogates"),
        (b'{"note_id": 18446744073709551616, "text": "x"}', "n.jsonl:1", "id is beyond 64 bits"),
        (b'{"note_id": -9223372036854775809, "text": "x"}', "n.jsonl:1", "id is beyond 64 bits"),
        (b'{"note_id": 1' + b"0" * 400 + b', "text": "x"}', "n.jsonl:1", "id is beyond 64 bits"),
        (b'{"note_id": 1' + b"0" * 5000 + b', "text": "x"}', "n.jsonl:1", "malformed JSON"),
        (b'{"note_id": true, "text": "x"}', "n.jsonl:1", "id is not a string or number"),
        (b'{"note_id": {"a": 1}, "text": "x"}', "n.jsonl:1", "id is not a string or number"),
        (b'{"note_id": [], "text": "x"}', "n.jsonl:1", "id is not a string or number"),
        (b'{"note_id": "A", "text": "' + b"x" * 101 + b'"}', "A", "note is too large"),
        (b'{"note_id": "A", "text": "' + "é".encode() * 51 + b'"}', "A", "note is too large"),
    ],
)
def test_jsonl_rejections(tmp_path: Path, line: bytes, note_id: str, reason: str) -> None:
    """A bad line is one rejected row with its id where that can be read; the lines around it are whole."""
    path = write(tmp_path / "n.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    expected = [("n.jsonl:0", "before"), (note_id, reason), ("n.jsonl:2", "after")]
    assert brief(read(path, max_note_bytes=100)) == expected


def test_float_ids_beyond_integers_stay_floats(tmp_path: Path) -> None:
    """A large id written as a float is no integer and stays text."""
    assert brief(read(write(tmp_path / "n.jsonl", '{"note_id": 1e30, "text": "x"}\n'))) == [("1e+30", "x")]


def test_byte_order_marks(tmp_path: Path) -> None:
    """A file's leading mark is dropped, once; marks within text stay."""
    mark = "\ufeff"
    write(tmp_path / "j/n.jsonl", f'{mark}{{"text": "{mark}Pain{mark}"}}\n')
    write(tmp_path / "c/n.csv", f"{mark}text\n{mark}Pain{mark}\n")
    write(tmp_path / "t/n.txt", f"{mark}{mark}Pain{mark}")
    for folder in "jct":
        assert [row["text"] for row in read(tmp_path / folder)] == [f"{mark}Pain{mark}"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"])
@pytest.mark.parametrize("name", ["n.jsonl", "n.csv", "n.txt"])
def test_unicode_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    """Each encoding is split into lines after decoding, and its leading byte-order mark is no text."""
    note = "Übelkeit\u0a0d seit 2\u00a0Tagen 🤒,\ufeff"
    body = {"n.jsonl": json.dumps({"text": note}, ensure_ascii=False) + "\n", "n.csv": f'text\r\n"{note}"\r\n'}
    content = body.get(name, note)
    marked = content if "".encode(encoding) else "\ufeff" + content
    path = write(tmp_path / name, marked.encode(encoding))
    assert [row["text"] for row in read(path, encoding=encoding)] == [note]


def test_legacy_encoding_and_bytes_it_does_not_have(tmp_path: Path) -> None:
    """Windows-1252 is decoded where it is named; a byte that it leaves open rejects its row alone."""
    path = write(tmp_path / "n.csv", b"note_id,text\n1,caf\xe9 \x80\n2,\x81\n3,ok\n")
    assert brief(read(path, encoding="windows-1252")) == [("1", "café €"), ("2", "undecodable bytes"), ("3", "ok")]
    line = b'{"text": "caf\xe9"}\n{"text": "\x81"}\n'
    rows = read(write(tmp_path / "n.jsonl", line), encoding="cp1252")
    assert [row["text"] or row["reason"] for row in rows] == ["café", "undecodable bytes"]


@pytest.mark.parametrize("name", ["n.jsonl", "n.csv", "n.txt"])
def test_utf16_without_its_mark(tmp_path: Path, name: str) -> None:
    """Where the encoding asks for a byte-order mark that is not there, the message says what to name instead."""
    path = write(tmp_path / name, '{"text": "a"}\n'.encode("utf-16-le"))
    assert refused(InputError, lambda: read(path, encoding="utf-16")) == (
        f"cannot read {path}: its text is not as --encoding says; "
        "name another encoding, such as utf-16-le for UTF-16 without a byte-order mark"
    )


def test_damaged_utf16(tmp_path: Path) -> None:
    """Half a surrogate pair or half a code unit in UTF-16 rejects its row alone."""
    data = '{"text": "a"}\n{"text": "b'.encode("utf-16-le") + b"\x00\xd8" + '"}\n{"text": "c"}\n'.encode("utf-16-le")
    rows = read(write(tmp_path / "n.jsonl", data + b"\x7b"), encoding="utf-16-le")
    assert [row["text"] or row["reason"] for row in rows] == ["a", "undecodable bytes", "c", "undecodable bytes"]


def test_jsonl_column_in_none_of_the_first_objects(tmp_path: Path) -> None:
    """A column that none of the first 1,000 objects has is an input error; one that the last of them has is not."""
    other = [{"body": "x"}] * 999
    late = write_jsonl(tmp_path / "late.jsonl", *other, {"text": "y"}, {"body": "z"})
    reasons = [row["reason"] for row in read(late)]
    assert reasons == [*["text is missing"] * 999, None, "text is missing"]
    later = write_jsonl(tmp_path / "later.jsonl", *other, {}, {"text": "y"})
    assert refused(InputError, lambda: read(later)) == (
        f"{later} has no column 'text' in its first 1000 objects; name another with --text-column"
    )
    short = write_jsonl(tmp_path / "short.jsonl", {"body": "x"}, {"body": "y"})
    assert refused(InputError, lambda: read(short)) == (
        f"{short} has no column 'text' in its first 2 objects; name another with --text-column"
    )
    # With a limit it is the same objects that tell.
    assert [row["reason"] for row in read(late, limit=5)] == ["text is missing"] * 5
    assert refused(InputError, lambda: read(later, limit=5)) == (
        f"{later} has no column 'text' in its first 1000 objects; name another with --text-column"
    )
    assert refused(InputError, lambda: read(short, limit=1)) == (
        f"{short} has no column 'text' in its first 2 objects; name another with --text-column"
    )
    assert refused(InputError, lambda: read(short, text_column="body", id_column="mrn")) == (
        f"{short} has no column 'mrn' in its first 2 objects; name another with --id-column"
    )


def test_jsonl_columns_are_looked_for_at_once(tmp_path: Path) -> None:
    """The last file without a column stops a run before its first; a stream shows it when it is read."""
    write_jsonl(tmp_path / "a.jsonl", {"text": "x"})
    other = write(tmp_path / "b.jsonl.gz", gzip.compress(b'7\n{\n{"body": "y"}\n'))
    message = "has no column 'text' in its first 1 objects; name another with --text-column"
    assert refused(InputError, lambda: reader(tmp_path)) == f"{other} {message}"
    stream = Reader(discover(["-"]).files, ReadOptions(), io.BytesIO(b'{"body": "y"}\n'))
    assert refused(InputError, lambda: list(stream.batches())) == f"standard input {message}"


@pytest.mark.parametrize("after", ["\n \n", "\n{", '\n{"text": "z", "ward": "ICU"}\n{"text": "z"}'])
def test_a_limit_where_a_column_is_still_looked_for(tmp_path: Path, after: str) -> None:
    """Rows behind the limit are looked at and not read; what was read is the whole file where none is behind it."""
    first = write_jsonl(tmp_path / "a.jsonl", {"text": "w", "ward": "ER"})
    second = write(tmp_path / "b.jsonl", '{"text": "x"}\n{"text": "y", "ward": "ICU"}' + after)
    source = reader(tmp_path, keep=("ward",), limit=3)
    texts = [text for batch in source.batches() for text in batch.column("text").to_pylist()]
    assert texts == ["w", "x", "y"]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    assert [record["sha256"] for record in source.inputs()] == [hashes[0], hashes[1] if after.isspace() else None]
    source = reader(tmp_path, keep=("ward",), limit=2)
    texts = [text for batch in source.batches() for text in batch.column("text").to_pylist()]
    assert texts == ["w", "x"]
    assert [(record["rows"], record["sha256"]) for record in source.inputs()] == [(1, hashes[0]), (1, None)]


def test_jsonl_kept_column_in_none_of_the_first_objects(tmp_path: Path) -> None:
    """A name to keep that no object has is refused as in any other format; one object that has it is enough."""
    path = write_jsonl(tmp_path / "n.jsonl", {"text": "x"}, {"text": "y", "ward": "ICU"})
    assert [row["ward"] for row in read(path, keep=("ward",))] == [None, "ICU"]
    assert refused(InputError, lambda: read(path, keep=("wrad",))) == (
        f"{path} has no column 'wrad' in its first 2 objects; name another with --keep"
    )


@pytest.mark.parametrize("text", ['1, "text": "x"', 'null, "text": "x"', '"\\ud7ff", "text": "x"'])
def test_jsonl_of_a_repeated_key_the_last_value_counts(tmp_path: Path, text: str) -> None:
    """Whatever stood before it; the same holds for ids and kept values."""
    path = write(tmp_path / "n.jsonl", f'{{"note_id": [], "ward": 1, "text": {text}, "note_id": 2, "ward": "A"}}\n')
    (row,) = read(path, keep=("ward",))
    assert (row["note_id"], row["text"], row["ward"]) == ("2", "x", "A")
    path = write(tmp_path / "n.jsonl", '{"text": "x", "text": null}\n')
    assert brief(read(path)) == [("n.jsonl:0", "text is null")]


@pytest.mark.parametrize(("depth", "taken"), [(900, True), (2000, False), (100_000, False)])
def test_deeply_nested_json(tmp_path: Path, depth: int, taken: bool) -> None:
    """Nesting beside the text does no harm up to 1,024 levels; beyond them the line is rejected, and it alone."""
    deep = "[" * depth + "]" * depth
    path = write(tmp_path / "n.jsonl", f'{{"text": "x", "deep": {deep}}}\n{{"text": "y"}}\n')
    assert brief(read(path)) == [("n.jsonl:0", "x" if taken else "malformed JSON"), ("n.jsonl:1", "y")]


@pytest.mark.parametrize("name", ["n.jsonl", "n.csv"])
def test_mixed_line_ends(tmp_path: Path, name: str) -> None:
    """Records of one file may end in different ways; a lone carriage return ends one in CSV, and none in JSONL."""
    ends = ("\r\n", "\n", "\r\n\r\n", "\r" if name == "n.csv" else "\r\r\n", "\n\n\n", "")
    notes = [f"a{place}\rb\nc\r\nd" for place in range(6)]
    write_one = json.dumps if name == "n.jsonl" else '"{}"'.format
    lines = [write_one({"text": note} if name == "n.jsonl" else note) for note in notes]
    head = "" if name == "n.jsonl" else "text\r"
    path = write(tmp_path / name, head + "".join(map("".join, zip(lines, ends, strict=True))))
    assert brief(read(path)) == [(f"{name}:{place}", note) for place, note in enumerate(notes)]


def test_jsonl_without_objects(tmp_path: Path) -> None:
    """A file without a single object has no rows, or rejected ones, and is no error."""
    assert read(write(tmp_path / "empty.jsonl", "")) == []
    assert read(write(tmp_path / "blank.jsonl", "\n \n\ufeff".encode()[:3])) == []
    assert brief(read(write(tmp_path / "bad.jsonl", "[]\nx\n"))) == [
        ("bad.jsonl:0", "JSON is not an object"),
        ("bad.jsonl:1", "malformed JSON"),
    ]


def test_jsonl_line_beyond_all_bounds_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of more than eight times the largest note is rejected in pieces, and the next line is whole."""
    monkeypatch.setattr(sources, "_CHUNK", 16)
    line = '{"text": "' + "x" * 5000 + '"}'
    path = write(tmp_path / "n.jsonl", f'{line}\n{{"text": "Angina."}}\n{line}')
    assert brief(read(path, max_note_bytes=50)) == [
        ("n.jsonl:0", "note is too large"),
        ("n.jsonl:1", "Angina."),
        ("n.jsonl:2", "note is too large"),
    ]


def test_huge_single_line(tmp_path: Path) -> None:
    """A note of 50 MB in one line is read, alone in its batch."""
    note = "Stable. " * 6_250_000
    path = write_jsonl(tmp_path / "n.jsonl", {"text": "a"}, {"text": note}, {"text": "b"})
    assert [batch.column("text").to_pylist() for batch in reader(path).batches()] == [["a"], [note], ["b"]]


def test_standard_input(tmp_path: Path) -> None:
    """``-`` reads JSONL from the stream given, with "-" as the source, and leaves the stream open."""
    stream = io.BytesIO(b'{"text": "Gout."}\n{"text": 1}\n')
    source = reader("-", stdin=stream)
    assert brief([row for batch in source.batches() for row in batch.to_pylist()]) == [
        ("-:0", "Gout."),
        ("-:1", "text is not a string"),
    ]
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    assert source.inputs() == [{"source": "-", "bytes": len(stream.getvalue()), "sha256": digest, "rows": 2}]


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a standard input says so."""
    monkeypatch.setattr("sys.stdin", None)
    assert refused(InputError, lambda: read("-")) == (
        "cannot read standard input: it is closed; pipe JSON lines into it, or name a file"
    )


# -------------------------------------------------------------------------------------------------------------- CSV


def test_csv_rows(tmp_path: Path) -> None:
    """Header and blank lines are no rows; quoted fields keep their line ends, quotes, NUL bytes and delimiters."""
    path = write(
        tmp_path / "n.csv",
        '\nnote_id,ward,text\r\n1,A,"two\r\nlines\rand\nmore"\r\n\r\n2,B,\r\n'
        ',C,"say ""ah"", please"\n4,D,a\0b\n5,E,x,y\n6\n',
    )
    assert brief(read(path)) == [
        ("1", "two\r\nlines\rand\nmore"),
        ("2", ""),
        ("n.csv:2", 'say "ah", please'),
        ("4", "a\0b"),
        ("n.csv:4", "wrong number of fields"),
        ("n.csv:5", "wrong number of fields"),
    ]


def test_csv_delimiters(tmp_path: Path) -> None:
    """A tab is the delimiter of .tsv, a comma that of .csv; one that is named holds for both."""
    tsv = write(tmp_path / "n.tsv.gz", gzip.compress(b"note_id\ttext\n7\ta, b\n"))
    assert brief(read(tsv)) == [("7", "a, b")]
    tabs = write(tmp_path / "tabs.csv", b"note_id\ttext\n7\ta, b\n")
    assert brief(read(tabs, delimiter="\\t")) == brief(read(tabs, delimiter="\t")) == [("7", "a, b")]
    assert brief(read(write(tmp_path / "n.csv", "note_id;text\n7;a, b\n"), delimiter=";")) == [("7", "a, b")]


def test_csv_undecodable_bytes(tmp_path: Path) -> None:
    """Bad bytes reject a row where they stand in its text or id, are replaced in kept columns, else do not matter."""
    path = write(tmp_path / "n.csv", b"note_id,text,ward,x\n1,a\xff,w,x\n2\xff,b,w,x\n3,c,w\xff,x\n4,d,w,\xff\n")
    rows = read(path, keep=("ward",))
    assert brief(rows) == [("1", "undecodable bytes"), ("n.csv:1", "undecodable bytes"), ("3", "c"), ("4", "d")]
    assert [row["ward"] for row in rows] == ["w", "w", "w\ufffd", "w"]


def test_csv_open_quote(tmp_path: Path) -> None:
    """What follows a quote that is never closed is neither a note nor lost: the run ends there, if it is a line."""
    path = write(tmp_path / "n.csv", 'note_id,text\n1,a\n\n2,"b\n3,c\n4,d\n')
    assert refused(InputError, lambda: read(path)) == (
        f"{path}: row 1: a quote is not closed by the end of the file, and there may be notes in the 3 lines from "
        "there on; close or double the quote, or pass --no-quotes if lines are records"
    )
    assert brief(read(path, limit=1)) == [("1", "a")]
    alone = write(tmp_path / "n.csv", 'note_id,text\n1,a\n2,"b\n\n \n')
    assert brief(read(alone)) == [("1", "a"), ("n.csv:1", "a quote is not closed")]
    last = write(tmp_path / "last.csv", "note_id,text\n1,a\n2,b")
    assert brief(read(last)) == [("1", "a"), ("2", "b")]


def test_csv_blank_lines(tmp_path: Path) -> None:
    """A line of white space is no row, unless it is a note of white space."""
    path = write(tmp_path / "n.csv", '\n \nnote_id,text\n1,a\n\n  \n \t\n2,b\n""\n"\n\n"\n')
    wrong = "wrong number of fields"
    assert brief(read(path)) == [("1", "a"), ("2", "b"), ("n.csv:2", wrong), ("n.csv:3", wrong)]
    path = write(tmp_path / "n.tsv", "note_id\ttext\n\t\n\t\t\n2\tb\n")
    assert brief(read(path)) == [("n.tsv:0", ""), ("n.tsv:1", wrong), ("2", "b")]
    path = write(tmp_path / "one.csv", "text\na\n\n  \nb\n")
    assert [row["text"] for row in read(path)] == ["a", "  ", "b"]


def test_csv_stray_quote(tmp_path: Path) -> None:
    """Text behind a closed quote rejects the record; it does not join it, nor the notes in between, to one note."""
    path = write(tmp_path / "n.tsv", 'note_id\ttext\n1\ta\n2\t"b" c\n3\t"d\n4\te\n5\t"f" g\n6\th "i" j\n7\t"k ""l"""\n')
    assert brief(read(path)) == [
        ("1", "a"),
        ("n.tsv:1", "text follows a closed quote"),
        ("n.tsv:2", "text follows a quote closed lines below, which may hold notes"),
        ("6", 'h "i" j'),
        ("7", 'k "l"'),
    ]
    header = write(tmp_path / "header.csv", '"text"s\na\n')
    assert refused(InputError, lambda: reader(header)) == (
        f"{header}: a quote in its header stands inside a field; write the file again, or pass --no-quotes"
    )


def test_csv_without_quotes(tmp_path: Path) -> None:
    """Where quotes mean nothing, each line is a record, and each field is what stands between delimiters."""
    data = 'note_id\ttext\n1\t"Gout\n2\t"Asthma" was\r\n\n3\t5\'9" tall\r4\t""\tx\n"5"\t"fever"'
    path = write(tmp_path / "n.tsv", data)
    assert brief(read(path, quotes=False)) == [
        ("1", '"Gout'),
        ("2", '"Asthma" was'),
        ("3", "5'9\" tall"),
        ("n.tsv:3", "wrong number of fields"),
        ('"5"', '"fever"'),
    ]
    header = write(tmp_path / "header.csv", '"text,a"b\nGout,1\n')
    assert [row["text"] for row in read(header, text_column='"text', keep=('a"b',), quotes=False)] == ["Gout"]


@pytest.mark.parametrize("data", ['note_id,text,"ward\n1,a,x\n2,b,y\n', '"text\na\nb', '\n\n"text\n'])
def test_csv_open_quote_in_the_header(tmp_path: Path, data: str) -> None:
    """A header that goes on to the end of the file would leave no notes, so it is an error."""
    path = write(tmp_path / "n.csv", data)
    assert refused(InputError, lambda: reader(path)) == (
        f"{path}: a quote in its header is not closed; write the file again, or pass --no-quotes"
    )


def test_csv_from_a_pipe(tmp_path: Path) -> None:
    """A named pipe is read once, from its start to its end."""
    path = tmp_path / "n.csv"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("text\nAngina.\nGout.\n",))
    writer.start()
    assert brief(read(path)) == [("n.csv:0", "Angina."), ("n.csv:1", "Gout.")]
    writer.join()


def test_csv_record_beyond_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field above the largest note is rejected; a record that cannot be held ends the run and names the row."""
    monkeypatch.setattr(sources, "_CHUNK", 16)
    path = write(tmp_path / "n.csv", "text\nok\n" + "x" * 51 + "\nok\n")
    assert [row["text"] or row["reason"] for row in read(path, max_note_bytes=50)] == ["ok", "note is too large", "ok"]
    path = write(tmp_path / "open.csv", 'text\nok\n"open' + "\nx" * 500)
    assert refused(InputError, lambda: read(path, max_note_bytes=50)) == (
        f"{path}: row 1 is longer than 416 characters; is a quote not closed there, or a line end missing?"
    )
    path = write(tmp_path / "line.csv", "text\nok\n" + "x" * 500)
    assert refused(InputError, lambda: read(path, max_note_bytes=50)) == (
        f"{path}: row 1 is longer than 416 characters; is a quote not closed there, or a line end missing?"
    )


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("", {}, "has no column 'text'; name another with --text-column"),
        ("John Doe,has gout\n", {}, "has no column 'text'; name another with --text-column"),
        ("text\na\n", {"id_column": "mrn"}, "has no column 'mrn'; name another with --id-column"),
        ("text\na\n", {"keep": ("ward",)}, "has no column 'ward'; name another with --keep"),
        ("text,x,text\na,b,c\n", {}, "has more than one column 'text'; rename all but one"),
        ("text,note_id,note_id\na,b,c\n", {}, "has more than one column 'note_id'; rename all but one"),
    ],
)
def test_csv_columns(tmp_path: Path, data: str, options: dict[str, Any], message: str) -> None:
    """A column that is absent or there twice shows at construction; a header may be a note and is not told."""
    path = write(tmp_path / "n.csv", data)
    asked = "" if "more than one" in message else " (or has it another delimiter or encoding?)"
    assert refused(InputError, lambda: reader(path, **options)) == f"{path} {message}{asked}"


def test_named_id_column(tmp_path: Path) -> None:
    """An id column that is named takes the place of note_id."""
    write(tmp_path / "a.csv", "note_id,mrn,text\n1,M1,x\n")
    write_jsonl(tmp_path / "b.jsonl", {"note_id": 1, "mrn": 7, "text": "y"}, {"note_id": 2, "text": "z"})
    write_parquet(tmp_path / "c.parquet", note_id=[1], mrn=["M9"], text=["w"])
    assert brief(read(tmp_path, id_column="mrn")) == [("M1", "x"), ("7", "y"), ("b.jsonl:1", "z"), ("M9", "w")]


# ------------------------------------------------------------------------------------------------------------- text


def test_text_files(tmp_path: Path) -> None:
    """A text file is one note in row 0, its source is the id, and its text is the decoded file as it is."""
    write(tmp_path / "a/1.txt", b"Line\r\nend\rs\n\n")
    write(tmp_path / "a/2.TXT.gz", gzip.compress("Rötung".encode()))
    write(tmp_path / "b.txt", b"")
    write(tmp_path / "c.txt", b"caf\xe9")
    write(tmp_path / "d.txt", b"x" * 14)
    rows = read(tmp_path, max_note_bytes=13)
    assert {row["row"] for row in rows} == {0}
    assert [row["source"] for row in rows] == [row["note_id"] for row in rows]
    assert brief(rows) == [
        ("a/1.txt", "Line\r\nend\rs\n\n"),
        ("a/2.TXT.gz", "Rötung"),
        ("b.txt", ""),
        ("c.txt", "undecodable bytes"),
        ("d.txt", "note is too large"),
    ]


def test_text_files_have_no_columns(tmp_path: Path) -> None:
    """An id column or a kept column cannot come from a text file."""
    path = write(tmp_path / "n.txt", "x")
    message = f"{path} has no column 'ward': a text file has no columns"
    assert refused(InputError, lambda: reader(path, keep=("ward",))) == message
    assert refused(InputError, lambda: reader(path, id_column="ward")) == message


# ---------------------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    """All string types are read; a null and bytes that are no UTF-8 reject their rows alone."""
    path = write_parquet(tmp_path / "n.parquet", text=invalid([b"Gout\r\n", b"a\xffb", None, b"", b"z"], kind))
    assert [row["reason"] or row["text"] for row in read(path)] == [
        "Gout\r\n",
        "undecodable bytes",
        "text is null",
        "",
        "z",
    ]
    assert [row["note_id"] for row in read(path)] == [f"n.parquet:{row}" for row in range(5)]


def test_parquet_dictionary_text(tmp_path: Path) -> None:
    """Text and ids in dictionaries are read, undecodable entries and nulls included."""
    index = pa.array([0, 1, None, 0], pa.int32())
    text = pa.DictionaryArray.from_arrays(index, invalid([b"ok", b"\xff"], pa.string()))
    note_id = pa.DictionaryArray.from_arrays(index, pa.array(["A", "B"]))
    path = write_parquet(tmp_path / "n.parquet", text=text, note_id=note_id)
    expected = [("A", "ok"), ("B", "undecodable bytes"), ("n.parquet:2", "text is null"), ("A", "ok")]
    assert brief(read(path)) == expected
    # Where the places are no int32, Arrow converts the dictionary, and checks it.
    text = pa.DictionaryArray.from_arrays(pa.array([0, 1]), invalid([b"\xff", b"fever"], pa.string()))
    path = write_parquet(tmp_path / "other.parquet", text=text)
    assert refused(InputError, lambda: read(path)) == (
        f"cannot read {path}: a dictionary of strings in it holds bytes that are no text; write that column as plain "
        "strings or bytes"
    )


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1, None], pa.int8()), ["1", "n.parquet:1"]),
        (pa.array([2**64 - 1, 0], pa.uint64()), ["18446744073709551615", "0"]),
        (pa.array([-(2**63), 2**53 + 1], pa.int64()), ["-9223372036854775808", "9007199254740993"]),
        (pa.array([12.0, 0.5], pa.float64()), ["12.0", "0.5"]),
        (pa.array([math.nan, -0.0], pa.float64()), ["n.parquet:0", "-0.0"]),
        (
            pa.array(["12345678901234567890123", None]).cast(pa.decimal128(38)),
            ["12345678901234567890123", "n.parquet:1"],
        ),
        (pa.nulls(2), ["n.parquet:0", "n.parquet:1"]),
        (invalid([b"\xff", b"B"], pa.string()), ["n.parquet:0", "B"]),
    ],
)
def test_parquet_ids(tmp_path: Path, ids: pa.Array, expected: list[str]) -> None:
    """Numbers become exact decimal text, nulls SOURCE:ROW."""
    path = write_parquet(tmp_path / "n.parquet", note_id=ids, text=["a", "b"])
    assert [row["note_id"] for row in read(path)] == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"body": ["x"]}, {}, "{} has no column 'text' (it has body); name another with --text-column"),
        ({"text": ["x"]}, {"id_column": "mrn"}, "{} has no column 'mrn' (it has text); name another with --id-column"),
        ({"text": ["x"]}, {"keep": ("ward",)}, "{} has no column 'ward' (it has text); name another with --keep"),
        ({"text": [1]}, {}, "{}: column 'text' holds int64, not text; cast it to a string first"),
        ({"text": [b"x"]}, {}, "{}: column 'text' holds binary, not text; cast it to a string first"),
        ({"text": [["x"]]}, {}, "{}: column 'text' holds list<element: string>, not text; cast it to a string first"),
        (
            {"text": [{"text": "x"}]},
            {},
            "{}: column 'text' holds struct<text: string>, not text; cast it to a string first",
        ),
        (
            {"text": [{f"field {number}": "x" for number in range(99)}]},
            {},
            "{}: column 'text' holds struct<field 0: string, field 1: string, field 2: string, field 3: string, "
            "field 4: string, field 5:..., not text; cast it to a string first",
        ),
        (
            {"a\nb": ["x"]} | {f"c{number}": ["x"] for number in range(99)},
            {},
            "{} has no column 'text' (it has 'a\\nb', c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, "
            "c15, c16, c17, c18, and 80 more); name another with --text-column",
        ),
        (
            {"text": ["x"], "note_id": [True]},
            {},
            "{}: column 'note_id' holds bool, not strings or numbers; cast it to a string, or name another",
        ),
    ],
)
def test_parquet_columns(tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    """A column that is absent or of the wrong type shows at construction."""
    path = write_parquet(tmp_path / "n.parquet", **columns)
    assert refused(InputError, lambda: reader(path, **options)) == message.format(path)


def test_parquet_column_there_twice(tmp_path: Path) -> None:
    """Two columns of the text's name are refused."""
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "n.parquet")
    assert refused(InputError, lambda: reader(tmp_path)) == (
        f"{tmp_path}/n.parquet has more than one column 'text'; rename all but one"
    )


@pytest.mark.parametrize("limit", [None, 4])
def test_parquet_with_fewer_rows_than_it_says(tmp_path: Path, limit: int | None) -> None:
    """Rows that a file counts and does not hold are not passed over, also where a limit lies beyond them."""
    path = write_parquet(tmp_path / "n.parquet", text=["x"] * 3)
    whole = path.read_bytes()
    # In the footer's Thrift a zigzag integer follows the schema: num_rows, and the row group's own near the end.
    changed = whole.replace(b"\x16\x06\x19", b"\x16\x0a\x19")
    assert len(changed) == len(whole)
    assert pq.read_metadata(pa.BufferReader(changed)).num_rows == 5
    path.write_bytes(changed)
    assert refused(InputError, lambda: read(path, limit=limit)) == (
        f"cannot read {path}: it is no parquet file, or damaged; copy or write it again"
    )
    assert len(read(path, limit=3)) == 3


def test_unreadable_parquet(tmp_path: Path) -> None:
    """A file that is no Parquet file, or a cut one, is an input error that names it."""
    whole = write_parquet(tmp_path / "whole.parquet", text=["x"] * 100).read_bytes()
    for data in (b"", b"PAR1", b"not a table", whole[: len(whole) // 2], whole[:-1]):
        path = write(tmp_path / "n.parquet", data)
        assert refused(InputError, partial(read, path)) == (
            f"cannot read {path}: it is no parquet file, or damaged; copy or write it again"
        )


# ----------------------------------------------------------------------------------------------------- kept columns


def test_kept_columns_of_tables_of_text(tmp_path: Path) -> None:
    """From CSV and JSONL kept columns are strings: JSON strings as they are, other values as compact JSON."""
    write(tmp_path / "a.csv", "text,ward,age\nx,ICU,071\ntoo,few\n")
    write_jsonl(
        tmp_path / "b.jsonl",
        {"text": "a", "ward": "ICU", "age": 71},
        {"text": "b", "ward": {"n": [1, "ö"]}, "age": 1.5},
        {"text": "c", "ward": None},
        {"text": "d", "ward": False, "age": 10**25},
        {"text": None, "ward": "ER"},
        {"text": "e", "ward": [10**25, {"a": -(2**64)}], "age": 1e30},
    )
    rows = read(tmp_path, keep=("ward", "age"))
    assert [(row["ward"], row["age"]) for row in rows] == [
        ("ICU", "071"),
        (None, None),
        ("ICU", "71"),
        ('{"n":[1,"ö"]}', "1.5"),
        (None, None),
        ("false", "10000000000000000000000000"),
        ("ER", None),
        ('[10000000000000000000000000,{"a":-18446744073709551616}]', "1e+30"),
    ]


def test_kept_parquet_types(tmp_path: Path) -> None:
    """Parquet columns keep their types, nested and dictionary ones too, and follow their rows through the cuts."""
    seen = pa.array(range(2500), pa.timestamp("ns"))
    codes = pa.array([[number] for number in range(2500)], pa.list_(pa.int16()))
    ward = pa.array(["ICU", "ER"] * 1250).dictionary_encode()
    text = ["x" * 3000] * 2500
    path = write_parquet(tmp_path / "n.parquet", text=text, seen=seen, codes=codes, ward=ward)
    source = reader(path, keep=("codes", "seen", "ward"))
    assert source.schema.names == ["source", "row", "note_id", "text", "reason", "codes", "seen", "ward"]
    assert source.schema.field("seen").type == pa.timestamp("ns")
    table = pa.Table.from_batches(source.batches(), source.schema)
    assert table.column("codes").combine_chunks().flatten().to_pylist() == list(range(2500))
    assert table.column("seen").combine_chunks().equals(seen)
    assert table.column("ward").cast(pa.string()).to_pylist() == ["ICU", "ER"] * 1250


@pytest.mark.parametrize("name", ["n.csv", "n.jsonl", "n.parquet"])
def test_an_id_column_without_a_name(tmp_path: Path, name: str) -> None:
    """Such as the index that pandas writes: it is asked for by an empty name."""
    path = tmp_path / name
    if name == "n.csv":
        write(path, ",text\nA7,fever\n")
    elif name == "n.jsonl":
        write_jsonl(path, {"": "A7", "text": "fever"})
    else:
        write_parquet(path, **{"": ["A7"], "text": ["fever"]})
    assert [row["note_id"] for row in read(path, id_column="")] == ["A7"]


def test_ids_that_are_uuids(tmp_path: Path) -> None:
    """Parquet's own type of them, which DuckDB writes, in the form that everyone knows."""
    ids = ["0c3c15bd-6cd8-48d9-9911-ddc2468455f9", None]
    column = pa.array([None if one is None else uuid.UUID(one).bytes for one in ids], pa.uuid())
    path = write_parquet(tmp_path / "n.parquet", text=["x", "y"], note_id=column)
    assert [row["note_id"] for row in read(path)] == [ids[0], "n.parquet:1"]


def test_text_and_id_can_be_kept(tmp_path: Path) -> None:
    """The text and the id of an input can be carried along under their own names, from every format."""
    write(tmp_path / "a.csv", "mrn,body\n1,x\n")
    write_jsonl(tmp_path / "b.jsonl", {"mrn": 2, "body": "y"})
    write_parquet(tmp_path / "c.parquet", mrn=[3], body=["z"])
    rows = read(tmp_path, text_column="body", id_column="mrn", keep=("mrn", "body"))
    assert [(row["note_id"], row["mrn"]) for row in rows] == [("1", "1"), ("2", "2"), ("3", "3")]
    assert [row["text"] for row in rows] == [row["body"] for row in rows] == ["x", "y", "z"]


def test_kept_types_that_differ(tmp_path: Path) -> None:
    """Where files disagree on a kept column's type, or are of several formats, it is a string."""
    write_parquet(tmp_path / "d/a.parquet", text=["x"], age=[71])
    write_parquet(tmp_path / "d/b.parquet", text=["x"], age=pa.array(["old"]).dictionary_encode())
    assert [row["age"] for row in read(tmp_path / "d", keep=("age",))] == ["71", "old"]
    write_parquet(tmp_path / "e/a.parquet", text=["x"], age=[71])
    write_jsonl(tmp_path / "e/b.jsonl", {"text": "x", "age": 72})
    assert [row["age"] for row in read(tmp_path / "e", keep=("age",))] == ["71", "72"]
    write_parquet(tmp_path / "f/a.parquet", text=["x"], age=[[71]])
    write_parquet(tmp_path / "f/b.parquet", text=["x"], age=[71])
    assert refused(InputError, lambda: reader(tmp_path / "f", keep=("age",))) == (
        "--keep age: its type differs between files, and list<element: int64> is no string"
    )


@pytest.mark.parametrize(
    ("view", "plain"), [(pa.string_view(), pa.string()), (pa.binary_view(), pa.binary())], ids=["string", "binary"]
)
def test_kept_parquet_views_become_plain(tmp_path: Path, view: pa.DataType, plain: pa.DataType) -> None:
    """Rows of views cannot be picked out, as the tables need, so a view is kept as what it views."""
    path = write_parquet(tmp_path / "n.parquet", text=["x", "y", "z"], ward=pa.array(["ICU", None, "ER"]).cast(view))
    source = reader(path, keep=("ward",))
    assert source.schema.field("ward").type == plain
    table = pa.Table.from_batches(source.batches(), source.schema)
    assert table.column("ward").cast(pa.string()).to_pylist() == ["ICU", None, "ER"]


def test_kept_types_that_cannot_be_carried(tmp_path: Path) -> None:
    """Where Arrow cannot pick out rows of a type, as of lists of views, it is refused before anything is read."""
    path = write_parquet(tmp_path / "n.parquet", text=["x"], ward=pa.array([["ICU"]], pa.list_(pa.string_view())))
    assert refused(InputError, lambda: reader(path, keep=("ward",))) == (
        "--keep ward: list<element: string_view> cannot be carried into the output; cast it first"
    )


def test_kept_dictionaries_inside_others(tmp_path: Path) -> None:
    """Arrow cannot read them where they differ between row groups, so that none is promised."""
    wards = pa.StructArray.from_arrays([pa.array(["ICU", "ER"]).dictionary_encode()], ["name"])
    pq.write_table(pa.table({"text": ["x", "y"], "ward": wards}), tmp_path / "n.parquet", row_group_size=1)
    assert refused(InputError, lambda: reader(tmp_path, keep=("ward",))) == (
        "--keep ward: struct<name: dictionary<values=string, indices=int32, ordered=0>> cannot be carried into the "
        "output; cast it first"
    )


def test_kept_values_that_cannot_be_carried(tmp_path: Path) -> None:
    """Bytes that are no text, where they have to be; the file is not called damaged."""
    path = write_parquet(tmp_path / "a.parquet", text=["x", "y"], ward=[b"ICU", b"\xff"])
    write(tmp_path / "b.csv", "text,ward\nz,ER\n")
    assert refused(InputError, lambda: read(tmp_path, keep=("ward",))) == (
        f"{path}: --keep ward: a value of binary cannot be carried into the output; mend or cast it first"
    )


def test_kept_parquet_strings_are_mended(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are replaced in a kept string column, so that every sink can write it."""
    path = write_parquet(tmp_path / "n.parquet", text=["x", "y"], ward=invalid([b"w\xff", None], pa.string()))
    assert [row["ward"] for row in read(path, keep=("ward",))] == ["w\ufffd", None]


# ------------------------------------------------------------------------------------------------- rows and batches


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    """A batch ends at 1,000 rows or before 4 MiB of text, whatever the format, and a larger note stands alone."""
    small, half, large = "a", "b" * (3 * 2**20), "c" * (5 * 2**20)
    notes = [small] * 1500 + [half, half, large, small]
    write_jsonl(tmp_path / "j/n.jsonl", *({"text": note} for note in notes))
    write(tmp_path / "c/n.csv", "text\n" + "\n".join(notes))
    write_parquet(tmp_path / "p/n.parquet", text=notes)
    for folder in ("j", "c", "p"):
        batches = list(reader(tmp_path / folder).batches())
        assert [text for batch in batches for text in batch.column("text").to_pylist()] == notes
        assert max(batch.num_rows for batch in batches) <= 1000
        sizes = [(batch.num_rows, batch.column("text").nbytes) for batch in batches]
        assert all(rows == 1 or size < 4.1 * 2**20 for rows, size in sizes)
    for number in range(3):
        write(tmp_path / f"t/{number}.txt", small)
    assert [batch.num_rows for batch in reader(tmp_path / "t").batches()] == [3]


def test_batches_are_bounded_by_what_is_kept(tmp_path: Path) -> None:
    """Large kept values and ids count as text does, so that a batch of many short notes fits into memory."""
    ward = "w" * 2**20
    write_jsonl(tmp_path / "n.jsonl", *({"text": "x", "ward": ward} for _ in range(9)))
    assert [batch.num_rows for batch in reader(tmp_path, keep=("ward",)).batches()] == [3, 3, 3]
    write_jsonl(tmp_path / "n.jsonl", *({"text": "x", "note_id": ward} for _ in range(9)))
    assert [batch.num_rows for batch in reader(tmp_path).batches()] == [3, 3, 3]


def test_limit_counts_rows_of_all_files(tmp_path: Path) -> None:
    """The limit holds over all files and formats, rejected rows count, and files beyond it are not opened."""
    write_jsonl(tmp_path / "a.jsonl", {"text": "a0"}, {"text": 1}, {"text": "a2"})
    write(tmp_path / "b.csv", "text\nb0\nb1\n")
    write_parquet(tmp_path / "c.parquet", text=["c0", "c1"])
    everything = [row["text"] for row in read(tmp_path)]
    assert everything == ["a0", None, "a2", "b0", "b1", "c0", "c1"]
    for limit in range(9):
        assert [row["text"] for row in read(tmp_path, limit=limit)] == everything[:limit]
    source = reader(tmp_path, limit=4)
    assert sum(batch.num_rows for batch in source.batches()) == 4
    assert [(one["source"], one["rows"], one["sha256"] is None) for one in source.inputs()] == [
        ("a.jsonl", 3, False),
        ("b.csv", 1, True),
    ]
    source = reader(tmp_path, limit=6)
    assert sum(batch.num_rows for batch in source.batches()) == 6
    assert source.inputs()[-1]["sha256"] is None
    source = reader(tmp_path, limit=7)
    assert sum(batch.num_rows for batch in source.batches()) == 7
    assert [one["sha256"] is None for one in source.inputs()] == [False] * 3


def test_repeated_ids(tmp_path: Path) -> None:
    """With unique_ids a row whose id came before, in any file, is rejected; without it is kept."""
    write_jsonl(tmp_path / "a.jsonl", {"note_id": 1, "text": "x"}, {"note_id": "1", "text": "y"}, {"text": "z"})
    write_parquet(tmp_path / "b.parquet", note_id=["1", "2"], text=["x", "y"])
    expected = [("1", "x"), ("1", "id is repeated"), ("a.jsonl:2", "z"), ("1", "id is repeated"), ("2", "y")]
    assert brief(read(tmp_path, unique_ids=True)) == expected
    assert all(row["reason"] is None for row in read(tmp_path))


# ------------------------------------------------------------------------------------------ compression and records


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    """All members of a compressed file are read; the hash is that of the file on disk."""
    lines = [f'{{"note_id": {number}, "text": "Node {number}"}}\n'.encode() for number in range(300)]
    data = pack(b"".join(lines[:100]), suffix) + pack(b"".join(lines[100:]), suffix)
    path = write(tmp_path / f"n.jsonl.{suffix}", data)
    source = reader(path)
    assert [row["note_id"] for batch in source.batches() for row in batch.to_pylist()] == list(map(str, range(300)))
    digest = hashlib.sha256(data).hexdigest()
    assert source.inputs() == [{"source": path.name, "bytes": len(data), "sha256": digest, "rows": 300}]


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_truncated_compression(tmp_path: Path, suffix: str) -> None:
    """A compressed file that ends early, or is empty, is an input error; batches yielded before it stay valid."""
    noise = random.Random(7)
    lines = [f'{{"text": "{noise.randbytes(200).hex()}"}}\n'.encode() for _ in range(9000)]
    data = pack(b"".join(lines), suffix)
    for cut in (0, 5, len(data) // 2, len(data) - 1):
        path = write(tmp_path / f"n.jsonl.{suffix}", data[:cut])
        rows = 0

        def consume(path: Path = path) -> None:
            nonlocal rows
            for batch in reader(path).batches():
                assert batch.column("reason").null_count == batch.num_rows
                rows += batch.num_rows

        assert refused(InputError, consume) == (
            f"cannot read {path}: its {suffix} data is damaged or ends early; copy or write it again"
        )
        assert rows < 9000
        assert rows > 0 or cut <= 5 or suffix == "bz2"


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_garbage_behind_compressed_data(tmp_path: Path, suffix: str) -> None:
    """Bytes behind the last member that start no member are an input error, not ignored."""
    path = write(tmp_path / f"n.txt.{suffix}", pack(b"Anaemia.", suffix) + b"garbage")
    assert refused(InputError, lambda: read(path)) == (
        f"cannot read {path}: its {suffix} data is damaged or ends early; copy or write it again"
    )


def test_records_for_the_manifest(tmp_path: Path) -> None:
    """Each table has a record with the hash of its bytes; a run of text files has one, without their names."""
    table = write_parquet(tmp_path / "t/a.parquet", text=["x", "y"])
    note = write_jsonl(tmp_path / "t/b.jsonl", {"text": "x"})
    sheet = write(tmp_path / "t/c.csv", "text\nx\n\n")
    write(tmp_path / "n/doe.txt", "one")
    write(tmp_path / "n/roe.txt", "three")
    source = reader(tmp_path / "t", tmp_path / "n")
    rows = sum(batch.num_rows for batch in source.batches())
    combined = hashlib.sha256()
    for name, text in (("doe.txt", b"one"), ("roe.txt", b"three")):
        combined.update(f"{name}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    expected = [
        {"source": path.name, "bytes": path.stat().st_size, "sha256": digest, "rows": count}
        for path, count in ((table, 2), (note, 1), (sheet, 1))
        for digest in [hashlib.sha256(path.read_bytes()).hexdigest()]
    ]
    assert source.inputs() == [*expected, {"text_files": 2, "bytes": 8, "sha256": combined.hexdigest()}]
    assert rows == 6
    list(source.batches())
    assert len(source.inputs()) == 4


@pytest.mark.parametrize("name", ["n.jsonl", "n.csv", "n.parquet"])
@pytest.mark.parametrize("change", ["grows", "shrinks", "is touched"])
def test_file_that_changes_while_it_is_read(tmp_path: Path, name: str, change: str) -> None:
    """A file that is written to during the pass is an input error."""
    notes = [f"{number} {'x' * 500}" for number in range(5000)]
    path = tmp_path / name
    if name == "n.parquet":
        write_parquet(path, text=notes)
    elif name == "n.csv":
        write(path, "text\n" + "\n".join(notes))
    else:
        write_jsonl(path, *({"text": note} for note in notes))
    batches = reader(path).batches()
    next(batches)
    if change == "grows":
        with path.open("ab") as file:
            file.write(b"\n")
    elif change == "shrinks" and name != "n.parquet":
        os.truncate(path, path.stat().st_size - 100)
    else:
        os.utime(path, (1, 1))
    assert refused(InputError, lambda: list(batches)) == (
        f"{path} changed while it was read; run again once nothing writes to it"
    )


@pytest.mark.parametrize("name", ["n.jsonl", "n.csv", "n.txt", "n.parquet"])
def test_file_that_cannot_be_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system says about a file becomes an input error with the file's name."""
    path = write(tmp_path / name, "")
    file = discover([str(path)]).files

    def deny(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)
    assert refused(InputError, lambda: list(Reader(file, ReadOptions()).batches())) == (
        f"cannot read {path}: Permission denied"
    )


def test_file_that_vanished(tmp_path: Path) -> None:
    """A file that is gone when its turn comes is an input error."""
    path = write_jsonl(tmp_path / "n.jsonl", {"text": "x"})
    batches = reader(path).batches()
    path.unlink()
    assert refused(InputError, lambda: list(batches)) == f"cannot read {path}: No such file or directory"


def test_messages_hold_no_values(tmp_path: Path) -> None:
    """Neither reasons nor errors repeat what stands in a file."""
    secret = "Zanzibar"
    write(tmp_path / "a.csv", f"{secret},{secret}\n{secret}\n")
    write(tmp_path / "b.jsonl", f'{{"{secret}": "{secret}"}}\n')
    write(tmp_path / "c.parquet", secret * 20)
    write(tmp_path / "d.jsonl.gz", secret)
    for path in sorted(tmp_path.iterdir()):
        assert secret not in refused(InputError, partial(read, path))


# -------------------------------------------------------------------------------------------------------- properties

TEXTS = st.lists(
    st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('\r\n\0",\t\ufeff🤒é'))), max_size=12
)


def as_csv(texts: Sequence[str], delimiter: str = ",") -> bytes:
    """A file of one column, as the standard library writes it."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(["text"])
    writer.writerows([text] for text in texts)
    return sink.getvalue().encode()


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_round_trip(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever Unicode text is written, the same text is read, in order, from all formats."""
    folder = tmp_path_factory.mktemp("trip")
    write_jsonl(folder / "a/n.jsonl", *({"text": text} for text in texts))
    write(
        folder / "b/n.jsonl.gz",
        gzip.compress("".join(f"{json.dumps({'text': text}, ensure_ascii=False)}\r\n" for text in texts).encode()),
    )
    write(folder / "c/n.csv", as_csv(texts))
    write(folder / "d/n.tsv.zst", zst_frame(as_csv(texts, "\t")))
    write_parquet(folder / "e/n.parquet", text=pa.array(texts, pa.string()))
    for name in "abcde":
        rows = read(folder / name)
        assert [row["text"] for row in rows] == texts
        assert [row["row"] for row in rows] == list(range(len(texts)))
    for number, text in enumerate(texts):
        # A leading mark belongs to the file, not to the note.
        path = write(folder / f"f/{number}.txt", f"\ufeff{text}")
        assert [row["text"] for row in read(path)] == [text]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data with up to four bytes changed, inserted or cut out."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                changed[place:place] = rng.choice([b'"', b"\n", b"\0", b"\xff", b"{", b"\\", b"\r", b","])
            case 2:
                del changed[place : place + rng.randint(1, 8)]
            case _:
                changed[place] ^= 1 << rng.randrange(8)
        if not changed:
            break
    return bytes(changed)


@pytest.mark.parametrize("name", ["n.jsonl", "n.csv", "n.parquet", "n.txt", "n.jsonl.gz", "n.csv.zst", "n.txt.bz2"])
def test_mutated_files(tmp_path: Path, name: str) -> None:
    """Damaged files give rows, reasons and errors of medner, and nothing else; the rows reconcile."""
    notes = ["Type 2 diabetes.\r\nNo angina.", "", 'Ödem 🤒, "both" legs', "Gout"]
    table = {"note_id": [1, 2, 3, 4], "text": notes, "ward": ["ICU", "ER", "", "OR"]}
    rng = random.Random(f"seed {name}")
    if name == "n.parquet":
        data = write_parquet(tmp_path / "whole.parquet", **table).read_bytes()
    else:
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        sink = io.StringIO(newline="")
        writer = csv.DictWriter(sink, list(table))
        writer.writeheader()
        writer.writerows(rows)
        kinds = {"jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "csv": sink.getvalue()}
        data = kinds.get(name.split(".")[1], notes[0]).encode()
        data = pack(data, name.split(".")[2]) if name.count(".") == 2 else data
    keep = () if ".txt" in name else ("ward",)
    path = tmp_path / name
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        path.write_bytes(mutated(data, rng))
        try:
            source = reader(path, keep=keep)
            got = [row for batch in source.batches() for row in batch.to_pylist()]
        except MednerError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert [row["row"] for row in got] == list(range(len(got)))
        assert all((row["text"] is None) == (row["reason"] in set(Reason)) for row in got)
        assert sum(one["text_files"] if "text_files" in one else one["rows"] for one in source.inputs()) == len(got)
    assert outcomes["read"] or "." in name[2:]


# ---------------------------------------------------------------------------------------------------------------------
# Texts alone


def test_texts_of_a_file_and_a_column(tmp_path: Path) -> None:
    """The column ``text`` or the one behind the last colon; empty ones left out; a colon may stand in the name."""
    table = tmp_path / "a:b.csv"
    table.write_text("text,report\nfever,asthma\n,gout\n", encoding="utf-8")
    assert list(sources.texts(str(table))) == ["fever"]
    assert list(sources.texts(f"{table}:report")) == ["asthma", "gout"]


def test_texts_that_cannot_be_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are left out, which is told; empty ones are no loss."""
    table = tmp_path / "notes.csv"
    table.write_bytes(b'text\nfever\n\xe4rger\n""\n')
    assert list(sources.texts(str(table))) == ["fever"]
    assert caplog.messages == [f"{table}: 1 of 3 rows have no text that can be read and are left out"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (":empty", "{path}:empty: holds no text"),
        (
            ":none",
            "{path} has no column 'none'; name another as FILE:COLUMN (or has it another delimiter or encoding?)",
        ),
    ],
)
def test_no_texts(tmp_path: Path, column: str, message: str) -> None:
    """The error says what to do in words that fit where the file was named."""
    path = tmp_path / "notes.csv"
    path.write_text("text,empty\nfever,\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        list(sources.texts(f"{path}{column}"))
    assert str(error.value) == message.format(path=path)


def test_a_parquet_column_of_nulls_is_missing_text(tmp_path: Path) -> None:
    """What pandas writes where no note has a text is rejected row by row; the other files are read."""
    write_parquet(tmp_path / "a.parquet", text=["x"])
    write_parquet(tmp_path / "b.parquet", text=pa.nulls(2))
    write_parquet(tmp_path / "c.parquet", text=pa.nulls(0))
    assert [row["reason"] for row in read(tmp_path)] == [None, "text is null", "text is null"]


def test_a_limit_ends_a_stream_at_once() -> None:
    """The row behind the last one may never come; what comes is not waited for."""

    class Endless(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            found = super().read1(size)
            assert found, "waited for more"
            return found

    rows = read("-", stdin=Endless(b'{"text": "x"}\n' * 3), limit=3)
    assert [row["text"] for row in rows] == ["x"] * 3


def test_standard_input_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may have set its descriptor otherwise; then no data yet would be taken for the end."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    with os.fdopen(readable, encoding="utf-8") as stdin, os.fdopen(writable, "wb") as writer:
        monkeypatch.setattr("sys.stdin", stdin)
        writing = threading.Timer(0.2, lambda: (writer.write(b'{"text": "x"}\n'), writer.close()))
        writing.start()
        assert [row["text"] for row in read("-")] == ["x"]
        writing.join()
