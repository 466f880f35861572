"""Layer normalizations whose channels are of like size, so that one scale suits them all.

What comes out of a layer normalization has a few channels far larger than the rest, which would set the scale of 8-bit
rows for all. Here each channel is centred and divided by the square root of its deviation on sample text, in the
normalization's own gain and bias; the weights of the products that it feeds are multiplied by the divisor, and their
bias takes up the centre (after SmoothQuant, Xiao et al. 2023). The residual sum that reads the same value multiplies it
back, and the dense layer that it is added to brings the centre in its bias. Values are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from medner import runtime
from medner.export.graph import Floats, Graph, bias_of, node

Ints = npt.NDArray[np.int64]


def balance(graph: Graph, products: Sequence[onnx.NodeProto], samples: Sequence[Ints]) -> int:
    """Balance the normalizations that feed these products, and finish the graph; how many that were.

    samples: windows of real text, int64 [length] each. A normalization is left as it is where one of its products has
    no bias to take up the centre.
    """
    fed: dict[str, list[onnx.NodeProto]] = {}
    for product in products:
        fed.setdefault(product.input[0], []).append(product)
    fed = {name: users for name, users in fed.items() if _can_be_balanced(graph, name, users)}
    moments = _moments(graph, list(fed), samples) if fed else {}
    added: dict[str, Floats] = {}  # to the bias, by the name of the sum
    for name, users in fed.items():
        mean, deviation = moments[name]
        divisor = np.sqrt(np.maximum(deviation, 1e-6))
        # The divisors' geometric mean is one.
        divisor = (divisor / np.exp(np.log(divisor).mean())).astype(np.float32)
        nodes = [_normalization(graph, name, mean, divisor)]
        for product in users:
            matrix = graph.array(product.input[1])
            _add(added, _sum_of(graph, product), mean @ matrix)
            weight = graph.constant(f"{product.output[0]}.weight", matrix * divisor[:, None])
            graph.replace(product.output[0], [node("MatMul", [f"{name}.balanced", weight], product.output[0])])
        others = [user for user in graph.users[name] if all(user is not product for product in users)]
        dense = _dense_beside(graph, name, others[0]) if len(others) == 1 else None
        if dense is not None:
            _add(added, dense, mean)
            nodes.append(node("Mul", [f"{name}.balanced", graph.constant(f"{name}.divisor", divisor)], name))
        elif others:
            nodes.append(graph.makers[name])
        graph.replace(name, nodes)
    for total, vector in added.items():
        _enlarge_bias(graph, total, vector)
    graph.finish()
    return len(fed)


def sample_values(graph: Graph, names: Sequence[str], samples: Sequence[Ints]) -> Iterator[dict[str, Floats]]:
    """Values of some activations for each sample, float32 [length, channels]."""
    for values in runtime.activations(graph.showing(names), names, samples):
        yield {name: value.reshape(-1, value.shape[-1]) for name, value in zip(names, values, strict=True)}


def _can_be_balanced(graph: Graph, name: str, users: Sequence[onnx.NodeProto]) -> bool:
    """A layer normalization makes it, and it feeds only products with a bias of their own."""
    maker = graph.makers.get(name)
    is_normalized = maker is not None and maker.op_type == "LayerNormalization" and len(maker.input) == 3
    return is_normalized and all(bias_of(graph, product) for product in users)


def _moments(graph: Graph, names: Sequence[str], samples: Sequence[Ints]) -> Mapping[str, tuple[Floats, Floats]]:
    """Mean and standard deviation of each channel of some activations over the samples' tokens."""
    tokens = sum(map(len, samples))
    first = dict.fromkeys(names, np.zeros(1))
    second = dict.fromkeys(names, np.zeros(1))
    for values in sample_values(graph, names, samples):
        for name, rows in values.items():
            first[name] = first[name] + rows.sum(axis=0, dtype=np.float64)
            second[name] = second[name] + (rows.astype(np.float64) ** 2).sum(axis=0)
    return {
        name: (
            (first[name] / tokens).astype(np.float32),
            np.sqrt(np.maximum(second[name] / tokens - (first[name] / tokens) ** 2, 0)).astype(np.float32),
        )
        for name in names
    }


def _normalization(graph: Graph, name: str, mean: Floats, divisor: Floats) -> onnx.NodeProto:
    """The normalization that makes ``NAME.balanced``, with centre and divisor in its gain and bias."""
    maker, output = graph.makers[name], f"{name}.balanced"
    balanced = onnx.NodeProto()
    balanced.CopyFrom(maker)
    balanced.input[1] = graph.constant(f"{output}.gain", graph.array(maker.input[1]) / divisor)
    balanced.input[2] = graph.constant(f"{output}.bias", (graph.array(maker.input[2]) - mean) / divisor)
    balanced.output[:] = [output]
    balanced.name = f"{output}/{balanced.op_type}"
    return balanced


def _sum_of(graph: Graph, product: onnx.NodeProto) -> str:
    """Name of a product's sum with its bias."""
    bias = bias_of(graph, product)
    assert bias is not None
    return str(bias[0].output[0])


def _dense_beside(graph: Graph, name: str, total: onnx.NodeProto) -> str | None:
    """The dense layer's output to which a residual sum adds a value; None where the sum has another form."""
    if total.op_type != "Add" or len(total.input) != 2 or total.input[0] == total.input[1]:
        return None
    (beside,) = (other for other in total.input if other != name)
    maker = graph.makers.get(beside)
    if maker is None or maker.op_type != "Add" or graph.only_user(beside, "Add") is None:
        return None
    makers = [graph.makers[part] for part in maker.input if part in graph.makers]
    dense = [product for product in makers if product.op_type == "MatMul" and bias_of(graph, product)]
    return beside if len(dense) == 1 else None


def _add(added: dict[str, Floats], total: str, vector: Floats) -> None:
    added[total] = added[total] + vector if total in added else vector


def _enlarge_bias(graph: Graph, total: str, vector: Floats) -> None:
    """Add a vector to the bias in a sum of a product and a bias."""
    (bias,) = (name for name in graph.makers[total].input if len(graph.shape(name)) == 1)
    (product,) = (name for name in graph.makers[total].input if name != bias)
    larger = graph.constant(f"{total}.bias", graph.array(bias) + vector)
    graph.replace(total, [helper.make_node("Add", [product, larger], [total], graph.makers[total].name)])
