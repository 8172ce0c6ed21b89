"""Tensors of the Open Inference Protocol: what is sent comes out, and lies cost an error only."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core.errors import InvalidRequest, PayloadTooLarge
from service.api.inference.messages import InferRequest
from service.api.inference.tensors import (
    BytesTensor,
    FloatTensor,
    Tensor,
    read_tensors,
    write_floats,
    write_strings,
)

MAX_ROWS = 64


def read(*inputs: dict[str, Any], binary: bytes = b"") -> list[Tensor]:
    message = InferRequest.model_validate({"inputs": list(inputs)})
    return read_tensors(message, memoryview(binary), max_rows=MAX_ROWS)


def text(shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "text", "shape": shape, "datatype": "BYTES", **more}


def floats(shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "features", "shape": shape, "datatype": "FP32", **more}


def size(number: Any) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": number}}


@given(st.lists(st.text(), min_size=1, max_size=MAX_ROWS), st.booleans())
def test_strings_survive_as_bytes_and_as_json(items: list[str], nested: bool):
    items = [item.encode(errors="ignore").decode() for item in items]
    shape = [len(items), 1] if nested else [len(items)]
    binary = write_strings(items)
    (sent,) = read(text(shape, **size(len(binary))), binary=binary)
    assert isinstance(sent, BytesTensor)
    assert [bytes(item).decode() for item in sent.items] == items  # type: ignore[arg-type]
    (sent,) = read(text(shape, data=[[item] for item in items] if nested else items))
    assert isinstance(sent, BytesTensor)
    assert sent.items == items


@given(
    st.integers(1, 5).flatmap(
        lambda dim: st.lists(
            st.lists(st.floats(width=32), min_size=dim, max_size=dim), min_size=1, max_size=8
        )
    )
)
def test_floats_survive_whatever_they_are(rows: list[list[float]]):
    values = np.asarray(rows, np.float32)
    binary = write_floats(values)
    (sent,) = read(floats(list(values.shape), **size(len(binary))), binary=binary)
    assert isinstance(sent, FloatTensor)
    np.testing.assert_array_equal(sent.values, values)


def test_json_and_binary_tensors_in_one_request_in_any_order():
    binary = write_strings(["a", "b"])
    numbers = write_floats(np.ones((2, 3), np.float32))
    found = read(
        text([2], **size(len(binary))), floats([2, 3], data=[[1, 1, 1]] * 2),
        floats([6], **size(len(numbers))),
        binary=binary + numbers,
    )  # fmt: skip
    assert [type(each) for each in found] == [BytesTensor, FloatTensor, FloatTensor]


ONE = write_strings(["ab"])
LIES: dict[str, tuple[dict[str, Any], bytes]] = {
    "a size beyond the end": (text([1], **size(len(ONE) + 1)), ONE),
    "a size that leaves a rest": (text([1], **size(len(ONE) - 1)), ONE),
    "a huge size": (text([1], **size(1 << 39)), ONE),
    "no size": (text([1]), ONE),
    "data and a size": (text([1], data=["a"], **size(len(ONE))), ONE),
    "an element longer than the body": (text([1], **size(8)), struct.pack("<I", 1 << 31) + b"abcd"),
    "an element of 4 GiB": (text([1], **size(8)), b"\xff" * 8),
    "half a length": (text([2], **size(8)), ONE + b"\x00\x00"),
    "fewer elements": (text([2], **size(len(ONE))), ONE),
    "more elements": (text([1], **size(2 * len(ONE))), ONE * 2),
    "empty elements without end": (text([2], **size(4000)), b"\x00" * 4000),
    "three dimensions": (text([1, 1, 1], data=["a"]), b""),
    "two columns": (text([1, 2], data=["a", "b"]), b""),
    "no rows": (text([0], data=[]), b""),
    "no data": (text([1]), b""),
    "numbers as text": (text([1], data=[1]), b""),
    "null as text": (text([1], data=[None]), b""),
    "text as numbers": (floats([1, 1], data=["1"]), b""),
    "objects as numbers": (floats([1, 1], data=[{}]), b""),
    "truths as numbers": (floats([1, 1], data=[True]), b""),
    "ragged": (floats([2, 2], data=[[1, 2], [3]]), b""),
    "nested otherwise": (floats([2, 3], data=[[1, 2], [3, 4], [5, 6]]), b""),
    "nested deeply": (floats([1, 1], data=eval("[" * 80 + "1" + "]" * 80)), b""),
    "a number beyond all types": (floats([1, 1], data=[10**400]), b""),
    "another count": (floats([2, 3], data=[1.0]), b""),
    "a shape that overflows": (floats([2, 1 << 39, 1 << 39], data=[1.0]), b""),
    "floats of another size": (floats([1, 2], **size(7)), b"1234567"),
    "another datatype": (floats([1, 1], data=[1.0]) | {"datatype": "FP64"}, b""),
    "a datatype that is none": (text([1], data=["a"]) | {"datatype": "pickle"}, b""),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused(name: str):
    described, binary = LIES[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            read(described, binary=binary)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [[-1], [True], [1.0], ["1"], [], [1 << 40], [1] * 9, None, 1])
def test_a_shape_that_is_none_is_refused(shape: Any):
    with pytest.raises(ValidationError):
        read(text(shape, data=["a"]))


def test_too_many_rows_are_refused_before_they_are_read():
    with pytest.raises(PayloadTooLarge):
        read(text([MAX_ROWS + 1], data=["a"]))


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 70), st.booleans())
def test_no_bytes_do_more_than_be_refused(binary: bytes, claimed: int, rows: int, is_text: bool):
    described = text([rows]) if is_text else floats([rows, 2])
    try:
        found = read(described | size(claimed), binary=binary)
    except InvalidRequest:
        return
    assert len(found) == 1
