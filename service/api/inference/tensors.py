"""Tensors of the Open Inference Protocol: from JSON or bytes to arrays, and back.

Everything that a caller claims (shapes, sizes, lengths) is compared with what it sent before
anything of that size is made, so a lie costs an error and no memory. Not here: which tensors a
model reads (service.api.inference.endpoints).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import InvalidRequest, PayloadTooLarge
from core.preprocessing import FloatArray
from service.api.inference.messages import InferRequest, RequestInput

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class BytesTensor:
    """Strings of a JSON body, or byte strings of a binary one; [n] or [n, 1]."""

    name: str
    items: Sequence[str | bytes]


@dataclass(frozen=True)
class FloatTensor:
    """float32 values in their shape."""

    name: str
    values: FloatArray


Tensor = BytesTensor | FloatTensor


def read_tensors(message: InferRequest, binary: memoryview, *, max_rows: int) -> list[Tensor]:
    """Return the tensors of a request; `binary` is what follows its JSON.

    Raises `InvalidRequest` naming the tensor, or `PayloadTooLarge` beyond `max_rows`.
    """
    tensors: list[Tensor] = []
    offset = 0
    for tensor in message.inputs:
        _check_rows(tensor, max_rows)
        size = tensor.parameters.binary_data_size
        if size is None:
            tensors.append(_from_json(tensor))
            continue
        if tensor.data is not None:
            raise _wrong(tensor, "send data or binary_data_size, not both")
        if size > len(binary) - offset:
            raise _wrong(tensor, "binary_data_size goes beyond the end of the body")
        tensors.append(_from_bytes(tensor, binary[offset : offset + size]))
        offset += size
    if offset != len(binary):
        raise InvalidRequest(f"{len(binary) - offset} bytes behind the JSON belong to no input")
    return tensors


def write_strings(items: Sequence[str]) -> bytes:
    """Return strings as a binary tensor: each after its length, 4 bytes little-endian."""
    encoded = [item.encode() for item in items]
    return b"".join(part for item in encoded for part in (_LENGTH.pack(len(item)), item))


def write_floats(values: FloatArray) -> bytes:
    """Return float32 values as a binary tensor: little-endian, row by row."""
    return values.astype("<f4", copy=False).tobytes()


def _check_rows(tensor: RequestInput, max_rows: int) -> None:
    rows = tensor.shape[0]
    if rows == 0:
        raise _wrong(tensor, "send at least one row")
    if rows > max_rows:
        raise PayloadTooLarge(f"send at most {max_rows} rows in a request", param=_short(tensor))
    if tensor.datatype == "BYTES" and tensor.shape not in ([rows], [rows, 1]):
        raise _wrong(tensor, f"the shape of BYTES is [{rows}] or [{rows}, 1]")


def _from_json(tensor: RequestInput) -> Tensor:
    if tensor.data is None:
        raise _wrong(tensor, "send data, or binary_data_size and the bytes")
    if tensor.datatype == "BYTES":
        items = [part for row in tensor.data for part in (row if isinstance(row, list) else [row])]
        if not all(isinstance(item, str) for item in items):
            raise _wrong(tensor, "data of BYTES must be strings")
        _check_count(tensor, len(items))
        return BytesTensor(tensor.name, items)
    _check_float(tensor)
    return FloatTensor(tensor.name, _shaped(tensor, _numbers(tensor, tensor.data)))


def _from_bytes(tensor: RequestInput, data: memoryview) -> Tensor:
    if tensor.datatype == "BYTES":
        return BytesTensor(tensor.name, _split(tensor, data))
    _check_float(tensor)
    if len(data) != 4 * math.prod(tensor.shape):
        raise _wrong(tensor, f"binary_data_size of FP32 {tensor.shape} is not {len(data)}")
    return FloatTensor(tensor.name, _shaped(tensor, np.frombuffer(data, "<f4")))


def _split(tensor: RequestInput, data: memoryview) -> list[bytes]:
    """Return the elements of a binary BYTES tensor, no more than its shape says."""
    items: list[bytes] = []
    offset = 0
    while offset < len(data) and len(items) < tensor.shape[0]:
        start = offset + _LENGTH.size
        if start > len(data):
            raise _wrong(tensor, f"element {len(items)} has no length")
        (length,) = _LENGTH.unpack_from(data, offset)
        if length > len(data) - start:
            raise _wrong(tensor, f"element {len(items)} is longer than what was sent")
        items.append(bytes(data[start : start + length]))
        offset = start + length
    if offset != len(data):
        raise _wrong(tensor, f"more bytes than its {tensor.shape[0]} elements have")
    _check_count(tensor, len(items))
    return items


def _numbers(tensor: RequestInput, data: list[Any]) -> FloatArray:
    try:
        found = np.asarray(data)
    except (ValueError, TypeError, OverflowError):
        raise _wrong(tensor, "data is not a list of numbers, flat or nested evenly") from None
    if found.dtype.kind not in "iuf":
        raise _wrong(tensor, "data of FP32 must be numbers")
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such, with its row
        numbers: FloatArray = found.astype(np.float32)
    return numbers


def _shaped(tensor: RequestInput, values: FloatArray) -> FloatArray:
    if values.ndim > 1 and list(values.shape) != tensor.shape:
        raise _wrong(tensor, f"data is nested as {list(values.shape)}, not {tensor.shape}")
    _check_count(tensor, values.size)
    return values.reshape(tensor.shape)


def _check_float(tensor: RequestInput) -> None:
    if tensor.datatype != "FP32":
        raise _wrong(tensor, "its datatype must be BYTES or FP32")


def _check_count(tensor: RequestInput, count: int) -> None:
    if count != math.prod(tensor.shape):
        raise _wrong(tensor, f"shape {tensor.shape} does not hold {count} elements")


def _short(tensor: RequestInput) -> str:
    return tensor.name[:60]


def _wrong(tensor: RequestInput, why: str) -> InvalidRequest:
    return InvalidRequest(f"input {_short(tensor)!r}: {why}", param=_short(tensor))
