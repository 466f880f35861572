"""What export adds to the parity gate: the choice of the window, sample text for int8 and fp16, and its words."""

from __future__ import annotations

import contextlib
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medner import bundle as bundles
from medner import evaluate, parity, score
from medner.annotate import Annotator, Ints, Model, Options
from medner.errors import CheckFailed, InputError, ModelError
from medner.parity import ParityData, Report

#: Tokens of sample text from which int8 and fp16 take the sizes of activations.
SAMPLE_TOKENS = 65_536

#: Windows that ``--window auto`` tries, in tokens.
WINDOWS = (64, 96, 128, 192, 256, 384, 512)
#: How a report names windows that hold one segment each.
ONE_SEGMENT = "one segment"
#: Of the windows that score within this F1 of the best, the longest is taken, for it cuts the fewest sentences, and of
#: two of one length the packed one. Windows of one segment each are as long as those that the model was trained on.
WINDOW_TOLERANCE = 0.002

#: Scores that ``--min-score auto`` tries.
MIN_SCORES = tuple(number / 20 for number in range(20))


def choose_window(bundle: bundles.Bundle, model: Model, data: ParityData) -> tuple[bundles.Bundle, dict[str, float]]:
    """The bundle with the window that scores best on labelled documents, and the F1 of each window tried.

    Tried are windows of one segment each, then windows packed with as many segments as fit, up to the first that holds
    every document whole: longer ones cannot be told apart. Raises :class:`InputError` where the data is not labelled,
    is mostly single sentences, which tell no windows apart, or nothing that is labelled is found in any window.
    """
    if not data.labelled:
        raise InputError(f"--window auto needs labelled documents; {data.name} holds none: pass --window N")
    apart = bundles.resized(bundle, bundle.window, packed=False)
    counts = _window_counts(apart, data)
    if all(document.tokens is not None for document in data.documents) or 2 * (counts > 1).sum() < len(counts):
        raise InputError(
            f"--window auto needs whole documents; {data.name} holds single sentences, which fit any window: "
            "pass --window N"
        )
    sizes = {ONE_SEGMENT: apart}
    tried: dict[str, float] = {}
    for window in WINDOWS:
        with contextlib.suppress(ModelError):
            sizes[str(window)] = bundles.resized(bundle, window, packed=True)
    for name, sized in sizes.items():
        annotator = Annotator(sized, model, Options(), precision="fp32")
        tried[name] = evaluate.evaluate(annotator, data.documents).overall.f1
        if (_window_counts(sized, data) == 1).all():
            break
    best = max(tried.values())
    if not best:
        raise InputError(
            f"--window auto: the model finds no labelled mention of {data.name}, which tells no windows apart; "
            "look at its labels, or pass --window N"
        )
    near = [sizes[name] for name, f1 in tried.items() if f1 >= best - WINDOW_TOLERANCE]
    return max(near, key=lambda sized: (sized.window, sized.packed)), tried


def _window_counts(bundle: bundles.Bundle, data: ParityData) -> Ints:
    """Windows of each document that has a word, int64 [n]."""
    annotator = Annotator(bundle, partial(_no_logits, bundle), Options(threads=1), precision="fp32")
    texts = pa.array([document.text for document in data.documents], pa.large_string())
    counts = np.asarray(annotator(pa.record_batch({"text": texts})).column("n_windows"), dtype=np.int64)
    return counts[counts > 0]


def _no_logits(bundle: bundles.Bundle, ids: Ints, _: Ints) -> npt.NDArray[np.float32]:
    """For what depends on the windows alone."""
    return np.zeros((*ids.shape, len(bundle.labels)), dtype=np.float32)


def choose_min_score(bundle: bundles.Bundle, model: Model, data: ParityData) -> tuple[float, dict[str, float]]:
    """The score below which spans are left out for the best F1 on labelled text, and the F1 of each one tried.

    Of equal ones the lowest. Raises :class:`InputError` where the data is not labelled.
    """
    if not data.labelled:
        raise InputError(f"--min-score auto needs labelled text; {data.name} has no labels: pass --min-score P")
    annotator = Annotator(bundle, model, Options(min_score=0.0), precision="fp32")
    gold = evaluate.fit_labels(annotator, data.documents)
    found = evaluate.find_scored(annotator, data.documents)
    tried = {}
    for least in MIN_SCORES:
        kept = [[(start, end, label) for start, end, label, sure in spans if sure >= least] for spans in found]
        tried[least] = score.evaluate(gold, kept).overall.f1
    return max(tried, key=lambda least: (tried[least], -least)), {f"{least:g}": f1 for least, f1 in tried.items()}


def samples(bundle: bundles.Bundle, data: ParityData, tokens: int = SAMPLE_TOKENS) -> list[Ints]:
    """Windows of the parity data, special tokens included, int64 [length] each, until there are enough tokens."""
    seen: list[Ints] = []

    def collect(ids: Ints, lengths: Ints) -> npt.NDArray[np.float32]:
        seen.extend(row[:length] for row, length in zip(ids, lengths, strict=True))
        return _no_logits(bundle, ids, lengths)

    annotator = Annotator(bundle, collect, Options(threads=1), precision="fp32")
    for document in data.documents:
        annotator(document.text)
        if sum(map(len, seen)) >= tokens:
            break
    return seen


def failure(precision: str, report: Report) -> CheckFailed:
    """The error for a variant that failed, with its figures."""
    said = parity.shortfall(precision, report.variants[precision], report.logits)
    return CheckFailed(f"parity gate: the {precision} variant failed on {report.data} and was not written: {said}")


def summary(report: Report) -> str:
    """The report for a person, a line for each variant."""
    logits = report.logits
    lines = [
        f"parity on {report.data}: {report.documents} documents, windows of up to {report.window} tokens, "
        f"{'packed' if report.packed else 'one segment each'}; logits differ by at most "
        f"{logits.max_difference:.1e}, {logits.ties} ties, {logits.differences} differences in {logits.tokens} tokens"
    ]
    if tried := report.min_scores_tried:
        best = max(tried, key=tried.__getitem__)  # the first of equal ones
        lines.append(f"spans below {best} are left out: F1 {tried[best]:.4f}, with all spans {tried['0']:.4f}")
    for precision, result in report.variants.items():
        scores = "" if result.f1 is None else f", F1 {result.f1:.4f} (PyTorch {result.reference_f1:.4f})"
        lines.append(f"{precision}: {result.spans} spans, {result.agreement:.2%} equal{scores}")
        if result.kept:
            lines[-1] += f"; of the {result.kept.spans} that it gives out, {result.kept.agreement:.2%}"
    if report.fp16_operators:
        lines.append(f"fp16 operators {report.fp16_operators}")
    return "\n".join(lines)
