"""medner end to end (file in, Parquet out) against the stock tools on the same weights: equal spans first, then time.

    python benchmarks/annotate.py [--model minilm|base] [--notes N] [--rounds 3] [--only NAME ...]

Every contender is a whole process. Rates are slopes between a corpus and copies of it, so start-up is counted apart.
The models come from build_default.py and build_base.py. EDS-NLP runs in an environment of its own
(constraints-edsnlp.txt); where that is absent, EDS-NLP is left out and the commands that make it are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import pyarrow.parquet as pq
from contenders import Note, Slice, cutter, read_notes

from medner import bundle as bundles
from medner import datasets, decode, runtime, score
from medner.datasets import Document

CORPUS = common.DATA / "aci-bench" / "notes.jsonl"
LABELLED = common.DATA / "ncbi-disease" / "pubtator"
#: Notes on which the settings of a contender are chosen.
SAMPLE = 24

INSTALL_EDSNLP = (
    "python -m venv .venv-edsnlp && "
    ".venv-edsnlp/bin/pip install -c benchmarks/constraints-edsnlp.txt 'edsnlp[ml]' transformers"
)

INT8, REUSE, FP32 = "medner-int8", "medner-int8-reuse", "medner-fp32"
OURS = (INT8, REUSE, FP32)
#: Contenders that see medner's windows and compute in fp32.
EQUAL = ("transformers-skilled", "optimum-skilled")
TITLES = {
    INT8: "medner, int8",
    REUSE: "medner, int8, with reuse",
    FP32: "medner, fp32",
    "transformers-stock": "transformers, stock, PyTorch fp32",
    "optimum-stock": "optimum, stock, onnxruntime fp32",
    "transformers-skilled": "transformers, skilled, PyTorch fp32",
    "transformers-skilled-bf16": "transformers, skilled, PyTorch bf16",
    "optimum-skilled": "optimum, skilled, onnxruntime fp32",
    "edsnlp": "EDS-NLP, PyTorch bf16 (speed alone)",
}
#: What we promise: how many times faster a form of medner is than a contender, for each model.
TARGETS: Mapping[str, Mapping[tuple[str, str], float]] = {
    "minilm": {
        (INT8, "transformers-stock"): 8,
        (INT8, "optimum-stock"): 4,
        (INT8, "edsnlp"): 2.2,
        (INT8, "transformers-skilled"): 5,
        (INT8, "transformers-skilled-bf16"): 2.4,
        (INT8, "optimum-skilled"): 2.8,
        (FP32, "transformers-stock"): 3.5,
        (FP32, "optimum-stock"): 1.8,
    },
    "base": {(INT8, "transformers-stock"): 6, (INT8, "optimum-stock"): 2.5},
}

#: (note id, start, end, label) -> score, None where the contender gives none.
Spans = dict[tuple[str, int, int, str], float | None]
Settings = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Model:
    """Where one set of weights lies, and how to make it. random: its spans mean nothing."""

    title: str
    checkpoint: Path
    bundle: Path
    builder: str
    random: bool = False


MODELS = {
    "minilm": Model(
        "MiniLM, 6 layers of 384",
        common.ROOT / "models/default/checkpoint",
        common.ROOT / "models/default/bundle",
        "benchmarks/build_default.py",
    ),
    "base": Model(
        "BERT-base's size, 12 layers of 768, random weights",
        common.ROOT / "models/base/checkpoint",
        common.ROOT / "models/base/bundle",
        "benchmarks/build_base.py",
        random=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A command that takes ``NOTES -o SPANS`` and settings.

    choices: the settings of which the fastest is taken. scored: its spans mean something.
    """

    name: str
    program: tuple[str | Path, ...]
    choices: tuple[Settings, ...] = ({},)
    scored: bool = True

    def command(self, notes: Path, output: Path, settings: Settings) -> list[str | Path]:
        """The whole command line."""
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return [*self.program, notes, "-o", output, *flags]


def contenders(model: Model, threads: int, edsnlp_python: Path) -> dict[str, Contender]:
    """Every contender by name. A model of random weights has medner's int8 and the stock pipelines."""
    here = Path(__file__).resolve().parent
    medner = (
        Path(sys.executable).parent / "medner", "annotate", "--model", model.bundle, "--threads", str(threads),
        "--device", "cpu", "--quiet", "--overwrite", "--min-score", "0",
    )  # fmt: skip
    pipeline = (
        sys.executable, here / "contenders.py", "--checkpoint", model.checkpoint, "--bundle", model.bundle,
        "--threads", str(threads),
    )  # fmt: skip
    edsnlp = (
        edsnlp_python, here / "edsnlp_contender.py", "--checkpoint", model.checkpoint, "--threads", str(threads),
    )  # fmt: skip
    whole = tuple({"batch-size": size} for size in (1, 2, 4, 8, 16))
    windows = tuple({"batch-size": size} for size in (8, 16, 32, 64))
    halves = tuple({"dtype": dtype, "batch-size": size} for dtype in ("bf16", "autocast") for size in (8, 16, 32))
    words = tuple({"batch-words": count} for count in (1024, 2048, 4096))
    meaning = not model.random
    stock = (*pipeline, "--form", "stock", "--engine")
    every = [
        Contender(INT8, (*medner, "--no-reuse"), scored=meaning),
        Contender(REUSE, medner, scored=meaning),
        Contender(FP32, (*medner, "--no-reuse", "--precision", "fp32"), scored=meaning),
        Contender("transformers-stock", (*stock, "transformers"), whole, meaning),
        Contender("optimum-stock", (*stock, "optimum"), whole, meaning),
    ]
    if not model.random:
        every += [
            Contender("transformers-skilled", (*pipeline, "--engine", "transformers", "--form", "skilled"), windows),
            Contender(
                "transformers-skilled-bf16", (*pipeline, "--engine", "transformers", "--form", "skilled"), halves
            ),
            Contender("optimum-skilled", (*pipeline, "--engine", "optimum", "--form", "skilled"), windows),
            Contender("edsnlp", edsnlp, words, scored=False),
        ]
    return {contender.name: contender for contender in every}


# ---------------------------------------------------------------------------------------------------------------------
# Corpora and spans


def copies(notes: Sequence[Note], times: int) -> list[Note]:
    """The notes again and again; a copy's number makes its id another."""
    return [Note(note.id if copy == 0 else f"{note.id}#{copy}", note.text) for copy in range(times) for note in notes]


def write_notes(path: Path, notes: Iterable[Note]) -> Path:
    """Write a corpus as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for note in notes:
            file.write(json.dumps({"note_id": note.id, "text": note.text}) + "\n")
    return path


def read_spans(path: Path) -> Spans:
    """The spans of a Parquet file that medner or a contender wrote."""
    table = pq.read_table(path)
    scores = table["score"].to_pylist() if "score" in table.column_names else [None] * table.num_rows
    keys = zip(*(table[name].to_pylist() for name in ("note_id", "start", "end", "label")), strict=True)
    return dict(zip(keys, scores, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Equality and scores


def long_segments(notes: Iterable[Note], cut: Callable[[str], list[Slice]]) -> dict[str, list[tuple[int, int]]]:
    """By note id, the code points ``start:end`` of windows that are cut from segments longer than a window."""
    found: dict[str, list[tuple[int, int]]] = {}
    for note in notes:
        for window in cut(note.text):
            if not window.whole:
                found.setdefault(note.id, []).append((window.start, window.end))
    return found


def compare(ours: Spans, theirs: Spans, long: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, Any]:
    """Hold spans against medner's in the same windows.

    long: see :func:`long_segments`; there a text cannot stand for a window exactly, so those spans are counted apart
    (``explained``). ``differences`` are the others that only one side has. score: the greatest difference of the
    scores of spans that both have outside those segments.
    """

    def is_cut(span: tuple[str, int, int, str]) -> bool:
        return any(start <= span[1] < end for start, end in long.get(span[0], ()))

    single, both = ours.keys() ^ theirs.keys(), ours.keys() & theirs.keys()
    explained = set(filter(is_cut, single))
    apart = [abs((ours[span] or 0) - (theirs[span] or 0)) for span in both if not is_cut(span)]
    return {
        "spans": len(ours),
        "equal": len(both),
        "explained": len(explained),
        "differences": len(single - explained),
        "score": max(apart, default=0.0),
    }


def equality(rivals: Mapping[str, Contender], notes: Sequence[Note], bundle: Path, folder: Path) -> dict[str, Any]:
    """Compare the fp32 spans of the skilled pipelines with medner's, and medner's int8 with its fp32.

    Raises SystemExit where fp32 spans differ for a reason unknown.
    """
    corpus = write_notes(folder / "equality.jsonl", notes)
    found = {}
    for name in (FP32, INT8, REUSE, *EQUAL):
        output = folder / f"equality-{name}.parquet"
        common.timed(rivals[name].command(corpus, output, rivals[name].choices[0]))
        found[name] = read_spans(output)
    long = long_segments(notes, cutter(bundle))
    result = {
        "notes": len(notes),
        "windows_of_long_segments": sum(map(len, long.values())),
        "fp32": {name: compare(found[FP32], found[name], long) for name in EQUAL},
        "int8_agreement": score.agreement(found[INT8], found[FP32]),
        "reuse_changes": len(found[INT8].items() ^ found[REUSE].items()),
    }
    for name, each in result["fp32"].items():
        common.say(f"{TITLES[name]} against medner, fp32, on equal windows: {each}")
    differing = [name for name, each in result["fp32"].items() if each["differences"]]
    if differing or result["reuse_changes"]:
        raise SystemExit(f"spans differ: {json.dumps(result, indent=1)}")
    return result


def labelled_documents(bundle: bundles.Bundle) -> list[Document]:
    """The NCBI Disease test documents, with the model's label where it has only one."""
    documents = datasets.load(str(LABELLED), "test")
    types = decode.tag_set(bundle.labels).types
    return datasets.relabel(documents, types[0]) if len(types) == 1 else documents


def exact_f1(documents: Sequence[Document], spans: Iterable[tuple[str, int, int, str]]) -> dict[str, float]:
    """F1 on exact offsets with its 95 % interval: ``f1``, ``low``, ``high``."""
    by_note: dict[str, list[tuple[int, int, str]]] = {document.id: [] for document in documents}
    for note_id, start, end, label in spans:
        by_note[note_id].append((start, end, label))
    overall = score.strict([document.spans for document in documents], list(by_note.values())).overall
    return {"f1": overall.f1, "low": overall.low, "high": overall.high}


# ---------------------------------------------------------------------------------------------------------------------
# Time


def tune(contender: Contender, sample: Path, folder: Path) -> dict[str, Any]:
    """Try a contender's settings in a process each; ``chosen`` is the fastest, ``tried`` has the seconds of each."""
    tried = []
    for settings in contender.choices if len(contender.choices) > 1 else ():
        run = common.timed(contender.command(sample, folder / "tuning.parquet", settings))
        tried.append({"settings": dict(settings), "seconds": run.seconds})
        common.say(f"{contender.name} with {dict(settings)}: {run.seconds:.2f} s")
    chosen = min(tried, key=lambda each: each["seconds"])["settings"] if tried else dict(contender.choices[0])
    return {"chosen": chosen, "tried": tried}


def startups(runs: Mapping[str, Sequence[Mapping[str, float]]], notes: Mapping[str, int]) -> list[float]:
    """Seconds of each round that the smallest size takes beyond its notes at the round's rate."""
    small = min(runs, key=lambda size: notes[size])
    return [
        run["seconds"] - notes[small] / rate for run, rate in zip(runs[small], common.rates(runs, notes), strict=True)
    ]


def reuse_rates(
    reusing: Mapping[str, Sequence[Mapping[str, float]]],
    plain: Mapping[str, Sequence[Mapping[str, float]]],
    notes: Mapping[str, int],
) -> list[float]:
    """Notes per second in each round with reuse, on the corpus once.

    Copies of a corpus cost a run with reuse next to nothing, so a slope over them would flatter it. The start-up taken
    off is that of the same command without reuse.
    """
    small = min(notes, key=lambda size: notes[size])
    return [
        notes[small] / (run["seconds"] - startup)
        for run, startup in zip(reusing[small], startups(plain, notes), strict=True)
    ]


def summarize(runs: Mapping[str, Any], notes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """By contender: ``rates`` of the rounds (notes/s), their median ``rate``, ``startup_seconds`` and ``peak_mib``.

    runs: as :func:`common.interleaved` returns them; notes: how many notes each size has. With reuse there is a rate
    only where the same rounds ran without it. Raises ValueError where more notes took no longer.
    """
    large = max(notes, key=lambda size: notes[size])
    summary: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        if name == REUSE and INT8 not in runs:
            continue
        plain = runs[INT8] if name == REUSE else each
        rates = reuse_rates(each, plain, notes) if name == REUSE else common.rates(each, notes)
        if min(rates) <= 0:
            raise ValueError(f"{name}: more notes took no longer; take more of them, or a machine that is idle")
        summary[name] = {
            "rates": rates,
            "rate": statistics.median(rates),
            "startup_seconds": statistics.median(startups(plain, notes)),
            "peak_mib": statistics.median(run["peak_mib"] for run in each[large]),
        }
    return summary


def ratio_table(summary: Mapping[str, Mapping[str, Any]], targets: Mapping[tuple[str, str], float]) -> list[dict]:
    """Each form of medner against each contender: ``ours``, ``theirs``, the ratio, ``target`` and ``met`` or None."""
    table = []
    for theirs in (name for name in summary if name not in OURS):
        for ours in (name for name in OURS if name in summary):
            ratio = common.ratios(summary[ours]["rates"], summary[theirs]["rates"])
            target = targets.get((ours, theirs))
            met = None if target is None else ratio["median"] >= target
            table.append({"ours": ours, "theirs": theirs, **ratio, "target": target, "met": met})
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def measure(
    model: Model,
    rivals: Mapping[str, Contender],
    notes: Sequence[Note],
    sizes: Sequence[int],
    rounds: int,
    folder: Path,
) -> dict[str, Any]:
    """Choose settings, score, and let the contenders take turns; see :func:`section` for what comes of it."""
    sample = write_notes(folder / "sample.jsonl", common.every_kth(notes, min(SAMPLE, len(notes))))
    tuning = {name: tune(rival, sample, folder) for name, rival in rivals.items()}
    scores = {}
    if not model.random and LABELLED.is_dir():
        documents = labelled_documents(bundles.load(model.bundle))
        labelled = write_notes(folder / "labelled.jsonl", (Note(document.id, document.text) for document in documents))
        for name, rival in rivals.items():
            if rival.scored:
                output = folder / f"labelled-{name}.parquet"
                common.timed(rival.command(labelled, output, tuning[name]["chosen"]))
                scores[name] = exact_f1(documents, read_spans(output))
    corpora = {size: write_notes(folder / f"corpus-{size}.jsonl", copies(notes, size)) for size in sizes}

    def run(name: str, size: int) -> common.Run:
        output = folder / f"{name}-{size}.parquet"
        return common.timed(rivals[name].command(corpora[size], output, tuning[name]["chosen"]))

    runs = common.interleaved({name: partial(run, name) for name in rivals}, sizes, rounds)
    found = {
        name: read_spans(folder / f"{name}-{min(sizes)}.parquet") for name, rival in rivals.items() if rival.scored
    }
    return {
        "tuning": tuning,
        "scores": scores,
        "agreement": {name: score.agreement(spans, found[FP32]) for name, spans in found.items() if FP32 in found},
        "runs": runs,
        "summary": summarize(runs, {str(size): size * len(notes) for size in sizes}),
    }


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    machine, corpus = result["machine"], result["corpus"]
    lines = [
        f"## End to end: {result['model']['title']}",
        "",
        f"{corpus['notes']} notes of {corpus['name']} ({corpus['characters']:,} characters), once and up to "
        f"{max(corpus['sizes'])} times; file to Parquet, whole processes, {result['threads']} threads; medians of "
        f"{result['rounds']} rounds in turn. {machine['processor']}, {machine['cpus']} CPUs, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ".",
        "",
        *_equality_lines(result),
        "",
        "| | notes/s (lowest - highest) | start-up, s | peak, MiB | F1, NCBI test documents | spans of medner fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in result["summary"].items():
        f1 = f"{100 * result['scores'][name]['f1']:.2f}" if name in result["scores"] else "-"
        agreement = f"{result['agreement'][name]:.2%}" if name in result["agreement"] else "-"
        lines.append(
            f"| {TITLES[name]} | {each['rate']:.1f} ({min(each['rates']):.1f} - {max(each['rates']):.1f}) | "
            f"{each['startup_seconds']:.1f} | {each['peak_mib']:,.0f} | {f1} | {agreement} |"
        )
    if result["ratios"]:
        lines += ["", *_ratio_lines(result["ratios"])]
    lines += ["", *_setting_lines(result)]
    return "\n".join(lines) + "\n"


def _equality_lines(result: Mapping[str, Any]) -> list[str]:
    equal = result["equality"]
    if result["model"]["random"]:
        return ["The weights are random, so the spans mean nothing: this is speed alone."]
    if equal is None:
        return ["Equality of the spans was **not checked** in this run."]
    lines = [
        f"Equality first, on medner's windows of {equal['notes']} notes. {equal['windows_of_long_segments']} windows "
        "are cut from segments longer than a window, where a text cannot stand for a window exactly; differences there "
        "are counted apart.",
        "",
        "| against medner, fp32 | its spans | equal | differences | in long segments | greatest score difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in equal["fp32"].items():
        lines.append(
            f"| {TITLES[name]} | {each['spans']} | {each['equal']} | {each['differences']} | {each['explained']} | "
            f"{each['score']:.1e} |"
        )
    reuse = "the same spans and scores" if not equal["reuse_changes"] else f"{equal['reuse_changes']} other spans"
    return [*lines, "", f"int8 agrees with fp32 on {equal['int8_agreement']:.2%} of spans; reuse gives {reuse}."]


def _ratio_lines(ratios: Sequence[Mapping[str, Any]]) -> list[str]:
    ours = [name for name in OURS if any(each["ours"] == name for each in ratios)]
    cells = {(each["ours"], each["theirs"]): each for each in ratios}
    lines = [
        "How many times faster than each contender (lowest - highest of the rounds):",
        "",
        f"| | {' | '.join(TITLES[name] for name in ours)} |",
        "|" + "---|" * (len(ours) + 1),
    ]
    for theirs in dict.fromkeys(each["theirs"] for each in ratios):
        lines.append(f"| {TITLES[theirs]} | {' | '.join(_ratio(cells[name, theirs]) for name in ours)} |")
    return lines


def _ratio(each: Mapping[str, Any]) -> str:
    found = f"{each['median']:.2f} ({each['lowest']:.2f} - {each['highest']:.2f})"
    if each["target"] is None:
        return found
    return f"{found}, target {each['target']:g}: {'met' if each['met'] else '**not met**'}"


def _setting_lines(result: Mapping[str, Any]) -> list[str]:
    settings = [
        f"{TITLES[name]}: " + ", ".join(f"{key} {value}" for key, value in each["chosen"].items())
        for name, each in result["tuning"].items()
        if each["tried"]
    ]
    absent = [f"{TITLES[name]} is absent: {reason}." for name, reason in result["absent"].items()]
    chosen = f"Settings, the fastest of those tried on {result['sample']} notes: {'; '.join(settings)}. "
    return [
        (chosen if settings else "") + "With reuse the rate is that of the corpus once, since its copies would cost "
        "nothing.",
        *absent,
    ]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The contenders' rates as bars, with the range of the rounds."""
    from matplotlib.figure import Figure

    summary = result["summary"]
    names = sorted(summary, key=lambda name: summary[name]["rate"])
    rate = [summary[name]["rate"] for name in names]
    low = [summary[name]["rate"] - min(summary[name]["rates"]) for name in names]
    high = [max(summary[name]["rates"]) - summary[name]["rate"] for name in names]
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = ["#1b6ca8" if name in OURS else "#c9c9c9" for name in names]
    axes.barh([TITLES[name] for name in names], rate, xerr=[low, high], color=colours)
    axes.set(title=f"{result['model']['title']}: notes per second", xlim=(0, None))
    figure.savefig(path, dpi=120)


def _check_model(name: str, model: Model) -> None:
    for path in (model.checkpoint, model.bundle):
        if not path.is_dir():
            raise SystemExit(f"--model {name}: no {path.relative_to(common.ROOT)}; make it with: {model.builder}")


def main() -> None:
    """Measure, write ``results/annotate-MODEL.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="JSONL with note_id and text")
    parser.add_argument("--notes", type=int, metavar="N", help="take N of the notes, evenly spread; base: 24")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4], help="copies of the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=runtime.available_cpus())
    parser.add_argument("--only", nargs="+", choices=TITLES, metavar="NAME", help=", ".join(TITLES))
    parser.add_argument("--skip-equality", action="store_true")
    parser.add_argument("--edsnlp-python", type=Path, default=common.ROOT / ".venv-edsnlp/bin/python")
    given = parser.parse_args()
    if len(set(given.sizes)) < 2:
        parser.error("--sizes: a slope needs two sizes")
    model = MODELS[given.model]
    _check_model(given.model, model)
    # Each contender's own defaults hold, whatever the shell says; and nothing looks for a network.
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"

    notes = common.every_kth(read_notes(given.corpus), given.notes or (24 if model.random else None))
    every = contenders(model, given.threads, given.edsnlp_python)
    chosen = {name: rival for name, rival in every.items() if name in (given.only or every)}
    absent = {}
    if "edsnlp" in chosen and not given.edsnlp_python.is_file():
        del chosen["edsnlp"]
        absent["edsnlp"] = "its environment was not there"
        common.say(f"EDS-NLP is left out: no such file: {given.edsnlp_python}; for the default path: {INSTALL_EDSNLP}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checked = model.random or given.skip_equality
        equal = None if checked else equality(every, notes, model.bundle, folder)
        measured = measure(model, chosen, notes, given.sizes, given.rounds, folder)
    bundle = bundles.load(model.bundle)
    result = {
        "model": {
            "name": given.model,
            "title": model.title,
            "random": model.random,
            "sha256": {precision: variant.sha256 for precision, variant in bundle.variants.items()},
        },
        "corpus": {
            "name": given.corpus.name if given.corpus != CORPUS else "ACI-BENCH",
            "notes": len(notes),
            "characters": sum(len(note.text) for note in notes),
            "sizes": given.sizes,
        },
        "threads": given.threads,
        "rounds": given.rounds,
        "sample": min(SAMPLE, len(notes)),
        "equality": equal,
        "absent": absent,
        **measured,
        "ratios": ratio_table(measured["summary"], TARGETS[given.model]),
    }
    path = common.write(f"annotate-{given.model}", result)
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
