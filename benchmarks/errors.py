"""Where a model of one label errs: kinds of errors on labelled documents, unseen mentions, and notes of our own.

    python benchmarks/errors.py [--model default]

Kinds are counted on the devel split of NCBI Disease (test stays for the final score), unseen mentions are those whose
text stands in no training document. ``records.jsonl`` holds 30 short notes in the style of electronic records (wrapped
lines, tables, masks, capitals, abbreviations), written and labelled for this project: diseases and syndromes with their
abbreviations and adjectives, negated and family ones too, no symptoms. Prints Markdown for the model card.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import common

from medner import datasets, evaluate, score
from medner.annotate import Annotator, Options
from medner.datasets import Document, Span

RECORDS = Path(__file__).resolve().parent / "records.jsonl"
DOCUMENTS = common.DATA / "ncbi-disease" / "pubtator"

#: A word of two to eight characters with at least two capitals, such as T2DM or COPD.
_ABBREVIATION = re.compile(r"(?=(?:.*[A-Z]){2})[A-Za-z0-9.-]{2,8}s?")

KINDS = {
    "boundary": "found, but with another start or end",
    "abbreviation": "missed, an abbreviation",
    "composite": "several diseases in one mention, missed or with other ends",
    "other": "missed, any other",
    "invented": "marked, where nothing is labelled",
}


def kinds(documents: Sequence[Document], found: evaluate.Found) -> Counter[str]:
    """How often each of :data:`KINDS` occurs; documents carry the data set's own labels.

    A gold span that an unequal predicted one overlaps is a boundary error, and that prediction is counted with it.
    """
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for document, spans in zip(documents, found, strict=True):
        for start, end, label in document.spans:
            if any((start, end) == span[:2] for span in spans):
                continue
            if label == "CompositeMention":
                counts["composite"] += 1
            elif any(_overlap((start, end), span) for span in spans):
                counts["boundary"] += 1
            else:
                is_short = _ABBREVIATION.fullmatch(document.text[start:end])
                counts["abbreviation" if is_short else "other"] += 1
        counts["invented"] += sum(not any(_overlap(span[:2], gold) for gold in document.spans) for span in spans)
    return counts


def _overlap(bounds: tuple[int, int], span: Span) -> bool:
    return bounds[0] < span[1] and span[0] < bounds[1]


def mentions(documents: Sequence[Document]) -> set[str]:
    """The texts of all labelled spans, in lower case."""
    return {document.text[a:b].lower() for document in documents for a, b, _ in document.spans}


def unseen(documents: Sequence[Document], found: evaluate.Found, known: Collection[str]) -> score.Scores:
    """Scores without the spans, labelled or predicted, whose text is known, and that equal none that is not."""
    kept = [replace(d, spans=tuple(s for s in d.spans if d.text[s[0] : s[1]].lower() not in known)) for d in documents]
    predicted = [
        [s for s in spans if d.text[s[0] : s[1]].lower() not in known]
        for d, spans in zip(documents, found, strict=True)
    ]
    return score.evaluate(kept, predicted)


def section(annotator: Annotator) -> str:
    """Markdown for the model card."""
    documents = datasets.load(str(DOCUMENTS), "devel")
    found = evaluate.find(annotator, documents)
    fitted = evaluate.fit_labels(annotator, documents)
    counts = kinds(documents, found)
    new = unseen(fitted, found, mentions(datasets.load(str(DOCUMENTS), "train")))
    total = sum(len(document.spans) for document in documents)
    records = evaluate.fit_labels(annotator, datasets.load(str(RECORDS), "devel"))
    marked = evaluate.find(annotator, records)
    scores, missed = score.evaluate(records, marked).overall, kinds(records, marked)
    with_all = Annotator.load(annotator.bundle.path, replace(annotator.options, min_score=0.0))
    whole = evaluate.evaluate(with_all, records).overall
    short = sum(
        bool(_ABBREVIATION.fullmatch(document.text[start:end]))
        for document in records
        for start, end, _ in document.spans
    )
    return "\n".join(
        [
            "| errors on the devel documents | count | of labelled mentions |",
            "|---|---:|---:|",
            *(f"| {told} | {counts[kind]} | {counts[kind] / total:.1%} |" for kind, told in KINDS.items()),
            "",
            f"Mentions whose text stands in no training document: F1 {100 * new.overall.f1:.1f} "
            f"({new.overall.support} mentions of {total} on devel).",
            "",
            f"**Thirty short notes** in the style of electronic records (`benchmarks/records.jsonl`), {scores.support} "
            f"mentions, exact offsets: precision {100 * scores.precision:.1f}, recall {100 * scores.recall:.1f}, "
            f"F1 **{100 * scores.f1:.1f}** ({100 * scores.low:.1f} - {100 * scores.high:.1f}). {short} of the mentions "
            f"are abbreviations, and {missed['abbreviation']} of those are missed. With all spans, whatever their "
            f"score: precision {100 * whole.precision:.1f}, recall {100 * whole.recall:.1f}, F1 {100 * whole.f1:.1f}.",
        ]
    )


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="bundle")
    print(section(Annotator.load(parser.parse_args().model, Options(device="cpu"))))


if __name__ == "__main__":
    main()
