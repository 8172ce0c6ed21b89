"""One stand-alone graph of a model: inputs to probabilities, its trunk, deltas and head inside.

    input_ids, attention_mask ▶ trunk ▶ features ▶ head ▶ probabilities     or `pixels` ▶ …

For those who want to run a model without Graft. An adapter becomes the constant value of inputs
that the trunk's graph has for it, so a run-time that folds constants keeps only the branch that is
taken. Not here: which files a model has (core.registry), fetching them (cli.export).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import ModelProto, numpy_helper

from core.adapters import CONFIG_FILE, WEIGHTS_FILE, Deltas, feed, read_adapter
from core.errors import ExportMismatch, GraftError
from core.manifests import TrunkManifest
from core.trunk import Trunk, agree, create_session

Read = Callable[[str], bytes]


def merge(read: Read, *, has_adapter: bool) -> bytes:
    """Return the graph of a model whose files `read` returns by name (`Registry.stored_files`).

    Raises `ExportMismatch` if it does not answer the trunk's golden rows as the parts do, and
    `DataError` or `Conflict` if a file is not what it should be.
    """
    manifest = TrunkManifest.model_validate_json(read("trunk/manifest.json"))
    trunk = Trunk.read(manifest, lambda name: read(f"trunk/{name}"), threads=1, max_pixels=1)
    deltas: Deltas = {}
    if has_adapter:
        adapter = read_adapter(read(CONFIG_FILE), read(WEIGHTS_FILE), manifest.slots)
        deltas = feed(adapter, manifest.slots)
    head = read("head.onnx")
    merged = _join(onnx.load_from_string(read("trunk/trunk.onnx")), onnx.load_from_string(head))
    _fix(merged, deltas)
    onnx.checker.check_model(merged)
    graph: bytes = merged.SerializeToString(deterministic=True)

    rows = trunk.golden_rows
    expected = create_session(head, threads=1).run(None, {"features": trunk.encode(rows, deltas)})
    actual = create_session(graph, threads=1).run(None, trunk.feed(rows))
    if not agree(actual[0], expected[0], manifest.precision):
        raise ExportMismatch("the stand-alone graph does not answer as the model does")
    return graph


def _join(trunk: ModelProto, head: ModelProto) -> ModelProto:
    """Return the trunk's graph with the head's behind it."""
    joined = ModelProto()
    joined.CopyFrom(trunk)
    (given,), outputs = head.graph.input, {value.name for value in head.graph.output}
    (features,) = trunk.graph.output

    def rename(name: str) -> str:
        if name == given.name:
            return str(features.name)
        return name if name in outputs else f"head/{name}"

    for node in head.graph.node:
        added = joined.graph.node.add()
        added.CopyFrom(node)
        added.name = node.name and f"head/{node.name}"
        added.input[:] = [rename(name) for name in node.input]
        added.output[:] = [rename(name) for name in node.output]
    for tensor in head.graph.initializer:
        added = joined.graph.initializer.add()
        added.CopyFrom(tensor)
        added.name = rename(tensor.name)
    del joined.graph.output[:]
    joined.graph.output.extend(head.graph.output)
    return joined


def _fix(model: ModelProto, deltas: Deltas) -> None:
    """Make constants of all inputs that have a value, of these deltas or by default."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in deltas.items():
        values[name].CopyFrom(numpy_helper.from_array(array, name))
    left = [value for value in model.graph.input if value.name not in values]
    del model.graph.input[:]
    model.graph.input.extend(left)


def main() -> None:
    """Read a model's files in the folder that is named, and write `model.onnx` there.

    What is foreseen to go wrong is one line on the standard error, and exit code 1.
    """
    folder = Path(sys.argv[1])
    has_adapter = (folder / CONFIG_FILE).is_file()
    try:
        graph = merge(lambda name: (folder / name).read_bytes(), has_adapter=has_adapter)
    except GraftError as error:
        raise SystemExit(error.message) from None
    (folder / "model.onnx").write_bytes(graph)


if __name__ == "__main__":
    main()
