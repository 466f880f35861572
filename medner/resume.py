"""Whether a run may go on where an earlier one stopped: what was being run, and what was read, must be the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from medner import schema, sinks
from medner.errors import OutputError

#: What may differ between two descriptions of one run: where things lie (hashes and sizes are compared instead), how
#: the work is spread, and what is judged at the end.
FREE = frozenset(
    {
        "model.name",
        "model.device",
        "options.inputs",
        "options.output",
        "options.model",
        "options.max_rejected",
        "options.threads",
        "options.batch_tokens",
        "options.reuse",
    }
)

#: What a run's parts tell of its counts.
_HELD = ("rows", "annotated", "rejected", "spans", "tokens", "unknown", "windows", "chars", "parts")

#: Columns of the ``notes`` table that the input alone decides.
_GIVEN = (*schema.KEY.names, "n_chars", "text_sha256", "reason")


#: Names of the inputs' sizes in the description of a run.
_SIZES = re.compile(r"inputs\.[0-9]+\.bytes")


def check_description(place: str, before: Mapping[str, Any], now: Mapping[str, Any], *, finished: bool) -> None:
    """Refuse to go on with another run; raises :class:`OutputError`, naming the first difference.

    finished: the sizes of inputs must be the same, too. While a run is unfinished, a file that stopped it may be
    repaired: :func:`check_part` compares the rows of every part that is kept.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    changed = [
        name
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and (finished or not _SIZES.fullmatch(name))
    ]
    if changed:
        name = changed[0]
        if name.startswith("inputs"):
            _check_same_files(place, before.get("inputs"), now["inputs"])
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise OutputError(
            f"{place}: cannot go on with this run: {name} was {old.get(name)}, is {new.get(name)}{more}; "
            "run as before, choose another -o, or pass --overwrite"
        )


def check_inputs(place: str, before: Sequence[Any], now: Sequence[Any]) -> None:
    """Refuse other inputs than a finished run has read, as manifests list them; raises :class:`OutputError`."""
    check_description(place, {"inputs": before}, {"inputs": now}, finished=True)


def _check_same_files(place: str, before: Any, now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse other tables than before, which names one of them."""
    if not isinstance(before, list) or not all(isinstance(each, Mapping) for each in before):
        return  # damaged, which the general message tells
    old, new = ([each.get("source") for each in listed] for listed in (before, now))
    for said, these, those in (("is new", new, old), ("is missing", old, new)):
        if others := [name for name in these if name is not None and name not in those]:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise OutputError(
                f"{place}: cannot go on with this run: the input {others[0]} {said}{more}; give the files that it "
                "began with, and others to a run of their own"
            )


def check_counts(place: str, recorded: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """Refuse a manifest that counts other things than its parts hold; raises :class:`OutputError`."""
    if recorded.keys() != found.keys() or any(recorded[name] != found[name] for name in _HELD):
        raise OutputError(
            f"{place}: its {sinks.MANIFEST} counts other things than the parts hold; "
            "restore it, or remove it and pass --resume"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of nested mappings and lists with its dotted name, without those in :data:`FREE`."""
    if name in FREE:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield name, f"{len(value)} of them"
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name, value


def check_part(
    place: str, rows: Iterable[Mapping[str, Any]], batches: Iterable[pa.RecordBatch], keep: Sequence[str]
) -> None:
    """Refuse to keep a part whose notes are no longer those of the input.

    rows: of the part's ``notes`` table; batches: what the reader gives for the part, ``schema.source_schema``. Raises
    :class:`OutputError`, naming the first row that differs.
    """
    names = (*_GIVEN, *keep)
    written = iter(rows)
    for batch in batches:
        for expected in sinks.json_rows(_given(batch, names)):
            row = next(written, None)
            if row is None or any(row.get(name) != expected[name] for name in names):
                raise _changed(place, f"row {expected['row']} of {expected['source']}")
    if next(written, None) is not None:
        raise _changed(place, "its end")


def _changed(place: str, where: str) -> OutputError:
    return OutputError(
        f"{place}: the input changed since this part was written ({where}); "
        "restore it, choose another -o, or pass --overwrite"
    )


def _given(batch: pa.RecordBatch, names: Sequence[str]) -> pa.Table:
    texts = batch.column("text").to_pylist()
    found = {
        "n_chars": pa.array([len(text or "") for text in texts], pa.int32()),
        "text_sha256": pa.array([None if text is None else schema.text_sha256(text) for text in texts], pa.string()),
    }
    return pa.table({name: found[name] if name in found else batch.column(name) for name in names})
