"""fp16 for GPUs: operators fused in full or loudly not, half precision where it is safe, proven on the CPU."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum.exporters.onnx")

from onnx import TensorProto, numpy_helper  # noqa: E402

from medner import runtime  # noqa: E402
from medner.errors import ModelError  # noqa: E402
from medner.export import convert, fusion, half  # noqa: E402
from medner.export.fusion import Fused  # noqa: E402

VOCABULARY, LAYERS = 60, 2
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.3}
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64},
    "electra": {**SIZES, "embedding_size": 16},
    "albert": {**SIZES, "embedding_size": 16},
}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
IN_FULL = Fused(attention=LAYERS, normalizations=2 * LAYERS, gelus=LAYERS, shapes=0)
#: What runs on CUDA as it is and makes onnxruntime place nothing else on the CPU.
ON_CUDA = {
    *("Add", "ArgMax", "BiasGelu", "Cast", "CumSum", "Equal", "FastGelu", "Gather", "LayerNormalization", "MatMul"),
    *("Mul", "MultiHeadAttention", "Not", "ReduceMax", "ReduceSum", "SkipLayerNormalization", "Softmax", "Sub"),
}
#: Batch and length, from one token to more tokens than a layer has channels.
SHAPES = ((1, 1), (1, 9), (4, 2), (3, 17), (5, 40))

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a small random model of a family, once for each; ``change`` is made to its weights."""
    done: dict[str, Path] = {}

    def export(name: str, change: Callable[[Any], None] | None = None, **settings: Any) -> Path:
        key = f"{name} {change} {settings}"
        if key not in done:
            sizes = DEBERTA if name == "deberta-v2" else FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                config = transformers.AutoConfig.for_model(name, **{**COMMON, **sizes, **settings})
                model = transformers.AutoModelForTokenClassification.from_config(config)
                if change is not None:
                    change(model)
                model.save_pretrained(folder / "checkpoint")
            convert.to_onnx(folder / "checkpoint", folder / "model.onnx")
            done[key] = folder / "model.onnx"
        return done[key]

    return export


def batches() -> list[tuple[Any, Any]]:
    """Padded batches of several shapes, one row of each full: ids and lengths."""
    rng = np.random.default_rng(0)
    made = []
    for shape in SHAPES:
        lengths = rng.integers(1, shape[1] + 1, shape[0])
        lengths[0] = shape[1]
        made.append((rng.integers(2, VOCABULARY, shape), lengths))
    return made


def samples() -> list[Any]:
    """Windows on which magnitudes are measured; one of a single token among them."""
    rng = np.random.default_rng(1)
    return [rng.integers(2, VOCABULARY, length) for length in (40, 1, 12, 25)]


def logits(graph: Any, ids: Any, lengths: Any) -> Any:
    """Logits of the tokens that are no padding, float32 [n_tokens, n_labels]."""
    serialized = graph.read_bytes() if isinstance(graph, Path) else graph.SerializeToString()
    return runtime.logits(serialized, ids, lengths)[np.arange(ids.shape[1]) < lengths[:, None]]


def farthest(first: Any, second: Any) -> float:
    """The largest difference of two graphs' logits on the batches, relative to the largest logit of the first."""
    differences = []
    for ids, lengths in batches():
        expected = logits(first, ids, lengths)
        differences.append(np.abs(logits(second, ids, lengths) - expected).max() / np.abs(expected).max())
    return float(np.max(differences))


def weights(graph: Path, kind: int) -> list[Any]:
    """A graph's initializers of one element type."""
    return [tensor for tensor in onnx.load(graph).graph.initializer if tensor.data_type == kind]


# ---------------------------------------------------------------------------------------------------------------------
# Fusion


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_fused(name: str, exported: Export) -> None:
    """All of a family's layers are, the logits stay, and every operator left runs on CUDA without help of the CPU."""
    before = onnx.load(exported(name))
    after, fused = fusion.fuse(before)
    assert fused == IN_FULL
    assert farthest(before, after) <= 1e-5
    counts = Counter(node.op_type for node in after.graph.node)
    assert (counts["MultiHeadAttention"], counts["SkipLayerNormalization"]) == (LAYERS, 2 * LAYERS)
    assert counts["FastGelu" if name == "albert" else "BiasGelu"] == LAYERS
    assert counts["LayerNormalization"] == 1
    assert counts.keys() <= ON_CUDA
    onnx.checker.check_model(after)


def test_the_mask_is_lengths(exported: Export) -> None:
    """Attention reads one length for each window, as int32, and a token at padding changes no bit of the others."""
    model, _ = fusion.fuse(onnx.load(exported("bert")))
    heads = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    makers = {node.output[0]: node for node in model.graph.node}
    assert {node.input[4] for node in heads} == {"medner.lengths"}
    assert makers["medner.lengths"].op_type == "ReduceSum"
    cast = makers[makers["medner.lengths"].input[0]]
    assert (cast.op_type, cast.input[0], cast.attribute[0].i) == ("Cast", "attention_mask", TensorProto.INT32)
    ids, lengths = batches()[-1]
    other = np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, 7)
    assert (ids != other).any()
    assert (logits(model, ids, lengths) == logits(model, other, lengths)).all()


def test_another_activation(exported: Export) -> None:
    """A layer with ReLU has no GELU to fuse, and is expected to have none."""
    graph = exported("bert", hidden_act="relu")
    before = onnx.load(graph)
    after, fused = fusion.fuse(before)
    assert fused == Fused(LAYERS, 2 * LAYERS, 0, 0)
    assert farthest(before, after) <= 1e-5
    config = {"model_type": "bert", "num_hidden_layers": LAYERS, "hidden_act": "relu"}
    assert half.to_fp16(graph, graph.with_name("relu.onnx"), config=config).fused == fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_relative_positions_are_left_alone(exported: Export) -> None:
    """DeBERTa's attention has terms of its own: its graph comes back as it is."""
    before = onnx.load(exported("deberta-v2"))
    serialized = before.SerializeToString()
    after, fused = fusion.fuse(before)
    assert after is before
    assert after.SerializeToString() == serialized
    assert (fused.attention, fused.normalizations, fused.gelus) == (0, 0, 0)
    assert fused.shapes > 0


def test_the_proof_stops_a_wrong_scale(exported: Export) -> None:
    """Scores divided by 2 instead of the root of 8 have the form that is fused: their logits keep them from it."""
    model = onnx.load(exported("electra"))
    roots = [
        node.attribute[0].t
        for node in model.graph.node
        if node.op_type == "Constant" and np.allclose(numpy_helper.to_array(node.attribute[0].t), 8**0.5)
    ]
    roots += [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and np.allclose(numpy_helper.to_array(tensor), 8**0.5)
    ]
    assert roots
    for root in roots:
        root.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(root), 2), root.name))
    after, fused = fusion.fuse(model)
    assert after is model
    assert fused.attention == 0


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_half_precision(name: str, exported: Export, tmp_path: Path) -> None:
    """Weights are half but for the classifier's, logits differ by the rounding, and tag and probability follow them."""
    source, target, rounded = exported(name), tmp_path / "onnx/fp16.onnx", tmp_path / "rounded.onnx"
    config = transformers.AutoConfig.from_pretrained(source.parent / "checkpoint").to_dict()
    done = half.to_fp16(source, target, samples(), config, rounded)
    assert done.fused == IN_FULL
    assert done.single == 2  # the classifier's product and sum
    assert str(done) == (
        f"fused: 2 attention, 4 normalization, 2 GELU; {done.half} operators in half precision, 2 in fp32"
    )
    assert sorted(tuple(tensor.dims) for tensor in weights(target, TensorProto.FLOAT)) == [(2,), (32, 2)]
    assert {node.op_type for node in onnx.load(target).graph.node} <= ON_CUDA
    for graph in (target, rounded):
        assert 0 < farthest(source, graph) < 0.01
        session = runtime.Session(graph, "cpu")
        assert session.gives_best
        for ids, lengths in batches():
            inside = np.arange(ids.shape[1]) < lengths[:, None]
            values = session(ids, lengths)[inside]
            tags, probabilities = (answer[inside] for answer in session.best(ids, lengths))
            assert (values.dtype, tags.dtype, probabilities.dtype) == (np.float32, np.int16, np.float32)
            likely = np.exp(values - values.max(axis=-1, keepdims=True))
            assert (tags == values.argmax(axis=-1)).all()
            np.testing.assert_allclose(probabilities, (likely / likely.sum(-1, keepdims=True)).max(-1), rtol=1e-5)


def test_half_the_size(exported: Export, tmp_path: Path) -> None:
    """The weights take half the bytes."""
    source = exported("bert")
    half.to_fp16(source, tmp_path / "fp16.onnx", samples())
    before, after = (
        sum(len(tensor.raw_data) for tensor in onnx.load(graph).graph.initializer)
        for graph in (source, tmp_path / "fp16.onnx")
    )
    assert 0.5 < after / before < 0.51


def test_equal_shapes_give_equal_bits(exported: Export, tmp_path: Path) -> None:
    """On the CPU a window's logits in a batch do not depend on what stands in the batch's other rows."""
    half.to_fp16(exported("bert"), tmp_path / "fp16.onnx", samples())
    session = runtime.Session(tmp_path / "fp16.onnx", "cpu")
    ids, lengths = batches()[-1]
    lengths[2] = 33
    expected = session(ids, lengths)[2, :33]
    other, shorter = (ids + 11) % VOCABULARY, np.maximum(lengths - 3, 1)
    other[2], shorter[2] = ids[2], 33
    assert (session(other, shorter)[2, :33] == expected).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unknown_architecture(exported: Export, tmp_path: Path) -> None:
    """A graph that does not fuse is fp16 without it, its mask fp32, its branches as they are; the report says so."""
    source, target, rounded = exported("deberta-v2"), tmp_path / "fp16.onnx", tmp_path / "rounded.onnx"
    done = half.to_fp16(source, target, samples(), {"model_type": "deberta-v2", "num_hidden_layers": LAYERS}, rounded)
    assert str(done) == (
        "fused: none, for want of attention of a known form; a GPU may run it slowly, or refuse to; "
        f"{done.half} operators in half precision, {done.single} in fp32"
    )
    model = onnx.load(target)
    values = [numpy_helper.to_array(tensor) for tensor in weights(target, TensorProto.FLOAT)]
    assert {float(value.min()) for value in values if value.min() < -65504} == {np.finfo(np.float32).min}
    assert sum(node.op_type == "If" for node in model.graph.node) > 0
    assert len(weights(target, TensorProto.FLOAT16)) >= 10 * LAYERS
    for graph in (target, rounded):
        assert 0 < farthest(source, graph) < 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_known_architecture_that_does_not_fuse(exported: Export, tmp_path: Path) -> None:
    """It is an error that names the counts, and no graph is written."""
    source = exported("deberta-v2")
    shapes = sum(node.op_type == "Shape" for node in onnx.load(source).graph.node)
    with pytest.raises(ModelError) as failure:
        half.to_fp16(source, tmp_path / "fp16.onnx", samples(), {"model_type": "bert", "num_hidden_layers": LAYERS})
    assert str(failure.value) == (
        f"0 attention, 0 normalization and 0 GELU were fused, not 2, 4 and 2, and {shapes} nodes compute "
        "with shapes: this graph has another form; leave out --precision fp16"
    )
    with pytest.raises(ModelError, match=r"2 attention, 4 normalization and 2 GELU were fused, not 3, 6 and 3, and 0 "):
        half.to_fp16(
            exported("distilbert"), tmp_path / "fp16.onnx", config={"model_type": "distilbert", "n_layers": LAYERS + 1}
        )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the largest half


def overflow(model: Any) -> None:
    """Scale what leaves the first layer's GELU by 30,000, and what reads it down again: the model stays the same."""
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense.weight *= 30_000
    layer.intermediate.dense.bias += 10_000
    layer.output.dense.weight /= 30_000


def test_what_overflows_stays_fp32(exported: Export, tmp_path: Path) -> None:
    """Values beyond the largest half on the samples are computed in fp32, and only they; every logit is a number."""
    source, rounded = exported("bert", overflow), tmp_path / "rounded.onnx"
    plain = half.to_fp16(exported("bert"), tmp_path / "plain.onnx", samples())
    done = half.to_fp16(source, tmp_path / "fp16.onnx", samples(), rounded=rounded)
    # The first layer's two products of the feed-forward part, and the GELU between them; the sum after them is small.
    assert (done.single - plain.single, done.half - plain.half) == (3, -3)
    assert 0 < farthest(source, rounded) < 0.01
    assert 0 < farthest(source, tmp_path / "fp16.onnx") < 0.01


def test_the_rounded_graph_shows_an_overflow(exported: Export, tmp_path: Path) -> None:
    """Without samples nothing is known of the overflow: the CPU hides it in the fp16 graph, and not in the other."""
    source, target, rounded = exported("bert", overflow), tmp_path / "fp16.onnx", tmp_path / "rounded.onnx"
    half.to_fp16(source, target, rounded=rounded)
    ids, lengths = batches()[-1]
    assert np.isfinite(runtime.Session(target, "cpu")(ids, lengths)).all()
    with pytest.raises(ModelError) as failure:
        runtime.Session(rounded, "cpu")(ids, lengths)
    assert "no numbers in a batch of" in str(failure.value)


def test_a_weight_beyond_the_largest_half(exported: Export, tmp_path: Path) -> None:
    """A matrix with an entry that no half can hold is read in fp32."""

    def change(model: Any) -> None:
        model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = 1e6

    source, target = exported("bert", change), tmp_path / "fp16.onnx"
    half.to_fp16(source, target)
    largest = [np.abs(numpy_helper.to_array(tensor)).max() for tensor in weights(target, TensorProto.FLOAT)]
    assert np.float32(1e6) in largest
    assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in onnx.load(target).graph.initializer)


def test_padding_of_samples(exported: Export) -> None:
    """The last tokens of a sample count as padding: the mask's constant is in what is measured."""
    graph, ids = exported("bert").read_bytes(), np.arange(2, 14)
    ((values,),) = runtime.activations(graph, ["logits"], [ids], padding=5)
    expected = runtime.logits(graph, ids[None], np.array([7]))
    assert (values[:, :7] == expected[:, :7]).all()
    assert (values[:, :7] != runtime.logits(graph, ids[None], np.array([12]))[:, :7]).all()
