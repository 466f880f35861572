"""Scoring a model: by hand with the tiny bundle, on tokens and on offsets, wrapped, and as a PyTorch checkpoint."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from medner import cli, datasets, testing
from medner.annotate import Annotator, Options
from medner.datasets import Document
from medner.errors import ModelError
from medner.evaluate import evaluate as score_of
from medner.evaluate import find, fit_labels, hard_wrapped, open_model, wrap

TINY = str(testing.bundle())


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Call ``medner`` in this process; gives its exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    sys.stdout.flush()
    return int(caught.value.code or 0), *capfd.readouterr()


CONLL = """
no O
fever B-Sign
. O

heart B-Organ
failure I-Organ
and O
breast B-Organ

headache B-Sign
"""


@pytest.fixture
def conll(tmp_path: Path) -> Path:
    """Three sentences with four mentions. The model finds three, all of them right."""
    (tmp_path / "test.tsv").write_text(CONLL.strip().replace(" ", "\t") + "\n")
    return tmp_path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Two notes: one mention found exactly, one with another start, one missed; and one found that is none."""
    notes = [
        {"text": "Known type 2\ndiabetes. No fever.", "spans": [[6, 21, "Disease"]]},
        {"text": "Severe asthma 😀 and gout", "spans": [
            {"start": 0, "end": 13, "label": "Disease"}, {"start": 20, "end": 24, "label": "Disease"}]},
    ]  # fmt: skip
    path = tmp_path / "gold.jsonl"
    path.write_text("".join(json.dumps(note) + "\n" for note in notes))
    return path


def test_scores_on_the_data_sets_own_tokens(conll: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three of four found, none invented: precision 1, recall 3/4; finer labels count as the model's only one."""
    code, output, error = call(capfd, "evaluate", "--model", TINY, "--data", conll, "--json", conll / "s.json")
    assert (code, error) == (0, "")
    first, second, header, row = output.splitlines()
    assert first == f"tiny fp32, window 32, on {conll} (test)"
    assert second == "3 documents, scored on tokens"
    assert header.split() == ["label", "precision", "recall", "F1", "95", "%", "interval", "support"]
    assert row.split()[:4] == ["Disease", "100.00", "75.00", "85.71"]
    assert row.split()[-1] == "4"
    result = json.loads((conll / "s.json").read_text())
    facts = (
        "model",
        "precision",
        "data",
        "split",
        "labels_renamed",
        "wrap",
        "window",
        "min_score",
        "documents",
        "unit",
    )
    assert [result[name] for name in facts] == [TINY, "fp32", str(conll), "test", {}, None, 32, 0.0, 3, "tokens"]
    overall = result["overall"]
    assert 0 <= overall.pop("low") <= overall["f1"] <= overall.pop("high") <= 1
    assert overall == {"precision": 1.0, "recall": 0.75, "f1": 6 / 7, "tp": 3, "fp": 0, "fn": 1, "support": 4}
    assert list(result["labels"]) == ["Disease"]
    assert list(result) == [*facts, "overall", "labels"]


def test_scores_on_exact_offsets(jsonl: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One of three found, two found that are none: 1 / 3 each way."""
    for arguments in ((), ("--wrap", 9), ("--window", 16)):
        out = jsonl.parent / "s.json"
        code, output, _ = call(capfd, "evaluate", "--model", TINY, "--data", jsonl, "--json", out, *arguments)
        assert (code, output.splitlines()[1]) == (0, "2 documents, scored on offsets")
        result = json.loads(out.read_text())
        assert [result["overall"][name] for name in ("tp", "fp", "fn", "f1")] == [1, 2, 2, 1 / 3]
        assert (result["wrap"], result["window"]) == (9 if "--wrap" in arguments else None, 32 - 16 * (16 in arguments))
    _, output, _ = call(capfd, "evaluate", "--model", TINY, "--data", jsonl, "--json", out, "--min-score", 0.99)
    assert output.startswith(f"tiny fp32, window 32, spans from 0.99 up, on {jsonl} (test)\n")
    result = json.loads(out.read_text())
    assert [result["overall"][name] for name in ("tp", "fp", "fn")] == [0, 0, 3]
    assert result["min_score"] == 0.99


def test_labels_of_the_data_are_renamed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is given the model's label counts; what keeps another one is of something else."""
    data, scores = tmp_path / "gold.jsonl", tmp_path / "s.json"
    data.write_text(json.dumps({"text": "asthma, aspirin", "spans": [[0, 6, "PROBLEM"], [8, 15, "DRUG"]]}) + "\n")
    found = {}
    for arguments in ((), ("--label", "PROBLEM=Disease"), ("--label", "PROBLEM=Disease", "--label", "*=Disease")):
        code, _, error = call(capfd, "evaluate", "--model", TINY, "--data", data, "--json", scores, *arguments)
        assert (code, error) == (0, "")
        result = json.loads(scores.read_text())
        found[len(arguments)] = [result["overall"][name] for name in ("tp", "fp", "fn")]
    assert found == {0: [1, 0, 1], 2: [1, 0, 0], 4: [1, 0, 1]}
    assert result["labels_renamed"] == {"PROBLEM": "Disease", "*": "Disease"}


def test_errors(tmp_path: Path, jsonl: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Missing data and models are exit code 4, an output that cannot be written 6."""
    assert call(capfd, "evaluate", "--model", TINY, "--data", tmp_path / "none.tsv") == (
        4, "", f"medner: {tmp_path}/none.tsv: no such file or directory\n"
    )  # fmt: skip
    code, _, error = call(capfd, "evaluate", "--model", tmp_path / "none", "--data", jsonl)
    assert (code, error.partition(";")[0]) == (4, f"medner: {tmp_path}/none: no such model directory")
    long = tmp_path / ("x" * 300)
    for model, data in ((long, jsonl), (TINY, long), (TINY, "x" * 300)):
        code, _, error = call(capfd, "evaluate", "--model", model, "--data", data)
        assert (code, error.startswith("medner: ")) == (4, True)
        assert "internal error" not in error
    code, _, error = call(capfd, "evaluate", "--model", TINY, "--data", jsonl, "--json", tmp_path / "none" / "s.json")
    assert (code, error) == (6, f"medner: {tmp_path}/none/s.json: no such directory; create it first\n")


def test_found_spans_are_those_of_the_annotator() -> None:
    """Documents in, their spans out, in order; empty ones included."""
    documents = [Document("a", "no fever", ()), Document("b", "", ()), Document("c", "type 2 and asthma", ())]
    assert find(testing.annotator(), documents) == [
        [(3, 8, "Disease")], [], [(0, 6, "Disease"), (11, 17, "Disease")]
    ]  # fmt: skip
    assert find(testing.annotator(Options(text_column="note")), documents[:1]) == [[(3, 8, "Disease")]]


def test_labels_fit_only_where_the_model_has_one() -> None:
    """A model that tells labels apart is scored on the data set's own."""
    documents = [Document("a", "no fever", ((3, 8, "Sign"),))]
    annotator = testing.annotator()
    assert fit_labels(annotator, documents)[0].spans == ((3, 8, "Disease"),)
    assert score_of(annotator, documents).overall.tp == 1
    # Where the data has the model's own label, the others are of something else.
    both = [Document("a", "no fever", ((0, 2, "Drug"), (3, 8, "Disease")))]
    assert fit_labels(annotator, both)[0].spans == ((3, 8, "Disease"),)
    assert score_of(annotator, both).overall.f1 == 1.0
    annotator.types = ("Disease", "Sign")
    assert fit_labels(annotator, documents) == documents
    assert score_of(annotator, documents).overall.tp == 0


# ---------------------------------------------------------------------------------------------------------------------
# Wrapping


@settings(deadline=None, max_examples=400)
@given(st.text(alphabet="ab \n\té😀", max_size=60), st.integers(2, 12))
def test_wrapping_only_turns_spaces_into_line_breaks(text: str, width: int) -> None:
    """Offsets stay; no line is longer than the width unless it is one word, which a space may precede."""
    wrapped = wrap(text, width)
    assert len(wrapped) == len(text)
    assert all(new == old or (old, new) == (" ", "\n") for old, new in zip(text, wrapped, strict=True))
    for line in wrapped.split("\n"):
        assert len(line) <= width or " " not in line[1:]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=8), max_size=12), st.integers(2, 12))
def test_wrapping_fills_lines_as_textwrap_does(words: list[str], width: int) -> None:
    """Single spaces between words: the greedy filling of lines, as the standard library does it."""
    import textwrap

    expected = textwrap.wrap(" ".join(words), width, break_long_words=False, break_on_hyphens=False)
    assert wrap(" ".join(words), width).split("\n") == (expected or [""])


def test_wrapped_documents_keep_their_spans() -> None:
    """The gold offsets are those of the same characters, over a line's end too."""
    document = Document("a", "a heart failure", ((2, 15, "Disease"),), ((0, 1), (2, 7), (8, 15)))
    (wrapped,) = hard_wrapped([document], 8)
    assert wrapped == Document("a", "a heart\nfailure", ((2, 15, "Disease"),), ((0, 1), (2, 7), (8, 15)))
    assert score_of(testing.annotator(), [wrapped]).overall.f1 == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_bundle_is_opened_as_one() -> None:
    """A directory with a graph runs on onnxruntime, whatever else lies in it."""
    annotator = open_model(TINY, Options(threads=1))
    assert isinstance(annotator, Annotator)
    assert annotator.session is not None
    assert annotator.options.threads == 1


@pytest.mark.filterwarnings("ignore")  # of torch and transformers, which are not under test here
def test_a_checkpoint_is_scored_as_pytorch_computes_it(
    tmp_path: Path, conll: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A random BERT: the tags of each sentence are those of transformers itself."""
    torch = pytest.importorskip("torch", reason="needs the extra train")
    transformers = pytest.importorskip("transformers", reason="needs the extra train")
    path = tmp_path / "checkpoint"
    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "fever", ".", "heart", "failure", "and", "headache"]
    (path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(path / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(path)
    labels = ["O", "B-Organ", "I-Organ", "B-Sign", "I-Sign"]
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=1.0, id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )  # fmt: skip
    transformers.set_seed(3)
    model = transformers.BertForTokenClassification(config).eval()
    model.save_pretrained(path)

    with pytest.raises(ModelError) as failure:
        open_model(str(path), Options(precision="int8"))
    assert str(failure.value) == f"{path}: a checkpoint is run in fp32 and has no int8; export it first"
    (path / "bundle" / "onnx").mkdir(parents=True)  # what was exported from it may lie inside
    (path / "bundle" / "onnx" / "model.onnx").touch()
    annotator = open_model(str(path), Options(threads=1))
    assert annotator.session is None
    documents = datasets.load(str(conll), "test")
    expected: list[Any] = []
    for document in documents:
        encoded = tokenizer(document.text, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()[1:-1]
        with torch.inference_mode():
            tags = [labels[i] for i in model(**encoded).logits[0].argmax(-1).tolist()[1:-1]]
        expected.append(
            [(offsets[first][0], offsets[last - 1][1], label) for first, last, label in datasets.entities(tags)]
        )
    assert any(expected)
    assert find(annotator, documents) == expected

    code, output, _ = call(capfd, "evaluate", "--model", path, "--data", conll, "--json", tmp_path / "s.json")
    assert (code, output.splitlines()[0]) == (0, f"checkpoint fp32, window 64, on {conll} (test)")
    found = sum(map(len, expected))
    overall = json.loads((tmp_path / "s.json").read_text())["overall"]
    assert (overall["tp"] + overall["fp"], overall["support"]) == (found, 4)


def test_a_label_that_others_cover(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a model's only label all spans count, also those inside a longer one of another label."""
    data, scores = tmp_path / "gold.jsonl", tmp_path / "s.json"
    notes = [
        {"text": "on fever drug for asthma", "spans": [[3, 8, "Disease"], [3, 13, "Drug"], [18, 24, "Disease"]]},
        {"text": "heart failure today", "spans": [[0, 13, "Disease"], [0, 19, "Finding"]]},
    ]
    for number in range(2):
        data.write_text("".join(json.dumps(note) + "\n" for note in notes[number:]))
        code, _, _ = call(capfd, "evaluate", "--model", TINY, "--data", data, "--json", scores)
        overall = json.loads(scores.read_text())["overall"]
        assert (code, overall["f1"], overall["support"]) == (0, 1.0, 3 - 2 * number)


def test_what_ships_goes_before_a_checkpoint_of_its_name(
    tmp_path: Path, jsonl: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for ``annotate``; with ``./`` it is the directory."""
    monkeypatch.chdir(tmp_path)
    Path("default").mkdir()
    Path("default", "model.safetensors").write_bytes(b"")
    assert call(capfd, "evaluate", "--model", "default", "--data", jsonl)[0] == 0
    code, _, error = call(capfd, "evaluate", "--model", "./default", "--data", jsonl)
    assert (code, error.partition(";")[0]) == (4, "medner: default: no config.json")


def test_a_path_that_is_no_unicode(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is recorded as it can be printed."""
    data, scores = tmp_path / os.fsdecode(b"gold\xff.jsonl"), tmp_path / "s.json"
    data.write_text(json.dumps({"text": "asthma", "spans": [[0, 6, "Disease"]]}) + "\n")
    code, _, _ = call(capfd, "evaluate", "--model", TINY, "--data", data, "--json", scores)
    assert (code, json.loads(scores.read_text())["data"]) == (0, f"{tmp_path}/gold\\xff.jsonl")
