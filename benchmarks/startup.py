"""Start-up: seconds from the start of ``medner annotate`` to the first record with a span on standard output.

    python benchmarks/startup.py [--rounds 9]

One run reads the ten example notes, one the whole of ACI-BENCH: a stream hands out its first records once the first
job is done, which takes longer where many notes wait. ``medner --help`` shows what the program costs without a model.
The files are warm in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import patients
import report

#: Seconds from process start to the first span, in every case that has spans.
TARGET = 1.5

MEDNER = Path(sys.executable).with_name("medner")
EXAMPLES = common.ROOT / "examples" / "notes.jsonl"


def first_span_seconds(command: Sequence[str | Path]) -> float:
    """Seconds from process start until a JSON record with a span can be read; RuntimeError where none comes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    with process, process.stdout:
        for line in process.stdout:
            if json.loads(line)["spans"]:
                seconds = time.perf_counter() - start
                process.terminate()
                return seconds
    raise RuntimeError(f"{command[0]} gave exit code {process.returncode} and no span")


def measure(model: str, notes: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Every case once a round, in turn. notes: a file by the name of its case."""
    times: dict[str, list[float]] = {name: [] for name in (*notes, "--help")}
    for number in range(rounds):
        for name, path in notes.items():
            times[name].append(first_span_seconds([MEDNER, "annotate", path, "-o", "-", "--model", model, "--quiet"]))
        times["--help"].append(common.timed([MEDNER, "--help"]).seconds)
        common.say(f"round {number + 1} of {rounds}: " + ", ".join(f"{key} {v[-1]:.2f} s" for key, v in times.items()))
    return {
        "bundle": model,
        "rounds": rounds,
        "target": TARGET,
        "seconds": times,
        "first_span": {name: statistics.median(times[name]) for name in notes},
        "help": statistics.median(times["--help"]),
    }


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "## Start-up",
        "",
        f"From process start to the first span on standard output, {result['bundle']} bundle, median of "
        f"{result['rounds']} runs; {report.described(result)}.",
        "",
        "| what | seconds | lowest to highest | target |",
        "|---|---|---|---|",
    ]
    for name, seconds in result["first_span"].items():
        met = report.verdict(seconds < result["target"])
        lines.append(
            _row(f"{name}, first span", seconds, result["seconds"][name], f"under {result['target']} s: {met}")
        )
    lines.append(_row("`medner --help`", result["help"], result["seconds"]["--help"], ""))
    return "\n".join(lines) + "\n"


def _row(name: str, median: float, times: Sequence[float], target: str) -> str:
    return f"| {name} | {median:.2f} | {min(times):.2f} to {max(times):.2f} | {target} |"


def main() -> None:
    """Measure, write ``results/startup.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    notes = {"ten example notes": EXAMPLES, "ACI-BENCH": patients.ACI_BENCH}
    path = common.write("startup", measure(given.bundle, notes, given.rounds))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
