"""Reuse: how many times faster medner is when it infers equal windows once.

    python benchmarks/reuse.py [--only NAME ...] [--rounds 3] [--limit N]

Whole runs with and without ``--no-reuse``, in turn; ratios are formed inside a round. The figure that counts is, as in
``annotate.py``, that of the slopes, which leave start-up out: here between one note and all of them, since copies of a
corpus would be reused. Beside it stand the whole runs. Before any time is taken, both must write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import patients
import report

MEDNER = Path(sys.executable).with_name("medner")

#: The corpora, and how many times faster reuse is to make each.
TARGETS = {"ACI-BENCH": 1.15, "MTSamples": 1.8, "patients": 1.6}

#: So many times the rounds where a run takes seconds, and noise weighs more.
MORE_ROUNDS = {"ACI-BENCH": 5}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Notes to annotate: the file, the column of the text, and what is to be known about them."""

    notes: Path
    column: str
    facts: Mapping[str, Any]


def corpora(names: Sequence[str], folder: Path) -> dict[str, Corpus]:
    """The corpora named, as published; the patients are generated into ``folder``."""
    found = {}
    if "ACI-BENCH" in names:
        found["ACI-BENCH"] = Corpus(patients.ACI_BENCH, "text", {})
    if "MTSamples" in names:
        found["MTSamples"] = Corpus(patients.MTSAMPLES, patients.MTSAMPLES_COLUMN, {})
    if "patients" in names:
        notes = folder / "patients.jsonl"
        found["patients"] = Corpus(notes, "text", patients.generate_file(notes))
    return found


def tables_digest(output: Path) -> str:
    """SHA-256 over the tables of a run directory: names and bytes of every file of spans and of notes, in order."""
    digest = hashlib.sha256()
    files = sorted([*output.glob("spans/*"), *output.glob("notes/*")])
    if not files:
        raise FileNotFoundError(f"{output}: no tables")
    for file in files:
        digest.update(str(file.relative_to(output)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def measure_corpus(model: str, corpus: Corpus, rounds: int, limit: int | None, folder: Path) -> dict[str, Any]:
    """One corpus: equality first, then the times. Exits where reuse changes a byte of the tables."""
    outputs = {"reuse": folder / "with", "no reuse": folder / "without"}

    def run(name: str, rows: int | None) -> common.Run:
        command = [MEDNER, "annotate", corpus.notes, "-o", outputs[name], "--model", model, "--overwrite", "--quiet"]
        command += ["--text-column", corpus.column, "--max-rejected", "all"]
        command += [] if rows is None else ["--limit", str(rows)]
        return common.timed([*command, *(["--no-reuse"] if name == "no reuse" else [])])

    for name in outputs:
        run(name, limit)
    if tables_digest(outputs["reuse"]) != tables_digest(outputs["no reuse"]):
        raise SystemExit(f"{corpus.notes.name}: reuse changes the tables")
    counts = json.loads((outputs["reuse"] / "manifest.json").read_text(encoding="utf-8"))["counts"]
    rows = counts["rows"]

    runs = common.interleaved({name: partial(run, name) for name in outputs}, [1, rows], rounds)
    seconds = {name: [one["seconds"] for one in of_size[str(rows)]] for name, of_size in runs.items()}
    rates = {name: common.rates(of_size, {"1": 1, str(rows): rows}) for name, of_size in runs.items()}
    return {
        **corpus.facts,
        "rows": rows,
        "spans": counts["spans"],
        "windows": counts["windows"],
        "windows_reused": counts["windows_reused"],
        "identical": True,
        "seconds": seconds,
        "rates": rates,
        # Of two times the smaller is the faster: the run without reuse stands above.
        "speedup": common.ratios(seconds["no reuse"], seconds["reuse"]),
        "speedup_of_slopes": common.ratios(rates["reuse"], rates["no reuse"]),
    }


def measure(model: str, names: Sequence[str], rounds: int, limit: int | None) -> dict[str, Any]:
    """Everything that ``results/reuse.json`` holds, except the machine."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, corpus in corpora(names, Path(folder)).items():
            common.say(name)
            done = measure_corpus(model, corpus, rounds * MORE_ROUNDS.get(name, 1), limit, Path(folder))
            measured[name] = done | {"target": TARGETS[name]}
    return {"bundle": model, "limit": limit, "corpora": measured}


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    part = f", **the first {result['limit']:,} rows only**" if result["limit"] else ""
    lines = [
        "## Reuse",
        "",
        f"{result['bundle']} bundle{part}, whole runs in turn; {report.described(result)}. "
        "With and without reuse the tables of spans and of notes are the same, byte for byte.",
        "",
        "| corpus | rows | windows reused | rounds | times faster | target | seconds without | with "
        "| times, with start-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in result["corpora"].items():
        slopes = one["speedup_of_slopes"]
        without, reusing = (statistics.median(one["seconds"][key]) for key in ("no reuse", "reuse"))
        lines.append(
            f"| {name} | {one['rows']:,} | {100 * one['windows_reused'] / one['windows']:.1f} % | "
            f"{len(one['seconds']['reuse'])} | "
            f"**{slopes['median']:.2f}** ({slopes['lowest']:.2f} to {slopes['highest']:.2f}) | "
            f"{one['target']}: {report.verdict(slopes['median'] >= one['target'])} | {without:.1f} | {reusing:.1f} | "
            f"{one['speedup']['median']:.2f} |"
        )
    if (generated := result["corpora"].get("patients")) is not None:
        lines += [
            "",
            f"The patients are generated (`patients.py`, seed {generated['seed']}): {generated['patients']} with "
            f"{generated['notes_each']} notes each. Later notes repeat {generated['repeated_share']:.1%} of their text "
            "from the same patient's earlier ones.",
        ]
    return "\n".join(lines) + "\n"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Speed-up by corpus, with the targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    names = list(result["corpora"])
    speedups = [one["speedup_of_slopes"] for one in result["corpora"].values()]
    middle = [one["median"] for one in speedups]
    below = [one["median"] - one["lowest"] for one in speedups]
    above = [one["highest"] - one["median"] for one in speedups]
    bars = axes.bar(names, middle, yerr=[below, above], capsize=4, color="#1b6ca8", width=0.6)
    axes.bar_label(bars, fmt="{:.2f}", label_type="center", color="white")
    for i, one in enumerate(result["corpora"].values()):
        axes.hlines(one["target"], i - 0.4, i + 0.4, color="black", linestyle="--", linewidth=1)
    axes.set(title="times faster with reuse (dashed: target)")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write ``results/reuse.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="read at most so many rows of each corpus, to try it")
    given = parser.parse_args()
    path = common.write("reuse", measure(given.bundle, given.only, given.rounds, given.limit))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
