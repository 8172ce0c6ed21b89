"""Head to ONNX: a head as the files of a model version.

The graph is one `Gemm` and what its task ends in (core.tasks), written node by node, so the same
head gives the same bytes. It is checked against torch before anything is stored, and the rows it
was checked on go with it: every process that loads the head replays them. Not here: publishing
(core.registry).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from core.adapters import Adapter, feed, write_adapter
from core.errors import ExportMismatch
from core.manifests import GOLDEN_FILE
from core.preprocessing import FloatArray
from core.tasks import OUTPUT_NAMES, golden_unit
from core.tensors import write_tensors
from core.trunk import TOLERANCE, Trunk, agree, create_session
from training import parity
from training.backbones import TorchBackbone
from training.fit import Head

GOLDEN_ROWS = 8
_OPSET = 17
# The version of the file format that goes with opset 17; onnx would write its own newest.
_IR_VERSION = 8


def head_to_onnx(head: Head) -> bytes:
    """Return `features` [n, dim] to `probabilities` or `value` [n, width], float32, as a graph."""
    dim, width = head.weight.shape
    name = OUTPUT_NAMES[head.output]
    given = name if head.output == "identity" else "logits"
    nodes = [helper.make_node("Gemm", ["features", "weight", "bias"], [given], name="classify")]
    if head.output == "softmax":
        nodes.append(helper.make_node("Softmax", [given], [name], name="normalise", axis=1))
    elif head.output == "sigmoid":
        nodes.append(helper.make_node("Sigmoid", [given], [name], name="normalise"))
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", dim])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])],
        [
            numpy_helper.from_array(np.ascontiguousarray(head.weight), "weight"),
            numpy_helper.from_array(np.ascontiguousarray(head.bias), "bias"),
        ],
    )
    model = helper.make_model(
        graph,
        producer_name="graft",
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", _OPSET)],
    )
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def export_head(head: Head, features_sample: FloatArray) -> dict[str, bytes]:
    """Return `head.onnx` and its golden rows, checked on `features_sample` [n, dim], n ≥ 1.

    Raises `ExportMismatch` if ONNX Runtime and torch differ by `TOLERANCE` or more, on these rows
    or on zeros.
    """
    graph = head_to_onnx(head)
    sample = np.ascontiguousarray(features_sample, np.float32)
    require_parity(head, graph, np.concatenate([sample, np.zeros_like(sample[:1])]))
    golden = sample[:GOLDEN_ROWS]
    expected = head.predict(golden)
    arrays = {"features": golden, OUTPUT_NAMES[head.output]: expected}
    return {"head.onnx": graph, GOLDEN_FILE: write_tensors(arrays)}


def export_adapted(
    head: Head, adapter: Adapter, trunk: Trunk, backbone: TorchBackbone
) -> dict[str, bytes]:
    """Return a `low_rank` head's files, checked through the trunk against torch with `peft`.

    The golden rows are the trunk's own, so nothing of the data is kept. Raises `ExportMismatch`.
    """
    slots = trunk.manifest.slots
    rows = trunk.golden_rows
    expected = parity.adapted_features(backbone, slots, adapter, rows)
    actual = trunk.encode(rows, feed(adapter, slots))
    if not agree(actual, expected, trunk.manifest.precision):
        difference = float(np.abs(actual - expected).max())
        raise ExportMismatch(f"the trunk with the adapter differs from torch by {difference:.1e}")
    # Features first: they are compared with what the trunk gives, then the head with torch's.
    return export_head(head, expected) | write_adapter(adapter, slots, trunk.manifest.backbone)


def require_parity(head: Head, graph: bytes, features: FloatArray) -> None:
    """Raise `ExportMismatch` unless ONNX Runtime computes torch's probabilities, or values."""
    name = OUTPUT_NAMES[head.output]
    try:
        session = create_session(graph, threads=1)
        actual = np.asarray(session.run([name], {"features": features})[0])
    except Exception as error:
        # ONNX Runtime's errors share no public base class.
        raise ExportMismatch("ONNX Runtime cannot run the exported head") from error
    expected = head.predict(features)
    if actual.shape != expected.shape:
        raise ExportMismatch("the exported head returns another shape than torch")
    unit = golden_unit(expected, head.bias) if head.output == "identity" else 1.0
    difference = float(np.abs(actual - expected).max()) / unit
    if not difference < TOLERANCE:
        raise ExportMismatch(f"the exported head differs from torch by {difference:.1e}")
