"""The Arrow contract: what goes into the annotator, what comes out, and what is written.

Nothing here is inferred from data. Within a major ``SCHEMA_VERSION`` columns are only appended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from medner.errors import InputError, UsageError

SCHEMA_VERSION = "1.0"

SPAN = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
SPANS = pa.list_(pa.field("item", SPAN, nullable=False))

#: Columns that the annotator adds to each batch, in this order.
ANNOTATION = pa.schema(
    [
        pa.field("spans", SPANS),
        pa.field("n_chars", pa.int32(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("n_unknown", pa.int32(), nullable=False),
        pa.field("n_windows", pa.int32(), nullable=False),
        pa.field("n_spans", pa.int32(), nullable=False),
        pa.field("text_sha256", pa.string()),
    ]
)

#: The key of a row in every table: the file, the 0-based record in it, and the note's id.
KEY = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("note_id", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Span:
    """One entity mention in one note.

    ``start`` and ``end`` are Unicode code points in the note as it was read, ``end`` exclusive. ``score`` is the mean
    over the span's words of the probability of the word's predicted label. ``text`` is ``note[start:end]``.
    """

    start: int
    end: int
    label: str
    score: float
    text: str


def source_schema(keep: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of the batches that readers produce.

    ``text`` is null exactly where ``reason`` says why the row was rejected. Kept input columns follow at the end.
    """
    return pa.schema([*KEY, pa.field("text", pa.string()), pa.field("reason", pa.string()), *keep])


def annotated_schema(schema: pa.Schema, text_column: str = "text") -> pa.Schema:
    """Schema of an annotated batch: the input's fields, then :data:`ANNOTATION`.

    Raises :class:`InputError` where the text column is absent or no string column, or where the input already has a
    column of one of the added names.
    """
    if text_column not in schema.names:
        raise InputError(f"no column {text_column!r} in the batch; it has {', '.join(schema.names) or 'none'}")
    if schema.names.count(text_column) > 1:
        raise InputError(f"the batch has more than one column {text_column!r}; rename all but one")
    kind = schema.field(text_column).type
    if not is_text(kind):
        raise InputError(f"column {text_column!r} holds {kind}, not text; cast it to a string first")
    taken = [name for name in ANNOTATION.names if name in schema.names]
    if taken:
        raise InputError(f"the batch already has a column {taken[0]!r}, which the annotation adds; rename it first")
    return pa.schema([*schema, *ANNOTATION], metadata=schema.metadata)


def is_text(kind: pa.DataType) -> bool:
    """True for ``string``, ``large_string``, ``string_view`` and dictionaries of them."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def text_sha256(text: str) -> str:
    """What the ``notes`` table holds of a note's text: the SHA-256 of its UTF-8 bytes, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def printable(name: str) -> str:
    """A path as text that can be printed, and written to Parquet and JSON, also where it is no valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def spans_schema(*, text: bool = True, keep: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of the ``spans`` table: a row per span, in input order. ``text=False`` leaves the mention's text out."""
    fields = [*KEY, SPAN.field("start"), SPAN.field("end")]
    if text:
        fields.append(pa.field("text", pa.string(), nullable=False))
    return _written([*fields, SPAN.field("label"), SPAN.field("score"), *keep])


def nested_schema(*, text: bool = True, keep: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of the ``spans`` table with ``--nested``: a row per note; a rejected note has a null list."""
    return _written([*KEY, pa.field("spans", pa.list_(pa.field("element", _span(text), nullable=False))), *keep])


def notes_schema(keep: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of the ``notes`` table: a row per input row, rejected ones included."""
    counts = [field for field in ANNOTATION if field.name != "spans"]
    outcome = [pa.field("status", pa.string(), nullable=False), pa.field("reason", pa.string())]
    return _written([*KEY, *counts, *outcome, *keep])


def check_kept(names: Iterable[str]) -> None:
    """Refuse kept columns whose names the output tables use, with some options at least."""
    used = {*spans_schema().names, *nested_schema().names, *notes_schema().names}
    for name in names:
        if name in used:
            raise UsageError(f"--keep {name}: that is a name of medner's own columns; rename it in the input")


def _span(text: bool) -> pa.StructType:
    fields = list(SPAN)
    if text:
        fields.insert(2, pa.field("text", pa.string(), nullable=False))
    return pa.struct(fields)


def _written(fields: Iterable[pa.Field]) -> pa.Schema:
    schema = pa.schema(list(fields))
    if len(set(schema.names)) != len(schema.names):
        raise UsageError("a column was kept twice; name each --keep once")
    return schema.with_metadata({"medner.schema_version": SCHEMA_VERSION})
