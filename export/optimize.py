"""fp32 graph -> int8 graph whose result for a window does not depend on the batch.

The usual dynamic quantization takes one scale over the whole activation tensor, so a note's spans depend on its
neighbours in the batch. Here each token's activation row has its own scale, in standard ONNX operators::

    s = max|x| / 127        q = QuantizeLinear(x / s, 1, 128)        y = Cast(MatMulInteger(q, W)) * column_scale * s

Weights are symmetric int8, one scale a column; the word embeddings int8, one scale a row. Two exact rewritings leave
less to round:

- What comes out of GELU is never below -0.17. Shifted by that, it uses all 256 levels instead of half of them.
- What comes out of a layer normalization has a few channels far larger than the rest, which set the scale for all. A
  second normalization centres the channels and divides each by the square root of its deviation on sample text; the
  weights are multiplied by it, and the bias takes up the centre (after SmoothQuant, Xiao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from medner import runtime
from medner.errors import ModelError

#: Matrices with fewer columns (the classifier) stay in fp32: they cost nothing and decide the tags.
_MIN_COLUMNS = 16
#: GELU's minimum is -0.16997, that of its approximation by tanh -0.17004.
_GELU_SHIFT = 0.1701

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quantized:
    """How many nodes became int8: matrix products, the activation chains that feed them, and embedding tables.

    shifted, balanced: how many of the activations were shifted after GELU, or balanced after a layer normalization.
    """

    products: int
    activations: int
    tables: int
    shifted: int
    balanced: int


def to_int8(source: Path, target: Path, samples: Sequence[Ints] = ()) -> Quantized:
    """Write the int8 form of a graph.

    samples: windows of real text, int64 [length] each, special tokens included, from which the channels' means and
    deviations are taken; without them no activation is balanced. Raises :class:`ModelError` where there is nothing to
    quantize, or a weight matrix would stay in fp32 unnoticed.
    """
    model = onnx.load(str(source))
    graph = _Graph(model)
    tables, products = graph.word_embeddings(), graph.constant_products()
    if not products or not tables:
        raise ModelError(f"{source}: {len(products)} matrix products and {len(tables)} embedding tables to quantize")
    normalized = graph.normalized_activations()
    if samples and normalized:
        graph.balance(_moments(graph.showing(normalized), normalized, samples))
    for node in tables:
        graph.quantize_table(node)
    for node in products:
        graph.quantize_product(node)
    graph.finish()
    if left := graph.matrices_left():
        raise ModelError(f"{source}: int8 is for graphs of Optimum's; these nodes keep fp32 weights: {', '.join(left)}")
    onnx.checker.check_model(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(target))
    return Quantized(len(products), len(graph.activations), len(tables), len(graph.shifted), len(graph.balances))


def _moments(graph: bytes, names: Sequence[str], samples: Sequence[Ints]) -> dict[str, tuple[Floats, Floats]]:
    """Mean and standard deviation of each channel of some activations over the samples' tokens."""
    tokens = 0
    sums: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
    for ids, values in zip(samples, runtime.activations(graph, names, samples), strict=True):
        tokens += len(ids)
        for name, value in zip(names, values, strict=True):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
            first, second = sums.get(name, (0.0, 0.0))
            sums[name] = first + rows.sum(axis=0), second + (rows**2).sum(axis=0)
    return {
        name: ((first / tokens).astype(np.float32), np.sqrt(np.maximum(second / tokens - (first / tokens) ** 2, 0)))
        for name, (first, second) in sums.items()
    }


class _Graph:
    """A graph being rewritten: nodes are replaced in place, so that their order stays topological."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._graph = model.graph
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._name_shared_weights()
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._biases = self._bias_additions()
        self._new: dict[str, list[onnx.NodeProto]] = {}
        #: The quantized rows of each activation, their scale, and the zero point.
        self.activations: dict[str, tuple[str, str, int]] = {}
        self.shifted: set[str] = set()
        self.balances: dict[str, tuple[Floats, Floats]] = {}
        self._constant("medner.one", np.array(1.0, np.float32))
        self._constant("medner.middle", np.array(128, np.uint8))
        self._constant("medner.bottom", np.array(0, np.uint8))
        self._constant("medner.half_range", np.array(127.0, np.float32))
        self._constant("medner.full_range", np.array(255.0, np.float32))
        self._constant("medner.gelu_shift", np.array(_GELU_SHIFT, np.float32))
        self._constant("medner.tiny", np.array(1e-12, np.float32))
        self._constant("medner.last_axis", np.array([-1], np.int64))

    def _name_shared_weights(self) -> None:
        """The exporter reaches a weight that several layers share through Identity nodes: drop those."""
        nodes = list(self._graph.node)
        names = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Identity" and n.input[0] in self._weights}
        kept = [node for node in nodes if node.output[0] not in names]
        for node in kept:
            node.input[:] = [names.get(name, name) for name in node.input]
        del self._graph.node[:]
        self._graph.node.extend(kept)

    def constant_products(self) -> list[onnx.NodeProto]:
        """MatMul nodes with a constant, wide enough right-hand matrix."""
        return [node for node in self._graph.node if node.op_type == "MatMul" and self._is_wide(node.input[1])]

    def matrices_left(self) -> list[str]:
        """Nodes that still compute with a wide fp32 matrix; position tables, looked up or normalized, may stay."""
        nodes = (node for node in self._graph.node if node.op_type not in ("Gather", "LayerNormalization"))
        return [f"{node.name} ({node.op_type})" for node in nodes if any(map(self._is_wide, node.input))]

    def word_embeddings(self) -> list[onnx.NodeProto]:
        """Gather nodes that look ``input_ids`` up in a constant table."""
        return [
            node
            for node in self._graph.node
            if node.op_type == "Gather" and node.input[1] == "input_ids" and len(self._shape(node.input[0])) == 2
        ]

    def normalized_activations(self) -> list[str]:
        """Activations that a layer normalization makes and that feed only products with a bias of their own."""
        feeds: dict[str, list[str]] = {}
        for node in self.constant_products():
            feeds.setdefault(node.input[0], []).append(node.output[0])
        return [
            name
            for name, outputs in feeds.items()
            if name in self._makers
            and self._makers[name].op_type == "LayerNormalization"
            and len(self._makers[name].input) == 3
            and all(output in self._biases for output in outputs)
        ]

    def showing(self, names: Sequence[str]) -> bytes:
        """The graph as it is, with some activations as its outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
        return bytes(model.SerializeToString())

    def balance(self, moments: dict[str, tuple[Floats, Floats]]) -> None:
        """Note the centre and the divisor of each channel; the divisors' geometric mean is one."""
        for name, (mean, deviation) in moments.items():
            divisor = np.sqrt(np.maximum(deviation, 1e-6))
            self.balances[name] = mean, (divisor / np.exp(np.log(divisor).mean())).astype(np.float32)

    def quantize_product(self, node: onnx.NodeProto) -> None:
        activation, weight = node.input
        (output,) = node.output
        nodes: list[onnx.NodeProto] = []
        if activation not in self.activations:
            self.activations[activation] = self._quantize_rows(activation, output, nodes)
        rows, row_scale, zero_point = self.activations[activation]
        matrix = self._array(weight)
        # Named for the weight, which several layers may share, unless it is changed for one of them.
        name = weight if activation not in self.balances else output
        correction = None
        if activation in self.balances:
            mean, divisor = self.balances[activation]
            correction = mean @ matrix
            matrix = matrix * divisor[:, None]
        values, scale = quantize_columns(matrix)
        if activation in self.shifted:
            correction = -_GELU_SHIFT * (values.sum(axis=0, dtype=np.int64) * scale)
        self._constant(f"{name}.int8", values)
        self._constant(f"{name}.column_scale", scale)
        # A zero point of its own: onnxruntime's precision option for old processors rewrites it node by node.
        self._constant(f"{output}.zero_point", np.array(zero_point, np.uint8))
        nodes += [
            helper.make_node(
                "MatMulInteger", [rows, f"{name}.int8", f"{output}.zero_point"], [f"{output}.sums"], node.name
            ),
            helper.make_node(
                "Cast", [f"{output}.sums"], [f"{output}.float"], f"{node.name}/Cast", to=TensorProto.FLOAT
            ),
            # First the columns, then the rows. With the product of both scales onnxruntime would fuse the chain into
            # MatMulIntegerToFloat as though the row scale were one number.
            helper.make_node("Mul", [f"{output}.float", f"{name}.column_scale"], [f"{output}.columns"]),
            helper.make_node("Mul", [f"{output}.columns", row_scale], [output]),
        ]
        self._new[output] = nodes
        if correction is not None:
            add, bias = self._biases[output]
            self._constant(f"{output}.bias", self._array(bias) + correction.astype(np.float32))
            self._new[add.output[0]] = [helper.make_node("Add", [output, f"{output}.bias"], add.output, add.name)]

    def _quantize_rows(self, name: str, output: str, nodes: list[onnx.NodeProto]) -> tuple[str, str, int]:
        """Append the chain that quantizes an activation's rows; its rows, their scale and the zero point."""
        magnitude, offset, levels, middle = f"{name}.abs", name, "medner.half_range", "medner.middle"
        if name in self.balances:
            offset = f"{name}.balanced"
            nodes.append(self._balanced_normalization(name, offset))
        if self._is_gelu(name) and output in self._biases:
            self.shifted.add(name)
            magnitude = offset = f"{name}.shifted"
            levels, middle = "medner.full_range", "medner.bottom"
            nodes.append(helper.make_node("Add", [name, "medner.gelu_shift"], [offset]))
        else:
            nodes.append(helper.make_node("Abs", [offset], [magnitude]))
        nodes += [
            helper.make_node("ReduceMax", [magnitude, "medner.last_axis"], [f"{name}.max"], keepdims=1),
            helper.make_node("Max", [f"{name}.max", "medner.tiny"], [f"{name}.range"]),
            helper.make_node("Div", [f"{name}.range", levels], [f"{name}.row_scale"]),
            helper.make_node("Div", [offset, f"{name}.row_scale"], [f"{name}.scaled"]),
            helper.make_node("QuantizeLinear", [f"{name}.scaled", "medner.one", middle], [f"{name}.rows"]),
        ]
        return f"{name}.rows", f"{name}.row_scale", 0 if name in self.shifted else 128

    def _balanced_normalization(self, name: str, output: str) -> onnx.NodeProto:
        """The normalization that makes an activation, with centre and divisor in its scale and bias."""
        mean, divisor = self.balances[name]
        node = onnx.NodeProto()
        node.CopyFrom(self._makers[name])
        self._constant(f"{output}.gain", self._array(node.input[1]) / divisor)
        self._constant(f"{output}.bias", (self._array(node.input[2]) - mean) / divisor)
        node.input[1:] = [f"{output}.gain", f"{output}.bias"]
        node.output[:] = [output]
        node.name = f"{node.name}/Balanced"
        return node

    def _is_gelu(self, name: str) -> bool:
        """Whether an activation is GELU as exported: products and sums of one value, the error function among them."""
        edge, kinds = {name}, set()
        for _ in range(5):
            makers = [self._makers[n] for n in edge if n in self._makers]
            kinds |= {maker.op_type for maker in makers}
            if kinds & {"Erf", "Gelu"}:
                return True
            edge = {n for maker in makers if maker.op_type in ("Mul", "Add") for n in maker.input}
        return False

    def _bias_additions(self) -> dict[str, tuple[onnx.NodeProto, str]]:
        """For each value that a constant vector is added to, and that nothing else uses: the node and the vector."""
        users: dict[str, list[onnx.NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        found = {}
        for name, nodes in users.items():
            if len(nodes) == 1 and nodes[0].op_type == "Add":
                other = nodes[0].input[1 if nodes[0].input[0] == name else 0]
                if len(self._shape(other)) == 1:
                    found[name] = nodes[0], other
        return found

    def quantize_table(self, node: onnx.NodeProto) -> None:
        table, ids = node.input
        (output,) = node.output
        values, scale = quantize_columns(self._array(table).T)
        self._constant(f"{table}.int8", np.ascontiguousarray(values.T))
        self._constant(f"{table}.row_scale", scale[:, None])
        self._new[output] = [
            helper.make_node("Gather", [f"{table}.int8", ids], [f"{output}.int8"], node.name),
            helper.make_node(
                "Cast", [f"{output}.int8"], [f"{output}.float"], f"{node.name}/Cast", to=TensorProto.FLOAT
            ),
            helper.make_node("Gather", [f"{table}.row_scale", ids], [f"{output}.scale"], f"{node.name}/Scale"),
            helper.make_node("Mul", [f"{output}.float", f"{output}.scale"], [output]),
        ]

    def finish(self) -> None:
        nodes = [new for node in self._graph.node for new in self._new.get(node.output[0], [node])]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [tensor for name, tensor in self._weights.items() if name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _is_wide(self, name: str) -> bool:
        shape = self._shape(name)
        is_float = bool(shape) and self._weights[name].data_type == TensorProto.FLOAT
        return is_float and len(shape) == 2 and min(shape) >= _MIN_COLUMNS

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].dims) if name in self._weights else ()

    def _array(self, name: str) -> npt.NDArray[np.float32]:
        return np.asarray(numpy_helper.to_array(self._weights[name]), dtype=np.float32)

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> None:
        self._weights[name] = numpy_helper.from_array(value, name)


def quantize_columns(matrix: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8 with one scale a column: ``matrix`` [k, n] is about ``values`` [k, n] times ``scale`` [n]."""
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12).astype(np.float32) / np.float32(127)
    values = np.clip(np.rint(matrix / scale), -127, 127).astype(np.int8)
    return values, scale
