"""A run that is stopped anywhere and resumed ends as one that nobody stopped, or says why it cannot go on."""

import contextlib
import datetime
import decimal
import errno
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from medner import cli, lock, sources, testing
from medner.annotate import Annotator, Options
from medner.errors import InputError, OutputError
from medner.run import RunOptions, run
from medner.sinks import DirectorySink
from medner.sources import ReadOptions
from medner.verify import verify

TINY = testing.bundle()
AGAIN = "remove it, and --resume writes it again"
STOPPED = "run as before, choose another -o, or pass --overwrite"
CHANGED = "restore it, choose another -o, or pass --overwrite"

#: Rows of every kind: with and without mentions, empty, rejected for several reasons, without an id.
LINES = [
    '{"note_id": "a", "text": "Type 2 diabetes, no fever.", "age": 61, "other": "asthma"}',
    '{"note_id": 7, "text": "", "age": null}',
    "{nope",
    '{"text": "Höart – heart failure 😀 fever", "age": [1, {"b": 2}]}',
    '{"note_id": "b", "text": null}',
    '{"note_id": "a", "text": "breast cancer"}',
    "[1]",
    '{"note_id": "c", "text": "ok"}',
]


def go(
    inputs: Path | str | tuple[str, ...], output: Path, stdin: bytes | None = None, **changes: Any
) -> dict[str, Any]:
    """One quiet run with the tiny model."""
    names = inputs if isinstance(inputs, tuple) else (str(inputs),)
    options = RunOptions(names, str(output), model=str(TINY), quiet=True, annotate=Options(threads=1))
    return run(replace(options, **changes), stdin=None if stdin is None else io.BytesIO(stdin))


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of every file of both tables that has its final name."""
    files = [file for table in ("spans", "notes") for file in (path / table).glob("part-*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def states(path: Path) -> dict[str, tuple[int, int]]:
    """What changes of every file with its final name if it is written, or replaced."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    found = {str(file.relative_to(path)): file.stat() for file in files}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items() if name != lock.NAME}


def committed(path: Path) -> dict[str, tuple[int, int]]:
    """As :func:`states`, of the parts that are complete."""
    found = states(path)
    spans = [name for name in found if name.startswith("spans/")]
    pairs = [(name, name.replace("spans", "notes", 1)) for name in spans]
    return {name: found[name] for pair in pairs if pair[1] in found for name in pair}


def assert_complete(path: Path, manifest: dict[str, Any], whole: Path) -> None:
    """The tables are those of the whole run to the byte, the counts add up, and nothing else is left."""
    assert contents(path) == contents(whole)
    names = [str(file.relative_to(path)) for file in path.rglob("*")]
    assert sorted(names) == sorted(["manifest.json", "notes", "run.json", "spans", *contents(whole)])
    expected = json.loads((whole / "manifest.json").read_bytes())
    assert json.loads((path / "manifest.json").read_bytes()) == manifest
    assert (manifest["files"], manifest["inputs"]) == (expected["files"], expected["inputs"])
    counts, all_counts = manifest["counts"], expected["counts"]
    names = ["rows", "annotated", "rejected", "spans", "tokens", "unknown", "windows", "chars", "parts"]
    assert [counts[name] for name in names] == [all_counts[name] for name in names]
    assert counts["windows"] == counts["windows_inferred"] + counts["windows_reused"] + counts["windows_kept"]


def refusal(*arguments: Any, **changes: Any) -> str:
    """What is said by a run that does not go on; it leaves the directory as it was."""
    before = states(arguments[1])
    with pytest.raises(OutputError) as caught:
        go(*arguments, resume=True, **changes)
    assert states(arguments[1]) == before
    return str(caught.value)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A JSONL file of eight rows of every kind."""
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def finished(tmp_path: Path, notes: Path) -> Path:
    """The directory of a finished run of four parts."""
    go(notes, tmp_path / "out", part_rows=2)
    return tmp_path / "out"


@pytest.fixture
def unfinished(finished: Path) -> Path:
    """The directory of a run that was killed before it committed the third of four parts."""
    for name in (
        "manifest.json",
        "notes/part-000002.parquet",
        "notes/part-000003.parquet",
        "spans/part-000003.parquet",
    ):
        (finished / name).unlink()
    return finished


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share one session of the tiny model, and do not wait for the disk."""
    hurry(monkeypatch)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a test that has no fixtures of its own."""
    session = testing.annotator()

    def load(_: str, options: Options) -> Annotator:
        return Annotator(session.bundle, session.session, options, precision="fp32")

    monkeypatch.setattr(Annotator, "load", load)
    monkeypatch.setattr(os, "fsync", lambda _: None)


# ---------------------------------------------------------------------------------------------------------------------
# A machine that stops, or whose disk is full


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


#: Calls that fail where the disk is full.
NEED_SPACE = {"open", "mkdir", "write", "fsync"}


@dataclass
class Machine:
    """The calls that change a disk; from the one after ``steps`` on, all fail, or those that need space.

    A write that fails has written the half. calls: those that were made.
    """

    steps: int = 10**9
    error: Callable[[], BaseException] = Killed
    space_only: bool = False
    calls: list[str] = field(default_factory=list)

    @property
    def is_down(self) -> bool:
        """Whether a call failed already."""
        return len(self.calls) > self.steps

    def step(self, name: str) -> None:
        """One call; raises where the machine is down."""
        self.calls.append(name)
        if self.is_down and (name in NEED_SPACE or not self.space_only):
            raise self.error()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside happens on this machine."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "mkdir", "fsync", "fchmod", "replace", "rename", "unlink"):
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            patch.setattr(os, "fdopen", lambda descriptor, mode: io.BufferedWriter(_Disk(descriptor, mode, self)))
            yield

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*rest: Any, **more: Any) -> Any:
            if name != "open" or rest[1] & os.O_CREAT:
                self.step(name)
            return original(*rest, **more)

        return call


class _Disk(io.FileIO):
    """A file whose writes are calls of a machine."""

    def __init__(self, descriptor: int, mode: str, machine: Machine) -> None:
        super().__init__(descriptor, mode)
        self._machine = machine

    def write(self, data: Any) -> int:
        if self._machine.error is Killed and self._machine.is_down:
            return len(data)  # what a dead process held in memory is gone
        try:
            self._machine.step("write")
        except BaseException:
            super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)


def bury(path: Path) -> None:
    """Let the holders of locks and guards be dead; in these tests it is this process, which is not."""
    for left in (*path.glob(lock.NAME), *path.glob(f".{lock.NAME}.*")):
        with contextlib.suppress(ValueError):
            left.write_text(json.dumps(json.loads(left.read_bytes()) | {"started": 1}))
        os.utime(left, (0, 0))


def no_space() -> OSError:
    """What the operating system says of a full disk."""
    return OSError(errno.ENOSPC, "No space left on device")


KINDS: list[dict[str, Any]] = [
    {},
    {"form": "jsonl", "nested": True, "text": False, "read": ReadOptions(keep=("age",), limit=7)},
]


@pytest.mark.parametrize("changes", KINDS, ids=["parquet", "jsonl"])
def test_a_run_that_is_killed_before_any_call(
    tmp_path: Path, notes: Path, changes: dict[str, Any], quick: None
) -> None:
    """Whatever was done last, all that has its final name is whole, and what was committed is kept as it lies there."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    machine = Machine()
    with machine.running():
        go(notes, whole, part_rows=4, **changes)
    assert {"open", "mkdir", "write", "fsync", "fchmod", "replace", "unlink"} == set(machine.calls)
    assert len(machine.calls) > 40
    for steps in range(len(machine.calls)):
        with Machine(steps).running(), contextlib.suppress(Killed):
            go(notes, out, part_rows=4, **changes)
        assert contents(out).items() <= contents(whole).items()
        parts = {table: {file.name for file in (out / table).glob("part-*")} for table in ("spans", "notes")}
        assert parts["notes"] <= parts["spans"]
        bury(out)
        before, is_finished = committed(out), (out / "manifest.json").exists()
        manifest = go(notes, out, part_rows=4, resume=True, **changes)
        assert manifest["counts"]["parts_kept"] == (0 if is_finished else len(before) / 2)
        assert states(out).items() >= before.items()
        assert_complete(out, manifest, whole)
        shutil.rmtree(out)


@pytest.mark.parametrize("changes", KINDS, ids=["parquet", "jsonl"])
def test_a_disk_that_is_full_at_any_call(tmp_path: Path, notes: Path, changes: dict[str, Any], quick: None) -> None:
    """An output error that names the place; no draft stays. With space again, --resume ends as if nothing had been."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    machine = Machine()
    with machine.running():
        go(notes, whole, part_rows=4, **changes)
    places = set()
    for steps, call in enumerate(machine.calls):
        if call not in NEED_SPACE:
            continue
        full = Machine(steps, no_space, space_only=True)
        try:
            with full.running():
                go(notes, out, part_rows=4, **changes)
        except OutputError as exc:
            place, said = str(exc).split(": ", 1)
            assert said == "cannot be written: No space left on device"
            places.add(place.removeprefix(str(out)).rpartition(".")[0])
            assert not list(out.rglob(".part-*"))
            assert not list(out.rglob(".*.json.*.tmp"))
        else:
            assert steps >= len(machine.calls) - 4  # it could not make the guard to give the lock back
        assert contents(out).items() <= contents(whole).items()
        bury(out)
        before = committed(out)
        manifest = go(notes, out, part_rows=4, resume=True, **changes)
        assert states(out).items() >= before.items()
        assert_complete(out, manifest, whole)
        shutil.rmtree(out)
    files = {f"/{table}/part-00000{number}" for table in ("spans", "notes") for number in (0, 1)}
    assert places - {""} == {"/run", "/manifest", *files}  # and the directory itself


@pytest.mark.parametrize("directories", [False, True])
def test_a_disk_that_does_not_confirm(
    tmp_path: Path, notes: Path, directories: bool, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Where flushing a file or a directory fails, a run does not go on as though it were safe."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    go(notes, whole, part_rows=4)
    fsync, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        if Path(f"/proc/self/fd/{descriptor}").is_dir() == directories:
            calls += 1
            if calls > 3:
                raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError) as caught:
        go(notes, out, part_rows=4)
    table = "notes/part-000000.parquet" if directories else "spans/part-000001.parquet"
    assert str(caught.value) == f"{out}/{table}: cannot be written: Input/output error"
    monkeypatch.setattr(os, "fsync", fsync)
    assert_complete(out, go(notes, out, part_rows=4, resume=True), whole)


def test_a_file_system_that_cannot_flush_directories(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some answer that there is nothing to be done; a file is flushed all the same."""
    fsync = os.fsync

    def unable(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    go(notes, tmp_path / "whole")
    monkeypatch.setattr(os, "fsync", unable)
    assert_complete(tmp_path / "out", go(notes, tmp_path / "out"), tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Any input, any kills

#: Columns of Parquet inputs that can be kept, a value for a row that is drawn, and null.
TYPED: dict[str, tuple[pa.DataType, Any]] = {
    "day": (pa.date32(), datetime.date(2024, 2, 29)),
    "when": (pa.timestamp("ns", "UTC"), 1234567891234567891),
    "price": (pa.decimal128(9, 2), decimal.Decimal("1.10")),
    "share": (pa.float64(), float("nan")),
    "raw": (pa.binary(), b"\xff\x00"),
    "ward": (pa.dictionary(pa.int32(), pa.string()), "x"),
    "tags": (pa.list_(pa.timestamp("ns")), [1234567891234567891, None]),
    "more": (pa.struct([pa.field("a", pa.float32()), pa.field("b", pa.binary())]), {"a": float("nan"), "b": b"\xff"}),
}


@dataclass(frozen=True)
class Case:
    """What is run: names and contents of input files, or of standard input, and options."""

    files: dict[str, bytes]
    changes: dict[str, Any]
    kills: list[int]
    lost: list[int]

    def go(self, folder: Path, output: str, **more: Any) -> dict[str, Any]:
        """One run of it, with what is in ``folder``."""
        stdin = self.files.get("-")
        inputs = tuple(self.files) if stdin is not None else tuple(str(folder / name) for name in self.files)
        return go(inputs, folder / output, stdin, **self.changes, **more)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Files of any kind with rows of every kind, options of any kind, kills and losses anywhere."""
    lines = draw(st.lists(st.sampled_from(LINES), max_size=9))
    kind = draw(st.sampled_from(["-", "jsonl", "two", "texts", "parquet"]))
    keep: tuple[str, ...] = ()
    if kind == "texts":
        files = {f"{number}.txt": line.encode() for number, line in enumerate(lines or LINES[:1])}
    elif kind == "parquet":
        keep = draw(st.lists(st.sampled_from(sorted(TYPED)), unique=True, max_size=3).map(tuple))
        nulls = draw(st.lists(st.booleans(), min_size=len(lines), max_size=len(lines)))
        columns = {"text": pa.array([None if line[0] != "{" else line for line in lines], pa.string())}
        for name in keep:
            values = [None if null else TYPED[name][1] for null in nulls]
            columns[name] = pa.array(values, TYPED[name][0])
        table = io.BytesIO()
        pq.write_table(pa.table(columns), table, row_group_size=4)
        files = {"in.parquet": table.getvalue()}
    else:
        # An object with all columns in front, so that none counts as absent.
        lines = [LINES[0], *lines]
        keep = draw(st.sampled_from([(), ("age",), ("age", "other")]))
        halves = [lines, lines[::-1] + LINES[:1]] if kind == "two" else [lines]
        names = ["b.jsonl", "a.jsonl"] if kind == "two" else ["-" if kind == "-" else "in.jsonl"]
        files = {name: "\n".join([*half, ""]).encode() for name, half in zip(names, halves, strict=True)}
    read = ReadOptions(keep=keep, limit=draw(st.none() | st.integers(1, 6)), unique_ids=draw(st.booleans()))
    changes = {
        "read": read,
        "part_rows": draw(st.integers(1, 5)),
        "form": draw(st.sampled_from(["parquet", "jsonl"])),
        "nested": draw(st.booleans()),
        "text": draw(st.booleans()),
    }
    return Case(files, changes, draw(st.lists(st.integers(0, 150), max_size=3)), draw(st.lists(st.integers(0, 9))))


@settings(deadline=None, max_examples=40)
@given(cases())
def test_any_run_killed_and_resumed_has_the_same_bytes(case: Case) -> None:
    """Killed again and again, and robbed of any files of its parts, it ends as the run that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        hurry(patch)
        folder = Path(name)
        for source, content in case.files.items():
            (folder / source).write_bytes(content)
        case.go(folder, "whole")
        whole, out = folder / "whole", folder / "out"
        for steps in case.kills:
            before = committed(out)
            with Machine(steps).running(), contextlib.suppress(Killed):
                case.go(folder, "out", resume=True)
            assert contents(out).items() <= contents(whole).items()
            assert states(out).items() >= before.items()
            bury(out)
        for number in case.lost:
            if parts := sorted(contents(out)):
                (out / parts[number % len(parts)]).unlink()
        before = committed(out)
        manifest = case.go(folder, "out", resume=True)
        assert states(out).items() >= before.items()
        assert_complete(out, manifest, whole)
        after = states(out)
        assert case.go(folder, "out", resume=True) == manifest
        assert states(out) == after


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing is to be done


@pytest.mark.parametrize("made", [(), (".snakemake_timestamp",)])
def test_resume_starts_where_there_is_nothing(
    tmp_path: Path, notes: Path, finished: Path, made: tuple[str, ...]
) -> None:
    """In an absent directory, and in an empty one that a scheduler made and left its mark in."""
    go(notes, tmp_path / "absent", part_rows=2, resume=True)
    assert contents(tmp_path / "absent") == contents(finished)
    (tmp_path / "empty").mkdir()
    for name in made:
        (tmp_path / "empty" / name).touch()
    manifest = go(notes, tmp_path / "empty", part_rows=2, resume=True)
    assert contents(tmp_path / "empty") == contents(finished)
    assert (manifest["counts"]["parts_kept"], manifest["counts"]["windows_kept"]) == (0, 0)
    assert {file.name for file in (tmp_path / "empty").glob(".*")} == set(made)


@pytest.mark.parametrize(("allowed", "code"), [("0", 3), ("all", 0)])
def test_a_finished_run_is_left_alone(
    notes: Path,
    finished: Path,
    allowed: str,
    code: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is inferred and no file touched; the exit code is that of this call's --max-rejected."""
    before = states(finished)
    monkeypatch.setattr(Annotator, "stream", pytest.fail)
    options = ["--model", str(TINY), "--part-rows", "2", "--resume", "--max-rejected", allowed]
    with pytest.raises(SystemExit) as caught:
        cli.main(["annotate", str(notes), "-o", str(finished), *options])
    assert caught.value.code == code
    printed, said = capfd.readouterr()
    assert printed.startswith("8 notes: 5 annotated, 3 rejected, 5 spans\n")
    lines = [f"medner: {finished} was finished already"]
    if code:
        lines.append(
            "medner: 3 of 8 rows were rejected, more than --max-rejected 0 allows; "
            "the output is complete and gives each one's reason"
        )
    assert said.splitlines() == lines
    assert states(finished) == before


def test_a_manifest_that_was_removed(
    notes: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Snakemake does before a job: all parts are kept, and the manifest is written again."""
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    (finished / "manifest.json").unlink()
    before = states(finished)
    monkeypatch.setattr(Annotator, "stream", pytest.fail)
    manifest = go(notes, finished, part_rows=2, resume=True)
    assert_complete(finished, manifest, whole)
    counts = manifest["counts"]
    assert [counts[name] for name in ("parts", "parts_kept", "rows", "rows_kept")] == [4, 4, 8, 8]
    assert (counts["windows_inferred"], counts["windows_reused"], counts["windows_kept"]) == (0, 0, counts["windows"])
    assert {name: state for name, state in states(finished).items() if name != "manifest.json"} == before


def test_a_finished_run_that_lost_a_part(notes: Path, finished: Path, tmp_path: Path) -> None:
    """It is unfinished from the first part that is written again; a manifest tells no lie meanwhile."""
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    for name in ("spans/part-000001.parquet", "notes/part-000003.parquet"):
        (finished / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectorySink, "finish", lambda *_: pytest.fail("not yet"))
        with pytest.raises(pytest.fail.Exception):
            go(notes, finished, part_rows=2, resume=True)
    assert not (finished / "manifest.json").exists()
    (finished / "notes/part-000001.parquet").unlink()
    assert_complete(finished, go(notes, finished, part_rows=2, resume=True), whole)


@pytest.mark.parametrize("lost", ["spans/part-000003.parquet", "notes/part-000003.parquet", "both"])
def test_notes_of_a_lost_part_that_changed(notes: Path, finished: Path, lost: str) -> None:
    """A finished run's lost part is not made up from other notes, at the same size of the file; nothing is inferred."""
    for name in ["spans/part-000003.parquet", "notes/part-000003.parquet"] if lost == "both" else [lost]:
        (finished / name).unlink()
    digest = json.loads((finished / "manifest.json").read_bytes())["inputs"][0]["sha256"]
    content = notes.read_text(encoding="utf-8")
    notes.write_text(content.replace('"text": "ok"', '"text": "OK"'), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Annotator, "stream", pytest.fail)
        for _ in range(2):
            said = refusal(notes, finished, part_rows=2)
            assert said.startswith(f"{finished}: cannot go on with this run: inputs.0.sha256 was {digest}, is ")
    notes.write_text(content, encoding="utf-8")
    assert go(notes, finished, part_rows=2, resume=True)["counts"]["parts_kept"] == 3


def test_texts_of_a_lost_part_that_changed(tmp_path: Path) -> None:
    """Of text files the common hash differs; behind a limit nothing is read, and nothing refused."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text("fever")
    options: dict[str, Any] = {"read": ReadOptions(limit=2), "part_rows": 1}
    go(folder, out, **options)
    whole = contents(out)
    (out / "notes/part-000001.parquet").unlink()
    (folder / "c.txt").write_text("cough")
    (folder / "b.txt").write_text("ulcer")
    assert "inputs.0.sha256 was" in refusal(folder, out, **options)
    (folder / "b.txt").write_text("fever")
    go(folder, out, resume=True, **options)
    assert contents(out) == whole


def test_standard_input_of_a_run_that_lost_a_part(tmp_path: Path) -> None:
    """It can be read once only, so its lost parts are written from what it gives now."""
    out, given = tmp_path / "out", "\n".join(LINES).encode()
    go(("-",), out, given, part_rows=2)
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    (out / "notes/part-000002.parquet").unlink()
    assert_complete(out, go(("-",), out, given, part_rows=2, resume=True), whole)


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_what_may_change(tmp_path: Path, notes: Path, state: str, request: pytest.FixtureRequest) -> None:
    """Where inputs, output and model lie, how work is spread, and what is judged or said at the end."""
    whole = Path(shutil.copytree(request.getfixturevalue("finished"), tmp_path / "whole"))
    out = request.getfixturevalue(state)
    (tmp_path / "elsewhere").mkdir()
    out = out.rename(tmp_path / "elsewhere" / "moved")
    (tmp_path / "elsewhere" / "notes.jsonl").symlink_to(notes)
    model = shutil.copytree(TINY, tmp_path / "elsewhere" / "model")
    before = committed(out)
    manifest = go(
        tmp_path / "elsewhere" / "notes.jsonl",
        out,
        part_rows=2,
        resume=True,
        model=str(model),
        max_rejected="9%",
        quiet=False,
        annotate=Options(threads=2, batch_tokens=64, reuse=False),
    )
    assert manifest["counts"]["rows"] == 8
    assert contents(out) == contents(whole)
    assert states(out).items() >= before.items()
    assert [manifest["options"][name] for name in ("inputs", "max_rejected", "threads", "reuse")] == [
        [str(tmp_path / "elsewhere" / "notes.jsonl")], "9%", 2, False
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["table", "texts"])
def test_an_input_that_stopped_the_run_and_was_repaired(tmp_path: Path, notes: Path, kind: str) -> None:
    """What is committed stays; the run that goes on reads the file anew, and records what it read."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    if kind == "table":
        (folder / "a.jsonl").write_bytes(300 * notes.read_bytes())
        damaged, whole = folder / "b.csv", b'note_id,text\n1,"fever"\n2,fever\n'
        damaged.write_bytes(whole.replace(b'r"', b"r"))
    else:
        for number in range(2000):
            (folder / f"{number:04}.txt").write_text("fever")
        damaged, whole = folder / "b.txt.gz", gzip.compress(b"fever")
        damaged.write_bytes(whole[:-4])
    with pytest.raises(InputError, match="copy or write it again" if kind == "texts" else "close or double the quote"):
        go(folder, out, part_rows=100)
    before = committed(out)
    assert before
    damaged.write_bytes(whole)
    manifest = go(folder, out, part_rows=100, resume=True)
    assert manifest["counts"]["parts_kept"] == len(before) / 2
    assert states(out).items() >= before.items()
    go(folder, tmp_path / "anew", part_rows=100)
    assert contents(out) == contents(tmp_path / "anew")
    assert verify(out, [str(folder)])


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

READ = {"part_rows": 2}
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"form": "jsonl"}, "options.format was parquet, is jsonl"),
    ({"text": False}, "options.text was True, is False"),
    ({"nested": True}, "options.nested was False, is True"),
    ({"part_rows": 3}, "options.part_rows was 2, is 3"),
    ({"annotate": Options(min_score=0.5)}, "options.min_score was 0.0, is 0.5"),
    ({"annotate": Options(window=16)}, "model.window was 32, is 16"),
    ({"read": ReadOptions(text_column="other")}, "options.read.text_column was text, is other"),
    ({"read": ReadOptions(id_column="other")}, "options.read.id_column was None, is other"),
    ({"read": ReadOptions(encoding="latin-1")}, "options.read.encoding was utf-8, is latin-1"),
    ({"read": ReadOptions(delimiter=";")}, "options.read.delimiter was None, is ;"),
    ({"read": ReadOptions(quotes=False)}, "options.read.quotes was True, is False"),
    ({"read": ReadOptions(keep=("age",))}, "options.read.keep was 0 of them, is 1 of them (and 1 more)"),
    ({"read": ReadOptions(limit=8)}, "options.read.limit was None, is 8"),
    ({"read": ReadOptions(max_note_bytes=9)}, "options.read.max_note_bytes was 67108864, is 9"),
    ({"read": ReadOptions(unique_ids=True)}, "options.read.unique_ids was False, is True"),
]


@pytest.mark.parametrize(("changes", "said"), OPTIONS, ids=[said.split()[0] for _, said in OPTIONS])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_options_that_change_the_output(
    notes: Path, state: str, changes: dict[str, Any], said: str, request: pytest.FixtureRequest
) -> None:
    """Each one is refused by its name, with its old and its new value."""
    out = request.getfixturevalue(state)
    assert refusal(notes, out, **(READ | changes)) == f"{out}: cannot go on with this run: {said}; {STOPPED}"


RECORDED: list[tuple[str, Any]] = [
    ("medner", "0.0.1"), ("versions.onnxruntime", "1.0"), ("versions.tokenizers", "0.1"), ("versions.sentencex", "0"),
    ("versions.pyarrow", "1"), ("versions.numpy", "1"), ("versions.python", "3.0"), ("model.precision", "int8"),
    ("model.provider", "CUDAExecutionProvider"), ("model.packed", None), ("model.instruction_set", "none"),
    ("model.exact_int8", None), ("model.labels.1", "B-Drug"), ("model.files.onnx/model.onnx", "00"),
    ("model.files.tokenizer.json", "00"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), RECORDED, ids=[name for name, _ in RECORDED])
def test_anything_else_that_changes_the_output(notes: Path, unfinished: Path, name: str, value: Any) -> None:
    """Model, precision, provider, processor, libraries and inputs: what run.json says is compared with what is."""
    recorded: Any = json.loads((unfinished / "run.json").read_bytes())
    *path, last = (int(key) if key.isdecimal() else key for key in name.split(".", 2 if "files" in name else -1))
    fields = recorded
    for key in path:
        fields = fields[key]
    now, fields[last] = fields[last], value
    assert now != value
    (unfinished / "run.json").write_text(json.dumps(recorded))
    assert refusal(notes, unfinished, **READ) == (
        f"{unfinished}: cannot go on with this run: {name} was {value}, is {now}; {STOPPED}"
    )


@pytest.mark.parametrize("inputs", [None, [None], ["a"], [{}]])
def test_inputs_that_are_recorded_otherwise(notes: Path, unfinished: Path, inputs: Any) -> None:
    """A damaged record is another run, not a defect."""
    recorded: Any = json.loads((unfinished / "run.json").read_bytes()) | {"inputs": inputs}
    (unfinished / "run.json").write_text(json.dumps(recorded))
    assert refusal(notes, unfinished, **READ).startswith(f"{unfinished}: cannot go on with this run: ")


def test_another_bundle(tmp_path: Path, notes: Path, unfinished: Path) -> None:
    """The same graph without medner.json is another model; the first difference is named."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    digest = json.loads((unfinished / "run.json").read_bytes())["model"]["files"]["medner.json"]
    (model / "medner.json").unlink()
    said = refusal(notes, unfinished, model=str(model), annotate=Options(window=32), **READ)
    assert said == f"{unfinished}: cannot go on with this run: model.files.medner.json was {digest}, is None; {STOPPED}"


def test_inputs_that_are_not_those_of_before(tmp_path: Path, notes: Path) -> None:
    """Their order, names, number and sizes."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(notes, folder / name)
    (folder / "a.jsonl").write_text('{"text": "fever"}\n')
    both = tuple(str(folder / name) for name in ("a.jsonl", "b.jsonl"))
    go(both, out, part_rows=2)
    size = notes.stat().st_size
    start = f"{out}: cannot go on with this run: inputs"
    assert refusal(both[::-1], out, part_rows=2) == (
        f"{start}.0.source was a.jsonl, is b.jsonl (and 3 more); {STOPPED}"
    )
    files = f"{out}: cannot go on with this run: the input"
    rest = "give the files that it began with, and others to a run of their own"
    assert refusal(both[:1], out, part_rows=2) == f"{files} b.jsonl is missing; {rest}"
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert refusal((both[0], str(folder / "c.jsonl")), out, part_rows=2) == f"{files} c.jsonl is new; {rest}"
    with (folder / "c.jsonl").open("a") as file:
        file.write("\n")
    (folder / "c.jsonl").rename(folder / "b.jsonl")
    assert refusal(both, out, part_rows=2) == f"{start}.1.bytes was {size}, is {size + 1}; {STOPPED}"


def test_text_files_that_are_not_those_of_before(tmp_path: Path) -> None:
    """Their names may be ids, so it is their common hash that differs."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("ID-1.txt", "ID-2.txt"):
        (folder / name).write_text("fever")
    go(folder, out)
    before = json.loads((out / "run.json").read_bytes())["inputs"][0]["sha256"]
    (folder / "ID-2.txt").rename(folder / "ID-3.txt")
    for _ in ("finished", "unfinished"):
        said = refusal(folder, out)
        assert said.startswith(f"{out}: cannot go on with this run: inputs.0.sha256 was {before}, is ")
        assert "ID-" not in said.removeprefix(str(out))
        (out / "manifest.json").unlink(missing_ok=True)


EDITS = {
    "text": ('"text": "ok"', '"text": "OK"', "part 3: ", "row 7 of notes.jsonl"),
    "id": ('"note_id": 7', '"note_id": 8', "part 0: ", "row 1 of notes.jsonl"),
    "rejected": ("{nope", "[123]", "part 1: ", "row 2 of notes.jsonl"),
    "accepted": ("[1]\n", "{ }\n", "part 3: ", "row 6 of notes.jsonl"),
}


@pytest.mark.parametrize(("old", "new", "part", "where"), EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("keep_manifest", [True, False])
def test_notes_of_a_finished_part_that_changed(
    notes: Path, finished: Path, old: str, new: str, part: str, where: str, keep_manifest: bool
) -> None:
    """At the same size of the file, it is refused with the place of the first change."""
    content = notes.read_text(encoding="utf-8")
    assert content.count(old) == 1
    changed = content.replace(old, new)
    assert len(changed) == len(content)
    notes.write_text(changed, encoding="utf-8")
    if not keep_manifest:
        (finished / "manifest.json").unlink()
    assert refusal(notes, finished, **READ) == (
        f"{finished}, {part}the input changed since this part was written ({where}); {CHANGED}"
    )


def test_a_kept_column_that_changed(tmp_path: Path, notes: Path) -> None:
    """A value that is only carried along counts, too."""
    out, read = tmp_path / "out", ReadOptions(keep=("age",))
    go(notes, out, read=read)
    notes.write_text(notes.read_text(encoding="utf-8").replace('"age": 61', '"age": 16'), encoding="utf-8")
    assert refusal(notes, out, read=read) == (
        f"{out}, part 0: the input changed since this part was written (row 0 of notes.jsonl); {CHANGED}"
    )


def test_bytes_that_make_no_difference_to_a_row(notes: Path, finished: Path) -> None:
    """White space in a JSON line: an unfinished run goes on; of a finished one the manifest has the input's hash."""
    digest = json.loads((finished / "manifest.json").read_bytes())["inputs"][0]["sha256"]
    notes.write_text(notes.read_text(encoding="utf-8").replace('{"note_id": 7, ', '{"note_id":7,  '), encoding="utf-8")
    said = refusal(notes, finished, **READ)
    assert said.startswith(f"{finished}: cannot go on with this run: inputs.0.sha256 was {digest}, is ")
    before = contents(finished)
    (finished / "manifest.json").unlink()
    go(notes, finished, resume=True, **READ)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (LINES[:7], ", part 3: the input changed since this part was written (its end)"),
        (
            LINES[:6],
            "/notes/part-000003.parquet: lies beyond the end of the input, which was longer when it was written",
        ),
        ([*LINES[:7], "{}", *LINES], ", part 3: the input changed since this part was written (row 7 of -)"),
    ],
)
@pytest.mark.parametrize("keep_manifest", [True, False])
def test_standard_input_of_another_length(tmp_path: Path, lines: list[str], said: str, keep_manifest: bool) -> None:
    """Its size is not known before, so it is the parts that tell."""
    out = tmp_path / "out"
    go(("-",), out, "\n".join(LINES).encode(), **READ)
    if not keep_manifest:
        (out / "manifest.json").unlink()
    step = CHANGED.replace("restore it", "restore the input") if "beyond" in said else CHANGED
    assert refusal(("-",), out, "\n".join(lines).encode(), **READ) == f"{out}{said}; {step}"


def test_standard_input_that_goes_on(tmp_path: Path) -> None:
    """Rows after a last part that was full are an input of another length to a finished run, and new to another."""
    out = tmp_path / "out"
    go(("-",), out, "\n".join(LINES).encode(), **READ)
    longer = "\n".join([*LINES, *LINES[:3]]).encode()
    go(("-",), tmp_path / "whole", longer, **READ)
    assert_complete(out, go(("-",), out, longer, resume=True, **READ), tmp_path / "whole")


@pytest.mark.parametrize("name", ["spans/part-000004.parquet", "notes/part-000004.parquet", "spans/part-000000.jsonl"])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_parts_that_are_none_of_this_run(
    tmp_path: Path, notes: Path, name: str, state: str, request: pytest.FixtureRequest
) -> None:
    """They would be read as the run's; what is missing is done before they are found."""
    out = request.getfixturevalue(state)
    shutil.copy(out / "spans" / "part-000000.parquet", out / name)
    with pytest.raises(OutputError) as caught:
        go(notes, out, resume=True, **READ)
    assert str(caught.value) == (
        f"{out}/{name}: lies beyond the end of the input, which was longer when it was written; "
        "restore the input, choose another -o, or pass --overwrite"
    )
    assert (out / "manifest.json").exists() == (state == "finished")
    (out / name).unlink()
    assert go(notes, out, resume=True, **READ)["counts"]["rows"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def truncations(content: bytes) -> list[bytes]:
    """A file that was cut short in several places, or filled with zeros."""
    return [b"", content[:1], content[: len(content) // 2], content[:-1], bytes(len(content))]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("table", ["spans", "notes"])
@pytest.mark.parametrize("nested", [True, False])
def test_part_files_that_are_damaged(
    tmp_path: Path, notes: Path, form: str, table: str, nested: bool, quick: None
) -> None:
    """Each is refused by its name; without it the part is written again, with the same bytes."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    changes: dict[str, Any] = {"form": form, "nested": nested, "part_rows": 4}
    go(notes, whole, **changes)
    shutil.copytree(whole, out)
    (out / "manifest.json").unlink()
    file = out / table / f"part-000001.{form}"
    content = file.read_bytes()
    damaged = truncations(content)
    if form == "jsonl":
        damaged += [content[:-2], b"[]\n", b"1\n", b'{"row": 4}\n', content.replace(b'"row"', b'"raw"')]
        if table == "notes":
            changes_of_notes = (
                (b'"n_windows":1', b'"n_windows":null'),
                (b'"n_tokens":', b'"n_tokens":-'),
                (b'"n_chars":', b'"n_chars":0.'),
                (b'"annotated"', b'"rejected"'),
            )
            damaged += [content.replace(*change) for change in changes_of_notes]
        else:
            damaged.append(content.replace(b'"row":5', b'"row":6'))
    assert content not in damaged
    for broken in damaged:
        file.write_bytes(broken)
        said = refusal(notes, out, **changes)
        if form == "jsonl" and not broken:
            # Of a table that may have no rows, an empty file is only seen to contradict the other.
            assert said in (
                f"{out}/spans/part-000001.jsonl: damaged or cut short; {AGAIN}",
                f"{out}, part 1: the input changed since this part was written (row 4 of notes.jsonl); {CHANGED}",
            )
        else:
            assert said == f"{file}: damaged or cut short; {AGAIN}"
    file.unlink()
    assert_complete(out, go(notes, out, resume=True, **changes), whole)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_any_change_of_a_finished_run_is_seen(tmp_path: Path, notes: Path, form: str, quick: None) -> None:
    """The manifest has every file's hash: one bit is enough, wherever it lies."""
    out = tmp_path / "out"
    go(notes, out, form=form)
    rng = random.Random(0)
    for name, content in contents(out).items():
        for _ in range(8):
            place = rng.randrange(len(content))
            (out / name).write_bytes(
                content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
            )
            assert refusal(notes, out, form=form) == f"{out / name}: damaged or cut short; {AGAIN}"
        (out / name).write_bytes(content)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"{}", b"\xff", b'"x"'])
def test_records_that_are_damaged(notes: Path, finished: Path, broken: bytes) -> None:
    """Without run.json nobody can tell what was run; a manifest can be written again."""
    manifest, run_json = ((finished / name).read_bytes() for name in ("manifest.json", "run.json"))
    (finished / "manifest.json").write_bytes(broken)
    assert refusal(notes, finished, **READ) == f"{finished}/manifest.json: damaged or cut short; {AGAIN}"
    for name, value in (("files", []), ("counts", None), ("seconds", "1"), ("model", [])):
        changed = json.loads(manifest) | {name: value}
        (finished / "manifest.json").write_bytes(json.dumps(changed).encode())
        assert refusal(notes, finished, **READ) == f"{finished}/manifest.json: damaged or cut short; {AGAIN}"
    for name, value in (("rejected", 0), ("spans", 10**6), ("rows_kept", None)):
        changed = json.loads(manifest)
        changed["counts"] = {key: n for key, n in (changed["counts"] | {name: value}).items() if n is not None}
        (finished / "manifest.json").write_bytes(json.dumps(changed).encode())
        assert refusal(notes, finished, **READ) == (
            f"{finished}: its manifest.json counts other things than the parts hold; "
            "restore it, or remove it and pass --resume"
        )
    (finished / "manifest.json").write_bytes(manifest)
    (finished / "run.json").write_bytes(broken)
    assert refusal(notes, finished, **READ) == (
        f"{finished}/run.json: damaged or cut short; pass --overwrite to run anew"
    )
    (finished / "run.json").write_bytes(run_json)
    (finished / "manifest.json").unlink()
    assert go(notes, finished, resume=True, **READ)["counts"]["parts_kept"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that change while they are read


def after_part(monkeypatch: pytest.MonkeyPatch, part: int, act: Callable[[], object]) -> None:
    """Let something happen when a part was written."""
    write = DirectorySink.write

    def then(self: DirectorySink, number: int, batches: Any) -> None:
        write(self, number, batches)
        if number == part:
            act()

    monkeypatch.setattr(DirectorySink, "write", then)


@pytest.mark.parametrize("act", ["removed", "truncated", "longer"])
def test_an_input_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Exit code 4 with its name; what was committed is of the old input. The run goes on with all that is there now."""
    folder, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    folder.mkdir()
    text = json.dumps({"text": "no fever", "beside": "x" * 4_000}) + "\n"  # more than is read ahead
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(text * 200)
    monkeypatch.setattr(sources, "BATCH_ROWS", 20)
    go(folder, whole, part_rows=20)
    victim = folder / ("b.jsonl" if act == "removed" else "a.jsonl")
    content = victim.read_bytes()
    acts: dict[str, Callable[[], object]] = {
        "removed": victim.unlink,
        "truncated": lambda: os.truncate(victim, len(content) // 2 - 7),
        "longer": lambda: victim.write_bytes(content + text.encode()),
    }
    with monkeypatch.context() as patch:
        after_part(patch, 1, acts[act])
        with pytest.raises(InputError) as caught:
            go(folder, out, part_rows=20)
    assert str(caught.value) == (
        f"cannot read {victim}: No such file or directory"
        if act == "removed"
        else f"{victim} changed while it was read; run again once nothing writes to it"
    )
    kept = contents(out)
    assert len(kept) >= 4
    assert kept.items() <= contents(whole).items()
    if act == "removed":
        assert refusal(folder, out, part_rows=20).startswith(
            f"{out}: cannot go on with this run: the input {victim.name}"
        )
        victim.write_bytes(content)
    go(folder, whole, part_rows=20, overwrite=True)
    assert_complete(out, go(folder, out, part_rows=20, resume=True), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Processes

#: In a file system of 2 MiB: full, freed, resumed; then read-only. Prints exit codes and drafts that stayed.
SMALL_DISK = """
set -e
mount -t tmpfs -o size=2m tmpfs "$1"
medner() { code=0; "$PYTHON" -m medner.cli annotate in.jsonl --model tiny --part-rows 50 --quiet "$@" || code=$?; }
dd if=/dev/zero of="$1/other" bs=1k count=1600 status=none
medner -o "$1/out" --resume; echo "$code" >&2
(cd "$1/out"; find . -name '.*.tmp' | sed 's/^/left /' >&2)
cp -r "$1/out" stopped
rm "$1/other"
medner -o "$1/out" --resume; echo "$code" >&2
cp -r "$1/out" resumed
mount -o remount,ro "$1"
medner -o "$1/out" --resume; echo "$code" >&2
"""


def may_mount(space: list[str], place: Path) -> bool:
    """Whether this user can have a file system of its own."""
    try:
        done = subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def test_a_small_disk(tmp_path: Path) -> None:
    """A real file system that fills up, and one that is read-only: exit code 6, and --resume once there is space."""
    rng = random.Random(0)
    lines = [json.dumps({"note_id": rng.randbytes(16).hex(), "text": f"fever {n}"}) for n in range(2_000)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    space = ["unshare", "--map-root-user", "--mount"]
    if not may_mount(space, disk):
        pytest.skip("this user may not mount a file system")
    done = subprocess.run(
        [*space, "sh", "-c", SMALL_DISK, "sh", str(disk)],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.splitlines()
    assert said[1:] == ["6", "0", f"medner: {disk}/out: cannot be written: Read-only file system", "6"]
    place, _, reason = said[0].partition(": cannot be written: ")
    assert (place.startswith(f"medner: {disk}/out/"), reason) == (True, "No space left on device")
    go(tmp_path / "in.jsonl", whole, part_rows=50)
    kept = contents(tmp_path / "stopped")
    assert 0 < len(kept) < 80
    assert kept.items() <= contents(whole).items()
    manifest = json.loads((tmp_path / "resumed" / "manifest.json").read_bytes())
    assert manifest["counts"]["parts_kept"] == len(kept) // 2
    assert_complete(tmp_path / "resumed", manifest, whole)


#: Processes that start one command at the same moment; each reads its own pipe, which stays open while others run.
TOGETHER = """
import os, sys
from medner import annotate, cli, run, runtime, testing
import onnxruntime

output, rounds, flags, standing = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(), sys.argv[4] == "standing"
arguments = ["annotate", "-", "--model", "tiny", "--threads", "1", "--quiet", *flags]

def start(out, gate):
    errors, error = os.pipe()
    notes, pipe = os.pipe()
    process = os.fork()
    if process:
        os.close(error)
        os.close(notes)
        return process, errors, pipe
    try:
        os.dup2(notes, 0)
        os.dup2(error, 2)
        os.close(notes)
        os.close(pipe)
        os.close(error)
        os.read(gate, 1)
        cli.main([*arguments, "-o", out])
    except SystemExit as stop:
        os._exit(stop.code or 0)

def finish(child, notes):
    process, errors, pipe = child
    os.write(pipe, notes)
    os.close(pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, process, os.read(errors, 9999).decode()

notes = b'{"text": "fever"}\\n'
for number in range(rounds):
    out = f"{output}/{number}"
    if standing:
        gate, opened = os.pipe()
        os.write(opened, b"x")
        assert finish(start(out, gate), notes)[0] == 0
    gate, opened = os.pipe()
    children = []
    for _ in range(3):
        children.append(start(out, gate))
    os.write(opened, b"xxx")
    # All but the one that runs end by themselves; that one waits for its pipe to be closed.
    ended = []
    while len(ended) < 2:
        process, status = os.waitpid(-1, 0)
        ended.append(process)
        code = os.waitstatus_to_exitcode(status)
        errors = next(errors for child, errors, _ in children if child == process)
        print(code, os.read(errors, 9999).decode(), end="")
    (last,) = [child for child in children if child[0] not in ended]
    for process, _, pipe in children:
        if process in ended:
            os.close(pipe)
    code, process, said = finish(last, notes)
    print(code, said or process)
"""


@pytest.mark.parametrize(
    ("flags", "before"), [("", "absent"), ("--resume", "absent"), ("--resume", "standing"), ("--overwrite", "standing")]
)
def test_processes_that_start_together(tmp_path: Path, flags: str, before: str) -> None:
    """Of three commands for one directory exactly one runs; the others end with one line and exit code 6."""
    rounds = 2
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, str(tmp_path), str(rounds), flags, before],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * rounds
    for number in range(rounds):
        *refused, ran = lines[3 * number : 3 * number + 3]
        code, process = ran.split()
        assert code == "0"
        assert (
            refused
            == [
                f"6 medner: {tmp_path}/{number}: process {process} on {lock.Holder.this().host} is writing it; "
                "wait for its end, or choose another -o"
            ]
            * 2
        )
        assert sorted(contents(tmp_path / str(number))) == ["notes/part-000000.parquet", "spans/part-000000.parquet"]
        assert not (tmp_path / str(number) / lock.NAME).exists()
