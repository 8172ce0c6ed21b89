"""The serving set: an immutable picture of what one process can serve at one moment.

It knows every listed version by its number only, so ten thousand models cost their names; what is
in memory is `service.live_models`. A request takes one model's state once and keeps it, so it sees
a release whole however often the hot loader swaps in the next. The registry is on disk; the serving
set is in memory.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from core.errors import NotFound, Unavailable
from core.identifiers import ModelReference
from core.manifests import Release
from core.registry import Listing


@dataclass(frozen=True)
class ModelState:
    """One model in the set.

    `release` is the current one as this process applies it: without what was refused. It is read
    when it is first needed; until then `is_settled` is false.
    """

    listing: Listing = field(default_factory=lambda: Listing((), 0))
    release: Release | None = None
    is_settled: bool = False
    refused: Mapping[int, str] = field(default_factory=dict)

    @property
    def versions(self) -> tuple[int, ...]:
        """The listed versions that are not known to be bad, ascending."""
        return tuple(number for number in self.listing.versions if number not in self.refused)

    @property
    def named(self) -> frozenset[int]:
        """The versions that the release names."""
        return self.release.versions if self.release else frozenset()


ModelKey = tuple[str, str]
"""(tenant, model name)."""

Slot = tuple[str, str, int | str]
"""(tenant, model name, version); a checkpoint has its alias instead of a version."""


@dataclass(frozen=True)
class IndexEntry:
    """One listed version as this process has it; UNLOADED ones are loaded when asked for."""

    tenant: str
    name: str
    version: int
    state: Literal["READY", "UNLOADED", "UNAVAILABLE"]
    reason: str = ""


@dataclass(frozen=True)
class ServingSet:
    """Models by (tenant, name). Never changed; `replace` returns the next one.

    `is_complete`: the registry has been listed since this process began, and what its releases name
    has been loaded as far as memory allows.
    """

    models: Mapping[ModelKey, ModelState] = field(default_factory=dict)
    is_complete: bool = False

    def state(self, tenant: str, reference: ModelReference) -> ModelState:
        """Return the state of the model that a reference names.

        Raises `NotFound`, or `Unavailable` when it may be one that was not looked at yet.
        """
        state = self.models.get((tenant, reference.name))
        if state is None:
            raise self.unknown(reference)
        return state

    def unknown(self, reference: ModelReference) -> NotFound | Unavailable:
        """The error for a reference that means nothing here."""
        if self.is_complete:
            return NotFound(f"no model {reference}", param="model")
        return Unavailable("the service is starting and has not loaded every model yet")

    def index(self, live: Container[Slot]) -> list[IndexEntry]:
        """Return every listed version, by tenant, name and number; `live` are in memory."""
        return [
            IndexEntry(tenant, name, number, "UNAVAILABLE", state.refused[number])
            if number in state.refused
            else IndexEntry(
                tenant, name, number, "READY" if (tenant, name, number) in live else "UNLOADED"
            )
            for (tenant, name), state in sorted(self.models.items())
            for number in state.listing.versions
        ]

    def replace(self, key: ModelKey, state: ModelState | None) -> ServingSet:
        """Return this set with one model changed, or without it."""
        models = dict(self.models)
        if state is None:
            models.pop(key, None)
        else:
            models[key] = state
        return replace(self, models=MappingProxyType(models))
