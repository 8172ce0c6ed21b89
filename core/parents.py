"""Which version a job continues: what its `model` names, if that is no backbone.

Not here: pinning it when a job is made (service.api.job_creation), its rows (training.lineage).
"""

from __future__ import annotations

from core.backbones import AUTO, BACKBONES, HF_PREFIX
from core.errors import InvalidRequest, NotFound
from core.identifiers import ModelReference
from core.manifests import ModelManifest
from core.registry import Registry


def find_parent(registry: Registry, tenant: str, model: str) -> ModelManifest | None:
    """Return the version that a job's `model` names now; None for a backbone or `auto`.

    Raises `NotFound` for what is neither, and `InvalidRequest` for a checkpoint, which belongs to
    its job.
    """
    if model == AUTO or model in BACKBONES or model.startswith(HF_PREFIX):
        return None
    try:
        reference = ModelReference.parse(model)
    except InvalidRequest:
        raise NotFound(f"no model {model[:80]!r}", param="model") from None
    parent = registry.resolve(tenant, reference)
    if parent.step is not None:
        raise InvalidRequest(
            "a job continues a version, such as 'name@3', not a checkpoint", param="model"
        )
    return parent
