"""Several devices: a process each, over parts of one run directory, with an onnxruntime whose GPUs are not there."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from medner import errors, runtime, testing, workers
from medner.annotate import Options
from medner.errors import MednerError, UsageError
from medner.tally import Stages, Tally, timed

pytest.importorskip("onnxruntime")

FAKE = Path(__file__).parent / "fake_gpus"
TEXTS = ["No asthma,\nfever?", "", "Type 2 diabetes and chronic kidney disease. " * 9, "Seen for pneumonia.\n\nAsthma."]
#: Calls of a device before its first note: two tries of the graph (logits and, where it has it, the best class).
TRIES = 2
#: One device takes its time, so that most parts fall to the other.
SLOW = {"0": 0.1}
#: All do, so that each gets some.
SLOWER = {"0": 0.05, "1": 0.05, "2": 0.05}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Sixty notes and two rejected lines, which make 16 parts of four rows."""
    path = tmp_path / "notes.jsonl"
    rows = [json.dumps({"note_id": f"n{i}", "text": f"{TEXTS[i % 4]} {TEXTS[i % 3]}"}) for i in range(60)]
    path.write_text("\n".join([*rows[:30], "{", '{"text": null}', *rows[30:]]) + "\n", encoding="utf-8")
    return path


def command(notes: Path, out: Path, device: str, *more: str) -> list[str]:
    """``medner annotate`` on a device, in parts of four rows, with batches of one size."""
    given = [str(notes), "-o", str(out), "--model", str(testing.bundle()), "--device", device, "--part-rows", "4"]
    code = "from medner.cli import main; main()"
    return [
        sys.executable,
        "-P",
        "-c",
        code,
        "annotate",
        *given,
        "--max-rejected",
        "all",
        "--batch-tokens",
        "64",
        *more,
    ]


def environment(folder: Path, **wanted: Any) -> dict[str, str]:
    """Of a process that has two GPUs unless told otherwise."""
    wanted = {"gpus": 2, "log": str(folder / "calls.log")} | wanted
    return os.environ | {"PYTHONPATH": str(FAKE), "FAKE_GPUS": json.dumps(wanted)}


def go(folder: Path, given: list[str], **wanted: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        given, env=environment(folder, **wanted), capture_output=True, text=True, check=False, timeout=100
    )


def tables(out: Path) -> dict[str, bytes]:
    """The files of both tables by name."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.glob("*/*"))}


def manifest(out: Path) -> dict[str, Any]:
    """Of a finished run."""
    return dict(json.loads((out / "manifest.json").read_bytes()))


def calls(folder: Path) -> Counter[str]:
    """How often each device was called, by number."""
    return Counter((folder / "calls.log").read_text(encoding="ascii").split())


def left(out: Path) -> list[str]:
    """Drafts and locks in a run directory."""
    return [str(file.relative_to(out)) for file in out.rglob("*") if file.name.startswith((".", "lock"))]


# ---------------------------------------------------------------------------------------------------------------------
# The whole command


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_same_bytes_as_one_process(tmp_path: Path, notes: Path, form: str) -> None:
    """Three devices write what one writes, and each of them works; the manifest names all and counts all."""
    one, three = tmp_path / "one", tmp_path / "three"
    assert go(tmp_path, command(notes, one, "cuda:0", "--format", form)).returncode == 0
    (tmp_path / "calls.log").unlink()
    done = go(tmp_path, command(notes, three, "cuda:0,2,1", "--format", form), gpus=3, slow=SLOWER)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(tables(one)) == 2 * 16
    assert tables(three) == tables(one)
    assert left(three) == []
    assert set(calls(tmp_path)) == {"0", "1", "2"}
    assert min(calls(tmp_path).values()) > 2 * TRIES
    found, expected = manifest(three), manifest(one)
    assert found["model"].pop("device") == "cuda:0,2,1"
    assert expected["model"].pop("device") == "cuda:0"
    for same in ("medner", "versions", "model", "inputs", "counts", "files"):
        assert found[same] == expected[same], same
    assert found["stages"].keys() == {"reading", "tokenizing", "inferring", "decoding", "writing"}
    assert min(found["stages"].values()) > 0
    assert "on cuda:0,2,1," in done.stdout


def test_the_spans_are_those_of_the_cpu(tmp_path: Path, notes: Path) -> None:
    """The same tables again, from another device."""
    assert go(tmp_path, command(notes, tmp_path / "cpu", "cpu")).returncode == 0
    assert go(tmp_path, command(notes, tmp_path / "gpus", "cuda:0,1")).returncode == 0
    assert tables(tmp_path / "gpus") == tables(tmp_path / "cpu")
    assert manifest(tmp_path / "gpus")["counts"]["spans"] > 50


def test_no_notes(tmp_path: Path) -> None:
    """An input without a row makes one empty part, as with one device."""
    (tmp_path / "none.jsonl").write_text("")
    for device in ("cuda:0", "cuda:0,1"):
        assert go(tmp_path, command(tmp_path / "none.jsonl", tmp_path / device[-1], device)).returncode == 0
    assert tables(tmp_path / "1") == tables(tmp_path / "0")
    assert len(tables(tmp_path / "0")) == 2


def test_the_smallest_budget_is_for_all(tmp_path: Path, notes: Path) -> None:
    """Where the probes differ, each process fills its batches to what the device with the least memory takes."""
    given = [*command(notes, tmp_path / "out", "cuda:0,1")]
    given[given.index("--batch-tokens") : given.index("--batch-tokens") + 2] = []
    done = go(tmp_path, given, room={"0": 70_000, "1": 10_000})
    assert (done.returncode, done.stderr) == (0, "")
    assert manifest(tmp_path / "out")["options"]["batch_tokens"] == 8_192


@pytest.mark.parametrize("gone", [{"dead": [1]}, {"gpus": 1}])
def test_a_device_that_does_not_start(tmp_path: Path, notes: Path, gone: dict[str, Any]) -> None:
    """Exit code 5 with that device's reason, before anything is written."""
    done = go(tmp_path, command(notes, tmp_path / "out", "cuda:0,1"), **gone)
    assert done.returncode == 5
    assert done.stdout == ""
    assert done.stderr.startswith("medner: --device cuda:1: onnxruntime cannot run model.onnx there (CUDA failure ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed(tmp_path: Path, notes: Path) -> None:
    """Exit code 5 that says how to go on; with one device or several, the run then ends as if nothing had happened."""
    assert go(tmp_path, command(notes, tmp_path / "whole", "cuda:0")).returncode == 0
    for again in ("cuda:0", "cuda:0,1"):
        out = tmp_path / again
        done = go(tmp_path, command(notes, out, "cuda:0,1"), ends=[1, TRIES + 12], slow=SLOW)
        assert done.returncode == 5
        assert done.stderr == (
            "medner: --device cuda:1: its process was ended by signal 9; is there enough memory? --resume goes on\n"
        )
        assert not (out / "lock.json").exists()
        assert 0 < len(tables(out)) < 2 * 16
        resumed = go(tmp_path, command(notes, out, again, "--resume"))
        assert (resumed.returncode, resumed.stderr) == (0, "")
        assert tables(out) == tables(tmp_path / "whole")
        assert left(out) == []
        assert manifest(out)["counts"]["parts_kept"] > 0


@contextlib.contextmanager
def hanging(tmp_path: Path, notes: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run of which one device hangs in a call, with the ids of its processes; the other has done all it could."""
    given = command(notes, tmp_path / "out", "cuda:0,1")
    env = environment(tmp_path, hangs=[1, TRIES + 12], slow=SLOW)
    with subprocess.Popen(
        given, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            until(lambda: len(list((tmp_path / "out").glob("notes/part-*"))) >= 8)
            yield process, [int(pid) for pid in children(process.pid)]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def children(process: int) -> list[str]:
    """Ids of the processes that one has started."""
    return Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()


def until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def lives(process: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize(
    ("number", "to_all", "code", "said"),
    [
        (signal.SIGINT, True, 130, "medner: interrupted; --resume goes on with {out}\n"),  # Ctrl-C
        (signal.SIGTERM, True, 143, "medner: terminated; --resume goes on with {out}\n"),  # a scheduler
        (signal.SIGTERM, False, 143, "medner: terminated; --resume goes on with {out}\n"),
    ],
)
def test_interrupted(tmp_path: Path, notes: Path, number: int, to_all: bool, code: int, said: str) -> None:
    """All processes end, quietly and without a draft, and the run goes on later."""
    with hanging(tmp_path, notes) as (process, others):
        assert len(others) >= 2
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (code, said.format(out=tmp_path / "out"))
        until(lambda: not any(map(lives, others)), 10)
    assert left(tmp_path / "out") == []
    assert go(tmp_path, command(notes, tmp_path / "out", "cuda:0,1", "--resume")).returncode == 0
    assert len(tables(tmp_path / "out")) == 2 * 16


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
def test_the_process_that_reads_is_killed(tmp_path: Path, notes: Path) -> None:
    """The others end at once, one that hangs in a call, too. The run goes on later."""
    with hanging(tmp_path, notes) as (process, others):
        process.kill()
        process.wait()
        until(lambda: not any(map(lives, others)), 20)
    done = go(tmp_path, command(notes, tmp_path / "out", "cuda:0,1", "--resume"))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(tables(tmp_path / "out")) == 2 * 16
    assert left(tmp_path / "out") == []


NO_DIRECTORY = "several devices need a run directory, and -o {out} is none; name a directory, or one device"


@pytest.mark.parametrize(
    ("out", "device", "said"),
    [
        ("o.parquet", "cuda:0,1", NO_DIRECTORY),
        ("-", "cuda:0,1", NO_DIRECTORY),
        ("o", "cuda:0,1,00", "names a device twice"),
        ("o", "cuda:0,", "unknown; use auto, cpu, cuda or cuda:N"),
        ("o", "cuda:0,cpu", "unknown; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_usage(tmp_path: Path, notes: Path, out: str, device: str, said: str) -> None:
    """Exit code 2, before a model is loaded or anything written."""
    place = out if out == "-" else str(tmp_path / out)
    done = go(tmp_path, command(notes, Path(place), device))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"medner: --device {device}: {said.format(out=place)}\n"
    assert not (tmp_path / out).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Its pieces


def test_devices() -> None:
    """What ``--device`` names."""
    assert runtime.devices("cuda:0,1") == ("cuda:0", "cuda:1")
    assert runtime.devices("cuda:3,01,2") == ("cuda:3", "cuda:1", "cuda:2")
    for alone in ("auto", "cpu", "cuda", "cuda:1", "cuda:"):
        assert runtime.devices(alone) == (alone,)
    with pytest.raises(UsageError, match=r"^--device cuda:1,1: names a device twice$"):
        runtime.devices("cuda:1,1")


class Answers(list[Any]):
    """A connection to nobody, which keeps what is sent."""

    def send(self, answer: object) -> None:
        """Keep it."""
        self.append(answer)


DEFECT = r"--device cuda:1: internal error: ValueError in test_workers.py:\d+; MEDNER_DEBUG=1 shows the traceback"


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ValueError("the note SECRET"), DEFECT),
        (MednerError("as it is"), "as it is"),
    ],
)
def test_an_error_in_a_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], failure: Exception, said: str
) -> None:
    """It is answered; a defect without its message, which might hold a note's text, and nothing is printed."""
    monkeypatch.delenv("MEDNER_DEBUG", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")

    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr(workers.Annotator, "load", fails)
    answers = Answers()
    workers._work(answers, "m", Options(device="cuda:1"), 1)  # type: ignore[arg-type]
    (answer,) = answers
    with pytest.raises(MednerError, match=f"^{said}$"):
        raise answer
    assert capfd.readouterr() == ("", "")


def test_a_process_is_stopped_once() -> None:
    """It may get the signal from a scheduler and from the process that reads; the second does not cut its end short."""
    ending = workers._Ending()
    with pytest.raises(SystemExit) as ended:
        ending(signal.SIGTERM, None)
    assert ended.value.code == 0
    ending(signal.SIGTERM, None)


def test_a_signal_as_a_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does nothing, and no handler is replaced: Python would complain of a signal that comes in that moment."""
    given: list[tuple[int, Any]] = []
    monkeypatch.setattr(signal, "signal", lambda *call: given.append(call))
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")

    def fails(*_: object) -> None:
        assert [number for number, _ in given] == [signal.SIGINT, signal.SIGTERM]
        raise MednerError("at once")

    monkeypatch.setattr(workers.Annotator, "load", fails)
    workers._work(Answers(), "m", Options(), 1)  # type: ignore[arg-type]
    assert len(given) == 2
    handler = given[1][1]
    handler(signal.SIGTERM, None)


def test_signals_wait_for_each_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is started with Ctrl-C blocked, the first one too, before which Python starts a process of its own."""
    masks: list[set[int]] = []
    start = multiprocessing.get_context("spawn").Process.start

    def noted(process: Any) -> None:
        masks.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})
        start(process)
        masks.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", noted)
    options = Options(batch_tokens=64, threads=1)
    with contextlib.closing(workers.Crew(str(testing.bundle()), options, ["cpu"])) as crew:
        assert crew.facts.batch_tokens == 64
    assert len(masks) == 2
    assert all({signal.SIGINT, signal.SIGTERM} <= mask for mask in masks)


def test_errors_travel() -> None:
    """Every error of medner is the same on the other side."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MednerError)]
    assert len(kinds) > 8
    for kind in kinds:
        there = pickle.loads(pickle.dumps(kind("what")))
        assert (type(there), str(there)) == (kind, "what")


def test_batches_travel() -> None:
    """As they are: of a slice, only what it shows; none at all as none."""
    batch = pa.record_batch({"text": pa.array([str(i) * 100 for i in range(1000)])})
    packed = workers._packed(iter([batch.slice(3, 2), batch.slice(7, 1)]))
    assert packed.size < 2_000
    assert [b.to_pydict() for b in workers._unpacked(packed.to_pybytes())] == [
        batch.slice(3, 2).to_pydict(),
        batch.slice(7, 1).to_pydict(),
    ]
    assert list(workers._unpacked(workers._packed([]).to_pybytes())) == []


def test_counts_are_added() -> None:
    """What another process counted, seconds included."""
    ours = Tally(rows=1, windows_reused=2, stages=Stages(reading=1.0, writing=0.5))
    ours.merge(Tally(rows=10, annotated=9, rejected=1, windows_reused=3, parts=1, stages=Stages(writing=0.25)))
    assert ours == Tally(
        rows=11, annotated=9, rejected=1, windows_reused=5, parts=1, stages=Stages(reading=1.0, writing=0.75)
    )
    assert "stages" not in ours.counts()
    assert ours.counts()["rows"] == 11


def test_the_time_that_items_take() -> None:
    """Waiting for each item counts, with the wait for the end, and what is done with them does not."""

    def slow() -> Iterable[int]:
        for i in range(2):
            time.sleep(0.02)
            yield i
        time.sleep(0.02)

    took: list[float] = []
    found = []
    for item in timed(slow(), took.append):
        found.append(item)
        time.sleep(0.3)
    assert found == [0, 1]
    assert len(took) == 3
    assert 0.06 <= sum(took) < 0.6
