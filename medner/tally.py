"""What a run has done so far: rows and their counts, and the seconds that each stage has worked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter
from typing import Any, TypeVar

import pyarrow as pa

T = TypeVar("T")

#: What a note's row counts, as ``n_spans`` and so on.
_COUNTED = ("spans", "tokens", "unknown", "windows", "chars")


@dataclass(slots=True)
class Stages:
    """Seconds of work by stage; stages overlap, and those of several processes are summed.

    inferring: with at least one inference call under way, copies to and from the device included; for the rest of a
    run's seconds, and perhaps a little more, the device waited.
    writing: making tables of a part's spans and bringing them to the disk.
    """

    reading: float = 0.0
    tokenizing: float = 0.0
    inferring: float = 0.0
    decoding: float = 0.0
    writing: float = 0.0

    def rounded(self) -> dict[str, float]:
        """By name, in milliseconds' precision."""
        return {name: round(seconds, 3) for name, seconds in asdict(self).items()}


@dataclass(slots=True)
class Tally:
    """Counts of a run, over the rows written so far.

    parts_kept, rows_kept and windows_kept: of parts that an earlier process of this run wrote. windows_inferred and
    windows_reused: windows that went through the model, and those whose answer was another's.
    """

    rows: int = 0
    annotated: int = 0
    rejected: int = 0
    spans: int = 0
    tokens: int = 0
    unknown: int = 0
    windows: int = 0
    chars: int = 0
    parts: int = 0
    parts_kept: int = 0
    rows_kept: int = 0
    windows_kept: int = 0
    windows_inferred: int = 0
    windows_reused: int = 0
    stages: Stages = field(default_factory=Stages)

    def keep(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the ``notes`` rows of a part that an earlier process of this run wrote."""
        rejected = sum(row["reason"] is not None for row in rows)
        self.rows += len(rows)
        self.rejected += rejected
        self.annotated += len(rows) - rejected
        for name in _COUNTED:
            setattr(self, name, getattr(self, name) + sum(row[f"n_{name}"] for row in rows))
        self.rows_kept += len(rows)
        self.windows_kept += sum(row["n_windows"] for row in rows)
        self.parts += 1
        self.parts_kept += 1

    def add(self, batch: pa.RecordBatch) -> None:
        """Count an annotated batch."""
        rejected = batch.num_rows - batch.column("reason").null_count
        self.rows += batch.num_rows
        self.rejected += rejected
        self.annotated += batch.num_rows - rejected
        for name in _COUNTED:
            total = int(batch.column(f"n_{name}").to_numpy().sum())
            setattr(self, name, getattr(self, name) + total)

    def merge(self, other: Tally) -> None:
        """Add what another process has counted."""
        _add(self, other, {"stages"})
        _add(self.stages, other.stages)

    def counts(self) -> dict[str, int]:
        """By name, without the seconds."""
        return {name: value for name, value in asdict(self).items() if name != "stages"}


def _add(ours: Any, theirs: Any, but: Iterable[str] = ()) -> None:
    for name in {each.name for each in fields(ours)}.difference(but):
        setattr(ours, name, getattr(ours, name) + getattr(theirs, name))


def timed(items: Iterable[T], took: Callable[[float], None]) -> Iterator[T]:
    """The same items; ``took`` gets the seconds that each one was waited for, and those until there was no more."""
    iterator = iter(items)
    while True:
        start = perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            took(perf_counter() - start)
        yield item
