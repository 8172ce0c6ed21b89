"""The serving set: an immutable picture of what one process serves at one moment.

A request takes the current set once and keeps it, so it sees one consistent picture however often
the hot loader swaps in the next. The registry is on disk; the serving set is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from core.errors import NotFound, Unavailable
from core.identifiers import ModelReference
from core.manifests import ModelManifest
from core.head import Head
from core.trunk import Trunk
from service.batcher import Batcher


@dataclass(frozen=True)
class LiveTrunk:
    """A trunk with its batcher; shared by every head that was fitted on it."""

    trunk: Trunk
    batcher: Batcher


@dataclass(frozen=True)
class LiveModel:
    """A version that answers predictions."""

    head: Head
    trunk: LiveTrunk

    @property
    def manifest(self) -> ModelManifest:
        """What the version is."""
        return self.head.manifest


@dataclass(frozen=True)
class ModelState:
    """One model in the set: its live versions, what its aliases name, and what was refused."""

    versions: Mapping[int, LiveModel] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
    release: int = 0


ModelKey = tuple[str, str]
"""(tenant, model name)."""


@dataclass(frozen=True)
class ServingSet:
    """Models by (tenant, name). Never changed; `replace` returns the next one.

    `is_complete`: every model of the registry has been looked at since this process began.
    """

    models: Mapping[ModelKey, ModelState] = field(default_factory=dict)
    is_complete: bool = False

    def resolve(self, tenant: str, reference: ModelReference) -> LiveModel:
        """Return the live version that a reference means.

        Raises `NotFound`, or `Unavailable` when the version was refused by this process, or may be
        one that it has not looked at yet.
        """
        state = self.models.get((tenant, reference.name))
        if state is not None:
            version = reference.version or state.aliases.get(reference.alias)
            if version is not None and version in state.versions:
                return state.versions[version]
            if version is not None and version in state.refused:
                raise Unavailable(f"{reference} cannot be served: {state.refused[version]}")
        if not self.is_complete:
            raise Unavailable("the service is starting and has not loaded every model yet")
        raise NotFound(f"no model {reference}", param="model")

    def replace(self, key: ModelKey, state: ModelState | None) -> ServingSet:
        """Return this set with one model changed, or without it."""
        models = dict(self.models)
        if state is None:
            models.pop(key, None)
        else:
            models[key] = state
        return ServingSet(MappingProxyType(models), self.is_complete)

    @property
    def live_versions(self) -> int:
        """How many versions the set serves."""
        return sum(len(state.versions) for state in self.models.values())

    def trunks(self) -> set[str]:
        """Digests of the trunks that some live version needs."""
        return {
            model.manifest.trunk
            for state in self.models.values()
            for model in state.versions.values()
        }
