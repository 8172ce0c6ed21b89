"""The hot loader: keeps one process's serving set equal to the registry, off the request path.

It follows the change feed, and besides looks into the registry every `poll_seconds`, so a lost
change costs time, never a model. For each model that differs: load → check hashes → replay golden
rows → swap the reference. A version that does not pass is refused, with its reason kept in the set;
the versions before it go on serving, and other models do not notice. Old versions, and trunks that
no live version needs, are freed when the last request that holds them has ended.

Not here: what a version must fulfil (core.trunk `load`), what a request sees (service.serving_set).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from pydantic import ValidationError

from core.changes import Change, ChangeFeed
from core.errors import Conflict, GraftError, NoSpace, NotFound, Unavailable
from core.registry import Listing, Registry
from core.trunk import Head, Trunk
from service.batcher import Batcher
from service.metrics import LIVE_VERSIONS, LOADS
from service.serving_set import LiveModel, LiveTrunk, ModelKey, ModelState, ServingSet

logger = logging.getLogger("graft.service")

FEED_WAIT_SECONDS = 2.0
RETRY_SECONDS = 1.0
ALIAS_HISTORY = 20
"""How many releases back to look for a version that still loads."""


async def _ignore(change: Change, state: ModelState | None) -> None:
    """Tell nobody."""


class HotLoader:
    """Owns the current `ServingSet` of this process."""

    def __init__(
        self,
        registry: Registry,
        feed: ChangeFeed,
        *,
        poll_seconds: float,
        threads: int,
        max_pixels: int,
        max_queued_rows: int,
        on_change: Callable[[Change, ModelState | None], Awaitable[None]] = _ignore,
    ) -> None:
        """`on_change` is called with a change of the feed when the set is up to date with it."""
        self.current = ServingSet()
        self.hears_changes = False
        """True while the change feed answers."""
        self._registry = registry
        self._feed = feed
        self._poll_seconds = poll_seconds
        self._threads = threads
        self._max_pixels = max_pixels
        self._max_queued_rows = max_queued_rows
        self._on_change = on_change
        self._cursor: str | None = None
        self._completed = asyncio.Event()
        self._trunks: dict[str, LiveTrunk] = {}
        self._reconciling = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow the feed and to poll."""
        self._tasks = [
            asyncio.create_task(_forever(self._follow)),
            asyncio.create_task(_forever(self._poll)),
        ]

    async def close(self) -> None:
        """Stop, and end every batcher."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for live in self._trunks.values():
            await live.batcher.close()

    async def wait_complete(self, timeout_seconds: float) -> None:
        """Return when every model of the registry has been looked at once, or after the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._completed.wait()

    async def reconcile(self) -> None:
        """Make the serving set equal to the whole registry; raises `Unavailable`."""
        listed: dict[ModelKey, Listing] = {}
        for tenant in await asyncio.to_thread(self._registry.tenants):
            catalogue = await asyncio.to_thread(self._registry.catalogue, tenant)
            listed.update({(tenant, name): listing for name, listing in catalogue.items()})
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

    async def reconcile_model(self, tenant: str, name: str) -> None:
        """Make the serving set equal to the registry for one model; raises `Unavailable`."""
        key = tenant, name
        async with self._reconciling:
            # Listed anew under the lock: an older picture must never replace a newer one.
            listing = (await asyncio.to_thread(self._registry.catalogue, tenant, name)).get(name)
            before = self.current.models.get(key)
            if _is_current(before, listing):
                return
            after = await self._load(key, listing, before or ModelState()) if listing else None
            self.current = self.current.replace(key, after)
            LIVE_VERSIONS.set(self.current.live_versions)
            # A request that still uses a trunk which goes here keeps it until it has ended.
            needed = self.current.trunks()
            self._trunks = {d: live for d, live in self._trunks.items() if d in needed}

    async def _load(self, key: ModelKey, listing: Listing, before: ModelState) -> ModelState:
        versions: dict[int, LiveModel] = {}
        refused: dict[int, str] = {}
        for number in listing.versions:
            if number in before.versions:
                versions[number] = before.versions[number]
            elif number in before.refused:
                # Versions never change, so a refused one would be refused again.
                refused[number] = before.refused[number]
            else:
                loaded = await self._try_version(*key, number)
                if isinstance(loaded, LiveModel):
                    versions[number] = loaded
                elif loaded is not None:
                    refused[number] = loaded
        aliases = await asyncio.to_thread(self._aliases, key, listing.release, versions)
        return ModelState(versions, aliases, refused, listing.release)

    def _aliases(
        self, key: ModelKey, number: int, versions: dict[int, LiveModel]
    ) -> dict[str, int]:
        """What the aliases name; one that names a refused version keeps its last live one."""
        aliases: dict[str, int] | None = None
        for earlier in range(number, max(0, number - ALIAS_HISTORY), -1):
            try:
                named = self._registry.read_release(*key, earlier).aliases
            except (NotFound, ValidationError) as error:
                logger.warning("release %d of %s is passed over: %r", earlier, key[1], error)
                continue
            if aliases is None:
                aliases = dict(named)
            dead = [alias for alias, version in aliases.items() if version not in versions]
            aliases.update({alias: named[alias] for alias in dead if named.get(alias) in versions})
            if all(version in versions for version in aliases.values()):
                break
        return aliases or {}

    async def _try_version(self, tenant: str, name: str, number: int) -> LiveModel | str | None:
        """Return a version loaded, or why it is refused, or None when it has been deleted."""
        try:
            loaded = await self._load_version(tenant, name, number)
        except (Unavailable, NoSpace):
            raise
        except Exception as error:
            # One bad version must not stop the others, whatever it raises.
            if isinstance(error, NotFound):
                if number not in await asyncio.to_thread(self._registry.versions, tenant, name):
                    return None
                reason = "one of its files is missing"
            else:
                reason = error.message if isinstance(error, GraftError) else "it does not load"
            logger.warning("%s@%d refused: %r", name, number, error)
            LOADS.labels(outcome="refused").inc()
            return reason
        LOADS.labels(outcome="loaded").inc()
        return loaded

    async def _load_version(self, tenant: str, name: str, number: int) -> LiveModel:
        manifest = await asyncio.to_thread(self._registry.manifest, tenant, name, number)
        if manifest.trunk not in self._trunks:
            trunk = await asyncio.to_thread(
                Trunk.load,
                self._registry,
                manifest.trunk,
                threads=self._threads,
                max_pixels=self._max_pixels,
            )
            batcher = Batcher(
                trunk, manifest.trunk[:12], self._max_queued_rows, trunk.manifest.slots
            )
            self._trunks[manifest.trunk] = LiveTrunk(trunk, batcher)
        live = self._trunks[manifest.trunk]
        if (manifest.dim, manifest.modality) != (live.trunk.dim, live.trunk.modality):
            raise Conflict(f"{manifest.reference} does not fit its trunk")
        head = await asyncio.to_thread(Head.load, self._registry, manifest, live.trunk)
        return LiveModel(head, live)

    async def _follow(self) -> None:
        try:
            self._cursor, changes = await self._feed.follow(self._cursor, FEED_WAIT_SECONDS)
        except Unavailable:
            self.hears_changes = False
            raise
        self.hears_changes = True
        for tenant, model in dict.fromkeys((c.tenant, c.model) for c in changes):
            await self.reconcile_model(tenant, model)
        for change in changes:
            await self._on_change(change, self.current.models.get((change.tenant, change.model)))

    async def _poll(self) -> None:
        await self.reconcile()
        await asyncio.sleep(self._poll_seconds)


async def _forever(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step; what it raises is logged and tried again, so that no loop ever dies."""
    while True:
        try:
            await step()
        except Unavailable as error:
            logger.warning("%s", error.message)
            await asyncio.sleep(RETRY_SECONDS)
        except Exception:
            logger.exception("hot loader")
            await asyncio.sleep(RETRY_SECONDS)


def _is_current(state: ModelState | None, listing: Listing | None) -> bool:
    if state is None or listing is None:
        return state is None and listing is None
    known = {*state.versions, *state.refused}
    return known == set(listing.versions) and state.release == listing.release
