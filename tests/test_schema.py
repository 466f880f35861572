"""The Arrow contract is what DESIGN.md promises, field by field."""

from __future__ import annotations

import pyarrow as pa
import pytest

from medner import schema
from medner.errors import InputError, UsageError

SPAN = "struct<start: int32 not null, end: int32 not null, label: string not null, score: float not null>"
KEY = ["source: string not null", "row: int64 not null", "note_id: string"]
COUNTS = [f"{name}: int32 not null" for name in ("n_chars", "n_tokens", "n_unknown", "n_windows", "n_spans")]
VERSION = {b"medner.schema_version": b"1.0"}


def fields(table: pa.Schema) -> list[str]:
    """Each field as text."""
    return [f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in table]


def test_annotation_columns() -> None:
    """An annotated batch has the input's columns first and unchanged, its metadata, and then seven more."""
    text = pa.field("text", pa.large_string(), nullable=False, metadata={"a": "b"})
    given = pa.schema([pa.field("note_id", pa.int16()), text], metadata={"origin": "ward"})
    made = schema.annotated_schema(given)
    assert made.metadata == {b"origin": b"ward"}
    assert list(made)[:2] == list(given)
    assert made.field("text").metadata == {b"a": b"b"}
    assert fields(made)[2:] == [f"spans: list<item: {SPAN} not null>", *COUNTS, "text_sha256: string"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
)
def test_text_types(kind: pa.DataType) -> None:
    """Every string type, and dictionaries of them, is text."""
    assert schema.is_text(kind)
    assert schema.annotated_schema(pa.schema([("body", kind)]), "body").field("body").type == kind


@pytest.mark.parametrize("kind", [pa.binary(), pa.int64(), pa.null(), pa.list_(pa.string()), pa.binary_view()])
def test_other_types_are_refused(kind: pa.DataType) -> None:
    """Bytes and numbers are not text; the message names the column, its type and what to do."""
    assert not schema.is_text(kind)
    with pytest.raises(InputError) as caught:
        schema.annotated_schema(pa.schema([("text", kind)]))
    assert str(caught.value) == f"column 'text' holds {kind}, not text; cast it to a string first"


def test_absent_text_column() -> None:
    """The message names the column and those that are there."""
    with pytest.raises(InputError) as caught:
        schema.annotated_schema(pa.schema([("a", pa.string()), ("b", pa.string())]))
    assert str(caught.value) == "no column 'text' in the batch; it has a, b"
    with pytest.raises(InputError) as caught:
        schema.annotated_schema(pa.schema([]), "note")
    assert str(caught.value) == "no column 'note' in the batch; it has none"


@pytest.mark.parametrize("name", schema.ANNOTATION.names)
def test_columns_that_the_annotation_adds_are_refused(name: str) -> None:
    """An input column of an added name would stand twice."""
    with pytest.raises(InputError) as caught:
        schema.annotated_schema(pa.schema([("text", pa.string()), (name, pa.string())]))
    message = f"the batch already has a column {name!r}, which the annotation adds; rename it first"
    assert str(caught.value) == message


def test_tables_that_are_written() -> None:
    """``spans``, its form without text, its nested form, and ``notes``, all with the version in their metadata."""
    offsets = ["start: int32 not null", "end: int32 not null"]
    rest = ["label: string not null", "score: float not null"]
    with_text = f"struct<{', '.join([*offsets, 'text: string not null', *rest])}>"
    assert fields(schema.spans_schema()) == [*KEY, *offsets, "text: string not null", *rest]
    assert fields(schema.spans_schema(text=False)) == [*KEY, *offsets, *rest]
    assert fields(schema.nested_schema()) == [*KEY, f"spans: list<element: {with_text} not null>"]
    assert fields(schema.nested_schema(text=False)) == [*KEY, f"spans: list<element: {SPAN} not null>"]
    outcome = ["status: string not null", "reason: string"]
    assert fields(schema.notes_schema()) == [*KEY, *COUNTS, "text_sha256: string", *outcome]
    tables = (schema.spans_schema(), schema.nested_schema(), schema.notes_schema())
    assert [table.metadata for table in tables] == [VERSION] * 3


def test_batches_of_readers() -> None:
    """Readers give the key, the text and the reason of a rejection."""
    assert fields(schema.source_schema()) == [*KEY, "text: string", "reason: string"]


def test_kept_columns_come_last() -> None:
    """A kept column keeps its field in every table."""
    ward = pa.field("ward", pa.int16(), nullable=False)
    makers = (schema.spans_schema, schema.nested_schema, schema.notes_schema, schema.source_schema)
    for make in makers:
        assert list(make(keep=[ward])) == [*make(), ward]


def test_kept_names_that_are_taken() -> None:
    """A kept column must not hide one of the tables' own, nor stand twice."""
    schema.check_kept(["ward", "date"])
    for name in ("source", "row", "start", "label", "spans", "n_chars", "status", "text"):
        with pytest.raises(UsageError) as caught:
            schema.check_kept(["ward", name])
        message = f"--keep {name}: that is a name of medner's own columns; rename it in the input"
        assert str(caught.value) == message
    ward = pa.field("ward", pa.int16())
    with pytest.raises(UsageError) as caught:
        schema.notes_schema([ward, ward])
    assert str(caught.value) == "a column was kept twice; name each --keep once"
