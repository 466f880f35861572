"""The parity gate: what an exported graph finds is compared with what the trained model finds, on real text."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medner import bundle as bundles
from medner import datasets, evaluate, score, sources
from medner.annotate import Annotator, Ints, Model, Options
from medner.compare import TorchModel
from medner.datasets import Document
from medner.errors import CheckFailed, InputError, ModelError
from medner.runtime import Session

#: Two logits of a word that lie closer than this may change places between PyTorch and ONNX.
TIE = 1e-3
#: What a reduced precision may lose: F1 (absolute) on labelled text, or else the share of spans equal to PyTorch's.
MAX_F1_LOSS = 0.002
MIN_AGREEMENT = 0.98

#: Tokens of sample text from which int8 takes the sizes of activations.
SAMPLE_TOKENS = 16_384

#: Windows that ``--window auto`` tries, in tokens.
WINDOWS = (64, 96, 128, 192, 256, 384, 512)
#: How a report names windows that hold one segment each.
ONE_SEGMENT = "one segment"
#: Of the windows that score within this F1 of the best, the longest is taken: it cuts the fewest sentences.
WINDOW_TOLERANCE = 0.002


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
    """A variant against PyTorch: spans found, share of spans equal, and F1 of both where labels are known."""

    spans: int
    agreement: float
    f1: float | None = None
    reference_f1: float | None = None
    passed: bool = False


@dataclass(slots=True)
class Report:
    """What the gate saw; it goes into the bundle."""

    data: str
    documents: int
    window: int
    packed: bool
    windows_tried: dict[str, float] = field(default_factory=dict)
    logits: LogitParity = field(default_factory=LogitParity)
    variants: dict[str, VariantParity] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_parity_data(path: str, split: str = "devel") -> ParityData:
    """Labelled documents, or plain notes: CSV, Parquet, compressed files, and JSONL without ``spans``.

    Raises :class:`InputError`.
    """
    name = Path(path).name
    if not Path(path).is_file() or not _is_plain(Path(path)):
        return ParityData(name, datasets.load(path, split), True)
    reader = sources.Reader(sources.discover([path]).files, sources.ReadOptions())
    notes = [text for batch in reader.batches() for text in batch.column("text").to_pylist() if text]
    if not notes:
        raise InputError(f"{path}: holds no notes; the parity gate needs real text")
    return ParityData(name, [Document(str(i), text, ()) for i, text in enumerate(notes)], False)


def _is_plain(path: Path) -> bool:
    if path.suffix.lower() != ".jsonl":
        return path.suffix.lower() in (".csv", ".parquet", ".gz", ".zst", ".bz2")
    with path.open(encoding="utf-8", errors="replace") as lines:
        return '"spans"' not in next((line for line in lines if line.strip()), "")


def choose_window(bundle: bundles.Bundle, model: Model, data: ParityData) -> tuple[bundles.Bundle, dict[str, float]]:
    """The bundle with the window that scores best on labelled documents, and the F1 of each window tried.

    Tried are windows of one segment each, then windows packed with as many segments as fit, up to the first that holds
    every document whole: longer ones cannot be told apart. Raises :class:`InputError` where the data is not labelled or
    holds single sentences, which tell no windows apart.
    """
    if not data.labelled:
        raise InputError(f"--window auto needs labelled documents; {data.name} holds none: pass --window N")
    if all(document.tokens is not None for document in data.documents):
        raise InputError(
            f"--window auto needs whole documents; {data.name} holds single sentences, which fit any window: "
            "pass --window N"
        )
    sizes = {ONE_SEGMENT: bundles.resized(bundle, bundle.window, packed=False)}
    tried: dict[str, float] = {}
    for window in WINDOWS:
        with contextlib.suppress(ModelError):
            sizes[str(window)] = bundles.resized(bundle, window, packed=True)
    for name, sized in sizes.items():
        annotator = Annotator(sized, model, Options(), precision="fp32")
        tried[name] = evaluate.evaluate(annotator, data.documents).overall.f1
        if annotator.counts.inferred + annotator.counts.reused <= len(data.documents):
            break
    best = max(tried.values())
    return sizes[[name for name, f1 in tried.items() if f1 >= best - WINDOW_TOLERANCE][-1]], tried


def samples(bundle: bundles.Bundle, data: ParityData, tokens: int = SAMPLE_TOKENS) -> list[Ints]:
    """Windows of the parity data, special tokens included, int64 [length] each, until there are enough tokens."""
    seen: list[Ints] = []

    def collect(ids: Ints, lengths: Ints) -> npt.NDArray[np.float32]:
        seen.extend(row[:length] for row, length in zip(ids, lengths, strict=True))
        return np.zeros((*ids.shape, len(bundle.labels)), dtype=np.float32)

    annotator = Annotator(bundle, collect, Options(threads=1), precision="fp32")
    for document in data.documents:
        annotator(document.text)
        if sum(map(len, seen)) >= tokens:
            break
    return seen


class Gate:
    """PyTorch's own spans on the parity data, against which every variant is held."""

    def __init__(self, bundle: bundles.Bundle, reference: TorchModel, data: ParityData) -> None:
        """Bundle: the checkpoint's labels, tokenizer and the window that all variants get."""
        self._bundle = bundle
        self._torch = reference
        self._data = data
        self._gold = evaluate.fit_labels(self._annotator(self._torch, "fp32"), data.documents)
        self.report = Report(data.name, len(data.documents), bundle.window, bundle.packed)
        self._reference: evaluate.Found | None = None

    def check(self, precision: str, graph: Path) -> VariantParity:
        """Hold one variant against PyTorch; the report keeps the result. fp32 comes first.

        Raises :class:`InputError` where PyTorch finds nothing that could be compared.
        """
        session = Session(graph, "cpu")
        if self._reference is None:
            paired = _Paired(self._torch, session, self.report.logits)
            self._reference = self._found(paired, "fp32")
            if not any(self._reference):
                raise InputError(f"{self._data.name}: PyTorch's model finds no span in it, so it proves nothing")
        found = self._found(session, precision)
        agreement = score.agreement(_keys(found), _keys(self._reference))
        f1 = reference_f1 = None
        if self._data.labelled:
            f1, reference_f1 = self._f1(found), self._f1(self._reference)
        if precision == "fp32":
            logits = self.report.logits
            passed = logits.differences == 0 and (agreement == 1.0 or logits.ties > 0)
        else:
            kept_f1 = f1 is not None and reference_f1 is not None and reference_f1 - f1 <= MAX_F1_LOSS
            passed = kept_f1 or agreement >= MIN_AGREEMENT
        result = VariantParity(sum(map(len, found)), agreement, f1, reference_f1, passed)
        self.report.variants[precision] = result
        return result

    def _annotator(self, model: Model, precision: str) -> Annotator:
        # Without reuse, every window goes through both models.
        return Annotator(self._bundle, model, Options(reuse=False), precision=precision)

    def _found(self, model: Model, precision: str) -> evaluate.Found:
        return evaluate.find(self._annotator(model, precision), self._data.documents)

    def _f1(self, found: evaluate.Found) -> float:
        return score.evaluate(self._gold, found).overall.f1


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


def _keys(found: evaluate.Found) -> list[tuple[int, int, int, str]]:
    return [(number, *span) for number, spans in enumerate(found) for span in spans]


def failure(precision: str, report: Report) -> CheckFailed:
    """The error for a variant that failed, with its figures."""
    result, logits = report.variants[precision], report.logits
    if precision == "fp32":
        said = f"{logits.differences} of {logits.tokens} tokens have another tag than PyTorch gives"
    else:
        said = f"{result.agreement:.2%} of spans equal PyTorch's"
        if result.f1 is not None and result.reference_f1 is not None:
            said += f", F1 {result.f1:.4f} against {result.reference_f1:.4f}"
    return CheckFailed(f"parity gate: the {precision} variant failed on {report.data} and was not written: {said}")


def summary(report: Report) -> str:
    """The report for a person, a line for each variant."""
    logits = report.logits
    lines = [
        f"parity on {report.data}: {report.documents} documents, windows of up to {report.window} tokens, "
        f"{'packed' if report.packed else 'one segment each'}; logits differ by at most "
        f"{logits.max_difference:.1e}, {logits.ties} ties, {logits.differences} differences in {logits.tokens} tokens"
    ]
    for precision, result in report.variants.items():
        scores = "" if result.f1 is None else f", F1 {result.f1:.4f} (PyTorch {result.reference_f1:.4f})"
        lines.append(f"{precision}: {result.spans} spans, {result.agreement:.2%} equal{scores}")
    return "\n".join(lines)
