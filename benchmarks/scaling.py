"""Scaling: notes a second and peak memory at 1, 10 and 100 times the corpus.

    python benchmarks/scaling.py [--sizes 1 10 100] [--unit 207] [--rounds 1]

The corpus is every ACI-BENCH note and every distinct text of MTSamples in an order drawn once, so that any part of it
is the same mixture; ``1x`` is 207 notes. Beyond its 2,564 notes it comes again with other digits, pass after pass.
Medner runs as users run it: the default bundle, reuse on. Where the corpus comes again, sentences without digits are
reused, so the rate rises with the size, and the reused share is given beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import patients
import report

#: Peak memory at the largest size, against the one before it, and in MiB.
TARGET_GROWTH = 1.10
TARGET_MIB = 1024

SIZES = (1, 10, 100)
#: Notes of 1x: as many as ACI-BENCH has.
UNIT = 207
SEED = 13

MEDNER = Path(sys.executable).with_name("medner")

_DIGIT = re.compile(r"[0-9]")


def with_other_digits(text: str, rng: random.Random) -> str:
    """The text with every ASCII digit drawn anew; no position moves."""
    return _DIGIT.sub(lambda _: rng.choice("0123456789"), text)


def corpus(
    texts: Sequence[str],
    n: int,
    seed: int = SEED,
    change: Callable[[str, random.Random], str] = with_other_digits,
) -> Iterator[tuple[str, str]]:
    """``n`` notes as pairs of id and text: the texts in an order drawn by ``seed``, then again, each changed."""
    order = random.Random(seed).sample(list(texts), len(texts))
    for number in range(n):
        copy, i = divmod(number, len(order))
        text = order[i]
        yield f"{copy}-{i}", change(text, random.Random(f"{seed} {number}")) if copy else text


def measure(model: str, texts: Sequence[str], unit: int, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Whole runs at each size, into Parquet."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        files = {
            size: patients.write_notes(Path(folder) / f"{size}x.jsonl", corpus(texts, size * unit)) for size in sizes
        }
        reused: dict[str, float] = {}

        def run(size: int) -> common.Run:
            command = [MEDNER, "annotate", files[size], "-o", output, "--model", model, "--overwrite", "--quiet"]
            result = common.timed(command)
            counts = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["counts"]
            assert counts["annotated"] == size * unit
            reused[str(size)] = counts["windows_reused"] / counts["windows"]
            return result

        runs = common.interleaved({"medner": run}, sizes, rounds)["medner"]
    return {
        "bundle": model,
        "unit": unit,
        "rounds": rounds,
        "targets": {"growth": TARGET_GROWTH, "mib": TARGET_MIB},
        "sizes": [_size(size, size * unit, runs[str(size)], reused[str(size)]) for size in sizes],
    }


def _size(size: int, notes: int, runs: Sequence[Mapping[str, float]], reused: float) -> dict[str, Any]:
    return {
        "size": size,
        "notes": notes,
        "notes_per_second": statistics.median(notes / run["seconds"] for run in runs),
        "peak_mib": max(run["peak_mib"] for run in runs),
        "reused_share": reused,
        "runs": list(runs),
    }


def growth(result: Mapping[str, Any]) -> float | None:
    """Peak memory at the largest size divided by that at the one before it; None where there is only one size."""
    peaks = [one["peak_mib"] for one in sorted(result["sizes"], key=lambda one: one["size"])]
    return peaks[-1] / peaks[-2] if len(peaks) > 1 else None


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    targets, sizes = result["targets"], sorted(result["sizes"], key=lambda one: one["size"])
    rows = [
        f"| {one['size']}x | {one['notes']:,} | {one['notes_per_second']:.1f} | {100 * one['reused_share']:.0f} % | "
        f"{one['peak_mib']:,.0f} |"
        for one in sizes
    ]
    met = report.verdict(all(one["peak_mib"] < targets["mib"] for one in sizes))
    lines = [
        "## Scaling",
        "",
        f"{result['bundle']} bundle with reuse, whole runs with start-up; {report.described(result)}.",
        "",
        "| size | notes | notes/s | windows reused | peak memory, MiB |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"- Peak memory under {targets['mib']:,} MiB: {met}.",
    ]
    grown = growth(result)
    if grown is not None:
        lines.append(
            f"- Peak memory at {sizes[-1]['size']}x is {grown:.2f} times that at {sizes[-2]['size']}x; target at most "
            f"{targets['growth']:.2f}: {report.verdict(grown <= targets['growth'])}."
        )
    return "\n".join(lines) + "\n"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Rate and peak memory by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    rate, memory = figure.subplots(1, 2)
    names = [f"{one['size']}x" for one in result["sizes"]]
    shown = (rate, "notes_per_second", "notes/s"), (memory, "peak_mib", "peak memory, MiB (dashed: limit)")
    for axes, key, title in shown:
        bars = axes.bar(names, [one[key] for one in result["sizes"]], color="#1b6ca8", width=0.6)
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set(title=title, xlabel="corpus size")
        axes.margins(y=0.15)
    memory.axhline(result["targets"]["mib"], color="black", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write ``results/scaling.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="multiples of the unit")
    parser.add_argument("--unit", type=int, default=UNIT, help="notes of 1x")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    texts = patients.read_texts(patients.ACI_BENCH) + patients.distinct_mtsamples()
    path = common.write("scaling", measure(given.bundle, texts, given.unit, given.sizes, given.rounds))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
