"""The lock of a run directory: one holder at a time, whoever dies, sleeps, or sits on another host."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from medner import lock
from medner.errors import OutputError
from medner.lock import Holder, Lock
from medner.sinks import DirectorySink, TableOptions, write_json

#: Takes the lock of a directory, says so, and keeps it until it is killed.
HOLD = """
import sys, time
from pathlib import Path
from medner.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that cannot be seen from here are looked at often."""
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.01)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A living process that holds the lock of ``tmp_path``."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def stranger(**changes: Any) -> Holder:
    """A holder on another host."""
    return replace(Holder("elsewhere", "another boot", "pid:[1]", 17, 4711, "0123456789abcdef"), **changes)


def put(directory: Path, holder: Holder | bytes, age: float = 0.0) -> Path:
    """A lock file as another process left it, its last heartbeat ``age`` seconds ago."""
    path = directory / lock.NAME
    path.write_bytes(holder if isinstance(holder, bytes) else json.dumps(asdict(holder)).encode())
    os.utime(path, (time.time() - age,) * 2)
    return path


def names(directory: Path) -> list[str]:
    """Everything in a directory, hidden files too."""
    return sorted(entry.name for entry in directory.iterdir())


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is to do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refusal(directory: Path) -> str:
    """What is said where the lock cannot be had."""
    with pytest.raises(OutputError) as caught:
        Lock(directory)
    return str(caught.value)


def assert_free(directory: Path, say: Callable[[str], None] = pytest.fail) -> None:
    """The lock can be taken, and nothing is left of it and of an earlier one."""
    held = Lock(directory, say)
    held.claim.check()
    assert names(directory) == ["lock.json"]
    held.release()
    assert names(directory) == []


# ---------------------------------------------------------------------------------------------------------------------
# Under one kernel


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    """The file tells host, boot, namespace, process and start; two locks of one process are two."""
    held = Lock(tmp_path)
    fields = json.loads((tmp_path / "lock.json").read_bytes())
    assert list(fields) == ["host", "boot", "space", "process", "started", "token"]
    assert fields == asdict(held._me)
    assert fields["process"] == os.getpid()
    held.claim.check()
    assert refusal(tmp_path) == (
        f"{tmp_path}: process {os.getpid()} on {fields['host']} is writing it; wait for its end, or choose another -o"
    )
    held.release()
    assert names(tmp_path) == []
    again = Lock(tmp_path)
    assert again._me.token != fields["token"]
    again.release()


def test_a_living_process_keeps_its_lock(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    """However long ago its last heartbeat was, as after it was stopped; the refusal names it."""
    os.utime(tmp_path / "lock.json", (0, 0))
    host = Holder.this().host
    said = f"{tmp_path}: process {other.pid} on {host} is writing it; wait for its end, or choose another -o"
    assert refusal(tmp_path) == said
    other.send_signal(signal.SIGSTOP)
    assert refusal(tmp_path) == said
    assert names(tmp_path) == ["lock.json"]


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_loses_its_lock(tmp_path: Path, other: subprocess.Popen[str], reaped: bool) -> None:
    """At once and without a word, also while its parent has not asked for its end: it is a zombie then."""
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    assert Path(f"/proc/{other.pid}").exists() is not reaped
    assert_free(tmp_path)


def test_a_process_number_that_came_again(tmp_path: Path) -> None:
    """A process of the same number that started at another time is another."""
    me = Holder.this()
    assert me.started is not None
    put(tmp_path, replace(me, started=me.started - 1))
    assert_free(tmp_path)


@pytest.mark.parametrize("process", [2**22 + 1, 2**40])
def test_a_process_that_never_was(tmp_path: Path, process: int) -> None:
    """Beyond the largest number that the kernel gives, or a C integer holds."""
    put(tmp_path, replace(Holder.this(), process=process))
    assert_free(tmp_path)


def fake_proc(path: Path, monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    """A process table that shows no process, whose ``self`` is ``process``."""
    (path / "sys/kernel/random").mkdir(parents=True)
    (path / "sys/kernel/random/boot_id").write_text("this boot\n")
    (path / str(process) / "ns").mkdir(parents=True)
    (path / str(process) / "ns/pid").symlink_to("pid:[4026531836]")
    (path / "self").symlink_to(str(process))
    monkeypatch.setattr(lock, "_PROC", path)


def test_a_process_that_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, where the process table shows one's own alone (hidepid): it is there, so its heartbeat counts."""
    fake_proc(tmp_path / "proc", monkeypatch, os.getpid())
    work = tmp_path / "work"
    work.mkdir()
    me = Holder.this()
    assert (me.boot, me.space, me.started) == ("this boot", "pid:[4026531836]", None)

    def kill(process: int, number: int) -> None:
        assert number == 0
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    hidden = replace(me, process=17, started=4711)
    assert hidden.lives(me) is None
    monkeypatch.setattr(lock, "SILENT_SECONDS", 100.0)
    put(work, hidden, age=200)
    assert_free(work)


def test_the_process_table_of_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that sees its host's: numbers in it mean others, so it is not asked."""
    fake_proc(tmp_path, monkeypatch, os.getpid() + 1)
    me = Holder.this()
    assert (me.boot, me.space) == ("", "")
    assert me.lives(me) is None


# ---------------------------------------------------------------------------------------------------------------------
# Holders that cannot be seen from here

STRANGERS = {
    "host": lambda: stranger(),
    "boot": lambda: replace(Holder.this(), boot="an earlier one"),
    "namespace": lambda: replace(Holder.this(), space="pid:[1]"),
}
strangers = pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS)


@strangers
def test_a_stranger_that_beats(tmp_path: Path, make: Callable[[], Holder]) -> None:
    """It is refused as soon as its heartbeat was seen; until then one line says why nothing happens."""
    holder = make()
    path = put(tmp_path, holder)
    lines: list[str] = []

    def beat(line: str) -> None:
        lines.append(line)
        os.utime(path, (time.time() + 1,) * 2)

    with pytest.raises(OutputError) as caught:
        Lock(tmp_path, beat)
    who = f"{tmp_path}: process {holder.process} on {holder.host}"
    assert str(caught.value) == f"{who} is writing it; wait for its end, or choose another -o"
    assert lines == [f"{who} was writing it; waiting up to 60 s for a sign of life"]
    assert names(tmp_path) == ["lock.json"]


@strangers
def test_a_stranger_that_fell_silent(tmp_path: Path, make: Callable[[], Holder]) -> None:
    """A heartbeat that is long ago by the directory's own clock is enough."""
    put(tmp_path, make(), age=lock.SILENT_SECONDS + 1)
    assert_free(tmp_path)


@strangers
@pytest.mark.parametrize("age", [0, -3600], ids=["now", "clock ahead"])
def test_a_stranger_that_falls_silent_now(
    tmp_path: Path, make: Callable[[], Holder], age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sign of life for the whole time it is gone, also if its last one lies in the future."""
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.2)
    holder = make()
    put(tmp_path, holder, age)
    lines: list[str] = []
    assert_free(tmp_path, lines.append)
    assert lines == [
        f"{tmp_path}: process {holder.process} on {holder.host} was writing it; waiting up to 0 s for a sign of life"
    ]


def test_the_directory_s_clock_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that is old by the clock of this host, but not by that of the file server, is a fresh one."""
    path = put(tmp_path, stranger(), age=3600)

    def utime(target: Any, *rest: Any) -> None:
        original(target, (time.time() - 3600,) * 2)  # the server's clock is an hour behind

    original = os.utime
    monkeypatch.setattr(os, "utime", utime)
    assert refusal_after_a_beat(tmp_path, path)


def refusal_after_a_beat(directory: Path, path: Path) -> bool:
    """Whether the holder was waited for, and refused after its heartbeat."""
    waited: list[str] = []

    def beat(line: str) -> None:
        waited.append(line)
        path.touch()

    with pytest.raises(OutputError, match="is writing it"):
        Lock(directory, beat)
    return len(waited) == 1


def test_a_clock_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk so full that no file can be made to read it from: the heartbeat is waited for."""
    path = put(tmp_path, stranger(), age=3600)
    original = os.open

    def full(name: Any, *rest: Any) -> int:
        if str(name).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return original(name, *rest)

    monkeypatch.setattr(os, "open", full)
    assert refusal_after_a_beat(tmp_path, path)


def test_without_a_process_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, even a process of this host is judged by its heartbeat."""
    monkeypatch.setattr(lock, "_PROC", tmp_path / "proc")
    me = Holder.this()
    assert (me.boot, me.space, me.started) == ("", "", None)
    path = put(tmp_path, me)
    assert refusal_after_a_beat(tmp_path, path)
    put(tmp_path, me, age=3600)
    assert_free(tmp_path)


CONTENTS = [
    b"", b"{", b"[1]", b"null", b"{}", b'{"host": "a"}', b"\xff\xfe", json.dumps(asdict(stranger(process=-1))).encode(),
    json.dumps(asdict(stranger(process="self"))).encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_a_lock_that_cannot_be_read(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder may be about to write it, so it is waited for; silent for long enough, it is nobody's."""
    put(tmp_path, content, age=3600)
    assert_free(tmp_path)
    path = put(tmp_path, content)
    assert refusal_after_a_beat(tmp_path, path)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.2)
    lines: list[str] = []
    assert_free(tmp_path, lines.append)
    assert lines == [f"{tmp_path}: another process was writing it; waiting up to 0 s for a sign of life"]


def test_a_lock_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    """It can neither be read nor be created, and is waited for by nobody."""
    (tmp_path / lock.NAME).symlink_to("nowhere")
    with pytest.raises(OutputError) as caught:
        Lock(tmp_path, pytest.fail)
    assert str(caught.value) == f"{tmp_path / lock.NAME}: a link to nothing; remove it"


def test_a_host_that_cannot_be_printed() -> None:
    """What a lock file says reaches no terminal as it is."""
    seen = lock._Seen(json.dumps(asdict(replace(stranger(), host="a\x1b[2J\nb"))).encode(), (0, 0))
    assert str(seen) == r"process 17 on 'a\x1b[2J\nb'"


def test_a_lock_that_is_written_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its creation and its first byte it is looked at once more, without a word."""
    put(tmp_path, b"")
    monkeypatch.setattr(lock.time, "sleep", lambda _: put(tmp_path, stranger()))
    with pytest.raises(OutputError, match=r"process 17 on elsewhere is writing it"):
        Lock(tmp_path, pytest.fail)


def test_a_lock_that_vanishes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was given back: the next attempt gets it."""
    path = put(tmp_path, stranger())
    look = lock._look

    def late(name: Path) -> Any:
        if path.exists():
            path.unlink()
        monkeypatch.setattr(lock, "_look", look)
        return look(name)

    monkeypatch.setattr(lock, "_look", late)
    assert_free(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Holding


def test_a_holder_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It touches its file again and again, and goes on after a file server that did not answer."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    failures = iter([OSError(5, "Input/output error")] * 3)
    look = lock._look

    def flaky(path: Path) -> Any:
        for failure in failures:
            raise failure
        return look(path)

    held = Lock(tmp_path)
    monkeypatch.setattr(lock, "_look", flaky)
    for _ in range(2):
        os.utime(tmp_path / "lock.json", (0, 0))
        until(lambda: (tmp_path / "lock.json").stat().st_mtime > 0)
    monkeypatch.setattr(lock, "_look", look)
    held.release()


def test_a_holder_whose_lock_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notices, beats no longer, and leaves the other's lock alone."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    held = Lock(tmp_path)
    new = put(tmp_path, stranger(), age=50)
    until(lambda: not held._beating.is_alive())
    before = new.stat().st_mtime_ns
    with pytest.raises(OutputError) as caught:
        held.claim.check()
    assert str(caught.value) == f"{tmp_path}: process 17 on elsewhere took this run over; this process stops"
    held.release()
    assert new.stat().st_mtime_ns == before
    new.unlink()
    with pytest.raises(OutputError) as caught:
        held.claim.check()
    assert str(caught.value) == (f"{tmp_path}: its lock.json is gone, so another may write it; this process stops")
    held.release()
    assert names(tmp_path) == []


def test_nothing_is_committed_once_the_lock_was_taken(tmp_path: Path) -> None:
    """Neither a part's files nor the manifest nor run.json take their names; drafts go."""
    sink = DirectorySink(tmp_path, "jsonl", TableOptions())
    sink.start({"what": "is run"})
    sink.write(0, [])
    put(tmp_path, stranger())
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in ("run.json", "spans", "notes")}
    for commit in (lambda: sink.write(1, []), lambda: sink.finish({}), lambda: sink.start({"other": "run"})):
        with pytest.raises(OutputError) as caught:
            commit()
        assert str(caught.value) == f"{tmp_path}: process 17 on elsewhere took this run over; this process stops"
    sink.close()
    assert names(tmp_path) == ["lock.json", "notes", "run.json", "spans"]
    assert names(tmp_path / "notes") == names(tmp_path / "spans") == ["part-000000.jsonl"]
    assert (tmp_path / "run.json").stat().st_mtime_ns == before["run.json"]


def test_a_lock_is_looked_at_when_all_else_is_done(tmp_path: Path) -> None:
    """A file that took long to write does not take its name if the lock was lost meanwhile."""
    held = Lock(tmp_path)

    def check() -> None:
        assert len(list(tmp_path.glob(".a.json.*.tmp"))) == 1
        put(tmp_path, stranger())
        held.claim.check()

    with pytest.raises(OutputError, match="took this run over"):
        write_json(tmp_path / "a.json", {}, check)
    assert names(tmp_path) == ["lock.json"]
    held.release()


def test_a_lock_that_cannot_be_written(
    tmp_path: Path, files_of_at_most: Callable[[int], AbstractContextManager[None]]
) -> None:
    """It leaves no empty file that others would wait for; a run says what is wrong with its directory."""
    with files_of_at_most(0), pytest.raises(OSError, match="File too large"):
        Lock(tmp_path)
    assert names(tmp_path) == []
    with files_of_at_most(0), pytest.raises(OutputError) as caught:
        DirectorySink(tmp_path, "parquet", TableOptions())
    assert str(caught.value) == f"{tmp_path}: cannot be written: File too large"
    assert names(tmp_path) == []


def test_a_lock_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only directory: giving the lock back is silent, taking it is an error that names the directory."""

    def read_only(*_: Any) -> int:
        raise OSError(30, "Read-only file system")

    held = Lock(tmp_path)
    monkeypatch.setattr(os, "link", read_only)
    held.release()
    assert names(tmp_path) == ["lock.json"]
    with pytest.raises(OutputError) as caught:
        DirectorySink(tmp_path, "parquet", TableOptions())
    assert str(caught.value) == f"{tmp_path}: cannot be written: Read-only file system"


# ---------------------------------------------------------------------------------------------------------------------
# Many at once


def test_one_alone_removes_a_dead_holder_s_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another that comes in the moment before the removal is refused, so its own new lock is not what is removed."""
    put(tmp_path, stranger(), age=3600)
    unlink = os.unlink
    said: list[str] = []

    def late(path: Any, **more: Any) -> None:
        if Path(path).name == lock.NAME and not said:
            said.append("this moment")
            said.append(refusal(tmp_path))
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", late)
    assert_free(tmp_path)
    host = Holder.this().host
    assert said[1:] == [
        f"{tmp_path}: process {os.getpid()} on {host} is writing it; wait for its end, or choose another -o"
    ]


def test_a_guard_whose_holder_died(tmp_path: Path) -> None:
    """Who was killed while it removed a dead holder's lock keeps nobody from doing so, and who removed that neither."""
    dead = replace(Holder.this(), started=1)
    before = put(tmp_path, stranger(), age=3600)
    for token in ("first", "second"):
        digest = hashlib.sha256(before.read_bytes()).hexdigest()[:16]
        guard = put(tmp_path, replace(dead, token=token)).rename(tmp_path / f".lock.json.{digest}.tmp")
        before = guard
    put(tmp_path, stranger(), age=3600)
    assert len(names(tmp_path)) == 3
    assert_free(tmp_path)


#: Processes that take, hold, give back, and die with or while taking the lock; prints how often each came about.
RACE = """
import os, random, sys, time
from pathlib import Path
from medner import lock
from medner.errors import OutputError

directory, workers, rounds, stale = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "stale"
marker = directory / "marker"
taking = False

def dies(name, left):
    original = getattr(os, name)
    def call(*rest, **more):
        nonlocal left
        left -= 1
        if taking and left < 0:
            os._exit(3)
        return original(*rest, **more)
    setattr(os, name, call)

def attempt(chance):
    global taking
    if stale and chance.random() < 0.3:
        taking = True
        dies("open", chance.randrange(8))
        dies("unlink", chance.randrange(4))
    try:
        held = lock.Lock(directory)
    except OutputError:
        return 2
    taking = False
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return 9
    time.sleep(chance.random() / 1000)
    held.claim.check()
    os.unlink(marker)
    if stale and chance.random() < 0.5:
        return 1
    held.release()
    return 0

def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def fork(work):
    process = os.fork()
    if not process:
        code = 8
        try:
            code = work()
        finally:
            os._exit(code)
    return process

read, write = os.pipe()
def work(seed):
    chance = random.Random(seed)
    for _ in range(rounds):
        once = random.Random(chance.random())
        os.write(write, bytes([ended(fork(lambda: attempt(once)))]))
    return 0

processes = [fork(lambda: work(seed)) for seed in range(workers)]
assert not any(map(ended, processes))
codes = list(os.read(read, workers * rounds))
assert len(codes) == workers * rounds
print(*(codes.count(code) for code in range(10)))
"""


@pytest.mark.parametrize("kind", ["stale", "absent"])
def test_there_are_never_two_holders(tmp_path: Path, kind: str) -> None:
    """Eight processes at one lock, many times over; if stale, half of the holders die, and some that try to take it."""
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path), "8", "30", kind], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    released, died_holding, refused, died_taking, *wrong = map(int, done.stdout.split())
    assert wrong == [0] * 6
    assert released + died_holding + refused + died_taking == 240
    assert released > 0
    assert refused > 0
    assert (died_holding > 0, died_taking > 0) == (kind == "stale",) * 2
    assert "marker" not in names(tmp_path)


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the lock file is created openly; it excludes and is given back as elsewhere."""

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    held = Lock(tmp_path)
    assert names(tmp_path) == ["lock.json"]
    with pytest.raises(OutputError):
        Lock(tmp_path)
    held.claim.check()
    held.release()
    assert names(tmp_path) == []
