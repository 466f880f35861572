"""Labelled sentences in which mentions of diseases are abbreviated as in clinical records.

Abstracts spell diseases out, so a model that is trained on them misses HTN and COPD. Here mentions that a model finds
in reports are replaced by abbreviations from a list (mention replacement, after Dai and Adel 2020, "An Analysis of
Simple Data Augmentation for Named Entity Recognition"). What is replaced by what is left to chance: the words around a
mention say that it is a disease, seldom which one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

from medner import windows
from medner.datasets import Document, Span

#: Of diseases in records of adults, common ones first. Those that as often stand for something else (PE, MS, RA) are
#: left out.
ABBREVIATIONS = (
    "HTN", "DM", "DM2", "T2DM", "DM II", "IDDM", "NIDDM", "CAD", "CHF", "COPD", "CKD", "ESRD", "GERD", "HLD", "AFib",
    "A-fib", "AF", "MI", "NSTEMI", "STEMI", "CVA", "TIA", "DVT", "VTE", "OSA", "UTI", "URI", "AKI", "ARF", "PVD", "PAD",
    "BPH", "OA", "DJD", "DDD", "IBS", "IBD", "UC", "PUD", "NASH", "NAFLD", "HCC", "RCC", "NSCLC", "SCLC", "AML", "CLL",
    "CML", "MDS", "DLBCL", "SLE", "JRA", "ALS", "ADHD", "PTSD", "OCD", "MDD", "GAD", "TB", "AIDS", "ARDS", "CAP", "ILD",
    "SBO", "AAA", "SVT", "LVH", "HOCM", "DCM", "HFrEF", "HFpEF", "PCOS", "RLS", "DKA", "SIADH", "TTP", "ITP", "DIC",
    "HIT", "ICH", "SAH", "SDH", "NPH", "PKD", "VUR", "PID", "STD",
)  # fmt: skip

#: Share of the mentions that are replaced, and of the abbreviations that are put in small letters.
REPLACED, SMALL = 0.6, 0.2
SEED = 13


def abbreviated(documents: Sequence[Document], seed: int = SEED) -> Iterator[Document]:
    """The sentences of documents that hold a mention, some of their mentions abbreviated, at least one in each.

    A mention that crosses the end of a sentence takes the sentence out.
    """
    rng = random.Random(seed)
    for document in documents:
        for low, high in pairwise(windows.segments(document.text)):
            inside = [span for span in document.spans if span[0] < high and low < span[1]]
            if inside and all(low <= start and end <= high for start, end, _ in inside):
                yield _replaced(f"{document.id}:{low}", document.text, (low, high), inside, rng)


def _replaced(name: str, text: str, bounds: tuple[int, int], spans: Sequence[Span], rng: random.Random) -> Document:
    chosen = {rng.randrange(len(spans)), *(i for i in range(len(spans)) if rng.random() < REPLACED)}
    done, made, position = "", [], bounds[0]
    for i, (start, end, label) in enumerate(spans):
        mention = text[start:end]
        if i in chosen:
            mention = rng.choice(ABBREVIATIONS)
            mention = mention.lower() if rng.random() < SMALL else mention
        done += text[position:start]
        made.append((len(done), len(done) + len(mention), label))
        done += mention
        position = end
    return Document(name, done + text[position : bounds[1]], tuple(made))
