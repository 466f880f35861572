"""Attention as the exporter writes it -> fewer passes over memory.

The exporter transposes queries, keys, values and contexts of every layer, and computes the mask's shape anew in each.
Here the encoder runs with the sequence as the first axis: then onnxruntime's ``FusedMatMul`` reads queries, keys and
values where they stand, scales the scores on the way, and of four transpositions a layer one is left. The mask is
computed once. The values are the same up to rounding; :func:`rewrite` proves it on a padded batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from medner import runtime
from medner.errors import ModelError
from medner.export.graph import MICROSOFT, Graph, constant_of, node

#: Two logits that differ by more (relative to the largest) are not the same computation.
_TOLERANCE = 1e-4

#: Operators that do the same to each position, whichever axis counts them.
_POSITIONWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "Cast", "LayerNormalization"}
)


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's attention. queries, keys, values: [batch, length, heads * size]; context: the value it makes."""

    queries: str
    keys: str
    values: str
    context: str
    heads: int
    size: int


def rewrite(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Block]]:
    """The graph with its attention rewritten, and the blocks that were: all of them, or none.

    A graph of another form (one whose attention is not softmax(q k / sqrt(size) + mask) v, or that uses positions
    between its layers) comes back as it is, with none.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed)
    blocks = find_blocks(graph)
    root = _root(graph, blocks)
    if root is None:
        return model, []
    _rebuild(graph, blocks, root)
    graph.finish()
    return (changed, blocks) if have_equal_logits(model, changed) else (model, [])


def find_blocks(graph: Graph) -> list[Block]:
    """The attention of every layer, by its form alone; none where one softmax of the graph has another form."""
    softmaxes = graph.nodes("Softmax")
    blocks = [block for block in map(_Matcher(graph).block, softmaxes) if block is not None]
    return blocks if len(blocks) == len(softmaxes) else []


class _Matcher:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def block(self, softmax: onnx.NodeProto) -> Block | None:
        """The attention around a softmax, or None where it has another form."""
        product = self._graph.only_user(softmax.output[0], "MatMul")
        transposed = self._graph.only_user(product.output[0], "Transpose") if product else None
        context = self._graph.only_user(transposed.output[0], "Reshape") if transposed else None
        scores = self._scores(softmax.input[0])
        if product is None or context is None or scores is None or product.input[0] != softmax.output[0]:
            return None
        found = [self._projection(name) for name in (*scores.input[:2], product.input[1])]
        shapes = {item[1] for item in found if item is not None}
        if None in found or len(shapes) != 1:
            return None
        queries, keys, values = (item[0] for item in found if item is not None)
        heads, size = shapes.pop()
        return Block(queries, keys, values, context.output[0], heads, size)

    def _scores(self, name: str) -> onnx.NodeProto | None:
        """The product of queries and keys, above the mask's addition and a division by a constant."""
        for _ in range(3):
            maker = self._graph.makers.get(name)
            if maker is None:
                return None
            if maker.op_type == "MatMul":
                return maker
            if maker.op_type not in ("Add", "Div", "Mul"):
                return None
            name = maker.input[0]
        return None

    def _projection(self, name: str) -> tuple[str, tuple[int, int]] | None:
        """What a reshape to heads was made from, above transposing and scaling, and (heads, size)."""
        for _ in range(4):
            maker = self._graph.makers.get(name)
            if maker is None or maker.op_type not in ("Transpose", "Reshape", "Mul", "Div"):
                return None
            if maker.op_type == "Reshape":
                shape = self._head_shape(maker.input[1])
                return None if shape is None else (maker.input[0], shape)
            name = maker.input[0]
        return None

    def _head_shape(self, name: str) -> tuple[int, int] | None:
        maker = self._graph.makers.get(name)
        if maker is not None and maker.op_type == "Concat":
            ends = [constant_of(self._graph, part) for part in maker.input[-2:]]
            numbers = [end[0] for end in ends if end is not None and len(end) == 1]
        else:
            numbers = (constant_of(self._graph, name) or [])[-2:]
        return (numbers[0], numbers[1]) if len(numbers) == 2 and min(numbers) > 0 else None


def _root(graph: Graph, blocks: list[Block]) -> str | None:
    """The value that the first layer reads, where all between it and the logits treats positions alike; else None."""
    by_context = {block.context: block for block in blocks}
    if not blocks:
        return None
    first = graph.makers.get(blocks[0].queries)
    while first is not None and first.op_type != "MatMul":
        data = [name for name in first.input if name not in graph.weights]
        first = graph.makers.get(data[0]) if len(data) == 1 else None
    if first is None:
        return None
    root = first.input[0]
    edge, seen = ["logits"], {root}
    while edge:
        name = edge.pop()
        if name in seen or (name in graph.weights and len(graph.shape(name)) <= 1):
            continue
        seen.add(name)
        maker = graph.makers.get(name)
        if name in by_context:
            block = by_context[name]
            edge += [block.queries, block.keys, block.values]
        elif maker is not None and maker.op_type in _POSITIONWISE:
            edge += maker.input
        elif maker is not None and maker.op_type == "MatMul" and len(graph.shape(maker.input[1])) == 2:
            edge.append(maker.input[0])
        else:
            return None
    return root if root in graph.makers else None


def _rebuild(graph: Graph, blocks: list[Block], root: str) -> None:
    graph.constant("medner.rows", np.array([1, 2], np.int64))
    heads = graph.constant("medner.heads", np.array([0, 0, blocks[0].heads, blocks[0].size], np.int64))
    joined = graph.constant("medner.joined", np.array([0, 0, blocks[0].heads * blocks[0].size], np.int64))
    masked = "attention_mask" in graph.inputs()
    maker = graph.makers[root]
    if maker.op_type == "LayerNormalization":
        # Before it, so that what it makes may be balanced (medner.export.balance).
        (value, *others), first = maker.input, f"{root}.sequence_first"
        maker.input[:] = [first, *others]
        start = [node("Transpose", [value], first, perm=[1, 0, 2]), maker]
    else:
        maker.output[list(maker.output).index(root)] = f"{root}.batch_first"
        start = [maker, node("Transpose", [f"{root}.batch_first"], root, perm=[1, 0, 2])]
    if masked:
        # What softmax turns to exactly 0, for scores of [batch, heads, length, length].
        lowest = graph.constant("medner.lowest", float(np.finfo(np.float32).min))
        one = graph.constant("medner.one", 1.0)
        start += [
            node("Unsqueeze", ["attention_mask", "medner.rows"], "medner.mask.rows"),
            node("Cast", ["medner.mask.rows"], "medner.mask.kept", to=TensorProto.FLOAT),
            node("Sub", [one, "medner.mask.kept"], "medner.mask.left_out"),
            node("Mul", ["medner.mask.left_out", lowest], "medner.mask"),
        ]
    graph.replace(maker.output[0], start)
    for block in blocks:
        name = block.context
        nodes = [
            node("Reshape", [projected, heads], f"{name}.{kind}")
            for kind, projected in (("q", block.queries), ("k", block.keys), ("v", block.values))
        ]
        nodes.append(
            node(
                "FusedMatMul",
                [f"{name}.q", f"{name}.k"],
                f"{name}.scores",
                MICROSOFT,
                transBatchA=1,
                transBatchB=1,
                transB=1,
                alpha=1 / math.sqrt(block.size),
            )
        )
        if masked:
            nodes.append(node("Add", [f"{name}.scores", "medner.mask"], f"{name}.masked"))
        nodes += [
            node("Softmax", [f"{name}.masked" if masked else f"{name}.scores"], f"{name}.weights", axis=-1),
            node("FusedMatMul", [f"{name}.weights", f"{name}.v"], f"{name}.heads", MICROSOFT, transBatchB=1),
            node("Transpose", [f"{name}.heads"], f"{name}.split", perm=[2, 0, 1, 3]),
            node("Reshape", [f"{name}.split", joined], name),
        ]
        graph.replace(name, nodes)
    last = graph.makers["logits"]
    last.output[list(last.output).index("logits")] = "logits.sequence_first"
    graph.replace(
        "logits.sequence_first", [last, node("Transpose", ["logits.sequence_first"], "logits", perm=[1, 0, 2])]
    )


def _looked_up(model: onnx.ModelProto) -> set[str]:
    return {item.input[0] for item in model.graph.node if item.op_type == "Gather" and item.input[1] == "input_ids"}


def have_equal_logits(model: onnx.ModelProto, changed: onnx.ModelProto) -> bool:
    """Whether both graphs give the same logits for a batch in which one row is padded."""
    vocabulary = min(
        (tensor.dims[0] for tensor in model.graph.initializer if tensor.name in _looked_up(model)), default=2
    )
    ids = np.arange(24, dtype=np.int64).reshape(2, 12) % vocabulary
    lengths = np.array([12, 7])
    kept = np.arange(12) < lengths[:, None]
    before = runtime.logits(bytes(model.SerializeToString()), ids, lengths)[kept]
    try:
        after = runtime.logits(bytes(changed.SerializeToString()), ids, lengths)[kept]
    except ModelError:
        return False
    return bool(np.abs(before - after).max() <= _TOLERANCE * max(1.0, float(np.abs(before).max())))
