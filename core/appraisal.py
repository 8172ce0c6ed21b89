"""What a job will have to do, as far as it is known before it runs: from a request to a workload.

It reads what is stored: the manifests of the files, the version that the job continues, and whether
the trunk is there. A worker asks when a file has been parsed, the service when a job is made or
previewed. Not here: what the work costs (core.estimate).
"""

from __future__ import annotations

from core.backbones import AUTO, BACKBONES
from core.datasets import DatasetManifest, Modality
from core.errors import InvalidRequest, NotFound
from core.estimate import Workload
from core.files import FileStore
from core.jobs import FineTuneRequest
from core.parents import find_parent
from core.registry import Registry
from core.store import ArtifactStore

USUAL_DIM = {Modality.TEXT: 768, Modality.IMAGE: 1280}
"""For a backbone that is not in the table."""


class Appraiser:
    """Reads workloads from the artifact store; remembers which trunks it has seen there."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._registry = Registry(store)
        self._seen: set[tuple[str, str]] = set()

    def appraise(self, tenant: str, request: FineTuneRequest) -> Workload | None:
        """Return what a job will have to do; None until its files are parsed, or if one is bad.

        May raise `Unavailable`.
        """
        files = FileStore(self._store, tenant)
        names = [request.training_file]
        names += [request.validation_file] if request.validation_file else []
        manifests = [found for name in names if (found := _manifest(files, name))]
        if len(manifests) < len(names):
            return None
        train, modality = manifests[0], manifests[0].modality
        try:
            parent = find_parent(self._registry, tenant, request.model)
        except (InvalidRequest, NotFound):
            parent = None
        model = parent.backbone if parent else request.model
        known = BACKBONES.get(model)
        epochs = request.chosen_hyperparameters.n_epochs
        precision = "fp32" if request.strategy == "full" else request.precision
        return Workload(
            model=model,
            modality=modality,
            dim=known.dim if known else USUAL_DIM[modality],
            rows=train.rows + (parent.dataset.rows if parent else 0),
            new_rows=sum(manifest.rows for manifest in manifests),
            classes=len({*train.counts, *(parent.labels if parent else ())}),
            stored_bytes=sum(files.get(name).bytes for name in names),
            row_cost=known.row_cost if known else 1.0,
            strategy=request.strategy,
            precision=precision,
            epochs=None if epochs == "auto" else epochs,
            max_seconds=request.max_seconds,
            trunks=self._missing(model, precision),
            is_rough=known is None or request.strategy == AUTO,
        )

    def _missing(self, model: str, precision: str) -> int:
        """Return how many trunks have to be exported for a backbone of the table."""
        wanted = ("fp32", "int8") if precision == AUTO else (precision,)
        if model not in BACKBONES:
            return 0
        if not BACKBONES[model].has_int8:
            wanted = ("fp32",)
        for each in wanted:
            if (model, each) not in self._seen and self._registry.newest_trunk(model, each):
                self._seen.add((model, each))
        return sum((model, each) not in self._seen for each in wanted)


def _manifest(files: FileStore, name: str) -> DatasetManifest | None:
    _, outcome = files.status(name)
    return outcome if isinstance(outcome, DatasetManifest) else None
