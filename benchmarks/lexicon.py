"""Labelled sentences with the names of diseases that MedQuAD's answers are about.

The NCBI Disease corpus has few names of diseases, and a model that knows no others misses rare ones. MedQuAD's answers
come from pages on one disease each, and say which in set phrases ("list of signs and symptoms for X."). Names from
there mark their mentions in other sentences; what else is a mention there, models that were trained on the corpus say
(weak labels and their completion, after Jiang et al. 2021, "Named Entity Recognition with Small Strongly
Labeled and Large Weakly Labeled Data"). The names also take the places of mentions in the corpus's own sentences
(mention replacement, after Dai and Adel 2020, "An Analysis of Simple Data Augmentation for Named Entity Recognition").
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import abbreviations

from medner.datasets import Document, Span

LABEL = "Disease"
#: Sentences that a name may mark, and how many without any name there are for each with one.
OF_ONE_NAME, WITHOUT = 4, 1 / 3
#: Characters of a sentence.
SHORTEST, LONGEST = 26, 399
#: Share of the corpus's mentions that a name replaces.
REPLACED = 0.8
SEED = 13

_NAME = r"([^.?!:;\n]{3,90}?)"
#: Where an answer says what it is about.
_PHRASES = tuple(
    re.compile(phrase)
    for phrase in (
        r"list of signs and symptoms for (.{3,90}?)\. If the information",
        rf"What are the signs and symptoms of {_NAME}\?",
        rf"How is {_NAME} (?:inherited|diagnosed|passed)\b",
        rf"How might {_NAME} be treated",
        rf"What (?:causes|is) {_NAME}\?",
        rf"(?:What are the treatments for|Is) {_NAME} (?:inherited)?\?",
        rf"These resources address the diagnosis or management of {_NAME}:",
        rf"(?:cause|causes) of {_NAME}\?",
        r"(?:^|[.?!] |Key Points - )(?:The )?([A-Z0-9][^.?!:;,]{3,80}?) is an? (?:very |extremely |relatively )?"
        r"(?:rare|genetic|inherited|hereditary|disorder|condition|disease|syndrome|form of|type of|group of|neuro\w+|"
        r"progressive|chronic|congenital|severe|mild|autoimmune|metabolic|skin|bone|eye|infection|cancer|tumor|"
        r"malignant|benign)\b",
    )
)
#: How what stands there begins where it is no name.
_NO_NAME = re.compile(
    r"(?:it|this|that|these|they|he|she|there|what|how|who|why|a|an|the|most|some|many|each|your|if|when|because|"
    r"although|in|other|another|one|treatment|diagnosis|surgery|testing|genetic|inheritance|cause|symptoms?|signs|having|"
    r"being|both|all|my|our|his|her|their|for|as|at|by|on|to|with|and|or|not|is|are|was|patients?|people|person|"
    r"children|child|gene|genes|mutations?|therapy|prevention|prognosis)\b",
    re.IGNORECASE,
)
#: What a name of one word ends with.
_ENDING = re.compile(
    r"(?:osis|oses|emia|itis|omas?|pathy|uria|ism|diabetes|asthma|ataxia|plasia|trophy|penia|algia|rrhea|phobia|lepsy|"
    r"anemia|porphyria|philia|megaly|cele|paralysis|palsy|cancer|tumors?|dystonia|coloboma|lupus|malaria|rickets|cephaly|"
    r"dactyly|phthalmia|plegia|lysis|epsy)\b"
)
#: Words of what is done, taken or looked at, and of cells, unless they are part of a disease's name.
_NO_DISEASE = re.compile(
    r"\b(?:genes?|tests?|testing|transplant\w*|surgery|therapy|chemotherapy|pacemaker|treatment|diet|vaccine|drug|exam|"
    r"x-ray|radiation|procedure|cells?|problems?|symptoms?|signs|following|your|care|medicare)\b|(?:mab|nib)\b"
)
_OF_CELLS = re.compile(r"\bcell (?:carcinoma|disease|arteritis|lymphoma|tumor)|\b[tb]-cell")
_SHORT = re.compile(r"(.{3,90}?) \(([A-Za-z0-9][A-Za-z0-9-]{1,9})\)")
_DEFINED = re.compile(r"([^()]{5,90}?) \(([A-Z][A-Za-z0-9-]{1,8})\)")
_TOKEN = re.compile(r"\w+(?:['\u2019]s)?|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Names:
    """Names in small letters, and abbreviations in capitals."""

    diseases: tuple[str, ...]
    abbreviations: tuple[str, ...]


def names(texts: Iterable[str]) -> Names:
    """What the answers are about, as far as it reads like a disease."""
    diseases, short = set(), set()
    for text in texts:
        for phrase in _PHRASES:
            for found in phrase.finditer(text):
                given = found[1].strip().strip("\"'").removeprefix("Key Points - ")
                if defined := _SHORT.fullmatch(given):
                    given = defined[1]
                    short |= {defined[2]} if defined[2].isupper() else set()
                given = re.sub(r"^(?:the|an?) ", "", given, flags=re.IGNORECASE)
                if _is_disease(given):
                    diseases.add(given.lower())
    return Names(tuple(sorted(diseases)), tuple(sorted(short - {"OMIM"})))


def _is_disease(name: str) -> bool:
    words = name.split()
    if _NO_NAME.match(name) or len(name) < 5 or len(words) > 7 or set(name) & set("()"):
        return False
    name = name.lower()
    if _NO_DISEASE.search(name):
        return bool(_OF_CELLS.search(name)) and not re.search("gene|surgery|therapy|test", name)
    return len(words) > 1 or bool(_ENDING.search(name))


class Finder:
    """Finds names in texts, whatever their letters' case; of several that begin at a word, the longest."""

    def __init__(self, diseases: Iterable[str]) -> None:
        self._by_first: dict[str, list[list[str]]] = {}
        for name in diseases:
            words = _TOKEN.findall(name)
            self._by_first.setdefault(words[0], []).append(words)
        for candidates in self._by_first.values():
            candidates.sort(key=len, reverse=True)

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """Where names stand: start and end, in order, without overlap."""
        tokens = [(*found.span(), found[0].lower()) for found in _TOKEN.finditer(text)]
        spans, i = [], 0
        while i < len(tokens):
            candidates = self._by_first.get(tokens[i][2], [])
            words = next((w for w in candidates if w == [t[2] for t in tokens[i : i + len(w)]]), None)
            if words is not None:
                spans.append((tokens[i][0], tokens[i + len(words) - 1][1]))
            i += len(words or [""])
        return spans


def marked(texts: Sequence[str], diseases: Iterable[str], sentences: Callable[[str], Iterable[str]]) -> list[Document]:
    """Different sentences with the names that stand in them, and some without any.

    An abbreviation that a text defines behind a name is one, too, in that text. sentences: cuts a text.
    """
    rng, find = random.Random(SEED), Finder(diseases)
    seen: set[str] = set()
    count: Counter[str] = Counter()
    having, without = [], []
    for text in rng.sample(texts, len(texts)):
        defined = {short for before, short in _DEFINED.findall(text) if _ends(find(before), before)}
        for sentence in map(str.strip, sentences(text)):
            if sentence in seen or not SHORTEST <= len(sentence) <= LONGEST:
                continue
            seen.add(sentence)
            spans = sorted(_with_abbreviations(sentence, find(sentence), defined))
            found = {sentence[start:end].lower() for start, end in spans}
            if not spans:
                without.append(sentence)
            elif min(count[name] for name in found) < OF_ONE_NAME:
                count.update(found)
                having.append(Document("", sentence, tuple((*span, LABEL) for span in spans)))
    rng.shuffle(without)
    return having + [Document("", sentence, ()) for sentence in without[: round(WITHOUT * len(having))]]


def _ends(spans: Sequence[tuple[int, int]], text: str) -> bool:
    return bool(spans) and spans[-1][1] == len(text)


def _with_abbreviations(sentence: str, spans: list[tuple[int, int]], defined: Iterable[str]) -> list[tuple[int, int]]:
    for short in defined:
        for found in re.finditer(rf"(?<![\w-]){re.escape(short)}(?![\w-])", sentence):
            if _apart(found.span(), spans):
                spans = [*spans, found.span()]
    return spans


def _apart(span: Sequence[int], others: Iterable[Sequence[int]]) -> bool:
    return not any(start < span[1] and span[0] < end for start, end, *_ in others)


def completed(documents: Sequence[Document], found: Sequence[Sequence[Span]]) -> Iterator[Document]:
    """The documents with what was found beside their names; a name that lies inside a found mention gives way."""
    for document, mentions in zip(documents, found, strict=True):
        spans: list[Span] = []
        for name in document.spans:
            around = next((m for m in mentions if m[0] <= name[0] and name[1] <= m[1]), name)
            spans += [around] if _apart(around, spans) else []
        spans += [mention for mention in mentions if _apart(mention, spans)]
        yield replace(document, spans=tuple(sorted(spans)))


def replaced(sentences: Sequence[Document], known: Names) -> Iterator[Document]:
    """The sentences that hold mentions, most of these replaced by names as long: short, of one word, or of several."""
    rng = random.Random(SEED)
    several = [name for name in known.diseases if 1 < len(name.split()) <= 5]
    single = [name for name in known.diseases if " " not in name]
    for sentence in sentences:
        pieces = []
        for start, end, _ in sentence.spans:
            mention = sentence.text[start:end]
            if rng.random() >= REPLACED:
                continue
            if mention.isupper() and len(mention) <= 6:
                names_like_it = known.abbreviations
            else:
                names_like_it = several if " " in mention or rng.random() < 0.4 else single
            pieces.append((start, end, rng.choice(names_like_it)))
        if sentence.spans:
            yield abbreviations.with_pieces(sentence, pieces)
