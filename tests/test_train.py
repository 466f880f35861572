"""Fine-tuning: words and labels as in inference, the best epoch on devel kept, resumable, its figures beside it."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("seqeval")
safetensors_torch = pytest.importorskip("safetensors.torch")

from safetensors import SafetensorError  # noqa: E402

from medner import pytorch  # noqa: E402
from medner import train as training  # noqa: E402
from medner.datasets import Document, entities, load  # noqa: E402
from medner.errors import InputError, ModelError, OutputError, UsageError  # noqa: E402
from medner.score import evaluate, tags_of  # noqa: E402
from medner.train import IGNORED, TrainOptions, class_weights, encode, inspect, resolve_precision, train  # noqa: E402
from medner.windows import WordTokenizer  # noqa: E402

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] the patient has no gout ##y x - linked ' s pain knee ankle left right . , ( )"
TAGS = ["O", "B-Problem", "I-Problem", "B-Site", "I-Site"]


def sentence(rng: random.Random) -> str:
    """A sentence of two entity types in CoNLL lines; one token holds punctuation."""
    site = rng.choice(["knee\tB-Site", "left\tB-Site\nankle\tI-Site", "right\tB-Site\nknee\tI-Site"])
    problem = rng.choice(
        ["gouty\tB-Problem\npain\tI-Problem", "x-linked\tB-Problem\npain\tI-Problem", "gout\tB-Problem"]
    )
    negation = rng.choice(["no\tO\n", ""])
    return f"the\tO\npatient\tO\nhas\tO\n{negation}{site}\n{problem}\n.\tO\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CoNLL directory with 48 training and 12 devel sentences, and no test file."""
    path = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for split, count in (("train", 48), ("devel", 12)):
        (path / f"{split}.tsv").write_text("\n".join(sentence(rng) for _ in range(count)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers and 32 dimensions with random weights, and its WordPiece tokenizer."""
    path = tmp_path_factory.mktemp("base")
    (path / "vocab.txt").write_text("\n".join(PIECES.split()))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(path / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(path)
    transformers.set_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(PIECES.split()), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertForTokenClassification(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(base: Path) -> WordTokenizer:
    """The words and tokens of the tiny model."""
    return WordTokenizer((base / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def options(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """Two epochs on the small data set, long enough to learn it in part."""
    output = tmp_path_factory.mktemp("out") / "model"
    return TrainOptions(
        (str(data),), str(base), output, epochs=2, lr=5e-3, batch_size=4, window=32, precision="fp32", warmup_ratio=0.0
    )


@pytest.fixture(scope="module")
def result(options: TrainOptions) -> training.TrainResult:
    """One whole training."""
    return train(options)


def weights_of(path: Path) -> dict[str, Any]:
    """The weights of a checkpoint by name."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(path)
    return dict(model.state_dict())


def test_a_label_stands_on_the_first_sub_token_of_each_word(encoder: WordTokenizer) -> None:
    """Worked by hand: in "x-linked" each of the words x, -, linked is labelled; of gout ##y only gout is."""
    text = "no x-linked gouty pain"
    encoded = encode([Document("a", text, ((3, 17, "Problem"),))], encoder, TAGS, 32)
    vocabulary = PIECES.split()
    (item,) = encoded.inputs
    assert " ".join(vocabulary[i] for i in item["input_ids"]) == "[CLS] no x - linked gout ##y pain [SEP]"
    assert item["labels"] == [-100, 0, 1, 2, 2, 2, -100, 0, -100]
    assert [text[a:b] for a, b in encoded.words[0].tolist()] == ["no", "x", "-", "linked", "gouty", "pain"]


def test_spans_that_touch_and_spans_inside_a_word(encoder: WordTokenizer) -> None:
    """A word that a span only touches belongs to it; spans that follow each other each begin with B-."""
    spans = ((0, 4, "Site"), (5, 7, "Problem"), (8, 10, "Problem"))
    encoded = encode([Document("a", "knee gouty pain", spans)], encoder, TAGS, 32)
    # Two spans share the word "gouty": the earlier one has it.
    assert encoded.inputs[0]["labels"] == [-100, 3, 1, -100, 0, -100]


def test_a_mention_that_crosses_a_segments_end(encoder: WordTokenizer) -> None:
    """It is labelled, and found again, as two: no mention that annotation finds crosses a segment's end."""
    encoded = encode([Document("a", "gouty pain. knee pain", ((0, 16, "Problem"),))], encoder, TAGS, 32)
    assert [bounds.tolist() for bounds in encoded.segments] == [[0, 3, 5]]
    labels = encoded.inputs[0]["labels"]
    assert labels == [-100, 1, -100, 2, 2, 1, 0, -100]
    joined = np.array([2 if label == 1 else label for label in labels])
    assert training._decode(encoded, [joined], TAGS) == [[(0, 11, "Problem"), (11 + 1, 16, "Problem")]]


@pytest.mark.parametrize("window", [8, 11, 64])
def test_every_word_is_labelled_once_whatever_the_window(encoder: WordTokenizer, window: int) -> None:
    """A long sentence is cut with overlap; its words keep one label each, and the labels give the spans back."""
    text = "the patient has gouty pain " * 5 + ". no pain ."
    spans = tuple((16 + 27 * i, 26 + 27 * i, "Problem") for i in range(5))
    documents = [Document("a", text, spans), Document("b", "", ()), Document("c", " ", ()), Document("d", text, spans)]
    encoded = encode(documents, encoder, TAGS, window)
    assert max(len(item["input_ids"]) for item in encoded.inputs) <= window
    assert (len(encoded.inputs) > 2) == (window < 64)
    for number, document in enumerate(documents):
        items = [item for owner, item in zip(encoded.owner, encoded.inputs, strict=True) if owner == number]
        marks = [mark for item in items for mark in item["labels"] if mark != IGNORED]
        words = encoded.words[number].tolist()
        assert len(marks) == len(words)
        found = [(words[a][0], words[b - 1][1], label) for a, b, label in entities([TAGS[mark] for mark in marks])]
        assert tuple(found) == document.spans


def test_class_weights_are_balanced(encoder: WordTokenizer) -> None:
    """Words / (classes * words of the class), by hand: 4 words, 5 classes; absent classes weigh nothing."""
    encoded = encode([Document("a", "knee has gouty pain", ((10, 20, "Problem"),))], encoder, TAGS, 32)
    expected = pytest.approx([4 / (5 * 2), 4 / 5, 4 / 5, 0, 0])
    assert class_weights(encoded, 5).tolist() == expected
    # Text without labels says nothing of how often a class occurs.
    unlabelled = Document("b", "no gout. the patient has pain.", ())
    both = encode([*encoded.documents, unlabelled], encoder, TAGS, 32)
    assert class_weights(both, 5, [0.5, 0.0]).tolist() == expected


def test_the_checkpoint_loads_and_knows_its_labels(result: training.TrainResult) -> None:
    """The output is a checkpoint as transformers writes it, with names for its classes and a fast tokenizer."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(result.output)
    assert [model.config.id2label[i] for i in range(5)] == TAGS
    assert model.config.label2id == {tag: i for i, tag in enumerate(TAGS)}
    assert transformers.AutoTokenizer.from_pretrained(result.output).is_fast
    assert (result.output / "tokenizer.json").is_file()


def test_devel_scores_are_those_of_the_saved_weights(result: training.TrainResult, data: Path) -> None:
    """Run anew with transformers alone, token by token as its own recipe does, the checkpoint scores the same."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.output)
    model = transformers.AutoModelForTokenClassification.from_pretrained(result.output).eval()
    documents = load(str(data), "devel")
    found = []
    for document in documents:
        assert document.tokens is not None
        words = [document.text[a:b] for a, b in document.tokens]
        encoding = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            classes = model(**encoding).logits[0].argmax(-1).tolist()
        tags = [TAGS[classes[encoding.word_to_tokens(0, i).start]] for i in range(len(words))]
        spans = entities(tags)
        found.append([(document.tokens[a][0], document.tokens[b - 1][1], label) for a, b, label in spans])
        assert tags_of(document, found[-1]).count("O") == tags.count("O")
    overall = evaluate(documents, found).overall
    assert (overall.precision, overall.recall, overall.f1) == pytest.approx(
        (result.best.precision, result.best.recall, result.best.f1)
    )


def test_figures_are_written_beside_the_checkpoint(result: training.TrainResult, options: TrainOptions) -> None:
    """metrics.json names options, versions, counts, epochs, the untrained baseline and samples; the curve is a PNG."""
    metrics = json.loads((result.output / "metrics.json").read_text())
    assert metrics["options"]["lr"] == options.lr
    assert metrics["window"] == 32
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["data"]["train"]["documents"] == metrics["data"]["train"]["windows"] == 48
    devel = metrics["data"]["devel"]
    assert (devel["documents"], devel["spans"], devel["windows"]) == (12, 24, 12)
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    assert metrics["epochs"][1]["training_loss"] < metrics["epochs"][0]["training_loss"]
    assert metrics["best"]["f1"] == max(epoch["f1"] for epoch in metrics["epochs"]) > metrics["untrained"]["f1"]
    assert [sample["text"] for sample in metrics["samples"]] == list(training.SAMPLES)
    # Two epochs of 48 windows; the whole call takes longer than the training.
    assert 2 * 48 / metrics["windows_per_second"] <= metrics["seconds"] + 0.1
    assert (result.output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(result.output.glob("*.tmp"))
    assert str(result).splitlines()[-1].startswith(f"{result.output}: checkpoint, metrics.json, learning_curve.png")


def test_a_resumed_training_ends_as_one_that_was_not_cut_off(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its first epoch and resumed, a seed gives the same weights and figures; a third call too."""
    cut = replace(options, output=tmp_path / "cut", resume=True)

    def interrupt(self: object, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.epoch >= 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._EpochLines, "on_epoch_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    (checkpoint,) = (cut.output / "checkpoints").glob("checkpoint-*")
    # A checkpoint whose writing was cut off has no state yet, and is passed over.
    (checkpoint.parent / "checkpoint-24").mkdir()
    begun: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            training._EpochLines, "on_epoch_begin", lambda *args, **_: begun.append(args[2].epoch), raising=False
        )
        resumed = train(cut)
    assert begun == [1]
    assert resumed.epochs == result.epochs
    assert resumed.best == result.best
    expected, found = weights_of(result.output), weights_of(cut.output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    again = train(cut)
    assert (again.epochs, again.best, again.samples) == (resumed.epochs, resumed.best, resumed.samples)
    found = weights_of(cut.output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_training_that_was_moved(options: TrainOptions, tmp_path: Path) -> None:
    """It ends with the weights of its best epoch, an earlier one here; and nothing is trained twice."""
    given = replace(options, output=tmp_path / "begun", epochs=4, lr=5e-2, resume=True)
    first = train(given)
    assert first.best.epoch < 4
    expected = weights_of(first.output)
    begun = [path.name for path in (first.output / "checkpoints").iterdir()]
    moved = replace(given, output=first.output.rename(tmp_path / "moved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._EpochLines, "on_epoch_begin", lambda *_, **__: pytest.fail("trained again"))
        assert train(moved).best == first.best
        found = weights_of(moved.output)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert [path.name for path in (moved.output / "checkpoints").iterdir()] == begun
        best = moved.output / "checkpoints" / f"checkpoint-{first.best.epoch * 12}"
        shutil.rmtree(best)
        with pytest.raises(OutputError) as error:
            train(moved)
    assert str(error.value) == f"{best}: the best epoch's weights are gone; restore them, or name a new directory"


def test_a_training_that_was_copied_without_its_times(options: TrainOptions, tmp_path: Path) -> None:
    """The mean is over the last epochs, whatever the times of their files say."""
    given = replace(options, output=tmp_path / "out", epochs=5, average=2, resume=True)

    def interrupt(self: object, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.epoch >= 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._EpochLines, "on_epoch_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(given)
    for time, path in enumerate(sorted((given.output / "checkpoints").glob("checkpoint-*"), reverse=True)):
        os.utime(path, (10**9 + 100 * time, 10**9 + 100 * time))
    train(given)
    names = {path.name for path in (given.output / "checkpoints").glob("checkpoint-*")}
    assert {"checkpoint-48", "checkpoint-60"} <= names


def test_another_training_is_not_overwritten(result: training.TrainResult, options: TrainOptions) -> None:
    """A directory that is in use is refused; resuming with other options names the first that differs."""
    with pytest.raises(OutputError) as error:
        train(options)
    assert str(error.value) == (f"{options.output}: is not empty; resume the training in it or name a new directory")
    with pytest.raises(OutputError) as error:
        train(replace(options, resume=True, lr=1e-3))
    assert str(error.value) == (
        f"{options.output}: lr was 0.005 and is now 0.001; resume with what it began with, or name a new directory"
    )
    with pytest.raises(OutputError, match="holds no training to resume"):
        train(replace(options, resume=True, output=Path(options.data[0])))


def test_a_training_is_resumed_on_its_own_data(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path
) -> None:
    """Data that changed under its name is another training."""
    data = Path(shutil.copytree(options.data[0], tmp_path / "data"))
    first = replace(options, data=(str(data),), output=tmp_path / "out", epochs=1, max_documents=8)
    train(first)
    figures = (first.output / "metrics.json").read_bytes()
    other_name = first.output.parent / ".." / tmp_path.name / "out"
    assert train(replace(first, resume=True, output=other_name)).epochs
    assert (first.output / "metrics.json").read_bytes() == figures  # with the time of what was trained
    for path in data.glob("devel*"):
        path.write_text(path.read_text().replace("B-Problem", "B-Site"))
    with pytest.raises(OutputError, match=r": sha256 of devel was \w{64} and is now \w{64}; resume with"):
        train(replace(first, resume=True))


def test_a_training_is_resumed_with_its_own_teachers(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path
) -> None:
    """A teacher whose weights changed under its name makes another training."""
    teacher = shutil.copytree(result.output, tmp_path / "teacher", ignore=shutil.ignore_patterns("checkpoints"))
    first = replace(options, teachers=(str(teacher),), output=tmp_path / "out", epochs=1, max_documents=8)
    train(first)
    assert train(replace(first, resume=True)).epochs
    shutil.copy(Path(options.base) / "model.safetensors", teacher)
    with pytest.raises(OutputError, match=rf": sha256 of {teacher} was \w{{64}} and is now \w{{64}}; resume with"):
        train(replace(first, resume=True))


def test_a_training_is_resumed_from_its_own_base(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path
) -> None:
    """A base that changed under its name makes another training."""
    base = shutil.copytree(options.base, tmp_path / "base")
    first = replace(options, base=str(base), output=tmp_path / "out", epochs=1, max_documents=8)
    train(first)
    shutil.copy(result.output / "model.safetensors", base)
    with pytest.raises(OutputError, match=r": sha256 of the base was \w{64} and is now \w{64}; resume with"):
        train(replace(first, resume=True))


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    """JSON has none; they are null."""
    training._write_json(tmp_path / "metrics.json", {"loss": float("nan"), "f1": 0.5, "text": "NaN"})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": None, "f1": 0.5, "text": "NaN"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_training_that_diverges(options: TrainOptions, tmp_path: Path) -> None:
    """Weights that are no numbers are no checkpoint."""
    given = replace(options, lr=1e30, output=tmp_path / "out")
    with pytest.raises(UsageError) as error:
        train(given)
    assert str(error.value) == (
        "lr 1e+30: the training diverged, its weights are no numbers; use a lower learning rate"
    )
    assert not (given.output / "metrics.json").exists()


def test_a_base_whose_labels_have_other_numbers(options: TrainOptions, base: Path, tmp_path: Path) -> None:
    """They are the data's from now on, whatever they were."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    config_of(other, id2label={"1": "A", "2": "B"}, label2id={"A": 1, "B": 2})
    assert training._load_model(str(other), TAGS, training.load_tokenizer(str(other))).config.id2label[4] == "I-Site"


def test_a_base_that_gives_more_than_logits(options: TrainOptions, base: Path, tmp_path: Path) -> None:
    """What its settings ask for beside them does not reach the scores."""
    other = shutil.copytree(base, tmp_path / "base")
    config = json.loads((other / "config.json").read_text()) | {"output_hidden_states": True, "output_attentions": True}
    (other / "config.json").write_text(json.dumps(config))
    assert train(replace(options, base=str(other), output=tmp_path / "out", epochs=1, max_documents=8)).epochs


def test_gold_whose_edges_lie_inside_words(encoder: WordTokenizer) -> None:
    """It is scored in training as it is taught: as the words that it lies in."""
    documents = [Document("a", "the gouty pain. knee pain", ((5, 14, "Problem"), (16, 20, "Site")))]
    encoded = encode(documents, encoder, TAGS, 64)
    taught = [np.array(item["labels"]) for item in encoded.inputs]
    assert training._strict(encoded, taught, TAGS) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}


def test_one_file_is_no_data_to_train_on(options: TrainOptions, tmp_path: Path) -> None:
    """It would be scored on what was learnt; nothing is written."""
    (file,) = Path(options.data[0]).glob("train*")
    with pytest.raises(InputError, match="one file would be learnt from and scored on alike"):
        train(replace(options, data=(options.data[0], str(file)), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_class_weights_change_the_training(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With class weights the loss is another one; they are recorded, and standard output stays empty."""
    weighted = train(replace(options, output=tmp_path / "weighted", epochs=1, class_weights=True, max_documents=16))
    metrics = json.loads((weighted.output / "metrics.json").read_text())
    assert metrics["data"]["train"]["documents"] == 16
    assert list(metrics["class_weights"]) == TAGS
    assert metrics["class_weights"]["O"] < min(metrics["class_weights"][tag] for tag in TAGS[1:4])
    output = capsys.readouterr()
    assert output.out == ""
    assert "epoch 1: training loss" in output.err


def loss_of(logits: Any, inputs: dict[str, Any], **options: Any) -> float:
    """The trainer's loss for logits that a model gives."""
    trainer = object.__new__(training._Trainer)
    trainer._weights, trainer._smoothing = options.get("weights"), options.get("smoothing", 0.0)
    model = torch.nn.Linear(1, 1).train(options.get("training", True))
    model.forward = lambda **_: transformers.modeling_outputs.TokenClassifierOutput(logits=logits)
    return float(trainer.compute_loss(model, inputs))


def test_the_weighted_loss_is_that_of_torch() -> None:
    """Hand-worked: two labelled tokens of weights 1 and 3 with losses a and b give (a + 3 b) / 4."""
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [9.0, 9.0]]])
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[0, 1, IGNORED]])}
    first, second = np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0))
    assert loss_of(logits, inputs, weights=torch.tensor([1.0, 3.0])) == pytest.approx((first + 3 * second) / 4)


def test_the_smoothed_loss() -> None:
    """Hand-worked: a tenth of a label's probability goes to both classes alike; devel is scored without."""
    logits, labels = torch.tensor([[[2.0, 0.0], [9.0, 9.0]]]), torch.tensor([[0, IGNORED]])
    inputs = {"input_ids": torch.tensor([[5, 6]]), "labels": labels}
    right, wrong = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    assert loss_of(logits, inputs, smoothing=0.1) == pytest.approx(0.95 * right + 0.05 * wrong)
    assert loss_of(logits, inputs, smoothing=0.1, training=False) == pytest.approx(right)


def test_the_loss_with_teachers() -> None:
    """Hand-worked: a labelled window's loss is shared with the teachers' probabilities, an unlabelled one is theirs."""
    logits = torch.tensor([[[2.0, 0.0], [5.0, 5.0]], [[0.0, 1.0], [5.0, 5.0]]])
    inputs = {
        "input_ids": torch.tensor([[5, 6], [5, 6]]),
        "labels": torch.tensor([[0, IGNORED], [0, IGNORED]]),
        "hard": torch.tensor([0.75, 0.0]),
        "soft": torch.tensor([[[0.5, 0.5], [0.0, 0.0]], [[0.25, 0.75], [0.0, 0.0]]]),
    }
    right, wrong = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    first = 0.75 * right + 0.25 * (right + wrong) / 2
    second = 0.25 * np.log1p(np.exp(1.0)) + 0.75 * np.log1p(np.exp(-1.0))
    assert loss_of(logits, inputs) == pytest.approx((first + second) / 2)


def test_learning_rates_by_layer(base: Path) -> None:
    """The head has the whole rate, each layer half of that above it; weight decay is for matrices alone."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(base)
    named = dict(model.named_parameters())
    decayed = {name for name in named if name.endswith("weight") and "LayerNorm" not in name}
    groups = training.layer_groups(named.items(), decayed, 1.0, 0.5, 0.01)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rates) == len(named)
    for name, expected in {
        "classifier.weight": (1.0, 0.01),
        "classifier.bias": (1.0, 0.0),
        "bert.encoder.layer.1.output.dense.weight": (0.5, 0.01),
        "bert.encoder.layer.0.output.LayerNorm.weight": (0.25, 0.0),
        "bert.embeddings.word_embeddings.weight": (0.125, 0.01),
    }.items():
        assert rates[id(named[name])] == expected, name


@pytest.mark.parametrize(
    ("names", "rates"),
    [
        (["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln.bias", "head.bias"], [1, 1, 2, 4]),
        (["transformer.shared.weight", "transformer.encoder.block.0.layer.0.k.weight", "head.bias"], [1, 2, 4]),
        (
            ["model.word_embedding.weight", "model.layer.0.seg_embed", "model.layer.1.seg_embed", "head.bias"],
            [1, 2, 4, 8],
        ),
    ],
)
def test_layers_of_other_architectures(names: list[str], rates: list[int]) -> None:
    """GPT-2, T5 and XLNet: embeddings stand below the first layer, unless a layer has them of its own."""
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    groups = training.layer_groups(parameters.items(), set(), 8.0, 0.5, 0.01)
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert [found[id(parameter)] for parameter in parameters.values()] == [8 * rate / max(rates) for rate in rates]


def test_layers_that_are_not_told() -> None:
    """Where no name holds a layer's number, all would learn alike."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UsageError) as error:
        training.layer_groups([("transformer.attentions.0.q_lin.weight", parameter)], set(), 1.0, 0.9, 0.01)
    assert str(error.value) == "layer_decay 0.9: the model's parameters do not tell their layers; leave it out"


def test_options_that_change_the_training(result: training.TrainResult, options: TrainOptions, tmp_path: Path) -> None:
    """Each changes what is learnt, is recorded, and the training still learns."""
    weights = weights_of(result.output)
    for name, value in {
        "layer_decay": 0.9,
        "label_smoothing": 0.1,
        "weight_decay": 0.5,
        "warmup_ratio": 0.3,
        "batch_size": 6,
        "seed": 14,
    }.items():
        changed = train(replace(options, output=tmp_path / name, **{name: value}))
        metrics = json.loads((changed.output / "metrics.json").read_text())
        assert metrics["options"][name] == value
        assert metrics["averaged"] is None
        assert changed.best.f1 > changed.untrained["f1"]
        assert any(not torch.equal(value, weights[key]) for key, value in weights_of(changed.output).items()), name


def test_the_mean_of_the_last_epochs(options: TrainOptions, tmp_path: Path) -> None:
    """It is scored on devel and recorded; what is saved is it or the best epoch, whichever is better."""
    chosen = set()
    for lr in (5e-3, 2e-2):
        found = train(replace(options, output=tmp_path / str(lr), epochs=4, lr=lr, average=3))
        assert found.averaged is not None
        metrics = json.loads((found.output / "metrics.json").read_text())
        assert metrics["averaged"] == found.averaged
        assert f"mean of the last epochs' weights: devel F1 {found.averaged['f1']:.4f}" in str(found)
        saved = {int(path.name.split("-")[1]): path for path in (found.output / "checkpoints").glob("checkpoint-*")}
        steps = 48 // options.batch_size
        mean = training.mean_weights([saved[steps * epoch] for epoch in (2, 3, 4)])
        name = "classifier.weight"
        assert torch.equal(mean[name], torch.stack([weights_of(saved[steps * n])[name] for n in (2, 3, 4)]).mean(dim=0))
        better = found.averaged["f1"] > found.best.f1
        chosen.add(better)
        expected = mean if better else weights_of(saved[steps * found.best.epoch])
        assert torch.equal(weights_of(found.output)[name], expected[name])
    assert chosen  # which of both it is depends on the machine


def test_the_mean_with_other_checkpoints(result: training.TrainResult, options: TrainOptions, tmp_path: Path) -> None:
    """It is scored on devel and recorded; what is saved is it or what was trained, whichever is better."""
    others = [result.output, Path(shutil.copytree(result.output, tmp_path / "spoilt"))]
    spoilt = weights_of(others[1])
    safetensors_torch.save_file(
        {name: -value for name, value in spoilt.items()}, others[1] / "model.safetensors", {"format": "pt"}
    )
    chosen = set()
    for other in others:
        given = replace(options, output=tmp_path / f"with {other.name}", epochs=1, lr=1e-5, average_with=(str(other),))
        alone = train(replace(given, output=tmp_path / f"without {other.name}", average_with=()))
        found = train(given)
        assert found.best == alone.best  # the training itself is the same
        assert found.averaged_with is not None
        assert alone.averaged_with is None
        assert f"mean with other checkpoints' weights: devel F1 {found.averaged_with['f1']:.4f}" in str(found)
        assert "other checkpoints" not in str(alone)
        metrics = json.loads((found.output / "metrics.json").read_text())
        assert metrics["averaged_with"] == found.averaged_with
        assert metrics["options"]["average_with"] == [str(other)]
        better = found.averaged_with["f1"] > found.best.f1
        chosen.add(better)
        own = weights_of(alone.output)
        mean = {name: torch.stack([own[name], value]).mean(dim=0) for name, value in weights_of(other).items()}
        expected = mean if better else own
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(found.output).items())
        # Trained to its end already: the same weights once more.
        again = train(replace(given, resume=True))
        assert again.averaged_with == found.averaged_with
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(found.output).items())
    assert chosen == {True, False}
    safetensors_torch.save_file(weights_of(result.output), others[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match=r": sha256 of .*spoilt was \w{64} and is now \w{64}; resume with"):
        train(replace(given, resume=True))


def test_unfit_checkpoints_to_average_with(
    result: training.TrainResult, options: TrainOptions, base: Path, tmp_path: Path
) -> None:
    """Other tags, another order of them, another shape, and no checkpoint are told before anything is written."""
    given = replace(options, output=tmp_path / "out", average_with=(str(result.output),))
    with pytest.raises(
        ModelError, match=r"knows the tags O, B-Problem, I-Problem, .* and the data O, B-Problem, I-Problem$"
    ):
        train(replace(given, labels={"*": "Problem"}))
    with pytest.raises(ModelError, match="nothing: cannot be loaded"):
        train(replace(given, average_with=(str(tmp_path / "nothing"),)))
    for name, change, said in (
        ("numbers", {"id2label": dict(enumerate(sorted(TAGS)))}, "numbers its tags otherwise than the data; a mean of"),
        ("shape", {"intermediate_size": 24}, "is built otherwise than the base; a mean of weights needs models that"),
    ):
        other = Path(shutil.copytree(result.output, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints")))
        config = transformers.AutoConfig.from_pretrained(other, **change)
        transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(other)
        with pytest.raises(ModelError, match=f"{name}: {said}"):
            train(replace(given, average_with=(str(other),)))
    cased = shutil.copytree(result.output, tmp_path / "cased", ignore=shutil.ignore_patterns("checkpoints"))
    rules = json.loads((cased / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    (cased / "tokenizer_config.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match=r"has another tokenizer than .*; a mean of weights needs the same"):
        train(replace(given, average_with=(str(cased),)))
    assert not given.output.exists()


def test_teachers_are_learnt_from(result: training.TrainResult, options: TrainOptions, tmp_path: Path) -> None:
    """Text without labels is learnt from, and silver data, all wrong here, misleads with teachers, too."""
    text = "the patient has gouty pain. no left ankle gout."
    (tmp_path / "notes.csv").write_text("report\n" + f'"{text}"\n' * 40)
    wrong = {"text": text, "spans": [[0, 3, "Site"], [16, 22, "Site"]]}
    (tmp_path / "silver.jsonl").write_text("".join(json.dumps(wrong) + "\n" for _ in range(40)))
    taught = replace(options, epochs=1, teachers=(str(result.output), str(result.output)))
    misled = train(replace(taught, output=tmp_path / "misled", silver=(str(tmp_path / "silver.jsonl"),)))
    led = train(replace(taught, output=tmp_path / "led", unlabelled=(f"{tmp_path / 'notes.csv'}:report",)))
    assert led.best.f1 > misled.best.f1
    metrics = json.loads((led.output / "metrics.json").read_text())
    assert metrics["options"]["teachers"] == [str(result.output)] * 2
    assert metrics["options"]["unlabelled"] == [f"{tmp_path / 'notes.csv'}:report"]
    assert metrics["data"]["train"]["documents"] == 48 + 40


def test_what_labels_count_for(options: TrainOptions, tmp_path: Path) -> None:
    """Labels share the loss with teachers on labelled data, silver ones count alone, unlabelled text has none."""
    silver, notes = tmp_path / "silver.jsonl", tmp_path / "notes.jsonl"
    silver.write_text(json.dumps({"text": "no gout.", "spans": [[3, 7, "Problem"]]}) + "\n")
    notes.write_text('{"text": "left knee."}\n{"text": ""}\n{"text": "no gouty pain."}\n')
    given = replace(options, silver=(str(silver),), unlabelled=(str(notes),), teachers=("any",), teacher_weight=0.75)
    data, shares, *_ = training._prepare(given)
    assert shares == [0.25] * 48 + [1.0] + [0.0] * 2
    assert [document.text for document in data["train"][48:]] == ["no gout.", "left knee.", "no gouty pain."]
    _, alone, *_ = training._prepare(replace(given, teachers=(), unlabelled=()))
    assert alone == [1.0] * 49
    with pytest.raises(UsageError) as error:
        replace(given, teachers=())
    assert str(error.value) == f"unlabelled {notes}: text without labels needs a teacher"


def test_what_teachers_say(result: training.TrainResult, options: TrainOptions, encoder: WordTokenizer) -> None:
    """Their mean probabilities stand at each word, whatever the order of their tags."""
    data = load(options.data[0], "devel")
    encoded = encode(data, encoder, TAGS, 32)
    shares = [0.5] * 5 + [0.0] * (len(data) - 5)
    training._teach(replace(options, teachers=(str(result.output),)), encoded, shares, encoder, TAGS, "fp32")
    model = transformers.AutoModelForTokenClassification.from_pretrained(result.output)
    for owner, item in zip(encoded.owner, encoded.inputs, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([item["input_ids"]])).logits[0]
        word = np.array(item["labels"]) != IGNORED
        assert np.abs(item["soft"] - logits.softmax(dim=-1).numpy())[word].max() < 2e-3
        assert not item["soft"][~word].any()
        assert item["hard"] == (0.5 if owner < 5 else 0.0)
    other = encode(data, encoder, TAGS, 32)
    order = [TAGS[i] for i in (0, 3, 4, 1, 2)]
    training._teach(replace(options, teachers=(str(result.output),)), other, shares, encoder, order, "fp32")
    assert np.array_equal(other.inputs[0]["soft"][:, [0, 3, 4, 1, 2]], encoded.inputs[0]["soft"])


def test_teachers_read_segments_apart(
    result: training.TrainResult, options: TrainOptions, encoder: WordTokenizer
) -> None:
    """A word's probabilities are the same in a window with neighbours and alone, in segments that are cut as well."""
    sentences = ["the patient has gouty pain. ", "no left ankle gout. ", "right knee x-linked pain, " * 5 + "no gout."]
    taught = replace(options, teachers=(str(result.output),))
    packed = encode([Document("all", "".join(sentences), ())], encoder, TAGS, 32)
    apart = encode([Document(str(i), text, ()) for i, text in enumerate(sentences)], encoder, TAGS, 32)
    assert len(packed.inputs) < len(apart.inputs)
    assert len(apart.inputs) > len(sentences)  # one is longer than a window
    for encoded in (packed, apart):
        training._teach(taught, encoded, [0.0] * len(encoded.documents), encoder, TAGS, "fp32")
    found = [
        np.concatenate([item["soft"][np.array(item["labels"]) != IGNORED] for item in encoded.inputs])
        for encoded in (packed, apart)
    ]
    assert len(found[0]) == len(packed.words[0])
    assert found[0].std(axis=0).max() > 0.05
    assert np.array_equal(found[0], found[1])


def test_unfit_teachers(result: training.TrainResult, options: TrainOptions, tmp_path: Path) -> None:
    """One of other labels or another vocabulary is refused."""
    taught = replace(options, teachers=(str(result.output),), output=tmp_path / "out")
    with pytest.raises(ModelError) as error:
        train(replace(taught, labels={"*": "Problem"}))
    assert str(error.value) == (
        f"{result.output}: knows the tags {', '.join(TAGS)}, and the data O, B-Problem, I-Problem"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.txt").write_text("\n".join([*PIECES.split(), "more"]))
    transformers.BertTokenizerFast(vocab_file=str(other / "vocab.txt")).save_pretrained(other)
    transformers.BertConfig(vocab_size=8).save_pretrained(other)
    with pytest.raises(ModelError, match="has another tokenizer than"):
        train(replace(taught, teachers=(str(other),), output=tmp_path / "again"))
    cased = shutil.copytree(result.output, tmp_path / "cased", ignore=shutil.ignore_patterns("checkpoints"))
    rules = json.loads((cased / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    (cased / "tokenizer_config.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="has another tokenizer than"):
        train(replace(taught, teachers=(str(cased),), output=tmp_path / "again"))
    bare = shutil.copytree(result.output, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    without = json.loads((bare / "tokenizer.json").read_text()) | {"post_processor": None}
    (bare / "tokenizer.json").write_text(json.dumps(without))
    kind = json.loads((bare / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (bare / "tokenizer_config.json").write_text(json.dumps(kind))
    with pytest.raises(ModelError, match="has another tokenizer than"):
        train(replace(taught, teachers=(str(bare),), output=tmp_path / "again"))


def test_teachers_are_checked_before_anything_is_written(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path
) -> None:
    """A name that is none leaves no output behind, so that the corrected command runs."""
    given = replace(options, teachers=(str(tmp_path / "nothing"),), output=tmp_path / "out")
    with pytest.raises(ModelError, match="nothing: cannot be loaded"):
        train(given)
    empty = shutil.copytree(result.output, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    (empty / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="empty: holds no weights of PyTorch"):
        train(replace(given, teachers=(str(empty),)))
    assert not given.output.exists()


def test_inspect_shows_tokens_words_tags_and_weights(options: TrainOptions, tmp_path: Path) -> None:
    """The whole table for one example; nothing is trained and no weights are loaded."""
    for split in ("train", "devel"):
        (tmp_path / f"{split}.tsv").write_text("no\tO\nx-linked\tB-Problem\ngouty\tI-Problem\n\npain\tB-Site\n")
    shown = inspect(replace(options, data=(str(tmp_path),)), 1)
    assert str(shown) == (
        "example 0: 8 tokens\n"
        "  [CLS]   -100\n"
        "  no         0  O                 no\n"
        "  x          1  B-Problem         x\n"
        "  -          2  I-Problem         -\n"
        "  linked     2  I-Problem         linked\n"
        "  gout       2  I-Problem         gouty\n"
        "  ##y     -100\n"
        "  [SEP]   -100\n"
        "class weights (balanced):\n"
        "  O                 1.2000\n"
        "  B-Problem         1.2000\n"
        "  I-Problem         0.4000\n"
        "  B-Site            1.2000\n"
        "  I-Site            0.0000"
    )


def test_untokenized_documents_are_trained_on_in_packed_windows(options: TrainOptions, tmp_path: Path) -> None:
    """Notes with spans as JSONL: segments are packed, scores are by words, labels may be renamed."""
    note = {
        "text": "the patient has gouty pain. no knee pain.\n\nthe left ankle",
        "spans": [[16, 26, "a"], [31, 40, "b"]],
    }
    for split in ("train", "devel"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(note) + "\n")
    trained = train(
        replace(options, data=(str(tmp_path),), output=tmp_path / "out", epochs=1, labels={"*": "Problem"}, window=24)
    )
    metrics = json.loads((trained.output / "metrics.json").read_text())
    assert metrics["data"]["train"] == {"documents": 1, "spans": 2, "words": 13, "windows": 1}
    assert metrics["tags"] == ["O", "B-Problem", "I-Problem"]


def test_silver_data_is_learnt_from_and_not_scored_on(options: TrainOptions, tmp_path: Path) -> None:
    """A silver file adds its documents to training; devel and the labels stay those of the data."""
    silver = {"text": "the patient has gouty pain.", "spans": [[16, 26, "Problem"]]}
    (tmp_path / "silver.jsonl").write_text("".join(json.dumps(silver) + "\n" for _ in range(5)))
    trained = train(replace(options, silver=(str(tmp_path / "silver.jsonl"),), output=tmp_path / "out", epochs=1))
    counts = json.loads((trained.output / "metrics.json").read_text())["data"]
    assert (counts["train"]["documents"], counts["devel"]["documents"]) == (48 + 5, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs 0: at least 1 is needed"),
        ({"lr": 0.0}, "lr 0.0: a positive number is needed"),
        ({"lr": float("inf")}, "lr inf: a positive number is needed"),
        ({"seed": -1}, "seed -1: at least 0, below 2**32, is needed"),
        ({"weight_decay": float("nan")}, "warmup_ratio lies in [0, 1), weight_decay is not negative"),
        ({"warmup_ratio": 1.0}, "warmup_ratio lies in [0, 1), weight_decay is not negative"),
        ({"layer_decay": 0.0}, "layer_decay lies in (0, 1], label_smoothing in [0, 1), teacher_weight in [0, 1]"),
        ({"label_smoothing": 1.0}, "layer_decay lies in (0, 1], label_smoothing in [0, 1), teacher_weight in [0, 1]"),
        ({"average": 0}, "average 0: at least 1 is needed"),
        ({"precision": "int8"}, "precision 'int8': one of auto, fp32, bf16, fp16 is needed"),
    ],
)
def test_options_out_of_range(options: TrainOptions, change: dict[str, Any], message: str) -> None:
    """Options are checked when they are made."""
    with pytest.raises(UsageError) as error:
        replace(options, **change)
    assert str(error.value) == message


def test_a_gpu_does_not_wait(options: TrainOptions, tmp_path: Path) -> None:
    """Processes of the data loader make a GPU's batches; what is learnt with them is what is learnt without."""
    on_gpu, on_cpu = (training.device_arguments(16, cuda=cuda) for cuda in (True, False))
    assert (on_gpu["dataloader_num_workers"], on_cpu["dataloader_num_workers"]) == (2, 0)
    assert on_gpu["per_device_eval_batch_size"] > on_cpu["per_device_eval_batch_size"] == 64
    with pytest.MonkeyPatch.context() as patch:
        there = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
        patch.setattr(training, "device_arguments", lambda *_, **__: on_cpu | there)
        found = train(replace(options, output=tmp_path / "workers", epochs=1, max_documents=16))
    alone = train(replace(options, output=tmp_path / "alone", epochs=1, max_documents=16))
    assert found.epochs[0].training_loss == alone.epochs[0].training_loss


def test_precision_fits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA auto is bf16 where the device has it, else fp16; on a CPU bf16 where it is faster, never fp16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)  # noqa: ARG005
        assert resolve_precision("auto") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    intel, avx = {"cpu_name": "Intel Xeon"}, {"avx512_bf16": True, "amx_bf16": False}
    for able, expected in (
        (intel | avx, "fp32"),
        (intel | avx | {"amx_bf16": True}, "bf16"),
        ({"cpu_name": "AMD EPYC"} | avx, "bf16"),
        ({"cpu_name": "Neoverse", "bf16": True}, "bf16"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert resolve_precision("auto") == expected
    assert resolve_precision("fp32") == "fp32"
    with pytest.raises(UsageError, match="precision fp16 needs a CUDA device"):
        resolve_precision("fp16")


def test_unusable_bases_and_data(options: TrainOptions, base: Path, tmp_path: Path) -> None:
    """A missing or foreign base is one of ModelError in two lines; nothing is left in the output."""
    fresh = replace(options, output=tmp_path / "out")
    with pytest.raises(ModelError) as error:
        train(replace(fresh, base=str(tmp_path)))
    assert str(error.value) == f"{tmp_path}: no config.json in it; name the directory of a checkpoint"
    with pytest.raises(ModelError) as error:
        train(replace(fresh, base="/nowhere/model"))
    assert str(error.value).startswith("/nowhere/model: cannot be loaded as a base model (")
    with pytest.raises(ModelError, match=r"^~nobody-here/model: cannot be loaded as a base model"):
        train(replace(fresh, base="~nobody-here/model"))
    with pytest.raises(InputError, match=r"^~nobody-here/notes\.csv: no such file or directory$"):
        train(replace(fresh, unlabelled=("~nobody-here/notes.csv",), teachers=(str(base),)))
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(UsageError) as usage:
        train(replace(fresh, window=65))
    assert str(usage.value) == "window 65: this model takes 8 to 64 tokens"
    (tmp_path / "train.tsv").write_text("a\tO\n")
    (tmp_path / "devel.tsv").write_text("a\tB-X\n")
    with pytest.raises(InputError, match="the train split has no labelled span"):
        train(replace(fresh, data=(str(tmp_path),)))
    (tmp_path / "train.tsv").write_text("a\tB-Y\n")
    with pytest.raises(InputError, match="devel has the label X, which train has not; rename it"):
        train(replace(fresh, data=(str(tmp_path),)))
    assert not fresh.output.exists()


def config_of(checkpoint: Path, **changes: Any) -> None:
    """Change settings in a checkpoint's ``config.json``."""
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (checkpoint / "config.json").write_text(json.dumps(config))


def renamed_weights(checkpoint: Path) -> None:
    """Weights as a wrapper for several GPUs names them."""
    weights = safetensors_torch.load_file(checkpoint / "model.safetensors")
    safetensors_torch.save_file(
        {f"module.{name}": value for name, value in weights.items()},
        checkpoint / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    "spoil",
    [renamed_weights, partial(config_of, vocab_size=60), partial(config_of, num_hidden_layers=4)],
    ids=["names", "tokens", "layers"],
)
def test_a_base_whose_weights_do_not_fill_it(
    spoil: Callable[[Path], None], options: TrainOptions, base: Path, tmp_path: Path
) -> None:
    """What the encoder lacks would be random numbers; only the head may be new."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    spoil(other)
    with pytest.raises(
        ModelError, match=r": its weights do not fit its config\.json: no bert\.\S+( and \d+ more)?, or of"
    ):
        train(replace(options, base=str(other), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("config.json", b"[1]"),
    ],
)
def test_a_damaged_base(name: str, content: bytes, options: TrainOptions, base: Path, tmp_path: Path) -> None:
    """Whatever a library raises over it, it is no defect of medner."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    (other / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{other}: cannot be loaded as a base model \(.+\);\nname a checkpoint"):
        train(replace(options, base=str(other), output=tmp_path / "out"))


def test_a_tokenizer_of_another_base(options: TrainOptions, base: Path, tmp_path: Path) -> None:
    """One with more tokens than the model has is found before anything is trained."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    (other / "tokenizer.json").unlink()
    (other / "vocab.txt").write_text("\n".join([*PIECES.split(), "more"]))
    with pytest.raises(
        ModelError, match=r": its tokenizer has a token 25, and its model 25 tokens; they do not belong"
    ):
        train(replace(options, base=str(other), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_window_at_the_limit_of_positions(options: TrainOptions, base: Path, tmp_path: Path) -> None:
    """Batches are padded to a multiple of eight, but not beyond the window."""
    other = tmp_path / "base"
    shutil.copytree(base, other)
    config = transformers.AutoConfig.from_pretrained(base, max_position_embeddings=13)
    transformers.BertForTokenClassification(config).save_pretrained(other)
    (data := tmp_path / "data").mkdir()
    for split in ("train", "devel"):
        (data / f"{split}.jsonl").write_text(json.dumps({"text": "the gout " * 8, "spans": [[4, 8, "Problem"]]}))
    given = replace(options, data=(str(data),), base=str(other), window=13, output=tmp_path / "out", epochs=1)
    assert train(given).epochs


def test_a_head_is_kept_for_the_same_tags_in_their_order(
    result: training.TrainResult, options: TrainOptions, tmp_path: Path
) -> None:
    """A base that was trained for the same tags goes on from there; another order of them gets a new head."""
    own, other = result.output, Path(shutil.copytree(result.output, tmp_path / "other"))
    config_of(other, id2label=dict(enumerate(reversed(TAGS))), label2id={tag: 4 - i for i, tag in enumerate(TAGS)})
    tokenizer = training.load_tokenizer(str(own))
    heads = [training._load_model(str(path), TAGS, tokenizer).classifier for path in (own, other)]
    trained = weights_of(own)["classifier.weight"]
    assert torch.equal(heads[0].weight, trained)
    assert heads[1].weight.shape == trained.shape
    assert not torch.equal(heads[1].weight, trained)
    assert not heads[1].bias.any()


def test_a_checkpoint_that_was_cut_off(options: TrainOptions, tmp_path: Path) -> None:
    """A training goes on from the last one that is whole, or anew."""
    given = replace(options, output=tmp_path / "out", average=2)
    train(given)
    first, last = sorted((given.output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert [training._is_whole(path) for path in (first, last)] == [True, True]
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        content = (last / name).read_bytes()
        for rest in (b"", content[: len(content) // 2]):
            (last / name).write_bytes(rest)
            assert not training._is_whole(last), name
        (last / name).write_bytes(content)
    for name in ("scheduler.pt", "optimizer.pt"):
        (last / name).unlink()
        assert not training._is_whole(last)
    assert train(replace(given, resume=True)).epochs[-1].epoch == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (
            SafetensorError("Error while serializing: I/O error: File too large"),
            "Error while serializing: I/O error: F",
        ),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "[enforce fail] . Pytorch"),
    ],
)
def test_a_disk_that_is_full(error: Exception, said: str) -> None:
    """It is the output's error, whichever library writes; what else goes wrong is not."""
    with pytest.raises(OutputError) as failure, training._output_errors(Path("model")):
        raise error
    assert str(failure.value).startswith(f"model: cannot be written ({said}")
    for other in (RuntimeError("mat1 and mat2 shapes"), SafetensorError("Error while deserializing header")):
        with pytest.raises(type(other), match=str(other)), training._output_errors(Path("model")):
            raise other


def test_labels_that_differ_by_a_hyphen(encoder: WordTokenizer) -> None:
    """seqeval strips hyphens from labels; devel counts CD4- and CD4 as two."""
    tags = ["O", "B-CD4", "I-CD4", "B-CD4-", "I-CD4-"]
    encoded = encode([Document("a", "knee pain", ((0, 4, "CD4"), (5, 9, "CD4-")))], encoder, tags, 32)
    scores = training._strict(encoded, [np.array([0, 1, 1, 0])], tags)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0.5, 0.5, 0.5)


def test_a_teacher_on_the_hub(
    result: training.TrainResult, options: TrainOptions, encoder: WordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's name is looked up there, as that of a base is; a directory never is."""
    asked = []

    class Asked(pytorch.TorchModel):
        def __init__(self, checkpoint: str | Path, *given: Any, on_hub: bool) -> None:
            asked.append((str(checkpoint), on_hub))
            super().__init__(result.output, *given)

    monkeypatch.setattr(pytorch, "TorchModel", Asked)
    encoded = encode([Document("a", "knee pain", ())], encoder, TAGS, 32)
    for name in ("somebody/teacher", str(result.output)):
        training._probabilities(name, encoded, encoder.pad_id, "fp32")
    assert asked == [("somebody/teacher", True), (str(result.output), False)]


@pytest.mark.parametrize(
    ("words", "setting", "tokens"),
    [
        ("Seen aids AIDS with", None, ["Seen", "with", "AIDS"]),
        ("Seen aids AIDS with", True, ["[UNK]", "with", "aids"]),
        ("Seen aids AIDS with", False, ["Seen", "with", "AIDS"]),
        ("seen aids with", None, ["seen", "with", "aids"]),
        (f"seen aids AIDS with {' '.join(map(str, range(200)))}", None, ["seen", "with", "aids"]),
    ],
    ids=["cased", "said to be uncased", "said to be cased", "uncased", "uncased but for a word"],
)
def test_the_case_that_a_vocabulary_has(
    words: str, setting: bool | None, tokens: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept where a base has words alone, as Bio_ClinicalBERT has; a setting counts more, and goes into checkpoints."""
    shutil.copy(base / "config.json", tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]))
    if setting is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": setting}))
    tokenizer = training.load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize("Seen with AIDS") == tokens
    said = capsys.readouterr()
    told = f"{tmp_path}: capitals are kept; its vocabulary has them, and no setting says otherwise\n"
    assert said == ("", told if setting is None and "Seen" in words else "")
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(base / "config.json", tmp_path / "saved")
    assert training.load_tokenizer(str(tmp_path / "saved")).tokenize("Seen with AIDS") == tokens
    assert WordTokenizer((tmp_path / "saved" / "tokenizer.json").read_text()).tokenize(["Seen with AIDS"])
    assert capsys.readouterr() == ("", "")


def test_a_fast_tokenizer_is_needed(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer without offsets cannot be trained on."""

    class Slow:
        is_fast = False

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    with pytest.raises(ModelError) as error:
        inspect(options)
    assert str(error.value) == f"{options.base}: has no fast tokenizer; a tokenizer.json is needed"
