"""One local run: read, annotate, write, overlapped, in parts that depend on the input alone."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from medner import runtime, sinks, sources
from medner.annotate import Annotator, Options
from medner.errors import OutputError, TooManyRejected, UsageError

PART_ROWS = 5_000
PART_BYTES = 32 * 2**20

#: Seconds between two lines of progress where standard error is no terminal.
_LINE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one ``medner annotate`` does.

    output: a directory, a file with one of ``sinks.FILE_SUFFIXES``, or ``-``. form: ``parquet`` or ``jsonl``; None
    takes the file's, else Parquet. max_rejected: a count, ``N%`` of the rows, or ``all``. text: write the mentions'
    text. nested: a row per note. quiet: no progress.
    """

    inputs: tuple[str, ...]
    output: str
    model: str = "default"
    form: str | None = None
    read: sources.ReadOptions = field(default_factory=sources.ReadOptions)
    annotate: Options = field(default_factory=Options)
    part_rows: int = PART_ROWS
    max_rejected: str = "0"
    overwrite: bool = False
    text: bool = True
    nested: bool = False
    quiet: bool = False


@dataclass(slots=True)
class Tally:
    """Counts of a run, over the rows written so far."""

    rows: int = 0
    annotated: int = 0
    rejected: int = 0
    spans: int = 0
    tokens: int = 0
    unknown: int = 0
    windows: int = 0
    chars: int = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Count an annotated batch."""
        rejected = batch.num_rows - batch.column("reason").null_count
        self.rows += batch.num_rows
        self.rejected += rejected
        self.annotated += batch.num_rows - rejected
        for name in ("spans", "tokens", "unknown", "windows", "chars"):
            total = int(batch.column(f"n_{name}").to_numpy().sum())
            setattr(self, name, getattr(self, name) + total)


def run(options: RunOptions, stdin: BinaryIO | None = None, stdout: BinaryIO | None = None) -> dict[str, Any]:
    """Annotate the inputs and return the manifest.

    Raises a :class:`MednerError`; :class:`TooManyRejected` only after the output is complete.
    """
    allowed = _allowed_rejections(options.max_rejected)
    found = sources.discover(options.inputs)
    if found.skipped and not options.quiet:
        print(f"medner: {found.skipped} files of unknown suffix skipped", file=sys.stderr)
    reader = sources.Reader(found.files, options.read, stdin)
    kept = tuple(reader.schema.field(name) for name in options.read.keep)
    annotator = Annotator.load(options.model, options.annotate)
    if annotator.bundle.foreign and options.annotate.window is None and not options.quiet:
        print(
            f"medner: {annotator.bundle.name} does not say its window; using {annotator.bundle.window} tokens "
            "(--window overrides)",
            file=sys.stderr,
        )
    sink = _sink(options, sinks.TableOptions(options.text, options.nested, kept), stdout)
    started = time.monotonic()
    description = _description(options, annotator)
    tally = Tally()
    parts: deque[int] = deque()
    progress = _Progress(found.files, enabled=not options.quiet)
    try:
        sink.start(description)
        held: list[pa.RecordBatch] = []
        number = 0
        for batch in annotator.stream(_numbered(cut_parts(reader.batches(), options.part_rows), parts)):
            part = parts.popleft()
            if part != number:
                sink.commit(number, held)
                number, held = part, []
            held.append(batch)
            tally.add(batch)
            progress.update(tally, reader.bytes_read)
        if held:
            sink.commit(number, held)
        manifest = {
            **description,
            "inputs": reader.inputs(),
            "counts": asdict(tally)
            | {
                "parts": number + 1 if tally.rows else 0,
                "windows_inferred": annotator.counts.inferred,
                "windows_reused": annotator.counts.reused,
            },
            "seconds": round(time.monotonic() - started, 3),
        }
        sink.finish(manifest)
    finally:
        progress.close()
        sink.abort()
    if tally.rejected > allowed(tally.rows):
        raise TooManyRejected(
            f"{tally.rejected} of {tally.rows} rows were rejected, more than --max-rejected {options.max_rejected} "
            f"allows; the output is complete, and column reason of the notes table says why"
        )
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """The run in two lines, for a person."""
    counts, model = manifest["counts"], manifest["model"]
    seconds = manifest["seconds"]
    return (
        f"{counts['rows']:,} notes: {counts['annotated']:,} annotated, {counts['rejected']:,} rejected, "
        f"{counts['spans']:,} spans\n"
        f"{model['name']} {model['precision']} on {model['device']}, {seconds:,.1f} s, "
        f"{counts['rows'] / max(seconds, 1e-9):,.1f} notes/s, "
        f"{counts['windows_reused']:,} of {counts['windows']:,} windows reused"
    )


def cut_parts(
    batches: Iterable[pa.RecordBatch], part_rows: int, part_bytes: int = PART_BYTES
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Cut batches where parts end: after ``part_rows`` rows or ``part_bytes`` bytes of text, whichever comes first.

    Yields the part's number and the rows of it. Where a part ends depends on the rows alone, not on the batches.
    """
    part = rows = size = 0
    for batch in batches:
        lengths = pc.fill_null(pc.binary_length(batch.column("text")), 0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths.astype(np.int64))
        start = 0
        while start < batch.num_rows:
            before = int(ends[start - 1]) if start else 0
            # The part takes rows until one of them brings it to its size; that row still belongs to it.
            full = int(np.searchsorted(ends[start:], part_bytes - size + before)) + 1
            stop = min(batch.num_rows, start + part_rows - rows, start + full)
            yield part, batch.slice(start, stop - start)
            rows, size = rows + stop - start, size + int(ends[stop - 1]) - before
            if rows >= part_rows or size >= part_bytes:
                part, rows, size = part + 1, 0, 0
            start = stop


def _numbered(batches: Iterable[tuple[int, pa.RecordBatch]], parts: deque[int]) -> Iterator[pa.RecordBatch]:
    for part, batch in batches:
        parts.append(part)
        yield batch


def _sink(options: RunOptions, tables: sinks.TableOptions, stdout: BinaryIO | None) -> sinks.Sink:
    if options.output == "-":
        if options.form == "parquet":
            raise UsageError("-o - writes JSON lines; --format parquet needs a file or a directory")
        return sinks.StreamSink(stdout if stdout is not None else sys.stdout.buffer, tables)
    path = Path(options.output)
    suffix = sinks.file_suffix(path)
    if suffix is None or path.is_dir():
        return sinks.DirectorySink(path, options.form or "parquet", tables, overwrite=options.overwrite)
    if options.form not in (None, sinks.FILE_SUFFIXES[suffix][0]):
        raise UsageError(f"--format {options.form} and -o {options.output} contradict each other; drop one")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such directory; create it first")
    return sinks.FileSink(path, tables, overwrite=options.overwrite)


def _description(options: RunOptions, annotator: Annotator) -> dict[str, Any]:
    """What is being run, known before the first note: the head of the manifest, and the whole of ``run.json``."""
    bundle, session = annotator.bundle, annotator.session
    assert session is not None
    return {
        "medner": version("medner"),
        "versions": {"onnxruntime": runtime.version()}
        | {name: version(name) for name in ("tokenizers", "sentencex", "pyarrow", "numpy")},
        "model": {
            "name": bundle.name,
            "precision": annotator.precision,
            "window": bundle.window,
            "labels": list(bundle.labels),
            "device": session.device,
            "provider": session.provider,
            "instruction_set": runtime.instruction_set(),
            "exact_int8": runtime.has_exact_int8(),
            "files": bundle.identity(annotator.precision),
        },
        "options": {
            "inputs": list(options.inputs),
            "output": options.output,
            "model": options.model,
            "format": options.form,
            "text": options.text,
            "nested": options.nested,
            "part_rows": options.part_rows,
            "max_rejected": options.max_rejected,
            "threads": annotator.threads,
            "batch_tokens": annotator.batch_tokens,
            "min_score": options.annotate.min_score,
            "reuse": options.annotate.reuse,
            "read": asdict(options.read),
        },
    }


def _allowed_rejections(value: str) -> Any:
    """How many rejected rows ``--max-rejected`` allows, as a function of the rows read."""
    if value == "all":
        return lambda rows: rows
    try:
        number = float(value.removesuffix("%"))
        if number < 0 or (not value.endswith("%") and number != int(number)):
            raise ValueError
    except ValueError as exc:
        raise UsageError(f"--max-rejected {value}: use a count, a percentage such as 0.5%, or all") from exc
    if value.endswith("%"):
        return lambda rows: rows * number / 100
    return lambda _: number


class _Progress:
    """A bar over the bytes read on a terminal, a line now and then elsewhere; on standard error."""

    def __init__(self, files: Sequence[sources.InputFile], *, enabled: bool) -> None:
        self._enabled = enabled
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._total = sum(file.path.stat().st_size for file in files if file.path is not None)
        if enabled and sys.stderr.isatty():
            form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=self._total or None, bar_format=form if self._total else None, leave=False)

    def update(self, tally: Tally, bytes_read: int) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        rate = tally.rows / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{tally.rows:,} notes, {rate:,.1f} notes/s, {tally.spans:,} spans", refresh=False
            )
            self._bar.update(min(bytes_read, self._total) - self._bar.n)
        elif now - self._said >= _LINE_SECONDS:
            self._said = now
            share = (
                f"{100 * min(bytes_read, self._total) / self._total:.0f} % of the input read, " if self._total else ""
            )
            print(f"medner: {share}{tally.rows:,} notes, {rate:,.1f} notes/s, {tally.spans:,} spans", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
