"""fp32 graph -> fp16 graph for GPUs.

Operators are fused first, see :mod:`medner.export.fusion`. Weights and activations are half precision, but not:

- the classifier and what follows it: it costs nothing and decides the tags;
- what comes near the largest half, 65,504, on sample text, or is made from a constant beyond it, such as a mask of
  -3.4e38.

onnxruntime's own converter (``onnxruntime.transformers.float16``) finds where to cast by ONNX's shape inference, which
stops at the first fused operator; here the types are known before anything is fused.

On the CPU onnxruntime computes an fp16 graph in fp32 and rounds its weights alone: what overflows on a GPU goes
unnoticed. For the parity gate there is the same graph with every rounding written out (:func:`to_fp16`, ``rounded``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from medner import runtime
from medner.errors import ModelError
from medner.export.fusion import Fused, fuse
from medner.export.graph import Graph, answer_in_the_graph, node, read_by

#: Largest magnitude, on sample text, of what is computed in half precision: a quarter of the largest half.
LIMIT = 65504 / 4

#: Operators that have no half precision in ONNX or onnxruntime, or whose result has a type of their own.
_SINGLE = frozenset({"ConstantOfShape", "CumSum", "If", "Max", "Min", "OneHot", "Range", "TopK"})

#: Of these architectures every layer has to become fused operators.
_FUSED = frozenset({"albert", "bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"})

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Halved:
    """What became of a graph. half, single: nodes with a result in half precision, and in fp32."""

    fused: Fused
    half: int
    single: int

    def __str__(self) -> str:
        """As a report says it."""
        fused = f"{self.fused.attention} attention, {self.fused.normalizations} normalization, {self.fused.gelus} GELU"
        if not self.fused.attention:
            fused = "none, for want of attention of a known form; a GPU may run it slowly, or refuse to"
        return f"fused: {fused}; {self.half} operators in half precision, {self.single} in fp32"


def to_fp16(
    source: Path,
    target: Path,
    samples: Sequence[Ints] = (),
    config: Mapping[str, Any] | None = None,
    rounded: Path | None = None,
) -> Halved:
    """Write the fp16 form of a graph: ``logits`` and ``probability`` float32, ``tag`` int16.

    samples: windows of real text, int64 [length] each, on which magnitudes are measured. config: ``config.json`` of the
    checkpoint, by which a known architecture has to be fused in full. rounded: where to write the graph for the parity
    gate on the CPU, fp32 with the roundings of the fp16 graph. Raises :class:`ModelError`.
    """
    original = onnx.load(str(source))
    types = _types(original)
    model, fused = fuse(original)
    _check_fused(fused, config or {})
    Graph(model).finish()  # constants become weights
    graph = Graph(model)
    floats = {name for item in graph.model.graph.node for name in item.output if types.get(name) == TensorProto.FLOAT}
    halves = _halves(graph, floats, samples)
    for path, emulated in ((target, False), (rounded, True)):
        if path is not None:
            made = _converted(model, floats, halves, emulated=emulated)
            onnx.checker.check_model(made)
            path.parent.mkdir(parents=True, exist_ok=True)
            onnx.save(made, str(path))
    kept = [item for item in graph.model.graph.node if floats.intersection(item.output)]
    half = sum(bool(halves.intersection(item.output)) for item in kept)
    return Halved(fused, half, len(kept) - half)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of each value."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}


def _check_fused(fused: Fused, config: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` where a known architecture did not become fused operators."""
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    if config.get("model_type") not in _FUSED or layers is None:
        return
    gelus = layers if "gelu" in str(config.get("hidden_act", config.get("activation", "gelu"))) else 0
    expected = Fused(layers, 2 * layers, gelus, 0)
    if fused != expected:
        raise ModelError(
            f"{fused.attention} attention, {fused.normalizations} normalization and {fused.gelus} GELU were fused, not "
            f"{expected.attention}, {expected.normalizations} and {expected.gelus}, and {fused.shapes} nodes compute "
            "with shapes: this graph has another form; leave out --precision fp16"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What becomes half precision


def _halves(graph: Graph, floats: set[str], samples: Sequence[Ints]) -> set[str]:
    """Values that are computed and kept in half precision."""
    # The branches of an ``If`` are left as they are.
    single = _classifier(graph).union(*(read_by(item) - set(item.input) for item in graph.model.graph.node))
    sizes = _magnitudes(graph, sorted(floats), samples)
    halves: set[str] = set()
    for item in graph.model.graph.node:
        outputs = floats.intersection(item.output)
        # A sum inside an operator, such as a residual's, is no larger than that of what it reads.
        read = sum(sizes.get(name, 0.0) for name in item.input)
        largest = max([read, *(sizes.get(name, 0.0) for name in outputs)])
        if any(sizes.get(name, 0.0) > LIMIT for name in item.input if name in graph.weights):
            sizes.update(dict.fromkeys(outputs, np.inf))
        elif item.op_type not in _SINGLE and not single.intersection(outputs) and largest <= LIMIT:
            halves |= outputs
    return halves


def _classifier(graph: Graph) -> set[str]:
    """Outputs, and what lies between them and the last matrix product."""
    found = {value.name for value in graph.model.graph.output}
    edge = ["logits"]
    while edge:
        maker = graph.makers.get(edge.pop())
        if maker is not None:
            found.update(maker.output)
            edge += [] if maker.op_type in ("MatMul", "Gemm") else maker.input
    return found


def _magnitudes(graph: Graph, names: list[str], samples: Sequence[Ints]) -> dict[str, float]:
    """Largest magnitude of each float weight, and of each value on the samples, whose last token counts as padding."""
    sizes = {
        name: float(np.abs(graph.array(name)).max(initial=0.0))
        for name, tensor in graph.weights.items()
        if tensor.data_type == TensorProto.FLOAT
    }
    model = onnx.ModelProto()
    model.ParseFromString(graph.showing([f"{name}.largest" for name in names]))
    for name in names:
        model.graph.node.append(node("Abs", [name], f"{name}.size"))
        model.graph.node.append(node("ReduceMax", [f"{name}.size"], f"{name}.largest", keepdims=0))
    longer = [sample for sample in samples if len(sample) > 1]
    outputs = [f"{name}.largest" for name in names]
    for values in runtime.activations(model.SerializeToString(), outputs, longer, padding=1):
        for name, value in zip(names, values, strict=True):
            # What is no number stays one.
            sizes[name] = float(np.maximum(sizes.get(name, 0.0), value))
    return {name: size if np.isfinite(size) else np.inf for name, size in sizes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting


def _converted(model: onnx.ModelProto, floats: set[str], halves: set[str], *, emulated: bool) -> onnx.ModelProto:
    """The graph with casts between both precisions; emulated: in fp32, rounded where the other graph is half."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed)
    converter = _Converter(graph, floats, halves, emulated=emulated)
    for item in list(changed.graph.node):
        graph.replace(item.output[0], converter.nodes(item))
    answer_in_the_graph(graph)
    graph.finish()
    return changed


class _Converter:
    def __init__(self, graph: Graph, floats: set[str], halves: set[str], *, emulated: bool) -> None:
        self._graph, self._halves, self._emulated = graph, halves, emulated
        self._singles = floats - halves
        self._cast: set[str] = set()

    def nodes(self, item: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A node in its precision, behind the casts that it is the first to need."""
        half = bool(self._halves.intersection(item.output))
        changed, before, after = onnx.NodeProto(), [], []
        changed.CopyFrom(item)
        for place, name in enumerate(item.input):
            if half and name in self._graph.weights:
                changed.input[place] = self._weight(name)
            elif name in (self._singles if half else self._halves) and item.op_type != "Shape":
                changed.input[place], nodes = self._value(name, half=half)
                before += nodes
        if half and self._emulated:
            for place, name in enumerate(item.output):
                changed.output[place] = f"{name}.exact"
                after += _rounding(f"{name}.exact", name)
        elif half and item.op_type == "Cast":
            (attribute,) = (attribute for attribute in changed.attribute if attribute.name == "to")
            attribute.i = TensorProto.FLOAT16
        return [*before, changed, *after]

    def _weight(self, name: str) -> str:
        """A weight for a node of half precision."""
        if self._graph.weights[name].data_type != TensorProto.FLOAT:
            return name
        values = self._graph.array(name).astype(np.float16)
        return self._graph.constant(f"{name}.half", values.astype(np.float32) if self._emulated else values)

    def _value(self, name: str, *, half: bool) -> tuple[str, list[onnx.NodeProto]]:
        """A value of the other precision for a node of this one, and the nodes that cast it the first time."""
        if self._emulated and not half:
            return name, []
        cast = f"{name}.half" if half else f"{name}.single"
        if cast in self._cast:
            return cast, []
        self._cast.add(cast)
        if self._emulated:
            return cast, _rounding(name, cast)
        return cast, [node("Cast", [name], cast, to=TensorProto.FLOAT16 if half else TensorProto.FLOAT)]


def _rounding(name: str, output: str) -> list[onnx.NodeProto]:
    """Nodes that round fp32 to what a half can hold."""
    return [
        node("Cast", [name], f"{output}.cast", to=TensorProto.FLOAT16),
        node("Cast", [f"{output}.cast"], output, to=TensorProto.FLOAT),
    ]
