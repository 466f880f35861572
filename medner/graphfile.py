"""What is to be known of an ONNX graph before it is loaded, read from its bytes: the base install has no onnx package.

Older releases of onnxruntime read weights from wherever a graph points, so a bundle's graphs are looked through before
one of them is loaded.
"""

from __future__ import annotations

import mmap
from pathlib import Path

#: The messages of ``onnx.proto`` on the way from a model to its tensors: number of the field -> message in it.
MESSAGES = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "StringStringEntry"},
}
_KEY, _VALUE = 1, 2
#: Bytes of the two wire types of fixed size; groups, which open and close without a size, count as none.
_FIXED = {1: 8, 5: 4, 3: 0, 4: 0}

#: Operators that scale activations by the largest of all that is computed together, as a node names them: number of the
#: field and wire type, length, name.
_DYNAMIC = tuple(
    b"\x22" + bytes([len(name)]) + name
    for name in (b"DynamicQuantizeLinear", b"DynamicQuantizeMatMul", b"DynamicQuantizeLSTM")
)


def scales_by_batch(graph: Path) -> bool:
    """Whether a graph was quantized dynamically, so that what it makes of a window depends on the rest of its batch.

    Raises :class:`OSError` where the file cannot be read.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(name) >= 0 for name in _DYNAMIC)


def external_data(graph: Path) -> frozenset[str]:
    """Locations of the files that hold tensors of a graph outside it, as the graph states them.

    Tensors in attributes, subgraphs, functions and sparse tensors count as well. Raises :class:`ValueError` where the
    file is no protocol buffer, :class:`OSError` where it cannot be read.
    """
    with graph.open("rb") as file:
        if not graph.stat().st_size:
            raise ValueError("an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _locations(data)


def _locations(data: mmap.mmap) -> frozenset[str]:
    if data.find(b"location") < 0:  # the key of every such entry, and quicker to miss than to walk through a graph
        return frozenset()
    found: set[str] = set()
    open_messages = [("Model", 0, len(data))]
    while open_messages:
        message, position, end = open_messages.pop()
        fields = MESSAGES.get(message, {})
        key = value = b""
        while position < end:
            tag, position = _varint(data, position, end)
            number, wire_type = (tag & 0xFFFFFFFF) >> 3, tag & 7  # protobuf drops the bits above, too
            if wire_type == 0:
                _, position = _varint(data, position, end)
            elif wire_type == 2:
                size, position = _varint(data, position, end)
                if position + size > end:
                    raise ValueError("a field longer than its message")
                if number in fields:
                    open_messages.append((fields[number], position, position + size))
                elif message == "StringStringEntry" and number == _KEY:
                    key = data[position : position + size]
                elif message == "StringStringEntry" and number == _VALUE:
                    value = data[position : position + size]
                position += size
            elif wire_type in _FIXED:
                position += _FIXED[wire_type]
            else:
                raise ValueError("a field of no known type")
        if position != end:
            raise ValueError("a field longer than its message")
        if key == b"location":
            found.add(value.decode("utf-8", "backslashreplace"))
    return frozenset(found)


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number that does not end")
