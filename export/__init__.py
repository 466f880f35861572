"""PyTorch checkpoints to proven ONNX bundles; installed as ``medner.export``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medner import bundle as bundles
from medner import decode, parity, runtime
from medner.annotate import Ints
from medner.errors import CheckFailed, MissingPackage, ModelError, OutputError, UsageError, install
from medner.pytorch import TorchModel

#: Precisions that can be exported, and those that are where none is asked for.
PRECISIONS = ("fp32", "int8", "fp16")
DEFAULT = ("fp32", "int8")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported where.

    precisions: the variants to write. parity_data: labelled documents or plain notes. window: tokens, or None to choose
    the window on the labelled documents. packed: where the window is given, whether it takes as many segments as fit.
    min_score: the bundle leaves spans below it out; None chooses it on the labelled text. split: of a data set that
    has splits. text_column: of plain notes. labels: new names of the data's labels, by old ones. name: the bundle's;
    None takes the directory's. licence: of the weights, for the record.
    """

    checkpoint: Path
    output: Path
    parity_data: str
    precisions: tuple[str, ...] = DEFAULT
    window: int | None = None
    packed: bool = True
    min_score: float | None = 0.0
    split: str = "devel"
    text_column: str = "text"
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    licence: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Take paths of any kind."""
        for name in ("checkpoint", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        object.__setattr__(self, "parity_data", str(self.parity_data))


def export(options: ExportOptions) -> str:
    """Export a checkpoint, hold every variant against PyTorch, write the bundle, and return the gate's summary.

    A variant that fails the gate is not written, and the call raises :class:`CheckFailed` after the others were; if
    fp32 fails, or no variant is left, nothing is written. Raises :class:`ModelError`, :class:`InputError`,
    :class:`OutputError`.
    """
    _check(options)
    try:
        from medner.export import convert, verify
    except ImportError as exc:
        raise MissingPackage(f'exporting needs the extra "export": {install("export")}') from exc

    checkpoint = bundles.load_checkpoint(options.checkpoint, options.window)
    data = parity.read_parity_data(options.parity_data, options.split, options.text_column, options.labels)
    reference = TorchModel(options.checkpoint)
    reference(np.zeros((1, 2), dtype=np.int64), np.array([2]))  # weights that are no numbers show before any work
    with _scratch(options.output) as scratch:
        target = scratch / "bundle"
        graphs = {precision: target / bundles.VARIANT_FILES[precision] for precision in ("fp32", *options.precisions)}
        convert.to_onnx(options.checkpoint, graphs["fp32"])
        tried: dict[str, float] = {}
        if options.window is None:
            checkpoint, tried = verify.choose_window(checkpoint, runtime.Session(graphs["fp32"], "cpu"), data)
        else:
            checkpoint = bundles.resized(checkpoint, options.window, packed=options.packed)
        gate = parity.Gate(checkpoint, reference, data)
        gate.report.windows_tried = tried
        if not gate.check("fp32", graphs["fp32"]).passed:
            raise verify.failure("fp32", gate.report)
        least = options.min_score
        if least is None:
            least, gate.report.min_scores_tried = verify.choose_min_score(
                checkpoint, runtime.Session(graphs["fp32"], "cpu"), data
            )
        checkpoint = replace(checkpoint, min_score=least)
        gate.min_score = least
        samples = verify.samples(checkpoint, data) if len(graphs) > 1 else []
        failures: list[CheckFailed] = []
        for precision, make in (("int8", _int8), ("fp16", _fp16)):
            if precision not in graphs:
                continue
            try:
                failure = make(gate, graphs, samples, options.checkpoint)
            except ModelError as exc:
                gate.report.variants.pop(precision, None)
                failure = CheckFailed(f"the {precision} variant was not written: {exc}")
            if failure is not None:
                failures.append(failure)
                graphs[precision].unlink(missing_ok=True)
        if "fp32" not in options.precisions:
            graphs["fp32"].unlink()
        if any(graph.exists() for graph in graphs.values()):
            _complete(target, options, checkpoint, gate.report.as_dict())
            _check_output(options)  # what came there meanwhile may be another's
            _publish(target, options.output, scratch / "replaced")
    if failures:
        raise CheckFailed("\n".join(map(str, failures)))
    return verify.summary(gate.report)


def _int8(gate: parity.Gate, graphs: Mapping[str, Path], samples: Sequence[Ints], _: Path) -> CheckFailed | None:
    """Write the int8 variant and hold it against PyTorch."""
    from medner.export import optimize, verify

    # Fixed scales are faster; where they cost this model too much, every row gets its own.
    for gate.report.int8_scales, static_bits in (("fixed", optimize.STATIC_BITS), ("a row's own", -math.inf)):
        optimize.to_int8(graphs["fp32"], graphs["int8"], samples, static_bits)
        if gate.check("int8", graphs["int8"]).passed:
            return None
    return verify.failure("int8", gate.report)


def _fp16(
    gate: parity.Gate, graphs: Mapping[str, Path], samples: Sequence[Ints], checkpoint: Path
) -> CheckFailed | None:
    """Write the fp16 variant and hold it against PyTorch, on the CPU: as it is, and with a GPU's roundings."""
    from medner.export import half, verify

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        rounded = Path(scratch) / "rounded.onnx"
        gate.report.fp16_operators = str(half.to_fp16(graphs["fp32"], graphs["fp16"], samples, config, rounded))
        for graph in (graphs["fp16"], rounded):
            if not gate.check("fp16", graph).passed:
                return verify.failure("fp16", gate.report)
    return None


@contextlib.contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output, removed at the end; what cannot be written is an :class:`OutputError`."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".medner-") as scratch:
            yield Path(scratch)
    except OSError as exc:
        raise OutputError(f"{output}: cannot be written ({exc.strerror or exc})") from exc


def _check(options: ExportOptions) -> None:
    unknown = set(options.precisions) - set(PRECISIONS)
    if unknown or not options.precisions:
        raise UsageError(f"--precision {', '.join(sorted(unknown)) or 'none'}: use {', '.join(PRECISIONS)}")
    if options.min_score is not None and not 0 <= options.min_score <= 1:  # NaN is not either
        raise UsageError(f"--min-score {options.min_score}: use auto or a number from 0 to 1")
    output = options.output
    bundles.check_name(options.name or output.name)
    _check_output(options)
    if os.path.lexists(output):
        for given in (options.checkpoint, Path(options.parity_data)):
            if given.resolve().is_relative_to(output.resolve()):
                raise UsageError(f"{given} lies in the output {output}, which is replaced; choose another -o")


def _check_output(options: ExportOptions) -> None:
    """Refuse to replace what is no bundle, and a bundle unless that was asked for."""
    output = options.output
    # Not Path.exists, which raises where nobody can tell; what can be made there shows when it is.
    if os.path.lexists(output):
        if not os.path.isfile(output / bundles.MANIFEST):  # noqa: PTH113
            raise OutputError(f"{output}: exists and is no bundle; choose another -o")
        if not options.overwrite:
            raise OutputError(f"{output}: holds a bundle; choose another -o, or pass --overwrite")


def _publish(target: Path, output: Path, replaced: Path) -> None:
    """Give the bundle its name; one that has it is put aside, and back if that fails."""
    try:
        if output.exists():
            output.rename(replaced)
        target.rename(output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise


def _complete(target: Path, options: ExportOptions, checkpoint: bundles.Bundle, report: Mapping[str, Any]) -> None:
    """Add tokenizer, settings, card and ``medner.json`` to the graphs."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (options.checkpoint / name).is_file():
            shutil.copyfile(options.checkpoint / name, target / name)
    name = options.name or options.output.name
    card: dict[str, Any] = {
        "licence": options.licence,
        "checkpoint": bundles.weight_hashes(options.checkpoint),
        "parity": report,
        "training": bundles.recorded_training(options.checkpoint),
        "versions": {**{package: version(package) for package in _PACKAGES}, "onnxruntime": runtime.version()},
    }
    # As the manifest: a path in it may be no valid Unicode.
    (target / "README.md").write_text(_model_card(name, checkpoint, card), encoding="utf-8", errors="backslashreplace")
    bundles.write_manifest(
        target,
        name=name,
        labels=checkpoint.labels,
        window=checkpoint.window,
        packed=checkpoint.packed,
        card=card,
        min_score=checkpoint.min_score,
    )


_PACKAGES = ("medner", "torch", "transformers", "optimum", "optimum-onnx", "onnx")


def _model_card(name: str, checkpoint: bundles.Bundle, card: Mapping[str, Any]) -> str:
    """A card with the facts that are known at export; its author adds use and limits."""
    report = card["parity"]
    lines = [
        f"# {name}",
        "",
        f"A token classifier for {', '.join(decode.tag_set(checkpoint.labels).types)}, exported by medner.",
        "",
        f"- Licence: {card['licence'] or 'not stated'}",
        f"- Labels: {', '.join(checkpoint.labels)}",
        f"- Window: {checkpoint.window} tokens, {'as many segments as fit' if checkpoint.packed else 'one segment'}",
        *([f"- Spans with a score below {checkpoint.min_score:g} are left out"] if checkpoint.min_score else []),
        "",
        f"## Parity with PyTorch, on {report['data']} ({report['documents']} documents)",
        "",
        "| variant | spans | equal to PyTorch's | F1 | PyTorch's F1 |",
        "|---|---|---|---|---|",
    ]
    for precision, result in report["variants"].items():
        name = precision if result["passed"] else f"{precision} (failed, not written)"
        lines.append(_card_row(name, result))
        if result["kept"]:
            lines.append(_card_row(f"{name}, scores from {checkpoint.min_score:g}", result["kept"]))
    return "\n".join(lines) + "\n"


def _card_row(name: str, result: Mapping[str, Any]) -> str:
    scores = [f"{value:.4f}" if value is not None else "-" for value in (result["f1"], result["reference_f1"])]
    return f"| {name} | {result['spans']} | {result['agreement']:.2%} | {' | '.join(scores)} |"
