"""Every labelled data set comes to one form, with exact offsets and errors that show no text."""

import bz2
import gzip
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medner import windows
from medner.datasets import Document, entities, labels_of, load, of_tokens, relabel
from medner.errors import InputError, MissingPackage

DATA = Path(os.environ.get("MEDNER_DATA", Path(__file__).parents[2] / "shared" / "data")) / "ncbi-disease"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data set in {DATA}; set MEDNER_DATA")

IOB2 = "-DOCSTART-\tO\n\nThe\tO\nknee\tB-Site\npain\tB-Problem\npersists\tI-Problem\n\nAlbumin\tB-Test\n"


def write(path: Path, text: str) -> Path:
    """Write a file with its folders, bytes as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O I-X I-X O I-Y", [(1, 3, "X"), (4, 5, "Y")]),
        ("I-X I-X B-X I-X I-Y", [(0, 2, "X"), (2, 4, "X"), (4, 5, "Y")]),
        ("B-X I-X B-X O I-X", [(0, 2, "X"), (2, 3, "X"), (4, 5, "X")]),
        ("B-X I-X E-X S-X E-Y", [(0, 3, "X"), (3, 4, "X"), (4, 5, "Y")]),
        ("B-X L-X U-X U-X I-X", [(0, 2, "X"), (2, 3, "X"), (3, 4, "X"), (4, 5, "X")]),
        ("B-X I-Y E-Y I-Y", [(0, 1, "X"), (1, 3, "Y"), (3, 4, "Y")]),
        ("X X O Y", [(0, 2, "X"), (3, 4, "Y")]),
        ("B I O B", [(0, 2, "Entity"), (3, 4, "Entity")]),
        ("B-a-b I-a-b", [(0, 2, "a-b")]),
        ("", []),
    ],
)
def test_one_decoder_reads_all_schemes(tags: str, expected: list[tuple[int, int, str]]) -> None:
    """IO, IOB1, IOB2, BIOES, BILOU, bare types and bare prefixes; what continues nothing opens an entity."""
    assert entities(tags.split()) == expected


def test_conll_sentences_become_texts(tmp_path: Path) -> None:
    """Tokens are joined with one space; spans and token offsets point into that text."""
    first, second = load(str(write(tmp_path / "train.tsv", IOB2)), "train")
    assert first == Document(
        id="train-0",
        text="The knee pain persists",
        spans=((4, 8, "Site"), (9, 22, "Problem")),
        tokens=((0, 3), (4, 8), (9, 13), (14, 22)),
    )
    assert second == Document("train-1", "Albumin", ((0, 7, "Test"),), ((0, 7),))


def test_conll_columns_and_line_ends(tmp_path: Path) -> None:
    """The token is the first column and the tag the last; CRLF, a byte-order mark and Unicode spaces are no trouble."""
    path = write(tmp_path / "a.conll", "\ufeffGrad NN B-X\r\n\u2028C NN I-X\r\n \r\nno NN O\r\n")
    assert [document.text for document in load(str(path), "test")] == ["Grad C", "no"]
    path = write(tmp_path / "b.conll", "a\u2028b\tx\tB-X\nc d\tx\tI-X\n")
    (document,) = load(str(path), "test")
    assert (document.text, document.spans) == ("a\u2028b c d", ((0, 7, "X"),))


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (("train.tsv", "dev.tsv", "test.tsv"), "devel", "dev.tsv"),
        (("train.txt", "validation.txt"), "devel", "validation.txt"),
        (("NCBItrainset_corpus.txt", "NCBIdevelopset_corpus.txt"), "devel", "NCBIdevelopset_corpus.txt"),
        (("CDR_TestSet.txt", "CDR_TrainingSet.txt", "test.iob"), "test", "test.iob"),
        (("train.tsv", "train_dev.md", "eng.dev.conll"), "devel", "eng.dev.conll"),
        (("latest_train.tsv", "new_testset.tsv"), "test", "new_testset.tsv"),
    ],
)
def test_split_files_are_found_by_name(tmp_path: Path, names: tuple[str, ...], split: str, found: str) -> None:
    """An exact name goes before one that contains the split's; other suffixes are not looked at."""
    for name in names:
        write(tmp_path / name, f"x\tB-{Path(name).stem}\n")
    assert labels_of(load(str(tmp_path), split)) == [Path(found).stem]


def test_ambiguous_and_missing_splits(tmp_path: Path) -> None:
    """No file for a split, and two that may be it, are errors that name the files."""
    write(tmp_path / "a_train.tsv", IOB2)
    write(tmp_path / "b_train.tsv", IOB2)
    with pytest.raises(InputError) as error:
        load(str(tmp_path), "train")
    assert str(error.value) == f"{tmp_path}: a_train.tsv and b_train.tsv may both be train; name the file itself"
    with pytest.raises(InputError) as error:
        load(str(tmp_path), "test")
    assert str(error.value) == f"{tmp_path}: no file for the test split; expected a name like test.tsv"
    write(tmp_path / "latest_train.tsv", IOB2)  # which is none
    with pytest.raises(InputError, match="no file for the test split"):
        load(str(tmp_path), "test")
    with pytest.raises(InputError, match="no split 'dev'; name one of train, devel, test"):
        load(str(tmp_path), "dev")


PUBTATOR = (
    "1|t|Knee pain\n1|a|A 𝛼-gout case|x. \n1\t0\t9\tKnee pain\tSign\tD1\n1\t12\t18\t𝛼-gout\tDisease\n"
    "1\t14\t18\tgout\tDisease\n1\t0\t3\tpain\tSign\n1\tCID\tD1\tD2\n1\tAssociation\tD1\t7\tNovel\n1\tCause\tD1\tD2\tNo\n\n"
    "2|t|Only a title\n\n1|t|Again\n1|a|Again\n1\t0\t5\tAgain\tSign\n\n3|t|Gout\n3|a|\n3\t0\t4\tGout\tDisease\t-1\n"
)


def test_pubtator(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Offsets are code points of title, space, abstract. Misplaced, nested and repeated ones are dropped and logged."""
    path = write(tmp_path / "x.txt", PUBTATOR)
    with caplog.at_level(logging.WARNING):
        documents = load(str(path), "test")
    assert documents == [
        Document(
            "1", "Knee pain A 𝛼-gout case|x. ", ((0, 9, "Sign"), (12, 18, "Disease")), covered=((14, 18, "Disease"),)
        ),
        Document("2", "Only a title", ()),
        Document("3", "Gout ", ((0, 4, "Disease"),)),
    ]
    assert caplog.messages == [
        f"{path}:13: this document stood there before; the first one counts",
        f"{path}:1: 1 annotations dropped, their text is not at their offsets",
        f"{path}: 1 spans that overlap a longer one were dropped",
    ]


def test_a_label_that_is_dropped_takes_no_place(tmp_path: Path) -> None:
    """What lies inside a span of it stays."""
    record = {"text": "breast cancer vaccine", "spans": [[0, 21, "Treatment"], [0, 13, "Disease"]]}
    path = str(write(tmp_path / "x.jsonl", json.dumps(record)))
    assert load(path, "test", {"Treatment": "O"})[0].spans == ((0, 13, "Disease"),)
    assert load(path, "test")[0].spans == ((0, 21, "Treatment"),)


@pytest.mark.parametrize("label", ["a\nb", "a" * 199, "\ud800"])
def test_labels_that_no_bundle_can_have(tmp_path: Path, label: str) -> None:
    """They are refused before anything is learnt."""
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "gout", "spans": [[0, 4, label]]}))
    with pytest.raises(InputError) as error:
        load(str(path), "test")
    assert str(error.value) == (f"{path}: a label is no printable text of 1 to 198 characters; rename it in the data")


def test_spans_whose_edges_no_word_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counted and told: white space at an edge, and edges inside words; hyphens, other scripts and ends are none."""
    text = "x-linked gout, 熱中症 and asthma"
    spans = [[9, 13, "A"], [2, 8, "A"], [15, 17, "A"], [23, len(text), "A"], [18, 22, "A"]]
    path = write(tmp_path / "x.jsonl", json.dumps({"text": text, "spans": spans}))
    inside = write(tmp_path / "y.jsonl", json.dumps({"text": text, "spans": [[10, 13, "A"], [23, 25, "A"]]}))
    with caplog.at_level(logging.WARNING):
        load(str(path), "test")
        load(str(inside), "test")
    assert caplog.messages == [
        f"{path}: 1 of 5 spans begin or end in white space or inside a word; what is found are whole words",
        f"{inside}: 2 of 2 spans begin or end in white space or inside a word; what is found are whole words",
    ]


def test_spans_that_cross_segments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counted and told, since no span that is found can; one that touches a segment's end is none of them."""
    text = "Known asthma. Gout in the left\nfoot.\n\nNo fever."
    assert windows.all_segments(text) == [0, 13, 36, len(text)]
    spans = [[6, 13, "A"], [14, 36, "A"], [31, len(text) - 1, "A"]]
    path = write(tmp_path / "x.jsonl", json.dumps({"text": text, "spans": [spans[0], spans[2]]}))
    inside = write(tmp_path / "y.jsonl", json.dumps({"text": text, "spans": spans[:2]}))
    with caplog.at_level(logging.WARNING):
        assert [len(load(str(file), "test")[0].spans) for file in (path, inside)] == [2, 2]
    assert caplog.messages == [f"{path}: 1 of 2 spans cross a segment's end, where none can be found"]


def test_labels_are_renamed(tmp_path: Path) -> None:
    """A mapping renames what it names, its star renames the rest, and relabel gives all one label."""
    path = str(write(tmp_path / "x.txt", PUBTATOR))
    assert labels_of(load(path, "test", {"Sign": "Problem"})) == ["Disease", "Problem"]
    assert labels_of(load(path, "test", {"Sign": "Problem", "*": "Other"})) == ["Other", "Problem"]
    assert labels_of(relabel(load(path, "test"), "X")) == ["X"]
    assert labels_of(load(Path(path), "test", {"Sign": "O"})) == ["Disease"]
    assert labels_of(load(path, "test", {"*": "O"})) == []


def test_labels_that_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mapping of a label that no span has may be a slip of the pen, and is told."""
    path = str(write(tmp_path / "x.txt", PUBTATOR))
    with caplog.at_level(logging.WARNING):
        before = load(path, "test", {"Sign": "Problem", "*": "Other"})
        told = list(caplog.messages)
        assert load(path, "test", {"Sing": "O", "Sign": "Problem", "*": "Other"}) == before
    said = f"{path}: no span of the test split has the label Sing"
    assert said not in told
    assert [message for message in caplog.messages[len(told) :] if message not in told] == [said]


def test_jsonl(tmp_path: Path) -> None:
    """Spans may be objects or triples; the id is id, else note_id, else the line; overlaps keep the longest."""
    records = [
        {"id": 7, "text": "Gout é here", "spans": [{"start": 5, "end": 6, "label": "X", "text": "é", "score": 1.0}]},
        {"note_id": "n", "text": "acute gout", "spans": [[6, 10, "Y"], [0, 10, "X"]]},
        {"text": "", "spans": []},
    ]
    path = write(tmp_path / "devel.jsonl", "\n".join(json.dumps(record) for record in records))
    assert load(str(tmp_path), "devel") == load(str(path), "test")
    assert load(str(path), "test") == [
        Document("7", "Gout é here", ((5, 6, "X"),)),
        Document("n", "acute gout", ((0, 10, "X"),), covered=((6, 10, "Y"),)),
        Document("row-3", "", ()),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "a\tO\nsecret\n", ":2: expected a token and a tag, between them a tab or a space"),
        ("x.tsv", "a\tB-X\nsecret\tsecret\n", ":2: some tags have a prefix such as B- or I-, this one differs"),
        ("x.txt", "1|t|a\n1|a|b\n1\t0\tsecret\n", ":3: expected PMID, start, end, text and type, between them tabs"),
        ("x.txt", "1|t|a\n2|a|secret\n", ":2: an abstract without its title"),
        ("x.jsonl", "\n{secret\n", ":2: not JSON"),
        ("x.jsonl", "[1]\n", ':1: expected an object with a "text"'),
        ("x.jsonl", '{"text": "a"}', ':1: expected a list "spans"; an unlabelled file cannot train or score'),
        ("x.jsonl", '{"text": "a", "spans": [[0, 2, "X"]]}', ":1: span 0:2 lies outside the text of 1 code points"),
        (
            "x.jsonl",
            '{"text": "a", "spans": [[0, true, "X"]]}',
            ':1: a span is {"start": int, "end": int, "label": str} or [start, end, label]',
        ),
        (
            "x.jsonl",
            '{"text": "ab", "spans": [{"start": 0, "end": 1, "label": "X", "text": "b"}]}',
            ":1: span 0:1 names another text; offsets are code points, end exclusive",
        ),
        (
            "x.jsonl",
            '{"text": "a \\ud83d", "spans": []}',
            ":1: the text holds half a surrogate pair, which is no character",
        ),
        (
            "x.txt",
            f"1|t|Gout\n1\t0\t{'4' * 5000}\tGout\tDisease\tD1\n",
            ":2: expected PMID, start, end, text and type, between them tabs",
        ),
        (
            "x.txt",
            "1|t|Gout\n1\tO\t4\tGout\tDisease\n",
            ":2: expected PMID, start, end, text and type, between them tabs",
        ),
        ("x.tsv", "\n\n", ": the train split holds no document"),
        (
            "x.tsv",
            "the\tO\nflu\tb-dis\nbad\ti-dis\n",
            ": the tag b-dis is of no scheme that is known (IO, IOB1, IOB2, BIOES, BILOU)",
        ),
        (
            "x.tsv",
            "the\tO\nflu\tDIS-B\nbad\tDIS-I\n",
            ": the tag DIS-B is of no scheme that is known (IO, IOB1, IOB2, BIOES, BILOU)",
        ),
        ("x.parquet", "", ": of Parquet files name the directory, with a file for each split in it"),
        ("x.tsv", "n1\tO\nn2\tMrs. Secret\n", ":2: the last column holds several words; expected a token and a tag"),
        (
            "x.txt",
            "Mrs. Secret came\nwith fever.\n",
            ": no line ends in the tag O or one such as B-Disease, so this is no CoNLL file; give notes without labels "
            "as .jsonl, .csv or .parquet",
        ),
    ],
)
def test_errors_name_the_line_and_no_text(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A malformed file is refused with its line number, and nothing of its content is repeated."""
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        load(str(path), "train")
    assert str(error.value) == f"{path}{message}"


def test_prefixes_with_an_underscore(tmp_path: Path) -> None:
    """``B_Sign`` is the beginning of a Sign, as for the labels of a model."""
    path = write(tmp_path / "x.tsv", "no\tO\nhigh\tB_Sign\nfever\tI_Sign\n")
    assert [document.spans for document in load(str(path), "train")] == [((3, 13, "Sign"),)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".BZ2", bz2.compress),
        (".zst", lambda content: pa.compress(content, "zstd", asbytes=True)),
    ],
)
def test_compressed_data(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """A split may be compressed; ids and the choice of the file are as without."""
    content = {
        "train.jsonl": b'{"text": "gout", "spans": [[0, 4, "D"]]}\n',
        "devel.tsv": b"gout\tB-D\n",
        "test.ndjson": b"",
    }
    content["test.ndjson"] = content["train.jsonl"]
    for name, lines in content.items():
        (tmp_path / f"{name}{suffix}").write_bytes(compress(lines))
    (tmp_path / "other.csv.gz").write_bytes(gzip.compress(b"text\nno split of this\n"))
    expected = ((0, 4, "D"),)
    assert load(str(tmp_path), "train") == [Document("row-1", "gout", expected)]
    assert load(str(tmp_path), "test") == [Document("row-1", "gout", expected)]
    assert load(str(tmp_path), "devel") == [Document("devel-0", "gout", expected, ((0, 4),))]


def test_splits_beside_parquet_files(tmp_path: Path) -> None:
    """Files of a split count more than Parquet files somewhere below them, such as those of a run."""
    write(tmp_path / "devel.tsv", "gout\tB-D\n")
    write(tmp_path / "runs" / "june" / "spans" / "part-000000.parquet", "")
    assert [document.text for document in load(str(tmp_path), "devel")] == ["gout"]
    # Whatever only has the split in its name does not.
    pytest.importorskip("datasets")
    write(tmp_path / "train_log.txt", "epoch 1: F1 0.5\n")
    with pytest.raises(InputError) as error:
        load(str(tmp_path), "train")
    assert str(error.value) == f"{tmp_path}: expected the columns tokens and ner_tags; it has none"


def test_compressed_data_that_ends_early(tmp_path: Path) -> None:
    """Half a file is no smaller data set."""
    path = tmp_path / "train.tsv.gz"
    path.write_bytes(gzip.compress(b"gout\tB-D\n")[:-9])
    with pytest.raises(InputError, match=r"train\.tsv\.gz: its gz data is damaged or ends early"):
        load(str(path), "train")


def test_conll_spaces_and_carriage_returns(tmp_path: Path) -> None:
    """A space that does not break keeps a token together; bare carriage returns are no line ends."""
    path = write(tmp_path / "a.conll", "10\xa0mg  O\ngout B-X\n")
    assert load(str(path), "test")[0].text == "10\xa0mg gout"
    path = write(tmp_path / "b.conll", "a\tO\rb\tB-X\r")
    with pytest.raises(InputError) as error:
        load(str(path), "test")
    assert str(error.value) == f"{path}:1: a carriage return inside a line; end lines with a line feed"
    path = write(tmp_path / "c.pubtator", "1|t|Gout\r1|a|\r1\t0\t4\tGout\tDisease\tD1\r")
    with pytest.raises(InputError) as error:
        load(str(path), "test")
    assert str(error.value) == f"{path}:1: a carriage return inside a line; end lines with a line feed"


def test_invalid_utf8_is_named(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are refused with their line."""
    path = tmp_path / "x.tsv"
    path.write_bytes(b"a\tO\n\xff\tO\n")
    with pytest.raises(InputError) as error:
        load(str(path), "train")
    assert str(error.value) == f"{path}:2: not UTF-8; convert the file first"


@pytest.mark.parametrize("data", ["nowhere.tsv", "./nowhere", "a/b/c", "notes.csv", "notes.jsonl.gz", "a/n.parquet"])
def test_missing_files_are_no_hub_names(data: str) -> None:
    """What cannot be a hub name is a missing file, without asking the network."""
    with pytest.raises(InputError) as error:
        load(data, "train")
    assert str(error.value) == f"{data}: no such file or directory"


def test_a_path_below_a_directory_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped file of a directory that is here is not asked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"^data/nothing: no such file or directory$"):
        load("data/nothing", "train")


def test_spans_of_tokens_survive_empty_tokens() -> None:
    """A hub row may hold an empty token; it takes no characters and makes no empty span."""
    assert of_tokens("x", ["a", "", "b"], ["O", "B-X", "B-Y"]) == Document(
        "x", "a  b", ((3, 4, "Y"),), ((0, 1), (2, 2), (3, 4))
    )


def test_a_directory_of_parquet_files_is_read_with_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub data sets: names come from the ClassLabel feature, the validation split is devel, empty rows are dropped."""
    datasets = pytest.importorskip("datasets")
    tags = datasets.ClassLabel(names=["O", "B-Disease", "I-Disease"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(tags)})
    rows = {"tokens": [["a", "bad", "knee"], ["ok"], []], "ner_tags": [[0, 1, 2], [0], []]}
    home = tmp_path / "hub"
    (home / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            home / "data" / f"{split}-00000-of-00001.parquet"
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = load(str(home), "devel")
    assert [(d.id, d.text, d.spans) for d in documents] == [
        ("validation-0", "a bad knee", ((2, 10, "Disease"),)),
        ("validation-1", "ok", ()),
    ]
    with pytest.raises(InputError, match="no test split; it has train, validation"):
        load(str(home), "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"tokens": [["a"], None], "ner_tags": [["O"], ["O"]]}, "row 1 of train has no list of words in tokens, or"),
        ({"tokens": [["a", None]], "ner_tags": [["O", "O"]]}, "row 0 of train has no list of words in tokens, or"),
        ({"tokens": [[7]], "ner_tags": [["O"]]}, "row 0 of train has no list of words in tokens, or"),
        ({"tokens": ["ab"], "ner_tags": ["OO"]}, "row 0 of train has no list of words in tokens, or"),
        ({"tokens": [["a"]], "ner_tags": [None]}, "row 0 of train has no list of words in tokens, or"),
        ({"tokens": [["a", "b"]], "ner_tags": [["O", None]]}, "row 0 of train has a tag that is neither text nor"),
        ({"tokens": [["a"]], "ner_tags": [[1]]}, "row 0 of train: ner_tags are numbers without names"),
        ({"tokens": [["a", "b"]], "ner_tags": [["B-X", "X"]]}, "the tag X is of no scheme that is known"),
    ],
)
def test_rows_that_are_no_tagged_sentences(tmp_path: Path, rows: dict[str, list[Any]], message: str) -> None:
    """Nulls and values of another kind are told with their row."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set" / "train.parquet")
    with pytest.raises(InputError) as error:
        load(str(tmp_path / "set"), "train")
    assert str(error.value).startswith(f"{tmp_path / 'set'}: {message}")


class FakeRows(list[dict[str, list[object]]]):
    """Rows of a hub data set with tags as strings."""

    column_names = ("tokens", "ner_tags")
    features = {"ner_tags": None}  # noqa: RUF012


def test_a_data_set_that_is_a_script_is_loaded_from_its_converted_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the error that scripts are not supported, the Parquet revision of the hub is asked for; else InputError."""
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, revision: str | None = None) -> dict[str, FakeRows]:
        asked.append((name, revision))
        if name == "absent":
            raise FileNotFoundError("Couldn't find it\non the hub")
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found ncbi_disease.py")
        return {"train": FakeRows([{"tokens": ["gout"], "ner_tags": ["B-Disease"]}])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("ncbi/ncbi_disease", "train") == [Document("train-0", "gout", ((0, 4, "Disease"),), ((0, 4),))]
    assert asked == [("ncbi/ncbi_disease", None), ("ncbi/ncbi_disease", "refs/convert/parquet")]
    with pytest.raises(InputError) as error:
        load("absent", "train")
    assert str(error.value) == (
        "absent: no such file or directory, and not loaded as a Hugging Face data set either "
        "(FileNotFoundError: Couldn't find it)"
    )


def test_a_hub_name_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package datasets a hub name names the pip line."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage) as error:
        load("ncbi_disease", "train")
    step = 'pip install ".[train]" in a checkout of medner'
    assert str(error.value) == f'ncbi_disease needs the package "datasets", of the extra "train": {step}'


@needs_data
@pytest.mark.parametrize(
    ("form", "split", "documents", "spans"),
    [
        ("conll", "train", 5432, 5145),
        ("conll", "devel", 923, 787),
        ("conll", "test", 940, 960),
        # 5,145 less the 11 mentions of the repeated document and the one annotation that is not at its offsets.
        ("pubtator", "train", 592, 5133),
        ("pubtator", "devel", 100, 787),
        ("pubtator", "test", 100, 960),
    ],
)
def test_counts_of_the_ncbi_disease_corpus(form: str, split: str, documents: int, spans: int) -> None:
    """Both forms of the corpus give the published counts, and every span begins and ends at visible characters."""
    loaded = load(str(DATA / form), split, {"*": "Disease"})
    assert (len(loaded), sum(len(document.spans) for document in loaded)) == (documents, spans)
    assert labels_of(loaded) == ["Disease"]
    for document in loaded:
        assert all(document.text[a:b].strip() == document.text[a:b] != "" for a, b, _ in document.spans)
