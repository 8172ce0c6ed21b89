"""The hot loader: keeps one process's serving set equal to the registry, off the request path.

Of each model that differs, what is new and what its release names is loaded first
(service.live_models), then the reference is swapped: the next request sees the new release whole,
those under way end on the old one, and only then is memory given back. A version that does not pass
its checks is refused, with its reason kept in the set; the versions before it go on serving, and
other models do not notice. Versions that no release names are loaded when asked for, and so is
everything that the memory budget has no room for.

Not here: when to look (service.watch), what a version must fulfil (core.head, core.trunk), how a
split is decided (service.routing).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from weakref import WeakValueDictionary

from core.checkpoints import parse_checkpoint
from core.errors import NoSpace, NotFound, Unavailable, VersionRefused
from core.identifiers import ModelReference
from core.registry import Listing, Registry
from service.live_models import LiveModel, LiveModels, Refused
from service.routing import choose_version
from service.serving_set import IndexEntry, ModelKey, ModelState, ServingSet, Slot

logger = logging.getLogger("graft.service")

WARM_MODELS = 2_000
"""Models loaded before a process says that it is ready."""

WARM_CONCURRENCY = 4


class HotLoader:
    """Owns the current `ServingSet` of this process, and what of it is in memory."""

    def __init__(
        self,
        registry: Registry,
        *,
        threads: int,
        max_pixels: int,
        max_queued_rows: int,
        memory_bytes: int,
        pinned_models: Iterable[str] = (),
    ) -> None:
        self.current = ServingSet()
        self.live = LiveModels(
            registry,
            memory_bytes=memory_bytes,
            is_pinned=self._is_pinned,
            threads=threads,
            max_pixels=max_pixels,
            max_queued_rows=max_queued_rows,
        )
        self._registry = registry
        self._pinned_models = frozenset(pinned_models)
        self._completed = asyncio.Event()
        self._locks: WeakValueDictionary[ModelKey, asyncio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        """Stop loading, and end every batcher."""
        await self.live.close()

    async def wait_complete(self, timeout_seconds: float) -> None:
        """Return when the registry has been looked through once, or after the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._completed.wait()

    # -- for requests ------------------------------------------------------------------------

    async def resolve(
        self, tenant: str, reference: ModelReference, routing_key: str = ""
    ) -> LiveModel:
        """Return who answers for a reference, loaded if need be.

        Raises `NotFound`, `VersionRefused`, or `Unavailable` when the version may be one that this
        process has not looked at yet. Waits as long as loading takes.
        """
        if parse_checkpoint(reference) is not None:
            return await self._checkpoint(tenant, reference)
        state = self.current.state(tenant, reference)
        version, release = reference.version, None
        if version is None:
            if not state.is_settled:
                state = await self._settle((tenant, reference.name))
            if (release := state.release) is not None:
                version = choose_version(release, reference.name, reference.alias, routing_key)
        if version is not None and version in state.refused:
            raise VersionRefused(f"{reference} cannot be served: {state.refused[version]}")
        if version is None or version not in state.listing.versions:
            raise self.current.unknown(reference)
        try:
            model = await self.live.get((tenant, reference.name, version))
        except Refused as error:
            # It came out of memory and does not come back: from now on the release is without it.
            await self._refuse((tenant, reference.name), version, error.reason)
            return await self.resolve(tenant, reference, routing_key)
        return LiveModel(model.head, model.trunk, release)

    # -- for operators -----------------------------------------------------------------------

    def index(self) -> list[IndexEntry]:
        """Return every listed version of every tenant, in order of name and number."""
        return self.current.index(self.live)

    async def load(self, tenant: str, name: str, version: int | None = None) -> None:
        """Load a version, or what the release names; one that was refused is tried again.

        Raises `NotFound`, or `Unavailable` with the reason of the refusal.
        """
        await self.reconcile_model(tenant, name, retry=True)
        reference = ModelReference(name, version)
        await self.resolve(tenant, reference)

    async def unload(self, tenant: str, name: str, version: int | None = None) -> None:
        """Let a version, or all of a model, go from this process's memory; raises `NotFound`.

        It is not taken out of service: the next request for it loads it again.
        """
        state = self.current.state(tenant, ModelReference(name, version))
        if version is not None and version not in state.listing.versions:
            raise NotFound(f"no model {name}@{version}", param="model")
        for number in state.listing.versions if version is None else (version,):
            self.live.drop((tenant, name, number))
        if version is None:
            self.live.drop_checkpoints(tenant, name)

    # -- keeping equal to the registry -------------------------------------------------------

    async def reconcile(self) -> None:
        """Make the serving set equal to the whole registry; raises `Unavailable`."""
        listed: dict[ModelKey, Listing] = {}
        for tenant in await asyncio.to_thread(self._registry.tenants):
            catalogue = await asyncio.to_thread(self._registry.catalogue, tenant)
            listed.update({(tenant, name): listing for name, listing in catalogue.items()})
        if not self.current.is_complete:
            unseen = {k: ModelState(each) for k, each in listed.items()}
            models = unseen | dict(self.current.models)
            self.current = replace(self.current, models=models)
            await self._warm(listed)
        for key in {*listed, *self.current.models}:
            if not _is_current(self.current.models.get(key), listed.get(key)):
                try:
                    await self.reconcile_model(*key)
                except (Unavailable, NoSpace):
                    raise
                except Exception:
                    # One bad model must not keep the others from being looked at.
                    logger.exception("%s cannot be looked at", key[1])
        self.current = replace(self.current, is_complete=True)
        self._completed.set()

    async def reconcile_model(self, tenant: str, name: str, *, retry: bool = False) -> None:
        """Make the serving set equal to the registry for one model; raises `Unavailable`.

        With `retry`, versions that were refused are tried again.
        """
        key = tenant, name
        async with self._lock(key):
            # Listed anew under the lock: an older picture must never replace a newer one.
            listing = (await asyncio.to_thread(self._registry.catalogue, tenant, name)).get(name)
            before = self.current.models.get(key)
            if _is_current(before, listing) and not (retry and before and before.refused):
                return
            before = before or ModelState()
            after = await self._next(key, listing, before, retry) if listing else None
            self.current = self.current.replace(key, after)
            # What no longer answers drains; whoever asks for such a version by number loads it.
            kept = after.versions if after else ()
            superseded = before.named - (after.named if after else frozenset())
            for number in {*before.listing.versions} - {*kept} | superseded:
                self.live.drop((tenant, name, number))
            if after is None:
                self.live.drop_checkpoints(tenant, name)

    async def _next(
        self, key: ModelKey, listing: Listing, before: ModelState, retry: bool
    ) -> ModelState:
        refused = {} if retry else dict(before.refused)
        fresh = {*listing.versions} - {*before.listing.versions}
        tried = fresh | ({*before.refused} & {*listing.versions} if retry else set())
        for number in sorted(tried):
            await self._try(key, number, refused)
        refused = {number: why for number, why in refused.items() if number in listing.versions}
        state = ModelState(listing, refused=refused)
        return await self._settled(key, state)

    async def _settle(self, key: ModelKey) -> ModelState:
        """Read a model's release, and load what it names."""
        async with self._lock(key):
            state = self.current.models.get(key)
            if state is None:
                raise self.current.unknown(ModelReference(key[1]))
            if not state.is_settled:
                state = await self._settled(key, state)
                self.current = self.current.replace(key, state)
            return state

    async def _settled(self, key: ModelKey, state: ModelState) -> ModelState:
        refused = dict(state.refused)
        while True:
            release = await asyncio.to_thread(
                self._registry.releases.applied, *key, state.listing.release,
                lives=lambda n: n in state.listing.versions and n not in refused,
            )  # fmt: skip
            known = len(refused)
            for number in sorted(release.versions if release else ()):
                if number in state.listing.versions and number not in refused:
                    await self._try(key, number, refused)
            if len(refused) == known:
                return ModelState(state.listing, release, True, refused)

    async def _try(self, key: ModelKey, number: int, refused: dict[int, str]) -> None:
        try:
            await self.live.get((*key, number))
        except Refused as error:
            refused[number] = error.reason
        except NotFound:
            pass  # deleted since it was listed; the next listing will tell

    async def _refuse(self, key: ModelKey, number: int, reason: str) -> None:
        """Remember a refusal that a request met, and fall back from it if the release names it."""
        async with self._lock(key):
            state = self.current.models.get(key)
            if state is not None and number not in state.refused:
                state = replace(state, refused={**state.refused, number: reason})
                if number in state.named:
                    state = await self._settled(key, state)
                self.current = self.current.replace(key, state)

    async def _checkpoint(self, tenant: str, reference: ModelReference) -> LiveModel:
        try:
            return await self.live.get((tenant, reference.name, reference.alias))
        except Refused as error:
            raise VersionRefused(f"{reference} cannot be served: {error.reason}") from None

    async def _warm(self, listed: dict[ModelKey, Listing]) -> None:
        """Load what releases name: pinned models, then the latest released, while there is room."""
        order = sorted(
            (key for key, listing in listed.items() if listing.release),
            key=lambda key: (key[1] not in self._pinned_models, -listed[key].changed_at, key),
        )
        waiting = iter(order[:WARM_MODELS])

        async def load() -> None:
            for key in waiting:
                if not self.live.has_room and key[1] not in self._pinned_models:
                    return
                with suppress(NotFound):
                    await self._settle(key)

        loads = (load() for _ in range(WARM_CONCURRENCY))
        for error in await asyncio.gather(*loads, return_exceptions=True):
            if error is not None:
                raise error

    def _is_pinned(self, slot: Slot) -> bool:
        tenant, name, version = slot
        if name not in self._pinned_models:
            return False
        state = self.current.models.get((tenant, name))
        return state is None or not state.is_settled or version in state.named

    def _lock(self, key: ModelKey) -> asyncio.Lock:
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock


def _is_current(state: ModelState | None, listing: Listing | None) -> bool:
    if state is None or listing is None:
        return state is None and listing is None
    return state.listing == listing
