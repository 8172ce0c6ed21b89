"""Running trunks with ONNX Runtime: the one code path of feature extraction and serving.

The worker fits heads on features that this module computed, and the service predicts with them
through this module, so there is no difference between training and serving to go wrong.

A trunk is safe to call from several threads; ONNX Runtime releases the GIL while it runs. Not here:
how rows of several requests become one batch (service.batcher), heads (core.head), where
graphs come from (core.registry, training.export).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

# Its telemetry is on by default and reports to its maker; what it reads is read at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
from safetensors.numpy import load

from core.adapter_bank import AdapterBank
from core.adapters import ROWS, Deltas
from core.datasets import Modality
from core.errors import Conflict
from core.manifests import GOLDEN_FILE, OWN_TRUNK, ModelManifest, Precision, TrunkManifest
from core.preprocessing import (
    FloatArray,
    ImagePreprocess,
    ImagePreprocessor,
    Prepared,
    PreparedImage,
    PreparedText,
    Preprocessor,
    TextPreprocess,
    TextPreprocessor,
    parse_preprocess,
)
from core.registry import Registry

TOLERANCE = 1e-4
"""Largest difference between a graph's output and torch's; see `tolerance`."""

INT8_TOLERANCE = 0.3
"""Largest distance between an int8 trunk's features of a row and torch's, by the length of these.

Measured at most 0.21 on rows of random tokens, which are the worst (docs/decisions/0022). Rounding
that another processor does differently moves them half as far as quantising itself, so a closer
bound would refuse sound trunks; what computes something else is at 1 and above."""

SESSION_SIZE = 1.1
"""Memory of a session, in sizes of its graph (docs/decisions/0035)."""

BATCH_BYTES = {Modality.TEXT: 30 << 20, Modality.IMAGE: 85 << 20}
"""What it keeps besides from the largest batch that it has run."""

# Creating two sessions at once in one process is reported to be racy.
_SESSION_LOCK = threading.Lock()


class Encoder(Protocol):
    """Turns prepared inputs into pooled features."""

    @property
    def dim(self) -> int:
        """Width of the features."""

    @property
    def modality(self) -> Modality:
        """What it reads."""

    def encode(self, rows: Sequence[Prepared], deltas: Deltas | None = None) -> FloatArray:
        """Return features, float32 [len(rows), dim], row by row in order, with `deltas` if any."""


def create_session(graph: bytes, threads: int) -> ort.InferenceSession:
    """Load a graph for the CPU with `threads` intra-op threads that sleep when idle."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads starve their neighbours: 1.7 to 3.1 times slower under contention.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    with _SESSION_LOCK:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Trunk:
    """An exported backbone: an `Encoder` with the preprocessing that belongs to it."""

    def __init__(
        self, manifest: TrunkManifest, graph: bytes, preprocessor: Preprocessor, threads: int
    ) -> None:
        self.manifest = manifest
        self.preprocessor = preprocessor
        self.golden_rows: Sequence[Prepared] = ()
        """The inputs that every head with an adapter is replayed on; none unless it was loaded."""
        self._session = create_session(graph, threads)
        optional = {value.name for value in self._session.get_overridable_initializers()}
        self.bytes = round(SESSION_SIZE * len(graph)) + BATCH_BYTES[manifest.modality]
        """About what it keeps in memory."""
        self.bank = AdapterBank(manifest.slots, takes_rows=ROWS in optional)
        """The adapters of the heads that are loaded on it."""

    @classmethod
    def load(cls, registry: Registry, digest: str, *, threads: int, max_pixels: int) -> Trunk:
        """Load a trunk from the registry and replay its golden rows.

        Raises `NotFound`, or `Conflict` when a file or an output is not what was exported.
        """
        manifest = registry.trunk(digest)
        return cls.read(
            manifest, lambda name: registry.trunk_file(manifest, name), threads, max_pixels
        )

    @classmethod
    def load_for(
        cls, registry: Registry, model: ModelManifest, *, threads: int, max_pixels: int
    ) -> Trunk:
        """Load the trunk that a version runs on, its own if it has one; raises as `load` does."""
        if not model.has_own_trunk:
            return cls.load(registry, model.trunk, threads=threads, max_pixels=max_pixels)
        return cls.read(
            registry.own_trunk(model),
            lambda name: registry.file(model, f"{OWN_TRUNK}{name}"), threads, max_pixels,
        )  # fmt: skip

    @classmethod
    def read(
        cls, manifest: TrunkManifest, read: Callable[[str], bytes], threads: int, max_pixels: int
    ) -> Trunk:
        """Load a trunk from its files and replay its golden rows; raises `Conflict`."""
        config = parse_preprocess(read("preprocess.json"))
        tokenizer = read("tokenizer.json") if isinstance(config, TextPreprocess) else b""
        graph = read("trunk.onnx")
        preprocessor = build_preprocessor(config, tokenizer, max_pixels)
        trunk = cls(manifest, graph, preprocessor, threads)
        rows, expected = trunk.golden(read(GOLDEN_FILE))
        what = f"trunk {manifest.digest[:12]}"
        require_equal(trunk.encode(rows), expected, what, manifest.precision)
        trunk.golden_rows = rows
        return trunk

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.manifest.dim

    @property
    def modality(self) -> Modality:
        """What the trunk reads."""
        return self.manifest.modality

    def encode(self, rows: Sequence[Prepared], deltas: Deltas | None = None) -> FloatArray:
        """Return features, float32 [len(rows), dim]; texts are padded to the longest among them.

        `deltas` are those of the whole batch, as `core.adapters.feed` or the bank makes them;
        without any, the rows are plain.
        """
        if not rows:
            return np.zeros((0, self.dim), np.float32)
        fed = {**self.feed(rows), **(deltas or {})}
        features: FloatArray = self._session.run(["features"], fed)[0]
        return features

    def feed(self, rows: Sequence[Prepared]) -> dict[str, np.ndarray]:
        """Return rows, one at least, as the graph's inputs."""
        return self._text_feed(rows) if self.modality is Modality.TEXT else self._image_feed(rows)

    def golden(self, data: bytes) -> tuple[list[Prepared], FloatArray]:
        """Read `GOLDEN_FILE`: inputs as arrays, and the features that torch gave for them."""
        arrays = load(data)
        rows: list[Prepared]
        if self.modality is Modality.TEXT:
            lengths = arrays["attention_mask"].sum(axis=1)
            rows = [
                PreparedText(ids[:length].tolist())
                for ids, length in zip(arrays["input_ids"], lengths, strict=True)
            ]
        else:
            rows = [PreparedImage(pixels) for pixels in arrays["pixels"]]
        return rows, arrays["features"]

    def _text_feed(self, rows: Sequence[Prepared]) -> dict[str, np.ndarray]:
        config = self.preprocessor.config
        assert isinstance(config, TextPreprocess)
        texts = [row.ids for row in rows if isinstance(row, PreparedText)]
        width = max(1, max(len(ids) for ids in texts))
        input_ids = np.full((len(texts), width), config.pad_id, np.int64)
        mask = np.zeros((len(texts), width), np.int64)
        for index, ids in enumerate(texts):
            input_ids[index, : len(ids)] = ids
            mask[index, : len(ids)] = 1
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(input_ids),
        }
        return {name: arrays[name] for name in config.inputs}

    @staticmethod
    def _image_feed(rows: Sequence[Prepared]) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([row.pixels for row in rows if isinstance(row, PreparedImage)])}


def build_preprocessor(
    config: TextPreprocess | ImagePreprocess, tokenizer_json: bytes, max_pixels: int
) -> Preprocessor:
    """Return the preprocessor that `config` describes; images need no tokenizer."""
    if isinstance(config, TextPreprocess):
        return TextPreprocessor(config, tokenizer_json)
    return ImagePreprocessor(config, max_pixels)


def tolerance(expected: FloatArray) -> float:
    """Return the largest difference allowed: absolute up to 1, relative to the largest above it.

    Rounding grows with the numbers that are rounded, and some encoders do not normalise theirs.
    NaN, which nothing is equal to, for an array that holds anything but finite numbers.
    """
    if not np.isfinite(expected).all():
        return float("nan")
    return TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0)))


def agree(actual: FloatArray, expected: FloatArray, precision: Precision = "fp32") -> bool:
    """Tell whether what a graph of this precision gave [n, dim] is what torch gave.

    At int8 rows are compared as a whole: a single number of many may be far off.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return False
    difference = actual - expected
    if precision == "int8":
        lengths = np.linalg.norm(expected, axis=-1)
        return bool(np.all(np.linalg.norm(difference, axis=-1) <= INT8_TOLERANCE * lengths))
    return bool(np.all(np.abs(difference) <= tolerance(expected)))


def require_equal(
    actual: FloatArray, expected: FloatArray, what: str, precision: Precision = "fp32"
) -> None:
    """Raise `Conflict` unless the numbers `agree` with the recorded ones."""
    if not agree(actual, expected, precision):
        raise Conflict(f"{what} does not reproduce its golden rows")
