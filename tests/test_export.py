"""Checkpoint to bundle: the parity gate and what fails it, the choice of the window, the layout."""

import errno
import gzip
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("optimum.onnxruntime")

from onnx import numpy_helper  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402

import medner  # noqa: E402
from medner import bundle as bundles  # noqa: E402
from medner import parity, testing  # noqa: E402
from medner.annotate import Annotator, Options  # noqa: E402
from medner.datasets import Document  # noqa: E402
from medner.errors import CheckFailed, InputError, ModelError, OutputError, UsageError  # noqa: E402
from medner.export import ExportOptions, convert, export, half, optimize, verify  # noqa: E402
from medner.pytorch import TorchModel, torch_annotator  # noqa: E402
from medner.runtime import Session  # noqa: E402

MENTIONS = ("breast cancer", "asthma", "type 2 diabetes", "heart failure", "fever", "gouty arthritis", "pain")
FRAMES = (
    "The patient has {} and {} .",
    "No {} was seen , but {} is likely .",
    "Her mother had {} ; her father had {} at home .",
    "She takes aspirin daily for {} or {} .",
    "He walks every day and sleeps well .",
    "Plan : follow up on {} and check {} again .",
)
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("O", "B-Disease", "I-Disease")
LIMIT = 160
QUANTIZE = optimize.quantize_columns
#: Ten of each layer, six of the embeddings; the product and sum of the classifier are fp32.
OPERATORS = "fused: 2 attention, 4 normalization, 2 GELU; 26 operators in half precision, 2 in fp32"


def document(rng: random.Random, sentences: int) -> Document:
    """A made-up note whose mentions are labelled."""
    text, spans = "", []
    for _ in range(sentences):
        first, *rest = rng.choice(FRAMES).split("{}")
        text += (" " if text else "") + first
        for after in rest:
            mention = rng.choice(MENTIONS)
            spans.append((len(text), len(text) + len(mention), "Disease"))
            text += mention + after
    return Document("note", text, tuple(spans))


def jsonl(path: Path, documents: list[Document]) -> Path:
    """The documents as labelled JSONL."""
    lines = [json.dumps({"text": d.text, "spans": d.spans}) for d in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: faster for models of this size, and no quarrel with other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers that has learned the mentions above."""
    words = sorted({word.lower() for text in (*FRAMES, *MENTIONS) for word in text.split()} - {"{}", "gouty"})
    vocab = {piece: i for i, piece in enumerate([*PIECES, *words, "gout", "##y"])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=made, model_max_length=LIMIT)
    torch.manual_seed(7)
    model = transformers.BertForTokenClassification(
        transformers.BertConfig(
            vocab_size=len(vocab),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LIMIT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
    )
    rng = random.Random(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        documents = [document(rng, rng.randint(1, 5)) for _ in range(24)]
        inputs = tokenizer([d.text for d in documents], padding=True, return_offsets_mapping=True, return_tensors="pt")
        targets = torch.zeros_like(inputs["input_ids"])
        for row, (doc, offsets) in enumerate(zip(documents, inputs.pop("offset_mapping").tolist(), strict=True)):
            for column, (start, end) in enumerate(offsets):
                for low, high, _ in doc.spans:
                    if start < end and low <= start < high:
                        targets[row, column] = 1 if start == low else 2
        targets[inputs["attention_mask"] == 0] = -100
        model(**inputs, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty labelled notes of 1 to 10 sentences."""
    rng = random.Random(8)
    return jsonl(tmp_path_factory.mktemp("notes") / "notes.jsonl", [document(rng, 1 + i // 2) for i in range(20)])


@pytest.fixture(scope="module")
def exported(checkpoint: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundle of that checkpoint, window chosen, and what the export said."""
    output = tmp_path_factory.mktemp("export") / "small"
    said = export(ExportOptions(checkpoint, output, str(notes), licence="CC0-1.0"))
    return output, said


@pytest.fixture(scope="module")
def halved(checkpoint: Path, notes: Path, exported: tuple[Path, str]) -> tuple[Path, str]:
    """The same bundle with all three precisions, and what its export said."""
    output = exported[0].parent / "halved"
    return output, export(ExportOptions(checkpoint, output, str(notes), precisions=("fp32", "int8", "fp16"), window=64))


@pytest.fixture
def no_optimum(exported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the graph that Optimum has already written, to save time."""

    def copy(checkpoint: Path, graph: Path) -> None:
        graph.parent.mkdir(parents=True)
        shutil.copyfile(exported[0] / "onnx/model.onnx", graph)

    monkeypatch.setattr(convert, "to_onnx", copy)


def change_graph(path: Path, name: str, change: Any) -> None:
    """Replace one initializer of a graph by ``change`` of it."""
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    onnx.save(model, path)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let every export change the classifier's bias in the graph behind the gate's back."""
    faithful = convert.to_onnx

    def spoiled(checkpoint: Path, graph: Path) -> None:
        faithful(checkpoint, graph)
        change_graph(graph, "classifier.bias", change)

    monkeypatch.setattr(convert, "to_onnx", spoiled)


def found(annotator: Annotator, notes: Path) -> list[list[Any]]:
    """The spans of each note in a JSONL file."""
    texts = [json.loads(line)["text"] for line in notes.read_text(encoding="utf-8").splitlines()]
    spans = annotator(pa.record_batch({"text": texts})).column("spans").to_pylist()
    return [[(s["start"], s["end"], s["label"]) for s in row] for row in spans]


# ---------------------------------------------------------------------------------------------------------------------
# The bundle and its report


def test_every_variant_finds_what_pytorch_finds(checkpoint: Path, notes: Path, exported: tuple[Path, str]) -> None:
    """fp32 and int8 both give PyTorch's spans on the notes, and those are the labelled ones."""
    output, _ = exported
    window = bundles.load(output).window
    reference = found(torch_annotator(checkpoint, Options(window=window)), notes)
    gold = [[tuple(s) for s in json.loads(line)["spans"]] for line in notes.read_text().splitlines()]
    assert reference == gold
    assert sum(map(len, gold)) > 100
    for precision in ("fp32", "int8"):
        assert found(medner.load(output, Options(precision=precision, device="cpu")), notes) == reference


def test_files_of_a_bundle(checkpoint: Path, exported: tuple[Path, str]) -> None:
    """A bundle holds the layout of DESIGN section 4 and nothing else; settings and tokenizer are the checkpoint's."""
    output, _ = exported
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "config.json",
        "medner.json",
        "onnx/model.onnx",
        "onnx/model_int8.onnx",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()
    assert [path.name for path in output.parent.iterdir() if path.name != "halved"] == ["small"]


def test_manifest_of_a_bundle(checkpoint: Path, notes: Path, exported: tuple[Path, str]) -> None:
    """medner.json records labels, window, hashes, licence, versions and the gate's figures; all hashes hold."""
    output, said = exported
    card = json.loads((output / "medner.json").read_text(encoding="utf-8"))
    reference = torch_annotator(checkpoint, Options(window=card["window"]))
    texts = [json.loads(line)["text"] for line in notes.read_text(encoding="utf-8").splitlines()]
    counts = reference(pa.record_batch({"text": texts}))
    tokens, windows, spans = (sum(counts.column(name).to_pylist()) for name in ("n_tokens", "n_windows", "n_spans"))
    parity = card.pop("parity")
    largest = parity["logits"].pop("max_difference")
    assert 0 < largest < 1e-4
    assert card == {
        "format_version": 1,
        "name": "small",
        "labels": list(LABELS),
        "window": 128,
        "packed": True,
        "variants": {
            precision: {
                "sha256": bundles.sha256_of(output / file),
                "bytes": (output / file).stat().st_size,
            }
            for precision, file in (("fp32", "onnx/model.onnx"), ("int8", "onnx/model_int8.onnx"))
        },
        "files": {
            name: bundles.sha256_of(checkpoint / name)
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
        },
        "licence": "CC0-1.0",
        "checkpoint": {"model.safetensors": bundles.sha256_of(checkpoint / "model.safetensors")},
        "training": None,
        "versions": {
            "medner": medner.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "optimum": card["versions"]["optimum"],
            "optimum-onnx": card["versions"]["optimum-onnx"],
            "onnx": onnx.__version__,
            "onnxruntime": ort.__version__,
        },
    }
    scores = {"spans": spans, "agreement": 1.0, "f1": 1.0, "reference_f1": 1.0, "passed": True, "kept": None}
    assert parity == {
        "data": "notes.jsonl",
        "documents": 20,
        "window": 128,
        "packed": True,
        "windows_tried": {"one segment": 1.0, "64": 1.0, "96": 1.0, "128": 1.0},
        "min_scores_tried": {},
        "logits": {"tokens": tokens + 2 * windows, "ties": 0, "differences": 0},
        "variants": {"fp32": scores, "int8": scores},
        "int8_scales": "fixed",
        "fp16_operators": "",
    }
    assert said == (
        f"parity on notes.jsonl: 20 documents, windows of up to 128 tokens, packed; logits differ by at most "
        f"{largest:.1e}, 0 ties, "
        f"0 differences in {tokens + 2 * windows} tokens\n"
        f"fp32: {spans} spans, 100.00% equal, F1 1.0000 (PyTorch 1.0000)\n"
        f"int8: {spans} spans, 100.00% equal, F1 1.0000 (PyTorch 1.0000)"
    )
    assert (output / "README.md").read_text(encoding="utf-8") == (
        "# small\n\n"
        "A token classifier for Disease, exported by medner.\n\n"
        "- Licence: CC0-1.0\n"
        "- Labels: O, B-Disease, I-Disease\n"
        "- Window: 128 tokens, as many segments as fit\n\n"
        "## Parity with PyTorch, on notes.jsonl (20 documents)\n\n"
        "| variant | spans | equal to PyTorch's | F1 | PyTorch's F1 |\n"
        "|---|---|---|---|---|\n"
        f"| fp32 | {spans} | 100.00% | 1.0000 | 1.0000 |\n"
        f"| int8 | {spans} | 100.00% | 1.0000 | 1.0000 |\n"
    )
    bundles.load(output).check()


def test_other_tools_load_a_bundle(checkpoint: Path, halved: tuple[Path, str]) -> None:
    """Optimum's ORTModelForTokenClassification loads every variant; fp32 gives PyTorch's logits."""
    from optimum.onnxruntime import ORTModelForTokenClassification

    tokenizer = transformers.AutoTokenizer.from_pretrained(halved[0])
    inputs = tokenizer(["She has asthma .", "No fever , but pain in the heart ."], padding=True, return_tensors="pt")
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        expected = model(**inputs).logits.numpy()
    mask = inputs["attention_mask"].numpy().astype(bool)
    for file, tolerance in (("model.onnx", 1e-5), ("model_fp16.onnx", 0.02), ("model_int8.onnx", 0.5)):
        loaded = ORTModelForTokenClassification.from_pretrained(halved[0], subfolder="onnx", file_name=file)
        assert loaded.config.id2label == dict(enumerate(LABELS))
        np.testing.assert_allclose(loaded(**inputs).logits.numpy()[mask], expected[mask], atol=tolerance)


@pytest.mark.usefixtures("no_optimum")
def test_one_precision(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """With --precision int8 alone the fp32 graph serves the gate and is left out; its figures stay in the report."""
    export(ExportOptions(checkpoint, tmp_path / "new" / "b", str(notes), precisions=("int8",), window=64, name="mine"))
    bundle = bundles.load(tmp_path / "new" / "b")
    assert (bundle.name, bundle.window, list(bundle.variants)) == ("mine", 64, ["int8"])
    assert list(bundle.card["parity"]["variants"]) == ["fp32", "int8"]
    assert not (bundle.path / "onnx/model.onnx").exists()


def test_fp16(checkpoint: Path, notes: Path, halved: tuple[Path, str]) -> None:
    """fp16 finds PyTorch's spans on the CPU; the report names what was fused; auto takes fp16 on a GPU alone."""
    output, said = halved
    bundle = bundles.load(output)
    reference = found(torch_annotator(checkpoint, Options(window=64)), notes)
    assert found(medner.load(output, Options(precision="fp16", device="cpu")), notes) == reference
    assert (bundle.card["parity"]["fp16_operators"], bundle.card["parity"]["variants"]["fp16"]["agreement"]) == (
        OPERATORS,
        1.0,
    )
    assert said.splitlines()[-2:] == [
        f"fp16: {sum(map(len, reference))} spans, 100.00% equal, F1 1.0000 (PyTorch 1.0000)",
        f"fp16 operators {OPERATORS}",
    ]
    assert [path.name for path in sorted((output / "onnx").iterdir())] == [
        "model.onnx",
        "model_fp16.onnx",
        "model_int8.onnx",
    ]
    assert [bundle.variant("auto", device)[0] for device in ("cpu", "cuda")] == ["int8", "fp16"]
    assert 0.4 < bundle.variants["fp16"].bytes / bundle.variants["fp32"].bytes < 0.5


@pytest.mark.usefixtures("no_optimum")
def test_an_fp16_variant_that_fails_is_not_written(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If half precision loses too much, the others are written, and the call fails with the figures, for int8 too."""
    monkeypatch.setattr(optimize, "quantize_columns", lossy)
    faithful = half.to_fp16

    def spoiled(source: Path, target: Path, samples: Any, config: Any, rounded: Path) -> Any:
        done = faithful(source, target, samples, config, rounded)
        for graph in (target, rounded):
            change_graph(graph, "bert.embeddings.word_embeddings.weight.half", lambda table: table[::-1].copy())
        return done

    monkeypatch.setattr(half, "to_fp16", spoiled)
    options = ExportOptions(checkpoint, tmp_path / "b", str(notes), ("fp32", "int8", "fp16"), window=64)
    with pytest.raises(CheckFailed) as failure:
        export(options)
    bundle = bundles.load(tmp_path / "b")
    assert list(bundle.variants) == ["fp32"]
    results = {name: bundle.card["parity"]["variants"][name] for name in ("int8", "fp16")}
    assert str(failure.value).splitlines() == [
        f"parity gate: the {name} variant failed on notes.jsonl and was not written: "
        f"{result['agreement']:.2%} of spans equal PyTorch's, F1 {result['f1']:.4f} against 1.0000"
        for name, result in results.items()
    ]
    assert "\n| fp16 (failed, not written) | " in (bundle.path / "README.md").read_text()


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.usefixtures("no_optimum")
def test_fp16_that_overflows(
    limited: bool, checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that no half can hold stay fp32; where they do not, the gate finds it, and fp32 alone is written."""
    faithful = convert.to_onnx

    def large(checkpoint: Path, graph: Path) -> None:
        faithful(checkpoint, graph)
        for kind, factor in (("query", 2.0**20), ("key", 2.0**-20)):  # exact, and the scores are what they were
            (product,) = (
                n for n in onnx.load(graph).graph.node if n.name.endswith(f"layer.0/attention/self/{kind}/MatMul")
            )
            for name in (product.input[1], f"bert.encoder.layer.0.attention.self.{kind}.bias"):
                change_graph(graph, name, lambda values, factor=factor: values * np.float32(factor))

    monkeypatch.setattr(convert, "to_onnx", large)
    options = ExportOptions(checkpoint, tmp_path / "b", str(notes), precisions=("fp32", "fp16"), window=64)
    if limited:
        export(options)
        assert list(bundles.load(tmp_path / "b").variants) == ["fp32", "fp16"]
        return
    monkeypatch.setattr(half, "LIMIT", np.inf)
    with np.errstate(over="ignore"), pytest.raises(CheckFailed) as failure:
        export(options)
    assert str(failure.value).startswith("the fp16 variant was not written: ")
    assert "the graph's " in str(failure.value)
    bundle = bundles.load(tmp_path / "b")
    assert (list(bundle.variants), list(bundle.card["parity"]["variants"])) == (["fp32"], ["fp32"])


@pytest.mark.usefixtures("no_optimum")
def test_what_training_recorded(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """metrics.json of the checkpoint goes into medner.json, and the hash of its weights."""
    trained = shutil.copytree(checkpoint, tmp_path / "trained")
    (trained / "metrics.json").write_text('{"options": {"window": 32}, "devel": 0.5}')
    export(ExportOptions(trained, tmp_path / "b", str(notes), precisions=("fp32",), window=48))
    card = bundles.load(tmp_path / "b").card
    assert card["training"] == {"options": {"window": 32}, "devel": 0.5}
    digest = hashlib.sha256((trained / "model.safetensors").read_bytes()).hexdigest()
    assert card["checkpoint"] == {"model.safetensors": digest}
    assert f"made of   model.safetensors, SHA-256 {digest[:16]}..." in bundles.describe(bundles.load(tmp_path / "b"))
    assert card["parity"]["windows_tried"] == {}
    (trained / "metrics.json").write_text("of another program")
    export(ExportOptions(trained, tmp_path / "c", str(notes), precisions=("fp32",), window=48))
    assert bundles.load(tmp_path / "c").card["training"] is None


@pytest.mark.usefixtures("no_optimum")
def test_notes_in_another_column(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """Parity data has the column that is named; the error names the option."""
    texts = [document.text for document in parity.read_parity_data(str(notes)).documents]
    pq.write_table(pa.table({"report": texts}), tmp_path / "notes.parquet")
    options = ExportOptions(
        checkpoint, tmp_path / "b", str(tmp_path / "notes.parquet"), precisions=("fp32",), window=48
    )
    with pytest.raises(InputError, match="name another with --text-column"):
        export(options)
    export(replace(options, text_column="report"))
    assert bundles.load(tmp_path / "b").card["parity"]["documents"] == len(texts)


def test_a_disk_that_is_full(checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the checkpoint, and nothing is left behind."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    exporters = pytest.importorskip("optimum.exporters.onnx")
    monkeypatch.setattr(exporters, "main_export", full)
    with pytest.raises(OutputError, match=r"b: cannot be written \(No space left on device\)$"):
        export(ExportOptions(checkpoint, tmp_path / "b", str(notes), precisions=("fp32",), window=48))
    assert not any(path.name.startswith(("b", ".medner")) for path in tmp_path.iterdir())


@pytest.mark.usefixtures("no_optimum")
@pytest.mark.parametrize("asked", [None, 0.6])
def test_the_score_below_which_spans_are_left_out(
    checkpoint: Path, notes: Path, tmp_path: Path, asked: float | None
) -> None:
    """It is chosen, or the one asked for; the gate compares all spans, and the bundle, its card and a run know it."""
    said = export(ExportOptions(checkpoint, tmp_path / "b", str(notes), precisions=("fp32",), min_score=asked))
    plain = export(ExportOptions(checkpoint, tmp_path / "c", str(notes), precisions=("fp32",)))
    bundle, other = bundles.load(tmp_path / "b"), bundles.load(tmp_path / "c")
    assert other.min_score == 0
    tried = bundle.card["parity"]["min_scores_tried"]
    if asked is None:
        assert list(tried)[:3] == ["0", "0.05", "0.1"]
        assert tried[f"{bundle.min_score:g}"] == max(tried.values())
        lines = said.splitlines()
        assert lines.pop(1).startswith(f"spans below {bundle.min_score:g} are left out: F1 ")
        assert lines == plain.splitlines()
    else:
        assert (bundle.min_score, tried, said) == (0.6, {}, plain)
        card = (tmp_path / "b" / "README.md").read_text()
        assert "\n- Spans with a score below 0.6 are left out\n" in card
    assert bundle.card["parity"]["variants"] == other.card["parity"]["variants"]


@pytest.mark.parametrize("name", ["a\nb", "n" * 201, os.fsdecode(b"b\xff")])
def test_a_name_that_no_bundle_can_have(checkpoint: Path, notes: Path, tmp_path: Path, name: str) -> None:
    """It is refused before any work, given or the directory's."""
    out = tmp_path / "out"
    for options in (
        ExportOptions(checkpoint, out / "b", str(notes), name=name),
        ExportOptions(checkpoint, out / name, str(notes)),
    ):
        with pytest.raises(UsageError, match="a bundle's name is printable text of 1 to 200 characters"):
            export(options)
    assert not out.exists()


def test_a_checkpoint_inside_the_output(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """It would go with the bundle that is replaced."""
    output = Path(shutil.copytree(testing.bundle(), tmp_path / "b"))
    inside = Path(shutil.copytree(checkpoint, output / "checkpoint"))
    labelled = Path(shutil.copy(notes, output))
    for options, place in (
        (ExportOptions(inside, output, str(notes), overwrite=True), inside),
        (ExportOptions(checkpoint, output, str(labelled), overwrite=True), labelled),
    ):
        with pytest.raises(UsageError) as failure:
            export(options)
        assert str(failure.value) == f"{place} lies in the output {output}, which is replaced; choose another -o"
    assert (inside / "config.json").is_file()


@pytest.mark.parametrize("asked", [-0.1, 1.1, math.nan])
def test_a_score_that_none_can_be(checkpoint: Path, notes: Path, tmp_path: Path, asked: float) -> None:
    """It lies between 0 and 1."""
    with pytest.raises(UsageError) as failure:
        export(ExportOptions(checkpoint, tmp_path / "b", str(notes), min_score=asked))
    assert str(failure.value) == f"--min-score {asked}: use auto or a number from 0 to 1"


# ---------------------------------------------------------------------------------------------------------------------
# The gate


@pytest.mark.usefixtures("no_optimum")
def test_a_corrupted_graph_is_not_written(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that finds other spans than PyTorch fails the gate, and no file is left behind."""
    spoil(monkeypatch, lambda bias: bias + np.array([100, 0, 0], np.float32))
    batch = pa.record_batch({"text": [json.loads(line)["text"] for line in notes.read_text().splitlines()]})
    counts = torch_annotator(checkpoint, Options(window=64))(batch)
    tokens = sum(counts.column("n_tokens").to_pylist()) + 2 * sum(counts.column("n_windows").to_pylist())
    with pytest.raises(CheckFailed) as failure:
        export(ExportOptions(checkpoint, tmp_path / "b", str(notes), window=64))
    start = "parity gate: the fp32 variant failed on notes.jsonl and was not written: "
    said, end = str(failure.value).removeprefix(start).split(" of ")
    assert end == f"{tokens} tokens have another tag than PyTorch gives"
    assert 100 < int(said) < tokens
    assert failure.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def lossy(matrix: Any) -> tuple[Any, Any]:
    """``quantize_columns`` that loses every fourth column: words of the table, neurons of the layers.

    Fewer bits alone do not disturb a model as sure of itself as this one.
    """
    values, scale = QUANTIZE(matrix)
    values[:, ::4] = 0
    return values, scale


@pytest.mark.usefixtures("no_optimum")
def test_an_int8_variant_that_fails_is_not_written(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If int8 loses too much it is left out, fp32 is written, and the call fails with the figures; exit code 1."""
    monkeypatch.setattr(optimize, "quantize_columns", lossy)
    with pytest.raises(CheckFailed) as failure:
        export(ExportOptions(checkpoint, tmp_path / "b", str(notes), window=64))
    bundle = bundles.load(tmp_path / "b")
    assert list(bundle.variants) == ["fp32"]
    assert not (bundle.path / "onnx/model_int8.onnx").exists()
    result = bundle.card["parity"]["variants"]["int8"]
    assert not result["passed"]
    assert str(failure.value) == (
        "parity gate: the int8 variant failed on notes.jsonl and was not written: "
        f"{result['agreement']:.2%} of spans equal PyTorch's, F1 {result['f1']:.4f} against 1.0000"
    )
    assert failure.value.exit_code == 1
    assert result["f1"] < 0.998
    assert "\n| int8 (failed, not written) | " in (bundle.path / "README.md").read_text()


@pytest.mark.usefixtures("no_optimum")
def test_an_int8_variant_that_cannot_be_made(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an architecture that int8 does not know, fp32 is written all the same."""
    monkeypatch.setattr(optimize, "_matrices_left", lambda _: ["encoder/MatMul"])
    with pytest.raises(CheckFailed) as failure:
        export(ExportOptions(checkpoint, tmp_path / "b", str(notes), window=64))
    assert list(bundles.load(tmp_path / "b").variants) == ["fp32"]
    assert str(failure.value) == (
        "the int8 variant was not written: int8 does not know this architecture; these nodes "
        "keep fp32 weights: encoder/MatMul"
    )


@pytest.mark.usefixtures("no_optimum")
def test_fixed_scales_that_lose_too_much(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If fixed scales fail the gate, every row gets its own, and the report says so."""
    faithful = optimize.to_int8
    done = []

    def to_int8(source: Path, target: Path, samples: Any, static_bits: float) -> None:
        with monkeypatch.context() as patch:
            if not done:
                patch.setattr(optimize, "quantize_columns", lossy)
            done.append(faithful(source, target, samples, static_bits))

    monkeypatch.setattr(optimize, "to_int8", to_int8)
    export(ExportOptions(checkpoint, tmp_path / "b", str(notes), window=64))
    assert [counts.static for counts in done] == [8, 0]
    report = bundles.load(tmp_path / "b").card["parity"]
    assert report["int8_scales"] == "a row's own"
    assert report["variants"]["int8"]["passed"]
    assert (tmp_path / "b/onnx/model_int8.onnx").exists()


@pytest.mark.usefixtures("no_optimum")
def test_no_bundle_without_a_variant(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If int8 alone is asked for and fails, nothing is written, and an older bundle stays."""
    old = shutil.copytree(testing.bundle(), tmp_path / "b")
    monkeypatch.setattr(optimize, "quantize_columns", lossy)
    options = ExportOptions(checkpoint, old, str(notes), precisions=("int8",), window=64, overwrite=True)
    with pytest.raises(CheckFailed):
        export(options)
    assert bundles.load(old).name == "tiny"
    assert list(tmp_path.iterdir()) == [old]


def with_bias(checkpoint: Path, path: Path, change: Any) -> Path:
    """A copy of the checkpoint in which the classes B and I differ by their bias alone."""
    shutil.copytree(checkpoint, path)
    model = transformers.AutoModelForTokenClassification.from_pretrained(path)
    with torch.no_grad():
        model.classifier.weight[2] = model.classifier.weight[1]
        model.classifier.bias[2] = model.classifier.bias[1] + change
    model.save_pretrained(path)
    return path


def gate(checkpoint: Path, notes: Path, graph: Path) -> tuple[parity.VariantParity, parity.Report]:
    """The gate's answer for an fp32 graph in windows of 64 tokens."""
    described = bundles.load_checkpoint(checkpoint, 64)
    asked = parity.Gate(described, TorchModel(checkpoint), parity.read_parity_data(str(notes)))
    return asked.check("fp32", graph), asked.report


@pytest.fixture(scope="module")
def tied(exported: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 graph with two equal classes, B and I, but I has 1e-5 more: it wins wherever B did."""
    path = tmp_path_factory.mktemp("tied") / "model.onnx"
    model = onnx.load(exported[0] / "onnx/model.onnx")
    (classifier,) = (n for n in model.graph.node if n.op_type == "Add" and n.output[0] == "logits")
    (product,) = (n for n in model.graph.node if n.output[0] in classifier.input and n.op_type == "MatMul")
    onnx.save(model, path)

    def even(weight: Any) -> Any:
        return weight[:, [0, 1, 1]]

    change_graph(path, product.input[1], even)
    change_graph(path, "classifier.bias", lambda bias: bias[[0, 1, 1]] + np.array([0, 0, 1e-5], np.float32))
    return path


def test_ties_are_counted_and_allowed(checkpoint: Path, notes: Path, tied: Path, tmp_path: Path) -> None:
    """Where PyTorch's two highest logits lie within 1e-3, another tag is a tie: counted, and no failure."""
    # Equal classes: PyTorch says B, the graph says I. All words of mentions differ.
    result, report = gate(with_bias(checkpoint, tmp_path / "equal", 0.0), notes, tied)
    assert report.logits.differences == 0
    assert report.logits.ties >= 100
    assert result.agreement < 1
    assert result.passed


@pytest.mark.parametrize(("gap", "is_tie"), [(0.9e-3, True), (1.1e-3, False)])
def test_what_a_tie_is(checkpoint: Path, notes: Path, tied: Path, tmp_path: Path, gap: float, is_tie: bool) -> None:
    """A gap of 0.9e-3 between PyTorch's two highest logits is a tie, one of 1.1e-3 is a difference and fails."""
    result, report = gate(with_bias(checkpoint, tmp_path / "near", -gap), notes, tied)
    counted = (report.logits.ties, report.logits.differences)
    assert min(counted) == 0
    assert counted[0 if is_tie else 1] >= 100
    assert result.passed == is_tie


def test_a_gate_that_sees_no_span_proves_nothing(checkpoint: Path, exported: tuple[Path, str], tmp_path: Path) -> None:
    """Parity data in which PyTorch's model finds nothing is refused."""
    dull = jsonl(tmp_path / "dull.jsonl", [Document("a", "He walks every day .", ())])
    with pytest.raises(InputError) as failure:
        gate(checkpoint, dull, exported[0] / "onnx/model.onnx")
    assert str(failure.value) == "dull.jsonl: PyTorch's model finds no span in it, so it proves nothing"


@pytest.mark.parametrize("label", ["Sign", None])
def test_labels_of_which_nothing_is_found(
    checkpoint: Path, exported: tuple[Path, str], notes: Path, tmp_path: Path, label: str | None
) -> None:
    """Without spans, or with those of other things, no F1 can be lost: int8 is held to agreement."""
    spans = ((0, 3, label),) if label else ()
    documents = [replace(d, spans=spans) for d in parity.read_parity_data(str(notes)).documents]
    asked = parity.Gate(
        bundles.load_checkpoint(checkpoint, 64),
        TorchModel(checkpoint),
        parity.read_parity_data(str(jsonl(tmp_path / "other.jsonl", documents))),
    )
    asked.check("fp32", exported[0] / "onnx/model.onnx")
    good = asked.check("int8", exported[0] / "onnx/model_int8.onnx")
    assert (good.f1, good.reference_f1, good.agreement, good.passed) == (0.0, 0.0, 1.0, True)
    dull = shutil.copyfile(exported[0] / "onnx/model_int8.onnx", tmp_path / "dull.onnx")
    change_graph(dull, "classifier.bias", lambda bias: bias + np.array([100, 0, 0], np.float32))
    assert not asked.check("int8", dull).passed


@pytest.mark.parametrize("labelled", [True, False])
def test_what_the_bundle_gives_out_is_held_to_parity(checkpoint: Path, notes: Path, labelled: bool) -> None:
    """A variant with PyTorch's spans and other scores gives out others, where those of low scores are left out."""
    trained = TorchModel(checkpoint)
    data = replace(parity.read_parity_data(str(notes)), labelled=labelled)
    asked = parity.Gate(bundles.load_checkpoint(checkpoint, 64), trained, data)

    def unsure(ids: Any, lengths: Any) -> Any:
        return trained(ids, lengths) / 20

    assert asked.hold("int8", unsure).passed
    asked.min_score = 0.5
    same, other = asked.hold("int8", trained), asked.hold("int8", unsure)
    assert same.kept == replace(same, kept=None)
    assert (other.agreement, other.passed) == (1.0, False)
    assert other.kept == parity.VariantParity(0, 0.0, 0.0 if labelled else None, same.f1, False)
    assert parity.shortfall("int8", other, asked.report.logits).startswith("100.00% of spans equal PyTorch's")
    assert "; of those that the bundle gives out, 0.00% of spans equal PyTorch's" in parity.shortfall(
        "int8", other, asked.report.logits
    )


def test_the_card_tells_what_is_given_out(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """Beside all spans, of each reduced precision."""
    said = export(ExportOptions(checkpoint, tmp_path / "b", str(notes), window=64, min_score=0.5))
    report = bundles.load(tmp_path / "b").card["parity"]["variants"]
    assert report["fp32"]["kept"] is None
    kept = report["int8"]["kept"]["spans"]
    assert f"| int8, scores from 0.5 | {kept} | 100.00% | " in (tmp_path / "b" / "README.md").read_text()
    assert said.endswith(f"; of the {kept} that it gives out, 100.00%")


def test_fp16_is_held_to_parity_as_a_gpu_runs_it(
    checkpoint: Path, notes: Path, exported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows that are padded; other precisions run as on a CPU."""
    seen: set[int] = set()
    call = Session.__call__

    def seeing(session: Session, ids: Any, lengths: Any) -> Any:
        seen.add(ids.shape[1] % 8)
        return call(session, ids, lengths)

    asked = parity.Gate(
        bundles.load_checkpoint(checkpoint, 64), TorchModel(checkpoint), parity.read_parity_data(str(notes))
    )
    session = Session(exported[0] / "onnx/model.onnx", "cpu")
    monkeypatch.setattr(Session, "__call__", seeing)
    assert asked.hold("fp32", session).passed
    assert len(seen) > 1
    seen.clear()
    assert asked.hold("fp16", session).passed
    assert seen == {0}


def test_plain_notes_are_held_to_agreement(checkpoint: Path, exported: tuple[Path, str], tmp_path: Path) -> None:
    """Without labels there is no F1: int8 passes with 98 % of spans equal and fails below."""
    rng = random.Random(9)
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": document(rng, 4).text}) + "\n" for _ in range(12)))
    plain = parity.read_parity_data(str(path))
    asked = parity.Gate(bundles.load_checkpoint(checkpoint, 64), TorchModel(checkpoint), plain)
    asked.check("fp32", exported[0] / "onnx/model.onnx")
    good = asked.check("int8", exported[0] / "onnx/model_int8.onnx")
    assert (good.f1, good.reference_f1, good.agreement, good.passed) == (None, None, 1.0, True)
    dull = shutil.copyfile(exported[0] / "onnx/model_int8.onnx", tmp_path / "dull.onnx")
    change_graph(dull, "classifier.bias", lambda bias: bias + np.array([100, 0, 0], np.float32))
    assert asked.check("int8", dull) == parity.VariantParity(0, 0.0, None, None, False)
    assert str(verify.failure("int8", asked.report)) == (
        "parity gate: the int8 variant failed on plain.jsonl and was not written: 0.00% of spans equal PyTorch's"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Options and outputs


def test_an_unknown_precision(tmp_path: Path) -> None:
    """A precision that cannot be exported, or none, is a usage error."""
    for precisions, said in ((("fp32", "fp64"), "fp64"), ((), "none")):
        with pytest.raises(UsageError) as failure:
            export(ExportOptions(tmp_path, tmp_path / "b", "notes.jsonl", precisions=precisions))
        assert str(failure.value) == f"--precision {said}: use fp32, int8, fp16"


def test_an_output_that_exists(tmp_path: Path) -> None:
    """A bundle needs --overwrite; a directory or file that is no bundle is refused even with it."""
    bundle = shutil.copytree(testing.bundle(), tmp_path / "bundle")
    with pytest.raises(OutputError) as failure:
        export(ExportOptions(tmp_path, bundle, "notes.jsonl"))
    assert str(failure.value) == f"{bundle}: holds a bundle; choose another -o, or pass --overwrite"
    (tmp_path / "file").write_text("precious")
    for other in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError) as failure:
            export(ExportOptions(tmp_path, other, "notes.jsonl", overwrite=True))
        assert str(failure.value) == f"{other}: exists and is no bundle; choose another -o"


@pytest.mark.usefixtures("no_optimum")
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_comes_there_meanwhile(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """What another program made there while the export ran is not replaced."""
    output = tmp_path / "b"
    make = medner.export._complete

    def late(*given: Any) -> None:
        make(*given)
        output.mkdir()
        (output / "thesis.txt").write_text("precious")

    monkeypatch.setattr(medner.export, "_complete", late)
    with pytest.raises(OutputError, match=r"b: exists and is no bundle; choose another -o$"):
        export(ExportOptions(checkpoint, output, str(notes), precisions=("fp32",), window=64, overwrite=overwrite))
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "thesis.txt"]


@pytest.mark.usefixtures("no_optimum")
def test_an_old_bundle_stays_where_the_new_one_cannot_take_its_place(
    checkpoint: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption between the two renames puts it back."""
    old = shutil.copytree(testing.bundle(), tmp_path / "b")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "bundle":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(ExportOptions(checkpoint, old, str(notes), precisions=("fp32",), window=64, overwrite=True))
    assert list(tmp_path.iterdir()) == [old]
    assert bundles.load(old).name == "tiny"


@pytest.mark.usefixtures("no_optimum")
def test_names_that_are_no_unicode(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """They are recorded as they can be printed."""
    data = shutil.copyfile(notes, tmp_path / os.fsdecode(b"gold\xff.jsonl"))
    export(ExportOptions(checkpoint, tmp_path / "b", str(data), precisions=("fp32",), window=64, licence="\udcff"))
    assert "on gold\\udcff.jsonl (20 documents)" in (tmp_path / "b" / "README.md").read_text()
    assert bundles.load(tmp_path / "b").card["licence"] == "\udcff"


def test_weights_that_are_no_numbers(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """They show before any work, as the checkpoint's, not as a draft's that is gone."""
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    model = transformers.AutoModelForTokenClassification.from_pretrained(broken)
    model.classifier.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(ModelError) as failure:
        export(ExportOptions(broken, tmp_path / "b", str(notes)))
    assert str(failure.value) == f"{broken}: its logits are no numbers in fp32; train it at a lower learning rate"
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.usefixtures("no_optimum")
def test_overwrite(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """--overwrite replaces a bundle as a whole."""
    old = shutil.copytree(testing.bundle(), tmp_path / "b")
    (old / "extra.txt").write_text("gone")
    export(ExportOptions(checkpoint, old, str(notes), precisions=("fp32",), window=64, overwrite=True))
    assert bundles.load(old).name == "b"
    assert not (old / "extra.txt").exists()
    assert list(tmp_path.iterdir()) == [old]


def test_an_output_that_cannot_be_written(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """A parent that is a file is an output error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as failure:
        export(ExportOptions(checkpoint, tmp_path / "file" / "b", str(notes)))
    assert str(failure.value) == f"{tmp_path / 'file' / 'b'}: cannot be written (File exists)"


@pytest.mark.parametrize(
    ("missing", "step"),
    [
        ("config.json", "a model directory holds config.json, tokenizer.json and the model"),
        (
            "tokenizer.json",  # vocab.txt is there
            "save there the tokenizer that the model was trained with, by tokenizer.save_pretrained of transformers",
        ),
    ],
)
def test_a_checkpoint_that_lacks_a_file(checkpoint: Path, notes: Path, tmp_path: Path, missing: str, step: str) -> None:
    """A checkpoint without settings or fast tokenizer is refused before anything is written."""
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / missing).unlink()
    with pytest.raises(ModelError) as failure:
        export(ExportOptions(broken, tmp_path / "b", str(notes)))
    assert str(failure.value) == f"{broken}: no {missing}; {step}"
    assert list(tmp_path.iterdir()) == [broken]


def test_a_checkpoint_that_is_absent_or_has_no_weights(checkpoint: Path, notes: Path, tmp_path: Path) -> None:
    """A missing directory is named; so are weights that transformers would fill with random numbers."""
    with pytest.raises(ModelError) as failure:
        export(ExportOptions(tmp_path / "none", tmp_path / "b", str(notes)))
    assert str(failure.value) == f"{tmp_path / 'none'}: no such checkpoint directory"
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ModelError) as failure:
        export(ExportOptions(broken, tmp_path / "b", str(notes)))
    assert str(failure.value) == (
        f"{broken}: has no weights for bert.embeddings.LayerNorm.bias, bert.embeddings.LayerNorm.weight, "
        "bert.embeddings.position_embeddings.weight, bert.embeddings.token_type_embeddings.weight; fine-tune it first"
    )
    assert list(tmp_path.iterdir()) == [broken]


def test_what_optimum_cannot_export(checkpoint: Path, tmp_path: Path) -> None:
    """An architecture that is unknown to it is a model error with the reason."""
    strange = shutil.copytree(checkpoint, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "strange"}
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as failure:
        convert.to_onnx(strange, tmp_path / "model.onnx")
    assert str(failure.value).startswith(f"{strange}: Optimum cannot export it (ValueError: ")
    assert not (tmp_path / "model.onnx").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Parity data


PUBTATOR = "1|t|Asthma in adults .\n1|a|No fever .\n1\t0\t6\tAsthma\tDisease\tD1\n"


def test_labelled_parity_data(tmp_path: Path) -> None:
    """CoNLL, PubTator and JSONL with spans are labelled."""
    (tmp_path / "a.tsv").write_text("Asthma\tB-Disease\n.\tO\n")
    (tmp_path / "b.txt").write_text(PUBTATOR)
    jsonl(tmp_path / "c.jsonl", [Document("", "asthma", ((0, 6, "Disease"),))])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    expected = {
        "a.tsv": "Asthma .",
        "b.txt": "Asthma in adults . No fever .",
        "c.jsonl": "asthma",
        "d.jsonl.gz": "asthma",
    }
    for name, text in expected.items():
        data = parity.read_parity_data(str(tmp_path / name))
        (only,) = data.documents
        assert (data.name, data.labelled, only.text, only.spans) == (name, True, text, ((0, 6, "Disease"),))


def test_a_directory_of_splits(tmp_path: Path) -> None:
    """Of a data set the split asked for is read, and its labels renamed."""
    (tmp_path / "devel.tsv").write_text("Asthma\tB-Disease\n")
    (tmp_path / "test.tsv").write_text("Fever\tB-Disease\n")
    assert [d.text for d in parity.read_parity_data(str(tmp_path)).documents] == ["Asthma"]
    (other,) = parity.read_parity_data(str(tmp_path), "test", labels={"*": "Problem"}).documents
    assert (other.text, other.spans) == ("Fever", ((0, 5, "Problem"),))


def test_plain_parity_data(tmp_path: Path) -> None:
    """JSONL without spans, CSV and Parquet are plain notes; empty and rejected ones are left out."""
    (tmp_path / "a.jsonl").write_text('\n{"text": "has asthma"}\n{"text": ""}\n{"text": 3}\n{"text": "no fever"}\n')
    # Read as CoNLL this would be a labelled sentence.
    (tmp_path / "b.csv").write_text("id, x,text\n1, y,has asthma\n2, z,no fever\n")
    pq.write_table(pa.table({"text": ["has asthma", None, "no fever"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.jsonl.gz"):
        data = parity.read_parity_data(str(tmp_path / name))
        assert (data.name, data.labelled, [d.text for d in data.documents]) == (name, False, ["has asthma", "no fever"])
    with pytest.raises(InputError, match=r"a\.jsonl: read as notes without labels, of which --label renames none"):
        parity.read_parity_data(str(tmp_path / "a.jsonl"), labels={"*": "Problem"})


def test_unusable_parity_data(tmp_path: Path) -> None:
    """A missing file, one without notes, one without the column, and a broken label are errors that name the place."""
    for name, content in (
        ("empty.csv", "text\n"),
        ("other.csv", "note\nhas asthma\n"),
        ("broken.jsonl", '{"text": "asthma", "spans": []}\n{"text": "asthma", "spans": [[0, 9, "Disease"]]}\n'),
    ):
        (tmp_path / name).write_text(content)
    said = []
    for name in ("none.tsv", "empty.csv", "other.csv", "broken.jsonl"):
        with pytest.raises(InputError) as failure:
            parity.read_parity_data(str(tmp_path / name))
        said.append(str(failure.value))
    assert said == [
        f"{tmp_path}/none.tsv: no such file or directory",
        f"{tmp_path}/empty.csv: holds no notes; the parity gate needs real text",
        f"{tmp_path}/other.csv has no column 'text'; name another with --text-column "
        "(or has it another delimiter or encoding?)",
        f"{tmp_path}/broken.jsonl:2: span 0:9 lies outside the text of 6 code points",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The window


class Fake:
    """Finds every fever; in a batch wider than ``limit`` tokens it overlooks every asthma."""

    def __init__(self, limit: int) -> None:
        tokenizer = Tokenizer.from_file(str(testing.bundle() / "tokenizer.json"))
        self._fever, self._asthma = tokenizer.token_to_id("fever"), tokenizer.token_to_id("asthma")
        self._limit = limit

    def __call__(self, ids: Any, _: Any) -> Any:
        """Logits of O, B and I."""
        logits = np.zeros((*ids.shape, 3), np.float32)
        logits[..., 0] = 1
        logits[ids == self._fever, 1] = 2
        if ids.shape[1] <= self._limit:
            logits[ids == self._asthma, 1] = 2
        return logits


def fevers(sentences: int, asthmas: int) -> Document:
    """Sentences of four tokens with a fever each, in the first ones an asthma instead."""
    words = ["asthma" if i < asthmas else "fever " for i in range(sentences)]
    text = "".join(f"a {word} a . " for word in words)
    spans = tuple((13 * i + 2, 13 * i + 2 + len(w.strip()), "Disease") for i, w in enumerate(words))
    assert all(text[s:e] in ("asthma", "fever") for s, e, _ in spans)
    return Document("long", text.rstrip(), spans)


def data(*documents: Document) -> parity.ParityData:
    """Labelled data."""
    return parity.ParityData("devel.txt", list(documents), True)


def f1(gold: int, missed: int) -> float:
    """F1 without a false positive."""
    return 2 * (gold - missed) / (2 * gold - missed)


def test_the_best_window_is_chosen() -> None:
    """A model that loses mentions in windows of more than 100 tokens gets the longest below; every F1 is reported."""
    # 400 tokens: the windows of 128 and more overlook the 20 asthmas at the start.
    chosen, tried = verify.choose_window(bundles.load("tiny"), Fake(100), data(fevers(100, 20)))
    assert (chosen.window, chosen.packed) == (96, True)
    packed = {str(w): f1(100, 20) for w in (128, 192, 256, 384, 512)}
    assert tried == dict.fromkeys(("one segment", "64", "96"), 1.0) | packed


def test_one_segment_a_window_may_be_best() -> None:
    """A model that loses mentions in any packed window gets windows of one segment, of its own length."""
    chosen, tried = verify.choose_window(bundles.load("tiny"), Fake(40), data(fevers(100, 20)))
    assert (chosen.window, chosen.packed) == (32, False)
    assert (tried["one segment"], tried["64"]) == (1.0, f1(100, 20))


@pytest.mark.parametrize(("missed", "expected"), [(1, 512), (2, 96)])
def test_the_longest_window_within_tolerance(missed: int, expected: int) -> None:
    """A longer window may lose 0.002 of F1, not more."""
    chosen, tried = verify.choose_window(
        bundles.load("tiny"), Fake(100), data(*[fevers(120, 0)] * 3, fevers(120, missed))
    )
    assert tried["512"] == f1(480, missed)
    assert chosen.window == expected


def test_long_windows_of_one_segment_win_over_short_packed_ones(tmp_path: Path) -> None:
    """They cut fewer sentences; packed ones of their own length, as good, are taken instead."""
    whole = fevers(100, 20)
    tiny, documents = limited(tmp_path / "a", 130), data(replace(whole, text=whole.text.replace(" . ", ".\n\n")))
    chosen, tried = verify.choose_window(tiny, Fake(70), documents)
    assert tried["one segment"] == tried["64"] > tried["96"]
    assert (chosen.window, chosen.packed) == (128, False)
    chosen, _ = verify.choose_window(tiny, Fake(512), documents)
    assert (chosen.window, chosen.packed) == (128, True)


def test_windows_that_cannot_be_told_apart_are_not_tried() -> None:
    """The first window that holds every document whole is the last one tried."""
    _, tried = verify.choose_window(bundles.load("tiny"), Fake(512), data(fevers(30, 0), fevers(2, 0)))
    assert list(tried) == ["one segment", "64", "96", "128"]


def limited(path: Path, limit: int) -> bundles.Bundle:
    """The tiny bundle for a model of so many positions, as a foreign model."""
    shutil.copytree(testing.bundle(), path)
    (path / "medner.json").unlink()
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": limit}
    (path / "config.json").write_text(json.dumps(config))
    return bundles.load(path)


def test_windows_beyond_the_limit_are_skipped(tmp_path: Path) -> None:
    """A model of 130 positions is tried up to 128 tokens, one of 60 with one segment a window alone."""
    documents = data(fevers(100, 0))
    chosen, tried = verify.choose_window(limited(tmp_path / "a", 130), Fake(512), documents)
    assert (chosen.window, list(tried)) == (128, ["one segment", "64", "96", "128"])
    chosen, tried = verify.choose_window(limited(tmp_path / "b", 60), Fake(512), documents)
    assert (chosen.window, chosen.packed, list(tried)) == (60, False, ["one segment"])


def test_a_few_long_sentences_are_no_documents() -> None:
    """One that is longer than a window, or cut in two, changes nothing; empty ones do not count."""
    sentences = [Document(str(i), "a fever", ((2, 7, "Disease"),)) for i in range(9)]
    two = Document("two", "A fever. A cough.", ((2, 7, "Disease"),))
    for other in (two, fevers(100, 0)):
        with pytest.raises(InputError, match=r"devel\.txt holds single sentences"):
            verify.choose_window(bundles.load("tiny"), Fake(512), data(*sentences, other))
    empty = [Document(str(i), "", ()) for i in range(20)]
    whole = [fevers(30, 0), fevers(30, 0)]
    _, tried = verify.choose_window(bundles.load("tiny"), Fake(512), data(*empty, *whole))
    assert list(tried) == ["one segment", "64", "96", "128"]
    _, tried = verify.choose_window(bundles.load("tiny"), Fake(512), data(*sentences, *[two] * 9))
    assert list(tried) == ["one segment", "64"]


def test_the_window_needs_labelled_documents() -> None:
    """Neither plain notes nor single sentences can choose a window, nor labels of which the model finds none."""
    with pytest.raises(InputError) as failure:
        verify.choose_window(
            bundles.load("tiny"), Fake(512), data(Document("0", "A fever. A cough.", ((0, 1, "Disease"),)))
        )
    assert str(failure.value) == (
        "--window auto: the model finds no labelled mention of devel.txt, which tells no windows apart; "
        "look at its labels, or pass --window N"
    )
    plain = parity.ParityData("notes.csv", [Document("0", "fever", ())], False)
    with pytest.raises(InputError) as failure:
        verify.choose_window(bundles.load("tiny"), Fake(512), plain)
    assert str(failure.value) == "--window auto needs labelled documents; notes.csv holds none: pass --window N"
    tagged = Document("0", "fever", ((0, 5, "Disease"),), ((0, 5),))
    for sentence in (tagged, replace(tagged, tokens=None)):
        with pytest.raises(InputError) as failure:
            verify.choose_window(bundles.load("tiny"), Fake(512), data(sentence))
        said = "--window auto needs whole documents; devel.txt holds single sentences, which fit any window: pass"
        assert str(failure.value) == f"{said} --window N"


class Unsure:
    """Marks every fever, with 0.67, and every asthma, with 0.47."""

    def __call__(self, ids: Any, _: Any) -> Any:
        """Logits of O, B and I."""
        tokenizer = Tokenizer.from_file(str(testing.bundle() / "tokenizer.json"))
        logits = np.zeros((*ids.shape, 3), np.float32)
        logits[..., 0] = 1
        logits[ids == tokenizer.token_to_id("fever"), 1] = 2
        logits[ids == tokenizer.token_to_id("asthma"), 1] = 1.2
        return logits


def test_the_best_score_is_chosen() -> None:
    """Of equal ones the lowest: what is not labelled is left out, and no more; nothing where all is right."""
    right = fevers(6, 2)
    wrong = replace(right, spans=right.spans[2:])
    least, tried = verify.choose_min_score(bundles.load("tiny"), Unsure(), data(wrong))
    assert least == 0.5
    expected = [(0, 0.8), (0.45, 0.8), (0.5, 1.0), (0.65, 1.0), (0.7, 0.0), (0.95, 0.0)]
    assert [(float(name), tried[name]) for name in ("0", "0.45", "0.5", "0.65", "0.7", "0.95")] == expected
    # A bundle that leaves some out already has no say.
    strict = replace(bundles.load("tiny"), min_score=0.9)
    assert verify.choose_min_score(strict, Unsure(), data(wrong)) == (least, tried)
    assert verify.choose_min_score(bundles.load("tiny"), Unsure(), data(right))[0] == 0


def test_a_score_needs_labels() -> None:
    """Plain notes cannot choose one."""
    plain = parity.ParityData("notes.csv", [Document("0", "fever", ())], False)
    with pytest.raises(InputError) as failure:
        verify.choose_min_score(bundles.load("tiny"), Unsure(), plain)
    assert str(failure.value) == "--min-score auto needs labelled text; notes.csv has no labels: pass --min-score P"
