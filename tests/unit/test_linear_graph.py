"""Reading a linear head: exactly one kind of graph is read, and everything else is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from core.errors import Conflict
from core.linear_graph import read_linear_graph
from tests.builders import head_graph, softmax

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(12, 5)).astype(np.float32)
BIAS = RANDOM.normal(size=5).astype(np.float32)
GRAPH = head_graph(WEIGHT, BIAS)


def test_the_arrays_compute_what_the_runtime_computes():
    weight, bias = read_linear_graph(GRAPH)
    assert (weight.dtype, bias.dtype) == (np.float32, np.float32)
    features = RANDOM.normal(size=(7, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(GRAPH)
    (expected,) = session.run(["probabilities"], {"features": features})
    assert np.abs(softmax(features @ weight + bias) - expected).max() < 1e-6


Edit = Callable[[onnx.ModelProto], object]


def add_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["logits"], ["other"]))


def add_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(BIAS, "more"))


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def doubles(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(WEIGHT.astype(np.float64), "weights")
    )


EDITS: dict[str, Edit] = {
    "a transposed product": lambda m: m.graph.node[0].attribute.append(
        helper.make_attribute("transB", 1)
    ),
    "a scaled product": lambda m: m.graph.node[0].attribute.append(
        helper.make_attribute("alpha", 2.0)
    ),
    "another axis": lambda m: (
        m.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("axis", 0))
    ),
    "another operator": lambda m: setattr(m.graph.node[1], "op_type", "Sigmoid"),
    "another output": lambda m: m.graph.node[1].output.__setitem__(0, "logits2"),
    "no softmax": lambda m: m.graph.node.pop(),
    "no bias": lambda m: m.graph.initializer.pop(),
    "one node more": add_node,
    "one tensor more": add_tensor,
    "external data": external,
    "doubles": doubles,
    "another shape": lambda m: m.graph.initializer[0].dims.__setitem__(0, 6),
    "a bias of another length": lambda m: m.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.zeros(4, np.float32), "bias")
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_any_other_graph_is_refused(edit: Edit):
    model = onnx.load_model_from_string(GRAPH)
    edit(model)
    with pytest.raises(Conflict, match="not a linear head"):
        read_linear_graph(model.SerializeToString())


def test_a_graph_that_is_cut_anywhere_is_refused():
    for length in range(len(GRAPH)):
        try:
            weight, bias = read_linear_graph(GRAPH[:length])
        except Conflict:
            continue
        # What is cut off is not needed for the numbers, such as the version of the operators.
        assert np.array_equal(weight, WEIGHT)
        assert np.array_equal(bias, BIAS)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GRAPH) - 1), st.integers(0, 255))
def test_a_changed_byte_raises_nothing_but_a_conflict(at: int, value: int):
    data = bytearray(GRAPH)
    data[at] = value
    try:
        weight, bias = read_linear_graph(bytes(data))
    except Conflict:
        return
    assert bias.shape == weight.shape[1:]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_noise_raises_nothing_but_a_conflict(data: bytes):
    with pytest.raises(Conflict):
        read_linear_graph(data)
