"""One writer for one run directory: a file that names its holder and shows that the holder lives.

Run directories lie on network file systems, where advisory locks are often not shared and clocks differ. So the lock
rests on what holds there, too: a file is created once, a rename takes it away once, and ages are read from one file
server alone. A holder beats by touching its file. Of a holder under this kernel the process table tells at once
whether it lives; any other is judged by its heartbeat.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from medner.errors import OutputError

NAME = "lock.json"

#: Seconds between two heartbeats, and without one after which a holder counts as gone.
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0

_POLL_SECONDS = 0.5
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock.

    boot and space: the kernel's run and its process namespace, within which ``process`` and ``started`` (clock ticks
    after boot) name one process for ever; empty or None where the system does not tell. token: drawn for each lock.
    """

    host: str
    boot: str
    space: str
    process: int
    started: int | None
    token: str

    @classmethod
    def this(cls) -> Holder:
        """The calling process, with a new token."""
        process = os.getpid()
        try:
            boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            space = str((_PROC / "self/ns/pid").readlink())
        except OSError:
            boot = space = ""
        return cls(socket.gethostname(), boot, space, process, _started(process), secrets.token_hex(8))

    def lives(self, observer: Holder) -> bool | None:
        """Whether the process is there; None where the observer is of another kernel or namespace and cannot tell."""
        if not self.boot or (self.boot, self.space) != (observer.boot, observer.space):
            return None
        return self.started is not None and _started(self.process) == self.started


def _started(process: int) -> int | None:
    """When a process started; None if there is none, or only its remains."""
    try:
        # The name, which stands in brackets, may hold anything.
        fields = (
            (_PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A lock file as it was found: its holder, None where it cannot be read, and what changes with each heartbeat."""

    holder: Holder | None
    beat: tuple[int, int]


class Lock:
    """A held lock; :meth:`release` gives it back."""

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock of a directory that exists.

        Raises :class:`OutputError` where a living process has it. Waits up to :data:`SILENT_SECONDS` for a sign of life
        of a holder that cannot be seen from here, after saying so. Errors of the operating system pass through.
        """
        self._directory = directory
        self._path = directory / NAME
        self._me = Holder.this()
        self._take(say)
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="medner-lock", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raise :class:`OutputError` if another process has taken the lock, as after a long sleep of this one."""
        seen = _look(self._path)
        if seen is None or seen.holder is None or seen.holder.token != self._me.token:
            raise OutputError(f"{self._directory}: {_who(seen)} took this run over; this process stops")

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        self._stop.set()
        self._beating.join()
        with contextlib.suppress(OSError, OutputError):
            self.check()
            self._path.unlink()

    def _take(self, say: Callable[[str], None]) -> None:
        watched: _Seen | None = None
        since = time.monotonic()
        while not self._create():
            seen = _look(self._path)
            if seen is None:
                continue  # it was given back this moment
            lives = seen.holder.lives(self._me) if seen.holder is not None else None
            if lives is None:
                if watched is not None and seen != watched:
                    lives = True
                elif self._is_silent(seen) or time.monotonic() - since > SILENT_SECONDS:
                    lives = False
                elif watched is None:
                    watched = seen
                    say(
                        f"{self._directory}: {_who(seen)} was writing it; "
                        f"waiting up to {SILENT_SECONDS:.0f} s for a sign of life"
                    )
            if lives:
                raise OutputError(
                    f"{self._directory}: {_who(seen)} is writing it; wait for its end, or choose another -o"
                )
            if lives is None:
                time.sleep(_POLL_SECONDS)
            else:
                self._remove(seen)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(orjson.dumps(asdict(self._me)) + b"\n")
        except OSError:  # a full disk
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _is_silent(self, seen: _Seen) -> bool:
        """Whether the last heartbeat is long ago, by the clock that dates the files of this directory."""
        probe = self._directory / f".{NAME}.{self._me.token}.tmp"
        try:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
            os.utime(probe)
            now = probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)
        return now - seen.beat[1] > SILENT_SECONDS * 1e9

    def _remove(self, dead: _Seen) -> None:
        """Take a dead holder's lock away. Of several that try, the rename lets one win."""
        aside = self._directory / f".{NAME}.{self._me.token}.tmp"
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        moved = _look(aside)
        if moved is not None and moved.holder != dead.holder:
            # Another was quicker, and this is its new lock. If a third has one by now, `check` tells the other.
            with contextlib.suppress(OSError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # A file server that does not answer now may do so at the next beat.
            with contextlib.suppress(OSError, OutputError):
                self.check()
                os.utime(self._path)


def _look(path: Path) -> _Seen | None:
    """The lock file as it is now; None if there is none."""
    try:
        with path.open("rb") as file:
            status, content = os.fstat(file.fileno()), file.read(2**16)
    except FileNotFoundError:
        return None
    return _Seen(_holder(content), (status.st_ino, status.st_mtime_ns))


def _holder(content: bytes) -> Holder | None:
    try:
        fields: Any = orjson.loads(content)
        return Holder(**fields)
    except (ValueError, TypeError):
        return None


def _who(seen: _Seen | None) -> str:
    return f"process {seen.holder.process} on {seen.holder.host}" if seen and seen.holder else "another process"
