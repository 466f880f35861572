"""Labelled data sets in one form: CoNLL, PubTator, JSONL with spans, and Hugging Face data sets.

Local files may be compressed, as notes may. Errors name the file and the line, never its text.
"""

from __future__ import annotations

import json
import logging
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medner import sources, windows
from medner.decode import UNNAMED, odd_label
from medner.errors import InputError, MissingPackage, install

Span = tuple[int, int, str]

#: Names that a split's file or a hub data set's split may have; the first is the name that medner uses.
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "devel": ("devel", "dev", "develop", "development", "valid", "validation", "val"),
    "test": ("test", "testing"),
}

_JSON_LINES = frozenset({".jsonl", ".ndjson"})
_SUFFIXES = _JSON_LINES | {".tsv", ".txt", ".conll", ".iob", ".iob2", ".bio", ".pubtator"}
#: What no data set's name on the hub ends in, either: files of notes, and others that may be meant.
_NOT_ON_A_HUB = frozenset({".csv", ".parquet", ".gz", ".zst", ".bz2", ".json", ".xml", ".xlsx", ".zip"})
_TITLE_OR_ABSTRACT = re.compile(r"([^|\t]+)\|([ta])\|(.*)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SINGLE = frozenset("ESLU")
_PREFIXES = frozenset("BIESLU")
#: What stands last in a relation of BioRED.
_NOVELTY = (["Novel"], ["No"])
#: Of a text that memory holds.
_OFFSET = re.compile(r"\d{1,15}")
_INSIDE = re.compile("[A-Za-z0-9]{2}")
#: Characters of a label, with whose prefix a bundle names its classes.
_MAX_LABEL = 198

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """One labelled text: a sentence of a tokenized data set, or a whole note or article.

    spans: (start, end, label) in Unicode code points, end exclusive, sorted and without overlap. tokens: offsets of the
    data set's own tokens in the text where it is tokenized, else None. covered: spans that were left out because they
    overlap a longer one.
    """

    id: str
    text: str
    spans: tuple[Span, ...]
    tokens: tuple[tuple[int, int], ...] | None = None
    covered: tuple[Span, ...] = ()

    def of_label(self, label: str) -> Document:
        """The document with the spans of one label alone, those that one of another label covers included."""
        return replace(
            self, spans=disjoint(span for span in (*self.spans, *self.covered) if span[2] == label), covered=()
        )


def load(data: str | Path, split: str, labels: Mapping[str, str] | None = None) -> list[Document]:
    """Load one split (``train``, ``devel`` or ``test``) of a data set.

    ``data`` is a directory with a file per split, a file (used for whichever split is asked for), or the name of a
    data set on the Hugging Face hub or a directory of Parquet files, with the columns ``tokens`` and ``ner_tags``.
    ``labels`` renames labels; the key ``*`` stands for all that are not named, and labels without an entry stay. What
    is renamed to ``O`` is left out.

    Raises :class:`InputError` where the data set is missing or malformed, and :class:`MissingPackage` where a hub
    name is given and ``datasets`` is not installed.
    """
    if split not in SPLITS:
        raise InputError(f"no split {split!r}; name one of {', '.join(SPLITS)}")
    data = os.fspath(data)
    path = Path(os.path.expanduser(data))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    # Not Path.is_dir, which raises below what may not be searched.
    is_directory = os.path.isdir(path)  # noqa: PTH112
    if os.path.isfile(path):  # noqa: PTH113
        documents = _read(path)
    elif is_directory and ((named := _split_files(path, split, exact=True)) or not any(path.rglob("*.parquet"))):
        documents = _read(_only(named or _split_files(path, split, exact=False), path, split))
    elif is_directory or _looks_like_hub_name(data):
        documents = list(_load_hub(data, split))
    else:
        raise InputError(f"{data}: no such file or directory")
    if not documents:
        raise InputError(f"{data}: the {split} split holds no document")
    if labels:  # first, for what is left out must not take the place of what it overlaps
        if absent := sorted(labels.keys() - {"*", *labels_of(documents)}):
            _log.warning("%s: no span of the %s split has the label %s", data, split, " or ".join(absent))
        documents = _rename(documents, lambda label: labels.get(label, labels.get("*", label)))
    if any(not label.isprintable() or not 0 < len(label) <= _MAX_LABEL for label in labels_of(documents)):
        raise InputError(f"{data}: a label is no printable text of 1 to {_MAX_LABEL} characters; rename it in the data")
    documents = _without_overlaps(documents, data)
    n_spans, crossing = sum(len(d.spans) for d in documents), sum(map(_crossing, documents))
    if crossing:
        _log.warning("%s: %d of %d spans cross a segment's end, where none can be found", data, crossing, n_spans)
    if ragged := sum(map(_ragged, documents)):
        _log.warning(
            "%s: %d of %d spans begin or end in white space or inside a word; what is found are whole words",
            data, ragged, n_spans,
        )  # fmt: skip
    _log.info("%s: %d documents, %d spans in %s", data, len(documents), n_spans, split)
    return documents


def _crossing(document: Document) -> int:
    """How many spans reach over a segment's end."""
    bounds = windows.all_segments(document.text) if document.spans else []
    return sum(bisect_right(bounds, start) < bisect_left(bounds, end) for start, end, _ in document.spans)


def _ragged(document: Document) -> int:
    """How many spans begin or end in white space, or between two letters or digits of a word."""
    text = document.text
    return sum(
        text[start].isspace()
        or text[end - 1].isspace()
        or any(_INSIDE.fullmatch(text[edge - 1 : edge + 1]) is not None for edge in (start, end) if edge)
        for start, end, _ in document.spans
    )


def relabel(documents: Iterable[Document], label: str) -> list[Document]:
    """Give every span the same label: for scoring a model of one label on a data set with finer classes."""
    return _rename(documents, lambda _: label)


def labels_of(documents: Iterable[Document]) -> list[str]:
    """The labels that occur, sorted."""
    return sorted({label for document in documents for _, _, label in document.spans})


def entities(tags: Sequence[str]) -> list[Span]:
    """Decode the tags of one sequence to (first, last + 1, label) in positions of the sequence.

    Reads IO, IOB1, IOB2, BIOES and BILOU alike, since none of them contradicts another: ``B``, ``S`` and ``U`` open an
    entity, ``S``, ``U``, ``E`` and ``L`` close one, and anything but ``O`` that continues no open entity of its label
    opens one (so an orphan ``I-`` does). A tag without a prefix is read as ``I-``.
    """
    found: list[Span] = []
    start, current = 0, ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, label = _parse_tag(tag)
        if current and (prefix in "OBSU" or label != current):
            found.append((start, position, current))
            current = ""
        if prefix == "O":
            continue
        if not current:
            start, current = position, label
        if prefix in _SINGLE:
            found.append((start, position + 1, current))
            current = ""
    return found


def of_tokens(name: str, tokens: Sequence[str], tags: Sequence[str]) -> Document:
    """The document of a tagged sentence: its tokens joined with one space each."""
    offsets: list[tuple[int, int]] = []
    position = 0
    for token in tokens:
        offsets.append((position, position + len(token)))
        position += len(token) + 1
    spans = ((offsets[first][0], offsets[last - 1][1], label) for first, last, label in entities(tags))
    return Document(name, " ".join(tokens), tuple(span for span in spans if span[0] < span[1]), tuple(offsets))


def _parse_tag(tag: str) -> tuple[str, str]:
    if tag in ("O", ""):
        return "O", ""
    if tag in _PREFIXES:
        return tag, UNNAMED
    if len(tag) > 2 and tag[1] in "-_" and tag[0] in _PREFIXES:
        return tag[0], tag[2:]
    return "I", tag


def _has_prefix(tag: str) -> bool:
    return tag in _PREFIXES or _parse_tag(tag)[1] != tag


def _check_scheme(place: str, tags: Iterable[str]) -> None:
    """Refuse tags such as ``b-Disease`` or ``Disease-B``, whose every mention would be cut in two types."""
    inside = sorted({tag for tag in tags if tag not in ("O", "")})
    if not all(map(_has_prefix, inside)) and (odd := odd_label(inside)):
        raise InputError(f"{place}: the tag {odd} is of no scheme that is known (IO, IOB1, IOB2, BIOES, BILOU)")


def _rename(documents: Iterable[Document], rename: Callable[[str], str]) -> list[Document]:
    def renamed(spans: Iterable[Span]) -> tuple[Span, ...]:
        return tuple(sorted((a, b, new) for a, b, label in spans if (new := rename(label)) != "O"))

    return [replace(document, spans=renamed(document.spans)) for document in documents]


def _without_overlaps(documents: list[Document], data: str) -> list[Document]:
    """Keep the longest of spans that overlap, which of nested ones is the outermost."""
    kept = []
    for document in documents:
        spans = disjoint(document.spans)
        kept.append(replace(document, spans=spans, covered=tuple(span for span in document.spans if span not in spans)))
    dropped = sum(len(document.covered) for document in kept)
    if dropped:
        _log.warning("%s: %d spans that overlap a longer one were dropped", data, dropped)
    return kept


def disjoint(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The longest of spans that overlap, sorted."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        if all(span[1] <= start or end <= span[0] for start, end, _ in kept):
            kept.append(span)
    return tuple(sorted(kept))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _split_files(directory: Path, split: str, *, exact: bool) -> list[Path]:
    """Files of a directory that may hold a split: of its exact name, or of names that contain the split's."""
    names = SPLITS[split]
    stems = {
        path: name.stem.lower()
        for path in sorted(directory.iterdir())
        if path.is_file() and (name := sources.uncompressed(path)).suffix.lower() in _SUFFIXES
    }
    if exact:
        return [path for path, stem in stems.items() if stem in names]
    others = [name for other, known in SPLITS.items() if other != split for name in known[:2]]
    return [
        path
        for path, stem in stems.items()
        # "latest_train" is no test split.
        if any(name in stem for name in names[:2]) and not any(name in stem for name in others)
    ]


def _only(found: Sequence[Path], directory: Path, split: str) -> Path:
    if not found:
        raise InputError(f"{directory}: no file for the {split} split; expected a name like {split}.tsv")
    if len(found) > 1:
        raise InputError(f"{directory}: {found[0].name} and {found[1].name} may both be {split}; name the file itself")
    return found[0]


def _read(path: Path) -> list[Document]:
    if path.suffix.lower() == ".parquet":
        raise InputError(f"{path}: of Parquet files name the directory, with a file for each split in it")
    with sources.opened(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8; convert the file first") from None
    # Not splitlines(), which also cuts at characters that a token or an abstract may hold.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if sources.uncompressed(path).suffix.lower() in _JSON_LINES:
        return list(_read_jsonl(path, lines))
    if inside := next((number for number, line in enumerate(lines, start=1) if "\r" in line), None):
        raise InputError(f"{path}:{inside}: a carriage return inside a line; end lines with a line feed")
    first = next((line for line in lines if line.strip()), "")
    if _TITLE_OR_ABSTRACT.fullmatch(first):
        return _read_pubtator(path, lines)
    return list(_read_conll(path, lines))


def _read_conll(path: Path, lines: Sequence[str]) -> Iterator[Document]:
    tokens: list[str] = []
    tags: list[str] = []
    styles: set[bool] = set()
    seen: set[str] = set()
    count, outside = 0, False
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            fields = line.split("\t") if "\t" in line else [*filter(None, map(str.strip, line.split(" ")))]
            if len(fields) < 2 or not fields[0]:
                raise InputError(f"{path}:{number}: expected a token and a tag, between them a tab or a space")
            tokens.append(fields[0])
            tags.append(fields[-1].strip())
            # A column of words read as tags would give a label each; the tag itself is not shown, it may be text.
            if tags[-1] == "O":
                outside = True
            else:
                styles.add(_has_prefix(tags[-1]))
                seen.add(tags[-1])
            if len(styles) > 1:
                raise InputError(f"{path}:{number}: some tags have a prefix such as B- or I-, this one differs")
            if len(tags[-1].split()) > 1:
                raise InputError(f"{path}:{number}: the last column holds several words; expected a token and a tag")
        elif tokens:
            yield of_tokens(f"{sources.uncompressed(path).stem}-{count}", tokens, tags)
            tokens, tags, count = [], [], count + 1
    if styles == {False} and not outside:
        raise InputError(
            f"{path}: no line ends in the tag O or one such as B-Disease, so this is no CoNLL file; give notes without "
            "labels as .jsonl, .csv or .parquet"
        )
    _check_scheme(str(path), seen)


def _read_pubtator(path: Path, lines: Sequence[str]) -> list[Document]:
    documents: dict[str, Document] = {}
    current, spans, repeated = "", list[Span](), False
    mismatched: Counter[int] = Counter()
    title = 0

    def close() -> None:
        if current and not repeated:
            documents[current] = replace(documents[current], spans=tuple(sorted(spans)))

    for number, line in enumerate(lines, start=1):
        head = _TITLE_OR_ABSTRACT.fullmatch(line)
        if head and head[2] == "t":
            close()
            current, spans, repeated, title = head[1], [], head[1] in documents, number
            if repeated:
                _log.warning("%s:%d: this document stood there before; the first one counts", path, number)
            else:
                documents[current] = Document(current, head[3], ())
        elif head:
            if head[1] != current:
                raise InputError(f"{path}:{number}: an abstract without its title")
            if not repeated:
                documents[current] = replace(documents[current], text=f"{documents[current].text} {head[3]}")
        elif line.strip():
            fields = line.split("\t")
            if fields[0] == current and not fields[1].isdecimal() and (len(fields) == 4 or fields[4:] in _NOVELTY):
                continue  # a relation between concepts, as in BC5CDR and BioRED
            if len(fields) < 5 or fields[0] != current or not all(map(_OFFSET.fullmatch, fields[1:3])):
                raise InputError(f"{path}:{number}: expected PMID, start, end, text and type, between them tabs")
            start, end = int(fields[1]), int(fields[2])
            if repeated:
                continue
            if start < end and documents[current].text[start:end] == fields[3]:
                spans.append((start, end, fields[4].strip()))
            else:
                mismatched[title] += 1
    close()
    for number, count in mismatched.items():
        _log.warning("%s:%d: %d annotations dropped, their text is not at their offsets", path, number, count)
    return list(documents.values())


def _read_jsonl(path: Path, lines: Sequence[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}:{number}: not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'{path}:{number}: expected an object with a "text"')
        if not record["text"].isascii() and re.search("[\ud800-\udfff]", record["text"]):
            raise InputError(f"{path}:{number}: the text holds half a surrogate pair, which is no character")
        if not isinstance(record.get("spans"), list):
            raise InputError(f'{path}:{number}: expected a list "spans"; an unlabelled file cannot train or score')
        name = next((str(record[key]) for key in ("id", "note_id") if record.get(key) is not None), f"row-{number}")
        spans = [_json_span(span, record["text"], f"{path}:{number}") for span in record["spans"]]
        yield Document(name, record["text"], tuple(sorted(spans)))


def _json_span(span: object, text: str, place: str) -> Span:
    if isinstance(span, dict):
        start, end, label = (span.get(key) for key in ("start", "end", "label"))
    elif isinstance(span, list) and len(span) == 3:
        start, end, label = span
    else:
        start = end = label = None
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label:
        raise InputError(f'{place}: a span is {{"start": int, "end": int, "label": str}} or [start, end, label]')
    if not 0 <= start < end <= len(text):
        raise InputError(f"{place}: span {start}:{end} lies outside the text of {len(text)} code points")
    if isinstance(span, dict) and span.get("text", text[start:end]) != text[start:end]:
        raise InputError(f"{place}: span {start}:{end} names another text; offsets are code points, end exclusive")
    return start, end, label


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face


def _looks_like_hub_name(data: str) -> bool:
    """Whether it is one, and no path with an error in it: what lies in a directory that is here stays here."""
    is_path = Path(data).suffix.lower() in (_SUFFIXES | _NOT_ON_A_HUB) or os.path.isdir(os.path.dirname(data))  # noqa: PTH112, PTH120
    return bool(_HUB_NAME.fullmatch(data)) and not is_path


def _load_hub(name: str, split: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise MissingPackage(f'{name} needs the package "datasets", of the extra "train": {install("train")}') from None
    splits = _fetch(datasets.load_dataset, name)
    found = next((alias for alias in SPLITS[split] if alias in splits), None)
    if found is None:
        raise InputError(f"{name}: no {split} split; it has {', '.join(map(str, splits))}")
    rows = splits[found]
    columns = rows.column_names or ()  # None where there is no file that says
    if not {"tokens", "ner_tags"} <= set(columns):
        raise InputError(f"{name}: expected the columns tokens and ner_tags; it has {', '.join(columns) or 'none'}")
    names = getattr(getattr(rows.features["ner_tags"], "feature", None), "names", None)
    seen: set[str] = set()
    for index, row in enumerate(_readable(rows, name)):
        tokens, tags = row["tokens"], row["ner_tags"]
        are_lists = isinstance(tokens, list) and isinstance(tags, list)
        if not are_lists or not all(isinstance(token, str) for token in tokens):
            raise InputError(f"{name}: row {index} of {found} has no list of words in tokens, or no list in ner_tags")
        if len(tokens) != len(tags):
            raise InputError(f"{name}: row {index} of {found} has {len(tokens)} tokens and {len(tags)} tags")
        # The hub copy of the NCBI Disease corpus ends each split with an empty row.
        if tokens:
            tags = [_tag_name(tag, names, f"{name}: row {index} of {found}") for tag in tags]
            seen.update(tags)
            yield of_tokens(f"{found}-{index}", tokens, tags)
    _check_scheme(name, seen)


def _readable(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows, the library's errors translated; what it says may quote a row."""
    try:
        yield from rows
    except Exception as error:
        raise InputError(f"{name}: cannot be read ({type(error).__name__}); write it again") from error


def _fetch(load_dataset: Callable[..., Any], name: str) -> Any:
    is_directory = os.path.isdir(name)  # noqa: PTH112 - Path.is_dir raises where nobody can tell
    try:
        if is_directory:
            # Streamed, or else the data would be copied, readable to others, into the cache of Hugging Face. By its
            # full path, or else a directory called "parquet" would be taken for all Parquet files from here on down.
            return load_dataset(str(Path(name).resolve()), streaming=True)
        try:
            return load_dataset(name)
        except RuntimeError as error:
            # datasets 4 and later refuse data sets that are scripts; the hub keeps a converted copy of most.
            if "scripts are no longer supported" not in str(error):
                raise
            return load_dataset(name, revision="refs/convert/parquet")
    except Exception as error:
        if is_directory:  # what is said about a user's own files may quote them
            raise InputError(f"{name}: not loaded as a directory of Parquet files ({type(error).__name__})") from error
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(
            f"{name}: no such file or directory, and not loaded as a Hugging Face data set either "
            f"({type(error).__name__}: {reason})"
        ) from error


def _tag_name(tag: object, names: Sequence[str] | None, place: str) -> str:
    if isinstance(tag, str):
        return tag
    if not isinstance(tag, int):
        raise InputError(f"{place} has a tag that is neither text nor a number")
    if names is None or not 0 <= tag < len(names):
        raise InputError(f"{place}: ner_tags are numbers without names; a ClassLabel feature is needed")
    return names[tag]
