"""fp32 graph -> int8 graph whose result for a window does not depend on the batch.

The usual dynamic quantization takes one scale over the whole activation tensor, so a note's spans depend on its
neighbours in the batch. Here each token's activation row has its own scale, in standard ONNX operators::

    s = max|x| / 127        q = QuantizeLinear(x / s, 1, 128)        y = Cast(MatMulInteger(q, W)) * column_scale * s

Weights are symmetric int8, one scale a column; the word embeddings int8, one scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from medner.errors import ModelError

#: Matrices with fewer columns (the classifier) stay in fp32: they cost nothing and decide the tags.
_MIN_COLUMNS = 16
_ZERO_POINT = 128


@dataclass(frozen=True, slots=True)
class Quantized:
    """How many nodes became int8: matrix products, the activation chains that feed them, and embedding tables."""

    products: int
    activations: int
    tables: int


def to_int8(source: Path, target: Path) -> Quantized:
    """Write the int8 form of a graph.

    Raises :class:`ModelError` where there is nothing to quantize, or a weight matrix would stay in fp32 unnoticed.
    """
    model = onnx.load(str(source))
    graph = _Graph(model)
    tables, products = graph.word_embeddings(), graph.constant_products()
    if not products or not tables:
        raise ModelError(f"{source}: {len(products)} matrix products and {len(tables)} embedding tables to quantize")
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
    return Quantized(len(products), len(graph.activations), len(tables))


class _Graph:
    """A graph being rewritten: nodes are replaced in place, so that their order stays topological."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._name_shared_weights()
        self._new: dict[str, list[onnx.NodeProto]] = {}
        self.activations: dict[str, tuple[str, str]] = {}
        self._constant("medner.one", np.array(1.0, np.float32))
        self._constant("medner.zero_point", np.array(_ZERO_POINT, np.uint8))
        self._constant("medner.levels", np.array(127.0, np.float32))
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

    def quantize_product(self, node: onnx.NodeProto) -> None:
        activation, weight = node.input
        (output,) = node.output
        nodes: list[onnx.NodeProto] = []
        if activation not in self.activations:
            self.activations[activation] = self._quantize_rows(activation, nodes)
        rows, row_scale = self.activations[activation]
        # Named for the weight, which several layers may share.
        values, scale = quantize_columns(self._array(weight))
        self._constant(f"{weight}.int8", values)
        self._constant(f"{weight}.column_scale", scale)
        # A zero point of its own: onnxruntime's precision option for old processors rewrites it node by node.
        self._constant(f"{output}.zero_point", np.array(_ZERO_POINT, np.uint8))
        nodes += [
            helper.make_node(
                "MatMulInteger", [rows, f"{weight}.int8", f"{output}.zero_point"], [f"{output}.sums"], node.name
            ),
            helper.make_node(
                "Cast", [f"{output}.sums"], [f"{output}.float"], f"{node.name}/Cast", to=TensorProto.FLOAT
            ),
            # First the columns, then the rows. With the product of both scales onnxruntime would fuse the chain into
            # MatMulIntegerToFloat as though the row scale were one number.
            helper.make_node("Mul", [f"{output}.float", f"{weight}.column_scale"], [f"{output}.columns"]),
            helper.make_node("Mul", [f"{output}.columns", row_scale], [output]),
        ]
        self._new[output] = nodes

    def _quantize_rows(self, name: str, nodes: list[onnx.NodeProto]) -> tuple[str, str]:
        nodes += [
            helper.make_node("Abs", [name], [f"{name}.abs"]),
            helper.make_node("ReduceMax", [f"{name}.abs", "medner.last_axis"], [f"{name}.max"], keepdims=1),
            helper.make_node("Max", [f"{name}.max", "medner.tiny"], [f"{name}.range"]),
            helper.make_node("Div", [f"{name}.range", "medner.levels"], [f"{name}.row_scale"]),
            helper.make_node("Div", [name, f"{name}.row_scale"], [f"{name}.scaled"]),
            helper.make_node("QuantizeLinear", [f"{name}.scaled", "medner.one", "medner.zero_point"], [f"{name}.rows"]),
        ]
        return f"{name}.rows", f"{name}.row_scale"

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
