"""Strict entity scores with bootstrap intervals, and the agreement of two runs.

A predicted span counts where its start, end and label all equal those of a gold span. Documents that bring their own
tokens are scored on those, as seqeval does in its strict mode with IOB2 (Nakayama 2018); others on exact offsets.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medner.datasets import Document, Span, entities

RESAMPLES = 1_000
_SEED = 13
_BLOCK = 50


@dataclass(frozen=True, slots=True)
class LabelScore:
    """Precision, recall and F1 (shares of one) of one label, or of all (micro average, label ``all``).

    low, high: 95 % bootstrap interval of F1 over documents. tp, fp, fn: spans found, invented and missed.
    """

    label: str
    precision: float
    recall: float
    f1: float
    low: float
    high: float
    tp: int
    fp: int
    fn: int

    @property
    def support(self) -> int:
        """Gold spans of the label."""
        return self.tp + self.fn


@dataclass(frozen=True, slots=True)
class Scores:
    """Strict scores of one run on one labelled data set. unit: ``tokens``, ``offsets``, or ``mixed``."""

    overall: LabelScore
    labels: tuple[LabelScore, ...]
    documents: int
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """The scores as plain values for JSON."""
        return {
            "documents": self.documents,
            "unit": self.unit,
            "overall": _plain(self.overall),
            "labels": {score.label: _plain(score) for score in self.labels},
        }


def evaluate(documents: Sequence[Document], predicted: Sequence[Iterable[Span]]) -> Scores:
    """Score the spans predicted for each document against its gold spans.

    predicted: for each document (start, end, label) in code points of its text, end exclusive. Tokenized documents are
    compared by :func:`tags_of`, others by exact offsets. Raises ValueError where the lengths differ.
    """
    gold = [_comparable(document, document.spans) for document in documents]
    found = [_comparable(document, spans) for document, spans in zip(documents, predicted, strict=True)]
    tokenized = {document.tokens is not None for document in documents}
    unit = "mixed" if len(tokenized) > 1 else "tokens" if True in tokenized else "offsets"
    return _scores(gold, found, unit)


def strict(gold: Sequence[Iterable[Span]], predicted: Sequence[Iterable[Span]]) -> Scores:
    """Score spans against gold spans by exact offsets, document by document. Raises ValueError on unequal lengths."""
    return _scores([set(spans) for spans in gold], [set(spans) for spans in predicted], "offsets")


def difference(
    documents: Sequence[Document], first: Sequence[Iterable[Span]], second: Sequence[Iterable[Span]]
) -> tuple[float, float, float]:
    """F1 of the second run less that of the first, over all labels, with its 95 % bootstrap interval (shares of one).

    Both runs are scored on the same draws of documents (Efron and Tibshirani 1993), so what is hard for both does not
    widen the interval. What two trainings differ by from chance is not in it. Arguments as for :func:`evaluate`.
    """
    gold = [_comparable(document, document.spans) for document in documents]
    runs = (
        [_comparable(document, spans) for document, spans in zip(documents, run, strict=True)]
        for run in (first, second)
    )
    one, two = (counts for _, counts in (_counts(gold, found) for found in runs))
    low, high = np.percentile(_resampled(two)[:, -1] - _resampled(one)[:, -1], [2.5, 97.5])
    f1 = [float(_f1(counts.sum(axis=0))[-1]) for counts in (one, two)]
    return f1[1] - f1[0], float(low), float(high)


def tags_of(document: Document, spans: Iterable[Span]) -> list[str]:
    """IOB2 tags of the document's own tokens: a token belongs to the span that its first character lies in.

    The first such token of a span is ``B-``, the others ``I-``. Spans must not overlap. Raises ValueError where the
    document has no tokens.
    """
    if document.tokens is None:
        raise ValueError(f"document {document.id} is not tokenized")
    tags = ["O"] * len(document.tokens)
    ordered = iter(sorted(spans))
    span, opened = next(ordered, None), False
    for position, (first, _) in enumerate(document.tokens):
        while span is not None and span[1] <= first:
            span, opened = next(ordered, None), False
        if span is not None and span[0] <= first:
            tags[position] = f"{'I' if opened else 'B'}-{span[2]}"
            opened = True
    return tags


def agreement(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """Share of spans that two runs have in common, ``2 |A and B| / (|A| + |B|)``; 1 where neither found any.

    Each span is one hashable value, such as (document, start, end, label).
    """
    left, right = set(a), set(b)
    total = len(left) + len(right)
    return 2 * len(left & right) / total if total else 1.0


def table(scores: Scores) -> str:
    """The scores as a plain-text table, in percent; the interval is that of F1."""
    rows = [*scores.labels, scores.overall] if len(scores.labels) != 1 else [scores.overall]
    names = [scores.labels[0].label] if len(scores.labels) == 1 else [row.label for row in rows]
    width = max(len("label"), *map(len, names))
    lines = [f"{'label':<{width}}  precision  recall      F1    95 % interval  support"]
    for name, row in zip(names, rows, strict=True):
        interval = f"{100 * row.low:.2f} - {100 * row.high:.2f}"
        lines.append(
            f"{name:<{width}}  {100 * row.precision:9.2f}  {100 * row.recall:6.2f}  {100 * row.f1:6.2f}"
            f"  {interval:>15}  {row.support:7d}"
        )
    return "\n".join(lines)


def _plain(score: LabelScore) -> dict[str, Any]:
    values = asdict(score)
    del values["label"]
    return {**values, "support": score.support}


def _scores(gold: list[set[Span]], found: list[set[Span]], unit: str) -> Scores:
    if len(gold) != len(found):
        raise ValueError(f"{len(gold)} documents, but predictions for {len(found)}")
    labels, counts = _counts(gold, found)
    totals = counts.sum(axis=0)
    low, high = np.percentile(_resampled(counts), [2.5, 97.5], axis=0)
    scored = []
    for i, label in enumerate([*labels, "all"]):
        tp, fp, fn = (int(value) for value in totals[i])
        scored.append(
            LabelScore(
                label, _share(tp, tp + fp), _share(tp, tp + fn), _share(2 * tp, 2 * tp + fp + fn),
                float(low[i]), float(high[i]), tp, fp, fn,
            )
        )  # fmt: skip
    return Scores(scored[-1], tuple(scored[:-1]), len(gold), unit)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _comparable(document: Document, spans: Iterable[Span]) -> set[Span]:
    """What counts of a document's spans: exact offsets, or entities of its own tokens."""
    return set(spans) if document.tokens is None else set(entities(tags_of(document, spans)))


def _counts(gold: Sequence[set[Span]], found: Sequence[set[Span]]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The labels, and spans found, invented and missed: [n_documents, n_labels + 1, 3]; the last column is of all."""
    labels = sorted({label for spans in (*gold, *found) for _, _, label in spans})
    index = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(gold), len(labels) + 1, 3), dtype=np.int64)
    for row, (truth, guess) in enumerate(zip(gold, found, strict=True)):
        for kind, spans in enumerate((truth & guess, guess - truth, truth - guess)):
            for _, _, label in spans:
                counts[row, index[label], kind] += 1
    counts[:, -1] = counts[:, :-1].sum(axis=1)
    return labels, counts


def _f1(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """F1 from spans found, invented and missed on the last axis; 0 where there are none."""
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    shares: npt.NDArray[np.float64] = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    return shares


def _resampled(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """F1 of each label in draws of documents: [RESAMPLES, n_labels]; the same draws for as many documents."""
    documents, labels, _ = counts.shape
    if not documents:
        return np.zeros((RESAMPLES, labels))
    rng = np.random.default_rng(_SEED)
    flat = counts.reshape(documents, -1).astype(np.float64)
    drawn = []
    for _ in range(0, RESAMPLES, _BLOCK):
        # How often each document was drawn: a resample is then one row of a matrix product.
        times = rng.multinomial(documents, np.full(documents, 1 / documents), size=_BLOCK)
        drawn.append((times.astype(np.float64) @ flat).reshape(_BLOCK, labels, 3))
    return _f1(np.concatenate(drawn))
