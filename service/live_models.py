"""What of the registry is in this process's memory: heads within a budget, and their trunks.

A head is loaded when it is first needed: read → check hashes → replay golden rows. However many ask
for it, it is loaded once, and off the event loop. When the heads take more than the budget, those
that were used longest ago go, and come back when they are asked for; pinned ones stay. A trunk
lives as long as a head on it: it is loaded with the first and let go with the last. A request keeps
what it uses until it has ended; only then is memory given back.

Budget: heads by their own count of bytes (core.head), and with them trunks that are one version's
own. Trunks that models share come on top, one for each backbone and precision that is in use. Not
here: which versions there are (service.hot_loader).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from core.errors import Conflict, GraftError, NoSpace, NotFound, Unavailable
from core.head import Head
from core.identifiers import ModelReference
from core.manifests import ModelManifest, Release
from core.registry import Registry
from core.trunk import Trunk
from service.batcher import Batcher
from service.metrics import EVICTIONS, LIVE_BYTES, LIVE_VERSIONS, LOADS
from service.serving_set import Slot
from service.single_flight import SingleFlight

logger = logging.getLogger("graft.service")

LOADING_THREADS = 4
OWN_TRUNKS = "own"
"""What the batchers of all trunks that are one version's own are called, so that names are few."""

TRIM_BYTES = 32 << 20
"""Heads freed before the allocator is asked to give their memory back."""


@dataclass(frozen=True)
class LiveTrunk:
    """A trunk with its batcher; shared by every head that was fitted on it."""

    trunk: Trunk
    batcher: Batcher


@dataclass(frozen=True)
class LiveModel:
    """A version that answers predictions.

    `release` is the one that chose it for a request; None when the caller named the version.
    """

    head: Head
    trunk: LiveTrunk
    release: Release | None = None

    @property
    def manifest(self) -> ModelManifest:
        """What the version is."""
        return self.head.manifest

    @property
    def bytes(self) -> int:
        """About what it takes besides what it shares with others."""
        return self.head.bytes + (self.trunk.trunk.bytes if self.manifest.has_own_trunk else 0)


class Refused(Exception):
    """Raised when a version does not pass its checks; `reason` is fit for a caller's eyes."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LiveModels:
    """The loaded heads and trunks of one process. Belongs to one event loop."""

    def __init__(
        self,
        registry: Registry,
        *,
        memory_bytes: int,
        is_pinned: Callable[[Slot], bool],
        threads: int,
        max_pixels: int,
        max_queued_rows: int,
    ) -> None:
        self._registry = registry
        self._memory_bytes = memory_bytes
        self._is_pinned = is_pinned
        self._threads = threads
        self._max_pixels = max_pixels
        self._max_queued_rows = max_queued_rows
        self._models: OrderedDict[Slot, LiveModel] = OrderedDict()
        self._trunks: dict[str, LiveTrunk] = {}
        self._heads_on: Counter[str] = Counter()
        self._kept: set[str] = set()
        self._bytes = 0
        self._untrimmed_bytes = 0
        self._loading = SingleFlight[Slot, LiveModel]()
        self._loading_trunks = SingleFlight[str, LiveTrunk]()
        self._executor = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="load")
        self._trimming: asyncio.Future[None] | None = None

    def __contains__(self, slot: object) -> bool:
        return slot in self._models

    def __len__(self) -> int:
        return len(self._models)

    @property
    def bytes(self) -> int:
        """What the loaded heads take, and the trunks that are their own."""
        return self._bytes

    @property
    def has_room(self) -> bool:
        """Whether another head of the usual size fits without another going."""
        usual = self._bytes // len(self._models) if self._models else 0
        return self._bytes + usual <= self._memory_bytes

    async def get(self, slot: Slot) -> LiveModel:
        """Return a version, loaded if it is not.

        Raises `Refused`, `NotFound` for a version or a checkpoint that is not there any more, and
        `Unavailable`.
        """
        model = self._models.get(slot)
        if model is None:
            return await self._loading.run(slot, lambda: self._load(slot))
        self._models.move_to_end(slot)
        return model

    async def trunk(self, digest: str) -> LiveTrunk:
        """Return a trunk for its own sake, loaded if it is not; from then on it stays.

        Raises `NotFound`, `Conflict` and `Unavailable`.
        """
        live = await self._trunk(digest, lambda: self._read_trunk(digest))
        if digest not in self._kept:
            self._kept.add(digest)
            self._heads_on[digest] += 1
            # Its last head may have gone while this task waited to go on.
            self._trunks.setdefault(digest, live)
        return live

    def drop(self, slot: Slot) -> bool:
        """Let a version go from memory; tell whether it was there."""
        model = self._models.pop(slot, None)
        if model is None:
            return False
        self._bytes -= model.bytes
        self._untrimmed_bytes += model.head.bytes
        self._heads_on[_trunk_key(model.manifest)] -= 1
        self._free()
        return True

    def drop_checkpoints(self, tenant: str, name: str) -> None:
        """Let every checkpoint of a model go from memory."""
        for slot in [s for s in self._models if s[:2] == (tenant, name) and isinstance(s[2], str)]:
            self.drop(slot)

    async def close(self) -> None:
        """Stop loading, and end every batcher."""
        await self._loading.close()
        await self._loading_trunks.close()
        for live in self._trunks.values():
            await live.batcher.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # -- inside ------------------------------------------------------------------------------

    async def _load(self, slot: Slot) -> LiveModel:
        try:
            model = await self._checked(slot)
        except (Unavailable, NoSpace):
            raise
        except Exception as error:
            # One bad version must not stop the others, whatever it raises.
            reason = await self._reason(slot, error)
            logger.warning("%s@%s of %s refused: %r", slot[1], slot[2], slot[0], error)
            LOADS.labels(outcome="refused").inc()
            raise Refused(reason) from None
        LOADS.labels(outcome="loaded").inc()
        self._insert(slot, model)
        return model

    async def _checked(self, slot: Slot) -> LiveModel:
        loop = asyncio.get_running_loop()
        manifest = await loop.run_in_executor(self._executor, self._manifest, slot)
        key = _trunk_key(manifest)
        self._heads_on[key] += 1  # the trunk must not go while this head is on its way
        try:
            trunk = await self._trunk(key, lambda: self._read_trunk_of(manifest))
            if (manifest.dim, manifest.modality) != (trunk.trunk.dim, trunk.trunk.modality):
                raise Conflict(f"{manifest.reference} does not fit its trunk")
            head = await loop.run_in_executor(
                self._executor, Head.load, self._registry, manifest, trunk.trunk
            )
        except BaseException:
            self._heads_on[key] -= 1
            self._free()
            raise
        return LiveModel(head, trunk)

    def _manifest(self, slot: Slot) -> ModelManifest:
        tenant, name, which = slot
        if isinstance(which, int):
            return self._registry.manifest(tenant, name, which)
        return self._registry.resolve(tenant, ModelReference(name, alias=which))

    async def _trunk(self, key: str, read: Callable[[], Trunk]) -> LiveTrunk:
        live = self._trunks.get(key)
        return live or await self._loading_trunks.run(key, lambda: self._load_trunk(key, read))

    async def _load_trunk(self, key: str, read: Callable[[], Trunk]) -> LiveTrunk:
        loop = asyncio.get_running_loop()
        trunk = await loop.run_in_executor(self._executor, read)
        weakref.finalize(trunk, self._request_trim, loop).atexit = False
        name = key[:12] if key == trunk.manifest.digest else OWN_TRUNKS
        live = LiveTrunk(trunk, Batcher(trunk, name, self._max_queued_rows, trunk.bank))
        self._trunks[key] = live
        return live

    def _read_trunk(self, digest: str) -> Trunk:
        return Trunk.load(
            self._registry, digest, threads=self._threads, max_pixels=self._max_pixels
        )

    def _read_trunk_of(self, model: ModelManifest) -> Trunk:
        return Trunk.load_for(
            self._registry, model, threads=self._threads, max_pixels=self._max_pixels
        )

    async def _reason(self, slot: Slot, error: Exception) -> str:
        if isinstance(error, NotFound):
            # Deleted, or damaged? Only the former has no manifest.
            await asyncio.get_running_loop().run_in_executor(
                self._executor, self._manifest_again, slot
            )
            return "one of its files is missing"
        return error.message if isinstance(error, GraftError) else "it does not load"

    def _manifest_again(self, slot: Slot) -> None:
        with suppress(ValueError):
            self._manifest(slot)

    def _insert(self, slot: Slot, model: LiveModel) -> None:
        self._models[slot] = model
        self._bytes += model.bytes
        if self._bytes > self._memory_bytes:
            for other in list(self._models):
                if self._bytes <= self._memory_bytes:
                    break
                if other != slot and not self._is_pinned(other):
                    self.drop(other)
                    EVICTIONS.inc()
        self._count()

    def _free(self) -> None:
        """Let trunks go that no head is on."""
        for digest in [each for each in self._trunks if self._heads_on[each] <= 0]:
            del self._trunks[digest], self._heads_on[digest]
        if self._untrimmed_bytes >= TRIM_BYTES:
            self._untrimmed_bytes = 0
            self._trim(collect=False)
        self._count()

    def _count(self) -> None:
        LIVE_VERSIONS.set(len(self._models))
        LIVE_BYTES.set(self._bytes)

    def _request_trim(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called when a trunk's last user has gone, on whichever thread that was."""
        with suppress(RuntimeError):  # the loop has ended, and the process will
            loop.call_soon_threadsafe(lambda: self._trim(collect=True))

    def _trim(self, *, collect: bool) -> None:
        banks = [live.trunk.bank for live in self._trunks.values()]

        def trim() -> None:
            for bank in banks:
                bank.shrink()
            _give_back(collect)

        with suppress(RuntimeError):
            asyncio.get_running_loop().run_in_executor(self._executor, trim)


def _trunk_key(model: ModelManifest) -> str:
    """Return what its trunk is found by here: shared by content, its own by where it is kept."""
    return model.folder if model.has_own_trunk else model.trunk


def _give_back(collect: bool) -> None:
    """Return freed memory to the system, which the allocator would keep (200 MB of a trunk)."""
    if collect:
        gc.collect()
    with suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
