"""The command line: parses, builds one options object, calls one function, prints."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from medner.errors import MednerError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_data = click.option("--data", required=True, metavar="NAME|PATH", help="CoNLL, PubTator or JSONL, or a hub data set.")


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
@click.option("--text-column", default="text", show_default=True, help="Column or field that holds the notes.")
@click.option("--id-column", help="Column of the note ids.  [default: note_id where there is one]")
@click.option("--encoding", default="utf-8", show_default=True, help="Of JSONL, CSV and text files.")
@click.option("--delimiter", help="Of CSV files.  [default: comma; tab in .tsv files]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="Variant of the bundle; auto is int8 on a CPU and fp16 on a GPU where the bundle has them.",
)
@click.option("--window", type=click.IntRange(min=8), help="Tokens of a window.  [default: the bundle's]")
@click.option("--threads", type=click.IntRange(min=1), help="Inference threads.  [default: the CPUs there are]")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens of one inference call.")
@click.option("--part-rows", type=click.IntRange(min=1), default=5000, show_default=True, help="Rows of a part.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Drop spans below it.")
@click.option("--limit", type=click.IntRange(min=0), help="Read at most this many rows.")
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
    from medner import run
    from medner.annotate import Options
    from medner.sources import ReadOptions

    reading = ("text_column", "id_column", "encoding", "delimiter", "keep", "limit", "max_note_bytes", "unique_ids")
    annotating = ("precision", "device", "window", "threads", "batch_tokens", "min_score")
    running = ("inputs", "output", "model", "form", "part_rows", "max_rejected", "overwrite", "nested", "quiet")
    options = run.RunOptions(
        **{name: given[name] for name in running},
        read=ReadOptions(**{name: given[name] for name in reading}),
        annotate=Options(**{name: given[name] for name in annotating}, reuse=not given["no_reuse"]),
        text=not given["no_text"],
    )
    manifest = run.run(options)
    if not given["quiet"]:
        click.echo(run.summary(manifest), err=given["output"] == "-")


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


class _Terminated(BaseException):
    """SIGTERM, raised where the program stands so that files are cleaned up."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: maps every outcome to the exit code that the README promises."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    try:
        with _sigterm_raises():
            cli.main(arguments, prog_name="medner", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except MednerError as exc:
        _say(str(exc))
        return exc.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return 130
    except _Terminated:
        _say("terminated")
        return 143
    except BrokenPipeError:
        # The reader has what it wanted. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:  # a defect of medner; its message might hold note text, its type and place do not
        _say(f"internal error: {type(exc).__name__} in {_place(exc)}; MEDNER_DEBUG=1 shows the traceback")
        if os.environ.get("MEDNER_DEBUG"):
            raise
        return 1
    return 0


def _say(message: str) -> None:
    click.echo(f"medner: {message}", err=True)


def _place(exc: Exception) -> str:
    trace = exc.__traceback__
    place = "?"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's call
        raise _Terminated

    before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
