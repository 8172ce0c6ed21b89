"""Backbone to trunk: export once, check against torch, store by content.

A trunk is found under a key made of the backbone's files, the precision and the recipe below, so a
second job, or a second worker, only loads it: no torch model is built. Whoever exports at the same
time stores the same content, or finds that another was first.

Not here: loading weights (training.backbones), which layers take deltas (training.adaptable), how
two graphs become one (training.branches), comparing the graph with torch (training.parity).
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import onnx
import torch
from torch import Tensor

from core.adapters import input_names
from core.errors import DataError, ExportMismatch
from core.files import sha256
from core.manifests import GOLDEN_FILE, Precision, Slot, TrunkManifest
from core.preprocessing import ImagePreprocess
from core.registry import Registry
from core.trunk import Trunk
from training import adaptable, backbones, branches, parity, quantization
from training.backbones import TorchBackbone

EXPORT_RECIPE = 5
"""Raise it with any change to how graphs are made or inputs prepared: every trunk is made anew."""

_OPSET = 17
_VERSIONS_OF = ("torch", "transformers", "onnx", "onnxruntime")


def ensure_trunk(
    registry: Registry,
    model: str,
    *,
    precision: Precision = "fp32",
    hf_models: tuple[str, ...],
    threads: int,
    max_pixels: int,
    on_export: Callable[[], None],
    loaded: Trunk | None = None,
) -> Trunk:
    """Return the trunk of a backbone, exporting it if this store has none; `on_export` is told.

    `loaded` is returned if it is the same, with the same `threads` and `max_pixels`.
    Raises `DataError` (`param="model"`) for a backbone that cannot be used, or not at this
    precision (`param="precision"`), `ExportMismatch` if the graph disagrees with torch, and
    `Conflict` if a stored trunk is damaged.
    """
    key = _key(backbones.digest(model, hf_models), precision)
    manifest = registry.find_trunk(key)
    if manifest is None:
        on_export()
        backbone = backbones.load(model, hf_models)
        manifest = registry.add_trunk(key, *export(backbone, precision))
    if loaded is not None and loaded.manifest.digest == manifest.digest:
        return loaded
    return Trunk.load(registry, manifest.digest, threads=threads, max_pixels=max_pixels)


def load_known(
    registry: Registry,
    model: str,
    *,
    hf_models: tuple[str, ...],
    threads: int,
    max_pixels: int,
    max_bytes: int,
) -> Trunk | None:
    """Return a backbone's fp32 trunk if this store has one of at most `max_bytes`."""
    manifest = registry.find_trunk(_key(backbones.digest(model, hf_models), "fp32"))
    if manifest is None or registry.trunk_bytes(manifest) > max_bytes:
        return None
    return Trunk.load(registry, manifest.digest, threads=threads, max_pixels=max_pixels)


def export(
    backbone: TorchBackbone, precision: Precision = "fp32", *, takes_deltas: bool = True
) -> tuple[TrunkManifest, dict[str, bytes]]:
    """Return a backbone as a trunk's manifest and files, checked against torch.

    A trunk that takes no deltas has no slots, and a smaller graph.
    Raises `DataError` if torch cannot export it, or not at this precision, and `ExportMismatch` if
    the graph is not the same.
    """
    slots = slots_of(backbone) if takes_deltas else ()
    if precision == "int8":
        require_quantisable(backbone.name, slots)
    graph = to_onnx(backbone, slots)
    batches = list(parity.probes(backbone))
    files = {
        "trunk.onnx": graph if precision == "fp32" else to_int8(graph),
        "preprocess.json": backbone.preprocess.model_dump_json(indent=1).encode(),
        GOLDEN_FILE: parity.golden(backbone, batches[0]),
    }
    if backbone.tokenizer_json is not None:
        files["tokenizer.json"] = backbone.tokenizer_json
    hashes = {name: sha256(files[name]) for name in sorted(files)}
    manifest = TrunkManifest(
        digest=sha256("".join(f"{name}:{value}\n" for name, value in hashes.items()).encode()),
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        modality=backbone.modality,
        dim=backbone.dim,
        precision=precision,
        files=hashes,
        slots=slots,
        blocks=1 + max((slot.block for slot in slots), default=-1),
        max_difference=0.0,
        created_at=time.time(),
        versions={name: version(name) for name in _VERSIONS_OF},
    )
    # The exact graph is compared first: int8 is too coarse a measure of what a delta does.
    exact = manifest.model_copy(update={"precision": "fp32"})
    difference = parity.max_difference(backbone, exact, graph, batches)
    if precision == "int8":
        difference = parity.max_difference(backbone, manifest, files["trunk.onnx"], batches)
    return manifest.model_copy(update={"max_difference": difference}), files


def slots_of(backbone: TorchBackbone) -> tuple[Slot, ...]:
    """Return the layers that can take deltas, block by block from the bottom; it may have none."""
    inputs = _example(backbone)
    return adaptable.find_slots(backbone.encoder, lambda: backbone.module(*inputs), len(inputs[0]))


def to_onnx(backbone: TorchBackbone, slots: Sequence[Slot]) -> bytes:
    """Return the backbone as one self-contained ONNX graph with the output `features`.

    It takes deltas on `slots`, and none at no cost. Raises `DataError`.
    """
    inputs = _example(backbone)
    names = parity.input_names(backbone)
    axes = {name: {0: "n", 1: "tokens"} for name in names}
    if isinstance(backbone.preprocess, ImagePreprocess):
        axes = {name: {0: "n"} for name in names}
    module = adaptable.Adaptable(backbone.module, backbone.encoder_path, slots, inputs)
    graph = _trace(module, inputs, axes)
    if slots:
        deltas: list[Tensor] = []
        delta_axes: dict[str, dict[int, str]] = {}
        for slot in slots:
            # Two rows and an odd rank, so that neither looks like a constant.
            deltas += [torch.randn(2, slot.in_dim, 3), torch.randn(2, 3, slot.out_dim)]
            a, b = input_names(slot)
            leading, rank = f"{slot.name}.n", f"{slot.name}.r"
            delta_axes |= {a: {0: leading, 2: rank}, b: {0: leading, 1: rank}}
        adapted = _trace(module, (*inputs, *deltas), axes | delta_axes)
        graph = branches.join(graph, adapted, slots)
    return _to_bytes(graph)


def to_int8(graph: bytes) -> bytes:
    """Return a trunk's graph with its linear layers, in both branches, quantised."""
    model = onnx.load_from_string(graph)
    quantization.quantise(model)
    return _to_bytes(model)


def _to_bytes(graph: onnx.ModelProto) -> bytes:
    onnx.checker.check_model(graph)
    data: bytes = graph.SerializeToString(deterministic=True)
    require_self_contained(data)
    return data


def _example(backbone: TorchBackbone) -> tuple[Tensor, ...]:
    """Return inputs for two unequal rows: neither batch nor padding then looks like a constant."""
    return parity.torch_inputs(backbone, next(parity.probes(backbone))[:2])


def _trace(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], axes: Mapping[str, Mapping[int, str]]
) -> onnx.ModelProto:
    """Trace a module whose inputs have the names, and the dynamic axes, that `axes` gives.

    Torch's newer exporter takes 19 s for MiniLM where tracing takes 1, gives the same numbers, and
    names the output into a graph that ONNX Runtime rejects.
    """
    buffer = io.BytesIO()
    tracer_warning: type[Warning] = vars(torch.jit)["TracerWarning"]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings(
            "ignore", "You are using the legacy TorchScript", DeprecationWarning
        )
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        warnings.filterwarnings("ignore", "Exporting aten::index operator", UserWarning)
        # What tracing froze is what `parity.max_difference` looks for.
        warnings.filterwarnings("ignore", category=tracer_warning)
        export_by_tracing: Any = torch.onnx.export  # whose annotations leave out file objects
        try:
            export_by_tracing(
                module,
                inputs,
                buffer,
                dynamo=False,
                input_names=list(axes),
                output_names=["features"],
                dynamic_axes={**axes, "features": {0: "n"}},
                opset_version=_OPSET,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError("torch cannot export the model to ONNX", param="model") from error
    return onnx.load_from_string(buffer.getvalue())


def require_self_contained(graph: bytes) -> None:
    """Raise `ExportMismatch` if the graph reads any tensor from another file."""
    model = onnx.load_from_string(graph)
    tensors = list(model.graph.initializer)
    tensors += [attribute.t for node in model.graph.node for attribute in node.attribute]
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
        raise ExportMismatch("the exported graph keeps its weights in another file")


def require_quantisable(model: str, slots: Sequence[Slot]) -> None:
    """Raise `DataError` (`param="precision"`) for a backbone that int8 would not make faster."""
    if not quantization.is_quantisable(slots):
        raise DataError(
            f"{model} has no linear layers in its blocks, which is what int8 makes faster; "
            "use precision 'fp32'",
            param="precision",
        )


def _key(backbone_digest: str, precision: Precision) -> str:
    return sha256(f"{backbone_digest}:{precision}:{EXPORT_RECIPE}".encode())
