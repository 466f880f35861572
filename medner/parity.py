"""Parity: what a model finds is compared with what the trained PyTorch model finds, on real text, in equal windows."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from medner import bundle as bundles
from medner import datasets, evaluate, score, sources
from medner.annotate import PAD_MULTIPLE, Annotator, Ints, Model, Options
from medner.datasets import Document
from medner.errors import InputError
from medner.runtime import Session

#: The spans of each document with their scores: (start, end, label, score).
_Scored: TypeAlias = list[list[tuple[int, int, str, float]]]

#: Two logits of a word that lie closer than this may change places between PyTorch and ONNX.
TIE = 1e-3
#: What a reduced precision may lose: F1 (absolute) on labelled text, or else the share of spans equal to PyTorch's.
MAX_F1_LOSS = 0.002
MIN_AGREEMENT = 0.98


@dataclass(frozen=True, slots=True)
class ParityData:
    """Real text for the gate. labelled: whether the documents' spans are known."""

    name: str
    documents: list[Document]
    labelled: bool


@dataclass(slots=True)
class LogitParity:
    """PyTorch and fp32 ONNX on the same windows, token by token.

    ties: tokens whose tags differ and whose two highest logits lie within :data:`TIE`; differences: tokens whose tags
    differ without that excuse; max_difference: the largest absolute difference of two logits.
    """

    tokens: int = 0
    ties: int = 0
    differences: int = 0
    max_difference: float = 0.0


@dataclass(frozen=True, slots=True)
class VariantParity:
    """A variant against PyTorch: spans found, share of spans equal, and F1 of both where labels are known.

    kept: the same of the spans that the bundle gives out, where it leaves some out for their scores; it has to pass,
    too.
    """

    spans: int
    agreement: float
    f1: float | None = None
    reference_f1: float | None = None
    passed: bool = False
    kept: VariantParity | None = None


@dataclass(slots=True)
class Report:
    """What the gate saw; it goes into the bundle.

    windows_tried, min_scores_tried: F1 of each, where one was to be chosen. int8_scales: fixed, or a row's own.
    fp16_operators: what was fused for GPUs.
    """

    data: str
    documents: int
    window: int
    packed: bool
    windows_tried: dict[str, float] = field(default_factory=dict)
    min_scores_tried: dict[str, float] = field(default_factory=dict)
    logits: LogitParity = field(default_factory=LogitParity)
    variants: dict[str, VariantParity] = field(default_factory=dict)
    int8_scales: str = ""
    fp16_operators: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_parity_data(
    path: str, split: str = "devel", text_column: str = "text", labels: Mapping[str, str] | None = None
) -> ParityData:
    """Labelled documents, or plain notes: CSV, Parquet, and JSONL without ``spans``.

    split: of labelled data that has splits; text_column: of plain notes; labels: new names of the data's labels, by old
    ones. Raises :class:`InputError`.
    """
    name = Path(path).name
    # Not Path.is_file, which raises where nobody can tell.
    if not os.path.isfile(path) or not _is_plain(Path(path)):  # noqa: PTH113
        return ParityData(name, datasets.load(path, split, labels), True)
    if labels:
        raise InputError(
            f"{path}: read as notes without labels, of which --label renames none; give labelled text as CoNLL, "
            "PubTator or JSONL with spans"
        )
    reader = sources.Reader(sources.discover([path]).files, sources.ReadOptions(text_column=text_column))
    notes = [text for batch in reader.batches() for text in batch.column("text").to_pylist() if text]
    if not notes:
        raise InputError(f"{path}: holds no notes; the parity gate needs real text")
    return ParityData(name, [Document(str(i), text, ()) for i, text in enumerate(notes)], False)


def _is_plain(path: Path) -> bool:
    suffix = sources.uncompressed(path).suffix.lower()
    if suffix not in (".jsonl", ".ndjson"):
        return suffix in (".csv", ".parquet")
    with sources.opened(path) as lines:
        return b'"spans"' not in next((line for line in lines if line.strip()), b"")


class Gate:
    """PyTorch's own spans on the parity data, against which every variant is held."""

    def __init__(self, bundle: bundles.Bundle, reference: Model, data: ParityData, threads: int | None = None) -> None:
        """Bundle: the checkpoint's labels, tokenizer and the window that all variants get; reference: PyTorch fp32."""
        self._bundle = bundle
        self._torch = reference
        self._data = data
        # Without reuse, every window goes through both models; and all spans count, whatever their score.
        self._options = Options(reuse=False, threads=threads, min_score=0.0)
        self._gold = evaluate.fit_labels(self._annotator(self._torch, "fp32"), data.documents)
        self.report = Report(data.name, len(data.documents), bundle.window, bundle.packed)
        self._reference: _Scored | None = None
        #: Spans of a lower score are left out by the bundle; reduced precisions are held to those above it as well.
        self.min_score = bundle.min_score

    def check(self, precision: str, graph: Path) -> VariantParity:
        """Hold one variant against PyTorch on the CPU; the report keeps the result. fp32 comes first.

        Raises :class:`InputError` where PyTorch finds nothing that could be compared.
        """
        result = self.hold(precision, Session(graph, "cpu"))
        self.report.variants[precision] = result
        return result

    def hold(self, precision: str, model: Model) -> VariantParity:
        """Hold any model against PyTorch; an fp32 one comes first, and its logits are compared as well.

        Raises :class:`InputError` where PyTorch finds nothing that could be compared.
        """
        paired = _Paired(self._torch, model, self.report.logits) if precision == "fp32" else self._torch
        reference = self.reference(paired)
        found = self._found(model, precision)
        if precision == "fp32":
            logits = self.report.logits
            result = self._compared(found, reference)
            return replace(result, passed=logits.differences == 0 and (result.agreement == 1.0 or logits.ties > 0))
        result = self._judged(found, reference)
        if not self.min_score:
            return result
        kept = self._judged(*(_from_score(each, self.min_score) for each in (found, reference)))
        return replace(result, passed=result.passed and kept.passed, kept=kept)

    def reference(self, model: Model | None = None) -> _Scored:
        """PyTorch's own spans with their scores, found on the first call, by ``model`` where one stands in for it.

        Raises :class:`InputError` where there are none.
        """
        if self._reference is None:
            self._reference = self._found(model or self._torch, "fp32")
            if not any(self._reference):
                raise InputError(f"{self._data.name}: PyTorch's model finds no span in it, so it proves nothing")
        return self._reference

    def of_reference(self) -> VariantParity:
        """PyTorch held against itself: its spans, and its F1 where labels are known."""
        reference = self.reference()
        return replace(self._compared(reference, reference), passed=True)

    def _annotator(self, model: Model, precision: str) -> Annotator:
        # fp16 is for GPUs, whose windows are padded; what a model makes of a window may depend on that.
        padded = PAD_MULTIPLE["cuda"] if precision == "fp16" and isinstance(model, Session) else None
        return Annotator(self._bundle, model, self._options, precision=precision, pad_multiple=padded)

    def _found(self, model: Model, precision: str) -> _Scored:
        return evaluate.find_scored(self._annotator(model, precision), self._data.documents)

    def _judged(self, found: _Scored, reference: _Scored) -> VariantParity:
        """By the rule for reduced precisions."""
        result = self._compared(found, reference)
        # Where PyTorch finds nothing of what is labelled, no F1 could be lost.
        f1, reference_f1 = result.f1 or 0.0, result.reference_f1 or 0.0
        kept_f1 = 0 < reference_f1 <= f1 + MAX_F1_LOSS
        return replace(result, passed=kept_f1 or result.agreement >= MIN_AGREEMENT)

    def _compared(self, found: _Scored, reference: _Scored) -> VariantParity:
        ours, theirs = ([[span[:3] for span in spans] for spans in each] for each in (found, reference))
        f1, reference_f1 = (
            score.evaluate(self._gold, spans).overall.f1 if self._data.labelled else None for spans in (ours, theirs)
        )
        return VariantParity(sum(map(len, ours)), score.agreement(_keys(ours), _keys(theirs)), f1, reference_f1)


class _Paired:
    """Runs two models on each batch, answers with the first one's logits and keeps count of the differences."""

    def __init__(self, first: Model, second: Model, parity: LogitParity) -> None:
        self._first, self._second, self._parity = first, second, parity
        self._lock = threading.Lock()

    def __call__(self, ids: Ints, lengths: Ints) -> npt.NDArray[np.float32]:
        logits, other = self._first(ids, lengths), self._second(ids, lengths)
        real = np.arange(ids.shape[1]) < lengths[:, None]
        differ = (logits.argmax(-1) != other.argmax(-1)) & real
        highest = np.sort(logits, axis=-1)[..., -2:]
        tie = highest[..., 1] - highest[..., 0] <= TIE
        with self._lock:
            self._parity.tokens += int(real.sum())
            self._parity.ties += int((differ & tie).sum())
            self._parity.differences += int((differ & ~tie).sum())
            largest = float(np.abs(logits - other)[real].max())
            self._parity.max_difference = max(self._parity.max_difference, largest)
        return logits


def _from_score(found: _Scored, least: float) -> _Scored:
    """The spans that have at least a score."""
    return [[span for span in spans if span[3] >= least] for spans in found]


def _keys(found: evaluate.Found) -> list[tuple[int, int, int, str]]:
    return [(number, *span) for number, spans in enumerate(found) for span in spans]


def shortfall(precision: str, result: VariantParity, logits: LogitParity) -> str:
    """What keeps a variant from passing, in figures."""
    if precision == "fp32":
        return f"{logits.differences} of {logits.tokens} tokens have another tag than PyTorch gives"
    said = f"{result.agreement:.2%} of spans equal PyTorch's"
    if result.f1 is not None and result.reference_f1 is not None:
        said += f", F1 {result.f1:.4f} against {result.reference_f1:.4f}"
    if result.kept is not None:
        said += f"; of those that the bundle gives out, {shortfall(precision, result.kept, logits)}"
    return said
