"""The hot loader: keeps one process's serving set equal to the registry, off the request path.

It follows the change feed, and besides looks into the registry every `poll_seconds`, so a lost
change costs time, never a model. For each model that differs: load → check hashes → replay golden
rows → swap the reference. A version that does not pass is refused, with its reason kept in the set;
the versions before it go on serving, and other models do not notice. Old versions are freed when
the last request that holds them has ended; a trunk goes when no live version needs it.

Not here: what a version must fulfil (core.trunk `load`), what a request sees (service.serving_set).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from core.changes import ChangeFeed
from core.errors import GraftError, NoSpace, NotFound, Unavailable
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
    ) -> None:
        self.current = ServingSet()
        self.is_complete = False
        """True once every model of the registry has been looked at."""
        self.hears_changes = False
        """True while the change feed answers."""
        self._registry = registry
        self._feed = feed
        self._poll_seconds = poll_seconds
        self._threads = threads
        self._max_pixels = max_pixels
        self._max_queued_rows = max_queued_rows
        self._cursor: str | None = None
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

    async def reconcile(self) -> None:
        """Make the serving set equal to the whole registry; raises `Unavailable`."""
        wanted: dict[ModelKey, Listing] = {}
        for tenant in await asyncio.to_thread(self._registry.tenants):
            for name, listing in (
                await asyncio.to_thread(self._registry.catalogue, tenant)
            ).items():
                wanted[tenant, name] = listing
        for key in {*wanted, *self.current.models}:
            await self._update(key, wanted.get(key))
        self.is_complete = True

    async def reconcile_model(self, tenant: str, name: str) -> None:
        """Make the serving set equal to the registry for one model; raises `Unavailable`."""
        listed = await asyncio.to_thread(self._registry.catalogue, tenant, name)
        await self._update((tenant, name), listed.get(name))

    async def _update(self, key: ModelKey, listing: Listing | None) -> None:
        async with self._reconciling:
            before = self.current.models.get(key, ModelState())
            if listing is None or not listing.versions:
                after = None
            elif _is_current(before, listing):
                return
            else:
                after = await self._load(key, listing, before)
            self.current = self.current.replace(key, after)
            LIVE_VERSIONS.set(self.current.live_versions)
            await self._free_trunks()

    async def _load(self, key: ModelKey, listing: Listing, before: ModelState) -> ModelState:
        tenant, name = key
        versions: dict[int, LiveModel] = {}
        refused: dict[int, str] = {}
        for number in listing.versions:
            if number in before.versions:
                versions[number] = before.versions[number]
            elif number in before.refused:
                # Versions never change, so a refused one would be refused again.
                refused[number] = before.refused[number]
            else:
                try:
                    versions[number] = await self._load_version(tenant, name, number)
                    LOADS.labels(outcome="loaded").inc()
                except (Unavailable, NoSpace):
                    raise
                except NotFound:
                    logger.info("%s@%d went away while it was loaded", name, number)
                except Exception as error:
                    # One bad version must not stop the others, whatever it raises.
                    reason = error.message if isinstance(error, GraftError) else "it does not load"
                    logger.warning("%s@%d refused: %r", name, number, error)
                    refused[number] = reason
                    LOADS.labels(outcome="refused").inc()
        aliases = await asyncio.to_thread(self._aliases, key, listing.release, versions)
        return ModelState(versions, aliases, refused, listing.release)

    def _aliases(
        self, key: ModelKey, number: int, versions: dict[int, LiveModel]
    ) -> dict[str, int]:
        """What the aliases name; one that names a refused version keeps its last live one."""
        if number == 0:
            return {}
        current = self._registry.read_release(*key, number)
        aliases = dict(current.aliases)
        for earlier in range(number - 1, max(0, number - 1 - ALIAS_HISTORY), -1):
            dead = [alias for alias, version in aliases.items() if version not in versions]
            if not dead:
                break
            previous = self._registry.read_release(*key, earlier).aliases
            aliases.update({a: previous[a] for a in dead if previous.get(a) in versions})
        return aliases

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
            batcher = Batcher(trunk, manifest.trunk[:12], self._max_queued_rows)
            self._trunks[manifest.trunk] = LiveTrunk(trunk, batcher)
        head = await asyncio.to_thread(Head.load, self._registry, manifest)
        return LiveModel(head, self._trunks[manifest.trunk])

    async def _free_trunks(self) -> None:
        needed = self.current.trunks()
        for digest in [digest for digest in self._trunks if digest not in needed]:
            await self._trunks.pop(digest).batcher.close()

    async def _follow(self) -> None:
        try:
            self._cursor, changes = await self._feed.follow(self._cursor, FEED_WAIT_SECONDS)
        except Unavailable:
            self.hears_changes = False
            raise
        self.hears_changes = True
        for tenant, model in dict.fromkeys((c.tenant, c.model) for c in changes):
            await self.reconcile_model(tenant, model)

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


def _is_current(state: ModelState, listing: Listing) -> bool:
    known = {*state.versions, *state.refused}
    return known == set(listing.versions) and state.release == listing.release
