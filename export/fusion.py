"""A graph as exported -> the fused operators that onnxruntime runs fast on a GPU.

Attention becomes ``MultiHeadAttention``, a residual sum with its normalization ``SkipLayerNormalization``, GELU
``BiasGelu`` or ``FastGelu``, each with the bias before it. The values are the same up to rounding; :func:`fuse` proves
it on a padded batch.

The mask is each window's length, int32 [batch], which padding on the right allows. It decides the kernel on CUDA
(onnxruntime, contrib_ops/cuda/bert/multihead_attention.cc). cuDNN's takes lengths or no mask, and is the default from
Hopper on (pull request 28849; builds before it want ORT_ENABLE_CUDNN_FLASH_ATTENTION=1); TensorRT's takes lengths on
older GPUs; flash attention takes no mask at all; a mask of two dimensions ends in the unfused kernel. ``Attention`` was
given cuDNN's later (29717). cuDNN plans each new shape anew, which takes far longer than running it once: a run on a
GPU does well to keep to few shapes. Queries, keys and values as one product ([batch, length, heads, 3, size]) would
save launches, but that form has no CPU kernel, and the parity gate runs on the CPU.

Nothing that computes with shapes is left: onnxruntime places such nodes on the CPU, and a session that must run on CUDA
alone refuses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from medner import runtime
from medner.export.attention import Block, find_blocks, have_equal_logits
from medner.export.graph import MICROSOFT, Graph, bias_of, node


@dataclass(frozen=True, slots=True)
class Fused:
    """How many operators became fused ones; shapes: nodes that compute with shapes and were left."""

    attention: int = 0
    normalizations: int = 0
    gelus: int = 0
    shapes: int = 0


def fuse(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Fused]:
    """The graph with fused operators, and how many; with the attention of every layer, or as it is and with 0."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed)
    blocks = find_blocks(graph)
    unchanged = Fused(shapes=len(graph.nodes("Shape")))
    if not blocks:
        return model, unchanged
    masked = "attention_mask" in graph.inputs()
    for block in blocks:
        graph.replace(block.context, [_attention(graph, block, masked=masked)])
    normalizations, gelus = _fuse_normalizations(graph), _fuse_gelus(graph)
    if masked:
        _look_up_by_mask(graph)
        graph.prepend(_lengths_and_positions(graph))
    graph.finish()
    shapes = sum(item.op_type == "Shape" for item in changed.graph.node)
    fused = Fused(len(blocks), normalizations, gelus, shapes)
    return (changed, fused) if have_equal_logits(model, changed) else (model, unchanged)


def _attention(graph: Graph, block: Block, *, masked: bool) -> onnx.NodeProto:
    name = block.context
    inputs, bias = [block.queries, block.keys, block.values], ""
    dense = [found for found in (_dense(graph, value) for value in inputs) if found is not None]
    if len(dense) == len(inputs):
        inputs = [product for product, _ in dense]
        bias = graph.constant(f"{name}.bias", np.concatenate([graph.array(vector) for _, vector in dense]))
    inputs += [bias, "medner.lengths" if masked else ""]
    scale = 1 / math.sqrt(block.size)
    return node("MultiHeadAttention", inputs, name, MICROSOFT, num_heads=block.heads, scale=scale)


def _dense(graph: Graph, name: str) -> tuple[str, str] | None:
    """The product and the bias whose sum a value is; None for a value that is none."""
    maker = graph.makers.get(name)
    if maker is None or maker.op_type != "Add":
        return None
    for product in (graph.makers[part] for part in maker.input if part in graph.makers):
        bias = bias_of(graph, product) if product.op_type == "MatMul" else None
        if bias is not None:
            return product.output[0], bias[1]
    return None


def _fuse_normalizations(graph: Graph) -> int:
    """Normalizations of a dense layer's output plus a residual."""
    fused = 0
    for norm in graph.nodes("LayerNormalization"):
        total = graph.makers.get(norm.input[0])
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in norm.attribute}
        if total is None or total.op_type != "Add" or len(norm.input) != 3 or given.get("axis", -1) != -1:
            continue
        for value, residual in (total.input, reversed(total.input)):
            dense = _dense(graph, value)
            if dense is None or residual in graph.weights or graph.only_user(value, "Add") is None:
                continue
            inputs = [dense[0], residual, norm.input[1], norm.input[2], dense[1]]
            epsilon = given.get("epsilon", 1e-5)
            output = norm.output[0]
            graph.replace(output, [node("SkipLayerNormalization", inputs, output, MICROSOFT, epsilon=epsilon)])
            fused += 1
            break
    return fused


#: What bends a GELU, and the operator that computes that GELU exactly: by the error function, or by tanh.
_GELUS = {"Erf": "BiasGelu", "Tanh": "FastGelu"}


def _fuse_gelus(graph: Graph) -> int:
    """GELU as exported, sums and products around one bend, of a dense layer's output."""
    fused = 0
    for kind, operator in _GELUS.items():
        for bend in graph.nodes(kind):
            dense = _bent(graph, bend)
            last = bend
            while (user := graph.only_user(last.output[0], "Add", "Mul")) is not None:
                last = user
            if dense is not None and last is not bend:
                graph.replace(last.output[0], [node(operator, dense, last.output[0], MICROSOFT)])
                fused += 1
    return fused


def _bent(graph: Graph, bend: onnx.NodeProto) -> tuple[str, str] | None:
    """Product and bias of the dense layer a few steps above a bend."""
    edge = list(bend.input)
    for _ in range(4):
        found = [dense for dense in (_dense(graph, name) for name in edge) if dense is not None]
        if found:
            return found[0]
        makers = [graph.makers[name] for name in edge if name in graph.makers]
        edge = [name for maker in makers if maker.op_type in ("Add", "Mul", "Div", "Pow") for name in maker.input]
    return None


def _look_up_by_mask(graph: Graph) -> None:
    """Look-ups by an index that depends on the batch's shape alone: of positions, or of one row for all tokens."""
    lookups = [item for item in graph.nodes("Gather") if len(graph.shape(item.input[0])) == 2]
    lookups = [item for item in lookups if item.input[1] not in graph.weights and _is_of_shape(graph, item.input[1])]
    names = [item.input[1] for item in lookups]
    length = 8
    (indices,) = runtime.activations(graph.showing(names), names, [np.zeros(length, np.int64)]) if names else ([],)
    for item, index in zip(lookups, indices, strict=True):
        table, output, first = item.input[0], item.output[0], int(index.flat[0])
        if index.size == length and (index == first).all():
            graph.replace(output, [])
            graph.constant(output, graph.array(table)[first][None, None])
        elif index.size == length and (index.ravel() == np.arange(length)).all():
            graph.replace(output, [node("Gather", [table, "medner.positions"], output)])


def _is_of_shape(graph: Graph, name: str) -> bool:
    """Whether a value depends on constants and shapes alone."""
    if name in graph.weights or not name:
        return True
    maker = graph.makers.get(name)
    return maker is not None and (maker.op_type == "Shape" or all(_is_of_shape(graph, part) for part in maker.input))


def _lengths_and_positions(graph: Graph) -> list[onnx.NodeProto]:
    """Each window's length, int32 [batch], and its tokens' positions, int32 [batch, length], undefined at padding."""
    axis = graph.constant("medner.axis", np.array([1], np.int64))
    along = graph.constant("medner.along", np.array(1, np.int64))
    first = graph.constant("medner.first", np.array(1, np.int32))
    return [
        node("Cast", ["attention_mask"], "medner.kept", to=TensorProto.INT32),
        node("ReduceSum", ["medner.kept", axis], "medner.lengths", keepdims=0),
        node("CumSum", ["medner.kept", along], "medner.counted"),
        node("Sub", ["medner.counted", first], "medner.positions"),
    ]
