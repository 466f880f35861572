"""Whether the default model, built again by its one command, is the one that ships, within noise.

    python benchmarks/rebuilt.py BUNDLE

BUNDLE is what ``build_default.py`` left in ``models/default/bundle``, its checkpoints beside it. F1 of both in int8, by
their own settings and with all spans, is compared on the same draws of documents: where the interval of the difference
holds zero, these data cannot tell the two apart. Beside it stand the seeds of the last stage, as both manifests have
them, and what a mean of weights with the teachers' gives each of them, on devel.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import build_default as build
import common
import errors
import report
import training

from medner import bundle, datasets, evaluate, score
from medner.annotate import Annotator, Options
from medner.datasets import Document

#: Lowest scores of spans, by what the report calls them; None is the bundle's own.
SCORED_FROM: dict[str, float | None] = {"own settings": None, "all spans": 0.0}


def labelled() -> dict[str, list[Document]]:
    """Labelled documents by name: both splits as tagged sentences and as untokenized text, and the thirty notes."""
    sets = {
        f"{split} {name}": datasets.load(str(data), split)
        for split in ("devel", "test")
        for name, data in (("sentences", training.SENTENCES), ("documents", training.DOCUMENTS))
    }
    return {**sets, "thirty notes": datasets.load(str(errors.RECORDS), "test")}


def measure(ships: Path, rebuilt: Path) -> dict[str, Any]:
    """Everything that ``results/rebuilt.json`` holds, except the machine. Both are read in int8."""
    sets, notes = labelled(), build.notes()
    rows = []
    for what, least in SCORED_FROM.items():
        one, two = (Annotator.load(path, Options(precision="int8", min_score=least)) for path in (ships, rebuilt))
        for name, documents in sets.items():
            gold = evaluate.fit_labels(one, documents)
            found = [evaluate.find(annotator, gold) for annotator in (one, two)]
            f1 = [score.evaluate(gold, spans).overall.f1 for spans in found]
            rows.append({"on": name, "what": what, "f1": f1, "difference": score.difference(gold, *found)})
            common.say(f"{name}, {what}: {100 * f1[0]:.2f} and {100 * f1[1]:.2f}")
    spans = [build.keys(evaluate.find(annotator, notes)) for annotator in (one, two)]
    return {
        "bundles": [facts(path) for path in (ships, rebuilt)],
        "scores": rows,
        "notes": len(notes),
        "agreement": score.agreement(*spans),
        "means": means(rebuilt.parent),
    }


def means(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Scores on devel of the teachers and the students in a folder, alone and as means of weights, by what they are."""
    teachers = [folder.parent / training.WORK.name / f"{build.TEACHERS}-{seed}" for seed in training.SEEDS]
    students = [folder / f"seed{seed}" for seed in build.SEEDS]
    rows = {
        "the teachers": [[teacher] for teacher in teachers],
        "the mean of the teachers' weights": [teachers],
        "the students": [[student] for student in students],
        "each student with the teachers (`--average-with`)": [[student, *teachers] for student in students],
    }
    with tempfile.TemporaryDirectory() as temporary:
        mean = Path(temporary) / "mean"

        def scored(checkpoints: list[Path]) -> dict[str, float]:
            build.average(checkpoints, mean)
            return training.score(mean)

        return {what: [scored(checkpoints) for checkpoints in row] for what, row in rows.items()}


def facts(path: Path) -> dict[str, Any]:
    """What a bundle's manifest says of how it was made."""
    loaded = bundle.load(path)
    manifest = json.loads((path / bundle.MANIFEST).read_text(encoding="utf-8"))
    return {
        "bytes": loaded.variants["int8"].bytes,
        "min_score": loaded.min_score,
        "packed": loaded.packed,
        "trained_in": manifest["training"]["precision"],
        **{name: manifest[name] for name in ("chosen", "devel", "test")},
    }


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    one, two = result["bundles"]
    lines = [
        "## The default model, built again",
        "",
        "`build_default.py`, run whole a second time from the encoder and the data: what ships was trained in "
        f"{one['trained_in']}, this one in {two['trained_in']}. F1 in percent, int8; {report.described(result)}.",
        "",
        "| | what ships | built again | difference, 95 % interval | zero in it |",
        "|---|---|---|---|---|",
    ]
    for row in result["scores"]:
        change, low, high = (100 * value for value in row["difference"])
        lines.append(
            f"| {row['on']}, {row['what']} | {100 * row['f1'][0]:.2f} | {100 * row['f1'][1]:.2f} | "
            f"{change:+.2f} ({low:+.2f} to {high:+.2f}) | {'yes' if low <= 0 <= high else '**no**'} |"
        )
    lines += [
        "",
        "Spans by their own lowest score: "
        + " and ".join(f"{each['min_score']:g} ({_windows(each)})" for each in (one, two))
        + f". Of all spans in {result['notes']} notes of ACI-BENCH {100 * result['agreement']:.1f} % are equal.",
        "",
        "The last stage, PyTorch in fp32, all spans: the mean over five seeds, with the lowest and the highest.",
        "",
        "| | what ships | built again |",
        "|---|---|---|",
    ]
    for split in ("devel", "test"):
        for name in training.SCORED:
            lines.append(f"| {split} {name} | {_seeds(one[split], name)} | {_seeds(two[split], name)} |")
    lines += [
        "",
        "What a mean of weights gives the model built again, on devel, PyTorch in fp32, all spans: the mean over the "
        "models of a row, with the lowest and the highest.",
        "",
        "| | models | sentences | documents | packed |",
        "|---|---|---|---|---|",
    ]
    for what, row in result["means"].items():
        spreads = (training.spread([scored[name] for scored in row]) for name in training.SCORED)
        lines.append(f"| {what} | {len(row)} | {' | '.join(spreads)} |")
    return "\n".join(lines) + "\n"


def _windows(made: Mapping[str, Any]) -> str:
    return "windows packed" if made["packed"] else "one segment a window"


def _seeds(scores: Mapping[str, Mapping[str, float]], name: str) -> str:
    return training.spread([scored[name] for candidate, scored in scores.items() if candidate not in training.MEANS])


def main() -> None:
    """Compare, write ``results/rebuilt.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the bundle that build_default.py made")
    given = parser.parse_args()
    path = common.write("rebuilt", measure(build.SHIPPED, given.bundle))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
