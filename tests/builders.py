"""Small real things: ONNX graphs of a few numbers, and the versions that are made of them.

The text trunk averages an embedding per token, the image trunk averages each channel; a head is a
matrix and a softmax. Each is a valid artifact of the registry, with golden rows computed in numpy.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from core.adapters import ROWS, Adapter, Delta, feed, input_names, write_adapter
from core.datasets import Modality
from core.files import sha256
from core.identifiers import PRODUCTION
from core.manifests import (
    GOLDEN_FILE,
    DatasetReference,
    ModelManifest,
    Release,
    Slot,
    TrunkManifest,
)
from core.preprocessing import FloatArray, ImagePreprocess, TextPreprocess
from core.registry import Registry, own_trunk_files
from core.trunk import Trunk
from training.branches import rows_input, take_by_row

TENANT = "default"
WORDS = ["[PAD]", "[UNK]", "good", "bad", "red", "blue", "cat", "dog"]
DIM = 4
MAX_TOKENS = 16
SLOTS = tuple(
    Slot(name=name, block=block, kind="linear", in_dim=DIM, out_dim=DIM)
    for block, name in enumerate(("layer.0", "layer.1"))
)


def tokenizer_json() -> bytes:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    text: str = tokenizer.to_str()
    return text.encode()


def embedding(seed: int) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(len(WORDS), DIM)).astype(np.float32)


def text_features(table: FloatArray, ids: Sequence[int]) -> FloatArray:
    features: FloatArray = table[list(ids)].mean(axis=0)
    return features


def text_trunk_graph(table: FloatArray) -> bytes:
    """`input_ids` and `attention_mask` [n, width] to the mean embedding, `features` [n, dim]."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["embedded", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["features"]),
    ]
    constants = {"table": table, "last": np.array([2]), "middle": np.array([1])}
    tokens = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "width"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", table.shape[1]])
    return _graph(nodes, tokens, output, constants)


def adaptable_text_graph(table: FloatArray, *, by_row: bool = True) -> bytes:
    """`text_trunk_graph` with two slots: a token's embedding, and the mean of all.

    It takes deltas by `rows`, or, as trunks did before, those that are fed, one for each row.
    """
    dim = table.shape[1]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        *_delta_nodes("tokens", "embedded", SLOTS[0].name),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["embedded", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["total"], keepdims=1),
        helper.make_node("ReduceSum", ["mask3", "middle"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        *_delta_nodes("mean", "adapted", SLOTS[1].name),
        helper.make_node("Squeeze", ["adapted", "middle"], ["features"]),
    ]
    constants = {"table": table, "last": np.array([2]), "middle": np.array([1])}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "width"])
        for name in ("input_ids", "attention_mask")
    ]
    for slot in SLOTS:
        for name, shape in zip(input_names(slot), ((1, dim, 1), (1, 1, dim)), strict=True):
            named = [
                f"{name}.m",
                *(f"{slot.name}.rank" if size == 1 else size for size in shape[1:]),
            ]
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, named))
            constants[name] = np.zeros(shape, np.float32)
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", dim])
    if by_row:
        nodes = take_by_row(nodes, SLOTS)
        inputs.append(rows_input(SLOTS))
        constants[ROWS] = np.zeros((len(SLOTS), 1), np.int64)
    return _graph(nodes, inputs, output, constants)


def _delta_nodes(before: str, after: str, slot: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", [before, f"{slot}.a"], [f"{slot}.down"]),
        helper.make_node("MatMul", [f"{slot}.down", f"{slot}.b"], [f"{slot}.up"]),
        helper.make_node("Add", [before, f"{slot}.up"], [after]),
    ]


def image_trunk_graph(side: int) -> bytes:
    """`pixels` [n, 3, side, side] to the mean of each channel, `features` [n, 3]."""
    node = helper.make_node("ReduceMean", ["pixels"], ["features"], axes=[2, 3], keepdims=0)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, side, side])
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])
    return _graph([node], [pixels], output, {})


def head_graph(weights: FloatArray, bias: FloatArray) -> bytes:
    """`features` [n, dim] to `probabilities` [n, classes]."""
    nodes = [
        helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    dim, classes = weights.shape
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", dim])
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes])
    return _graph(nodes, [features], output, {"weights": weights, "bias": bias})


def softmax(logits: FloatArray) -> FloatArray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: FloatArray = powers / powers.sum(axis=1, keepdims=True)
    return result


def add_text_trunk(
    registry: Registry, seed: int = 0, *, adaptable: bool = False, by_row: bool = True
) -> TrunkManifest:
    """The trunk of a seed, in the registry."""
    manifest, files = text_trunk(seed, adaptable=adaptable, by_row=by_row)
    return registry.add_trunk(f"test-{manifest.digest[:12]}", manifest, files)


def text_trunk(
    seed: int = 0, *, adaptable: bool = False, by_row: bool = True
) -> tuple[TrunkManifest, dict[str, bytes]]:
    table = embedding(seed)
    ids, mask = np.array([[2, 4, 6], [3, 5, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
    expected = np.stack([text_features(table, [2, 4, 6]), text_features(table, [3, 5])])
    config = TextPreprocess(max_tokens=MAX_TOKENS, pad_id=0, inputs=("input_ids", "attention_mask"))
    files = {
        "trunk.onnx": (
            adaptable_text_graph(table, by_row=by_row) if adaptable else text_trunk_graph(table)
        ),
        "tokenizer.json": tokenizer_json(),
        "preprocess.json": config.model_dump_json().encode(),
        GOLDEN_FILE: save({"input_ids": ids, "attention_mask": mask, "features": expected}),
    }
    return _describe(files, Modality.TEXT, DIM, SLOTS if adaptable else ()), files


def add_image_trunk(registry: Registry, side: int = 8) -> TrunkManifest:
    pixels = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    config = ImagePreprocess(
        crop=(side, side), resample="bilinear", mean=(0, 0, 0), std=(255, 255, 255)
    )
    files = {
        "trunk.onnx": image_trunk_graph(side),
        "preprocess.json": config.model_dump_json().encode(),
        GOLDEN_FILE: save({"pixels": pixels, "features": pixels.mean(axis=(2, 3))}),
    }
    manifest = _describe(files, Modality.IMAGE, 3)
    return registry.add_trunk(f"test-{manifest.digest[:12]}", manifest, files)


def draft(
    trunk: TrunkManifest, name: str = "pets", *, job: str = "ftjob-1", attempt: int = 1,
    labels: Sequence[str] = ("cat", "dog"),
) -> ModelManifest:  # fmt: skip
    return ModelManifest(
        tenant=TENANT,
        name=name,
        version=0,
        job=job,
        attempt=attempt,
        created_at=time.time(),
        backbone="minilm",
        trunk=trunk.digest,
        modality=trunk.modality,
        dim=trunk.dim,
        labels=list(labels),
        files={},
        dataset=DatasetReference(file="file-1", sha256="0" * 64, rows=8),
        training={},
        metrics={"accuracy": 0.5},
    )


def head_files(
    dim: int, classes: int = 2, seed: int = 0, features: FloatArray | None = None
) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    weights = random.normal(size=(dim, classes)).astype(np.float32)
    bias = random.normal(size=classes).astype(np.float32)
    if features is None:
        features = random.normal(size=(3, dim)).astype(np.float32)
    return {
        "head.onnx": head_graph(weights, bias),
        GOLDEN_FILE: save(
            {"features": features, "probabilities": softmax(features @ weights + bias)}
        ),
    }


def publish(
    registry: Registry, trunk: TrunkManifest, name: str = "pets", *, job: str | None = None,
    attempt: int = 1, labels: Sequence[str] = ("cat", "dog"),
    files: Mapping[str, bytes] | None = None, release: bool = True, seed: int = 0,
) -> ModelManifest:  # fmt: skip
    """Store a version, list it, and let the production alias name it."""
    manifest = registry.publish(
        draft(
            trunk,
            name,
            job=job or f"ftjob-{time.monotonic_ns()}",
            attempt=attempt,
            labels=labels,
        ),
        files or head_files(trunk.dim, len(labels), seed),
    )
    if release:
        promote(registry, manifest)
    return manifest


def random_adapter(seed: int, ranks: Sequence[int] = (2, 2)) -> Adapter:
    """An adapter for the adaptable trunk, with a delta of each slot's rank; 0 is none."""
    random = np.random.default_rng(seed)
    return Adapter(
        {
            slot.name: Delta(
                random.normal(size=(DIM, rank)).astype(np.float32),
                random.normal(size=(rank, DIM)).astype(np.float32),
            )
            for slot, rank in zip(SLOTS, ranks, strict=True)
            if rank
        }
    )


def constant_adapter(number: int) -> Adapter:
    """An adapter whose deltas are the number everywhere."""
    return Adapter(
        {
            slot.name: Delta(
                np.full((slot.in_dim, 2), number, np.float32),
                np.full((2, slot.out_dim), number, np.float32),
            )
            for slot in SLOTS
        }
    )


def publish_low_rank(
    registry: Registry, trunk: TrunkManifest, name: str = "pets", *, seed: int = 0,
    release: bool = True,
) -> ModelManifest:  # fmt: skip
    """Store a version with an adapter on the adaptable trunk; its head is that of `seed`."""
    manifest = registry.publish(*low_rank(registry, trunk, name, seed=seed))
    if release:
        promote(registry, manifest)
    return manifest


def low_rank(
    registry: Registry, trunk: TrunkManifest, name: str = "pets", *, seed: int = 0
) -> tuple[ModelManifest, dict[str, bytes]]:
    """The draft and the files of a version with an adapter."""
    loaded = Trunk.load(registry, trunk.digest, threads=1, max_pixels=1)
    adapter = random_adapter(seed)
    features = loaded.encode(loaded.golden_rows, feed(adapter, SLOTS))
    files = head_files(DIM, seed=seed, features=features) | write_adapter(adapter, SLOTS, "minilm")
    kind = {"kind": "low_rank", "rank": adapter.rank, "blocks": len(SLOTS)}
    return draft(trunk, name, job=f"ftjob-{time.monotonic_ns()}").model_copy(update=kind), files


def publish_full(
    registry: Registry, name: str = "pets", *, seed: int = 0, tenant: str = TENANT
) -> ModelManifest:
    """Store a version with the trunk of `seed` as its own; its head is that of `seed`."""
    trunk, files = text_trunk(seed)
    kind = {"kind": "full", "tenant": tenant}
    made = draft(trunk, name, job=f"ftjob-{time.monotonic_ns()}").model_copy(update=kind)
    return registry.publish(made, head_files(DIM, seed=seed) | own_trunk_files(trunk, files))


def promote(registry: Registry, manifest: ModelManifest, alias: str = PRODUCTION) -> Release:
    return registry.releases.alias(
        TENANT, manifest.name, {alias: manifest.version}, created_by="test", reason="test"
    )


def encoded_image(
    color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (12, 9),
    format: str = "PNG",
) -> bytes:  # fmt: skip
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format)
    return buffer.getvalue()


def _describe(
    files: dict[str, bytes], modality: Modality, dim: int, slots: tuple[Slot, ...] = ()
) -> TrunkManifest:
    hashes = {name: sha256(data) for name, data in files.items()}
    digest = sha256(repr(sorted(hashes.items())).encode())
    return TrunkManifest(
        digest=digest,
        backbone="minilm" if modality is Modality.TEXT else "efficientnet-lite0",
        backbone_digest="0" * 64,
        modality=modality,
        dim=dim,
        precision="fp32",
        files=hashes,
        slots=slots,
        blocks=len(slots),
        max_difference=0.0,
        created_at=0.0,
    )


def _graph(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
    constants: Mapping[str, np.ndarray],
) -> bytes:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "test", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data
