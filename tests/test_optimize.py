"""int8: the documented formulas by numpy, with row scales and fixed ones, and nothing that sees the batch."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from medner import decode, runtime, testing  # noqa: E402
from medner.errors import ModelError  # noqa: E402
from medner.export import balance, optimize  # noqa: E402
from medner.export.attention import rewrite  # noqa: E402
from medner.export.graph import Graph  # noqa: E402
from medner.runtime import Session  # noqa: E402

TINY = np.float32(1e-12)
FP32, INT8 = "onnx/model.onnx", "onnx/model_int8.onnx"


@pytest.fixture(params=["small_bert", "small_bert_static", "small_relu"])
def int8(request: pytest.FixtureRequest) -> Path:
    """The int8 graph of the small BERT in both forms, and with ReLU."""
    path: Path = request.getfixturevalue(request.param)
    return path / INT8


def windows_of(rng: np.random.Generator, rows: int, width: int) -> tuple[Any, Any]:
    """Random ids of the tiny vocabulary and lengths, some shorter than the width."""
    ids = rng.integers(4, 117, size=(rows, width))
    ids[:, 0] = 2
    return ids, rng.integers(max(1, width - 5), width + 1, size=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Small graphs


def test_a_graph_without_an_activation_to_balance() -> None:
    """It is whole afterwards: constants that were nodes (ModernBERT, DeBERTa) are weights."""
    value = numpy_helper.from_array(np.ones((2, 2), np.float32), "value")
    made = helper.make_node("Constant", [], ["w"], value=value)
    body = helper.make_graph(
        [made, helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    graph = Graph(model)
    assert balance.balance(graph, graph.nodes("MatMul"), [], [np.array([1, 2])]) == 0
    onnx.checker.check_model(model)
    assert list(Graph(model).weights) == ["w"]
    session = ort.InferenceSession(model.SerializeToString())
    assert session.run(None, {"x": np.ones((1, 2), np.float32)})[0].tolist() == [[2.0, 2.0]]


def plain_product(x: Any, weight: Any) -> Any:
    """The documented formula for one matrix product, in plain numpy: float32 [..., k] by float32 [k, n]."""
    column_scale = np.maximum(np.abs(weight).max(axis=0), TINY) / np.float32(127)
    w = np.rint(weight / column_scale).astype(np.int32)
    row_scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), TINY) / np.float32(127)
    q = np.clip(np.rint(x / row_scale) + 128, 0, 255).astype(np.int32) - 128
    return (q @ w).astype(np.float32) * column_scale * row_scale


def shifted_product(x: Any, weight: Any) -> Any:
    """The same after GELU: shifted by its minimum, all 256 levels, the shift taken out again."""
    column_scale = np.maximum(np.abs(weight).max(axis=0), TINY) / np.float32(127)
    w = np.rint(weight / column_scale).astype(np.int32)
    z = x + np.float32(0.1701)
    row_scale = z.max(axis=-1, keepdims=True) / np.float32(255)
    q = np.clip(np.rint(z / row_scale), 0, 255).astype(np.int32)
    correction = np.float32(0.1701) * w.sum(axis=0).astype(np.float32) * column_scale
    return (q @ w).astype(np.float32) * column_scale * row_scale - correction


def model_of(nodes: list[Any], constants: dict[str, Any], labels: int) -> Any:
    """A graph of ``input_ids`` to ``logits``."""
    shape = ["batch", "length"]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, labels])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def chain(table: Any, *weights: Any) -> Any:
    """``logits = table[input_ids]``, then a product with each weight."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x0"], "embed")]
    for i in range(len(weights)):
        output = "logits" if i == len(weights) - 1 else f"x{i + 1}"
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [output], f"product{i}"))
    constants = {"table": table, **{f"w{i}": weight for i, weight in enumerate(weights)}}
    return model_of(nodes, constants, weights[-1].shape[1])


def one_product(table: Any, weight: Any, bias: Any, kind: str) -> Any:
    """``logits = f(table[input_ids]) @ weight + bias``; kind: f is nothing, a normalization, (gated) GELU or ReLU."""
    x = "x" if kind == "plain" else kind
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Relu", ["x"], ["relu"]),
        helper.make_node("LayerNormalization", ["x", "gain", "zeros"], ["normalized"], axis=-1),
        helper.make_node("Div", ["x", "root"], ["divided"]),
        helper.make_node("Erf", ["divided"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["above"]),
        helper.make_node("Mul", ["x", "above"], ["twice"]),
        helper.make_node("Mul", ["twice", "half"], ["gelu"]),
        helper.make_node("Mul", ["gelu", "normalized"], ["gated"]),
        helper.make_node("MatMul", [x, "weight"], ["product"]),
        helper.make_node("Add", ["bias", "product"], ["logits"]),
    ]
    constants = {
        "table": table,
        "weight": weight,
        "bias": bias,
        "gain": np.ones(table.shape[1], np.float32),
        "zeros": np.zeros(table.shape[1], np.float32),
        "root": np.float32(np.sqrt(2)),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    return model_of(nodes, constants, weight.shape[1])


def by_formula(path: Path, ids: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Logits of a graph with one product and a fixed scale: by the documented formula, and in fp32.

    Both start from the activation that the graph itself computes. Of an activation that is balanced, centre and divisor
    are read from its normalization.
    """
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (product,) = (node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat")
    name = product.input[0].removesuffix(".rows")
    rounded = (f"{name}.rows", f"{name}.columns")
    (source,) = (n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear" and n.output[0] in rounded)
    ((values,),) = runtime.activations(Graph(model).showing([source]), [source], [ids])
    x = values[0]
    k = weight.shape[0]
    divisor, centre = np.ones(k, np.float32), np.zeros(k, np.float32)
    if f"{name}.gain" in constants:
        divisor = 1 / constants[f"{name}.gain"]
        centre = -constants[f"{name}.bias"] * divisor
    column_scale = np.abs(weight * divisor[:, None]).max(axis=0) / np.float32(127)
    matrix = np.rint(weight * divisor[:, None] / column_scale)
    scale, zero = constants[f"{name}.scale"], int(constants[f"{name}.zero"])
    steps = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    if f"{name}.channels" in constants:
        channels, offsets = constants[f"{name}.channels"], constants[f"{name}.offsets"]
        signs = constants.get(f"{name}.signs", np.ones(len(channels), np.float32))
        for channel, sign, offset in zip(channels, signs, offsets, strict=True):
            steps[:, channel] += sign * np.clip(np.rint((sign * x[:, channel] - offset) / scale), 0, 255)
    if name == "relu":
        x = np.maximum(x, 0)
    return (
        (steps @ matrix) * scale * column_scale + centre @ weight + bias,
        (x * divisor + centre) @ weight + bias,
    )


def test_quantize_columns() -> None:
    """One scale a column, its largest weight at 127; the error is at most half a step; a zero column stays zero."""
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(40, 24)) * np.geomspace(1e-6, 1e3, 24)).astype(np.float32)
    matrix[:, 5] = 0
    values, scale = optimize.quantize_columns(matrix)
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (np.int8, np.float32, (40, 24), (24,))
    assert (np.abs(values).max(axis=0) == [0 if i == 5 else 127 for i in range(24)]).all()
    assert (np.abs(values * scale - matrix) <= 0.5001 * scale).all()
    assert np.array_equal(values, np.rint(matrix / scale))
    assert (scale > 0).all()


def test_row_scales_are_the_documented_formula(tmp_path: Path) -> None:
    """Random tables and weights, zero rows and columns among them: the int8 graph equals plain numpy, bit for bit."""
    rng = np.random.default_rng(1)
    table = (rng.normal(size=(50, 32)) * np.geomspace(1e-3, 1e2, 50)[:, None]).astype(np.float32)
    table[7] = 0
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((32, 48), (48, 20))]
    weights[0][:, 3] = 0
    onnx.save(chain(table, *weights), tmp_path / "fp32.onnx")
    done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "new" / "int8.onnx")
    assert done == quantized(products=2, activations=2)

    ids = rng.integers(0, 50, size=(6, 16))
    ids[0, :3] = 7
    session = Session(tmp_path / "new" / "int8.onnx", "cpu")
    logits = session(ids, np.full(6, 16))
    row_scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), TINY) / np.float32(127)
    x = (np.rint(table / row_scale) * row_scale)[ids]
    for weight in weights:
        x = plain_product(x, weight)
    assert np.isfinite(logits).all()
    assert (logits[0, :3] == 0).all()
    np.testing.assert_array_equal(logits, x)
    # The logits of a graph with many classes are a product themselves, and answers are made from them.
    assert session.best(ids, np.full(6, 16))[0].tolist() == decode.best(x)[0].tolist()


def quantized(**counts: int) -> optimize.Quantized:
    """Counts of a graph with one product and one table, but for those given."""
    plain = {"products": 1, "activations": 1, "tables": 1}
    others = dict.fromkeys(("static", "shifted", "balanced", "lanes", "attention"), 0)
    return optimize.Quantized(**plain | others | counts)


#: Tokens whose rows have outliers, tokens without, both; and three with outliers ten times as far.
OUTLIERS, EVEN, ALL, BEYOND = [0, 1], np.arange(2, 200), np.arange(200), [200, 201, 202]


def outlier_table(rng: np.random.Generator) -> Any:
    """Rows of 64 channels, of which one has a channel far above the others and one a channel far below."""
    table = rng.normal(size=(203, 64)).astype(np.float32)
    table[0, 5], table[1, 9] = 40, -60
    table[BEYOND[:2]] = 10 * table[OUTLIERS]
    table[202, 20] = 500
    return table


@pytest.mark.parametrize("kind", ["plain", "normalized", "gelu", "relu", "gated"])
def test_fixed_scales_are_the_documented_formula(tmp_path: Path, kind: str) -> None:
    """Where no channel is far out, one scale for all text and no lane: the graph equals numpy."""
    rng = np.random.default_rng(2)
    table, weight = outlier_table(rng), rng.normal(size=(64, 20)).astype(np.float32)
    bias = rng.normal(size=20).astype(np.float32)
    onnx.save(one_product(table, weight, bias, kind), tmp_path / "fp32.onnx")
    done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [EVEN[:9], EVEN[9:]])
    counts = {"shifted": int(kind in ("gelu", "relu")), "balanced": int(kind == "normalized")}
    # Products of two values are far out now and then; nothing is known of their least.
    assert done == quantized(static=1, lanes=done.lanes if kind == "gated" else 0, **counts)
    session = Session(tmp_path / "int8.onnx", "cpu")
    for ids in (EVEN, np.array(OUTLIERS)):
        expected, exact = by_formula(tmp_path / "int8.onnx", ids, weight, bias)
        logits = session(ids[None], np.array([len(ids)]))[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)
        # Outliers that no sample had are cut off.
        assert (np.abs(logits - exact).max() < 1) == (ids is EVEN)


@pytest.mark.parametrize("kind", ["plain", "gelu", "relu"])
def test_lanes_are_the_documented_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Outliers in few rows get further columns: the graph equals numpy, and the scale is finer than without them.

    What goes beyond the range of all a channel's columns is cut off there; it does not come out at the other end.
    """
    rng = np.random.default_rng(2)
    table, weight = outlier_table(rng), rng.normal(size=(64, 20)).astype(np.float32)
    bias = rng.normal(size=20).astype(np.float32)
    onnx.save(one_product(table, weight, bias, kind), tmp_path / "fp32.onnx")
    source, target = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    done = optimize.to_int8(source, target, [ALL])
    assert 1 <= done.lanes <= 8
    kinds = {"shifted": int(kind in ("gelu", "relu"))}
    assert done == quantized(static=1, lanes=done.lanes, **kinds)
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    (scale,) = (value for name, value in constants.items() if name.endswith(".scale") and value.ndim == 0)
    (channels,) = (value.tolist() for name, value in constants.items() if name.endswith(".channels"))
    signs = next((value.tolist() for name, value in constants.items() if name.endswith(".signs")), [1] * len(channels))
    # GELU and ReLU leave nothing of the channel that is far below.
    sides = {(5, 1.0)} if kind in ("gelu", "relu") else {(5, 1.0), (9, -1.0)}
    assert sides <= set(zip(channels, signs, strict=True))

    session = Session(target, "cpu")
    ids = np.array([*ALL, *BEYOND])
    expected, exact = by_formula(target, ids, weight, bias)
    logits = session(ids[None], np.array([203]))[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-3)
    error = np.abs(logits - exact)[ALL].mean()

    monkeypatch.setattr(optimize, "_LANE_BITS", 99)
    assert optimize.to_int8(source, target, [ALL], static_bits=99) == quantized(static=1, **kinds)
    coarse = {t.name: numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    (coarse_scale,) = (value for name, value in coarse.items() if name.endswith(".scale") and value.ndim == 0)
    assert scale < 0.7 * coarse_scale
    without, exact = by_formula(target, ALL, weight, bias)
    assert error < 0.8 * np.abs(without - exact).mean()


def test_lanes_after_relu_are_columns_of_the_dense_layer_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer before ReLU makes the lanes, as good as picking them afterwards; ReLU and lanes need no operator."""
    rng = np.random.default_rng(2)
    table, first = rng.normal(size=(203, 64)).astype(np.float32), rng.normal(size=(64, 48)).astype(np.float32)
    first[:, [7, 30]] *= 40
    second = rng.normal(size=(48, 20)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "first"], ["wide"]),
        helper.make_node("Add", ["wide", "first_bias"], ["biased"]),
        helper.make_node("Relu", ["biased"], ["relu"]),
        helper.make_node("MatMul", ["relu", "second"], ["product"]),
        helper.make_node("Add", ["product", "second_bias"], ["logits"]),
    ]
    biases = {"first_bias": rng.normal(size=48).astype(np.float32), "second_bias": np.ones(20, np.float32)}
    onnx.save(model_of(nodes, {"table": table, "first": first, "second": second} | biases, 20), tmp_path / "fp32.onnx")
    monkeypatch.setattr(balance, "POWERS", (0.0,))
    done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "wide.onnx", [ALL])
    assert done == quantized(products=2, activations=2, static=2, shifted=1, balanced=1, lanes=done.lanes)
    wide = onnx.load(tmp_path / "wide.onnx")
    shapes = {tensor.name: list(tensor.dims) for tensor in wide.graph.initializer}
    products = [shapes[node.input[1]] for node in wide.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert products == [[64, 48 + done.lanes], [48 + done.lanes, 20]]
    assert done.lanes >= 2
    assert {"Relu", "Concat", "Sub"}.isdisjoint(node.op_type for node in wide.graph.node)

    monkeypatch.setattr(optimize, "_columns_before", lambda *_: {})
    optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "picked.onnx", [ALL])
    assert "Concat" in {node.op_type for node in onnx.load(tmp_path / "picked.onnx").graph.node}
    ids, lengths = np.arange(203)[None], np.array([203])
    wide_logits, picked, exact = (
        Session(tmp_path / f"{name}.onnx", "cpu")(ids, lengths) for name in ("wide", "picked", "fp32")
    )
    np.testing.assert_allclose(wide_logits, picked, rtol=1e-5, atol=1e-3)
    assert np.abs(wide_logits - exact)[0, ALL].mean() < 0.02 * np.abs(exact).mean()


def test_a_balanced_residual(tmp_path: Path) -> None:
    """The residual sum beside a balanced normalization is fed by it, and the dense layer's bias brings the centre.

    One normalization is left of each, and all that balancing changes is rounding.
    """
    rng = np.random.default_rng(4)
    table = (rng.normal(size=(200, 32)) + 5 * np.arange(32) / 32).astype(np.float32)
    gain = np.geomspace(0.1, 20, 32).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["normal"], axis=-1),
        helper.make_node("MatMul", ["normal", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["dense"]),
        helper.make_node("Add", ["dense", "normal"], ["logits"]),
    ]
    constants = {
        "table": table,
        "gain": gain,
        "shift": rng.normal(size=32).astype(np.float32),
        "weight": rng.normal(size=(32, 32)).astype(np.float32),
        "bias": rng.normal(size=32).astype(np.float32),
    }
    model = model_of(nodes, constants, 32)
    graph = Graph(model)
    ids, lengths = np.arange(200)[None], np.array([200])
    before = runtime.logits(model.SerializeToString(), ids, lengths)
    assert balance.balance(graph, graph.nodes("MatMul"), [], [ALL]) == 1
    after = runtime.logits(model.SerializeToString(), ids, lengths)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds == {"Gather": 1, "LayerNormalization": 1, "MatMul": 1, "Mul": 1, "Add": 2}
    ((balanced,),) = runtime.activations(Graph(model).showing(["normal.balanced"]), ["normal.balanced"], [ALL])
    np.testing.assert_allclose(balanced[0].mean(axis=0), 0, atol=1e-3)
    spread = balanced[0].std(axis=0)
    assert spread.max() / spread.min() < np.sqrt(gain.max() / gain.min()) * 1.5


def test_outliers_that_balancing_takes_care_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a normalization a few far channels need no lane: their divisors do, and less is lost than without."""
    rng = np.random.default_rng(2)
    table, weight = outlier_table(rng), rng.normal(size=(64, 20)).astype(np.float32)
    onnx.save(one_product(table, weight, np.ones(20, np.float32), "normalized"), tmp_path / "fp32.onnx")
    ids, lengths = ALL[None], np.array([200])
    exact = Session(tmp_path / "fp32.onnx", "cpu")(ids, lengths)
    monkeypatch.setattr(optimize, "_LANE_BITS", 99)
    errors = []
    for powers in (balance.POWERS, (0.0,)):
        monkeypatch.setattr(balance, "POWERS", powers)
        done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [ALL], static_bits=99)
        assert (done.balanced, done.lanes, done.static) == (1, 0, 1)
        errors.append(np.abs(Session(tmp_path / "int8.onnx", "cpu")(ids, lengths) - exact).mean())
    assert errors[0] < 0.7 * errors[1]


def test_the_best_divisor() -> None:
    """Channels of one size are left alone; of very different ones, large ones are divided by more, and less is lost."""
    rng = np.random.default_rng(6)
    rows, weights = rng.uniform(-1, 1, (500, 16)).astype(np.float32), rng.normal(size=(16, 24)).astype(np.float32)
    rows[0] = 1
    np.testing.assert_allclose(balance.best_divisor(rows, np.ones(16, np.float32), weights, is_positive=False), 1)

    sizes = np.geomspace(0.2, 100, 16).astype(np.float32)
    rows, weights = rows * sizes, weights / sizes[:, None]
    divisor = balance.best_divisor(rows, sizes, weights, is_positive=False)
    assert divisor.dtype == np.float32
    assert np.exp(np.log(divisor).mean()) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(divisor / divisor[0], sizes / sizes[0], rtol=0.1)
    # A channel that was never there is divided by no more than a thousandth of the largest one's divisor.
    sizes[3] = 0
    divisor = balance.best_divisor(rows * (sizes > 0), sizes, weights, is_positive=True)
    assert np.isfinite(divisor).all()
    assert divisor.min() > 0


def test_balancing_a_transformer(small_relu: Path, tmp_path: Path) -> None:
    """Two layers of BERT with ReLU: four normalizations, two contexts, two ReLUs; all that changes is rounding."""
    model, blocks = rewrite(onnx.load(small_relu / FP32))
    graph = Graph(model)
    ids, lengths = windows_of(np.random.default_rng(8), 6, 30)
    inside = np.arange(30) < lengths[:, None]
    before = runtime.logits(model.SerializeToString(), ids, lengths)[inside]
    samples = [np.random.default_rng(9).integers(4, 117, size) for size in range(10, 30)]
    assert balance.balance(graph, optimize._constant_products(graph), blocks, samples) == 8
    after = runtime.logits(model.SerializeToString(), ids, lengths)[inside]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    # No operator more than one product a residual sum; the last normalization feeds none.
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["LayerNormalization"] == 5
    names = [f"{block.context}" for block in blocks]
    names += [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    names += [node.output[0] for node in model.graph.node if node.output[0].endswith(".balanced")]
    assert len(names) == 8
    for values in zip(*runtime.activations(Graph(model).showing(names), names, samples), strict=True):
        rows = np.concatenate([value.reshape(-1, value.shape[-1]) for value in values])
        largest = np.abs(rows).max(axis=0)
        assert largest.max() < 8 * np.median(largest)


def test_values_beyond_all_lanes_are_cut_off(tmp_path: Path) -> None:
    """A channel ten times as far out as in any sample counts as far as its columns reach, and no less than was seen."""
    rng = np.random.default_rng(2)
    table = outlier_table(rng)
    # Logits 5, 9 and 20 are those channels.
    weight, bias = np.eye(64, dtype=np.float32), np.zeros(64, np.float32)
    onnx.save(one_product(table, weight, bias, "plain"), tmp_path / "fp32.onnx")
    optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [ALL])
    logits = Session(tmp_path / "int8.onnx", "cpu")(np.array([[*OUTLIERS, *BEYOND]]), np.array([5]))[0]
    assert logits[0, 5] == pytest.approx(40, abs=0.05)
    assert logits[1, 9] == pytest.approx(-60, abs=0.05)
    assert 39.9 < logits[2, 5] < 55
    assert -75 < logits[3, 9] <= -59.9
    assert 2 < logits[4, 20] < 10


def test_scales_and_lanes_worked_by_hand() -> None:
    """Channels from -1 to 1, but one up to 10: with one lane, 127 + 255 steps reach 10; with none, 127 do.

    After GELU 510 steps of two columns reach from -0.17 to 10. A channel from -10 to 10 needs two lanes.
    """
    lowest, highest = -np.ones(4, np.float32), np.ones(4, np.float32)
    highest[2] = 10
    scale, lanes = optimize._fixed_scale(None, lowest, highest, 0)
    assert (scale, lanes) == (pytest.approx(10 / 127, rel=1e-5), None)
    scale, lanes = optimize._fixed_scale(None, lowest, highest, 1)
    assert lanes is not None
    assert scale == pytest.approx(10 / (127 + 255), rel=1e-5)
    assert (lanes.channels.tolist(), lanes.signs.tolist()) == ([2], [1])
    assert lanes.offsets.tolist() == pytest.approx([127 * scale])
    assert (lanes.channels.dtype, lanes.signs.dtype, lanes.offsets.dtype) == (np.int64, np.float32, np.float32)

    scale, lanes = optimize._fixed_scale(0.1701, np.full(4, -0.17, np.float32), highest, 1)
    assert lanes is not None
    zero = round(0.1701 / scale)
    assert scale == pytest.approx(10 / (510 - zero), rel=1e-5)
    assert (lanes.channels.tolist(), lanes.signs.tolist()) == ([2], [1])
    assert lanes.offsets.tolist() == pytest.approx([(255 - zero) * scale])

    lowest[2] = -10
    scale, lanes = optimize._fixed_scale(None, lowest, highest, 2)
    assert lanes is not None
    assert (lanes.channels.tolist(), lanes.signs.tolist()) == ([2, 2], [1, -1])
    assert lanes.offsets.tolist() == pytest.approx([127 * scale, 128 * scale])
    assert scale == pytest.approx(10 / (127 + 255), rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "normalized", "gelu", "relu"])
def test_a_balanced_row_scale(tmp_path: Path, kind: str) -> None:
    """Where a fixed scale would lose too much, samples still balance; the bias takes up what that changes."""
    rng = np.random.default_rng(3)
    table, weight = rng.normal(size=(200, 64)).astype(np.float32), rng.normal(size=(64, 20)).astype(np.float32)
    table[:, 7] = 30
    bias = rng.normal(size=20).astype(np.float32)
    onnx.save(one_product(table, weight, bias, kind), tmp_path / "fp32.onnx")
    done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [ALL], static_bits=-np.inf)
    assert done == quantized(shifted=int(kind in ("gelu", "relu")), balanced=int(kind == "normalized"))
    ids, lengths = ALL[None], np.array([200])
    fp32, logits = (Session(tmp_path / name, "cpu")(ids, lengths) for name in ("fp32.onnx", "int8.onnx"))
    assert np.abs(logits - fp32).max() < {"plain": 4, "normalized": 1, "gelu": 4, "relu": 4}[kind]
    assert np.abs(fp32).max() > 10


def test_a_graph_without_anything_to_quantize(tmp_path: Path) -> None:
    """No product with a wide constant, or no table that input_ids look up, is an error that counts both."""
    shutil.copyfile(testing.bundle() / "onnx/model.onnx", tmp_path / "tiny.onnx")
    with pytest.raises(ModelError) as failure:
        optimize.to_int8(tmp_path / "tiny.onnx", tmp_path / "int8.onnx")
    assert str(failure.value) == "0 matrix products and 2 embedding tables to quantize"
    assert not (tmp_path / "int8.onnx").exists()


def test_weights_that_would_stay_fp32(tmp_path: Path) -> None:
    """A weight matrix in a node of another kind is an error, not a graph that is half int8."""
    table, weight = np.ones((50, 32), np.float32), np.ones((32, 32), np.float32)
    model = chain(table, weight, weight, weight)
    model.graph.node[2].op_type = "Gemm"
    onnx.save(model, tmp_path / "gemm.onnx")
    with pytest.raises(ModelError) as failure:
        optimize.to_int8(tmp_path / "gemm.onnx", tmp_path / "int8.onnx")
    assert str(failure.value) == (
        "int8 does not know this architecture; these nodes keep fp32 weights: product1 (Gemm)"
    )
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize("samples", [[], [np.arange(32)]], ids=["row scales", "fixed scales"])
def test_weights_that_layers_share(tmp_path: Path, samples: list[Any]) -> None:
    """A matrix used by two layers is stored once, as uint8.

    Where products of uint8 and int8 saturate, onnxruntime would write an int8 matrix anew for each layer, and fail at
    the second.
    """
    table, weight = np.eye(32, dtype=np.float32), np.full((32, 32), 0.5, np.float32)
    model = chain(table, weight, weight)
    # As Optimum writes the shared layers of ALBERT.
    model.graph.node.insert(0, helper.make_node("Identity", ["w0"], ["again"]))
    model.graph.node[3].input[1] = "again"
    onnx.save(model, tmp_path / "fp32.onnx")
    done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", samples)
    assert done == quantized(products=2, activations=2, static=2 if samples else 0)
    matrices = [t for t in onnx.load(tmp_path / "int8.onnx").graph.initializer if list(t.dims) == [32, 32]]
    assert Counter(matrix.data_type for matrix in matrices) == {TensorProto.INT8: 1, TensorProto.UINT8: 1}
    logits = Session(tmp_path / "int8.onnx", "cpu")(np.arange(8)[None], np.array([8]))
    np.testing.assert_allclose(logits, np.full((1, 8, 32), 8.0), rtol=1e-5)


def test_shared_weights_with_lanes(tmp_path: Path) -> None:
    """Layers that share a matrix and have outliers in different channels each get their own lanes of it."""
    rng = np.random.default_rng(5)
    table, weight = outlier_table(rng), (np.eye(64)[::-1] + rng.normal(size=(64, 64)) / 50).astype(np.float32)
    model = chain(table, weight, weight)
    model.graph.node[2].input[1] = "w0"
    onnx.save(model, tmp_path / "fp32.onnx")
    done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [ALL])
    assert done == quantized(products=2, activations=2, static=2, lanes=done.lanes)
    channels = [t for t in onnx.load(tmp_path / "int8.onnx").graph.initializer if t.name.endswith(".channels")]
    first, second = (set(numpy_helper.to_array(t).tolist()) for t in channels)
    assert first != second
    fp32, int8 = (Session(tmp_path / name, "cpu")(ALL[None], np.array([200])) for name in ("fp32.onnx", "int8.onnx"))
    assert np.abs(int8 - fp32).max() < 1.5
    assert np.abs(fp32).max() > 50


# ---------------------------------------------------------------------------------------------------------------------
# A transformer


def test_counts_of_int8_nodes(small_bert: Path, int8: Path) -> None:
    """Two layers of BERT: six products each, of which Q, K and V share an activation; the embeddings are int8."""
    graph = onnx.load(int8).graph
    initializers = {t.name: t for t in graph.initializer}
    products = [n for n in graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 12
    assert {initializers[n.input[1]].data_type for n in products} == {TensorProto.INT8}
    # onnxruntime's option for processors without VNNI rewrites zero points node by node, and needs the weights' own.
    for place, kind in ((4, TensorProto.UINT8), (5, TensorProto.INT8)):
        assert len({n.input[place] for n in products}) == 12
        assert {initializers[n.input[place]].data_type for n in products} == {kind}
    tables = [initializers[n.input[0]] for n in graph.node if n.op_type == "Gather" and n.input[1] == "input_ids"]
    assert [(t.data_type, list(t.dims)) for t in tables] == [
        (TensorProto.INT8, [117, 64]),
        (TensorProto.FLOAT, [117, 1]),
    ]
    # What is left in fp32: position and type tables, the classifier, and vectors.
    wide = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and min(t.dims) > 3]
    assert [tuple(t.dims) for t in wide] == [(64, 64)]
    assert int8.stat().st_size < 0.55 * (small_bert / FP32).stat().st_size


def test_what_was_quantized(small_bert: Path, tmp_path: Path) -> None:
    """Counts of both forms. Four of the five normalizations feed products, two contexts and two GELUs do."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(4, 117, size) for size in range(10, 30)]
    rows = optimize.to_int8(small_bert / FP32, tmp_path / "int8.onnx")
    fixed = optimize.to_int8(small_bert / FP32, tmp_path / "int8.onnx", samples)
    common = {"products": 12, "activations": 8, "shifted": 2, "attention": 2}
    assert rows == quantized(**common)
    assert fixed == quantized(**common, static=8, balanced=6, lanes=fixed.lanes)


def load(path: Path, tmp_path: Path, **entries: str) -> Any:
    """The graph as onnxruntime optimizes it, with entries of the session's configuration."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimized.onnx").graph


def test_onnxruntime_fuses_no_product(int8: Path, tmp_path: Path) -> None:
    """After optimization the products are the same: another fusion would take the row scale for a scalar."""
    kinds = Counter(node.op_type for node in load(int8, tmp_path).node)
    assert {name: n for name, n in kinds.items() if "MatMul" in name or "Attention" in name} == {
        "MatMulIntegerToFloat": 12,
        "FusedMatMul": 4,
        "MatMul": 1,
    }


def test_the_option_for_old_processors(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With session.x64quantprecision=1 onnxruntime makes the weights uint8, whose products cannot saturate.

    Where the processor sums 8-bit products exactly, the logits are the same bits with it and without.
    """
    exact = runtime.has_exact_int8()
    graph = load(int8, tmp_path, x64quantprecision="1")
    initializers = {t.name: t.data_type for t in graph.initializer}
    products = [n for n in graph.node if n.op_type == "MatMulIntegerToFloat"]
    kinds = Counter((initializers[n.input[1]], initializers[n.input[5]]) for n in products)
    rewritten, as_it_was = {(TensorProto.UINT8,) * 2: 12}, {(TensorProto.INT8,) * 2: 12}
    # Some versions leave the weights where the processor does not need it.
    assert kinds in ([rewritten, as_it_was] if exact else [rewritten])

    ids, lengths = windows_of(np.random.default_rng(6), 6, 40)
    inside = np.arange(40) < lengths[:, None]
    plain = Session(int8, "cpu")(ids, lengths)[inside]
    monkeypatch.setattr(runtime, "has_exact_int8", lambda: False)
    careful = Session(int8, "cpu")(ids, lengths)[inside]
    fp32 = Session(int8.parent / "model.onnx", "cpu")(ids, lengths)[inside]
    assert (careful.argmax(axis=-1) == fp32.argmax(axis=-1)).mean() > 0.9
    if exact:
        assert careful.tolist() == plain.tolist()


def test_answers_equal_the_logits(int8: Path) -> None:
    """``tag`` and ``probability`` are what decoding the logits gives, in padded batches of several shapes."""
    session = Session(int8, "cpu")
    assert session.gives_best
    rng = np.random.default_rng(7)
    for rows, width in ((1, 1), (3, 8), (12, 40)):
        ids, lengths = windows_of(rng, rows, width)
        inside = np.arange(width) < lengths[:, None]
        tags, probabilities = session.best(ids, lengths)
        expected_tags, expected = decode.best(session(ids, lengths))
        assert (tags.dtype, probabilities.dtype, tags.shape, probabilities.shape) == (
            np.int16,
            np.float32,
            (rows, width),
            (rows, width),
        )
        assert tags[inside].tolist() == expected_tags[inside].tolist()
        np.testing.assert_allclose(probabilities[inside], expected[inside], rtol=0, atol=1e-6)
    assert set(tags[inside].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("width", [1, 8, 13, 40])
def test_a_window_does_not_depend_on_its_batch(int8: Path, width: int) -> None:
    """Logits are the same bits for a window alone, in a batch, and with other partners, at one padded length."""
    rng = np.random.default_rng(2)
    ids, lengths = windows_of(rng, 12, width)
    shuffled = rng.permutation(12)
    for session in (Session(int8, "cpu"), Session(int8.parent / "model.onnx", "cpu")):
        together = session(ids, lengths)
        again = session(ids[shuffled[:5]], lengths[shuffled[:5]])
        for row in range(12):
            alone = session(ids[row : row + 1], lengths[row : row + 1])
            np.testing.assert_array_equal(alone[0, : lengths[row]], together[row, : lengths[row]])
        for place, row in enumerate(shuffled[:5]):
            np.testing.assert_array_equal(again[place, : lengths[row]], together[row, : lengths[row]])


def emulated(checkpoint: Path, ids: Any) -> Any:
    """PyTorch's logits with every product of the encoder and the word table by the documented formula."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    intermediate = model.config.intermediate_size

    def by_rows(layer: Any, inputs: Any, _: Any) -> Any:
        # What comes out of GELU is as wide as the intermediate layer.
        product = shifted_product if layer.in_features == intermediate else plain_product
        return torch.from_numpy(product(inputs[0].numpy(), layer.weight.detach().numpy().T)) + layer.bias

    for layer in model.bert.encoder.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(by_rows)
    table = model.bert.embeddings.word_embeddings.weight
    with torch.inference_mode():
        scale = table.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        table.copy_((table / scale).round() * scale)
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


def test_row_scales_equal_an_emulation_of_the_formula(small_bert: Path) -> None:
    """Without samples the graph gives the logits of PyTorch with the documented formula, far closer than fp32 does."""
    ids = np.random.default_rng(3).integers(4, 117, size=(16, 40))
    lengths = np.full(16, 40)
    expected = emulated(small_bert.parent / "checkpoint", ids)
    fp32 = Session(small_bert / FP32, "cpu")(ids, lengths)
    int8 = Session(small_bert / INT8, "cpu")(ids, lengths)
    assert np.abs(int8 - expected).mean() < 0.05 * np.abs(fp32 - expected).mean()


def test_large_channels_are_balanced(small_bert: Path, tmp_path: Path) -> None:
    """With a few channels far from the others, samples bring int8 much closer to fp32, on other text than theirs."""
    model = onnx.load(small_bert / FP32)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("LayerNorm.bias"):
            bias = numpy_helper.to_array(tensor).copy()
            bias[[3, 40]] += [25.0, -40.0]
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    rng = np.random.default_rng(4)
    ids, lengths = rng.integers(4, 117, size=(16, 40)), np.full(16, 40)
    fp32 = Session(tmp_path / "fp32.onnx", "cpu")(ids, lengths)
    errors = []
    for samples in ((), list(rng.integers(4, 117, size=(20, 30)))):
        done = optimize.to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", samples)
        assert done.balanced == (6 if samples else 0)
        errors.append(np.abs(Session(tmp_path / "int8.onnx", "cpu")(ids, lengths) - fp32).mean())
    assert errors[1] < 0.5 * errors[0]
