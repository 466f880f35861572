"""What the benchmarks share: the machine's name, whole processes timed in turn, rates as slopes, results as JSON."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from medner import compare

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
#: Between two looks at a process that runs.
WATCH_SECONDS = 0.25
#: Real notes; see README.
DATA = Path(os.environ.get("MEDNER_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True, slots=True)
class Run:
    """One whole process: seconds of wall clock and of processor (user and system), peak resident memory in MiB."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def timed(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Run:
    """Run a command to its end; raises RuntimeError with what it said on standard error where it fails.

    watch: called with the process's id every :data:`WATCH_SECONDS` while it runs.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **(env or {})},
        )
        # WNOWAIT leaves the end to be collected below, where it comes with what the process used.
        while watch and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            watch(process.pid)
            time.sleep(WATCH_SECONDS)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{command[0]} gave exit code {process.returncode}: {said}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def interleaved(contenders: Mapping[str, Callable[[int], Run]], sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Let contenders take turns: in every round each one runs once at every size.

    contenders: by name, a function that runs one at a size. Returns ``{name: {size: [run, ...]}}``, as plain values.
    Shared machines drift, so only what stands in one round is compared; see :func:`rates` and :func:`ratios`.
    """
    runs: dict[str, Any] = {name: {str(size): [] for size in sizes} for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            for size in sizes:
                result = run(size)
                runs[name][str(size)].append(asdict(result))
                say(f"round {number + 1} of {rounds}: {name}, size {size}: {result.seconds:.2f} s")
    return runs


def rates(runs: Mapping[str, Sequence[Mapping[str, float]]], notes: Mapping[str, int]) -> list[float]:
    """Notes per second in each round, start-up left out: the slope between the smallest and the largest size.

    runs: ``{size: [run, ...]}`` of one contender; notes: how many notes each size has.
    """
    small, large = min(runs, key=lambda size: notes[size]), max(runs, key=lambda size: notes[size])
    return [
        (notes[large] - notes[small]) / (after["seconds"] - before["seconds"])
        for before, after in zip(runs[small], runs[large], strict=True)
    ]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times faster: the median of the rounds' own ratios, with the lowest and the highest."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Write one benchmark's result, with the machine and the date, as ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": compare.machine("cpu"), **result}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def every_kth(items: Sequence[T], n: int | None) -> list[T]:
    """``n`` of the items, evenly spread; all of them for None. Raises ValueError where there are fewer."""
    if n is None:
        return list(items)
    if not 0 < n <= len(items):
        raise ValueError(f"{n} of {len(items)} items")
    return [items[i * len(items) // n] for i in range(n)]


def say(line: str) -> None:
    """A line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)
