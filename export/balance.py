"""Activations whose channels are of like size, so that one scale suits them all.

A few channels of an activation are far larger than the rest and would set the scale of its 8-bit rows for all. Here
each channel is centred and divided by a number of its own, its weights are multiplied by that number, and the bias
takes up the centre (after SmoothQuant, Xiao et al. 2023). What makes the activation brings both for nothing:

- a layer normalization in its gain and bias; the residual sum that reads the same value multiplies it back, and the
  dense layer that it is added to brings the centre in its bias;
- attention in the dense layer that makes its values, for its weights add up to one;
- ReLU in the dense layer before it, uncentred (after Nagel et al. 2019, "Data-Free Quantization").

A channel is divided by a power of its largest magnitude on sample text: the higher the power, the less is lost in the
activation and the more in the products' weights. The power is taken that leaves the least error in what they make.
Values are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from medner import runtime
from medner.export.attention import Block
from medner.export.graph import Floats, Graph, bias_of, node

Ints = npt.NDArray[np.int64]

#: Powers that are tried.
POWERS = (0.25, 0.5, 0.75, 0.9, 1.0)
#: Tokens on which they are compared.
_COMPARED = 1_024
#: No channel counts as smaller than this share of the largest: in other text it may be larger.
_SMALLEST = 1e-3
_TINY = 1e-12


def balance(graph: Graph, products: Sequence[onnx.NodeProto], blocks: Sequence[Block], samples: Sequence[Ints]) -> int:
    """Balance the activations that feed these products, and finish the graph; how many that were.

    blocks: the attention of each layer, rewritten; samples: windows of real text, int64 [length] each. An activation is
    left as it is where nothing can bring its divisors, or where one of its products has no bias to take up the centre.
    """
    dense = {layer.total: layer for layer in (_dense(graph, product) for product in products) if layer is not None}
    found = _balanceable(graph, products, blocks, dense)
    if not found:
        graph.finish()
        return 0
    sizes = _sizes(graph, [activation.name for activation in found], samples)
    for activation in found:
        size = sizes[activation.name]
        centre = np.zeros_like(size.mean) if activation.is_positive else size.mean
        largest = np.maximum(size.highest - centre, centre - size.lowest)
        weights = np.concatenate([layer.weight for layer in activation.fed], axis=1)
        divisor = best_divisor(size.rows - centre, largest, weights, is_positive=activation.is_positive)
        for layer in activation.fed:
            layer.change(layer.weight * divisor[:, None], layer.bias + centre @ layer.weight)
        if activation.maker is None:
            _normalize(graph, activation, dense, centre, divisor)
        else:
            activation.maker.change(activation.maker.weight / divisor, (activation.maker.bias - centre) / divisor)
    for layer in dense.values():
        layer.write(graph)
    graph.finish()
    return len(found)


def best_divisor(rows: Floats, largest: Floats, weights: Floats, *, is_positive: bool) -> Floats:
    """What each channel of an activation is divided by, float32 [k], of geometric mean one.

    rows: the activation on some tokens, float32 [n_tokens, k]; largest: of each channel, its largest magnitude in all
    sample text, float32 [k]; weights: what the rows are multiplied by, float32 [k, n]; is_positive: whether no value is
    below 0.
    """
    exact = rows @ weights
    errors: list[float] = []
    divisors: list[Floats] = []
    for power in POWERS:
        divisor = np.maximum(largest / max(float(largest.max()), _TINY), _SMALLEST) ** np.float32(power)
        divisor = (divisor / np.exp(np.log(divisor).mean())).astype(np.float32)
        values, scale = quantize_columns(weights * divisor[:, None])
        lowest, highest = (0, 255) if is_positive else (-128, 127)
        step = max(float((largest / divisor).max()), _TINY) / highest
        rounded = np.clip(np.rint(rows / (divisor * np.float32(step))), lowest, highest) * np.float32(step)
        errors.append(float(np.square(rounded @ (values * scale) - exact).mean()))
        divisors.append(divisor)
    return divisors[int(np.argmin(errors))]


def quantize_columns(matrix: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Symmetric int8 with one scale a column: ``matrix`` [k, n] is about ``values`` [k, n] times ``scale`` [n]."""
    scale = np.maximum(np.abs(matrix).max(axis=0), _TINY).astype(np.float32) / np.float32(127)
    values = np.clip(np.rint(matrix / scale), -127, 127).astype(np.int8)
    return values, scale


def sample_values(graph: Graph, names: Sequence[str], samples: Sequence[Ints]) -> Iterator[dict[str, Floats]]:
    """Values of some activations for each sample, float32 [length, channels]."""
    for values in runtime.activations(graph.showing(names), names, samples):
        yield {name: value.reshape(-1, value.shape[-1]) for name, value in zip(names, values, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# What is there


@dataclass(slots=True)
class _Dense:
    """A product with its bias, as it is to be. source: what it reads; total: the sum. weight: [k, n]; bias: [n]."""

    product: onnx.NodeProto
    total: str
    source: str
    weight: Floats
    bias: Floats
    is_changed: bool = False

    def change(self, weight: Floats, bias: Floats) -> None:
        self.weight, self.bias, self.is_changed = weight, bias, True

    def write(self, graph: Graph) -> None:
        if not self.is_changed:
            return
        (output,) = self.product.output
        weight = graph.constant(f"{output}.weight", self.weight.astype(np.float32))
        bias = graph.constant(f"{self.total}.bias", self.bias.astype(np.float32))
        graph.replace(output, [node("MatMul", [self.source, weight], output)])
        graph.replace(
            self.total, [helper.make_node("Add", [output, bias], [self.total], graph.makers[self.total].name)]
        )


@dataclass(frozen=True, slots=True)
class _Activation:
    """A value that feeds products, each with a bias.

    maker: the dense layer that brings its divisors, None where a layer normalization does; is_positive: whether no
    value is below 0, which then stays the centre.
    """

    name: str
    fed: list[_Dense]
    maker: _Dense | None
    is_positive: bool = False


@dataclass(frozen=True, slots=True)
class _Size:
    """An activation on sample text.

    mean, lowest, highest: of each channel, float32 [k]; rows: the activation on some tokens, float32 [n_tokens, k].
    """

    mean: Floats
    lowest: Floats
    highest: Floats
    rows: Floats


def _dense(graph: Graph, product: onnx.NodeProto) -> _Dense | None:
    bias = bias_of(graph, product)
    if bias is None:
        return None
    source, weight = product.input
    return _Dense(product, str(bias[0].output[0]), source, graph.array(weight), graph.array(bias[1]))


def _balanceable(
    graph: Graph, products: Sequence[onnx.NodeProto], blocks: Sequence[Block], dense: dict[str, _Dense]
) -> list[_Activation]:
    fed: dict[str, list[onnx.NodeProto]] = {}
    for product in products:
        fed.setdefault(product.input[0], []).append(product)
    values_of = {block.context: block.values for block in blocks}
    found = []
    for name, users in fed.items():
        layers = [layer for layer in dense.values() if layer.source == name]
        maker = graph.makers.get(name)
        if maker is None or len(layers) != len(users):
            continue
        if maker.op_type == "LayerNormalization" and len(maker.input) == 3:
            found.append(_Activation(name, layers, None))
        elif len(graph.users[name]) == len(users):
            if maker.op_type == "Relu":
                before, is_positive = maker.input[0], True
                is_free = graph.only_user(before, "Relu") is not None
            else:
                before, is_positive = values_of.get(name, ""), False
                is_free = graph.only_user(before, "Reshape") is not None
            if is_free and before in dense:
                found.append(_Activation(name, layers, dense[before], is_positive))
    return found


def _sizes(graph: Graph, names: Sequence[str], samples: Sequence[Ints]) -> dict[str, _Size]:
    tokens = sum(map(len, samples))
    step = -(-tokens // _COMPARED)
    sums = dict.fromkeys(names, np.zeros(1))
    lowest: dict[str, Floats] = dict.fromkeys(names, np.array(np.inf, np.float32))
    highest: dict[str, Floats] = dict.fromkeys(names, np.array(-np.inf, np.float32))
    some: dict[str, list[Floats]] = {name: [] for name in names}
    first = 0
    for values in sample_values(graph, names, samples):
        for name, rows in values.items():
            sums[name] = sums[name] + rows.sum(axis=0, dtype=np.float64)
            lowest[name] = np.minimum(lowest[name], rows.min(axis=0))
            highest[name] = np.maximum(highest[name], rows.max(axis=0))
            some[name].append(rows[-first % step :: step])
        first += len(next(iter(values.values())))
    return {
        name: _Size((sums[name] / tokens).astype(np.float32), lowest[name], highest[name], np.concatenate(some[name]))
        for name in names
    }


# ---------------------------------------------------------------------------------------------------------------------
# Layer normalizations


def _normalize(
    graph: Graph, activation: _Activation, dense: dict[str, _Dense], centre: Floats, divisor: Floats
) -> None:
    """Make ``NAME.balanced`` by the normalization, and ``NAME`` from it where a residual sum needs it."""
    name = activation.name
    maker, output = graph.makers[name], f"{name}.balanced"
    balanced = onnx.NodeProto()
    balanced.CopyFrom(maker)
    balanced.input[1] = graph.constant(f"{output}.gain", graph.array(maker.input[1]) / divisor)
    balanced.input[2] = graph.constant(f"{output}.bias", (graph.array(maker.input[2]) - centre) / divisor)
    balanced.output[:] = [output]
    balanced.name = f"{output}/{balanced.op_type}"
    nodes = [balanced]
    products = [layer.product for layer in activation.fed]
    others = [user for user in graph.users[name] if all(user is not product for product in products)]
    beside = _dense_beside(graph, name, others[0], dense) if len(others) == 1 else None
    if beside is not None:
        beside.change(beside.weight, beside.bias + centre)
        nodes.append(node("Mul", [output, graph.constant(f"{name}.divisor", divisor)], name))
    elif others:
        nodes.append(maker)
    graph.replace(name, nodes)
    for layer in activation.fed:
        layer.source = output


def _dense_beside(graph: Graph, name: str, total: onnx.NodeProto, dense: dict[str, _Dense]) -> _Dense | None:
    """The dense layer whose output a residual sum adds to a value; None where the sum has another form."""
    others = [other for other in total.input if other != name]
    if total.op_type != "Add" or len(others) != 1 or graph.only_user(others[0], "Add") is None:
        return None
    return dense.get(others[0])
