"""A PyTorch checkpoint behind the seam of an exported graph."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from medner import bundle as bundles  # noqa: E402
from medner import testing  # noqa: E402
from medner.annotate import Options  # noqa: E402
from medner.errors import DeviceError, MissingPackage, ModelError  # noqa: E402
from medner.pytorch import TorchModel, torch_annotator, weight_bytes  # noqa: E402

LABELS = ("O", "B-Disease", "I-Disease")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT over the vocabulary of the tiny bundle, stored in half precision, with dropout."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=256,
        initializer_range=0.5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    path = tmp_path_factory.mktemp("model") / "random"
    transformers.BertForTokenClassification(config).half().save_pretrained(path)
    shutil.copyfile(testing.bundle() / "tokenizer.json", path / "tokenizer.json")
    return path


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    """The model gives float32 logits of transformers' own forward in evaluation mode, whatever stands at padding."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint).float().eval()
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(0, 100, size=(6, 24)), np.array([24, 23, 20, 9, 2, 1])
    logits = TorchModel(checkpoint)(ids, lengths)
    assert (logits.dtype, logits.shape) == (np.float32, (6, 24, 3))
    for row, length in enumerate(lengths):
        with torch.inference_mode():
            alone = model(input_ids=torch.from_numpy(ids[row : row + 1, :length])).logits[0].numpy()
        np.testing.assert_allclose(logits[row, :length], alone, atol=1e-4)
    assert np.ptp(logits) > 1  # of logits that are all alike nothing would be learned


@pytest.mark.parametrize(
    ("metrics", "option", "window"),
    [
        (None, None, 128),
        ({"options": {"window": 40}}, None, 40),
        ({"options": {"window": 40}}, 24, 24),
        ({}, None, 128),
    ],
)
def test_window_of_a_checkpoint(
    checkpoint: Path, tmp_path: Path, metrics: dict[str, object] | None, option: int | None, window: int
) -> None:
    """The window is --window, else the one of metrics.json, else a foreign model's; windows are cut to it."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    if metrics is not None:
        (copy / "metrics.json").write_text(json.dumps(metrics))
    annotator = torch_annotator(copy, Options(window=option, reuse=False))
    assert (annotator.bundle.window, annotator.precision, annotator.session) == (window, "fp32", None)
    # A segment as long as three windows makes four that overlap by a quarter.
    annotator("fever " * (3 * (window - 2)))
    assert annotator.counts.inferred == 4


@pytest.mark.parametrize("content", ["no JSON", "[1]", '{"options": [1]}', '{"options": {"window": "long"}}'])
def test_a_metrics_file_of_another_program(checkpoint: Path, tmp_path: Path, content: str) -> None:
    """It says nothing of the window, and nothing else goes wrong."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    expected = torch_annotator(copy).bundle.window
    (copy / "metrics.json").write_text(content)
    assert torch_annotator(copy).bundle.window == expected


def test_a_checkpoint_without_a_head(checkpoint: Path, tmp_path: Path) -> None:
    """Weights that are missing are named, where transformers would fill them with random numbers and go on."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    model = transformers.AutoModelForTokenClassification.from_pretrained(copy)
    model.bert.save_pretrained(copy)
    with pytest.raises(ModelError) as failure:
        TorchModel(copy)
    assert str(failure.value) == f"{copy}: has no weights for classifier.bias, classifier.weight; fine-tune it first"


def test_weights_that_cannot_be_read(checkpoint: Path, tmp_path: Path) -> None:
    """A file that was cut short, and one that is absent, are model errors with transformers' reason; exit code 4."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=rf"^{copy}: transformers cannot load it \(SafetensorError: .+\)$"):
        TorchModel(copy)
    weights.unlink()
    with pytest.raises(ModelError, match=rf"^{copy}: transformers cannot load it \(OSError: .+\)$") as failure:
        TorchModel(copy)
    assert failure.value.exit_code == 4


def test_a_name_is_not_looked_up_on_the_hub() -> None:
    """A checkpoint is a directory: a name is refused without asking the network."""
    with pytest.raises(ModelError, match=r"^nobody/nothing: transformers cannot load it \(OSError: .+\)$"):
        TorchModel("nobody/nothing")
    with pytest.raises(ModelError) as failure:
        torch_annotator("nobody/nothing")
    assert str(failure.value) == "nobody/nothing: no such checkpoint directory"


@pytest.mark.parametrize("device", ["cuda:7", "nonsense"])
def test_the_device_asked_for_is_the_one_that_runs(checkpoint: Path, device: str) -> None:
    """A checkpoint runs on the CPU only where that was asked for, or nothing was."""
    if device.startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device")
    with pytest.raises(DeviceError, match=f"--device {device}: PyTorch cannot run there"):
        torch_annotator(checkpoint, Options(device=device))


def test_reduced_precisions(checkpoint: Path) -> None:
    """In bf16 and fp16 the logits are float32 arrays near those of fp32, and are not the same."""
    ids, lengths = np.random.default_rng(0).integers(0, 100, size=(4, 16)), np.array([16, 16, 9, 3])
    real = np.arange(16) < lengths[:, None]
    exact = TorchModel(checkpoint)(ids, lengths)[real]
    for precision in ("bf16", "fp16"):
        logits = TorchModel(checkpoint, precision)(ids, lengths)
        assert (logits.dtype, logits.shape) == (np.float32, (4, 16, 3))
        assert 0 < np.abs(logits[real] - exact).mean() < 0.2 * np.ptp(exact)


def test_a_device_that_is_not_there(checkpoint: Path) -> None:
    """A GPU that PyTorch does not have is a device error; exit code 5."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match=r"^--device cuda:0: PyTorch cannot run there \(.+\); use --device cpu$"):
        TorchModel(checkpoint, "fp16", "cuda:0")


def test_without_pytorch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackage) as failure:
        TorchModel(checkpoint)
    assert (
        str(failure.value)
        == 'PyTorch checkpoints need the extra "train": pip install ".[train]" in a checkout of medner'
    )


def test_size_of_the_weights(tmp_path: Path) -> None:
    """All shards count; the older format only where there is no safetensors file, and nothing else."""
    for name, size in (("pytorch_model.bin", 5), ("optimizer.pt", 70), ("config.json", 2)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 5
    for name, size in (("model-00001-of-00002.safetensors", 10), ("model-00002-of-00002.safetensors", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 14
    assert list(bundles.weight_hashes(tmp_path)) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    ]  # fmt: skip


def test_weights_that_are_no_numbers(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint whose training diverged is an error, not a model that finds nothing."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint)
    model.classifier.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    given = np.ones((2, 3), np.int64), np.array([3, 1])
    with pytest.raises(ModelError, match=r": its logits are no numbers in fp32; train it at a lower learning rate$"):
        TorchModel(tmp_path)(*given)
    # An impossible class is none.
    model.classifier.weight.data.fill_(0.0)
    model.classifier.bias.data[2] = -torch.inf
    model.save_pretrained(tmp_path)
    assert np.isneginf(TorchModel(tmp_path)(*given)[..., 2]).all()
