"""A head: one fine-tuned model's own part, from a trunk's features to probabilities or a value.

It is held as two arrays, so that a thousand of them cost what their numbers cost, and it is safe to
call from several threads. Not here: the features (core.trunk), the fit (training.fit).
"""

from __future__ import annotations

from safetensors.numpy import load

from core.adapter_bank import BankedAdapter
from core.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from core.datasets import Task
from core.errors import Conflict, DataError
from core.linear_graph import read_linear_graph
from core.manifests import GOLDEN_FILE, ModelManifest
from core.novelty import NOVELTY_FILE, Novelty
from core.preprocessing import FloatArray
from core.registry import Registry
from core.tasks import OUTPUT_NAMES, OUTPUTS, activate, golden_unit, group_count
from core.trunk import Trunk, require_equal

FIXED_BYTES = 8_192
BYTES_PER_LABEL = 64
"""What a manifest takes beside the arrays; measured, see docs/decisions/0017-heads-as-arrays.md."""


class Head:
    """Probabilities of a version's classes, in the order of its manifest's labels, or its value.

    `adapter` is its place in its trunk's bank; None for a model whose rows are plain.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        weight: FloatArray,
        bias: FloatArray,
        novelty: Novelty | None = None,
        adapter: BankedAdapter | None = None,
    ) -> None:
        self.manifest = manifest
        self.adapter = adapter
        self.novelty = novelty
        self._output = OUTPUTS[manifest.task]
        self._weight = weight
        self._bias = bias

    @classmethod
    def load(cls, registry: Registry, manifest: ModelManifest, trunk: Trunk | None = None) -> Head:
        """Load a listed version or a checkpoint and replay its golden rows.

        A version with an adapter needs its trunk, through which the rows go.

        Raises `NotFound`, or `Conflict` when a file, the signature or an output is not what was
        published.
        """
        graph = registry.file(manifest, "head.onnx")
        weight, bias = read_linear_graph(graph, OUTPUTS[manifest.task])
        golden = load(registry.file(manifest, GOLDEN_FILE))
        features: FloatArray = golden["features"]
        expected: FloatArray = golden[OUTPUT_NAMES[OUTPUTS[manifest.task]]]
        width = manifest.width
        shapes = weight.shape, features.shape, expected.shape
        rows = len(features) if features.ndim else 0
        if rows == 0 or shapes != ((manifest.dim, width), (rows, manifest.dim), (rows, width)):
            raise Conflict(f"{manifest.reference} does not have the signature of its manifest")
        novelty = None
        if NOVELTY_FILE in manifest.files:
            data = registry.file(manifest, NOVELTY_FILE)
            groups = group_count(manifest.task, len(manifest.labels))
            novelty = Novelty.read(data, groups, manifest.dim)
        adapter = None
        if manifest.kind == "low_rank":
            if trunk is None or trunk.manifest.digest != manifest.trunk:
                raise Conflict(f"{manifest.reference} needs its trunk to be loaded")
            adapter = _bank_adapter(registry, manifest, trunk)
            _replay(manifest, trunk, adapter, features)
        head = cls(manifest, weight, bias, novelty, adapter)
        unit = golden_unit(expected, bias) if manifest.task is Task.REGRESSION else 1.0
        require_equal(head.predict(features) / unit, expected / unit, manifest.reference)
        return head

    @property
    def bytes(self) -> int:
        """About what the head keeps in memory, its manifest included."""
        arrays = self._weight.nbytes + self._bias.nbytes
        arrays += self.novelty.bytes if self.novelty else 0
        arrays += self.adapter.bytes if self.adapter else 0
        return arrays + FIXED_BYTES + BYTES_PER_LABEL * len(self.manifest.labels)

    def predict(self, features: FloatArray) -> FloatArray:
        """Return probabilities [n, classes] or values [n, 1] of features [n, dim], all float32."""
        logits = features @ self._weight
        logits += self._bias
        return activate(self._output, logits)


def _replay(
    manifest: ModelManifest, trunk: Trunk, adapter: BankedAdapter, expected: FloatArray
) -> None:
    """Compare what the trunk gives with the adapter; raise `Conflict`."""
    rows, precision = trunk.golden_rows, trunk.manifest.precision
    if len(rows) != len(expected):
        raise Conflict(f"{manifest.reference} does not have the golden rows of its trunk")
    # Every delta shows in every row, so the shortest tells as much as all, in a third of the time.
    # Only in int8 a row is not the same by itself.
    chosen = list(range(len(rows)))
    if precision == "fp32":
        chosen = [min(chosen, key=lambda number: rows[number].cost)]
    actual = trunk.encode([rows[number] for number in chosen], trunk.bank.gather([adapter]))
    require_equal(actual, expected[chosen], manifest.reference, precision)


def _bank_adapter(registry: Registry, manifest: ModelManifest, trunk: Trunk) -> BankedAdapter:
    config, weights = (registry.file(manifest, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    try:
        return trunk.bank.add(read_adapter(config, weights, trunk.manifest.slots))
    except DataError as error:
        raise Conflict(f"{manifest.reference}: {error.message}") from error
