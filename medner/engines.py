"""Engines that ``medner compare`` times: PyTorch or onnxruntime in a precision, each in a process of its own.

The process (``python -m medner.engines``) takes a request a line on its standard input and gives an answer a line on
its standard output, both JSON, so that its start-up time and its peak memory are the engine's alone.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson
import pyarrow as pa

from medner import bundle as bundles
from medner import errors
from medner.annotate import Annotator, Model, Options
from medner.errors import MednerError
from medner.pytorch import TorchModel

#: Characters of the first notes that an engine reads before its time counts.
_WARM_CHARS = 4_000


@dataclass(frozen=True, slots=True)
class Engine:
    """What is timed. family: ``pytorch`` or ``onnx``; device: ``cpu`` or ``cuda:N``; paths as for their loaders.

    Both families get the windows of the bundle.
    """

    family: str
    precision: str
    checkpoint: str
    bundle: str
    device: str

    @property
    def name(self) -> str:
        """As tables show it, such as ``onnx int8``."""
        return f"{self.family} {self.precision}"


@dataclass(frozen=True, slots=True)
class Setting:
    """How an engine spreads its work: padded tokens of a call at most, calls at a time, and CPU threads of each."""

    batch_tokens: int
    calls: int
    threads_per_call: int

    def __str__(self) -> str:
        """As tables show it, such as ``512 tokens, 2 x 1``."""
        return f"{self.batch_tokens:,} tokens, {self.calls} x {self.threads_per_call}"


@dataclass(frozen=True, slots=True)
class Rate:
    """Speed over a stream of notes; tokens without special ones."""

    notes_per_second: float
    tokens_per_second: float


def settings(family: str, threads: int, budgets: Sequence[int]) -> list[Setting]:
    """The settings among which an engine's best is looked for.

    onnxruntime's sessions run each call on one thread; PyTorch may also give all threads to one call.
    """
    spread = [(threads, 1)] if family == "onnx" else list(dict.fromkeys([(1, threads), (threads, 1)]))
    return [Setting(budget, calls, each) for calls, each in spread for budget in budgets]


def load(engine: Engine) -> tuple[bundles.Bundle, Model]:
    """The bundle that cuts the windows, and the engine's model. Raises a :class:`MednerError`."""
    if engine.family == "pytorch":
        return bundles.load(engine.bundle), TorchModel(engine.checkpoint, engine.precision, engine.device)
    opened = Annotator.load(engine.bundle, Options(precision=engine.precision, device=engine.device))
    assert opened.session is not None
    return opened.bundle, opened.session


class Bench:
    """An engine at work, inside its process."""

    def __init__(self, engine: Engine) -> None:
        """Load the model; raises a :class:`MednerError`."""
        self._engine = engine
        self._bundle, self._model = load(engine)
        self._texts: list[str] = []
        self._sample: list[str] = []

    def take(self, texts: list[str], sample: list[str]) -> None:
        """Take the notes of the stream, and those that are annotated one by one."""
        self._texts, self._sample = texts, sample

    def throughput(self, setting: Setting, seconds: float) -> Rate:
        """Stream the notes, over and over until ``seconds`` are up, and give the median pass."""
        annotator = self._annotator(setting)
        self._warm(annotator)
        batch = pa.record_batch({"text": pa.array(self._texts, pa.large_string())})
        times: list[float] = []
        while not times or sum(times) < seconds:
            start = time.perf_counter()
            annotated = annotator(batch)
            times.append(time.perf_counter() - start)
        typical = statistics.median(times)
        return Rate(len(self._texts) / typical, int(annotated.column("n_tokens").to_numpy().sum()) / typical)

    def latencies(self, setting: Setting, notes: int) -> list[float]:
        """Seconds from text to spans for each of the first notes of the sample, one at a time."""
        annotator = self._annotator(setting)
        self._warm(annotator)
        times: list[float] = []
        for text in self._sample[:notes]:
            start = time.perf_counter()
            annotator(text)
            times.append(time.perf_counter() - start)
        return times

    def peak_bytes(self) -> int:
        """The largest resident memory of this process so far."""
        with contextlib.suppress(OSError):
            # Not ru_maxrss where this can be had: that one begins with the memory of the process that started us.
            for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _annotator(self, setting: Setting) -> Annotator:
        if isinstance(self._model, TorchModel):
            self._model.use_threads(setting.threads_per_call)
        options = Options(threads=setting.calls, batch_tokens=setting.batch_tokens, reuse=False)
        return Annotator(self._bundle, self._model, options, precision=self._engine.precision)

    def _warm(self, annotator: Annotator) -> None:
        """Let allocators and kernels see the first notes before any time counts."""
        read = 0
        for text in self._texts:
            annotator(text)
            read += len(text)
            if read >= _WARM_CHARS:
                return


# ---------------------------------------------------------------------------------------------------------------------
# Between the processes


class Process:
    """A :class:`Bench` in a process of its own, with the same methods. A context manager: it ends with the block."""

    #: Seconds from the start of the process until its model was loaded.
    load_seconds: float

    def __init__(self, engine: Engine) -> None:
        """Start the process and load the model; raises a :class:`MednerError`."""
        self._engine = engine
        quiet = None if os.environ.get("MEDNER_DEBUG") else subprocess.DEVNULL
        start = time.perf_counter()
        # -P: a file in the current directory must not be taken for a package.
        command = [sys.executable, "-P", "-m", "medner.engines"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet)
        try:
            self._ask("load", **asdict(engine))
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    def take(self, texts: Sequence[str], sample: Sequence[str]) -> None:
        """See :meth:`Bench.take`."""
        self._ask("take", texts=texts, sample=sample)

    def throughput(self, setting: Setting, seconds: float) -> Rate:
        """See :meth:`Bench.throughput`."""
        return Rate(**self._ask("throughput", setting=asdict(setting), seconds=seconds))

    def latencies(self, setting: Setting, notes: int) -> list[float]:
        """See :meth:`Bench.latencies`."""
        return [float(value) for value in self._ask("latencies", setting=asdict(setting), notes=notes)]

    def peak_bytes(self) -> int:
        """See :meth:`Bench.peak_bytes`."""
        return int(self._ask("peak_bytes"))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says so
            self._process.stdin.write(orjson.dumps({"method": method, "arguments": arguments}) + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise MednerError(
                f"{self._engine.name}: its process ended with code {code}; is there enough memory? "
                "MEDNER_DEBUG=1 shows what it said"
            )
        answer = orjson.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer["value"]


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more. An error is answered, too, and ends nothing."""
    bench: Bench | None = None
    for line in requests:
        request = orjson.loads(line)
        arguments = request["arguments"]
        answer: dict[str, Any]
        try:
            if bench is None:
                bench = Bench(Engine(**arguments))
                answer = {"value": None}
            else:
                if "setting" in arguments:
                    arguments["setting"] = Setting(**arguments["setting"])
                answer = {"value": getattr(bench, request["method"])(**arguments)}
        except MednerError as exc:
            answer = {"error": type(exc).__name__, "message": str(exc)}
        except Exception as exc:  # its message might hold note text, its type does not
            said = f"internal error of an engine: {type(exc).__name__} in {request['method']}"
            answer = {"error": "MednerError", "message": f"{said}; MEDNER_DEBUG=1 shows the traceback"}
            if os.environ.get("MEDNER_DEBUG"):
                raise
        answers.write(orjson.dumps(answer) + b"\n")
        answers.flush()


def main() -> None:
    """Serve on the standard streams; what libraries print goes to standard error, not between the answers."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
