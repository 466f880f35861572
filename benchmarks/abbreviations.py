"""Labelled sentences in which mentions of diseases are abbreviated as in clinical records.

Abstracts spell diseases out, so a model that is trained on them misses HTN and COPD. Here mentions that a model finds
in reports are replaced by abbreviations from a list (mention replacement, after Dai and Adel 2020, "An Analysis of
Simple Data Augmentation for Named Entity Recognition"). What is replaced by what is left to chance: the words around a
mention say that it is a disease, seldom which one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from medner.datasets import Document

#: Of diseases in records of adults, common ones first. Those that as often stand for something else (PE, MS, RA) are
#: left out, and those that are words in small letters (CAP, HIT, AIDS), which an uncased model cannot tell apart.
ABBREVIATIONS = (
    "HTN", "DM", "DM2", "T2DM", "DM II", "IDDM", "NIDDM", "CAD", "CHF", "COPD", "CKD", "ESRD", "GERD", "HLD", "AFib",
    "A-fib", "AF", "MI", "NSTEMI", "STEMI", "CVA", "TIA", "DVT", "VTE", "OSA", "UTI", "URI", "AKI", "ARF", "PVD",
    "BPH", "OA", "DJD", "DDD", "IBS", "IBD", "UC", "PUD", "NASH", "NAFLD", "HCC", "RCC", "NSCLC", "SCLC", "AML", "CLL",
    "CML", "MDS", "DLBCL", "SLE", "JRA", "ALS", "ADHD", "PTSD", "OCD", "MDD", "GAD", "TB", "ARDS", "ILD",
    "SBO", "AAA", "SVT", "LVH", "HOCM", "DCM", "HFrEF", "HFpEF", "PCOS", "RLS", "DKA", "SIADH", "TTP", "ITP", "DIC",
    "ICH", "SAH", "SDH", "NPH", "PKD", "VUR", "PID", "STD",
)  # fmt: skip

#: Share of the mentions that are replaced, and of the abbreviations that are put in small letters.
REPLACED, SMALL = 0.6, 0.2
SEED = 13


def abbreviated(sentences: Sequence[Document], seed: int = SEED) -> Iterator[Document]:
    """The sentences that hold a mention, some of their mentions abbreviated, at least one in each."""
    rng = random.Random(seed)
    for sentence in sentences:
        if sentence.spans:
            yield _replaced(sentence, rng)


def _replaced(sentence: Document, rng: random.Random) -> Document:
    spans = sentence.spans
    chosen = {rng.randrange(len(spans)), *(i for i in range(len(spans)) if rng.random() < REPLACED)}
    text, made, position = "", [], 0
    for i, (start, end, label) in enumerate(spans):
        mention = sentence.text[start:end]
        if i in chosen:
            mention = rng.choice(ABBREVIATIONS)
            mention = mention.lower() if rng.random() < SMALL else mention
        text += sentence.text[position:start]
        made.append((len(text), len(text) + len(mention), label))
        text += mention
        position = end
    return Document(sentence.id, text + sentence.text[position:], tuple(made))
