"""fp32 graph -> int8 graph whose result for a window does not depend on the batch.

The usual dynamic quantization takes one scale over the whole activation tensor, so a note's spans depend on its
neighbours in the batch. Here each token's activation row has its own scale::

    s = max|x| / 127        q = QuantizeLinear(x * 127 / max|x|, 1, 128)        y = MatMulIntegerToFloat(q, W) * s

With sample text at hand, an activation has one fixed scale for all text instead, which saves most passes of the chain.
What makes that precise enough: a few channels are far out in a few rows (those of ``[CLS]``), and they get further
columns for what is beyond the range of one, so that the scale need not cover them (``_Lanes``).

Weights are symmetric int8, one scale a column; the word embeddings int8, one scale a row. Two exact rewritings leave
less to round:

- What comes out of GELU is never below -0.17, and what comes out of ReLU never below 0. Shifted by that, it uses all
  256 levels instead of half of them. With a fixed scale ReLU costs nothing: rounding cuts off what is below level 0.
- Of most activations a few channels are far larger than the rest, which would set the scale for all. Channels are
  brought to like size, see :mod:`medner.export.balance`.

Attention is rewritten first, see :mod:`medner.export.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from medner.errors import ModelError
from medner.export.attention import rewrite
from medner.export.balance import balance, quantize_columns, sample_values
from medner.export.graph import MICROSOFT, Floats, Graph, answer_in_the_graph, bias_of, node

#: An activation gets one fixed scale where that costs the average row at most this many bits of its 8.
STATIC_BITS = 3.0

#: Matrices with fewer columns (the classifier) stay in fp32: they cost nothing and decide the tags.
_MIN_COLUMNS = 16
#: GELU's minimum is -0.16997, that of its approximation by tanh -0.17004.
_GELU_SHIFT = 0.1701
_TINY = 1e-12
#: Columns that an activation of a fixed scale may have beside its channels, and the loss of bits that calls for them.
_MAX_LANES, _LANE_BITS = 8, 1.2

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Quantized:
    """How many nodes became int8: matrix products, the activations that feed them, and embedding tables.

    static: activations with one fixed scale; the others have a scale for each row. shifted: activations that GELU or
    ReLU makes; balanced: those whose channels were brought to like size. lanes: columns beside the channels, over all
    activations. attention: attention blocks rewritten.
    """

    products: int
    activations: int
    tables: int
    static: int
    shifted: int
    balanced: int
    lanes: int
    attention: int


def to_int8(source: Path, target: Path, samples: Sequence[Ints] = (), static_bits: float = STATIC_BITS) -> Quantized:
    """Write the int8 form of a graph.

    samples: windows of real text, int64 [length] each, special tokens included, from which the sizes of activations
    are taken; without them every scale is a row's own. static_bits: see
    :data:`STATIC_BITS`. Raises :class:`ModelError` where there is nothing to quantize, or a weight matrix would stay
    in fp32 unnoticed.
    """
    model, blocks = rewrite(onnx.load(str(source)))
    graph = Graph(model)
    tables, products = _word_embeddings(graph), _constant_products(graph)
    if not products or not tables:
        raise ModelError(f"{len(products)} matrix products and {len(tables)} embedding tables to quantize")
    balanced = 0
    if samples:
        balanced = balance(graph, products, blocks, samples)
        graph = Graph(model)
        tables, products = _word_embeddings(graph), _constant_products(graph)
    activations = _activations(graph, products, samples, static_bits)
    for table in tables:
        _quantize_table(graph, table)
    wider = _columns_before(graph, activations)
    for activation in activations:
        _quantize_activation(graph, activation, wider)
    answer_in_the_graph(graph)
    graph.finish()
    if left := _matrices_left(graph):
        raise ModelError(f"int8 does not know this architecture; these nodes keep fp32 weights: {', '.join(left)}")
    onnx.checker.check_model(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(target))
    return Quantized(
        products=len(products),
        activations=len(activations),
        tables=len(tables),
        static=sum(activation.scale is not None for activation in activations),
        shifted=sum(activation.shift is not None for activation in activations),
        balanced=balanced,
        lanes=sum(len(activation.lanes.channels) for activation in activations if activation.lanes is not None),
        attention=len(blocks),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is there


@dataclass(slots=True)
class _Activation:
    """A value that feeds matrix products, and how its rows become int8.

    shift: what is added first, so that nothing is below 0; None where values lie on both sides of it.
    scale: the fixed scale; None gives each row its own. lanes: where the scale is fixed, the channels that go beyond it
    and what they take up there.
    """

    name: str
    products: list[onnx.NodeProto]
    shift: float | None = None
    scale: float | None = None
    lanes: _Lanes | None = None

    @property
    def zero_point(self) -> int:
        """The uint8 value that stands for 0, or in rows of their own scale for minus the shift."""
        if self.shift is None:
            return 128
        return 0 if self.scale is None else round(self.shift / self.scale)

    @property
    def levels(self) -> int:
        """Steps from 0, or from minus the shift, to the largest value."""
        return 127 if self.shift is None else 255


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Further columns of an activation's rows, for what its outliers have beyond the range of one column.

    Lane ``i`` holds ``max(signs[i] * x[channels[i]] - offsets[i], 0)``, and has its channel's weights, times the sign.
    channels: int64 [n]; signs, offsets: float32 [n].
    """

    channels: Ints
    signs: Floats
    offsets: Floats


def _constant_products(graph: Graph) -> list[onnx.NodeProto]:
    """MatMul nodes with a constant, wide enough right-hand matrix."""
    return [product for product in graph.nodes("MatMul") if _is_wide(graph, product.input[1])]


def _word_embeddings(graph: Graph) -> list[onnx.NodeProto]:
    """Gather nodes that look ``input_ids`` up in a constant table."""
    lookups = graph.nodes("Gather")
    return [lookup for lookup in lookups if lookup.input[1] == "input_ids" and len(graph.shape(lookup.input[0])) == 2]


def _matrices_left(graph: Graph) -> list[str]:
    """Nodes that still compute with a wide fp32 matrix; position tables, looked up or normalized, may stay."""
    nodes = (item for item in graph.model.graph.node if item.op_type not in ("Gather", "LayerNormalization"))
    return [f"{item.name} ({item.op_type})" for item in nodes if any(_is_wide(graph, name) for name in item.input)]


def _is_wide(graph: Graph, name: str) -> bool:
    shape = graph.shape(name)
    is_float = bool(shape) and graph.weights[name].data_type == TensorProto.FLOAT
    return is_float and len(shape) == 2 and min(shape) >= _MIN_COLUMNS


def _shift(graph: Graph, name: str) -> float | None:
    """Minus the least value that ReLU or GELU leaves; None for a value that neither makes.

    GELU as exported is products and sums of one value and of its error function. Where another value has a part in
    them, as in gated layers, nothing is known of the least.
    """
    maker = graph.makers.get(name)
    if maker is not None and maker.op_type in ("Relu", "Gelu"):
        return 0.0 if maker.op_type == "Relu" else _GELU_SHIFT
    values, erf = {name}, False
    roots: set[str] = set()
    while values:
        value = values.pop()
        maker = graph.makers.get(value)
        if maker is not None and maker.op_type in ("Mul", "Add", "Div", "Erf"):
            erf |= maker.op_type == "Erf"
            values |= set(maker.input)
        elif value not in graph.weights:
            roots.add(value)
    return _GELU_SHIFT if erf and len(roots) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Scales


def _activations(
    graph: Graph, products: Sequence[onnx.NodeProto], samples: Sequence[Ints], static_bits: float
) -> list[_Activation]:
    """The activations that feed the products, with their scales settled on the samples."""
    found: dict[str, _Activation] = {}
    for product in products:
        name = product.input[0]
        found.setdefault(name, _Activation(name, [])).products.append(product)
    activations = list(found.values())
    for activation in activations:
        if all(bias_of(graph, product) for product in activation.products):
            activation.shift = _shift(graph, activation.name)
    if not samples:
        return activations
    for activation, extent in zip(activations, _extents(graph, activations, samples), strict=True):
        for most in (0, _MAX_LANES):
            scale, lanes = _fixed_scale(activation.shift, extent.lowest, extent.highest, most)
            # Bits that the average row loses against a scale of its own.
            lost = float(np.log2(scale * activation.levels / extent.rows).mean())
            if lost <= (static_bits if most else min(static_bits, _LANE_BITS)):
                activation.scale, activation.lanes = scale, lanes
                break
    return activations


def _fixed_scale(shift: float | None, lowest: Floats, highest: Floats, most: int) -> tuple[float, _Lanes | None]:
    """The finest scale for which at most so many further columns hold what is beyond the range of one.

    shift: None for a range around 0, else minus the lowest value there is. lowest, highest: of each channel, float32
    [n].
    """

    def lanes_at(scale: float) -> list[tuple[int, float, float]]:
        zero_point = 128 if shift is None else round(shift / scale)
        sides = [(1.0, highest, (255 - zero_point) * scale)]
        if shift is None:
            sides.append((-1.0, -lowest, zero_point * scale))
        # A lane starts where its channel's own column, or the lane before, is full; it holds 255 steps.
        return [
            (int(channel), sign, first + number * 255 * scale)
            for sign, largest, first in sides
            for channel in np.flatnonzero(largest > first * (1 + 1e-6))
            for number in range(math.ceil((float(largest[channel]) - first) / (255 * scale) * (1 - 1e-6)))
        ]

    if shift is None:
        widest = float(max(highest.max(), -lowest.min(), _TINY)) / 127
    else:
        widest = float(max(highest.max() + shift, _TINY)) / 255
    low, high = widest / 64, widest
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if len(lanes_at(middle)) <= most else (middle, high)
    lanes = lanes_at(high)
    if not lanes:
        return high, None
    channels, signs, offsets = zip(*lanes, strict=True)
    return high, _Lanes(np.array(channels, np.int64), np.array(signs, np.float32), np.array(offsets, np.float32))


@dataclass(frozen=True, slots=True)
class _Extent:
    """How large an activation gets.

    lowest, highest: of each channel, float32 [n_channels]; rows: the largest magnitude in each row, shifted as it will
    be, float32 [n_tokens].
    """

    lowest: Floats
    highest: Floats
    rows: Floats


def _extents(graph: Graph, activations: Sequence[_Activation], samples: Sequence[Ints]) -> list[_Extent]:
    found: list[list[_Extent]] = [[] for _ in activations]
    for values in sample_values(graph, [activation.name for activation in activations], samples):
        for activation, seen in zip(activations, found, strict=True):
            rows = values[activation.name]
            ranges = np.maximum(np.abs(rows + np.float32(activation.shift or 0)).max(axis=1), np.float32(_TINY))
            seen.append(_Extent(rows.min(axis=0), rows.max(axis=0), ranges))
    return [
        _Extent(
            np.min([extent.lowest for extent in seen], axis=0),
            np.max([extent.highest for extent in seen], axis=0),
            np.concatenate([extent.rows for extent in seen]),
        )
        for seen in found
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting


def _columns_before(graph: Graph, activations: Sequence[_Activation]) -> dict[str, _Lanes]:
    """Lanes after ReLU that the dense layer before it can bring as columns of its own, by that layer's output.

    A lane there is a channel whose bias is less by the lane's offset: ReLU cuts off what is below.
    """
    dense = {
        bias[0].output[0]
        for activation in activations
        if activation.scale is not None
        for bias in (bias_of(graph, product) for product in activation.products)
        if bias is not None
    }
    return {
        source: activation.lanes
        for activation in activations
        if activation.lanes is not None
        and (source := _before_relu(graph, activation)) in dense
        and graph.only_user(source, "Relu") is not None
    }


def _before_relu(graph: Graph, activation: _Activation) -> str:
    """What an activation is rounded from: where ReLU makes it, what goes into ReLU, whose cut rounding makes, too."""
    return str(graph.makers[activation.name].input[0]) if activation.shift == 0 else activation.name


def _quantize_activation(graph: Graph, activation: _Activation, wider: Mapping[str, _Lanes]) -> None:
    """Replace the products that an activation feeds; the first of them brings the nodes that quantize its rows.

    wider: see :func:`_columns_before`.
    """
    if activation.scale is not None:
        nodes, row_scale = _fixed_rows(graph, activation, wider), None
    else:
        nodes, row_scale = _scaled_rows(graph, activation)
    for product in activation.products:
        nodes += _quantize_product(graph, activation, product, row_scale, wider)
        graph.replace(product.output[0], nodes)
        nodes = []


def _scaled_rows(graph: Graph, activation: _Activation) -> tuple[list[onnx.NodeProto], str]:
    """Nodes that make ``NAME.rows``, each by its own scale, and those scales."""
    name = source = magnitude = activation.name
    nodes: list[onnx.NodeProto] = []
    if activation.shift is None:
        magnitude = f"{name}.abs"
        nodes.append(node("Abs", [source], magnitude))
    elif activation.shift:
        source = magnitude = f"{name}.shifted"
        nodes.append(node("Add", [name, graph.constant("medner.gelu_shift", activation.shift)], source))
    levels_name = graph.constant(f"medner.levels.{activation.levels}", float(activation.levels))
    zero = graph.constant(f"{name}.zero", np.array(activation.zero_point, np.uint8))
    last_axis = graph.constant("medner.last_axis", np.array([-1], np.int64))
    nodes += [
        node("ReduceMax", [magnitude, last_axis], f"{name}.max", keepdims=1),
        node("Max", [f"{name}.max", graph.constant("medner.tiny", _TINY)], f"{name}.range"),
        # Two divisions a row, not one a channel.
        node("Div", [levels_name, f"{name}.range"], f"{name}.inverse"),
        node("Div", [f"{name}.range", levels_name], f"{name}.row_scale"),
        node("Mul", [source, f"{name}.inverse"], f"{name}.scaled"),
        node("QuantizeLinear", [f"{name}.scaled", graph.constant("medner.one", 1.0), zero], f"{name}.rows"),
    ]
    return nodes, f"{name}.row_scale"


def _fixed_rows(graph: Graph, activation: _Activation, wider: Mapping[str, _Lanes]) -> list[onnx.NodeProto]:
    """Nodes that make ``NAME.rows`` by one fixed scale, with further columns for its outliers."""
    name, lanes, source = activation.name, activation.lanes, _before_relu(graph, activation)
    assert activation.scale is not None
    scale = graph.constant(f"{name}.scale", activation.scale)
    zero = graph.constant(f"{name}.zero", np.array(activation.zero_point, np.uint8))
    if lanes is None or source in wider:
        return [node("QuantizeLinear", [source, scale, zero], f"{name}.rows")]
    picked = f"{name}.outliers"
    nodes = [
        node("QuantizeLinear", [source, scale, zero], f"{name}.columns"),
        node("Gather", [source, graph.constant(f"{name}.channels", lanes.channels)], picked, axis=-1),
    ]
    if (lanes.signs < 0).any():
        nodes.append(node("Mul", [picked, graph.constant(f"{name}.signs", lanes.signs)], f"{name}.signed"))
        picked = f"{name}.signed"
    # Quantizing to 0 ... 255 cuts off what the channel's own column holds.
    bottom = graph.constant("medner.bottom", np.array(0, np.uint8))
    return [
        *nodes,
        node("Sub", [picked, graph.constant(f"{name}.offsets", lanes.offsets)], f"{name}.beyond"),
        node("QuantizeLinear", [f"{name}.beyond", scale, bottom], f"{name}.lanes"),
        node("Concat", [f"{name}.columns", f"{name}.lanes"], f"{name}.rows", axis=-1),
    ]


def _quantize_product(
    graph: Graph,
    activation: _Activation,
    product: onnx.NodeProto,
    row_scale: str | None,
    wider: Mapping[str, _Lanes],
) -> list[onnx.NodeProto]:
    """Nodes that make a product from ``NAME.rows``; where it has a bias, that is added here or changed in its place."""
    (output,) = product.output
    weight = product.input[1]
    matrix = graph.array(weight)
    # Named for the weight, which several layers may share, unless it is changed for one of them.
    name = weight if activation.lanes is None else output
    added = np.zeros(matrix.shape[1], np.float32)
    values, scale = quantize_columns(matrix)
    if activation.shift and row_scale is not None:
        added -= np.float32(activation.shift) * (values.sum(axis=0, dtype=np.int64) * scale)
    if activation.lanes is not None:
        signs = activation.lanes.signs.astype(np.int8)[:, None]
        further = signs * values[activation.lanes.channels]
        values = np.concatenate([values, further])
        # In a lane 0 stands for 0, but the product takes the zero point off everywhere.
        assert activation.scale is not None
        added += activation.zero_point * activation.scale * scale * further.sum(axis=0, dtype=np.int64)
    bias = bias_of(graph, product)
    after = wider.get(bias[0].output[0]) if bias is not None else None
    if after is not None:
        name = output
        values = np.concatenate([values, values[:, after.channels]], axis=1)
        scale, added = (np.concatenate([each, each[after.channels]]) for each in (scale, added))
    weight_zero = np.array(0, np.int8)
    if name == weight and len(graph.users[weight]) > 1:
        # onnxruntime's precision option for old processors writes int8 weights anew as uint8, and fails at the second
        # product of a matrix; those that are uint8 it leaves alone.
        values, weight_zero = (values.astype(np.int16) + 128).astype(np.uint8), np.array(128, np.uint8)
    inputs = [
        f"{activation.name}.rows",
        graph.constant(f"{name}.int8", values),
        graph.constant("medner.one", 1.0) if row_scale is not None else f"{activation.name}.scale",
        graph.constant(f"{name}.column_scale", scale),
        # Zero points of its own: onnxruntime's precision option for old processors rewrites them node by node. Where
        # the weights have none, onnxruntime 1.23 ends the process, or leaves the weights to saturate.
        graph.constant(f"{output}.zero_point", np.array(activation.zero_point, np.uint8)),
        graph.constant(f"{output}.weight_zero_point", weight_zero),
    ]
    if row_scale is None:
        if bias is not None:
            # The product takes the sum's name; the addition is gone.
            add, vector = bias
            output = add.output[0]
            total_bias = graph.array(vector)
            if after is not None:
                total_bias = np.concatenate([total_bias, total_bias[after.channels] - after.offsets])
            added += total_bias
            graph.replace(output, [])
        total = graph.constant(f"{output}.bias", added)
        return [node("MatMulIntegerToFloat", [*inputs, total], output, MICROSOFT)]
    if bias is not None and added.any():
        add, vector = bias
        total = graph.constant(f"{output}.bias", graph.array(vector) + added)
        graph.replace(add.output[0], [helper.make_node("Add", [output, total], add.output, add.name)])
    return [
        node("MatMulIntegerToFloat", inputs, f"{output}.columns", MICROSOFT),
        node("Mul", [f"{output}.columns", row_scale], output),
    ]


def _quantize_table(graph: Graph, lookup: onnx.NodeProto) -> None:
    table, ids = lookup.input
    (output,) = lookup.output
    values, scale = quantize_columns(graph.array(table).T)
    rows = graph.constant(f"{table}.int8", np.ascontiguousarray(values.T))
    scales = graph.constant(f"{table}.row_scale", scale[:, None])
    graph.replace(
        output,
        [
            node("Gather", [rows, ids], f"{output}.picked"),
            node("Cast", [f"{output}.picked"], f"{output}.picked.float", to=TensorProto.FLOAT),
            node("Gather", [scales, ids], f"{output}.picked.scale"),
            node("Mul", [f"{output}.picked.float", f"{output}.picked.scale"], output),
        ],
    )
