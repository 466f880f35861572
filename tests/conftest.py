"""Models that several test files share: the tiny bundle, and a small random BERT in fp32 and in both forms of int8."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from medner import Annotator, testing
from medner import bundle as bundles

LABELS = ("O", "B-Disease", "I-Disease")

# Where tests run in the background they are ignored, and so they would be by the processes that tests start.
for ignored in {signal.SIGINT, signal.SIGHUP}:
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; skips where there is none."""
    path = Path(os.environ.get("MEDNER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data in {path}; set MEDNER_DATA")
    return path


@pytest.fixture
def files_of_at_most() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """A block in which no file of this process grows beyond some bytes; the kernel refuses the rest, in mid-write.

    Not for longer than a block: pytest's own output is a file, too, where it is redirected into one.
    """
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="session")
def tiny() -> Annotator:
    """An annotator of the tiny bundle with default options."""
    return testing.annotator()


@pytest.fixture(scope="session")
def tiny_parts() -> dict[str, bytes]:
    """The tiny bundle's files by name, to put together bundles that differ in one point."""
    path = testing.bundle()
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle of a random BERT, fp32 and int8: hidden 64, 2 layers, 2 heads, windows of 40, the tiny vocabulary.

    Its weights are large, so that tags change from word to word and a result that depended on the batch would show. Of
    its first token one channel is far out, as in trained models. Every int8 scale is a row's own. Its checkpoint stands
    beside it.
    """
    path = tmp_path_factory.mktemp("small_bert")
    bundle = _make_bert(path, "gelu")
    _quantize(bundle)
    yield bundle
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def small_bert_static(small_bert: Path) -> Path:
    """The same with one int8 scale for all text; activations have further columns for their outliers."""
    bundle = shutil.copytree(small_bert, small_bert.parent / "static")
    _quantize(bundle, fixed=True)
    return bundle


@pytest.fixture(scope="session")
def small_relu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Another like it, with ReLU and fixed scales."""
    path = tmp_path_factory.mktemp("small_relu")
    bundle = _make_bert(path, "relu")
    _quantize(bundle, fixed=True)
    yield bundle
    shutil.rmtree(path)


def _make_bert(path: Path, activation: str) -> Path:
    """The bundle with its fp32 variant alone, beside its checkpoint."""
    torch = pytest.importorskip("torch", reason="the small BERT is made with torch")
    transformers = pytest.importorskip("transformers", reason="the small BERT is made with transformers")
    pytest.importorskip("optimum.exporters.onnx", reason="the small BERT is exported with optimum")
    from medner.export import convert

    config = transformers.BertConfig(
        vocab_size=117,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.3,
        hidden_act=activation,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.BertForTokenClassification(config)
        model.bert.embeddings.position_embeddings.weight[0, 5] = -40
        model.save_pretrained(path / "checkpoint")
    bundle = path / "bundle"
    convert.to_onnx(path / "checkpoint", bundle / bundles.VARIANT_FILES["fp32"])
    shutil.copyfile(path / "checkpoint" / "config.json", bundle / "config.json")
    shutil.copyfile(testing.bundle() / "tokenizer.json", bundle / "tokenizer.json")
    return bundle


def _quantize(bundle: Path, *, fixed: bool = False) -> None:
    """Write the int8 variant and the manifest."""
    from medner.export import optimize

    rng = np.random.default_rng(0)
    samples = [np.array([2, *rng.integers(4, 117, size), 3]) for size in range(10, 38)] if fixed else []
    graphs = (bundle / bundles.VARIANT_FILES[precision] for precision in ("fp32", "int8"))
    done = optimize.to_int8(*graphs, samples)
    assert done.static == (done.activations if fixed else 0)
    bundles.write_manifest(bundle, name="small", labels=LABELS, window=40, packed=True, card={})
