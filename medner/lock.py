"""One writer for one run directory: a file that names its holder and shows that the holder lives.

Run directories lie on network file systems, where advisory locks are often not shared and clocks differ. So the lock
rests on what holds there, too: a file is created once, and ages are read from one file server alone. A holder beats by
touching its file. Of a holder under this kernel the process table tells at once whether it lives; any other is judged
by its heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from medner.errors import OutputError

NAME = "lock.json"

#: Seconds between two heartbeats, and without one after which a holder counts as gone.
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0

_POLL_SECONDS = 0.5
_PROC = Path("/proc")
_GONE = -1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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
        boot = space = ""
        with contextlib.suppress(OSError):
            # A process table of another namespace tells nothing about this one.
            if str((_PROC / "self").readlink()) == str(process):
                boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
                space = str((_PROC / "self/ns/pid").readlink())
        return cls(socket.gethostname(), boot, space, process, _started(process), secrets.token_hex(8))

    def lives(self, observer: Holder) -> bool | None:
        """Whether the process is there; None where the observer is of another kernel or namespace and cannot tell."""
        if not (self.boot and self.space) or (self.boot, self.space) != (observer.boot, observer.space):
            return None
        started = _started(self.process)
        return None if started is None or self.started is None else started == self.started


def _started(process: int) -> int | None:
    """When a process started; :data:`_GONE` if there is none or only its remains, None where that is hidden."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return _GONE
    except PermissionError:
        pass  # another user's, whose entry in the process table may be hidden
    try:
        # The name, which stands in brackets, may hold anything.
        fields = (_PROC / str(process) / "stat").read_bytes().rpartition(b")")[2].split()
        return _GONE if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A lock file as it was found: its content, and what changes with each heartbeat."""

    content: bytes
    beat: tuple[int, int]

    @property
    def holder(self) -> Holder | None:
        """None where the content cannot be read, as in the moment before it is written."""
        try:
            holder = Holder(**orjson.loads(self.content))
        except (ValueError, TypeError):
            return None
        return holder if isinstance(holder.process, int) and holder.process > 0 else None

    def __str__(self) -> str:
        holder = self.holder
        if holder is None:
            return "another process"
        host = str(holder.host)
        return f"process {holder.process} on {host if host.isprintable() else ascii(host)}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a process that writes for a lock's holder has of it; it can be pickled."""

    directory: Path
    holder: Holder

    def check(self) -> None:
        """Raise :class:`OutputError` if the lock is another's by now, as after a long sleep of this process."""
        seen = _look(self.directory / NAME)
        if seen is None:
            raise OutputError(f"{self.directory}: its {NAME} is gone, so another may write it; this process stops")
        if seen.holder != self.holder:
            raise OutputError(f"{self.directory}: {seen} took this run over; this process stops")


class Lock:
    """A held lock; :meth:`release` gives it back. claim: for those who write while it is held.

    A file is removed only under a guard, a lock of its own that is named after the content to be removed, and only if
    it is still as it was. So of several processes that find a dead holder one removes its file, and none a successor's.
    """

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock of a directory that exists.

        Raises :class:`OutputError` where a living process has it. Waits up to :data:`SILENT_SECONDS` for a sign of life
        of a holder that cannot be seen from here, after saying so. Errors of the operating system pass through.
        """
        self._directory = directory
        self._path = directory / NAME
        self._say = say
        self._me = Holder.this()
        self.claim = Claim(directory, self._me)
        self._take(self._path)
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="medner-lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Remove the lock, if it is still this process's. One that cannot be removed is a dead process's soon."""
        self._stop.set()
        self._beating.join()
        with contextlib.suppress(OSError, OutputError):
            seen = _look(self._path)
            if seen is not None and seen.holder == self._me:
                self._remove(self._path, seen)

    def _take(self, path: Path) -> None:
        """Create a lock file, once there is none or its holder is gone."""
        first: _Seen | None = None
        since = time.monotonic()
        said = False
        while not self._create(path):
            seen = _look(path)
            if seen is None:
                if path.is_symlink():
                    raise OutputError(f"{path}: a link to nothing; remove it")
                continue  # it was given back this moment
            lives = None if seen.holder is None else seen.holder.lives(self._me)
            if lives is None and first is not None and seen != first:
                lives = True
            if lives is None and (self._is_silent(seen) or time.monotonic() - since > SILENT_SECONDS):
                lives = False
            if lives:
                raise OutputError(f"{self._directory}: {seen} is writing it; wait for its end, or choose another -o")
            if lives is None:
                if first is not None and not said:
                    self._say(
                        f"{self._directory}: {seen} was writing it; "
                        f"waiting up to {SILENT_SECONDS:.0f} s for a sign of life"
                    )
                    said = True
                first = seen
                time.sleep(_POLL_SECONDS)
            else:
                self._remove(path, seen)

    def _create(self, path: Path) -> bool:
        """Make a lock file, at once with its content: a process that is killed leaves none that names nobody."""
        # A guard has a token of its own. Or else the guard of this process's lock would be its own guard.
        holder = self._me if path == self._path else replace(self._me, token=secrets.token_hex(8))
        content = orjson.dumps(asdict(holder)) + b"\n"
        draft = self._hidden(holder.token)
        try:
            draft.write_bytes(content)
            os.link(draft, path)
        except (FileExistsError, FileNotFoundError):  # it is held; or its new holder cleared this draft away
            return False
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            return _create_openly(path, content)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _remove(self, path: Path, seen: _Seen) -> None:
        """Remove a lock file, unless it is no longer as it was seen."""
        guard = self._hidden(hashlib.sha256(seen.content).hexdigest()[:16])
        self._take(guard)
        try:
            if _look(path) == seen:
                path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _is_silent(self, seen: _Seen) -> bool:
        """Whether the last heartbeat is long ago, by the clock that dates the files of this directory."""
        probe = self._hidden(self._me.token)
        try:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.utime(descriptor)
                now = os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
                probe.unlink(missing_ok=True)
        except OSError:  # such as a full disk, or a new holder that cleared up
            return False
        return now - seen.beat[1] > SILENT_SECONDS * 1e9

    def _hidden(self, name: str) -> Path:
        return self._directory / f".{NAME}.{name}.tmp"

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self.claim.check()
                os.utime(self._path)
            except OutputError:
                return
            except OSError:
                continue  # a file server that does not answer now may do so at the next beat


def _create_openly(path: Path, content: bytes) -> bool:
    """As by a link, where the file system has none; a reader may see the file without its content for a moment."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _look(path: Path) -> _Seen | None:
    """The lock file as it is now; None if there is none."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return _Seen(file.read(2**16), (status.st_ino, status.st_mtime_ns))
    except FileNotFoundError:
        return None
