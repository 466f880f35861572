"""Tags become spans by one rule that covers five schemes; scores are means of word probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medner import decode
from medner.errors import ModelError

IO = ("O", "X", "Y")
IOB = ("O", "B-X", "I-X", "B-Y", "I-Y")
BIOES = ("O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "E-Y", "S-Y")
BILOU = ("O", "B-X", "I-X", "L-X", "U-X", "B-Y", "I-Y", "L-Y", "U-Y")
SCHEMES = st.sampled_from([IO, IOB, BIOES, BILOU])

Found = list[tuple[int, int, str]]


def spans(tags: Sequence[str], labels: tuple[str, ...], breaks: Sequence[int] = ()) -> Found:
    """(first, last word inclusive, type) of each span."""
    known = decode.tag_set(labels)
    is_break = np.zeros(len(tags), dtype=np.bool_)
    is_break[list(breaks)] = True
    ids = np.array([labels.index(tag) for tag in tags], dtype=np.int16)
    found = decode.spans(ids, np.ones(len(tags), np.float32), is_break, known)
    return [
        (first, last, known.types[kind])
        for first, last, kind in zip(found.first.tolist(), found.last.tolist(), found.type.tolist(), strict=True)
    ]


def reference(tags: Sequence[str], breaks: set[int]) -> Found:
    """The rule as a plain loop: a word goes on with the open span, or opens its own, or is outside."""
    found: Found = []
    is_open = False
    for i, tag in enumerate(tags):
        kind, _, name = ("O", "", "") if tag == "O" else tag.partition("-") if "-" in tag else ("I", "", tag)
        if kind == "O":
            is_open = False
            continue
        if is_open and found[-1][2] == name and kind in "IEL" and i not in breaks:
            found[-1] = found[-1][0], i, name
        else:
            found.append((i, i, name))
        is_open = kind in "BI"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Schemes


def test_meaning_of_labels() -> None:
    """Types stand in order of first appearance; B, S, U open; E, L, S, U close; names may hold hyphens."""
    known = decode.tag_set(("B-X", "O", "I-X", "E-X-ray", "S_Y", "L-X", "U-X"))
    assert known.types == ("X", "X-ray", "Y")
    assert known.type_of.tolist() == [0, -1, 0, 1, 2, 0, 0]
    assert known.opens.tolist() == [True, False, False, False, True, False, True]
    assert known.closes.tolist() == [False, False, False, True, True, True, True]


def test_labels_without_prefixes_are_types() -> None:
    """Where not every label has a prefix, all of them are types, as in IO."""
    known = decode.tag_set(("O", "B-cell", "Gene"))
    assert known.types == ("B-cell", "Gene")
    assert known.opens.tolist() == known.closes.tolist() == [False, False, False]


@pytest.mark.parametrize("nothing", [(), ("PAD",), ("X", "[CLS]")])
def test_prefixes_without_a_type(nothing: tuple[str, ...]) -> None:
    """``B`` and ``I`` alone are tags of one type, as in the data sets of BioBERT; a mention is not cut in two."""
    labels = ("O", "B", "I", *nothing)
    assert spans(["B", "I", "B", "O", "I"], labels) == [(0, 1, "Entity"), (2, 2, "Entity"), (4, 4, "Entity")]
    assert spans(["B", "I", "E", "S"], ("B", "I", "O", "E", "S")) == [(0, 2, "Entity"), (3, 3, "Entity")]
    assert decode.tag_set(("O", "I", "PER")).types == ("I", "PER")
    assert decode.tag_set(("O", "B", "PER")).types == ("B", "PER")
    assert decode.tag_set(("O", "E")).types == ("E",)
    assert decode.tag_set(("O", "B", "E", "S")).types == ("Entity",)


@pytest.mark.parametrize("other", ["Hepatitis-B", "s-Hepatitis", "i-Hepatitis", "Hepatitis/B"])
def test_types_that_look_like_prefixes(other: str) -> None:
    """One alone shows nothing."""
    assert decode.tag_set(("O", "Hepatitis", other)).types == ("Hepatitis", other)


@pytest.mark.parametrize("nothing", ["PAD", "[PAD]", "X", "[CLS]"])
def test_a_class_for_padding_means_o(nothing: str) -> None:
    """Scripts that give padding or sub-tokens a class of their own beside IOB2 do not make B and I types by it."""
    assert spans(["B-X", "I-X", nothing, "I-X"], (*IOB, nothing)) == [(0, 1, "X"), (3, 3, "X")]
    assert decode.tag_set((*IOB, nothing)).types == ("X", "Y")


@pytest.mark.parametrize(
    ("labels", "odd"),
    [
        (("O", "B-X", "M-X", "E-X", "S-X"), "M-X"),
        (("O", "B-X", "I-X", "MISC"), "MISC"),
        (("O", "X-B", "X-I"), "X-B"),
        (("O", "Disease", "I-Disease"), "Disease"),
        (("O", "b-disease", "i-disease"), "b-disease"),
        (("O", "B:Disease", "I:Disease"), "B:Disease"),
        (("O", "B", "I", "MISC"), "MISC"),
        (("O", "B", "I-Disease"), "B"),
    ],
)
def test_schemes_that_are_not_known(labels: tuple[str, ...], odd: str) -> None:
    """BMES, a mixture and suffixes would be read as types of their own; the label that tells is named."""
    with pytest.raises(ModelError) as caught:
        decode.tag_set(labels)
    assert str(caught.value) == (
        f"the label {odd} is of no scheme that is known (IO, IOB1, IOB2, BIOES, BILOU): rename the labels in "
        "config.json"
    )


def test_a_model_without_o_is_refused() -> None:
    """A classifier of another kind is named as such, with at most eight of its labels."""
    with pytest.raises(ModelError) as caught:
        decode.tag_set(("positive", "negative"))
    assert str(caught.value) == "no label O among positive, negative; this is not a tagging model"
    with pytest.raises(ModelError) as caught:
        decode.tag_set(tuple("abcdefghij"))
    assert str(caught.value) == "no label O among a, b, c, d, e, f, g, h; this is not a tagging model"


@pytest.mark.parametrize(
    ("labels", "tags", "expected"),
    [
        # IO: neighbours of one type are one span, another type begins a new one.
        (IO, "O X X O Y X O", [(1, 2, "X"), (4, 4, "Y"), (5, 5, "X")]),
        # IOB1: I- opens a span, B- only separates it from one that it touches.
        (IOB, "I-X I-X B-X I-X O I-Y", [(0, 1, "X"), (2, 3, "X"), (5, 5, "Y")]),
        # IOB2.
        (IOB, "B-X I-X O B-Y B-Y I-Y", [(0, 1, "X"), (3, 3, "Y"), (4, 5, "Y")]),
        # An orphan I- opens a span, also after another type.
        (IOB, "O I-X I-X B-Y I-X I-Y", [(1, 2, "X"), (3, 3, "Y"), (4, 4, "X"), (5, 5, "Y")]),
        # BIOES as it should be.
        (BIOES, "B-X I-X E-X S-X S-Y O B-Y E-Y", [(0, 2, "X"), (3, 3, "X"), (4, 4, "Y"), (6, 7, "Y")]),
        # A missing E: the span ends before O, before another type, and before B.
        (BIOES, "B-X I-X O B-X I-Y E-Y B-X B-X E-X", [(0, 1, "X"), (3, 3, "X"), (4, 5, "Y"), (6, 6, "X"), (7, 8, "X")]),
        # Nothing goes on after E or S; an orphan E or I is a span.
        (BIOES, "B-X E-X I-X E-X O E-X E-X S-X I-X", [(0, 1, "X"), (2, 3, "X"), *[(i, i, "X") for i in (5, 6, 7, 8)]]),
        # BILOU likewise.
        (BILOU, "B-X I-X L-X U-X O L-Y I-Y L-Y", [(0, 2, "X"), (3, 3, "X"), (5, 5, "Y"), (6, 7, "Y")]),
        (IOB, "O O", []),
        (IOB, "", []),
    ],
)
def test_spans_worked_by_hand(labels: tuple[str, ...], tags: str, expected: Found) -> None:
    """Each scheme by its own rule, malformed sequences repaired."""
    assert spans(tags.split(), labels) == expected


def test_breaks_end_spans() -> None:
    """No span goes on into a word with a break before it; a break before a word outside changes nothing."""
    tags = ["B-X", "I-X", "I-X", "O", "I-X"]
    assert spans(tags, IOB, [2]) == [(0, 1, "X"), (2, 2, "X"), (4, 4, "X")]
    assert spans(tags, IOB, [0, 3, 4]) == [(0, 2, "X"), (4, 4, "X")]
    assert spans(["X", "X", "X"], IO, [1, 2]) == [(0, 0, "X"), (1, 1, "X"), (2, 2, "X")]


@settings(max_examples=300, deadline=None)
@given(st.data(), SCHEMES)
def test_spans_equal_a_plain_loop(data: st.DataObject, labels: tuple[str, ...]) -> None:
    """Any tags of any scheme with any breaks give what a loop over the words gives."""
    tags = data.draw(st.lists(st.sampled_from(labels), max_size=40))
    breaks = data.draw(st.sets(st.integers(0, len(tags) - 1))) if tags else set()
    assert spans(tags, labels, sorted(breaks)) == reference(tags, breaks)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(IOB), max_size=40))
def test_iob2_equals_seqeval(tags: list[str]) -> None:
    """With orphan I- tags repaired, the spans are those of seqeval's get_entities."""
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    repaired = [
        f"B{tag[1:]}" if tag.startswith("I") and before[1:] != tag[1:] else tag
        for before, tag in zip(["O", *tags], tags, strict=False)
    ]
    expected = [(first, last, kind) for kind, first, last in labeling.get_entities(repaired)]
    assert spans(tags, IOB) == spans(repaired, IOB) == expected


def write_tags(length: int, found: Found, scheme: str) -> list[str]:
    """Spans written as the tags of one scheme."""
    tags = ["O"] * length
    for first, last, name in found:
        touches = first > 0 and tags[first - 1].endswith(name)
        opening = {"IO": "", "IOB1": "B-" if touches else "I-"}.get(scheme, "B-")
        inner = "" if scheme == "IO" else "I-"
        tags[first : last + 1] = [f"{inner}{name}"] * (last - first + 1)
        tags[first] = f"{opening}{name}"
        if scheme in ("BIOES", "BILOU"):
            tags[last] = f"{'EL'[scheme == 'BILOU']}-{name}"
            if first == last:
                tags[last] = f"{'SU'[scheme == 'BILOU']}-{name}"
    return tags


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from("XY")), max_size=10),
    st.sampled_from([("IO", IO), ("IOB1", IOB), ("IOB2", IOB), ("BIOES", BIOES), ("BILOU", BILOU)]),
)
def test_spans_survive_each_scheme(parts: list[tuple[int, int, str]], scheme: tuple[str, tuple[str, ...]]) -> None:
    """Spans written as tags come back; in IO those of one type must not touch."""
    found: Found = []
    end = 0
    for gap, length, name in parts:
        assume(scheme[0] != "IO" or gap or not found or found[-1][2] != name)
        found.append((end + gap, end + gap + length - 1, name))
        end += gap + length
    assert spans(write_tags(end + 1, found, scheme[0]), scheme[1]) == found


# ---------------------------------------------------------------------------------------------------------------------
# Scores and probabilities

PROBABILITIES = st.floats(0.125, 1.0, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(IOB), PROBABILITIES), min_size=1, max_size=40))
def test_scores_are_means_of_word_probabilities(words: list[tuple[str, float]]) -> None:
    """A span's score is the mean over its words, summed in double precision."""
    tags = np.array([IOB.index(tag) for tag, _ in words])
    probabilities = np.array([probability for _, probability in words], dtype=np.float32)
    found = decode.spans(tags, probabilities, np.zeros(len(tags), np.bool_), decode.tag_set(IOB))
    assert found.score.dtype == np.float32
    for first, last, score in zip(found.first, found.last, found.score, strict=True):
        inside = [probability for _, probability in words[first : last + 1]]
        assert score == pytest.approx(sum(inside) / len(inside), rel=1e-7)


@settings(max_examples=200, deadline=None)
@given(st.lists(PROBABILITIES, min_size=1, max_size=40), st.lists(PROBABILITIES, max_size=100), st.booleans())
def test_scores_do_not_depend_on_what_stands_before(span: list[float], before: list[float], touching: bool) -> None:
    """Bit for bit the same score, alone or behind any other words, inside a span or not."""
    known = decode.tag_set(IOB)
    other = IOB.index("B-Y" if touching else "O")

    def score(left: list[float]) -> float:
        tags = np.array([other] * len(left) + [IOB.index("B-X")] + [IOB.index("I-X")] * (len(span) - 1))
        probabilities = np.array(left + span, dtype=np.float32)
        found = decode.spans(tags, probabilities, np.zeros(len(tags), np.bool_), known)
        return float(found.score[-1])

    assert score(before) == score([])


def test_result_types() -> None:
    """Positions are int64, scores float32, also where there are none."""
    for tags in ([], [1, 2]):
        n = len(tags)
        found = decode.spans(np.array(tags, np.int16), np.ones(n, np.float32), np.zeros(n, bool), decode.tag_set(IOB))
        assert [found.first.dtype, found.last.dtype, found.type.dtype] == [np.int64] * 3
        assert found.score.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(0,), (1,), (7,), (3, 5), (2, 0)]),
    st.integers(1, 9),
    st.sampled_from([0.1, 1.0, 30.0, 1000.0]),
)
def test_best_equals_softmax(seed: int, shape: tuple[int, ...], n_labels: int, scale: float) -> None:
    """The class of the highest logit and its softmax probability, for moderate and for huge logits."""
    logits = np.random.default_rng(seed).normal(0, scale, (*shape, n_labels)).astype(np.float32)
    tags, probabilities = decode.best(logits)
    shifted = np.exp(logits.astype(np.float64) - logits.astype(np.float64).max(axis=-1, keepdims=True))
    softmax = shifted / shifted.sum(axis=-1, keepdims=True)
    assert tags.dtype == np.int16
    assert probabilities.dtype == np.float32
    assert tags.tolist() == softmax.argmax(axis=-1).tolist()
    np.testing.assert_allclose(probabilities, softmax.max(axis=-1), rtol=2e-6)


def test_the_first_of_equal_logits_counts() -> None:
    """A tie goes to the lower class, with the share that it has."""
    tags, probabilities = decode.best(np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], np.float32))
    assert tags.tolist() == [1, 0]
    assert probabilities == pytest.approx([1 / (2 + np.exp(-1)), 1 / 3], rel=1e-6)
