"""Text -> pieces -> segments -> tokens and words -> windows -> batches.

All positions are Unicode code points in the note, ends exclusive. Every step tiles what it is given: pieces tile a
note, segments tile a piece, and the tokens that windows *own* tile the tokens of a piece. So no character can be left
out unseen: a character is either in a token that one window answers for, or the tokenizer itself drops it (white
space, control characters).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import sentencex
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: A note is worked through in pieces of at most this many code points, so that memory stays bounded.
PIECE_CHARS = 1 << 18

#: Longer stretches without a blank line are no prose. The splitter's time grows with the square of the sentences in
#: scripts without spaces, and no signal is seen meanwhile.
_STRETCH_CHARS = 1 << 15
#: So it does with that of quotation marks that stay open: where more than one character in eight is one, they are none.
_QUOTES = "“”„‟‘’‚‛«»‹›`´「」『』"
_FEW_CHARS, _MOST_QUOTED = 1 << 12, 1 / 8

_LINE_BREAK = re.compile(r"\r\n|\n|\r")
_BLANK_LINE = re.compile(r"(?:\r\n|\n|\r)[ \t]*(?:\r\n|\n|\r)")
_MARKER = r"(?:[-*+•·▪◦●○■□‣–][ \t]|\(?(?:\d{1,2}|[A-Za-z])[.)][ \t])"
_LIST_ITEM = re.compile(rf"[ \t]*{_MARKER}")
_WITH_HEADING = re.compile(r"[ \t]*[A-Z][\w&/()' -]{0,48}:(?:\s|$)")
#: Of three words at most: more of them before a colon may be prose.
_LEADING_HEADING = re.compile(rf"\s*(?:{_MARKER}[ \t]*)?[A-Z][\w&/()'-]{{0,48}}(?: [\w&/()'-]{{1,48}}){{0,2}}:(?=\s)")
_CJK = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_MAX_HEADING = 60


# ---------------------------------------------------------------------------------------------------------------------
# Text


def pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[tuple[int, int]]:
    """Cut a note into pieces of at most ``limit`` code points that tile it; an empty note has none.

    A cut stands at the last blank line, else end of a segment, else line break, else white space, else word boundary in
    the second half of the piece. Only a run of word characters that alone fills half a piece is cut inside.
    """
    start = 0
    while len(text) - start > limit:
        end = _cut(text, start + limit // 2, start + limit)
        yield start, end
        start = end
    if start < len(text):
        yield start, len(text)


def _cut(text: str, low: int, high: int) -> int:
    blank = max((match.end() for match in _BLANK_LINE.finditer(text, low, high)), default=0)
    if blank:
        return blank
    *_, segment, _ = [0, *segments(text[low:high])]
    if segment:
        return low + segment
    broken = max(text.rfind(mark, low, high) for mark in "\n\r")
    return broken + 1 if broken >= 0 else _end_of_word(text, low, high)


def _end_of_word(text: str, low: int, high: int) -> int:
    """The last white space between, else the last word boundary that is surely one, else ``high``."""
    for ends_word in (_is_space, _is_alone):
        for end in range(high, low, -1):
            if ends_word(text[end - 1]):
                return end
    return high


def _is_space(character: str) -> bool:
    """White space to BERT, which drops control characters such as the form feed and joins what they part."""
    return character in "\t\n\r" or (character.isspace() and unicodedata.category(character) != "Cc")


def _is_alone(character: str) -> bool:
    """A word of its own to BERT: punctuation, every other ASCII sign, a CJK character."""
    if character.isascii():
        return character.isprintable() and not character.isalnum()
    return unicodedata.category(character).startswith("P") or bool(_CJK.match(character))


def segments(text: str) -> list[int]:
    """Bounds of the segments of a text: ``[0, ..., len(text)]``; segment ``i`` is ``text[bounds[i]:bounds[i + 1]]``.

    Segments end at sentence ends (sentencex, a rule-based splitter of the Wikimedia Foundation), at blank lines, before
    list items, around headings, and behind those of up to three words that lead a sentence or an item (``Allergies:
    none``), so that both parts are reused where they come again. A lone line break inside a sentence does not cut,
    since clinical systems wrap lines. Segments tile the text; a text of white space is one segment.
    """
    bounds = [0]
    for start, end in pairwise([*_block_starts(text), len(text)]):
        for cut in (*_sentence_starts(text, start, end), end):
            # White space leads the segment that follows it, as sub-word tokenizers of the BPE kind expect.
            cut = _before_space(text, bounds[-1], cut)
            if cut > bounds[-1]:
                heading = _LEADING_HEADING.match(text, bounds[-1], cut)
                bounds += [heading.end(), cut] if heading else [cut]
    if len(bounds) == 1 and text:
        return [0, len(text)]
    bounds[-1] = len(text)
    return bounds


def _sentence_starts(text: str, start: int, end: int) -> Iterator[int]:
    """Where sentences begin between two places, the first of them aside.

    The splitter gets stretches that it is through with soon, whatever stands in them: each begins with one of the last
    sentences of the one before, whose end may lie inside a quotation, or where that had none, at a word.
    """
    while start < end:
        stop = end
        if end - start > _STRETCH_CHARS:
            stop = _end_of_word(text, start + _STRETCH_CHARS // 2, start + _STRETCH_CHARS)
        sentences = sentencex.get_sentence_boundaries("en", _flattened(text[start:stop]))
        starts = [start + sentence["start_index"] for sentence in sentences[1:]]
        sure = [cut for cut in starts if cut <= stop - _STRETCH_CHARS // 4] if stop < end else starts
        yield from sure or starts
        start = sure[-1] if stop < end and sure else stop


def all_segments(text: str) -> list[int]:
    """Bounds of the segments of a text of any length, which is worked through piece by piece."""
    bounds = [0]
    for start, end in pieces(text):
        bounds += [start + bound for bound in segments(text[start:end])[1:]]
    return bounds


def _before_space(text: str, low: int, high: int) -> int:
    while high > low and text[high - 1].isspace():
        high -= 1
    return high


def _flattened(text: str) -> str:
    """What the splitter gets: as long, with spaces for all white space, and without quotation marks that are none."""
    flat = text.translate(_FLAT)
    if len(flat) > _FEW_CHARS and sum(map(flat.count, _QUOTES)) > _MOST_QUOTED * len(flat):
        return flat.translate(_UNQUOTED)
    return flat


_UNQUOTED = {ord(mark): "'" for mark in _QUOTES}

# All white space, not only line breaks: sentencex (1.0.32) panics on a letter, a space beyond ASCII and a full stop.
_FLAT = {code: " " for code in range(0x3001) if chr(code).isspace()}


def _block_starts(text: str) -> list[int]:
    """Starts of the line groups inside which a line break means nothing."""
    starts = [0]
    line_start, before = 0, ""
    for line_break in chain(_LINE_BREAK.finditer(text), [None]):
        line_end = line_break.start() if line_break else len(text)
        line = text[line_start:line_end]
        if line_start and line.strip() and _breaks(before, line):
            starts.append(line_start)
        before, line_start = line, line_break.end() if line_break else len(text)
    return starts


def _breaks(before: str, line: str) -> bool:
    """Whether the line break before a line that is not blank ends a segment."""
    before = before.strip()
    if not before or before.endswith(":"):
        return True
    if _LIST_ITEM.match(line) or _WITH_HEADING.match(line):
        return True
    # A heading in capitals stands out from its neighbours; a note all in capitals has none.
    return _in_capitals(before) != _in_capitals(line.strip())


def _in_capitals(line: str) -> bool:
    return len(line) <= _MAX_HEADING and line.isupper() and len(line) > 3


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and words


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens and words of one sequence of segments, flat.

    ids: int64 [n_tokens], without special tokens. bounds: int64 [n_segments + 1], first token of each segment.
    word_token: int64 [n_words], the token that carries the word's label, ascending, each once. word_bounds: int64
    [n_segments + 1], first word of each segment.
    """

    ids: Ints
    bounds: Ints
    word_token: Ints
    word_bounds: Ints
    _encodings: Sequence[Encoding]
    _word_chars: dict[int, Ints]

    def chars(self, segment: int) -> Ints:
        """Code-point offsets of one segment's words in the segment's text. Shape: [n_words, 2]."""
        if segment in self._word_chars:
            return self._word_chars[segment]
        offsets = np.array(self._encodings[segment].offsets, dtype=np.int64).reshape(-1, 2)
        first = self.word_token[self.word_bounds[segment] : self.word_bounds[segment + 1]] - self.bounds[segment]
        last = np.append(first, len(offsets))[1:] - 1
        return np.stack([offsets[first, 0], offsets[last, 1]], axis=1)


class WordTokenizer:
    """A model's tokenizer together with the words that carry labels.

    A word is what BERT's basic tokenizer makes of the text (Devlin et al. 2019): runs of characters between white
    space, with every punctuation mark and every CJK character alone; where one token holds several, they are one. A
    word's label is that of the token which holds its first character, for BERT its first sub-token.

    Not safe to share between threads: make one per thread.
    """

    def __init__(self, tokenizer_json: str) -> None:
        """Raises :class:`ValueError`, in one line, for what is no tokenizer."""
        try:
            self._read(tokenizer_json)
        except BaseException as exc:
            # Files may come from anyone. The Rust code of tokenizers panics on some, and a panic is no Exception.
            if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
                raise
            line = next(iter(str(exc).splitlines()), "")[:200]
            said = "".join(character if character.isprintable() else "\ufffd" for character in line)
            raise ValueError(f"{type(exc).__name__}: {said}") from exc

    def _read(self, tokenizer_json: str) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # Files often carry the padding and truncation of training; either would lose text without a word.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A note that holds the characters "[SEP]" must not get a separator token.
        self._tokenizer.encode_special_tokens = True
        self._words = _basic_tokenizer()
        self._is_bert = _splits_like_bert(json.loads(tokenizer_json))
        with_specials = self._tokenizer.encode("a")
        mask = with_specials.special_tokens_mask
        inner = mask.index(0)
        tail = len(mask) - 1 - mask[::-1].index(0)
        self.prefix: tuple[int, ...] = tuple(with_specials.ids[:inner])
        self.suffix: tuple[int, ...] = tuple(with_specials.ids[tail + 1 :])
        self.unknown_id: int = _unknown_id(self._tokenizer, json.loads(tokenizer_json))
        self.pad_id: int = _pad_id(self._tokenizer, json.loads(tokenizer_json))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenize segments; each is seen alone, without special tokens."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        bounds = _bounds(len(encoding) for encoding in encodings)
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int64, count=int(bounds[-1]))
        word_token, word_bounds, word_chars = self._align(texts, encodings, bounds)
        return Tokens(ids, bounds, word_token, word_bounds, encodings, word_chars)

    def _align(
        self, texts: Sequence[str], encodings: Sequence[Encoding], bounds: Ints
    ) -> tuple[Ints, Ints, dict[int, Ints]]:
        # On plain ASCII a BERT tokenizer's own words are the basic tokenizer's: no offsets need to be fetched.
        general = [i for i, text in enumerate(texts) if not (self._is_bert and text.isascii())]
        word_chars: dict[int, Ints] = {}
        words = self._words.encode_batch([texts[i] for i in general], add_special_tokens=False)
        starts_word = np.zeros(int(bounds[-1]), dtype=np.bool_)
        if len(general) < len(texts):
            owners = np.full(int(bounds[-1]), -1, dtype=np.int64)
            if general:
                for segment in sorted(set(range(len(texts))).difference(general)):
                    owners[bounds[segment] : bounds[segment + 1]] = encodings[segment].word_ids
            else:
                owners[:] = np.fromiter(chain.from_iterable(e.word_ids for e in encodings), np.int64, len(owners))
            starts_word[1:] = owners[1:] != owners[:-1]
            starts_word[bounds[:-1][bounds[:-1] < len(owners)]] = True
        # A token may begin no word there.
        general_tokens: list[Ints] = []
        for segment, encoding in zip(general, words, strict=True):
            chars, first = _words_and_tokens(encoding.offsets, encodings[segment].offsets)
            word_chars[segment] = chars
            starts_word[bounds[segment] : bounds[segment + 1]] = False
            general_tokens.append(first + bounds[segment])
        word_token = np.concatenate([np.flatnonzero(starts_word), *general_tokens])
        word_token.sort(kind="stable")
        return word_token, np.searchsorted(word_token, bounds), word_chars


def _words_and_tokens(words: list[tuple[int, int]], tokens: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    """The words that at least one token reads, [n, 2], and the token that holds each one's first character, [n].

    Where no token holds the first character (the tokenizer dropped it), the next token inside the word counts. Words
    that share a token count as one: a token has one label, and "covid-19" that is one token is one mention.
    """
    spans = np.array(words, dtype=np.int64).reshape(-1, 2)
    offsets = np.array(tokens, dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(offsets[:, 1], spans[:, 0], side="right")
    read = first < len(offsets)
    read[read] = offsets[first[read], 0] < spans[read, 1]
    spans = spans[read]
    first, begins = np.unique(first[read], return_index=True)
    ends = np.append(begins, len(spans))[1:] - 1
    return np.stack([spans[begins, 0], spans[ends, 1]], axis=1), first


def _basic_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def _splits_like_bert(config: dict[str, object]) -> bool:
    normalizer, splitter = config.get("normalizer"), config.get("pre_tokenizer")
    added = config.get("added_tokens")
    return (
        isinstance(normalizer, dict)
        and normalizer.get("type") == "BertNormalizer"
        and bool(normalizer.get("clean_text"))
        and isinstance(splitter, dict)
        and splitter.get("type") == "BertPreTokenizer"
        and isinstance(added, list)
        and all(token["special"] for token in added)
    )


def _unknown_id(tokenizer: Tokenizer, config: dict[str, object]) -> int:
    model = config.get("model")
    unknown = model.get("unk_token") if isinstance(model, dict) else None
    if isinstance(unknown, str):
        found = tokenizer.token_to_id(unknown)
        return -1 if found is None else int(found)
    if isinstance(model, dict) and isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    return -1


def _pad_id(tokenizer: Tokenizer, config: dict[str, object]) -> int:
    padding = config.get("padding")
    if isinstance(padding, dict):
        return int(padding["pad_id"])
    for name in ("[PAD]", "<pad>"):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    return 0


def _bounds(lengths: Iterable[int]) -> Ints:
    counts = np.fromiter(lengths, dtype=np.int64)
    bounds = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start:end`` of a token sequence, given to the model at once.

    The window answers for the tokens ``own_start:own_end``; without overlap that is all of them.
    """

    start: int
    end: int
    own_start: int
    own_end: int


def pack(bounds: Ints, first: int, last: int, capacity: int, *, packed: bool = True) -> list[Window]:
    """Put the segments ``first:last`` in order into windows of at most ``capacity`` tokens.

    packed: a window takes as many segments as fit; else each has a window of its own. bounds: int64 [n_segments + 1],
    first token of each segment. A segment longer than a window is cut into windows that overlap by a quarter; of two
    windows that share tokens, each answers for its half of them, so that a token's label comes from the window in
    which it stands furthest from an edge. The owned ranges tile the tokens.
    """
    windows: list[Window] = []
    edges = bounds[first : last + 1].tolist()
    start = end = edges[0]
    for low, high in pairwise(edges):
        if high - start <= capacity and (packed or end == start):
            end = high
            continue
        if end > start:
            windows.append(Window(start, end, start, end))
        if high - low > capacity:
            windows.extend(_overlapping(low, high, capacity))
            start = end = high
        else:
            start, end = low, high
    if end > start:
        windows.append(Window(start, end, start, end))
    return windows


def _overlapping(low: int, high: int, capacity: int) -> Iterator[Window]:
    stride = max(1, capacity - capacity // 4)
    starts = [*range(low, high - capacity, stride), high - capacity]
    shared = [(right + left + capacity) // 2 for left, right in pairwise(starts)]
    owned = [low, *shared, high]
    for start, own_start, own_end in zip(starts, owned, owned[1:], strict=False):
        yield Window(start, start + capacity, own_start, own_end)


def padded_length(length: int, multiple: int = 8) -> int:
    """Tokens that a window of ``length`` tokens, specials included, takes in a batch: the next multiple."""
    return -(-length // multiple) * multiple


def batches(lengths: Sequence[int], budget: int, multiple: int = 8) -> Iterator[list[int]]:
    """Group windows of equal padded length into batches of at most ``budget`` padded tokens (at least one window).

    lengths: tokens of each window, specials included; multiple: see :func:`padded_length`. Yields indices into lengths,
    longest windows first. A batch holds one padded length only, so a window's result cannot depend on its neighbours'
    lengths.
    """
    padded = [padded_length(length, multiple) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-padded[i], i))
    batch: list[int] = []
    for index in order:
        length = padded[index]
        if batch and (padded[batch[0]] != length or (len(batch) + 1) * length > budget):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
