"""An ONNX graph being rewritten: who makes and who uses each value, and nodes replaced in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Floats = npt.NDArray[np.float32]

#: Domain of onnxruntime's own operators.
MICROSOFT = "com.microsoft"


class Graph:
    """A graph being rewritten.

    Nodes are replaced where they stand, so that their order stays topological; :meth:`finish` puts the replacements in
    and drops what no output needs any more. weights: the constant tensors by name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._graph = model.graph
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._name_constants()
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self._new: dict[str, Sequence[onnx.NodeProto]] = {}

    def _name_constants(self) -> None:
        """Constant nodes become weights, and a weight that layers share through Identity nodes gets its own name."""
        for node in self._graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                tensor = onnx.TensorProto()
                tensor.CopyFrom(node.attribute[0].t)
                tensor.name = node.output[0]
                self.weights[tensor.name] = tensor
        nodes = [node for node in self._graph.node if node.output[0] not in self.weights]
        names = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Identity" and n.input[0] in self.weights}
        kept = [node for node in nodes if node.output[0] not in names]
        for node in kept:
            node.input[:] = [names.get(name, name) for name in node.input]
        del self._graph.node[:]
        self._graph.node.extend(kept)

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        """Nodes of one operator, in order."""
        return [node for node in self._graph.node if node.op_type == op_type]

    def inputs(self) -> set[str]:
        """Names of the graph's inputs."""
        return {value.name for value in self._graph.input} - set(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight; empty for everything else."""
        return tuple(self.weights[name].dims) if name in self.weights else ()

    def array(self, name: str) -> Floats:
        """A weight's values as float32."""
        return np.asarray(numpy_helper.to_array(self.weights[name]), dtype=np.float32)

    def only_user(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """The one node that uses a value, if it is of these operators; None where several use it."""
        # Older exports (ELECTRA) reshape by the value's own shape, which nothing needs any more.
        users = [user for user in self.users.get(name, []) if user.op_type != "Shape"]
        return users[0] if len(users) == 1 and users[0].op_type in op_types else None

    def constant(self, name: str, value: npt.NDArray[np.generic] | float) -> str:
        """Add a weight, a Python number as float32; its name, for use as a node's input."""
        array = np.array(value, np.float32) if isinstance(value, float) else value
        self.weights[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def replace(self, output: str, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes in the place of the one whose first output is ``output``."""
        self._new[output] = nodes

    def prepend(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes at the start."""
        for item in reversed(nodes):
            self._graph.node.insert(0, item)

    def append(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes at the end."""
        self._graph.node.extend(nodes)

    def output(self, name: str, element: int, shape: Sequence[str | int]) -> None:
        """Make a value an output of the graph."""
        self._graph.output.append(helper.make_tensor_value_info(name, element, shape))

    def showing(self, names: Sequence[str]) -> bytes:
        """The graph as it stands, serialized, with some values as its only outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
        # What became a weight on reading is one in the copy too.
        del model.graph.initializer[:]
        model.graph.initializer.extend(self.weights.values())
        return bytes(model.SerializeToString())

    def finish(self) -> None:
        """Put the replacements in, drop nodes and weights that no output needs, and declare onnxruntime's domain."""
        nodes = [new for node in self._graph.node for new in self._new.get(node.output[0], [node])]
        needed = {value.name for value in self._graph.output}
        kept = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(read_by(node))
                kept.append(node)
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))
        del self._graph.initializer[:]
        self._graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in needed)
        del self._graph.value_info[:]
        domains = {node.domain for node in kept}
        if MICROSOFT in domains and MICROSOFT not in {entry.domain for entry in self.model.opset_import}:
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def node(op_type: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: object) -> onnx.NodeProto:
    """A node with one output, named for it."""
    return helper.make_node(op_type, list(inputs), [output], f"{output}/{op_type}", domain=domain, **attributes)


def read_by(item: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its branches take from outside among them."""
    names = set(item.input)
    for attribute in item.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = attribute.g.node
            names.update(name for part in inner for name in read_by(part))
            names.update(value.name for value in attribute.g.output)
    return names


def constant_of(graph: Graph, name: str) -> list[int] | None:
    """The integers of a constant; None for a value that is none."""
    if name not in graph.weights or graph.weights[name].data_type not in (TensorProto.INT64, TensorProto.INT32):
        return None
    return [int(number) for number in numpy_helper.to_array(graph.weights[name]).ravel()]


def bias_of(graph: Graph, product: onnx.NodeProto) -> tuple[onnx.NodeProto, str] | None:
    """The node that adds a constant vector to a product, where nothing else uses the product, and the vector."""
    users = graph.users.get(product.output[0], [])
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    other = users[0].input[1 if users[0].input[0] == product.output[0] else 0]
    return (users[0], other) if len(graph.shape(other)) == 1 else None


def answer_in_the_graph(graph: Graph) -> None:
    """Outputs ``tag`` and ``probability`` beside ``logits``: each token's likeliest class, and how likely it is."""
    last_axis = graph.constant("medner.last_axis", np.array([-1], np.int64))
    graph.append(
        [
            node("ArgMax", ["logits"], "medner.class", axis=-1, keepdims=0),
            node("Cast", ["medner.class"], "tag", to=TensorProto.INT16),
            node("Softmax", ["logits"], "medner.probabilities", axis=-1),
            node("ReduceMax", ["medner.probabilities", last_axis], "probability", keepdims=0),
        ]
    )
    graph.output("tag", TensorProto.INT16, ["batch_size", "sequence_length"])
    graph.output("probability", TensorProto.FLOAT, ["batch_size", "sequence_length"])
