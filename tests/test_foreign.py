"""Models that other tools wrote are annotated as they are, with the spans that transformers gives on equal windows."""

import json
import random
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum.exporters.onnx")
seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")

from tokenizers import ByteLevelBPETokenizer  # noqa: E402

from medner import bundle as bundles  # noqa: E402
from medner import testing, windows  # noqa: E402
from medner.annotate import Annotator, Options  # noqa: E402
from medner.errors import ModelError  # noqa: E402

#: Five classes under each scheme. The pipeline of transformers understands the first three.
SCHEMES = {
    "IO": ("O", "Disease", "Drug", "Gene", "Site"),
    "IOB1": ("O", "I-Disease", "B-Disease", "I-Drug", "B-Drug"),
    "IOB2": ("O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"),
    "BIOES": ("O", "B-Disease", "I-Disease", "E-Disease", "S-Disease"),
    "BILOU": ("O", "B-Disease", "I-Disease", "L-Disease", "U-Disease"),
}

TEXT = (
    "Patient has had type 2 diabetes mellitus since 2009, denies fever. No asthma; heart-failure (NYHA II) is stable. "
    "Plan: continue metformin 500mg b.i.d. Café-au-lait spots unchanged. BP 120/80 mmHg - ok? β-blocker µg "
    "Follow-up in 3 wks & re-check HbA1c!"
)
GAPS = (*[" "] * 12, "\n", "\n\n", "  ", "\t", "\r\n", ".\n", "\nASSESSMENT:\n", "\n- ", "\u00a0", " 漢 ", " 😀 ")


def notes(seed: int, count: int) -> list[str]:
    """Made-up notes of words in random order, with line breaks, headings, blank lines and odd white space."""
    rng = random.Random(seed)
    words = TEXT.split()
    return ["".join(rng.choice(words) + rng.choice(GAPS) for _ in range(rng.randint(1, 120))) for _ in range(count)]


def batch(texts: list[str]) -> pa.RecordBatch:
    """The notes as a batch."""
    return pa.record_batch({"text": pa.array(texts, pa.string())})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(labels: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Of a small model with large weights, so that its tags change from word to word."""
    return {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "initializer_range": 0.4,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        **more,
    }


def optimum_export(checkpoint: Path, output: Path) -> Path:
    """What ``optimum-cli export onnx --task token-classification`` does."""
    import logging
    import warnings

    from optimum.exporters.onnx import main_export

    logging.getLogger("optimum").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main_export(str(checkpoint), str(output), task="token-classification", local_files_only=True)
    return output


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random BERT of five classes over the tiny vocabulary: checkpoint, and the directory that Optimum writes."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(11)
    config = transformers.BertConfig(**settings(SCHEMES["IOB2"], vocab_size=117, max_position_embeddings=512))
    transformers.BertForTokenClassification(config).save_pretrained(path / "checkpoint")
    transformers.BertTokenizerFast(
        tokenizer_file=str(testing.bundle() / "tokenizer.json"), mask_token=None, model_max_length=512
    ).save_pretrained(path / "checkpoint")
    return path / "checkpoint", optimum_export(path / "checkpoint", path / "onnx-model")


def renamed(model: Path, path: Path, labels: tuple[str, ...]) -> Path:
    """A copy of a model directory whose classes have other names."""
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def slices(annotator: Annotator, text: str) -> list[tuple[int, int]] | None:
    """Bounds of the windows that medner cuts from a note; None where a window overlaps another."""
    tokenizer = windows.WordTokenizer(annotator.bundle.tokenizer_json())
    bounds = windows.segments(text)
    tokens = tokenizer.tokenize([text[a:b] for a, b in pairwise(bounds)])
    capacity = annotator.bundle.window - len(tokenizer.prefix) - len(tokenizer.suffix)
    packed = windows.pack(tokens.bounds, 0, len(bounds) - 1, capacity)
    if any((w.start, w.end) != (w.own_start, w.own_end) for w in packed):
        return None
    # A segment without a token, such as white space, may belong to either neighbour.
    firsts = [bounds[np.searchsorted(tokens.bounds, w.start, side="right") - 1] for w in packed]
    return list(pairwise([*firsts, len(text)]))


class Words:
    """The pipeline of transformers, stopped where each word has the label of its first token."""

    def __init__(self, checkpoint: Path) -> None:
        pipeline = transformers.pipeline(
            "token-classification", model=str(checkpoint), aggregation_strategy="first", ignore_labels=[], device="cpu"
        )
        self._group = pipeline.group_entities
        pipeline.group_entities = lambda words: words
        self._pipeline = pipeline

    def segments(self, text: str, cut: list[tuple[int, int]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The words of each segment of a text that the pipeline sees in medner's windows."""
        bounds = windows.segments(text)
        for start, end in cut:
            words = self._pipeline(text[start:end])
            for low, high in pairwise(bounds):
                yield start, [word for word in words if low <= start + word["start"] < high]

    def spans(self, text: str, cut: list[tuple[int, int]]) -> list[tuple[int, int, str, float]]:
        """Spans as the pipeline groups the words of a segment."""
        found = [
            (start + entity["start"], start + entity["end"], entity["entity_group"], entity["score"])
            for start, words in self.segments(text, cut)
            for entity in (self._group(words) if words else [])
        ]
        return [span for span in found if span[2] != "O"]

    def spans_by_seqeval(self, text: str, cut: list[tuple[int, int]]) -> list[tuple[int, int, str, float]]:
        """Spans as seqeval decodes the words of a segment; it calls the tags L and U E and S."""
        found = []
        for start, words in self.segments(text, cut):
            tags = [word["entity"].replace("L-", "E-").replace("U-", "S-") for word in words]
            for label, first, last in seqeval.get_entities(tags):
                score = float(np.mean([word["score"] for word in words[first : last + 1]]))
                found.append((start + words[first]["start"], start + words[last]["end"], label, score))
        return found


def compare(annotator: Annotator, reference: Any, texts: list[str]) -> tuple[int, int]:
    """Hold medner's spans against a reference on medner's own windows; returns notes and spans compared."""
    compared = spans = 0
    for text, found in zip(texts, annotator(batch(texts)).column("spans").to_pylist(), strict=True):
        cut = slices(annotator, text)
        if cut is not None:
            expected = reference(text, cut)
            assert [(s["start"], s["end"], s["label"]) for s in found] == [e[:3] for e in expected]
            np.testing.assert_allclose([s["score"] for s in found], [e[3] for e in expected], atol=1e-4)
            compared, spans = compared + 1, spans + len(found)
    return compared, spans


# ---------------------------------------------------------------------------------------------------------------------
# What Optimum wrote


def test_a_directory_of_optimum(bert: tuple[Path, Path]) -> None:
    """A directory as Optimum writes it loads as it is: foreign, fp32, and a window of 128 that its limit allows."""
    assert sorted(p.name for p in bert[1].iterdir() if p.suffix == ".onnx") == ["model.onnx"]
    annotator = Annotator.load(bert[1], Options(device="cpu"))
    bundle = annotator.bundle
    assert (bundle.foreign, bundle.window, bundle.labels, annotator.precision) == (True, 128, SCHEMES["IOB2"], "fp32")
    assert annotator.types == ("Disease", "Drug")
    assert dict(bundle.identity("fp32")) == {
        name: bundles.sha256_of(bert[1] / name) for name in ("config.json", "tokenizer.json", "model.onnx")
    }


@pytest.mark.parametrize(("limit", "window"), [(512, 128), (100, 100)])
def test_window_of_a_foreign_model(bert: tuple[Path, Path], tmp_path: Path, limit: int, window: int) -> None:
    """The window is min(128, the limit), which may stand in the tokenizer's settings; --window overrides it."""
    model = shutil.copytree(bert[1], tmp_path / "model")
    for file, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        value = json.loads((model / file).read_text()) | {key: 512 if file == "config.json" else limit}
        (model / file).write_text(json.dumps(value))
    assert Annotator.load(model).bundle.window == window
    assert Annotator.load(model, Options(window=64)).bundle.window == 64
    with pytest.raises(ModelError) as failure:
        Annotator.load(model, Options(window=limit + 1))
    assert str(failure.value) == (f"model: a window of {limit + 1} tokens lies outside 8 to {limit}, the model's limit")


def test_the_graph_may_lie_under_onnx(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """A graph under onnx/ is found as well, and gives the same spans."""
    model = shutil.copytree(bert[1], tmp_path / "model")
    (model / "onnx").mkdir()
    (model / "model.onnx").rename(model / "onnx" / "model.onnx")
    texts = notes(5, 10)
    assert Annotator.load(model)(batch(texts)) == Annotator.load(bert[1])(batch(texts))


def test_unnamed_labels(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """Labels that were never named are refused, pointing to id2label."""
    model = renamed(bert[1], tmp_path / "model", tuple(f"LABEL_{i}" for i in range(5)))
    with pytest.raises(ModelError) as failure:
        Annotator.load(model)
    assert str(failure.value) == (
        f"{model}/config.json: labels are named LABEL_0, LABEL_1, ...; write the real tags (O, B-Disease, ...) "
        "into id2label"
    )


def test_a_number_of_labels_that_is_not_the_graphs(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """id2label must name as many classes as the graph has."""
    model = renamed(bert[1], tmp_path / "model", SCHEMES["IOB2"][:3])
    with pytest.raises(ModelError) as failure:
        Annotator.load(model)
    assert str(failure.value) == f"{model}/model.onnx: has 5 classes, but config.json names 3"


# ---------------------------------------------------------------------------------------------------------------------
# Spans against transformers


@pytest.mark.parametrize("scheme", ["IO", "IOB1", "IOB2"])
def test_spans_are_those_of_the_pipeline(bert: tuple[Path, Path], tmp_path: Path, scheme: str) -> None:
    """On equal windows medner finds the pipeline's spans exactly, its scores to 1e-4."""
    reference = Words(renamed(bert[0], tmp_path / "checkpoint", SCHEMES[scheme]))
    annotator = Annotator.load(renamed(bert[1], tmp_path / "model", SCHEMES[scheme]))
    compared, spans = compare(annotator, reference.spans, notes(1, 25))
    assert compared >= 20
    assert spans >= 300


@pytest.mark.parametrize("scheme", ["BIOES", "BILOU"])
def test_schemes_that_mark_ends(bert: tuple[Path, Path], tmp_path: Path, scheme: str) -> None:
    """The pipeline does not know E, L, S and U: its word labels, decoded by seqeval, give medner's spans."""
    reference = Words(renamed(bert[0], tmp_path / "checkpoint", SCHEMES[scheme]))
    annotator = Annotator.load(renamed(bert[1], tmp_path / "model", SCHEMES[scheme]))
    compared, spans = compare(annotator, reference.spans_by_seqeval, notes(2, 25))
    assert compared >= 20
    assert spans >= 300


def test_spans_are_those_of_the_pipeline_on_real_notes(bert: tuple[Path, Path], data_dir: Path) -> None:
    """The same over 30 clinical notes."""
    lines = (data_dir / "aci-bench" / "notes.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    texts = [json.loads(line)["text"] for line in lines]
    # The tiny vocabulary spells most words out, so only a long window holds every sentence whole.
    compared, spans = compare(Annotator.load(bert[1], Options(window=512)), Words(bert[0]).spans, texts)
    assert compared >= 20
    assert spans >= 1000


# ---------------------------------------------------------------------------------------------------------------------
# RoBERTa


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random RoBERTa with a byte-level BPE tokenizer: checkpoint, and the directory that Optimum writes."""
    path = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(notes(9, 60), vocab_size=400, special_tokens=specials, show_progress=False)
    trained.save_model(str(path))
    tokenizer = transformers.RobertaTokenizerFast(
        str(path / "vocab.json"), str(path / "merges.txt"), add_prefix_space=True, model_max_length=158
    )
    torch.manual_seed(12)
    config = transformers.RobertaConfig(
        **settings(SCHEMES["IOB2"], vocab_size=400, max_position_embeddings=130, pad_token_id=1, type_vocab_size=1)
    )
    transformers.RobertaForTokenClassification(config).save_pretrained(path / "checkpoint")
    tokenizer.save_pretrained(path / "checkpoint")
    return path / "checkpoint", optimum_export(path / "checkpoint", path / "onnx-model")


def basic_words(text: str) -> list[tuple[int, int]]:
    """BERT's basic tokenizer, by transformers' own slow one: words with their offsets in plain ASCII."""
    found, position = [], 0
    for word in transformers.models.bert.tokenization_bert.BasicTokenizer(do_lower_case=False).tokenize(text):
        start = text.index(word, position)
        found.append((start, start + len(word)))
        position = start + len(word)
    return found


def test_roberta(roberta: tuple[Path, Path]) -> None:
    """Words are the basic tokenizer's, a word's label is that of the token which holds its first character.

    Computed anew from transformers' logits on medner's own windows. Offsets have no leading space, though the
    tokens of byte-level BPE do.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta[0])
    model = transformers.AutoModelForTokenClassification.from_pretrained(roberta[0]).eval()
    annotator = Annotator.load(roberta[1])

    def reference(text: str, cut: list[tuple[int, int]]) -> list[tuple[int, int, str, float]]:
        bounds, found = windows.segments(text), []
        for start, end in cut:
            # The tokens of each segment by itself, together in one window.
            segments = [(a, b) for a, b in pairwise(bounds) if start <= a < end]
            encoded = [tokenizer(text[a:b], add_special_tokens=False, return_offsets_mapping=True) for a, b in segments]
            ids = [0, *(i for e in encoded for i in e["input_ids"]), 2]
            with torch.inference_mode():
                probabilities = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[1:-1]
            done = 0
            for (a, b), e in zip(segments, encoded, strict=True):
                own = probabilities[done : done + len(e["input_ids"])]
                done += len(own)
                tags, scores, words, before = [], [], [], None
                for low, high in basic_words(text[a:b]):
                    (token,) = (i for i, (x, y) in enumerate(e["offset_mapping"]) if x <= low < y)
                    if token == before:  # words that share a token are one
                        words[-1] = (words[-1][0], high)
                        continue
                    words.append((low, high))
                    before = token
                    tags.append(model.config.id2label[int(own[token].argmax())])
                    scores.append(float(own[token].max()))
                for label, first, last in seqeval.get_entities(tags):
                    found.append(
                        (a + words[first][0], a + words[last][1], label, float(np.mean(scores[first : last + 1])))
                    )
        return found

    texts = ["".join(c for c in text if c.isascii()) for text in notes(3, 25)]
    compared, spans = compare(annotator, reference, texts)
    assert compared >= 20
    assert spans >= 300


def test_offsets_of_roberta_beyond_ascii(roberta: tuple[Path, Path]) -> None:
    """Spans begin and end at words, whatever the bytes of a character: no white space, no half of a letter."""
    text = "😀 café-au-lait 漢字  β\u2011blocker\u00a0µg 👨\u200d👩 e\u0301tude " * 6
    found = Annotator.load(roberta[1])(text)
    assert len(found) > 10
    words = windows.WordTokenizer((roberta[1] / "tokenizer.json").read_text())
    bounds = windows.segments(text)
    tokens = words.tokenize([text[a:b] for a, b in pairwise(bounds)])
    edges = [(bounds[i] + tokens.chars(i)).tolist() for i in range(len(bounds) - 1)]
    starts, ends = ({word[side] for segment in edges for word in segment} for side in (0, 1))
    for span in found:
        assert span.text == text[span.start : span.end] == span.text.strip()
        assert span.start in starts
        assert span.end in ends


def test_window_of_roberta(roberta: tuple[Path, Path]) -> None:
    """RoBERTa numbers positions from pad_token_id + 1: of 130 positions 128 tokens are left, and that many run."""
    annotator = Annotator.load(roberta[1], Options(window=128))
    annotator("fever " * 400)
    with pytest.raises(ModelError) as failure:
        Annotator.load(roberta[1], Options(window=129))
    assert str(failure.value) == "onnx-model: a window of 129 tokens lies outside 8 to 128, the model's limit"


def test_dynamic_quantization(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """Optimum's int8 scales by all that is computed together; a note has the spans that it has alone all the same."""
    from onnxruntime.quantization import quantize_dynamic

    model = shutil.copytree(bert[1], tmp_path / "dynamic")
    quantize_dynamic(model / "model.onnx", model / "model_quantized.onnx")
    annotator = Annotator.load(model, Options(threads=2, batch_tokens=512, reuse=False))
    assert annotator.precision == "int8"
    assert annotator.batch_tokens == 1
    assert annotator.notice.startswith("model_quantized.onnx scales activations by all that is computed together, so")
    assert annotator.session is not None
    ids = np.random.default_rng(0).integers(4, 117, (2, 30))
    together, first = annotator.session(ids, np.array([30, 30])), annotator.session(ids[:1], np.array([30]))
    assert not np.array_equal(together[:1], first)  # or else nothing is shown here
    texts = notes(5, 12)
    alone = [annotator(text) for text in texts]
    assert any(alone)
    for order in (range(12), range(11, -1, -1)):
        found = annotator(batch([texts[i] for i in order])).column("spans").to_pylist()
        assert [[(s["start"], s["end"], s["label"], s["score"]) for s in spans] for spans in found] == [
            [(s.start, s.end, s.label, s.score) for s in alone[i]] for i in order
        ]
    plain = Annotator.load(model, Options(precision="fp32", batch_tokens=512))
    assert (plain.batch_tokens, plain.notice) == (512, "")
