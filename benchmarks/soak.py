"""Soak: resident memory of long runs over time.

    python benchmarks/soak.py [--tiny 150000] [--default 10000]

The corpus is that of ``scaling.py``, but where a text comes again, not only its digits are others: one word in forty
is left out, replaced or doubled, so that lengths and windows differ and reuse sees new windows to the end. Medner runs
as users run it, into a run directory, reuse on. Memory that grows with the notes shows as a last quarter above the
second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import patients
import report
import scaling

#: Median memory of the last quarter, against that of the second.
TARGET_RATIO = 1.05

#: Notes with each bundle.
NOTES = {"tiny": 150_000, "default": 10_000}
#: Words of a text that comes again for each one that is changed.
CHANGED_EVERY = 40
#: Points of a curve that are kept for the picture.
POINTS = 240

MEDNER = Path(sys.executable).with_name("medner")

#: Seconds since the first look, and resident memory in MiB.
Sample = tuple[float, float]


def with_other_words(text: str, rng: random.Random) -> str:
    """The text with every digit drawn anew, and a word in :data:`CHANGED_EVERY` left out, replaced or doubled."""
    words = scaling.with_other_digits(text, rng).split(" ")
    for _ in range(len(words) // CHANGED_EVERY):
        i, other = rng.randrange(len(words)), rng.choice(words)
        words[i] = rng.choice(("", other, f"{words[i]} {other}"))
    return " ".join(words)


def resident_mib(pid: int) -> float:
    """Resident memory of a process; 0 once it has ended and waits to be collected."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quarters(samples: Sequence[Sample]) -> list[float]:
    """Median memory of each quarter of the time. Raises ValueError where one of them holds no sample."""
    length = samples[-1][0] / 4 if samples else 0.0
    cut: list[list[float]] = [[], [], [], []]
    for seconds, mib in samples:
        cut[min(3, int(seconds / length)) if length else 0].append(mib)
    if not all(cut):
        raise ValueError(f"{len(samples)} samples do not fill four quarters; take more notes")
    return [statistics.median(one) for one in cut]


def thinned(samples: Sequence[Sample], points: int = POINTS) -> list[Sample]:
    """At most ``points`` samples: of equal stretches of the time the highest, so that no peak is lost."""
    length = samples[-1][0] / points
    highest: dict[int, Sample] = {}
    for seconds, mib in samples:
        stretch = min(points - 1, int(seconds / length)) if length else 0
        if stretch not in highest or mib > highest[stretch][1]:
            highest[stretch] = seconds, mib
    return list(highest.values())


def soak(model: str, texts: Sequence[str], notes: int, folder: Path) -> dict[str, Any]:
    """One run over ``notes`` notes, watched."""
    corpus = scaling.corpus(texts, notes, change=with_other_words)
    file, output = patients.write_notes(folder / f"{model}.jsonl", corpus), folder / f"{model}-run"
    samples: list[Sample] = []
    run = common.timed(
        [MEDNER, "annotate", file, "-o", output, "--model", model, "--quiet"], watch=partial(_look, samples)
    )
    file.unlink()
    counts = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["counts"]
    assert counts["annotated"] == notes
    first = samples[0][0]
    since = [(seconds - first, mib) for seconds, mib in samples]
    found = quarters(since)
    return {
        "bundle": model,
        "notes": notes,
        "parts": counts["parts"],
        "reused_share": counts["windows_reused"] / counts["windows"],
        "seconds": run.seconds,
        "peak_mib": run.peak_mib,
        "quarters_mib": found,
        "ratio": found[3] / found[1],
        "samples": len(samples),
        "curve": [[round(seconds, 2), round(mib, 1)] for seconds, mib in thinned(since)],
    }


def _look(samples: list[Sample], pid: int) -> None:
    if mib := resident_mib(pid):
        samples.append((time.perf_counter(), mib))


def measure(texts: Sequence[str], notes: Mapping[str, int]) -> dict[str, Any]:
    """Everything that ``results/soak.json`` holds, except the machine. notes: how many, by bundle; 0 leaves it out."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for model, n in notes.items():
            if n:
                runs.append(soak(model, texts, n, Path(folder)))
                common.say(f"{model}, {n} notes: {runs[-1]['seconds']:.0f} s, {runs[-1]['peak_mib']:.0f} MiB")
    return {"target": TARGET_RATIO, "every_seconds": common.WATCH_SECONDS, "runs": runs}


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    rows = []
    for one in result["runs"]:
        met = report.verdict(one["ratio"] <= result["target"])
        each = " | ".join(f"{mib:,.0f}" for mib in one["quarters_mib"])
        rows.append(
            f"| {one['bundle']} | {one['notes']:,} | {100 * one['reused_share']:.0f} % | {one['seconds']:,.0f} | "
            f"{one['peak_mib']:,.0f} | {each} | {one['ratio']:.3f}: {met} |"
        )
    return "\n".join(
        [
            "## Soak",
            "",
            f"Resident memory of whole runs with reuse, in MiB, looked at every {result['every_seconds']} s: the peak, "
            f"and the median of each quarter of the time; {report.described(result)}.",
            "",
            "| bundle | notes | windows reused | seconds | peak | 1st quarter | 2nd | 3rd | 4th | 4th / 2nd, target "
            f"at most {result['target']:.2f} |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Memory over time, a panel for each run, with its quarters and their medians."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, len(result["runs"]), squeeze=False, sharey=True)[0]
    for axes, one in zip(panels, result["runs"], strict=True):
        seconds, mib = zip(*one["curve"], strict=True)
        axes.plot(seconds, mib, color="#1b6ca8", linewidth=1)
        quarter = seconds[-1] / 4
        for i, median in enumerate(one["quarters_mib"]):
            axes.hlines(median, i * quarter, (i + 1) * quarter, color="black", linewidth=1)
        for i in (1, 2, 3):
            axes.axvline(i * quarter, color="grey", linestyle=":", linewidth=1)
        axes.set(title=f"{one['bundle']}, {one['notes']:,} notes", xlabel="seconds (black: medians of quarters)")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("resident memory, MiB")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write ``results/soak.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for model, notes in NOTES.items():
        parser.add_argument(f"--{model}", type=int, default=notes, help=f"notes with the {model} bundle; 0: none")
    given = parser.parse_args()
    texts = patients.read_texts(patients.ACI_BENCH) + patients.distinct_mtsamples()
    path = common.write("soak", measure(texts, {model: getattr(given, model) for model in NOTES}))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
