"""What each way of training gives on the devel split of NCBI Disease, over several seeds.

    python benchmarks/training.py [--base DIR] [--base-specials DIR] [--base-pretrained DIR]
                                  [--base-named DIR] [--seeds 13 14 15]

A training starts from the default model's encoder (``models/default/base``, made by ``build_default.py``) unless its
variant has another, and differs from the plain one as its row says; as many run at a time as there are processors.
Checkpoints go to ``models/training``, which git ignores; what is there already is not made again. All are then scored
alike, by PyTorch in fp32: tagged sentences, and untokenized documents with one segment a window and with as many as fit
into 128 tokens. The test split is not touched. Rows that are not measured now stay as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import report

from medner import bundle, datasets, evaluate
from medner.annotate import Annotator, Options
from medner.pytorch import TorchModel

WORK = common.ROOT / "models" / "training"
SENTENCES, DOCUMENTS = common.DATA / "ncbi-disease" / "conll", common.DATA / "ncbi-disease" / "pubtator"
SEEDS = (13, 14, 15)
#: What is scored: see :func:`score`.
SCORED = ("sentences", "documents", "packed")
#: Options of ``medner train`` that all have.
PLAIN = {"epochs": 6, "lr": 2e-4, "batch_size": 16, "window": 128, "average": 3}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of training: what it is called, and what it changes of the plain one. base: a name of ``--base-...``."""

    name: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str = "base"
    packed: bool = False


VARIANTS = (
    Variant("plain", "plain: single sentences, 6 epochs, better of best epoch and mean of the last three"),
    Variant("specials", "with `[CLS]` and `[SEP]`", base="specials"),
    Variant("pretrained", "encoder pre-trained further in the domain", base="pretrained"),
    Variant("named", "the same, then trained on names of diseases, too", base="named"),
    Variant(
        "packed",
        "also documents packed into 128 tokens, 3 epochs",
        {"epochs": 3},
        packed=True,
    ),
    Variant("longer", "12 epochs", {"epochs": 12}),
    Variant("layer-decay", "`--layer-decay 0.9`", {"layer_decay": 0.9}),
    Variant("smoothing", "`--label-smoothing 0.1`", {"label_smoothing": 0.1}),
    Variant("class-weights", "`--class-weights`", {"class_weights": True}),
)

#: Of the last stage of ``build_default.py``; what that stage is called, and what it makes of its checkpoints.
TAUGHT_EPOCHS = 4
TAUGHT = (
    f"from the best of those that learnt names {TAUGHT_EPOCHS} more epochs, taught by all three, on documents and text "
    "without labels, too"
)
#: Models made of several checkpoints, and their folders beside those.
MEANS = {"the mean of the seeds' weights": "mean", "the mean of the seeds' and the teachers' weights": "mean-of-all"}


def arguments(variant: Variant, base: Path, seed: int) -> list[str]:
    """What ``medner train`` gets for one checkpoint, its output left out."""
    data = [SENTENCES, *([DOCUMENTS] if variant.packed else [])]
    return flags(data=data, base=base, seed=seed, **{**PLAIN, **variant.options})


def flags(**options: Any) -> list[str]:
    """Options of ``medner train`` as its command line has them; a sequence is repeated, and all labels are one."""
    listed = ["--label", "*=Disease"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            listed.append(flag if each is True else f"{flag}={each}")
    return listed


def train_all(jobs: Mapping[Path, Sequence[str]], workers: int = os.cpu_count() or 1) -> None:
    """Make checkpoints that are not there yet, several at a time, which share the processors.

    On two of them, two at a time on one thread each are faster than one on both. jobs: what ``medner train`` gets, by
    output. workers: how many at a time.
    """

    def train(output: Path, threads: int) -> None:
        common.say(f"training {output.name}")
        command = [Path(sys.executable).with_name("medner"), "train", *jobs[output], "-o", output]
        if output.exists():
            command.append("--resume")
        common.timed(command, {"OMP_NUM_THREADS": str(threads)})

    missing = [output for output in jobs if not (output / "metrics.json").is_file()]
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(missing), workers):
            together = missing[first : first + workers]
            list(pool.map(train, together, [workers // len(together)] * len(together)))


def score(checkpoint: Path, split: str = "devel") -> dict[str, float]:
    """F1 on sentences, documents with one segment a window, and documents packed into windows, as shares of one."""
    model = TorchModel(checkpoint)
    single = bundle.resized(bundle.load_checkpoint(checkpoint), PLAIN["window"], packed=False)
    apart, packed = (
        Annotator(each, model, Options(threads=1), precision="fp32") for each in (single, replace(single, packed=True))
    )
    sentences, documents = datasets.load(str(SENTENCES), split), datasets.load(str(DOCUMENTS), split)
    found = {
        "sentences": evaluate.evaluate(apart, sentences),
        "documents": evaluate.evaluate(apart, documents),
        "packed": evaluate.evaluate(packed, documents),
    }
    return {name: scores.overall.f1 for name, scores in found.items()}


def measure(
    variants: Sequence[Variant], bases: Mapping[str, Path], seeds: Sequence[int], taught: Path | None, workers: int
) -> dict[str, Any]:
    """Everything that ``results/training.json`` holds, except the machine.

    taught: folder of ``seedN`` checkpoints, and of their mean if there is one.
    """
    known = {variant.name: variant for variant in variants if variant.base in bases}
    checkpoints = {(name, seed): WORK / f"{name}-{seed}" for name in known for seed in seeds}
    train_all(
        {output: arguments(known[name], bases[known[name].base], seed) for (name, seed), output in checkpoints.items()},
        workers,
    )
    what = {name: variant.what for name, variant in known.items()}
    if taught is not None:
        what["taught"] = TAUGHT
        checkpoints |= {("taught", int(path.name[4:])): path for path in sorted(taught.glob("seed*"))}
    scores = [score(path) for path in checkpoints.values()]  # not in threads: transformers loads one at a time
    rows: dict[str, Any] = {name: {"what": text, "seeds": {}} for name, text in what.items()}
    for ((name, seed), path), scored in zip(checkpoints.items(), scores, strict=True):
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        rows[name]["seeds"][str(seed)] = {
            **scored,
            "best_epoch": metrics["best"]["f1"],
            "averaged": (metrics["averaged"] or {}).get("f1"),
            "seconds": metrics["seconds"],
        }
    for name, folder in MEANS.items():
        if taught is not None and (taught / folder).is_dir():
            scored = score(taught / folder)
            rows[folder] = {
                "what": f"one model: {name}",
                "seeds": {folder: {**scored, "best_epoch": None, "averaged": None}},
            }
    return {"options": PLAIN, "split": "devel", "variants": rows}


def kept(measured: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the rows of an earlier one that it lacks, in the order of :data:`VARIANTS`; taught ones last."""
    if earlier and (earlier["options"], earlier["split"]) != (measured["options"], measured["split"]):
        raise SystemExit("the earlier result has other options; measure all variants")
    rows = {**earlier.get("variants", {}), **measured["variants"]}
    order = [*(variant.name for variant in VARIANTS), "taught", *MEANS.values()]
    return {**measured, "variants": {name: rows[name] for name in order if name in rows}}


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    variants = result["variants"]
    lines = [
        "## Ways of training",
        "",
        "F1 on the devel split of NCBI Disease, percent: the mean over seeds, with the lowest and the highest. All by "
        "`medner train` from MiniLM with ReLU, without special tokens where nothing else is said; "
        f"{report.described(result)}.",
        "",
        "| | seeds | sentences | documents, one segment a window | documents, packed into 128 tokens |",
        "|---|---|---|---|---|",
    ]
    for row in variants.values():
        spreads = (spread([one[name] for one in row["seeds"].values()]) for name in SCORED)
        lines.append(f"| {row['what']} | {len(row['seeds'])} | {' | '.join(spreads)} |")
    gains = [
        one["averaged"] - one["best_epoch"]
        for row in variants.values()
        for one in row["seeds"].values()
        if one["averaged"] is not None
    ]
    if gains:
        lines += [
            "",
            f"The mean of the last three epochs' weights, alone: {100 * statistics.mean(gains):+.2f} against the best "
            f"epoch ({len(gains)} trainings, in the precision of training).",
        ]
    return "\n".join(lines) + "\n"


def spread(shares: Sequence[float]) -> str:
    """The mean in percent, with the lowest and the highest, for a table."""
    values = [100 * share for share in shares]
    return f"**{statistics.mean(values):.2f}** ({min(values):.2f} - {max(values):.2f})"


def main() -> None:
    """Train, score, write ``results/training.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = common.ROOT / "models" / "default"
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--base", type=Path, default=default / "base")
    parser.add_argument("--base-specials", dest="specials", type=Path, help="the same with its special tokens")
    parser.add_argument("--base-pretrained", dest="pretrained", type=Path, help="the same, pre-trained further")
    parser.add_argument("--base-named", dest="named", type=Path, help="the same, then trained on names of diseases")
    parser.add_argument("--taught", type=Path, help="folder of the checkpoints that teachers taught, seedN")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    given = parser.parse_args()
    if given.taught is not None and not list(given.taught.glob("seed*")):
        parser.error(f"--taught {given.taught}: no folder seedN in it")
    bases = {
        name: path for name in ("base", "specials", "pretrained", "named") if (path := getattr(given, name)) is not None
    }
    variants = [variant for variant in VARIANTS if variant.name in given.variants]
    if missing := [variant.base for variant in variants if variant.base not in bases]:
        parser.error(f"--base-{missing[0]} is needed for the variant {missing[0]}; or leave it out by --variants")
    measured = measure(variants, bases, given.seeds, given.taught, given.workers)
    before = common.RESULTS / "training.json"
    earlier = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
    path = common.write("training", kept(measured, earlier))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
