"""Two graphs in one: the plain trunk for plain rows, the adaptable one when deltas are fed.

Deltas on every layer cost time even at rank 0: each layer's sum is a pass over memory, and the
convolutions lose their fusions (docs/decisions/0010). So the graph asks once, at the top:

    If(a delta has a rank above 0)  then  adapted  else  plain

Both branches read the same weights, which are stored once; but for those of convolutions, which
ONNX Runtime lays out for the processor only in the graph that owns them. An input for deltas that
is not fed is empty, so that a plain row is fed like any other model's. The adapted branch takes
each row's deltas, just before it multiplies by them, out of as many as are fed: what it copies is
then still in the processor's cache. Not here: how the two come to be (training.trunks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from core.adapters import ROWS, input_names
from core.files import sha256
from core.manifests import Slot


def join(plain: ModelProto, adapted: ModelProto, slots: Sequence[Slot]) -> ModelProto:
    """Return the graph that runs `adapted` when any delta is fed, or else `plain`.

    Both have the output `features`, and `adapted` the inputs of `plain` and then two for each slot.
    """
    weights: dict[str, TensorProto] = {}
    branches = [
        _branch(m.graph, name, weights) for name, m in (("plain", plain), ("adapted", adapted))
    ]
    by_row = take_by_row(branches[1].node, slots)
    del branches[1].node[:]
    branches[1].node.extend(by_row)
    nodes, is_adapted = _asks_for_ranks(slots)
    nodes.append(
        helper.make_node(
            "If", [is_adapted], ["features"],
            name="choose", then_branch=branches[1], else_branch=branches[0],
        )
    )  # fmt: skip
    defaults = [
        numpy_helper.from_array(np.zeros(shape, np.float32), name)
        for slot in slots
        for name, shape in zip(
            input_names(slot), ((1, slot.in_dim, 0), (1, 0, slot.out_dim)), strict=True
        )
    ]
    graph = helper.make_graph(
        nodes,
        "trunk",
        [*adapted.graph.input, rows_input(slots)],
        list(plain.graph.output),
        [
            *weights.values(),
            *defaults,
            numpy_helper.from_array(np.zeros((len(slots), 1), np.int64), ROWS),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
        ],
    )
    return helper.make_model(
        graph,
        producer_name="graft",
        ir_version=plain.ir_version,
        opset_imports=list(plain.opset_import),
    )


def take_by_row(graph: Iterable[NodeProto], slots: Sequence[Slot]) -> list[NodeProto]:
    """Return a graph's nodes such that they take each row's deltas, by `rows`, out of the fed."""
    taken: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for number, slot in enumerate(slots):
        index, chosen = f"{slot.name}.number", f"{slot.name}.rows"
        tensor = numpy_helper.from_array(np.array(number, np.int64), index)
        nodes.append(helper.make_node("Constant", [], [index], value=tensor))
        nodes.append(helper.make_node("Gather", [ROWS, index], [chosen], axis=0))
        for name in input_names(slot):
            taken[name] = f"{name}.by_row"
            nodes.append(helper.make_node("Gather", [name, chosen], [taken[name]], axis=0))
    for node in graph:
        nodes.append(NodeProto())
        nodes[-1].CopyFrom(node)
        nodes[-1].input[:] = [taken.get(name, name) for name in node.input]
    return nodes


def rows_input(slots: Sequence[Slot]) -> ValueInfoProto:
    """Return the input `rows` of a graph with these slots."""
    return helper.make_tensor_value_info(ROWS, TensorProto.INT64, [len(slots), "rows"])


def _asks_for_ranks(slots: Sequence[Slot]) -> tuple[list[NodeProto], str]:
    """Return nodes that tell whether any slot's `a` has a rank above 0, and their output."""
    nodes = [
        helper.make_node("Shape", [input_names(slot)[0]], [f"{slot.name}.rank"], start=2)
        for slot in slots
    ]
    nodes.append(helper.make_node("Max", [node.output[0] for node in nodes], ["rank"]))
    nodes.append(helper.make_node("Greater", ["rank", "zero"], ["is_adapted"]))
    return nodes, "is_adapted"


def _branch(graph: GraphProto, prefix: str, weights: dict[str, TensorProto]) -> GraphProto:
    """Return a graph without inputs; its weights are moved to `weights`, by content."""
    names = {value.name: value.name for value in graph.input}
    own = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]}
    branch = GraphProto()
    branch.CopyFrom(graph)
    del branch.input[:], branch.initializer[:], branch.value_info[:]
    for tensor in graph.initializer:
        if tensor.name in own:
            branch.initializer.append(tensor)
            continue
        content = numpy_helper.to_array(tensor)
        key = sha256(f"{content.dtype}{content.shape}".encode() + content.tobytes())
        if key not in weights:
            weights[key] = TensorProto()
            weights[key].CopyFrom(tensor)
            weights[key].name = f"weight.{len(weights)}"
        names[tensor.name] = weights[key].name
    _rename(branch, lambda name: names.get(name) or (name and f"{prefix}/{name}"))
    branch.name = prefix
    return branch


def _rename(graph: GraphProto, rename: Callable[[str], str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = rename(value.name)
    for node in graph.node:
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _rename(attribute.g, rename)
