"""What medner does on a GPU, in one call; ``gpu.sh`` says how.

    python benchmarks/gpu.py -o OUT [--devices 0,1] [--models base,minilm] [--checkpoint base=DIR] [--seconds 420]

Steps, each of which is left out where time is short, and recorded where it fails: ``medner doctor``; ``medner train``
of each model from random weights, on generated sentences that the default bundle labels; ``medner export`` to fp32 and
fp16; spans of fp16 on the device against PyTorch's fp32; tokens a second of the model alone, beside PyTorch's fp16 with
its fused attention on the same batches; ``medner annotate`` from file to Parquet, with the share of time for which the
GPU waited; ``medner compare``. A checkpoint of your own takes the place of the trained one, and where the NCBI Disease
documents are at hand (MEDNER_DATA), spans are found in those.

Writes ``results.json``, ``results.md``, ``alone.png``, ``doctor.json`` and the folders of ``medner compare``.
``--devices cpu --models tiny`` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import build_base
import common
import numpy as np
import torch
import transformers

from medner import bundle as bundles
from medner import compare, datasets, evaluate, runtime, score, windows
from medner.annotate import Annotator, Ints, Options
from medner.datasets import Document
from medner.pytorch import TorchModel

DOCUMENTS = common.DATA / "ncbi-disease" / "pubtator"
NOTES = common.ROOT / "examples" / "notes.jsonl"
MEDNER = (sys.executable, "-P", "-m", "medner.cli")
SEED = 13
#: After which a command of medner is stopped; no step begins after --seconds, so that both together fit ten minutes.
COMMAND_SECONDS, SECONDS = 150, 420
#: Rows of a part where several devices share the parts, so that each gets about as many.
SHARED_ROWS = 1_000
#: Goals on an H200 for BERT-base in fp16: tokens a second of the model alone, and the share of it from file to Parquet.
GOAL_TOKENS, GOAL_SHARE, GOAL_F1 = 2.2e6, 0.8, 0.002


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is done.

    labelled: generated sentences to train on, so many epochs at that peak learning rate; batch_sizes: of the trainings
    of the first model that are timed, of which the first is the one that counts. lengths: tokens of the windows, and
    budgets: padded tokens of a call, of the model alone; seconds: of each such cell. corpus: characters of the
    generated notes that are annotated from file to Parquet, in a first and a second run. compared: notes for ``medner
    compare``.
    """

    labelled: int = 6_000
    epochs: int = 2
    lr: float = 1e-4
    batch_sizes: tuple[int, ...] = (32, 128)
    lengths: tuple[int, ...] = (16, 32, 64, 128)
    budgets: tuple[int, ...] = (8_192, 32_768, 131_072)
    seconds: float = 0.6
    corpus: tuple[int, int] = (20_000_000, 80_000_000)
    compared: int = 60


#: To try the program where there is no GPU.
REHEARSAL = Sizes(600, 4, 5e-3, (16,), (16, 32), (512,), 0.05, (20_000, 80_000), 4)

MODELS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
        "hidden_act": "relu",
    },
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


# ---------------------------------------------------------------------------------------------------------------------
# Notes


def sentences() -> list[str]:
    """Segments of the example notes."""
    texts = [json.loads(line)["text"] for line in NOTES.read_text(encoding="utf-8").splitlines()]
    return [text[a:b] for text in texts for a, b in pairwise(windows.segments(text))]


def generated(characters: int, seed: int) -> list[str]:
    """Notes of about 2,600 characters from the example notes' sentences, with other digits, so that few are equal."""
    draw = random.Random(seed)
    pool = sentences()
    digits = str.maketrans({str(n): f"{{{n}}}" for n in range(10)})
    forms = [text.replace("{", "(").replace("}", ")").translate(digits) for text in pool]
    notes: list[str] = []
    size = 0
    while size < characters:
        parts: list[str] = []
        length = 0
        while length < 2_600:
            parts.append(draw.choice(forms).format(*(draw.randint(0, 9) for _ in range(10))))
            length += len(parts[-1])
        notes.append(f"Visit {draw.randint(1, 10**9)}. " + "".join(parts))
        size += len(notes[-1])
    return notes


def write_notes(path: Path, notes: Sequence[str]) -> None:
    """As JSONL."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in notes), encoding="utf-8")


def write_labelled(folder: Path, count: int) -> None:
    """Splits of single sentences labelled by the default bundle, one in ten for devel."""
    lines = (line for note in generated(100 * count, SEED + 2) for line in note.splitlines() if line.strip())
    texts = list(dict.fromkeys(lines))[:count]
    found = evaluate.find(Annotator.load("default", Options(device="cpu")), [Document("", text, ()) for text in texts])
    rows = [
        json.dumps(
            {"id": str(i), "text": text, "spans": [{"start": a, "end": b, "label": label} for a, b, label in spans]}
        )
        for i, (text, spans) in enumerate(zip(texts, found, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    held_out = len(rows) // 10
    for split, part in (("devel", rows[:held_out]), ("train", rows[held_out:])):
        (folder / f"{split}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def command(*arguments: object, codes: Sequence[int] = (0,), device: str = "") -> str:
    """What a command of medner prints; RuntimeError with what it says where its exit code is another.

    device: the only one that it may see, where it would take all. Raises TimeoutExpired after :data:`COMMAND_SECONDS`.
    """
    seen = {"CUDA_VISIBLE_DEVICES": device.partition(":")[2]} if device else {}
    done = subprocess.run(
        [*MEDNER, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS,
        env=os.environ | seen,
    )  # fmt: skip
    if done.returncode not in codes:
        raise RuntimeError(f"medner {arguments[0]} gave exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def doctor(device: str, out: Path) -> dict[str, Any]:
    """States of its findings by check."""
    said = command("doctor", "--device", device, "--json", codes=(0, 1))
    (out / "doctor.json").write_text(said, encoding="utf-8")
    return {finding["check"]: finding["state"] for finding in json.loads(said)["findings"]}


def training(
    name: str, work: Path, data: Path, device: str, sizes: Sizes, batch_sizes: Sequence[int]
) -> dict[str, Any]:
    """Train a model from random weights with each batch size; the first checkpoint is used in what follows."""
    base = work / name / "random"
    build_base.write_checkpoint(transformers.BertConfig(**MODELS[name]), base)
    found = {}
    for number, batch_size in enumerate(batch_sizes):
        output = work / name / ("trained" if not number else f"batch-{batch_size}")
        command(
            "train", "--data", data, "--base", base, "-o", output, "--epochs", sizes.epochs, "--batch-size", batch_size,
            "--lr", sizes.lr, device=device,
        )  # fmt: skip
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        wanted = ("windows_per_second", "seconds", "precision", "device")
        found[str(batch_size)] = {key: metrics[key] for key in wanted} | {"f1": metrics["best"]["f1"]}
    return found


def exporting(name: str, work: Path, checkpoint: Path, notes: Path) -> dict[str, Any]:
    """Export fp32 and fp16 with the gate on the CPU; packed windows, which leave a GPU less to do beside the tokens."""
    start = time.perf_counter()
    command(
        "export", checkpoint, "-o", work / name / "bundle", "--precision", "fp32", "--precision", "fp16",
        "--parity-data", notes, "--window", 128,
    )  # fmt: skip
    report = bundles.load(work / name / "bundle").card["parity"]
    return {"seconds": time.perf_counter() - start, "operators": report["fp16_operators"]}


def spans(name: str, work: Path, checkpoint: Path, device: str, documents: Sequence[Document]) -> dict[str, Any]:
    """Spans and F1 of fp16 on the device against PyTorch's fp32 there."""
    path = work / name / "bundle"
    exported = Annotator.load(path, Options(device=device, precision="fp16"))
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = Annotator(exported.bundle, TorchModel(checkpoint, "fp32", device), Options(), precision="fp32")
    ours, theirs = (evaluate.find(annotator, documents) for annotator in (exported, reference))
    keys = [[(n, *span) for n, found in enumerate(each) for span in found] for each in (ours, theirs)]
    gold = evaluate.fit_labels(exported, documents)
    labelled = any(document.spans for document in documents)
    return {
        "documents": len(documents),
        "spans": len(keys[1]),
        "agreement": score.agreement(*keys),
        "f1": score.evaluate(gold, ours).overall.f1 if labelled else None,
        "reference_f1": score.evaluate(gold, theirs).overall.f1 if labelled else None,
    }


class TorchBest:
    """PyTorch's likeliest classes in half precision (on a CPU: fp32) with scaled dot product attention."""

    def __init__(self, checkpoint: Path, device: str) -> None:
        kind = torch.float32 if device == "cpu" else torch.float16
        model = transformers.AutoModelForTokenClassification.from_pretrained(
            checkpoint, dtype=kind, attn_implementation="sdpa"
        )
        self._model = model.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def best(self, ids: Ints, lengths: Ints) -> tuple[Any, Any]:
        """As :meth:`medner.runtime.Session.best`: from the host and back."""
        mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)).to(self._device)
        logits = self._model(input_ids=torch.from_numpy(ids).to(self._device), attention_mask=mask).logits
        probabilities, tags = logits.float().softmax(dim=-1).max(dim=-1)
        return tags.to(torch.int16).cpu().numpy(), probabilities.cpu().numpy()


def alone(name: str, work: Path, checkpoint: Path, device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Tokens a second of medner's session and of PyTorch, in turns, on full windows of random tokens."""
    path = work / name / "bundle"
    session = runtime.Session(path / bundles.VARIANT_FILES["fp16"], device)
    engines = {"medner": session.best, "pytorch": TorchBest(checkpoint, device).best}
    draw = np.random.default_rng(SEED)
    cells = []
    for length in sizes.lengths:
        for budget in sizes.budgets:
            ids = draw.integers(1000, 20_000, (max(1, budget // length), length))
            times = in_turns(engines, ids, sizes.seconds)
            rates = {engine: ids.size / statistics.median(each) for engine, each in times.items()}
            cells.append({"length": length, "budget": budget, "calls": len(times["medner"]), **rates})
    return cells


def in_turns(engines: Mapping[str, Callable[[Ints, Ints], Any]], ids: Ints, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call; after two calls of each, which plan kernels, they take turns."""
    lengths = np.full(len(ids), ids.shape[1])
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for ask in engines.values():
        for _ in range(2):
            ask(ids, lengths)
    end = time.perf_counter() + seconds
    while not times["pytorch"] or time.perf_counter() < end:
        for engine, ask in engines.items():
            start = time.perf_counter()
            ask(ids, lengths)
            times[engine].append(time.perf_counter() - start)
    return times


def whole(name: str, work: Path, device: str, corpora: Sequence[Path], more: Sequence[object] = ()) -> dict[str, Any]:
    """From file to Parquet without reuse: the slope between two corpora, so that start-up is counted apart.

    more: options for every run. The second run has the first one's budget, for equal batches.
    """
    runs: list[Any] = []
    for number, corpus in enumerate(corpora):
        output = work / name / f"run-{len(runtime.devices(device))}-{number}"
        command(
            "annotate", corpus, "-o", output, "--model", work / name / "bundle", "--device", device,
            "--precision", "fp16", "--no-reuse", "--overwrite", "--quiet", *more,
            *(["--batch-tokens", runs[0]["options"]["batch_tokens"]] if runs and "--batch-tokens" not in more else []),
        )  # fmt: skip
        runs.append(json.loads((output / "manifest.json").read_text(encoding="utf-8")))
    return slope(runs[0], runs[1], len(runtime.devices(device)))


def slope(small: Mapping[str, Any], large: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """Rates between two manifests. tokens: special ones included; waited: share of the time without inference."""

    def more(*names: str) -> float:
        a, b = small, large
        for key in names:
            a, b = a[key], b[key]
        return float(b) - float(a)  # type: ignore[arg-type]

    seconds = more("seconds")
    return {
        "device": large["model"]["device"],
        "batch_tokens": large["options"]["batch_tokens"],
        "notes": large["counts"]["rows"],
        "seconds": large["seconds"],
        "notes_per_second": more("counts", "rows") / seconds,
        "tokens_per_second": (more("counts", "tokens") + 2 * more("counts", "windows")) / seconds,
        "window": large["counts"]["tokens"] / large["counts"]["windows"] + 2,
        "waited": max(0.0, 1 - more("stages", "inferring") / seconds / devices),
        "stages": {name: more("stages", name) / seconds for name in large["stages"]},
        "tables": same_tables(large),
    }


def same_tables(manifest: Mapping[str, Any]) -> str:
    """One digest of all the tables' digests, to compare the runs of one and of several devices."""
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def comparing(
    name: str, work: Path, checkpoint: Path, device: str, notes: Path, out: Path, sizes: Sizes
) -> dict[str, Any]:
    """``medner compare``; its exit code is 1 where an engine fails parity."""
    target = out / f"compare-{name}"
    command(
        "compare", "--checkpoint", checkpoint, "--bundle", work / name / "bundle", "--notes", notes,
        "-o", target, "--device", device, "--rounds", 2, "--limit", sizes.compared, "--overwrite", codes=(0, 1),
    )  # fmt: skip
    found = json.loads((target / "compare.json").read_text(encoding="utf-8"))["engines"]
    return {
        engine: {key: each[key] for key in ("p50_ms", "notes_per_second", "tokens_per_second", "peak_mib")}
        | {"passed": each["parity"]["passed"]}
        for engine, each in found.items()
    }


def ceiling(device: str, n: int) -> float:
    """TFLOP/s of one large half-precision product, on random data."""
    kind = torch.float32 if device == "cpu" else torch.float16
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(kind) for _ in range(2))
    wait = (lambda: torch.cuda.synchronize(device)) if device != "cpu" else lambda: None
    times = []
    for number in range(13):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        if number > 2:
            times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times) / 1e12


def flops(name: str, length: int) -> float:
    """Floating-point operations of a token: the matrix products of the layers, attention's own included."""
    config = transformers.BertConfig(**MODELS[name])
    h, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    return layers * (2 * (4 * h * h + 2 * h * inner) + 4 * length * h)


# ---------------------------------------------------------------------------------------------------------------------
# All of it


class Steps:
    """Runs steps one after another; one that fails or does not fit is recorded, and the next one begins."""

    def __init__(self, seconds: float, save: Callable[[], None] = lambda: None) -> None:
        """save: called after each step, so that what was found is there whatever happens next."""
        self._end = time.monotonic() + seconds
        self._save = save
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def run(self, found: dict[str, Any], key: str, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        """Put what the step gives, or None, under a key of what was found, and return it."""
        found[key] = self._try(name, step, *arguments)
        self._save()
        return found[key]

    def _try(self, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        if time.monotonic() > self._end:
            self.failed[name] = "no time left"
            return None
        start = time.monotonic()
        try:
            return step(*arguments)
        except Exception as exc:  # whatever goes wrong on that machine is part of the result
            self.failed[name] = f"{type(exc).__name__}: {exc}"[:1000]
            common.say(f"{name}: {self.failed[name]}")
            return None
        finally:
            self.seconds[name] = round(time.monotonic() - start, 1)
            common.say(f"{name}: {self.seconds[name]} s")


def measure(
    devices: str, models: Sequence[str], given: Mapping[str, Path], out: Path, seconds: float
) -> dict[str, Any]:
    """Everything, as ``results.json`` holds it. given: checkpoints by model."""
    cpu = devices == "cpu"
    every = "cpu" if cpu else f"cuda:{devices}"
    device = runtime.devices(every)[0]
    sizes = REHEARSAL if cpu else Sizes()
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "date": time.strftime("%Y-%m-%d"),
        "devices": every,
        "models": {},
    }

    def save() -> None:
        whole_result = result | {"seconds": steps.seconds, "failed": steps.failed}
        (out / "results.json").write_text(json.dumps(whole_result, indent=1) + "\n", encoding="utf-8")

    steps = Steps(seconds, save)
    steps.run(result, "machine", "machine", compare.machine, device)
    with tempfile.TemporaryDirectory(prefix="medner-gpu-") as folder:
        work = Path(folder)
        data, few, corpora = work / "labelled", work / "few.jsonl", [work / f"corpus-{n}.jsonl" for n in range(2)]
        write_notes(few, generated(60_000, SEED))
        for corpus, characters in zip(corpora, sizes.corpus, strict=True):
            write_notes(corpus, generated(characters, SEED + 1))
        write_labelled(data, sizes.labelled)
        steps.run(result, "doctor", "doctor", doctor, device, out)
        steps.run(result, "ceiling_tflops", "ceiling", ceiling, device, 512 if cpu else 8192)
        for name in models:
            one: dict[str, Any] = {}
            result["models"][name] = one
            batch_sizes = sizes.batch_sizes if name == models[0] else sizes.batch_sizes[:1]
            steps.run(one, "training", f"{name}: training", training, name, work, data, device, sizes, batch_sizes)
            checkpoint = given.get(name, work / name / "trained")
            if steps.run(one, "export", f"{name}: export", exporting, name, work, checkpoint, few) is None:
                continue
            labelled = DOCUMENTS if name in given and DOCUMENTS.is_dir() else data
            one["documents"] = "NCBI Disease documents" if labelled == DOCUMENTS else "generated sentences"
            documents = datasets.load(str(labelled), "devel")
            steps.run(one, "spans", f"{name}: spans", spans, name, work, checkpoint, device, documents)
            steps.run(one, "alone", f"{name}: alone", alone, name, work, checkpoint, device, sizes)
            shared = ["--part-rows", SHARED_ROWS] if every != device else []
            run = steps.run(one, "whole", f"{name}: whole", whole, name, work, device, corpora, shared)
            if every != device and run is not None:
                same = [*shared, "--batch-tokens", run["batch_tokens"]]
                steps.run(one, "whole_several", f"{name}: several devices", whole, name, work, every, corpora, same)
            steps.run(one, "compare", f"{name}: compare", comparing, name, work, checkpoint, device, few, out, sizes)
    return result | {"seconds": steps.seconds, "failed": steps.failed}


def summary(result: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    machine = result["machine"] or {"gpu": None, "processor": "an unknown machine", "cpus": "?", "versions": {}}
    lines = [
        f"# medner on {machine['gpu'] or machine['processor']}",
        "",
        f"{result['date']}, {machine['cpus']} CPUs, {result['devices']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        + f"; {sum(result['seconds'].values()):.0f} s in all.",
        "",
    ]
    if result["ceiling_tflops"]:
        lines += [f"A large product runs at {result['ceiling_tflops']:.3g} TFLOP/s.", ""]
    for name, one in result["models"].items():
        lines += [f"## {name}", ""]
        for part, told in _PARTS.items():
            if one.get(part):
                lines += [*told(name, one, result), ""]
    lines += [f"- **{name}: failed**: {reason}" for name, reason in result["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _training(_: str, one: Mapping[str, Any], __: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {size} | {each['windows_per_second']:,.0f} | {each['seconds']:.0f} | {each['precision']} |"
        for size, each in one["training"].items()
    ]
    return ["| batch size of training | windows/s | seconds in all | precision |", "|---|---:|---:|---|", *rows]


def _spans(_: str, one: Mapping[str, Any], __: Mapping[str, Any]) -> list[str]:
    held = one["spans"]
    where = f"{held['documents']} {one['documents']}"
    line = f"fp16 finds {held['agreement']:.2%} of PyTorch's {held['spans']:,} spans in {where}"
    if held["f1"] is not None:
        met = abs(held["f1"] - held["reference_f1"]) <= GOAL_F1
        line += f"; F1 {held['f1']:.4f} against {held['reference_f1']:.4f} (within {GOAL_F1}: {'yes' if met else 'no'})"
    return [line + "."]


def _alone(name: str, one: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {cell['length']} | {cell['budget']:,} | {cell['medner']:,.0f} | {cell['pytorch']:,.0f} | "
        f"{cell['medner'] / cell['pytorch']:.2f}x | {share(name, cell, result)} |"
        for cell in one["alone"]
    ]
    best = max(cell["medner"] for cell in one["alone"])
    goal = [f"The best is {best:,.0f} tokens/s ({GOAL_TOKENS:,.0f} asked of an H200)."] if name == "base" else []
    return [
        "| window | tokens of a call | medner, tokens/s | PyTorch, tokens/s | ratio | of the ceiling |",
        "|---:|---:|---:|---:|---:|---:|",
        *rows,
        *(["", *goal] if goal else []),
    ]


def share(name: str, cell: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """How much of the rate of a large product the model reaches, as a percentage."""
    if not result["ceiling_tflops"]:
        return "-"
    return f"{cell['medner'] * flops(name, cell['length']) / 1e12 / result['ceiling_tflops']:.0%}"


def _whole(_: str, one: Mapping[str, Any], __: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in ("whole", "whole_several"):
        if not (run := one.get(part)):
            continue
        lines.append(
            f"From file to Parquet on {run['device']}: {run['notes_per_second']:,.0f} notes/s, "
            f"{run['tokens_per_second']:,.0f} tokens/s in windows of {run['window']:.0f}; the device waited "
            f"{run['waited']:.0%} of the time. Seconds of work a second: "
            + ", ".join(f"{stage} {value:.2f}" for stage, value in run["stages"].items())
            + "."
        )
    if one.get("alone"):
        near = min({cell["length"] for cell in one["alone"]}, key=lambda length: abs(length - one["whole"]["window"]))
        best = max(cell["medner"] for cell in one["alone"] if cell["length"] == near)
        reached = one["whole"]["tokens_per_second"] / best
        lines.append(f"One device reaches {reached:.0%} of the model alone at {near} tokens ({GOAL_SHARE:.0%} asked).")
    if one.get("whole_several"):
        same = one["whole"]["tables"] == one["whole_several"]["tables"]
        lines.append(f"Several devices wrote {'the same bytes' if same else '**other bytes**'}.")
    return lines


def _compare(name: str, one: Mapping[str, Any], _: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {engine} | {each['p50_ms']:.1f} | {each['notes_per_second']:,.1f} | {each['peak_mib']:,.0f} | "
        f"{'passes' if each['passed'] else 'FAILS'} |"
        for engine, each in one["compare"].items()
    ]
    head = [
        "| `medner compare` | p50 of a note, ms | notes/s | peak memory, MiB | parity |",
        "|---|---:|---:|---:|---|",
    ]
    return [*head, *rows, "", f"![compare](compare-{name}/compare.png)"]


_PARTS = {"training": _training, "spans": _spans, "alone": _alone, "whole": _whole, "compare": _compare}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Tokens a second of the model alone by window and budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: one["alone"] for name, one in result["models"].items() if one.get("alone")}
    figure = Figure(figsize=(5.5 * max(1, len(shown)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, cells) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), number)
        for engine, line in (("medner", "o-"), ("pytorch", "s--")):
            for shade, budget in enumerate(sorted({cell["budget"] for cell in cells})):
                mine = [cell for cell in cells if cell["budget"] == budget]
                colour = {"medner": "#1f77b4", "pytorch": "#d95f02"}[engine]
                axes.plot(
                    [cell["length"] for cell in mine], [cell[engine] / 1e6 for cell in mine], line, color=colour,
                    alpha=0.4 + 0.2 * shade, label=f"{engine}, {budget:,} tokens a call",
                )  # fmt: skip
        axes.set(xlabel="tokens of a window", ylabel="million tokens/s", title=name, ylim=(0, None))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--devices", default="0", help="numbers of the GPUs, such as 0,1; or cpu for a rehearsal")
    parser.add_argument("--models", default="base,minilm", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="MODEL=DIR", help="a fine-tuned one instead of our own"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no step begins")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    checkpoints = {name: Path(path) for name, _, path in (each.partition("=") for each in given.checkpoint)}
    result = measure(given.devices, given.models.split(","), checkpoints, given.output, given.seconds)
    (given.output / "results.md").write_text(summary(result), encoding="utf-8")
    draw(result, given.output / "alone.png")
    print(summary(result))
    if result["failed"]:
        raise SystemExit(f"failed: {', '.join(result['failed'])}")


if __name__ == "__main__":
    main()
