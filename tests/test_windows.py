"""Pieces, segments and windows tile a note; words are BERT's; batches hold one padded length."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sentencex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from medner import testing, windows
from medner.windows import Window, WordTokenizer

FRAGMENTS = st.sampled_from(
    [
        *" \n\r\t.!?:;,-*'\"()[]/",
        *"\x00\x0b\x0c\x1c\x1f\x85\xa0\xad\u0301\u0338\u200b\u200d\u2007\u2028\u2029\u202f\u3000\ufeff\ufffd",
        *"aB1é病。ßİ🙂",
        *("\r\n", "\n\n", "\r\n\r\n", " \n ", "\n- ", "\n1. ", "\n• ", "\na) "),
        *("Plan:", "HISTORY", "Dr.", "e.g.", "A.", "vs. ", "Type 2 diabetes", "👩\u200d⚕️", "x" * 40),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join)


def cut(text: str) -> list[str]:
    """The segments of a text as strings."""
    return [text[start:end] for start, end in pairwise(windows.segments(text))]


def basic_words(text: str) -> list[tuple[int, int]]:
    """Offsets of the words of BERT's basic tokenizer, as the tokenizers library computes them."""
    splitter = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    splitter.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    splitter.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return list(splitter.encode(text, add_special_tokens=False).offsets)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 30))
def test_pieces_tile_any_text(text: str, limit: int) -> None:
    """Pieces follow one another from 0 to the end, none is empty and none is longer than the limit."""
    found = list(windows.pieces(text, limit))
    assert "".join(text[start:end] for start, end in found) == text
    assert [start for start, _ in found] == [0, *(end for _, end in found)][: len(found)]
    assert all(0 < end - start <= limit for start, end in found)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("0123456789", ["0123456789"]),
        ("ab cde\n\nfgh ijk", ["ab cde\n\n", "fgh ijk"]),
        ("ab cde\nfg hijk lm", ["ab cde\n", "fg hijk lm"]),
        ("ab cdefg hijk", ["ab cdefg ", "hijk"]),
        ("abcdef,ghijk", ["abcdef,", "ghijk"]),
        ("abcde病病病ghijk", ["abcde病病病", "ghijk"]),
        ("abcdefghijkl", ["abcdefghij", "kl"]),
        # To BERT a symbol is a letter, and a control character is nothing: neither ends a word.
        ("     .,b🙂cd", ["     .,", "b🙂cd"]),
        ("     .,b\x0ccd", ["     .,", "b\x0ccd"]),
        ("a\nbc\n\ndefghijklm", ["a\nbc\n\n", "defghijklm"]),
        ("ab cd\r\n\r\nefg\nhi j", ["ab cd\r\n\r\n", "efg\nhi j"]),
        ("ab cd\n \nfg\nhi j", ["ab cd\n \n", "fg\nhi j"]),
        # The end of a sentence before the line break inside the next one.
        ("ab cd. E\nf g", ["ab cd.", " E\nf g"]),
    ],
)
def test_where_pieces_are_cut(text: str, pieces: list[str]) -> None:
    """At most 10 characters: a blank line, a sentence's end, a line break, white space, the edge of a word."""
    assert [text[start:end] for start, end in windows.pieces(text, 10)] == pieces


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(4, 30))
def test_pieces_do_not_split_words(text: str, limit: int) -> None:
    """Where no word fills half a piece, no piece ends inside a word of the basic tokenizer."""
    words = basic_words(text)
    # What BERT drops, such as control characters, joins what it parts: to a cut they are letters.
    dropped = {c for c in text if c == "\ufffd" or (c not in "\t\n\r" and unicodedata.category(c).startswith("C"))}
    kept = "".join("a" if c in dropped else c for c in text)
    assume(all(end - start < limit // 2 for start, end in basic_words(kept)))
    cuts = {start for start, _ in windows.pieces(text, limit)}
    assert not [word for word in words for at in cuts if word[0] < at < word[1]]


# ---------------------------------------------------------------------------------------------------------------------
# Segments


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_segments_tile_any_text(text: str) -> None:
    """Bounds ascend strictly from 0 to the end of the text."""
    bounds = windows.segments(text)
    assert bounds[0] == 0
    assert bounds[-1] == len(text)
    assert all(low < high for low, high in pairwise(bounds))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_segments_do_not_split_words(text: str) -> None:
    """No segment ends inside a word of the basic tokenizer."""
    cuts = windows.segments(text)
    assert not [word for word in basic_words(text) for at in cuts if word[0] < at < word[1]]


def test_white_space_beyond_ascii() -> None:
    """sentencex alone panics on a lone letter, a white space beyond ASCII and a full stop; notes hold such places."""
    for space in (c for c in map(chr, range(0x3001)) if c.isspace()):
        text = f"Hepatitis A{space}. Fever, J.{space}Smith, A.{space} B{space}. C"
        assert "".join(cut(text)) == text


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", []),
        ("   ", ["   "]),
        ("\n\n", ["\n\n"]),
        ("  lead. Trail  \n ", ["  lead.", " Trail  \n "]),
        # Sentence ends, and full stops that are none.
        ("Dr. Smith saw her. No fever.", ["Dr. Smith saw her.", " No fever."]),
        ("She takes 2.5 mg daily. Is it gout?  Yes!", ["She takes 2.5 mg daily.", " Is it gout?", "  Yes!"]),
        # A lone line break of any kind is nothing.
        ("The patient has breast\ncancer. She is well.", ["The patient has breast\ncancer.", " She is well."]),
        ("known breast\r\ncancer and heart\rfailure", ["known breast\r\ncancer and heart\rfailure"]),
        # A blank line cuts, whatever white space it holds.
        ("has asthma\n\nand fever", ["has asthma", "\n\nand fever"]),
        ("has asthma\r\n \t\r\nand fever", ["has asthma", "\r\n \t\r\nand fever"]),
        ("has asthma\r\rand fever", ["has asthma", "\r\rand fever"]),
        # List items cut before themselves, a wrapped item stays whole.
        ("- asthma\n- fever\nand chills\n* gout", ["- asthma", "\n- fever\nand chills", "\n* gout"]),
        ("1) flu\n 2) gout\n(3) mumps\nb) pain", ["1) flu", "\n 2) gout", "\n(3) mumps", "\nb) pain"]),
        ("• flu\n• gout\n– pain", ["• flu", "\n• gout", "\n– pain"]),
        ("blood pressure of\n120 over 80", ["blood pressure of\n120 over 80"]),
        ("heart rate\n-5 below\n2.5 above", ["heart rate\n-5 below\n2.5 above"]),
        # Headings: capitals among other lines, a line that ends in a colon, a line that starts with a label.
        (
            "ASSESSMENT\nThe patient has\nasthma.\nPLAN\nRest",
            ["ASSESSMENT", "\nThe patient has\nasthma.", "\nPLAN", "\nRest"],
        ),
        ("she has the following:\nfever", ["she has the following:", "\nfever"]),
        ("seen with\nAllergies: penicillin\ncauses rash", ["seen with", "\nAllergies:", " penicillin\ncauses rash"]),
        # A heading leads a sentence or an item, and something follows it.
        ("Lungs: clear. Past Surgical History: none", ["Lungs:", " clear.", " Past Surgical History:", " none"]),
        ("• Eyes (both):  red\n- CC: pain", ["• Eyes (both):", "  red", "\n- CC:", " pain"]),
        ("(a) MSK: normal\nPlan: ", ["(a) MSK:", " normal", "\nPlan: "]),
        ("We found two genes: both new", ["We found two genes: both new"]),
        ("Seen at 10:30. Ratio A:B rose", ["Seen at 10:30.", " Ratio A:B rose"]),
        ("seen at\nthe time: 12\nto 13", ["seen at\nthe time: 12\nto 13"]),
        ("the ratio was\nA:B and fell", ["the ratio was\nA:B and fell"]),
        ("we asked for a\nCT\nof the head", ["we asked for a\nCT\nof the head"]),
        # A note all in capitals is not all headings.
        ("KNOWN TO HAVE BREAST\nCANCER AND HEART\nFAILURE", ["KNOWN TO HAVE BREAST\nCANCER AND HEART\nFAILURE"]),
    ],
)
def test_segments_worked_by_hand(text: str, segments: list[str]) -> None:
    """Sentences, blank lines, list items and headings cut; a lone line break does not; white space leads."""
    assert cut(text) == segments


MEGABYTE = 1_000_000
ADVERSARIAL = {
    "newlines": "\n",
    "carriage returns": "\r",
    "spaces": " ",
    "tabs": "\t",
    "blank lines with spaces": " \n",
    "sentences of a letter": "a. ",
    "capital sentences": "A. ",
    "one word": "a",
    "full stops": ".",
    "quotes": '"',
    "open brackets": "(",
    "list items": "- \n",
    "labels": "A:\n",
    "a label without end": "A b",
    "headings": "ABCD\n",
    "sentences in quotes": '"A. ',
    "Chinese": "病",
}


@pytest.mark.parametrize("unit", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("function", [windows.segments, lambda text: list(windows.pieces(text))], ids=["seg", "piece"])
def test_time_is_linear_on_adversarial_text(function: Callable[[str], object], unit: str) -> None:
    """A megabyte of one thing takes seconds of the processor (here at most ten), not hours."""
    text = unit * (MEGABYTE // len(unit))
    began = time.process_time()
    assert function(text)
    assert time.process_time() - began < 10


# ---------------------------------------------------------------------------------------------------------------------
# Words


def tiny_json(**changes: object) -> str:
    """The tiny bundle's tokenizer with some settings replaced."""
    return json.dumps(json.loads((testing.bundle() / "tokenizer.json").read_text(encoding="utf-8")) | changes)


def cased() -> WordTokenizer:
    """A BERT tokenizer that knows no word and changes no character, so that every word is one [UNK]."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return WordTokenizer(made.to_str())


CASED = cased()
TINY = WordTokenizer(tiny_json())
GENERAL = WordTokenizer(tiny_json())
GENERAL._is_bert = False

# The tokenizers library holds an older version of Unicode than Python: characters that both know alike. Left out are
# a sign whose category changed, and two that only BERT's Python form turns into other characters (NFC).
SHARED_CHARACTERS = [
    c
    for c in map(chr, range(0x110000))
    if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs", "Co") and c not in "\u166d\u1fef\u0338"
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SHARED_CHARACTERS) | FRAGMENTS, max_size=40).map("".join))
def test_words_are_those_of_the_basic_tokenizer(text: str) -> None:
    """The words are those of transformers' BasicTokenizer, whose NFC form and dropped characters are undone here."""
    reference = pytest.importorskip("transformers.models.bert.tokenization_bert").BasicTokenizer
    assume("\u0338" not in text)

    def clean(word: str) -> str:
        kept = (c for c in word if c in "\t\n\r" or not (c == "\ufffd" or unicodedata.category(c).startswith("C")))
        return unicodedata.normalize("NFC", "".join(kept))

    chars = CASED.tokenize([text]).chars(0).tolist()
    expected = reference(do_lower_case=False, strip_accents=False).tokenize(text)
    assert [clean(text[start:end]) for start, end in chars] == expected
    assert not [word for word in chars if text[word[0]].isspace() or text[word[1] - 1].isspace()]


ASCII = st.lists(
    st.characters(max_codepoint=127) | st.sampled_from(["[SEP]", "[PAD]", "type 2", "a\x00b", "x" * 101, "\r\n"]),
    max_size=30,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(ASCII | TEXTS, max_size=6))
def test_fast_path_on_ascii_gives_the_same_words(texts: list[str]) -> None:
    """On ASCII the tokenizer's own words stand in for the basic tokenizer's: the same tokens, words and offsets.

    So it is where segments of other text stand among them.
    """
    fast, general = TINY.tokenize(texts), GENERAL.tokenize(texts)
    assert TINY._is_bert
    for name in ("ids", "bounds", "word_token", "word_bounds"):
        assert getattr(fast, name).tolist() == getattr(general, name).tolist()
    for segment, text in enumerate(texts):
        assert fast.chars(segment).tolist() == general.chars(segment).tolist()
        # Of other text the tiny bundle drops combining marks, which make words of their own to the basic tokenizer.
        assert not text.isascii() or fast.chars(segment).tolist() == [list(word) for word in basic_words(text)]


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_segments_are_tokenized_alone(texts: list[str]) -> None:
    """A segment's tokens, words and offsets are those it has when it is the only one."""
    together = TINY.tokenize(texts)
    for number, text in enumerate(texts):
        alone = TINY.tokenize([text])
        low, high = together.bounds[number : number + 2]
        first, last = together.word_bounds[number : number + 2]
        assert together.ids[low:high].tolist() == alone.ids.tolist()
        assert (together.word_token[first:last] - low).tolist() == alone.word_token.tolist()
        assert together.chars(number).tolist() == alone.chars(0).tolist()


def test_words_and_tokens_worked_by_hand() -> None:
    """``heart-ache`` has tokens heart - a ##c ##h ##e and words heart - ache; the words' tokens are 0, 1 and 2."""
    tokens = TINY.tokenize(["heart-ache", "", "Ünd\u200b 病"])
    vocabulary = json.loads(tiny_json())["model"]["vocab"]
    names = ["heart", "-", "a", "##c", "##h", "##e", "u", "##n", "##d", "[UNK]"]
    assert tokens.ids.tolist() == [vocabulary[name] for name in names]
    assert tokens.bounds.tolist() == [0, 6, 6, 10]
    assert tokens.word_token.tolist() == [0, 1, 2, 6, 9]
    assert tokens.word_bounds.tolist() == [0, 3, 3, 5]
    assert tokens.chars(0).tolist() == [[0, 5], [5, 6], [6, 10]]
    assert tokens.chars(1).tolist() == []
    assert tokens.chars(2).tolist() == [[0, 3], [5, 6]]
    assert (TINY.prefix, TINY.suffix, TINY.unknown_id, TINY.pad_id) == ((2,), (3,), 1, 0)


def test_words_that_share_a_token_are_one() -> None:
    """An added token "covid-19" has one label, and so one word: covid, - and 19 would be three mentions."""
    config = json.loads(tiny_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    config["added_tokens"].append({"id": len(config["model"]["vocab"]), "content": "covid-19", **flags})
    tokens = WordTokenizer(json.dumps(config)).tokenize(["fever, covid-19 fever", "heart-ache"])
    assert tokens.chars(0).tolist() == [[0, 5], [5, 6], [7, 15], [16, 21]]
    assert tokens.chars(1).tolist() == [[0, 5], [5, 6], [6, 10]]
    assert tokens.word_token.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert tokens.word_bounds.tolist() == [0, 4, 7]


def test_nothing_to_tokenize() -> None:
    """No segments give no tokens and no words."""
    tokens = TINY.tokenize([])
    assert (tokens.ids.tolist(), tokens.bounds.tolist()) == ([], [0])
    assert (tokens.word_token.tolist(), tokens.word_bounds.tolist()) == ([], [0])


def test_special_tokens_in_a_note_are_text() -> None:
    """``[SEP]`` in a note is a bracket, three letters and a bracket, not the separator."""
    tokens = TINY.tokenize(["a [SEP] b [PAD]"])
    assert not {0, 1, 2, 3} & set(tokens.ids.tolist())
    assert [("a [SEP] b [PAD]")[start:end] for start, end in tokens.chars(0)] == [
        *("a", "[", "SEP", "]", "b", "[", "PAD", "]"),
    ]


def test_padding_and_truncation_of_the_file_are_ignored() -> None:
    """Settings left over from training neither cut a long text nor pad a short one."""
    padding = {
        "strategy": {"Fixed": 16},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 7,
        "pad_type_id": 0,
        "pad_token": "fever",
    }
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    made = WordTokenizer(tiny_json(padding=padding, truncation=truncation))
    texts = ["fever", "type 2 diabetes and heart failure"]
    assert made.tokenize(texts).ids.tolist() == TINY.tokenize(texts).ids.tolist()
    assert (made.prefix, made.suffix, made.pad_id) == ((2,), (3,), 7)


CORPUS = [
    "The patient has type 2 diabetes mellitus and heart failure.",
    "No fever, no chills; breast cancer was excluded in 2019.",
    "Café au lait spots, β-thalassaemia and naïve T-cells.",
    "She takes 2.5 mg (twice daily) for long-standing asthma.",
]
UNSEEN = "Fièvre (39.5 °C)\nin  a naïve-looking patient: “β-blocker” 病気🙂 x\u200by\r\n\tasthma."


def byte_level() -> str:
    """A byte-level BPE tokenizer like RoBERTa's, trained on a few sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return str(made.to_str())


def unigram() -> str:
    """A Unigram tokenizer with Metaspace like XLM-R's, trained on a few sentences."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>", "<unk>", "<pad>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return str(made.to_str())


@pytest.mark.parametrize("make", [byte_level, unigram])
def test_every_word_gets_the_token_that_holds_its_first_character(make: Callable[[], str]) -> None:
    """Whatever the tokenizer, words are BERT's; a word's token is the first one that covers its first character.

    Words that share it are one.
    """
    file = make()
    ours, plain = WordTokenizer(file), Tokenizer.from_str(file)
    for text in (*CORPUS, UNSEEN, "".join(CORPUS), " ".join(UNSEEN)):
        tokens = ours.tokenize([text])
        offsets = plain.encode(text, add_special_tokens=False).offsets
        words: dict[int, list[int]] = {}
        for start, end in basic_words(text):
            holding = next(i for i, (low, high) in enumerate(offsets) if low <= start < high)
            words.setdefault(holding, [start, end])[1] = end
        assert tokens.chars(0).tolist() == list(words.values())
        assert tokens.word_token.tolist() == list(words)


def test_special_tokens_of_other_tokenizers() -> None:
    """Prefix, suffix, unknown and padding id come from the tokenizer itself."""
    bpe = WordTokenizer(byte_level())
    assert (bpe.prefix, bpe.suffix, bpe.unknown_id, bpe.pad_id) == ((0,), (1,), -1, 2)
    one_sided = WordTokenizer(unigram())
    assert (one_sided.prefix, one_sided.suffix) == ((), (1,))
    assert (one_sided.unknown_id, one_sided.pad_id) == (2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def bounds_of(lengths: Sequence[int]) -> windows.Ints:
    """Token bounds of segments with these lengths."""
    return np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))]).astype(np.int64)


def test_windows_worked_by_hand() -> None:
    """At most 8 tokens: 3 + 4 fit; 2 begin a new window; 13 are cut with overlap; 8 fit exactly."""
    found = windows.pack(bounds_of([3, 4, 2, 13, 8]), 0, 5, 8)
    assert found == [
        Window(0, 7, 0, 7),
        Window(7, 9, 7, 9),
        # 9..22 with a stride of 6: starts 9 and, moved back to end with the segment, 14; they share 14, 15 and 16.
        Window(9, 17, 9, 15),
        Window(14, 22, 15, 22),
        Window(22, 30, 22, 30),
    ]
    assert windows.pack(bounds_of([3, 4, 2, 13, 8]), 1, 3, 8) == [Window(3, 9, 3, 9)]
    assert windows.pack(bounds_of([0, 0]), 0, 2, 8) == []
    assert windows.pack(bounds_of([]), 0, 0, 8) == []


def test_windows_of_one_segment() -> None:
    """Without packing each segment has its own window; empty ones have none, and long ones are cut as ever."""
    found = windows.pack(bounds_of([3, 0, 4, 13, 8]), 0, 5, 8, packed=False)
    assert [(window.own_start, window.own_end) for window in found] == [(0, 3), (3, 7), (7, 13), (13, 20), (20, 28)]


SEGMENT_LENGTHS = st.lists(st.integers(0, 12) | st.integers(0, 150), max_size=25)


@settings(max_examples=300, deadline=None)
@given(SEGMENT_LENGTHS, st.integers(1, 40), st.booleans(), st.data())
def test_owned_ranges_tile_the_tokens(lengths: list[int], capacity: int, packed: bool, data: st.DataObject) -> None:
    """Every token has one window that answers for it and holds it; no window is empty or longer than allowed."""
    bounds = bounds_of(lengths)
    first = data.draw(st.integers(0, len(lengths)))
    last = data.draw(st.integers(first, len(lengths)))
    found = windows.pack(bounds, first, last, capacity, packed=packed)
    owned = [token for window in found for token in range(window.own_start, window.own_end)]
    assert owned == list(range(bounds[first], bounds[last]))
    for window in found:
        assert window.start <= window.own_start < window.own_end <= window.end
        assert window.end - window.start <= capacity


@settings(max_examples=300, deadline=None)
@given(SEGMENT_LENGTHS, st.integers(1, 40))
def test_short_segments_are_packed_whole(lengths: list[int], capacity: int) -> None:
    """Segments that fit go in order into the current window, else into the next: plain next-fit packing."""
    bounds = bounds_of(lengths)
    expected: list[tuple[int, int]] = []
    is_open = False
    for low, high in pairwise(bounds.tolist()):
        if high - low > capacity:
            expected.append((low, high))
            is_open = False
        elif is_open and high - expected[-1][0] <= capacity:
            expected[-1] = expected[-1][0], high
        elif high > low:
            expected.append((low, high))
            is_open = True
    found = windows.pack(bounds, 0, len(lengths), capacity)
    whole = [(window.start, window.end) for window in found]
    long = [(low, high) for low, high in expected if high - low > capacity]
    assert [w for w in whole if not any(low <= w[0] < high for low, high in long)] == [
        e for e in expected if e not in long
    ]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 400), st.integers(1, 64))
def test_labels_come_from_the_window_furthest_from_an_edge(length: int, capacity: int) -> None:
    """Of the windows that hold a token of a long segment, none has it further from its nearer edge than its owner."""
    found = windows.pack(bounds_of([length]), 0, 1, capacity)

    def distance(window: Window, token: int) -> int:
        return min(token - window.start, window.end - 1 - token)

    for window in found:
        for token in range(window.own_start, window.own_end):
            holders = [other for other in found if other.start <= token < other.end]
            assert distance(window, token) == max(distance(other, token) for other in holders)
    if length > capacity:
        assert {window.end - window.start for window in found} == {capacity}
        # A quarter is shared, by the last two windows perhaps more.
        shared = [left.end - right.start for left, right in pairwise(found)]
        assert shared[:-1] == [capacity // 4] * (len(shared) - 1)
        assert shared[-1] >= capacity // 4


# ---------------------------------------------------------------------------------------------------------------------
# Text that is no prose


@pytest.mark.parametrize("unit", ["“", "‘「」", "`a ", "word ", "漢", "x"])
def test_long_stretches(unit: str) -> None:
    """The splitter gets what it is through with soon, and what is no sentence is cut nowhere."""
    given: list[str] = []
    split = sentencex.get_sentence_boundaries

    def seen(language: str, text: str) -> Any:
        given.append(text)
        return split(language, text)

    text = unit * (120_000 // len(unit))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencex, "get_sentence_boundaries", seen)
        bounds = windows.segments(text)
    assert sum(map(len, given)) == len(text)
    assert max(map(len, given)) <= windows._STRETCH_CHARS
    assert not any(mark in each for each in given for mark in "“‘「」`")
    assert bounds == [0, len(text)]


def test_long_stretches_of_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cut where sentences end, as though the splitter had got them whole."""
    sentences = (
        "He was well at 3.5 mg.",
        "Dr. Gray said “no. not now” twice!",
        "It’s 5’ tall?",
        "word " * 4000 + "end.",
    )
    rng = random.Random(3)
    text = " ".join(rng.choice(sentences[:3]) if n % 700 else sentences[3] for n in range(1, 6000))
    found = windows.segments(text)
    assert len(found) > 5000
    monkeypatch.setattr(windows, "_STRETCH_CHARS", len(text))
    assert found == windows.segments(text)


def test_quotes_of_prose_stay() -> None:
    """They tell where a sentence ends."""
    text = "She said “I am well. I sleep.” and left. " * 200
    assert windows._flattened(text) == text


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_batches_worked_by_hand() -> None:
    """Lengths are padded to multiples of 8; longest first, then in order; 32 tokens hold two windows of 16."""
    assert [windows.padded_length(n) for n in (1, 7, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 24]
    lengths = [9, 3, 16, 10, 8, 40, 15]
    assert list(windows.batches(lengths, 32)) == [[5], [0, 2], [3, 6], [1, 4]]
    assert list(windows.batches(lengths, 1)) == [[5], [0], [2], [3], [6], [1], [4]]
    assert list(windows.batches([], 32)) == []


def test_batches_of_one_length_worked_by_hand() -> None:
    """With a multiple of one no window is padded: a batch holds windows of one length only."""
    assert [windows.padded_length(n, 1) for n in (1, 7, 8, 9)] == [1, 7, 8, 9]
    lengths = [9, 3, 16, 10, 9, 40, 9, 9, 10]
    assert list(windows.batches(lengths, 32, 1)) == [[5], [2], [3, 8], [0, 4, 6], [7], [1]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 130), max_size=60), st.integers(1, 1024), st.sampled_from([1, 8, 16]))
def test_batches_hold_each_window_once_and_keep_the_budget(lengths: list[int], budget: int, multiple: int) -> None:
    """One padded length a batch, at most ``budget`` padded tokens unless a single window has more, none half empty."""
    found = list(windows.batches(lengths, budget, multiple))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    padded = [[-(-lengths[index] // multiple) * multiple for index in batch] for batch in found]
    assert all(len(set(batch)) == 1 for batch in padded)
    assert all(sum(batch) <= budget or len(batch) == 1 for batch in padded)
    for batch, following in pairwise(padded):
        assert batch[0] > following[0] or sum(batch) + batch[0] > budget
