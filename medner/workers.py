"""Who annotates the parts of a run: this process, or one process for each of several devices.

Each process of several has an :class:`Annotator` of its own. It gets whole parts from the process that reads, and
annotates, writes and commits them; that one holds the lock and counts. What is written is the same in both ways.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any, Protocol

import pyarrow as pa

from medner.annotate import Annotator, Options
from medner.bundle import Bundle
from medner.errors import DeviceError, MednerError, defect
from medner.runtime import available_cpus
from medner.sinks import DirectorySink, PartWriter, Sink
from medner.tally import Tally, timed

#: Seconds that a process has to end by itself once it is told to.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What really runs.

    batch_tokens and threads are those of each process; min_score: spans below it are left out; notice: a line for a
    person, or empty.
    """

    precision: str
    device: str
    provider: str
    threads: int
    batch_tokens: int
    min_score: float
    notice: str

    @classmethod
    def of(cls, annotator: Annotator) -> Facts:
        """Of an open annotator."""
        session = annotator.session
        assert session is not None
        return cls(
            annotator.precision,
            session.device,
            session.provider,
            annotator.threads,
            annotator.batch_tokens,
            annotator.min_score,
            annotator.notice,
        )


class _Writer(Protocol):
    """A sink, or the part of one that another process has."""

    def write(self, part: int, batches: Iterable[pa.RecordBatch], /) -> Any:
        """Take a part's annotated batches."""


def write_part(
    annotator: Annotator,
    writer: _Writer,
    part: int,
    batches: Iterable[pa.RecordBatch],
    tally: Tally,
    show: Callable[[], None] = lambda: None,
) -> Any:
    """Annotate a part, write it, and count it; ``show`` is called after each batch. Returns what the writer does."""
    waited = 0.0

    def wait_for(seconds: float) -> None:
        nonlocal waited
        waited += seconds

    before = replace(annotator.counts)
    start = perf_counter()
    result = writer.write(part, timed(_counted(annotator.stream(batches), tally, show), wait_for))
    done, stages = annotator.counts, tally.stages
    stages.writing += perf_counter() - start - waited
    stages.tokenizing += done.tokenizing - before.tokenizing
    stages.inferring += done.inferring - before.inferring
    stages.decoding += done.decoding - before.decoding
    tally.windows_inferred += done.inferred - before.inferred
    tally.windows_reused += done.reused - before.reused
    tally.parts += 1
    return result


def _counted(batches: Iterable[pa.RecordBatch], tally: Tally, show: Callable[[], None]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        tally.add(batch)
        yield batch
        show()


class Alone:
    """This process annotates."""

    def __init__(self, model: str, options: Options) -> None:
        """Load the model; raises as :meth:`Annotator.load`."""
        self._annotator = Annotator.load(model, options)
        self.bundle = self._annotator.bundle
        self.facts = Facts.of(self._annotator)

    def write(
        self, sink: Sink, part: int, batches: Iterable[pa.RecordBatch], tally: Tally, show: Callable[[], None]
    ) -> None:
        """Annotate one part into a sink."""
        write_part(self._annotator, sink, part, batches, tally, show)

    def wait(self, sink: Sink, tally: Tally, show: Callable[[], None]) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is to be let go."""


class Crew:
    """A process for each device; each has one part at a time."""

    def __init__(self, model: str, options: Options, devices: Sequence[str]) -> None:
        """Start them and load the model in each; raises as :meth:`Annotator.load`.

        All get the smallest of the budgets that they find, so that a batch has the same shape on each.
        """
        self._all: list[_Process] = []
        self._idle: list[_Process] = []
        self._busy: dict[Connection, _Process] = {}
        share = max(1, available_cpus() // len(devices))
        # Started by the first process otherwise, which would then have its signals back.
        resource_tracker.ensure_running()
        try:
            for device in devices:
                self._all.append(_Process(model, replace(options, device=device), share))
            opened = [process.receive() for process in self._all]
            self.bundle = opened[0].bundle
            tokens = min(each.facts.batch_tokens for each in opened)
            for process in self._all:
                process.send(tokens)
            self._idle = list(self._all)
        except BaseException:
            self.close()
            raise
        numbers = ",".join(device.partition(":")[2] for device in devices)
        self.facts = replace(opened[0].facts, device=f"{devices[0].partition(':')[0]}:{numbers}", batch_tokens=tokens)

    def write(
        self, sink: Sink, part: int, batches: Iterable[pa.RecordBatch], tally: Tally, show: Callable[[], None]
    ) -> None:
        """Hand one part of a run directory to a process that has none, after waiting for one."""
        assert isinstance(sink, DirectorySink)
        read = _packed(batches)
        if not self._idle:
            self._collect(sink, tally, show)
        process = self._idle.pop(0)
        self._busy[process.connection] = process
        process.send((sink.parts, part), read)

    def wait(self, sink: Sink, tally: Tally, show: Callable[[], None]) -> None:
        """Wait until every part is committed."""
        assert isinstance(sink, DirectorySink)
        while self._busy:
            self._collect(sink, tally, show)

    def _collect(self, sink: DirectorySink, tally: Tally, show: Callable[[], None]) -> None:
        """Take what at least one process has to say."""
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            process = self._busy[connection]
            done = process.receive()
            del self._busy[connection]
            self._idle.append(process)
            sink.committed(done.files)
            tally.merge(done.tally)
            show()

    def close(self) -> None:
        """End all processes; parts that are not committed are not kept."""
        for process in self._all:
            process.stop()
        for process in self._all:
            process.join()


def _packed(batches: Iterable[pa.RecordBatch]) -> pa.Buffer:
    """Batches as an Arrow stream, which is empty where there are none."""
    stream = pa.BufferOutputStream()
    writer: Any = None
    for batch in batches:
        writer = writer or pa.ipc.new_stream(stream, batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
    return stream.getvalue()


def _unpacked(packed: bytes) -> Iterator[pa.RecordBatch]:
    return iter(pa.ipc.open_stream(packed)) if packed else iter(())


# ---------------------------------------------------------------------------------------------------------------------
# Between the processes


@dataclass(frozen=True, slots=True)
class _Opened:
    """A process has loaded its model."""

    facts: Facts
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class _Done:
    """A part is committed; files: as :meth:`PartWriter.write` names them."""

    files: dict[str, str]
    tally: Tally


class _Process:
    """The other end of a process."""

    def __init__(self, model: str, options: Options, cpus: int) -> None:
        # Not a fork: neither CUDA nor onnxruntime's threads outlive one.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._device = options.device
        self._process = context.Process(target=_work, args=(theirs, model, options, cpus), daemon=True)
        with _quiet_start():
            self._process.start()
        theirs.close()

    def send(self, message: object, data: pa.Buffer | None = None) -> None:
        """Send a message, and bytes behind it. That nobody listens is seen when an answer is waited for."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)
            if data is not None:
                self.connection.send_bytes(data)

    def receive(self) -> Any:
        """Its next answer. Raises what it failed with, and :class:`DeviceError` where it is gone."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            # A signal to stop reaches all processes of a job: this one's comes before a complaint about the others.
            self._process.join(_GRACE_SECONDS)
            code = self._process.exitcode
            ended = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise DeviceError(
                f"--device {self._device}: its process {ended}; is there enough memory? --resume goes on"
            ) from None
        if isinstance(answer, MednerError):
            raise answer
        return answer

    def stop(self) -> None:
        """Ask it to end."""
        self.connection.close()
        self._process.terminate()

    def join(self) -> None:
        """Wait for its end."""
        self._process.join(_GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Start a process with signals blocked, or else it would say where Ctrl-C stopped it before it can ignore that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, model: str, options: Options, cpus: int) -> None:
    """Annotate parts until there are no more. An error is an answer, without a note's text."""
    # Ctrl-C in a terminal is for the process that reads, which then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending = _Ending()
    signal.signal(signal.SIGTERM, ending)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("RAYON_NUM_THREADS", str(cpus))  # tokenizers' threads, started with the first text
    # Where the process that reads is gone, nobody wants an answer.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            annotator = Annotator.load(model, options)
            connection.send(_Opened(Facts.of(annotator), annotator.bundle))
            annotator.use_budget(connection.recv())
            while True:
                writer, part = connection.recv()
                connection.send(_write(annotator, writer, part, connection.recv_bytes()))
        except MednerError as exc:
            connection.send(exc)
        except (EOFError, BrokenPipeError, ConnectionResetError, SystemExit):
            raise
        except BaseException as exc:  # a defect, or a panic of Rust code; the message might hold note text
            if os.environ.get("MEDNER_DEBUG"):
                traceback.print_exc()
            connection.send(MednerError(f"--device {options.device}: {defect(exc)}"))
    # It ends by itself from here on; a signal to end now would be complained of by what Python does at exit.
    ending.begun = True


class _Ending:
    """Handler that ends the process, once: a second exit would leave threads in onnxruntime behind.

    A signal may reach this process twice, or as it ends by itself. To ignore signals from then on would be a race:
    Python complains of one that comes while its handler is replaced ("ignored due to race condition").
    """

    begun = False

    def __call__(self, *_: object) -> None:
        if not self.begun:
            self.begun = True
            sys.exit(0)


def _end_with_parent() -> None:
    """End at once, with whatever is under way, when the process that reads is gone: the next run need not wait."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(annotator: Annotator, writer: PartWriter, part: int, packed: bytes) -> _Done:
    tally = Tally()
    return _Done(write_part(annotator, writer, part, _unpacked(packed), tally), tally)
