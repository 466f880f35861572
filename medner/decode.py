"""Label arrays -> spans. Pure numpy, vectorized over all words of many notes at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medner.errors import ModelError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_TAG = re.compile(r"([BIESLU])[-_](.+)")
_BARE = frozenset("BIESLU")
#: What looks like a prefix or a suffix, in which schemes are written that are none of these.
_LOOSE = re.compile(r"[BIESLU][-_:/](.+)", re.IGNORECASE)
_SUFFIXED = re.compile(r"(.+)[-_:/][BIESLU]")
#: What is a prefix wherever its type stands alone, too.
_SURE = re.compile(r"[BI][-_](.+)")
#: The type of tags that are a bare ``B`` or ``I``, as in the data sets of BioBERT.
UNNAMED = "Entity"
#: Classes of padding, special tokens and sub-tokens that some training scripts add; they mean what O means.
_NOTHING = frozenset({"PAD", "[PAD]", "<pad>", "<PAD>", "X", "[CLS]", "[SEP]", "<s>", "</s>", "[UNK]", "<unk>"})


@dataclass(frozen=True, slots=True)
class TagSet:
    """What each of a model's classes means.

    types: the entity types, by first appearance. type_of: int64 [n_labels], index into ``types``, -1 for O. opens: bool
    [n_labels], the tag begins a span whatever stands before it (B, S, U). closes: bool [n_labels], no span goes on
    after the tag (E, L, S, U).
    """

    types: tuple[str, ...]
    type_of: Ints
    opens: Bools
    closes: Bools


def tag_set(labels: tuple[str, ...]) -> TagSet:
    """Understand the labels of IO, IOB1, IOB2, BIOES and BILOU models.

    In IO the labels are the types themselves; labels that are letters such as ``B`` and ``I`` alone are prefixes of the
    one type :data:`UNNAMED`. IOB1 needs no rule of its own: there ``B-`` stands only where two spans
    of one type touch, and an ``I-`` that follows nothing opens a span in any scheme. Beside labels with prefixes, one
    for padding or the like (``PAD``, ``X``, ``[CLS]``) counts as O.

    Raises :class:`ModelError` for labels of no such scheme.
    """
    if "O" not in labels:
        raise ModelError(f"no label O among {', '.join(labels[:8])}; this is not a tagging model")
    bare = _BARE.intersection(labels)
    named = {
        label: f"{label}-{UNNAMED}" if label in bare and ("I" in bare or len(bare) > 1) else label for label in labels
    }
    tagged = [label for label in labels if label != "O"]
    if any(_TAG.fullmatch(named[label]) for label in tagged):
        tagged = [label for label in tagged if label not in _NOTHING]
    prefixed = all(_TAG.fullmatch(named[label]) for label in tagged)
    if not prefixed and (odd := odd_label(tagged)):
        raise ModelError(
            f"the label {odd} is of no scheme that is known (IO, IOB1, IOB2, BIOES, BILOU): rename the labels in "
            "config.json"
        )
    parts = {label: _TAG.fullmatch(named[label]) if prefixed else None for label in tagged}
    names = {label: match.group(2) if match else label for label, match in parts.items()}
    kinds = {label: match.group(1) if match else "I" for label, match in parts.items()}
    types = tuple(dict.fromkeys(names[label] for label in tagged))
    return TagSet(
        types,
        np.array([types.index(names[label]) if label in names else -1 for label in labels], dtype=np.int64),
        np.array([kinds.get(label, "O") in "BSU" for label in labels], dtype=np.bool_),
        np.array([kinds.get(label, "O") in "ELSU" for label in labels], dtype=np.bool_),
    )


def odd_label(labels: Sequence[str]) -> str | None:
    """Of labels that do not all have a prefix, one that shows that they are no types by themselves.

    So it is with two that differ in what looks like a prefix alone, with a type beside itself with a prefix, and with
    several letters, or one beside a prefix, that would be prefixes alone.
    """
    for pattern in (_LOOSE, _SUFFIXED):
        types = {label: match.group(1) for label in labels if (match := pattern.fullmatch(label))}
        if len(set(types.values())) < len(types):
            return next((label for label in labels if label not in types), labels[0])
    if any(match.group(1) in labels for match in map(_SURE.fullmatch, labels) if match):
        return next(label for label in labels if not _SURE.fullmatch(label))
    bare = [label for label in labels if label in _BARE]
    if len(bare) > 1 or (bare and any(map(_TAG.fullmatch, labels))):
        return next((label for label in labels if label not in bare and not _TAG.fullmatch(label)), bare[0])
    return None


def best(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """The likeliest class of each token and its probability.

    logits: float32 [..., n_labels]. Returns int16 [...] and float32 [...]. Of equal logits the first class counts.
    """
    tags = logits.argmax(axis=-1).astype(np.int16)
    highest = logits.max(axis=-1, keepdims=True)
    return tags, 1.0 / np.exp(logits - highest).sum(axis=-1)


@dataclass(frozen=True, slots=True)
class WordSpans:
    """Spans in words: int64 [n_spans] each, ``first`` and ``last`` word inclusive; score float32 [n_spans]."""

    first: Ints
    last: Ints
    type: Ints
    score: npt.NDArray[np.float32]


def spans(
    tags: npt.NDArray[np.integer], probabilities: npt.NDArray[np.float32], breaks: Bools, tag_set: TagSet
) -> WordSpans:
    """Decode word tags to spans.

    tags: integer [n_words]; probabilities: float32 [n_words], of each word's tag; breaks: bool [n_words], no span goes
    on from the word before into this one. Every tag sequence decodes: an ``I-`` that continues nothing opens a span,
    and a span whose end tag is missing ends where the next word does not continue it.
    """
    kind = tag_set.type_of[tags]
    inside = kind >= 0
    goes_on = np.zeros(len(tags), dtype=np.bool_)
    goes_on[1:] = inside[1:] & (kind[1:] == kind[:-1]) & ~tag_set.opens[tags[1:]] & ~tag_set.closes[tags[:-1]]
    goes_on &= ~breaks
    first = np.flatnonzero(inside & ~goes_on)
    ends = inside.copy()
    ends[:-1] &= ~goes_on[1:]
    last = np.flatnonzero(ends)
    # Summed span by span: a score must not depend on what stands before the span in the array.
    padded = np.append(probabilities.astype(np.float64), 0.0)
    cuts = np.stack([first, last + 1], axis=1).ravel()
    totals = np.add.reduceat(padded, cuts)[::2] if len(cuts) else np.zeros(0)
    score = totals / (last + 1 - first)
    return WordSpans(first, last, kind[first], score.astype(np.float32))
