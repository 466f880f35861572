"""Strict scores equal seqeval's on tagged sentences, count exact offsets elsewhere, and come with their interval."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medner.datasets import Document, entities, of_tokens
from medner.score import Scores, agreement, difference, evaluate, strict, table, tags_of

TAGS = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])
SENTENCES = st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=12), min_size=1, max_size=8)


def repaired(tags: list[str]) -> list[str]:
    """IOB2 tags in which an orphan I- became a B-, written independently of the code under test."""
    before = ["O", *tags]
    return [
        f"B{tag[1:]}" if tag.startswith("I") and last[1:] != tag[1:] else tag
        for last, tag in zip(before, tags, strict=False)
    ]


def test_scores_worked_by_hand() -> None:
    """Of gold a, b, c found a exactly, b with a wrong end, c with a wrong label: 1 hit, 2 invented, 2 missed."""
    gold = [[(0, 4, "X"), (6, 9, "X")], [(0, 3, "Y")]]
    found = [[(0, 4, "X"), (6, 8, "X")], [(0, 3, "X")]]
    scores = strict(gold, found)
    assert (scores.overall.tp, scores.overall.fp, scores.overall.fn) == (1, 2, 2)
    assert scores.overall.precision == scores.overall.recall == scores.overall.f1 == pytest.approx(1 / 3)
    x, y = scores.labels
    assert (x.label, x.tp, x.fp, x.fn, x.support) == ("X", 1, 2, 1, 2)
    assert (x.precision, x.recall, x.f1) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert (y.label, y.tp, y.fp, y.fn, y.f1) == ("Y", 0, 0, 1, 0.0)


def test_nothing_to_find() -> None:
    """Without gold or predicted spans all shares are 0 and nothing divides by it."""
    assert strict([[]], [[]]).overall.f1 == 0.0
    assert strict([], []).overall.high == 0.0


def test_unequal_lengths_are_refused() -> None:
    """A prediction is needed for each document."""
    with pytest.raises(ValueError, match="1 documents, but predictions for 2"):
        strict([[]], [[], []])


def test_a_token_has_the_tag_of_its_first_character() -> None:
    """Tokens (X-linked), (gout), (in), (men): spans over words inside tokens become tags of whole tokens."""
    document = of_tokens("x", ["X-linked", "gout", "in", "men"], ["O"] * 4)
    assert document.text == "X-linked gout in men"
    assert tags_of(document, [(0, 13, "D")]) == ["B-D", "I-D", "O", "O"]
    assert tags_of(document, [(0, 1, "D")]) == ["B-D", "O", "O", "O"]
    assert tags_of(document, [(2, 13, "D")]) == ["O", "B-D", "O", "O"]
    assert tags_of(document, [(2, 8, "D"), (9, 13, "D"), (17, 20, "E")]) == ["O", "B-D", "O", "B-E"]
    with pytest.raises(ValueError, match="document y is not tokenized"):
        tags_of(Document("y", "gout", ()), [])


def test_tokenized_documents_are_scored_on_their_tokens() -> None:
    """A span that ends inside a token is the same entity there, and another one by offsets."""
    document = of_tokens("x", ["gout-like", "pain"], ["B-D", "O"])
    plain = Document("x", document.text, document.spans)
    found = [[(0, 4, "D")]]
    assert evaluate([document], found).overall.f1 == 1.0
    assert evaluate([plain], found).overall.f1 == 0.0
    units = [evaluate(documents, [[]] * len(documents)).unit for documents in ([document], [plain], [document, plain])]
    assert units == ["tokens", "offsets", "mixed"]


@settings(max_examples=150, deadline=None)
@given(SENTENCES)
def test_scores_equal_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    """On repaired tags, micro and per-label scores equal seqeval's in its strict mode with IOB2."""
    metrics = pytest.importorskip("seqeval.metrics.v1")
    scheme = pytest.importorskip("seqeval.scheme")
    gold = [[pair[0] for pair in sentence] for sentence in sentences]
    guess = [[pair[1] for pair in sentence] for sentence in sentences]
    documents = [of_tokens(str(i), [f"t{j}" for j in range(len(tags))], tags) for i, tags in enumerate(gold)]
    found = [of_tokens("", [f"t{j}" for j in range(len(tags))], tags).spans for tags in guess]
    scores = evaluate(documents, found)

    expected = [[repaired(tags) for tags in run] for run in (gold, guess)]
    ours = (scores.overall.precision, scores.overall.recall, scores.overall.f1)
    theirs = metrics.precision_recall_fscore_support(*expected, average="micro", scheme=scheme.IOB2, zero_division=0)
    assert ours == pytest.approx(theirs[:3])
    each = metrics.precision_recall_fscore_support(*expected, average=None, scheme=scheme.IOB2, zero_division=0)
    rows = [(row.precision, row.recall, row.f1, row.support) for row in scores.labels]
    assert rows == [pytest.approx(row) for row in zip(*each, strict=True)]


@given(st.lists(TAGS, max_size=20))
def test_tags_survive_the_way_to_spans_and_back(tags: list[str]) -> None:
    """Tags of the spans of tags are the repaired tags."""
    document = of_tokens("x", ["t"] * len(tags), tags)
    assert tags_of(document, document.spans) == repaired(tags)
    assert entities(repaired(tags)) == entities(tags)


def bootstrapped() -> Scores:
    """Scores of 60 documents with one gold span each, every third of which is missed."""
    gold = [[(0, 1, "X")] for _ in range(60)]
    return strict(gold, [spans if i % 3 else [] for i, spans in enumerate(gold)])


def test_the_interval_is_that_of_resampled_documents() -> None:
    """The interval equals a plain bootstrap's within its own noise, holds the score, and is the same every time."""
    scores = bootstrapped()
    rng = np.random.default_rng(0)
    hits = rng.binomial(60, 40 / 60, size=20_000)
    low, high = np.percentile(2 * hits / (hits + 60), [2.5, 97.5])
    assert (scores.overall.low, scores.overall.high) == pytest.approx((low, high), abs=0.015)
    assert scores.overall.low < scores.overall.f1 < scores.overall.high
    assert scores == bootstrapped()
    assert scores.labels[0].low == scores.overall.low


def test_the_difference_of_two_runs_is_on_the_same_documents() -> None:
    """Equal runs differ by nothing; an error that one run adds shows though its own interval is many times as wide."""
    documents = [Document(str(i), "gout", ((0, 4, "X"),)) for i in range(60)]
    first = [list(document.spans) if i % 3 else [] for i, document in enumerate(documents)]
    second = [spans if i % 10 != 1 else [(0, 2, "Y")] for i, spans in enumerate(first)]
    assert difference(documents, first, first) == (0.0, 0.0, 0.0)
    change, low, high = difference(documents, first, second)
    scores = [evaluate(documents, run).overall for run in (first, second)]
    assert change == pytest.approx(scores[1].f1 - scores[0].f1)
    assert low < change < high < 0
    assert scores[1].high > scores[0].low
    assert difference(documents, second, first) == pytest.approx((-change, -high, -low))
    assert difference([], [], []) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="zip"):
        difference(documents, first, second[1:])


def test_table_and_json() -> None:
    """The table lists labels and the overall row, or only the label where there is one; JSON holds plain values."""
    two = strict([[(0, 1, "X"), (2, 3, "Long label")]], [[(0, 1, "X")]])
    assert table(two) == (
        "label       precision  recall      F1    95 % interval  support\n"
        "Long label       0.00    0.00    0.00      0.00 - 0.00        1\n"
        "X              100.00  100.00  100.00  100.00 - 100.00        1\n"
        "all            100.00   50.00   66.67    66.67 - 66.67        2"
    )
    assert table(strict([[(0, 1, "X")]], [[]])).splitlines()[1:] == [
        "X           0.00    0.00    0.00      0.00 - 0.00        1"
    ]
    plain = json.loads(json.dumps(two.as_dict()))
    assert (plain["documents"], plain["unit"], list(plain["labels"])) == (1, "offsets", ["Long label", "X"])
    assert plain["overall"] == {
        "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "low": pytest.approx(2 / 3),
        "high": pytest.approx(2 / 3), "tp": 1, "fp": 0, "fn": 1, "support": 2,
    }  # fmt: skip


def test_agreement_of_two_runs() -> None:
    """Twice the common spans over all spans of both; two runs that found nothing agree."""
    a = [("n1", 0, 4, "X"), ("n1", 6, 9, "X"), ("n2", 0, 4, "X")]
    b = [("n1", 0, 4, "X"), ("n2", 0, 4, "Y")]
    assert agreement(a, b) == agreement(b, a) == pytest.approx(2 / 5)
    assert agreement(a, a) == agreement([], []) == 1.0
    assert agreement(a, []) == 0.0
