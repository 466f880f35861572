"""The command line: help, exit codes with their whole messages, streams, signals, and no note text anywhere but out."""

import errno
import gzip
import hashlib
import io
import json
import os
import platform
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import medner
from medner import cli, comparison, run, testing
from medner.annotate import Annotator

termios = pytest.importorskip("termios")

TINY = str(testing.bundle())
COMMAND = (sys.executable, "-m", "medner.cli")

Medner = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Medner:
    """Call ``medner`` in this process; gives its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        sys.stdout.flush()
        return int(caught.value.code or 0), *capfd.readouterr()

    return call


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A JSONL file of two good notes and a bad line, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("notes.jsonl")
    path.write_text('{"note_id": "a", "text": "Type 2 diabetes."}\n{"text": "ok"}\n{nope\n')
    return path


def spawn(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Call ``medner`` as a process of its own."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Help and start


def commands() -> list[tuple[str, click.Command]]:
    """Every command of the tree with its full name."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            for child, below in command.commands.items():
                yield from walk(f"{name} {child}", below)

    return list(walk("medner", cli.cli))


@pytest.mark.parametrize(("name", "command"), commands())
def test_everything_has_help(name: str, command: click.Command, call: Medner) -> None:
    """Each command and each of its options say what they are for, and ``--help`` shows it."""
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.opts[0] for option in options if not option.help] == []
    code, output, error = call(*name.split()[1:], "--help")
    assert (code, error) == (0, "")
    assert output.startswith(f"Usage: {name} [OPTIONS]")
    assert [o for option in options for o in option.opts if not re.search(rf"(^|\s){re.escape(o)}[,\s]", output)] == []


def test_help_loads_nothing_heavy() -> None:
    """Neither the package nor any ``--help`` imports pyarrow, numpy, onnxruntime, tokenizers or torch."""
    code = (
        "import sys, medner, medner.cli\n"
        "for name in [[], *([name] for name in medner.cli.cli.commands)]:\n"
        "    try: medner.cli.main([*name, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "heavy = 'numpy pyarrow onnxruntime tokenizers sentencex orjson tqdm torch transformers datasets'.split()\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_the_public_names() -> None:
    """They are the classes themselves, imported when first asked for; others are attribute errors."""
    assert medner.__all__ == ["Annotator", "Options", "Span", "load"]
    assert medner.Annotator is Annotator
    assert set(medner.__all__) <= set(dir(medner))
    annotate = medner.load(TINY, medner.Options(min_score=0.5))
    score = float(pa.scalar(0.9066222, pa.float32()).as_py())
    assert annotate("no fever") == [medner.Span(3, 8, "Disease", score, "fever")]
    with pytest.raises(AttributeError, match=r"^module 'medner' has no attribute 'laod'$"):
        _ = medner.laod


def test_version_and_completion(call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--version`` names the installed version, and shells can ask for completions."""
    assert call("--version") == (0, f"medner, version {medner.__version__}\n", "")
    monkeypatch.setenv("_MEDNER_COMPLETE", "bash_source")
    code, output, error = call()
    assert (code, error) == (0, "")
    assert "_MEDNER_COMPLETE=bash_complete" in output


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes 0 and 3


def test_a_run_and_its_summary(notes: Path, call: Medner) -> None:
    """Exit code 0; the summary on standard output, nothing on standard error."""
    code, output, error = call("annotate", notes, "-o", "out", "--model", TINY, "--max-rejected", "1")
    assert (code, error) == (0, "")
    assert re.sub(r"[0-9.,]+ s, [0-9.,]+ notes/s", "T s, R notes/s", output) == (
        "3 notes: 2 annotated, 1 rejected, 1 spans\ntiny fp32 on cpu, T s, R notes/s, 0 of 2 windows reused\n"
    )
    assert call("annotate", notes, "-o", "q", "--model", TINY, "--max-rejected", "all", "--quiet") == (0, "", "")


@pytest.mark.parametrize("given", ["0", "33%"])
def test_too_many_rejected(notes: Path, call: Medner, given: str) -> None:
    """Exit code 3 after the output is complete and summed up."""
    code, output, error = call("annotate", notes, "-o", "out", "--model", TINY, "--max-rejected", given)
    assert (code, output.splitlines()[0]) == (3, "3 notes: 2 annotated, 1 rejected, 1 spans")
    assert error == (
        f"medner: 1 of 3 rows were rejected, more than --max-rejected {given} allows; "
        "the output is complete and gives each one's reason\n"
    )
    assert json.loads(Path("out/manifest.json").read_text())["counts"]["rejected"] == 1


@pytest.mark.parametrize("given", ["1", "34%", "100%", "all"])
def test_not_too_many_rejected(notes: Path, call: Medner, given: str) -> None:
    """Exit code 0 up to the limit."""
    assert call("annotate", notes, "-o", "o.jsonl", "--model", TINY, "--max-rejected", given, "--quiet") == (0, "", "")


def test_the_options_reach_the_run(notes: Path, call: Medner) -> None:
    """Each option of ``annotate`` ends up where the run reads it."""
    Path("in.tsv").write_bytes("id;body;ward\nn1;f\xe9tid fever;x\nn1;fever;y\nn2;fever fever;z\n".encode("latin-1"))
    given = (
        "--text-column body --id-column id --encoding latin-1 --delimiter ; --no-quotes --device cpu --precision fp32 "
        "--window 16 --threads 1 --batch-tokens 64 --part-rows 1 --min-score 0.5 --limit 2 --max-rejected 1 "
        "--max-note-bytes 12 --unique-ids --no-text --nested --keep ward --no-reuse --quiet --format jsonl"
    )
    assert call("annotate", "in.tsv", "-o", "out", "--model", TINY, *given.split()) == (0, "", "")
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["options"] == {
        "inputs": ["in.tsv"], "output": "out", "model": TINY, "format": "jsonl", "text": False, "nested": True,
        "part_rows": 1, "max_rejected": "1", "threads": 1, "batch_tokens": 64, "min_score": 0.5, "reuse": False,
        "read": {"text_column": "body", "id_column": "id", "encoding": "latin-1", "delimiter": ";", "quotes": False,
                 "keep": ["ward"], "limit": 2, "max_note_bytes": 12, "unique_ids": True},
    }  # fmt: skip
    assert (manifest["model"]["window"], manifest["counts"]["parts"]) == (16, 2)
    spans = [orjson.loads(Path(f"out/spans/part-00000{n}.jsonl").read_bytes()) for n in (0, 1)]
    score = spans[0]["spans"][0].pop("score")
    assert 0.5 < score < 1
    assert spans == [
        {"source": "in.tsv", "row": 0, "note_id": "n1", "spans": [{"start": 6, "end": 11, "label": "Disease"}],
         "ward": "x"},
        {"source": "in.tsv", "row": 1, "note_id": "n1", "spans": None, "ward": "y"},
    ]  # fmt: skip
    assert call("annotate", "in.tsv", "-o", "out", "--model", TINY, *given.split(), "--overwrite")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes 2, 4, 5 and 6: no output, whole messages


def prepare() -> None:
    """Inputs, models and outputs of all kinds, in the current directory."""
    Path("table.csv").write_text("id,note\n1,fever\n")
    Path("ids.csv").write_text("id,text\n1,fever\n")
    Path("bad.parquet").write_bytes(b"PAR1 this is none")
    pq.write_table(pa.table({"body": ["fever"]}), "other.parquet")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fever"}\n' * 99)[:-9])
    Path("objects.jsonl").write_text('{"note": "fever"}\n' * 3)
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("fever")
    Path("mixed/b.csv").write_text("text\nfever\n")
    Path("empty").mkdir()
    shutil.copytree(TINY, "altered")
    with Path("altered/config.json").open("a") as file:
        file.write(" ")
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").write_text("")
    Path("file").write_text("")
    for name in ("unfinished", "finished"):
        Path(name).mkdir()
        Path(name, "run.json").write_text("{}")
    Path("finished/manifest.json").write_text("{}")
    Path("unfinished/spans").mkdir()
    Path("unfinished/spans/part-000000.parquet").write_text("")
    Path("taken.jsonl").write_text("")


USAGE = "Usage: medner annotate [OPTIONS] INPUT...\nTry 'medner annotate --help' for help.\n\nError: "
READS = ".jsonl .ndjson .csv .tsv .txt, each also with .gz .zst .bz2, and .parquet"

FAILURES: list[tuple[str, int, str]] = [
    # usage
    ("notes.jsonl -o out --zzz", 2, USAGE + "No such option '--zzz'.\n"),
    ("notes.jsonl", 2, USAGE + "Missing option '-o' / '--output'.\n"),
    ("-o out", 2, USAGE + "Missing argument 'INPUT...'.\n"),
    (
        "notes.jsonl -o out --part-rows 0", 2,
        USAGE + "Invalid value for '--part-rows': 0 is not in the range 1<=x<=2147483647.\n",
    ),
    (
        "notes.jsonl -o out --max-rejected some", 2,
        "medner: --max-rejected some: use a count, a percentage such as 0.5%, or all\n",
    ),
    (
        "mixed -o out", 2,
        "medner: mixed holds .txt files and tables; pass them as separate inputs, such as globs\n",
    ),
    ("file -o out", 2, f"medner: file: unknown suffix; medner reads {READS}\n"),
    ("- - -o out", 2, "medner: standard input is given twice; pass each file once\n"),
    ("notes.jsonl -o - --format parquet", 2,
     "medner: -o - writes JSON lines; --format parquet needs a file or a directory\n"),
    ("notes.jsonl -o a.jsonl --format parquet", 2,
     "medner: --format parquet and -o a.jsonl contradict each other; drop one\n"),
    ("notes.jsonl -o out --device gpu", 2, "medner: --device gpu: unknown; use auto, cpu, cuda or cuda:N\n"),
    ("notes.jsonl -o out --keep text", 2,
     "medner: --keep text: that is a name of medner's own columns; rename it in the input\n"),
    ("notes.jsonl -o notes.jsonl --overwrite", 2,
     "medner: notes.jsonl is an input and lies in the output notes.jsonl; choose another -o\n"),
    ("notes.jsonl -o out --min-score nan", 2, "medner: min_score is nan; it must lie between 0 and 1\n"),
    # input and model
    ("none.jsonl -o out", 4, "medner: none.jsonl: no such file or directory\n"),
    ("empty -o out", 4, f"medner: empty: no file to read (0 of unknown suffix); medner reads {READS}\n"),
    ("table.csv -o out", 4,
     "medner: table.csv has no column 'text'; name another with --text-column "
     "(or has it another delimiter or encoding?)\n"),
    ("other.parquet -o out", 4,
     "medner: other.parquet has no column 'text' (it has body); name another with --text-column\n"),
    ("ids.csv -o out --id-column mrn", 4,
     "medner: ids.csv has no column 'mrn'; name another with --id-column (or has it another delimiter or encoding?)\n"),
    ("objects.jsonl -o out", 4,
     "medner: objects.jsonl has no column 'text' in its first 3 objects; name another with --text-column\n"),
    ("objects.jsonl -o o.jsonl", 4,
     "medner: objects.jsonl has no column 'text' in its first 3 objects; name another with --text-column\n"),
    ("bad.parquet -o out", 4,
     "medner: cannot read bad.parquet: it is no parquet file, or damaged; copy or write it again\n"),
    ("cut.jsonl.gz -o o.jsonl", 4,
     "medner: cannot read cut.jsonl.gz: its gz data is damaged or ends early; copy or write it again\n"),
    ("notes.jsonl -o out --model altered", 4,
     f"medner: altered/config.json: SHA-256 "
     f"{hashlib.sha256(Path(TINY, 'config.json').read_bytes() + b' ').hexdigest()[:12]}... is not the recorded "
     f"{hashlib.sha256(Path(TINY, 'config.json').read_bytes()).hexdigest()[:12]}...; "
     "the file was altered or cut short: copy or export the bundle again\n"),
    ("notes.jsonl -o out --model nowhere", 4,
     "medner: nowhere: no such model directory; shipped with medner: "
     f"{', '.join(sorted(path.name for path in Path(TINY).parent.iterdir()))}\n"),
    ("notes.jsonl -o out --precision int8", 4,
     "medner: tiny: no int8 variant (it has fp32); make one with: "
     "medner export CHECKPOINT -o BUNDLE --precision int8 --parity-data FILE\n"),
    # output
    ("notes.jsonl -o unfinished", 6,
     "medner: unfinished: holds an unfinished run; choose another -o, or pass --resume or --overwrite\n"),
    ("notes.jsonl -o finished", 6,
     "medner: finished: holds a finished run; choose another -o, or pass --resume or --overwrite\n"),
    ("notes.jsonl -o foreign --overwrite", 6, "medner: foreign: not empty, and no run of medner; choose another -o\n"),
    ("notes.jsonl -o s3://bucket/run", 2,
     "medner: -o s3://bucket/run: medner writes local files; name one, and copy it there\n"),
    ("notes.jsonl -o file", 6, "medner: file: exists and is no directory; choose another -o\n"),
    ("notes.jsonl -o file/out", 6, "medner: file/out: cannot be written: Not a directory\n"),
    ("notes.jsonl -o none/x.jsonl", 6, "medner: none: no such directory; create it first\n"),
    ("notes.jsonl -o taken.jsonl", 6,
     "medner: taken.jsonl: exists already; choose another -o, or pass --overwrite\n"),
]  # fmt: skip


def everything() -> dict[str, bytes | None]:
    """All files below the current directory with their contents."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.mark.parametrize(("arguments", "code", "message"), FAILURES, ids=[case[0] for case in FAILURES])
def test_failures(notes: Path, call: Medner, arguments: str, code: int, message: str) -> None:
    """Every way to fail has its exit code, its message and nothing else; no file appears or changes."""
    prepare()
    before = everything()
    model = () if "--model" in arguments else ("--model", TINY)
    assert call("annotate", *arguments.split(), *model) == (code, "", message)
    after = everything()
    # A directory run may have begun; single files and refused directories are as they were.
    assert {name: content for name, content in after.items() if Path(name).parts[0] != "out"} == before
    assert "out" not in after or code == 4


def test_a_device_that_is_not_there(notes: Path, call: Medner) -> None:
    """Asking for CUDA where onnxruntime has none is exit code 5, never the CPU in silence."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert call("annotate", notes, "-o", "out", "--model", TINY, "--device", "cuda:1") == (
        5, "", "medner: --device cuda:1: this onnxruntime has no CUDA provider; "
        'use --device cpu, or: pip uninstall onnxruntime && pip install ".[gpu]" in a checkout of medner\n'
    )  # fmt: skip
    assert not Path("out").exists()


def test_a_full_disk(notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 6 with the file that could not be written."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert call("annotate", notes, "-o", "out", "--model", TINY) == (
        6, "", "medner: out/run.json: cannot be written: No space left on device\n"
    )  # fmt: skip
    assert list(Path("out").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Exit code 1, and what may never be said


def test_a_defect_shows_its_type_and_place_only(notes: Path, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen error may hold note text, so its message is not shown unless it is asked for."""

    def fail(*_: object) -> None:
        raise KeyError("SECRET")

    monkeypatch.setattr(run, "_description", fail)
    line = fail.__code__.co_firstlineno + 1
    said = f"medner: internal error: KeyError in test_cli.py:{line}; MEDNER_DEBUG=1 shows the traceback\n"
    assert call("annotate", notes, "-o", "out", "--model", TINY) == (1, "", said)
    monkeypatch.setenv("MEDNER_DEBUG", "1")
    with pytest.raises(KeyError, match="SECRET"):
        cli.main(["annotate", str(notes), "-o", "out", "--model", TINY])


# ---------------------------------------------------------------------------------------------------------------------
# Streams and signals, in processes of their own


def test_standard_input_to_standard_output(notes: Path) -> None:
    """A record per row on standard output, the summary and the progress on standard error."""
    done = spawn("annotate", "-", "-o", "-", "--model", TINY, "--max-rejected", "all", input=notes.read_text())
    assert done.returncode == 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["row"], record["note_id"], record["status"]) for record in records] == [
        (0, "a", "annotated"), (1, "-:1", "annotated"), (2, "-:2", "rejected")
    ]  # fmt: skip
    assert done.stderr.startswith("3 notes: 2 annotated, 1 rejected, 1 spans\ntiny fp32 on cpu, ")
    assert spawn("annotate", notes, "-o", "-", "--model", TINY, "--quiet").stderr == (
        "medner: 1 of 3 rows were rejected, more than --max-rejected 0 allows; "
        "the output is complete and gives each one's reason\n"
    )


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    """``medner ... -o - | head -1``: the first record arrives, medner ends with 0 and says nothing."""
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "fever and asthma"}\n' * 4_000)
    script = '"$@" | head -1; echo ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, "annotate", str(path), "-o", "-", "--model", TINY],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, code = done.stdout.splitlines()
    assert json.loads(first)["spans"][0]["text"] == "fever"
    assert (code, done.stderr) == ("0", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full(notes: Path) -> None:
    """Exit code 6 and one line, also where only the summary does not fit any more."""
    for arguments in (("-o", "-"), ("-o", "out")):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*COMMAND, "annotate", str(notes), "--model", TINY, *arguments],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (
            6, "medner: standard output: cannot be written: No space left on device\n"
        )  # fmt: skip
    assert Path("out/manifest.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("--help",), ("annotate", "--help"), ("--version",)])
def test_help_on_standard_output_that_is_full(arguments: tuple[str, ...]) -> None:
    """What click itself prints is no exception."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, "medner: the output: cannot be written: No space left on device\n")


@pytest.mark.parametrize("again", [(), ("--resume",)])
@pytest.mark.usefixtures("notes")
def test_a_run_that_stopped_before_its_first_part(call: Medner, again: tuple[str, ...]) -> None:
    """The corrected command runs as it is: nothing could be lost."""
    given = ("annotate", "open.csv", "-o", "out", "--model", TINY)
    Path("open.csv").write_text('text\n"fever\nAsthma\n')
    code, _, error = call(*given)
    assert code == 4
    assert "--resume" not in error
    assert call(*given, "--no-quotes", *again)[0] == 0
    assert json.loads(Path("out/run.json").read_bytes())["options"]["read"]["quotes"] is False


@pytest.mark.parametrize("again", [(), ("--resume",)])
@pytest.mark.parametrize("beside", [None, "weights.bin"])
def test_a_run_json_of_another_program(call: Medner, notes: Path, again: tuple[str, ...], beside: str | None) -> None:
    """A directory with one is not free to take."""
    Path("out").mkdir()
    Path("out/run.json").write_text('{"experiment": 7}')
    if beside:
        Path("out", beside).write_text("x")
    code, _, error = call("annotate", notes, "-o", "out", "--model", TINY, *again)
    assert code == 6
    assert "holds an unfinished run" in error or "cannot go on with this run" in error
    assert Path("out/run.json").read_text() == '{"experiment": 7}'
    assert not Path("out/spans").exists()


@pytest.mark.usefixtures("notes")
def test_a_description_beside_other_files(call: Medner) -> None:
    """Medner's own without a part is nothing to lose, but what stands beside it may be."""
    given = ("annotate", "open.csv", "-o", "out", "--model", TINY)
    Path("open.csv").write_text('text\n"Gout\nAsthma\n')
    assert call(*given)[0] == 4
    Path("out/thesis.txt").write_text("x")
    assert call(*given)[0] == 6


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), RuntimeError("can't start new thread")],
)
def test_a_shortage(call: Medner, notes: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What the system refuses is told, and is no defect."""

    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run, "run", refused)
    code, out, said = call("annotate", notes, "-o", "out")
    assert (code, out) == (1, "")
    assert said.startswith(
        "medner: out of memory, or of threads; raise the limit that was set, or lower --threads and "
    )


def test_as_a_module() -> None:
    """``python -m medner`` is the command."""
    done = subprocess.run([sys.executable, "-m", "medner", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: medner [OPTIONS] COMMAND")


def test_standard_error_that_nobody_reads(notes: Path) -> None:
    """The exit code of the run is not lost with its messages."""
    script = '"$@" 2>&1 >/dev/null | true; echo ${PIPESTATUS[0]}'
    for output, code in (("out", "3"), ("out", "6")):
        done = subprocess.run(
            ["bash", "-c", script, "bash", *COMMAND, "annotate", str(notes), "-o", output, "--model", TINY],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == (f"{code}\n", "")


def test_a_stream_that_cannot_be_flushed_is_let_go(
    notes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What Python would try to flush again at exit goes to the null device; the exit code stays."""
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "no fever"}\n')
    with (tmp_path / "stdout").open("wb") as target:

        class Broken(io.StringIO):
            def flush(self) -> None:
                raise BrokenPipeError

            def fileno(self) -> int:
                return target.fileno()

        for stream, arguments, code in (
            ("stdout", ("annotate", good, "-o", "out", "--model", TINY), 0),
            ("stdout", ("annotate", notes, "-o", "out3", "--model", TINY), 3),
            ("stderr", ("annotate", "none.jsonl", "-o", "out2", "--model", TINY), 4),
            ("stderr", ("annotate", "--none"), 2),
        ):
            given = [str(argument) for argument in arguments]
            with monkeypatch.context() as patch:
                patch.setattr(sys, stream, Broken())
                with pytest.raises(SystemExit) as caught:
                    cli.main(given)
            assert caught.value.code == code
            target.write(b"lost")
            assert os.fstat(target.fileno()).st_rdev == Path(os.devnull).stat().st_rdev
    assert (tmp_path / "stdout").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "medner: interrupted"),
        (signal.SIGTERM, 143, "medner: terminated"),
        (signal.SIGHUP, 143, "medner: terminated"),
    ],
)
@pytest.mark.parametrize("output", ["out", "out.jsonl.gz"])
def test_interrupted(tmp_path: Path, number: signal.Signals, code: int, said: str, output: str) -> None:
    """A run that waits for input ends without a traceback; its committed parts are those of a whole run."""
    line = json.dumps({"text": "Type 2 diabetes without fever. " * 13}).encode() + b"\n"
    lines = line * 2_100
    options = ("--model", TINY, "--part-rows", "100", "--threads", "1", "--quiet")
    arguments = [*COMMAND, "annotate", "-", "-o", output, *options]
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(lines)
        process.stdin.flush()
        begun = tmp_path / "out" / "notes" / "part-000004.parquet"
        deadline = time.monotonic() + 60
        while not (begun.exists() if output == "out" else list(tmp_path.glob(".out.jsonl.gz.*.tmp"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        printed, error = process.communicate(timeout=60)
    step = "; --resume goes on with out" if output == "out" else ""
    assert (process.returncode, printed, error.decode()) == (code, b"", f"{said}{step}\n")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    if output != "out":
        assert files == []
        return
    parts = [name for name in files if "part" in name]
    assert files == ["out/notes/" + Path(name).name for name in parts[: len(parts) // 2]] + ["out/run.json"] + [
        "out/spans/" + Path(name).name for name in parts[: len(parts) // 2]
    ]
    subprocess.run([*COMMAND, "annotate", "-", "-o", "whole", *options], cwd=tmp_path, input=lines, check=True)
    for name in parts:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / Path(name).relative_to("out")).read_bytes()


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    """Share read, time left, notes/s and spans on one line, which is wiped away at the end."""
    import fcntl

    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "fever"}\n' * 3_000)
    for source, pattern in (
        (path, r"\d+%\|.*\| \d\d:\d\d<\d\d:\d\d, [\d,]+ notes, [\d,.]+ notes/s, [\d,]+ spans"),
        ("-", r"^\d\d:\d\d, [\d,]+ notes, [\d,.]+ notes/s, [\d,]+ spans"),
    ):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        with (
            path.open() as stdin,
            subprocess.Popen(
                [*COMMAND, "annotate", str(source), "-o", str(tmp_path / f"out{len(str(source))}"), "--model", TINY],
                stdin=stdin, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TQDM_MININTERVAL": "0"},
            ) as process,
        ):  # fmt: skip
            os.close(theirs)
            shown = b""
            while True:
                try:
                    chunk = os.read(ours, 4096)
                except OSError:  # how Linux says that the other end is closed
                    break
                if not chunk:
                    break
                shown += chunk
            assert process.stdout is not None
            assert process.stdout.read().startswith(b"3,000 notes: 3,000 annotated, 0 rejected, 3,000 spans\n")
        os.close(ours)
        assert process.returncode == 0
        lines = shown.decode().split("\r")
        assert any(re.search(pattern, line) for line in lines), lines
        assert lines[-2].strip() == lines[-1] == ""


# ---------------------------------------------------------------------------------------------------------------------
# The other commands


def test_info(call: Medner, tmp_path: Path) -> None:
    """What a bundle holds, after every hash was checked."""
    described = json.loads(Path(TINY, "medner.json").read_text())["variants"]["fp32"]
    assert call("info", TINY) == (
        0,
        f"tiny ({TINY})\nlabels    O, B-Disease, I-Disease\nwindow    32 tokens, as many segments as fit\n"
        f"fp32      onnx/model.onnx, 0.0 MB, SHA-256 {described['sha256'][:16]}...\nlicence   Apache-2.0\n",
        "",
    )
    assert call("info", "tiny")[1].splitlines()[1:] == call("info", TINY)[1].splitlines()[1:]
    shutil.copytree(TINY, tmp_path / "altered")
    (tmp_path / "altered/onnx/model.onnx").write_bytes(b"")
    assert call("info", tmp_path / "altered") == (
        4, "", f"medner: {tmp_path}/altered/onnx/model.onnx: SHA-256 e3b0c44298fc... is not the recorded "
        f"{described['sha256'][:12]}...; the file was altered or cut short: copy or export the bundle again\n",
    )  # fmt: skip


def test_train_and_export_refuse_what_cannot_be(call: Medner, tmp_path: Path) -> None:
    """Usage errors of the other commands."""
    for arguments, said in (
        (("train", "--data", "x", "--base", "y"), "Missing option '-o' / '--output'."),
        (("train", "--data", "x", "--base", "y", "-o", "z", "--label", "=A"),
         "--label =A: use OLD=NEW, or *=NEW for all others"),
        (("train", "--data", "x", "--base", "y", "-o", "z", "--seed", "-1"),
         "Invalid value for '--seed': -1 is not in the range 0<=x<=4294967295."),
        (("evaluate", "--data", "x", "--label", "A"), "--label A: use OLD=NEW, or *=NEW for all others"),
        (("export", "x", "-o", "y", "--parity-data", "z", "--window", "wide"),
         "--window wide: use auto or a number of tokens"),
    ):  # fmt: skip
        code, output, error = call(*arguments)
        assert (code, output, error.splitlines()[-1]) == (2, "", f"Error: {said}")


def test_labels_of_labelled_data_are_renamed(call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that reads labelled data takes new names of its labels."""
    from medner import compare, export, train

    asked: list[Any] = []
    for module, name in ((train, "train"), (export, "export"), (compare, "compare")):
        monkeypatch.setattr(module, name, asked.append)
    monkeypatch.setattr(compare, "check_parity", lambda _: None)
    monkeypatch.setattr(comparison, "text", str)
    renamed = ("--label", "A=B", "--label", "*=C=D")
    for arguments in (
        ("train", "--data", "x", "--base", "y", "-o", "z"),
        ("export", "x", "-o", "y", "--parity-data", "z"),
        ("compare", "--checkpoint", "x", "--bundle", "y", "--notes", "z", "-o", "o"),
    ):
        assert call(*arguments, *renamed)[0] == 0
    assert [options.labels for options in asked] == 3 * [{"A": "B", "*": "C=D"}]


def test_a_path_that_cannot_be_printed(tmp_path: Path) -> None:
    """Bytes that are no text are shown as escapes; that a check passed is not lost over them."""
    (tmp_path / "notes.jsonl").write_text('{"text": "fever"}\n')
    out = os.fsdecode(os.fsencode(tmp_path) + b"/run\xff")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    for arguments in (("annotate", "notes.jsonl", "-o", out, "--model", TINY, "--quiet"), ("verify", out)):
        done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/run\\udcff: 1 notes (0 rejected)")


def test_a_model_below_a_path_that_is_no_text(call: Medner, notes: Path, tmp_path: Path) -> None:
    """Onnxruntime takes no such path; the error says so."""
    model = os.fsdecode(os.fsencode(tmp_path) + b"/model\xff")
    shutil.copytree(testing.bundle(), model)
    code, out, error = call("annotate", notes, "-o", "-", "--model", model)
    assert (code, out) == (4, "")
    assert error.endswith(": onnxruntime opens no path that is not valid UTF-8; rename it\n")


@pytest.mark.parametrize(("given", "used"), [(None, "system"), ("mimalloc", "mimalloc")])
def test_tables_take_memory_from_the_system(given: str | None, used: str, tmp_path: Path) -> None:
    """Annotate has pyarrow use the system's allocator, which gives memory back, unless the user names another."""
    program = (
        "import sys; from medner import cli; cli.cli.main(sys.argv[1:], standalone_mode=False); "
        "import pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    )
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "Known asthma."}\n', encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    done = subprocess.run(
        [sys.executable, "-c", program, "annotate", notes, "-o", tmp_path / "run", "--model", TINY, "--quiet"],
        env=environ | ({} if given is None else {"ARROW_DEFAULT_MEMORY_POOL": given}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, used + "\n", "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_arrays_are_unmapped_when_they_are_free() -> None:
    """After annotate, a freed block does not make glibc put larger ones on its heap, as it does by itself."""
    program = """
import ctypes, sys
from pathlib import Path
from medner import cli

if sys.argv[1] == "with":
    cli._give_memory_back()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(16 * 2**20))
block = libc.malloc(8 * 2**20)
heap = next(line for line in Path("/proc/self/maps").read_text().splitlines() if "[heap]" in line).split()[0]
low, high = (int(bound, 16) for bound in heap.split("-"))
print("on the heap" if low <= block < high else "mapped")
"""
    environ = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
    said = [
        subprocess.run([sys.executable, "-c", program, how], env=environ, capture_output=True, text=True).stdout
        for how in ("with", "without")
    ]
    assert said == ["mapped\n", "on the heap\n"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_training_keeps_what_it_frees() -> None:
    """A large block lies on the heap, which does not shrink when it is free; what the environment says stays."""
    program = """
import ctypes
from pathlib import Path
from medner import cli

cli._keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(64 * 2**20)
heaps = []
for _ in range(2):
    heap = next(line for line in Path("/proc/self/maps").read_text().splitlines() if "[heap]" in line).split()[0]
    heaps.append([int(bound, 16) for bound in heap.split("-")])
    libc.free(block)
    block = None
low, high = heaps[0]
print("kept" if heaps[0] == heaps[1] and high - low > 64 * 2**20 else "given back")
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    said = [
        subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True).stdout
        for env in (environ, {**environ, "MALLOC_TRIM_THRESHOLD_": "131072"})
    ]
    assert said == ["kept\n", "given back\n"]
