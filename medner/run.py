"""One local run: read, annotate, write, overlapped, in parts that depend on the input alone."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib.metadata import version
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from medner import resume, runtime, schema, sinks, sources
from medner.annotate import Options
from medner.errors import InputError, OutputError, TooManyRejected, UsageError
from medner.tally import Tally, timed
from medner.workers import Alone, Crew

PART_ROWS = 5_000
PART_BYTES = 32 * 2**20

#: Seconds between two lines of progress where standard error is no terminal.
_LINE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one ``medner annotate`` does.

    output: a directory, a file with one of ``sinks.FILE_SUFFIXES``, or ``-``. form: ``parquet`` or ``jsonl``; None
    takes the file's, else Parquet. max_rejected: a count, ``N%`` of the rows, or ``all``; see :func:`check_rejected`.
    resume: keep what an earlier run of the directory has committed. overwrite: replace an earlier output. text: write
    the mentions' text. nested: a row per note. quiet: no progress.
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
    resume: bool = False
    text: bool = True
    nested: bool = False
    quiet: bool = False


def run(options: RunOptions, stdin: BinaryIO | None = None, stdout: BinaryIO | None = None) -> dict[str, Any]:
    """Annotate the inputs and return the manifest; :func:`check_rejected` judges it.

    Raises a :class:`MednerError`.
    """
    _allowed_share(options.max_rejected)
    form = _output_format(options)
    _check_resume(options)
    found = sources.discover(options.inputs)
    _check_apart(options.inputs, found.files, options.output, form)
    if found.skipped:  # no matter of progress: what lies there may have been meant
        _say(f"{found.skipped} {'file' if found.skipped == 1 else 'files'} of unknown suffix skipped")
    reader = sources.Reader(found.files, options.read, stdin)
    kept = tuple(reader.schema.field(name) for name in options.read.keep)
    tables = sinks.TableOptions(options.text, options.nested, kept)
    with contextlib.closing(_workers(options)) as workers:
        # That a GPU is not used is no matter of progress either.
        if workers.facts.notice and (not options.quiet or workers.facts.device == "cpu"):
            _say(workers.facts.notice)
        if workers.bundle.foreign and options.annotate.window is None and not options.quiet:
            _say(
                f"{workers.bundle.name} does not say its window; using {workers.bundle.window} tokens "
                "(--window overrides)"
            )
        description = _description(options, form, found.files, workers)
        with (
            contextlib.closing(_sink(options, form, tables, stdout)) as sink,
            contextlib.closing(_Progress(found.files, enabled=not options.quiet)) as progress,
            # Once more: other processes have to end before the directory is given back.
            contextlib.closing(workers),
            _interruptible(sink),
        ):
            before, finished = sink.earlier()
            if before is not None:
                resume.check_description(sink.name, before, description, finished=finished is not None)
            if finished is not None and not sink.has_every_part():
                _check_inputs(sink.name, finished, found.files, options)
            return _annotate(options, description, finished, reader, workers, sink, progress)


def _check_inputs(
    place: str, finished: dict[str, Any], files: Sequence[sources.InputFile], options: RunOptions
) -> None:
    """Refuse to write a lost part of a finished run from inputs that changed; a stream can be read once only."""
    if any(file.size() is None for file in files):
        return
    if not options.quiet:
        _say(f"{place} was finished and lost files since; reading the inputs to compare them with those of before")
    reader = sources.Reader(files, options.read)
    for _ in reader.batches():
        pass
    resume.check_inputs(place, finished["inputs"], reader.inputs())


def _annotate(
    options: RunOptions,
    description: dict[str, Any],
    finished: dict[str, Any] | None,
    reader: sources.Reader,
    workers: Alone | Crew,
    sink: sinks.Sink,
    progress: _Progress,
) -> dict[str, Any]:
    """Do every part that is not committed, and return the manifest. finished: the one of a run that had ended."""
    started = time.monotonic()
    sink.start(description)
    tally = Tally()

    def show() -> None:
        progress.update(tally, reader.bytes_read)

    def add_reading(seconds: float) -> None:
        tally.stages.reading += seconds

    for part, batches in _parts(timed(reader.batches(), add_reading), options):
        if (rows := sink.kept(part)) is not None:
            resume.check_part(f"{sink.name}, part {part}", rows, batches, options.read.keep)
            tally.keep(rows)
            show()
        else:
            workers.write(sink, part, batches, tally, show)
    workers.wait(sink, tally, show)
    sink.check_end()
    done: dict[str, Any] = {"inputs": reader.inputs(), "counts": tally.counts()}
    if finished is not None and tally.parts == tally.parts_kept:
        resume.check_inputs(sink.name, finished["inputs"], done["inputs"])
        resume.check_counts(sink.name, finished["counts"], done["counts"])
        if not options.quiet:
            _say(f"{sink.name} was finished already")
        return finished | {"options": description["options"]}
    if (inputs := _as_read(description["inputs"], done["inputs"])) != description["inputs"]:
        description = description | {"inputs": inputs}
        sink.start(description)
    seconds = round(time.monotonic() - started, 3)
    return sink.finish({**description, **done, "seconds": seconds, "stages": tally.stages.rounded()})


def _as_read(listed: Sequence[dict[str, Any]], read: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sizes as they were listed before the run; of files that grew or shrank before their turn, what was read."""
    return [
        before | {"bytes": after["bytes"]}
        if None not in (before["bytes"], after["bytes"]) and before.get("text_files") == after.get("text_files")
        else before
        for before, after in zip_longest(listed, read, fillvalue={"bytes": None})
    ]


def _workers(options: RunOptions) -> Alone | Crew:
    """Who annotates; raises :class:`UsageError` where several devices have no directory to share."""
    devices = runtime.devices(options.annotate.device)
    if len(devices) == 1:
        return Alone(options.model, options.annotate)
    if options.output == "-" or sinks.file_format(Path(options.output)) is not None:
        raise UsageError(
            f"--device {options.annotate.device}: several devices need a run directory, and -o {options.output} is "
            "none; name a directory, or one device"
        )
    return Crew(options.model, options.annotate, devices)


def check_rejected(manifest: dict[str, Any]) -> None:
    """Raise :class:`TooManyRejected` where a finished run rejected more rows than its ``max_rejected`` allows."""
    rows, rejected = manifest["counts"]["rows"], manifest["counts"]["rejected"]
    given = manifest["options"]["max_rejected"]
    number, is_share = _allowed_share(given)
    if rejected > (number * rows / 100 if is_share else number):
        raise TooManyRejected(
            f"{rejected} of {rows} rows were rejected, more than --max-rejected {given} allows; "
            "the output is complete and gives each one's reason"
        )


def summary(manifest: dict[str, Any]) -> str:
    """The run in two lines, for a person."""
    counts, model = manifest["counts"], manifest["model"]
    seconds = manifest["seconds"]
    kept = counts["rows_kept"]
    return (
        f"{counts['rows']:,} notes: {counts['annotated']:,} annotated, {counts['rejected']:,} rejected, "
        f"{counts['spans']:,} spans\n"
        f"{model['name']} {model['precision']} on {model['device']}, {seconds:,.1f} s, "
        f"{(counts['rows'] - kept) / max(seconds, 1e-9):,.1f} notes/s, "
        f"{counts['windows_reused']:,} of {counts['windows'] - counts['windows_kept']:,} windows reused"
        + (f"; {kept:,} notes were annotated before" if kept else "")
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


def _parts(batches: Iterable[pa.RecordBatch], options: RunOptions) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
    """The parts of a run with their batches; a stream is one part, and so is an input without a row."""
    if options.output == "-":
        yield 0, iter(batches)
        return
    part = -1
    for part, rows in groupby(cut_parts(batches, options.part_rows), key=itemgetter(0)):
        yield part, map(itemgetter(1), rows)
    if part < 0:
        yield 0, iter(())


@contextlib.contextmanager
def _interruptible(sink: sinks.Sink) -> Iterator[None]:
    """An interruption, and an input that has to be mended, tell how to go on, where that is possible."""
    try:
        yield
    except BaseException as exc:
        mended = False
        if isinstance(exc, InputError) and sink.resumable:
            with contextlib.suppress(OSError):
                mended = sinks.has_parts(Path(sink.name))
        if mended or (sink.resumable and not isinstance(exc, Exception)):
            exc.add_note(f"--resume goes on with {sink.name}")
        raise


def _check_apart(inputs: Iterable[str], files: Iterable[sources.InputFile], output: str, form: str) -> None:
    """Refuse to read what the run writes: an input would be replaced, or spans read as though they were notes."""
    if output == "-":
        return
    if sources.is_address(output):
        raise UsageError(f"-o {output}: medner writes local files; name one, and copy it there")
    path = Path(output)
    written = {sources.real(each) for each in sinks.paths(path)}
    # Also before anything is there: the run could not be resumed, for its parts would be inputs.
    files_of_a_part = [path / folder / f"part-000000.{form}" for folder in sinks.FOLDERS]
    later = written if sinks.file_format(path) else {sources.real(each) for each in files_of_a_part}
    for name in inputs:
        if any(sources.would_read(name, each) for each in later):
            raise UsageError(f"-o {output} lies in the input {name}; choose another -o, or name files or another glob")
    for file in files:
        if file.path is not None and not written.isdisjoint((real := sources.real(file.path), *real.parents)):
            raise UsageError(f"{file} is an input and lies in the output {output}; choose another -o")


#: Suffixes of files that medner does not write; a run directory of such a name would be taken for one.
_NOT_WRITTEN = frozenset({".csv", ".tsv", ".txt", ".json", ".ndjson", ".gz", ".zst", ".bz2"})


def _output_format(options: RunOptions) -> str:
    """``parquet`` or ``jsonl``; raises :class:`UsageError` where ``--format`` and ``-o`` contradict each other."""
    if options.output == "-":
        if options.form == "parquet":
            raise UsageError("-o - writes JSON lines; --format parquet needs a file or a directory")
        return "jsonl"
    if not options.output:  # as a path it would be the current directory
        raise UsageError("-o is empty; name a directory, a file, or -")
    path = Path(options.output)
    form = sinks.file_format(path)
    if form is None and path.suffix.lower() in _NOT_WRITTEN and not os.path.isdir(path):  # noqa: PTH112
        raise UsageError(
            f"-o {options.output}: a file ends in {', '.join(sinks.FILE_SUFFIXES)}; a run directory has no such suffix"
        )
    if form is not None and options.form not in (None, form):
        raise UsageError(f"--format {options.form} and -o {options.output} contradict each other; drop one")
    return form or options.form or "parquet"


def _check_resume(options: RunOptions) -> None:
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite contradict each other; drop one")
    if options.resume and (options.output == "-" or sinks.file_format(Path(options.output)) is not None):
        raise UsageError(
            f"--resume needs a run directory, and -o {options.output} is none; drop it, or name a directory"
        )


def _sink(options: RunOptions, form: str, tables: sinks.TableOptions, stdout: BinaryIO | None) -> sinks.Sink:
    if options.output == "-":
        if stdout is None and sys.stdout is None:
            raise OutputError("-o -: standard output is closed")
        return sinks.StreamSink(stdout if stdout is not None else sys.stdout.buffer, tables)
    path = Path(options.output)
    if sinks.file_format(path) is None:
        say = (lambda _: None) if options.quiet else _say
        return sinks.DirectorySink(path, form, tables, overwrite=options.overwrite, resume=options.resume, say=say)
    return sinks.FileSink(path, tables, overwrite=options.overwrite)


def _description(
    options: RunOptions, form: str, files: Sequence[sources.InputFile], workers: Alone | Crew
) -> dict[str, Any]:
    """What is being run, known before the first note: the head of the manifest, and the whole of ``run.json``."""
    bundle, facts = workers.bundle, workers.facts
    return {
        "medner": version("medner"),
        "versions": {"onnxruntime": runtime.version()}
        | {name: version(name) for name in ("tokenizers", "sentencex", "pyarrow", "numpy")}
        | {"python": platform.python_version()},
        "model": {
            "name": bundle.name,
            "precision": facts.precision,
            "window": bundle.window,
            "packed": bundle.packed,
            "labels": list(bundle.labels),
            "device": facts.device,
            "provider": facts.provider,
            "instruction_set": runtime.instruction_set(),
            "exact_int8": runtime.has_exact_int8(),
            "files": bundle.identity(facts.precision),
        },
        "options": {
            "inputs": _arguments(options.inputs, files),
            "output": schema.printable(options.output),
            "model": schema.printable(options.model),
            "format": form,
            "text": options.text,
            "nested": options.nested,
            "part_rows": options.part_rows,
            "max_rejected": options.max_rejected,
            "threads": facts.threads,
            "batch_tokens": facts.batch_tokens,
            "min_score": facts.min_score,
            "reuse": options.annotate.reuse,
            "read": asdict(options.read) | {"keep": list(options.read.keep)},
        },
        "inputs": sources.sizes(files),
    }


def _arguments(inputs: Iterable[str], files: Iterable[sources.InputFile]) -> list[str]:
    """The INPUT arguments for the record; text files named one by one are counted, since their names may be ids."""
    texts = {file.path for file in files if file.kind == "text"}
    inputs = list(inputs)
    named = [schema.printable(name) for name in inputs if Path(name) not in texts]
    unnamed = len(inputs) - len(named)
    return [*named, *([f"({unnamed} text files)"] if unnamed else [])]


def _allowed_share(value: str) -> tuple[Fraction, bool]:
    """Rows that ``--max-rejected`` allows to be rejected, and whether that is a percentage of those read."""
    if value == "all":
        return Fraction(100), True
    if not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?%", value):
        raise UsageError(f"--max-rejected {value}: use a count, a percentage such as 0.5%, or all")
    return Fraction(value.removesuffix("%")), value.endswith("%")


def _say(message: str) -> None:
    """A line on standard error. That nobody reads it any more is no reason to stop a run."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"medner: {message}", file=sys.stderr, flush=True)


class _Progress:
    """A bar over the bytes read on a terminal, a line now and then elsewhere; on standard error."""

    def __init__(self, files: Sequence[sources.InputFile], *, enabled: bool) -> None:
        self._enabled = enabled
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._total = sum(file.size() or 0 for file in files) if enabled else 0
        if enabled and sys.stderr is not None and sys.stderr.isatty():
            form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}" if self._total else "{elapsed}{postfix}"
            self._bar = tqdm(total=self._total or None, bar_format=form, leave=False, miniters=0)

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
            read = min(bytes_read, self._total)
            share = f"{100 * read / self._total:.0f} % of the input read, " if self._total else ""
            _say(f"{share}{tally.rows:,} notes, {rate:,.1f} notes/s, {tally.spans:,} spans")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
