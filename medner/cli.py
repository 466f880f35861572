"""The command line: parses, builds one options object, calls one function, prints."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import shell_complete

from medner.errors import MednerError, OutputError, defect

#: Of mallopt(3): blocks of so many bytes and more are mapped, and unmapped as soon as they are free.
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**18
#: Also of mallopt(3): how many blocks may be mapped, and from how many free bytes on the heap shrinks.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _NEVER = -4, -1, 2**31 - 1
#: Errors of a file system that takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: Whether a path can be read is for the command to say, in its own words and with its exit code.
_PATH = click.Path(readable=False, path_type=Path)

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_data = click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="NAME|PATH",
    help="Labelled data: CoNLL, PubTator, JSONL, hub data set; repeatable.",
)


def _renamings(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """New names by old ones."""
    pairs = [each.partition("=") for each in given]
    for each, (old, _equals, new) in zip(given, pairs, strict=True):
        if not (old and new):
            raise click.UsageError(f"--label {each}: use OLD=NEW, or *=NEW for all others")
    return {old: new for old, _equals, new in pairs}


_labels = click.option(
    "--label",
    "labels",
    multiple=True,
    callback=_renamings,
    metavar="OLD=NEW",
    help="Rename a label of the data; * is any other, and O drops it.",
)


_min_score = click.option(
    "--min-score", type=click.FloatRange(0, 1), help="Drop spans below it.  [default: the bundle's]"
)


_text_column = click.option(
    "--text-column", default="text", show_default=True, help="Column or field that holds the notes."
)


def _print(message: str, *, err: bool = False) -> None:
    """Print a result. Raises :class:`OutputError` where standard output is full."""
    try:
        try:
            click.echo(message, err=err)
        except UnicodeEncodeError as exc:  # the name of a file
            click.echo(message.encode(exc.encoding, "backslashreplace").decode(exc.encoding), err=err)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OutputError(f"standard {'error' if err else 'output'}: cannot be written: {exc.strerror}") from exc


def _give_memory_back() -> None:
    """Have what a run frees go back to the system; for a process of its own, before pyarrow is loaded.

    Pyarrow's own allocator keeps tens of MiB of what a part's tables took. Glibc, once a large array was freed, puts
    others on its heap, where they leave gaps. What the user chose by the environment stays.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(_LARGE_BLOCK)  # for the processes of several devices
        with contextlib.suppress(AttributeError, OSError, TypeError):  # a system without glibc
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _keep_memory() -> None:
    """Have what one step of a training frees serve the next; for a process of its own.

    Glibc else maps each large tensor anew, and a tenth of the time goes into clearing its pages. What the user chose by
    the environment stays.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # a system without glibc
            c = ctypes.CDLL(None)
            c.mallopt(_M_MMAP_MAX, 0)
            c.mallopt(_M_TRIM_THRESHOLD, _NEVER)


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="medner")
def cli() -> None:
    """Find exact entity spans in clinical notes, offline."""


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, metavar="OUT", help="Run directory, a .parquet or .jsonl file, or -.")
@click.option("--model", default="default", show_default=True, metavar="DIR|NAME", help="Bundle or ONNX model.")
@click.option(
    "--format", "form", type=click.Choice(["parquet", "jsonl"]), help="Of a run directory.  [default: parquet]"
)
@_text_column
@click.option("--id-column", help="Column of the note ids.  [default: note_id where there is one]")
@click.option("--encoding", default="utf-8", show_default=True, help="Of JSONL, CSV and text files.")
@click.option("--delimiter", help="Of CSV files.  [default: comma; tab in .tsv files]")
@click.option("--no-quotes", is_flag=True, help="A quote in CSV files is a character like any other.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, or several as cuda:N,N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="Variant of the bundle; auto is int8 on a CPU and fp16 on a GPU where the bundle has them.",
)
@click.option("--window", type=click.IntRange(min=8), help="Tokens of a window.  [default: the bundle's]")
@click.option("--threads", type=click.IntRange(1, 4096), help="Inference threads.  [default: the CPUs there are]")
@click.option("--batch-tokens", type=click.IntRange(1, 2**31 - 1), help="Tokens of one inference call.")
@click.option("--part-rows", type=click.IntRange(1, 2**31 - 1), default=5000, show_default=True, help="Rows of a part.")
@_min_score
@click.option("--limit", type=click.IntRange(0, 2**63 - 1), help="Read at most this many rows.")
@click.option("--resume", is_flag=True, help="Go on where an earlier run of the directory stopped, or start.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option(
    "--max-rejected",
    default="0",
    show_default=True,
    metavar="N|P%|all",
    help="More rejected rows than this: exit code 3.",
)
@click.option(
    "--max-note-bytes", type=click.IntRange(min=1), default=64 * 2**20, show_default=True, help="Reject above."
)
@click.option("--unique-ids", is_flag=True, help="Reject a row whose id came before.")
@click.option("--no-text", is_flag=True, help="Leave the mentions' text out of the output.")
@click.option("--nested", is_flag=True, help="One row per note, with a list of spans.")
@click.option("--keep", multiple=True, metavar="COLUMN", help="Carry an input column into the output; repeatable.")
@click.option("--no-reuse", is_flag=True, help="Infer equal windows again instead of once.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def annotate(**given: Any) -> None:
    """Annotate notes: JSONL, Parquet, CSV or text files, plain or compressed, directories and globs of them.

    Writes a row per span and a row per note. INPUT - reads JSON lines from standard input; -o - writes a JSON record
    per note to standard output.
    """
    _give_memory_back()
    from medner import run
    from medner.annotate import Options
    from medner.sources import ReadOptions

    reading = ("text_column", "id_column", "encoding", "delimiter", "keep", "limit", "max_note_bytes", "unique_ids")
    annotating = ("precision", "device", "window", "threads", "batch_tokens", "min_score")
    running = ("inputs", "output", "model", "form", "part_rows", "max_rejected")
    flags = ("resume", "overwrite", "nested", "quiet")
    options = run.RunOptions(
        **{name: given[name] for name in (*running, *flags)},
        read=ReadOptions(**{name: given[name] for name in reading}, quotes=not given["no_quotes"]),
        annotate=Options(**{name: given[name] for name in annotating}, reuse=not given["no_reuse"]),
        text=not given["no_text"],
    )
    manifest = run.run(options)
    if not given["quiet"]:
        with contextlib.suppress(BrokenPipeError):  # a run that nobody reads of is judged all the same
            _print(run.summary(manifest), err=given["output"] == "-")
    run.check_rejected(manifest)


@cli.command()
@_data
@click.option("--base", required=True, metavar="CHECKPOINT", help="Directory or hub name of a pretrained model.")
@click.option("-o", "--output", type=_PATH, help="Directory of the new checkpoint.")
@click.option("--epochs", type=click.IntRange(min=1), default=8, show_default=True, help="Passes over the data.")
@click.option("--lr", type=float, default=1e-4, show_default=True, help="Peak learning rate; it decays linearly.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Windows of one step.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=13,
    show_default=True,
    help="Of the shuffling and the new weights.",
)
@click.option("--window", type=click.IntRange(min=8), default=128, show_default=True, help="Tokens of a window.")
@click.option("--weight-decay", type=float, default=0.01, show_default=True, help="Of AdamW.")
@click.option("--warmup-ratio", type=float, default=0.1, show_default=True, help="Share of the steps.")
@click.option("--class-weights", is_flag=True, help="Weigh classes by their inverse frequency.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the arithmetic; auto takes bf16 or fp16 where the device is faster in it.",
)
@_labels
@click.option(
    "--silver",
    multiple=True,
    metavar="PATH",
    help="Data to learn from, but not to score, such as another model's spans.",
)
@click.option(
    "--unlabelled",
    multiple=True,
    metavar="FILE[:COLUMN]",
    help="Notes without labels, to learn from teachers what they find in them.",
)
@click.option("--layer-decay", type=float, default=1.0, show_default=True, help="Learning rate, from layer to layer.")
@click.option("--label-smoothing", type=float, default=0.0, show_default=True, help="Share for all classes alike.")
@click.option(
    "--average", type=click.IntRange(min=1), default=1, show_default=True, help="Try the mean of so many last epochs."
)
@click.option(
    "--average-with",
    multiple=True,
    metavar="CHECKPOINT",
    help="In the end, try the mean of the weights and this model's, too, such as a teacher's.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="CHECKPOINT",
    help="Learn from this model's probabilities, too; the mean of several.",
)
@click.option(
    "--teacher-weight",
    type=float,
    default=0.5,
    show_default=True,
    help="Of teachers on labelled data; on unlabelled notes they alone count.",
)
@click.option("--max-documents", type=click.IntRange(min=1), help="Use only so many of each split.")
@click.option("--resume", is_flag=True, help="Go on from the last epoch saved in the output directory.")
@click.option(
    "--inspect", type=click.IntRange(min=1), metavar="N", help="Show N examples as the model sees them, and stop."
)
def train(inspect: int | None, **given: Any) -> None:
    """Fine-tune a pretrained model on labelled text and keep its best epoch.

    The epoch with the best strict F1 on the devel split is kept. Several --data are learnt together. Writes the
    checkpoint, metrics.json and learning_curve.png.
    """
    from medner import train as training

    if given["output"] is None and inspect is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    output = given.pop("output") or Path()
    options = training.TrainOptions(**given, output=output)
    if inspect:
        _print(str(training.inspect(options, inspect)))
        return
    _keep_memory()
    _print(str(training.train(options)))


@cli.command()
@click.argument("checkpoint", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, metavar="BUNDLE", help="New directory.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "int8", "fp16"]),
    multiple=True,
    default=("fp32", "int8"),
    show_default=True,
    help="Variant to write; repeatable. fp16 is for GPUs.",
)
@click.option(
    "--parity-data", required=True, metavar="FILE", help="Real text for the gate: labelled documents or notes."
)
@click.option("--split", default="devel", show_default=True, help="Of parity data that has splits.")
@_text_column
@_labels
@click.option("--window", default="auto", show_default=True, metavar="auto|N", help="auto: best on labelled documents.")
@click.option("--one-segment", is_flag=True, help="With --window N: a segment a window, not as many as fit.")
@click.option(
    "--min-score",
    default="0",
    show_default=True,
    metavar="auto|P",
    help="The bundle leaves spans below it out; auto: best on labelled text.",
)
@click.option("--name", help="Name of the bundle.  [default: the directory's]")
@click.option("--licence", help="Licence of the weights, for the record.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle.")
def export(window: str, one_segment: bool, min_score: str, **given: Any) -> None:
    """Export a checkpoint to ONNX and prove that every variant finds what PyTorch finds."""
    from medner import export as exporting

    if window != "auto" and not window.isdecimal():
        raise click.UsageError(f"--window {window}: use auto or a number of tokens")
    if one_segment and window == "auto":
        raise click.UsageError("--one-segment goes with --window N; auto chooses both")
    size = None if window == "auto" else int(window)
    try:
        least = None if min_score == "auto" else float(min_score)
    except ValueError as exc:
        raise click.UsageError(f"--min-score {min_score}: use auto or a number from 0 to 1") from exc
    options = exporting.ExportOptions(**given, window=size, packed=not one_segment, min_score=least)
    _print(exporting.export(options))


@cli.command()
@click.option(
    "--model", default="default", show_default=True, metavar="BUNDLE|CHECKPOINT", help="Bundle or checkpoint."
)
@click.option("--data", required=True, metavar="NAME|PATH", help="Labelled data: CoNLL, PubTator, JSONL, hub data set.")
@click.option("--split", default="test", show_default=True, help="Split of the data set.")
@_labels
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="Variant of the bundle.",
)
@click.option("--window", type=click.IntRange(min=8), help="Tokens of a window.  [default: the bundle's]")
@_min_score
@click.option("--wrap", type=click.IntRange(min=2), metavar="N", help="Break the lines after N characters first.")
@click.option("--json", "target", type=_PATH, metavar="FILE", help="Write the scores there, too.")
def evaluate(
    model: str, data: str, split: str, labels: dict[str, str], wrap: int | None, target: Path | None, **given: Any
) -> None:
    """Score a model: strict entity scores with 95 % bootstrap intervals.

    Tokenized data is scored on its own tokens as seqeval does (strict, IOB2), other data on exact character offsets.
    """
    from medner import datasets, schema, score, sinks
    from medner import evaluate as evaluation
    from medner.annotate import Options

    if target is not None and not os.path.isdir(target.parent):  # noqa: PTH112 - Path.is_dir may raise
        raise OutputError(f"{target}: no such directory; create it first")
    documents = datasets.load(data, split, labels)
    annotator = evaluation.open_model(model, Options(**given))
    scores = evaluation.evaluate(annotator, evaluation.hard_wrapped(documents, wrap) if wrap else documents)
    if target is not None:
        asked = {"data": schema.printable(data), "split": split, "labels_renamed": labels, "wrap": wrap}
        used = {"window": annotator.bundle.window, "min_score": annotator.min_score}
        facts = {"model": schema.printable(model), "precision": annotator.precision, **asked, **used}
        sinks.write_json(target, facts | scores.as_dict())
    kept = f", spans from {annotator.min_score:g} up" if annotator.min_score else ""
    place = schema.printable(data)
    _print(
        f"{annotator.bundle.name} {annotator.precision}, window {annotator.bundle.window}{kept}, on {place} ({split})"
    )
    _print(f"{scores.documents} documents, scored on {scores.unit}\n{score.table(scores)}")


@cli.command()
@click.option("--checkpoint", type=_PATH, required=True, metavar="DIR", help="PyTorch model.")
@click.option("--bundle", required=True, metavar="DIR", help="Bundle that was exported from it.")
@click.option("--notes", required=True, metavar="FILE", help="Your notes, or labelled documents, which give F1, too.")
@click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="New directory.")
@click.option("--split", default="devel", show_default=True, help="Of labelled data that has splits.")
@_labels
@click.option(
    "--limit", type=click.IntRange(min=1), default=200, show_default=True, help="Notes used, evenly over the file."
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each engine.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an engine.  [default: the CPUs there are]")
@_text_column
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison.")
def compare(**given: Any) -> None:
    """Compare a PyTorch checkpoint with its ONNX bundle on your notes.

    Parity first, then latency, throughput, load time, memory and file size of PyTorch and of every variant. Writes
    compare.json, compare.md and compare.png. No speed-up is given for a variant that fails parity (exit code 1).
    """
    from medner import compare as comparing
    from medner import comparison

    result = comparing.compare(comparing.CompareOptions(**given))
    with contextlib.suppress(BrokenPipeError):
        _print(comparison.text(result))
    comparing.check_parity(result)


@cli.command()
@click.argument("output", type=_PATH, metavar="DIR")
@click.option(
    "--notes", multiple=True, metavar="INPUT", help="What was annotated, to compare spans with: once for each INPUT."
)
def verify(output: Path, notes: tuple[str, ...]) -> None:
    """Check that a finished run's output is whole and agrees with its manifest.

    DIR is a run directory, or the file of spans that a run wrote. Rows, counts, offsets and every file's hash are
    checked; with --notes, every span against its text, too. The first contradiction is exit code 1.
    """
    from medner import verify as verifying

    _print(verifying.verify(output, notes))


@cli.command()
@click.argument("model", default="default", metavar="[BUNDLE]")
def info(model: str) -> None:
    """Show what a bundle holds, and check every file's hash."""
    from medner import bundle

    found = bundle.load(model)
    found.check()
    _print(bundle.describe(found))


@cli.command()
@click.option("--model", default="default", show_default=True, metavar="DIR|NAME", help="Bundle or ONNX model.")
@click.option(
    "-o",
    "--output",
    type=_PATH,
    default=".",
    metavar="OUT",
    help="Where a run would write.  [default: the working directory]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(model: str, output: Path, device: str, as_json: bool) -> None:
    """Check the installation: onnxruntime, processor, GPU with driver and libraries, model, output.

    Prints a line for each check: ok, note (it works, at a cost) or problem, with what to do. Exit code 1 where there is
    a problem.
    """
    from medner import doctor as examining

    findings = examining.examine(model, output, device)
    _print(examining.as_json(findings) if as_json else examining.text(findings))
    examining.judge(findings)


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


class _Terminated(BaseException):
    """SIGTERM, or a terminal that is closed, raised where the program stands so that files are cleaned up."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: maps every outcome to the exit code that the README promises."""
    code = _exit_code(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            # Python would try again at exit, complain, and exit with 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _exit_code(arguments: list[str] | None) -> int:
    if completion := os.environ.get("_MEDNER_COMPLETE"):
        return shell_complete(cli, {}, "medner", "_MEDNER_COMPLETE", completion)
    try:
        # Not `cli.main`, which takes a closed pipe for a failure and an EOFError for Ctrl-C.
        given = sys.argv[1:] if arguments is None else arguments
        with _termination_raises(), cli.make_context("medner", list(given)) as context:
            cli.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as exc:  # after --help and --version
        return exc.exit_code
    except click.ClickException as exc:
        with contextlib.suppress(OSError):
            exc.show()
        return exc.exit_code
    except MednerError as exc:
        _say("; ".join([str(exc), *_notes(exc)]))
        return exc.exit_code
    except (KeyboardInterrupt, click.Abort) as exc:
        _say("; ".join(["interrupted", *_notes(exc)]))
        return 130
    except _Terminated as exc:
        _say("; ".join(["terminated", *_notes(exc)]))
        return 143
    except BrokenPipeError:  # the reader has what it wanted
        return 0
    except BaseException as exc:  # a defect of medner, or a panic of Rust code; the message might hold note text
        if isinstance(exc, OSError) and exc.errno in _FULL:  # click's own output, or a temporary file of a library
            _say(f"{exc.filename or 'the output'}: cannot be written: {exc.strerror}")
            return OutputError.exit_code
        if _is_shortage(exc):
            _say("out of memory, or of threads; raise the limit that was set, or lower --threads and --batch-tokens")
            return 1
        _say(defect(exc))
        if os.environ.get("MEDNER_DEBUG"):
            raise
        return 1
    return 0


def _is_shortage(exc: BaseException) -> bool:
    """Whether the system refused memory or a thread."""
    refused = isinstance(exc, OSError) and exc.errno in (errno.ENOMEM, errno.EAGAIN)
    return refused or isinstance(exc, MemoryError) or str(exc) == "can't start new thread"


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(f"medner: {message}", err=True)


def _notes(exc: BaseException) -> list[str]:
    """What the functions that an exception passed through had to add."""
    return getattr(exc, "__notes__", [])


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """A signal to end raises, unless it is ignored, as a terminal that is closed is under nohup."""

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's call
        raise _Terminated

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
