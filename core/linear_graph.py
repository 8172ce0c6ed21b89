"""Reading a linear head's weights out of its ONNX file, without a session and without `onnx`.

A session for each of a thousand heads costs twice the memory and four times the load time of their
arrays (docs/decisions/0017-heads-as-arrays.md). A head's graph is one `Gemm` and the `Softmax` or
`Sigmoid` of its task, so all there is to read are two tensors. What is not exactly that graph is
refused, never guessed at.

The format is protobuf (https://protobuf.dev/programming-guides/encoding); field numbers are those
of `onnx.proto` (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). Not here: checking that
the arrays give what was published (core.head).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from core.errors import Conflict
from core.preprocessing import FloatArray
from core.tasks import OUTPUT_NAMES, Output

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT32 = 1
_OP_TYPES: dict[Output, list[str]] = {
    "softmax": ["Softmax"],
    "sigmoid": ["Sigmoid"],
    "identity": [],
}

Fields = Mapping[int, list[int | memoryview]]


class _NotLinear(Exception):
    pass


def read_linear_graph(graph: bytes, output: Output = "softmax") -> tuple[FloatArray, FloatArray]:
    """Return (weight [dim, width], bias [width]) of output(features @ weight + bias).

    Raises `Conflict` for every other graph and for bytes that are none.
    """
    try:
        return _read(_fields(memoryview(graph)), output)
    except (_NotLinear, ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError):
        raise Conflict("head.onnx is not a linear head") from None


def _read(model: Fields, output: Output) -> tuple[FloatArray, FloatArray]:
    graph = _fields(_bytes(model[_MODEL_GRAPH][-1]))
    gemm, *others = (_fields(_bytes(node)) for node in graph[_GRAPH_NODE])
    _require(_texts(gemm, _NODE_OP_TYPE) == ["Gemm"] and not gemm.get(_NODE_ATTRIBUTE))
    _require([_texts(node, _NODE_OP_TYPE)[0] for node in others] == _OP_TYPES[output])
    last = gemm
    for node in others:
        for attribute in node.get(_NODE_ATTRIBUTE, []):
            fields = _fields(_bytes(attribute))
            _require(_texts(fields, _ATTRIBUTE_NAME) == ["axis"] and fields[_ATTRIBUTE_INT] == [1])
        _require(_texts(node, _NODE_INPUT) == _texts(gemm, _NODE_OUTPUT))
        last = node
    features, weight_name, bias_name = _texts(gemm, _NODE_INPUT)
    _require(features == "features")
    _require(_texts(last, _NODE_OUTPUT) == [OUTPUT_NAMES[output]])
    tensors = dict(_tensor(_fields(_bytes(each))) for each in graph[_GRAPH_INITIALIZER])
    weight, bias = tensors.pop(weight_name), tensors.pop(bias_name)
    _require(not tensors and weight.ndim == 2 and bias.shape == weight.shape[1:])
    return weight, bias


def _tensor(fields: Fields) -> tuple[str, FloatArray]:
    _require(fields[_TENSOR_TYPE] == [_FLOAT32])
    (name,) = _texts(fields, _TENSOR_NAME)
    (raw,) = fields[_TENSOR_RAW]
    dims = [dim for each in fields[_TENSOR_DIMS] for dim in _integers(each)]
    # A copy, so that the file's bytes can go and the numbers lie aligned.
    return name, np.frombuffer(_bytes(raw), "<f4").reshape(dims).astype(np.float32)


def _fields(data: memoryview) -> Fields:
    """Split a message into its fields, by number, in order."""
    found: dict[int, list[int | memoryview]] = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _varint(data, at)
            found[key >> 3].append(number)
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}[kind]
        _require(at + size <= len(data))
        found[key >> 3].append(data[at : at + size])
        at += size
    return dict(found)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return (number, where it ends)."""
    number = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise _NotLinear


def _integers(value: int | memoryview) -> list[int]:
    """A repeated integer: one by one, or packed."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _texts(fields: Fields, number: int) -> list[str]:
    return [bytes(_bytes(value)).decode() for value in fields.get(number, [])]


def _bytes(value: int | memoryview) -> memoryview:
    _require(isinstance(value, memoryview))
    assert isinstance(value, memoryview)
    return value


def _require(holds: bool) -> None:
    if not holds:
        raise _NotLinear
