"""A graph's linear layers in 8 bits: half the time on a CPU, and a third less memory.

    MatMul(x, W)  →  DynamicQuantizeLinear(x) ▶ MatMulInteger(·, W₈) ▶ Cast ▶ Mul(scales)

Weights are symmetric with one scale for each output channel; activations get one scale and zero
point for the whole tensor when it runs. So a row's numbers move a little with the rows beside it
in a batch (docs/decisions/0022-precision.md has how much), and a batch of the same rows gives the
same numbers again.

Weights have 7 bits. Processors without the VNNI instructions add pairs of products in 16 bits, and
those of 8-bit weights overflow there without a word; with 7 the sums are exact everywhere, so a
trunk that one host exported means the same on all.

This is what `onnxruntime.quantization.quantize_dynamic(per_channel=True, reduce_range=True)` makes,
bit by bit (tested against it), without its temporary files and its loop over channels: under a
second for MiniLM in place of 25. Not here: whether a trunk should be quantised (training.trunks),
whether a job should use it (training.precision).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from core.manifests import Slot
from core.preprocessing import FloatArray

LARGEST_WEIGHT = 64
"""What a channel's largest absolute weight becomes: 7 bits, symmetric."""


def quantise(model: ModelProto) -> int:
    """Quantise, in place, every product of an activation and a constant matrix; return how many.

    Branches are quantised too, and go on sharing their weights. What has no such product is left as
    it is: convolutions, attention, deltas, embeddings.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    # Branches first: the nodes that hold them are copied when their own graph's are replaced.
    parts = [*(a.g for node in graph.node for a in node.attribute if a.HasField("g")), graph]
    quantised: dict[str, list[TensorProto]] = {}
    count = sum(_quantise_nodes(part, weights, quantised) for part in parts)
    used = {name for part in parts for node in part.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [tensor for tensors in quantised.values() for tensor in tensors]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return count


def _quantise_nodes(
    graph: GraphProto, weights: Mapping[str, TensorProto], quantised: dict[str, list[TensorProto]]
) -> int:
    """Replace a graph's products, add their weights to `quantised`, and return how many."""
    inputs: dict[str, list[str]] = {}
    nodes: list[NodeProto] = []
    count = 0
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.data_type != TensorProto.FLOAT or len(weight.dims) != 2:
            nodes.append(node)
            continue
        count += 1
        x, name = node.input
        if x not in inputs:
            inputs[x] = [f"{x}.{part}" for part in ("int8", "scale", "zero")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], inputs[x]))
        if name not in quantised:
            quantised[name] = list(_tensors(name, numpy_helper.to_array(weight)))
        nodes += _product(inputs[x], [t.name for t in quantised[name]], node.output[0])
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def is_quantisable(slots: Sequence[Slot]) -> bool:
    """Tell whether int8 is for this backbone: its blocks are made of linear layers."""
    return any(slot.kind == "linear" for slot in slots)


def _product(x: list[str], weight: list[str], output: str) -> Iterator[NodeProto]:
    """Yield the nodes of one product, of what `DynamicQuantizeLinear` and `_tensors` give."""
    integers, floats, scale = (f"{output}.{part}" for part in ("int32", "float", "scale"))
    values, x_scale, x_zero = x
    matrix, w_scale, w_zero = weight
    yield helper.make_node("MatMulInteger", [values, matrix, x_zero, w_zero], [integers])
    yield helper.make_node("Cast", [integers], [floats], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [x_scale, w_scale], [scale])
    yield helper.make_node("Mul", [floats, scale], [output])


def _tensors(name: str, weight: FloatArray) -> Iterator[TensorProto]:
    """Yield a weight's integers [in, out], its scales [out] and its zero points [out]."""
    integers, scales = quantise_weight(weight)
    yield numpy_helper.from_array(integers, f"{name}.int8")
    yield numpy_helper.from_array(scales, f"{name}.scale")
    yield numpy_helper.from_array(np.zeros_like(integers[0]), f"{name}.zero")


def quantise_weight(weight: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Return integers [in, out] and scales [out] such that their product is about `weight`."""
    # In double precision, as ONNX Runtime's own quantiser does it, and then rounded once.
    scales = (np.abs(weight).max(axis=0).astype(np.float64) / LARGEST_WEIGHT).astype(np.float32)
    scales[scales == 0] = 1.0
    integers = np.rint(weight / scales).clip(-LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int8)
    return integers, scales
