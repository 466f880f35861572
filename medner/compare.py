"""A PyTorch checkpoint against its ONNX bundle on the user's notes: parity first, then speed, memory and size.

Every engine gets equal windows and its own best setting. In each round every engine runs once, alone, in a fresh
process; a speed-up is the median of the rounds' own ratios, and is given only to what finds PyTorch's spans.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from medner import bundle as bundles
from medner import comparison, engines, parity, runtime
from medner.engines import Engine, Setting
from medner.errors import CheckFailed, DeviceError, MissingPackage, ModelError, UsageError, install
from medner.parity import LogitParity, ParityData, VariantParity
from medner.pytorch import TorchModel, device_name, weight_bytes

#: Padded tokens of a call that are tried, by device, and how often each is.
BUDGETS = {"cpu": (256, 512, 2048, 8192), "cuda": (2048, 8192, 32_768, 65_536)}
TRIES = 2
#: PyTorch's precisions, and the ones of a bundle that run on a device.
TORCH_PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16")}
ONNX_PRECISIONS = {"cpu": ("fp32", "int8", "fp16"), "cuda": ("fp32", "fp16")}

#: Characters of the notes that are streamed, by device; about four a token.
STREAM_CHARS = {"cpu": 60_000, "cuda": 4_000_000}
#: Seconds for which they are streamed, over and over, in each round.
STREAM_SECONDS = 2.0
#: Notes that are annotated one at a time in each round, and while settings are tried.
LATENCY_NOTES, TRIED_NOTES = 40, 8

REFERENCE = "pytorch fp32"

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What is compared.

    notes: labelled documents or plain notes, as the parity gate takes them. split: of a data set that has splits.
    labels: new names of its labels, by old ones. limit: notes used at most, spread evenly over the file. rounds: turns
    of each engine. device: auto, cpu or cuda:N. threads: CPU threads of every engine; None takes the CPUs there are, on
    CUDA one. text_column: of plain notes.
    """

    checkpoint: Path
    bundle: str
    notes: str
    output: Path
    split: str = "devel"
    labels: Mapping[str, str] = field(default_factory=dict)
    limit: int = 200
    rounds: int = 5
    device: str = "auto"
    threads: int | None = None
    text_column: str = "text"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Take paths of any kind; raise :class:`UsageError` where a value lies outside its range."""
        for name in ("checkpoint", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("bundle", "notes"):
            object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("limit", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: at least 1 is needed")


def compare(options: CompareOptions) -> dict[str, Any]:
    """Compare, write :data:`comparison.FILES` and return what ``compare.json`` holds; :func:`check_parity` judges it.

    Raises :class:`ModelError` where bundle and checkpoint do not belong together, :class:`InputError` where PyTorch
    finds no span in the notes, :class:`MissingPackage`, :class:`DeviceError`, :class:`OutputError`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage(f'comparing needs the extra "train": {install("train")}')
    bundle = check_pair(options.checkpoint, options.bundle)
    device = runtime.resolve_device(options.device)
    contenders = contenders_of(options.checkpoint, bundle, device)
    threads = options.threads or (runtime.available_cpus() if device == "cpu" else 1)
    read = parity.read_parity_data(options.notes, options.split, options.text_column, options.labels)
    data = ParityData(read.name, spread(read.documents, options.limit), read.labelled)
    work = work_of(data, device)
    comparison.prepare(options.output, overwrite=options.overwrite)

    with contextlib.closing(_Progress(len(contenders) * (2 + options.rounds))) as progress:
        logits, held = prove(contenders, bundle, data, threads, progress)
        tried = {engine.name: try_settings(engine, threads, work, progress) for engine in contenders}
        best = {name: best_of(trials) for name, trials in tried.items()}
        rounds = take_turns(contenders, best, work, options.rounds, progress)

    result = {
        "medner": version("medner"),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "device": device,
        "threads": threads,
        "rounds": options.rounds,
        "checkpoint": {"name": options.checkpoint.name, "bytes": weight_bytes(options.checkpoint)},
        "bundle": {
            "name": bundle.name,
            "window": bundle.window,
            "packed": bundle.packed,
            "labels": list(bundle.labels),
            "variants": {name: asdict(variant) for name, variant in bundle.variants.items()},
        },
        "notes": {
            "name": data.name,
            "notes": len(data.documents),
            "characters": sum(len(document.text) for document in data.documents),
            "labelled": data.labelled,
            "streamed": len(work.stream),
            "one_at_a_time": len(work.sample),
        },
        "reference": REFERENCE,
        "logits": asdict(logits) if logits.tokens else None,
        "engines": {
            engine.name: {
                "parity": asdict(held[engine.name]),
                "failure": failure(engine, held[engine.name], logits),
                "file_bytes": _file_bytes(engine, bundle),
                **typical([measured[engine.name] for measured in rounds]),
                "speedup": speedups(engine.name, [name for name in held if held[name].passed], rounds),
                "best": {name: asdict(setting) for name, setting in best[engine.name].items()},
                "tried": tried[engine.name],
                "rounds": [measured[engine.name] for measured in rounds],
            }
            for engine in contenders
        },
    }
    comparison.write(options.output, result)
    return result


def check_parity(result: Mapping[str, Any]) -> None:
    """Raise :class:`CheckFailed` where an ONNX variant of a finished comparison fails parity."""
    failed = {name: engine["failure"] for name, engine in result["engines"].items() if name.startswith("onnx")}
    said = [f"{name} failed: {failure}" for name, failure in failed.items() if failure]
    if said:
        raise CheckFailed(
            f"parity on {result['notes']['name']}: {'; '.join(said)}; its figures are given without a speed-up"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Before any time


def check_pair(checkpoint: Path, model: str) -> bundles.Bundle:
    """The bundle, which must be intact and of the checkpoint's labels, tokenizer and weights, else a ModelError."""
    trained, bundle = bundles.load_checkpoint(checkpoint), bundles.load(model)
    bundle.check()
    if trained.labels != bundle.labels:
        raise ModelError(
            f"{model}: its labels ({', '.join(bundle.labels)}) are not those of {checkpoint} "
            f"({', '.join(trained.labels)}); compare a bundle with the checkpoint that it was exported from"
        )
    if _tokenizer(trained) != _tokenizer(bundle):
        raise ModelError(
            f"{model}: its tokenizer.json is not that of {checkpoint}; "
            "compare a bundle with the checkpoint that it was exported from"
        )
    made_of = bundle.card.get("checkpoint")
    if isinstance(made_of, dict) and not made_of.items() <= bundles.weight_hashes(checkpoint).items():
        raise ModelError(
            f"{model}: was exported from other weights than those of {checkpoint}; "
            "compare a bundle with the checkpoint that it was exported from"
        )
    return bundle


def _tokenizer(bundle: bundles.Bundle) -> dict[str, Any]:
    """A tokenizer's description without what other tools leave in it, and medner overrides."""
    described: dict[str, Any] = json.loads(bundle.tokenizer_json())
    return {key: value for key, value in described.items() if key not in ("truncation", "padding")}


def contenders_of(checkpoint: Path, bundle: bundles.Bundle, device: str) -> list[Engine]:
    """PyTorch fp32 first, its reduced precision, then each variant of the bundle that runs on the device.

    Raises :class:`DeviceError` where none of them does.
    """
    kind = device.partition(":")[0]
    variants = [precision for precision in ONNX_PRECISIONS[kind] if precision in bundle.variants]
    if not variants:
        raise DeviceError(
            f"--device {device}: none of the variants of {bundle.name} ({', '.join(bundle.variants)}) is for it; "
            "use --device cpu"
        )
    both = [("pytorch", precision) for precision in TORCH_PRECISIONS[kind]] + [("onnx", name) for name in variants]
    return [Engine(*each, str(checkpoint), bundles.reference(bundle.path), device) for each in both]


def prove(
    contenders: Sequence[Engine],
    bundle: bundles.Bundle,
    data: ParityData,
    threads: int,
    progress: _Progress,
) -> tuple[LogitParity, dict[str, VariantParity]]:
    """Hold every engine against PyTorch fp32 by the rule of the parity gate.

    Gives the comparison of logits (of no token without an fp32 variant), and each engine's result by name. Raises
    :class:`InputError` where PyTorch finds no span.
    """
    reference = TorchModel(contenders[0].checkpoint, "fp32", contenders[0].device)
    # Each of the annotator's threads makes calls of its own.
    reference.use_threads(1)
    gate = parity.Gate(bundle, reference, data, threads)
    held: dict[str, VariantParity] = {}
    # The fp32 variant goes first, since its logits are compared while PyTorch's spans are found.
    for engine in sorted(contenders, key=lambda engine: engine.name != "onnx fp32"):
        progress.step(f"parity: {engine.name}")
        if engine.name == REFERENCE:
            held[engine.name] = gate.of_reference()
        else:
            held[engine.name] = gate.hold(engine.precision, engines.load(engine)[1])
        result = held[engine.name]
        progress.say(
            f"{engine.name}: {result.agreement:.2%} of spans equal {REFERENCE}'s: {comparison.verdict(result.passed)}"
        )
    return gate.report.logits, held


def failure(engine: Engine, held: VariantParity, logits: LogitParity) -> str | None:
    """Why an engine fails parity, None where it passes."""
    return None if held.passed else parity.shortfall(engine.precision, held, logits)


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most so many of the items, taken evenly over all of them, in their order."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Times


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed. stream: notes that are streamed; sample: notes that are annotated one at a time.

    budgets: padded tokens of a call that are tried.
    """

    stream: list[str]
    sample: list[str]
    budgets: tuple[int, ...]


def work_of(data: ParityData, device: str) -> Work:
    """Notes for a few seconds of work, taken evenly over all of them."""
    kind = device.partition(":")[0]
    texts = [document.text for document in data.documents]
    average = max(1.0, sum(map(len, texts)) / len(texts))
    return Work(spread(texts, max(1, int(STREAM_CHARS[kind] / average))), spread(texts, LATENCY_NOTES), BUDGETS[kind])


def try_settings(engine: Engine, threads: int, work: Work, progress: _Progress) -> list[dict[str, float]]:
    """Speed in every setting that the engine may use: the best of a few tries each, in turn.

    A try is one pass over the stream, and the median of a few single notes.
    """
    progress.step(f"{engine.name}: looking for its best batch")
    settings = engines.settings(engine.family, threads, work.budgets)
    rates: list[list[float]] = [[] for _ in settings]
    latencies: list[list[float]] = [[] for _ in settings]
    with engines.Process(engine) as process:
        process.take(work.stream, work.sample)
        for _ in range(TRIES):
            for number, setting in enumerate(settings):
                rates[number].append(process.throughput(setting, 0.0).notes_per_second)
                latencies[number].append(1000 * statistics.median(process.latencies(setting, TRIED_NOTES)))
    return [
        asdict(setting) | {"notes_per_second": max(rates[number]), "latency_ms": min(latencies[number])}
        for number, setting in enumerate(settings)
    ]


def best_of(trials: Sequence[Mapping[str, Any]]) -> dict[str, Setting]:
    """The settings of the highest ``throughput`` and of the lowest ``latency`` among those tried."""
    fastest = max(trials, key=lambda trial: trial["notes_per_second"])
    quickest = min(trials, key=lambda trial: trial["latency_ms"])
    return {
        name: Setting(trial["batch_tokens"], trial["calls"], trial["threads_per_call"])
        for name, trial in (("throughput", fastest), ("latency", quickest))
    }


def take_turns(
    contenders: Sequence[Engine],
    best: Mapping[str, Mapping[str, Setting]],
    work: Work,
    rounds: int,
    progress: _Progress,
) -> list[dict[str, dict[str, float]]]:
    """For each round, the figures of each engine by name."""
    measured: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        measured.append({})
        # Each round begins with another engine, so that none always runs on a machine that has just rested.
        first = number % len(contenders)
        for engine in (*contenders[first:], *contenders[:first]):
            progress.step(f"round {number + 1} of {rounds}: {engine.name}")
            measured[-1][engine.name] = measure(engine, best[engine.name], work)
    return measured


def measure(engine: Engine, best: Mapping[str, Setting], work: Work) -> dict[str, float]:
    """One turn of an engine, in a fresh process: :data:`comparison.FIGURES`."""
    with engines.Process(engine) as process:
        process.take(work.stream, work.sample)
        rate = process.throughput(best["throughput"], STREAM_SECONDS)
        milliseconds = 1000 * np.array(process.latencies(best["latency"], len(work.sample)))
        p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99]).tolist()
        values = (p50, p95, p99, rate.notes_per_second, rate.tokens_per_second)
        return dict(zip(comparison.FIGURES, (*values, process.load_seconds, process.peak_bytes() / 2**20), strict=True))


def typical(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over an engine's rounds."""
    return {name: statistics.median(measured[name] for measured in rounds) for name in comparison.FIGURES}


def speedups(
    name: str, passing: Sequence[str], rounds: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, Any] | None:
    """How many times faster an engine is than each PyTorch engine, of those that pass parity; None where it fails.

    Latency is compared by p50. Each ratio is formed inside a round.
    """
    if name not in passing:
        return None
    return {
        other: {
            "latency": _ratios([figures[other]["p50_ms"] / figures[name]["p50_ms"] for figures in rounds]),
            "throughput": _ratios(
                [figures[name]["notes_per_second"] / figures[other]["notes_per_second"] for figures in rounds]
            ),
        }
        for other in passing
        if other.startswith("pytorch") and other != name
    }


def _ratios(each: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}


def _file_bytes(engine: Engine, bundle: bundles.Bundle) -> int:
    if engine.family == "pytorch":
        return weight_bytes(Path(engine.checkpoint))
    return bundle.variants[engine.precision].bytes


# ---------------------------------------------------------------------------------------------------------------------
# Around it


def machine(device: str) -> dict[str, Any]:
    """The machine, as far as it bears on speed, and the versions of what runs."""
    found = {}
    for package in (
        "medner",
        "onnxruntime",
        "onnxruntime-gpu",
        "tokenizers",
        "torch",
        "transformers",
        "optimum-onnx",
        "numpy",
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {
        "processor": _processor(),
        "cpus": runtime.available_cpus(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "instruction_set": runtime.instruction_set(),
        "gpu": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": found,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class _Progress:
    """Says which step begins: in a bar on a terminal, in a line elsewhere; on standard error."""

    def __init__(self, steps: int) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._steps = steps
        self._begun = 0
        form = "{n}/{total}|{bar}| {elapsed} {desc}"
        self._bar = tqdm(total=steps, bar_format=form, leave=False, disable=not self._terminal)

    def step(self, what: str) -> None:
        self._bar.update(min(self._begun, 1))
        self._begun += 1
        self._bar.set_description_str(what)
        if not self._terminal:
            self.say(f"{self._begun} of {self._steps}: {what}")

    def say(self, line: str) -> None:
        """A line that stays. That nobody reads it any more is no reason to stop."""
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                tqdm.write(f"medner: {line}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
