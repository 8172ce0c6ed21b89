"""What of the registry is in this process's memory: heads within a budget, and their trunks.

A head is loaded when it is first needed: read → check hashes → replay golden rows. However many ask
for it, it is loaded once, and off the event loop. When the heads take more than the budget, those
that were used longest ago go, and come back when they are asked for; pinned ones stay. A trunk
lives as long as a head on it (service.live_trunks).

Budget: heads by their own count of bytes (core.head), and with them trunks that are one version's
own, of which only a few are on their way at once. Trunks that models share come on top, one for
each backbone and precision that is in use. Not here: which versions there are (service.hot_loader).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass

from core.errors import Conflict, DeadlineExceeded, GraftError, NoSpace, NotFound, Unavailable
from core.head import Head
from core.identifiers import ModelReference
from core.manifests import ModelManifest, Release
from core.registry import Registry
from service.live_trunks import LiveTrunk, LiveTrunks
from service.metrics import EVICTIONS, LIVE_BYTES, LIVE_VERSIONS, LOADS
from service.serving_set import Slot
from service.single_flight import SingleFlight

logger = logging.getLogger("graft.service")

LOADING_THREADS = 4
OWN_TRUNKS_AT_ONCE = 2
"""Versions with a trunk of their own that are loaded side by side: so much comes on top."""

TRIM_BYTES = 32 << 20
"""Heads freed before the allocator is asked to give their memory back."""


@asynccontextmanager
async def loaded_within(timeout_seconds: float) -> AsyncIterator[None]:
    """Raise `DeadlineExceeded` when a block that waits for a load takes longer; that goes on."""
    try:
        async with asyncio.timeout(timeout_seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the model was not loaded before the deadline") from None


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
        self._models: OrderedDict[Slot, LiveModel] = OrderedDict()
        self._bytes = 0
        self._untrimmed_bytes = 0
        self._loading = SingleFlight[Slot, LiveModel]()
        self._own_trunks = asyncio.Semaphore(OWN_TRUNKS_AT_ONCE)
        self._executor = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="load")
        self._trunks = LiveTrunks(
            registry, self._executor, threads=threads, max_pixels=max_pixels,
            max_queued_rows=max_queued_rows,
        )  # fmt: skip

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
        return await self._trunks.keep(digest)

    def drop(self, slot: Slot) -> bool:
        """Let a version go from memory; tell whether it was there."""
        model = self._models.pop(slot, None)
        if model is None:
            return False
        self._bytes -= model.bytes
        self._untrimmed_bytes += model.head.bytes
        self._trunks.release(model.manifest)
        if self._untrimmed_bytes >= TRIM_BYTES:
            self._untrimmed_bytes = 0
            self._trunks.trim(collect=False)
        self._count()
        return True

    def drop_checkpoints(self, tenant: str, name: str) -> None:
        """Let every checkpoint of a model go from memory."""
        for slot in [s for s in self._models if s[:2] == (tenant, name) and isinstance(s[2], str)]:
            self.drop(slot)

    async def close(self) -> None:
        """Stop loading, and end every batcher."""
        await self._loading.close()
        await self._trunks.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # -- inside ------------------------------------------------------------------------------

    async def _load(self, slot: Slot) -> LiveModel:
        loop = asyncio.get_running_loop()
        try:
            manifest = await loop.run_in_executor(self._executor, self._manifest, slot)
            async with self._own_trunks if manifest.has_own_trunk else nullcontext():
                model = await self._checked(manifest)
                self._insert(slot, model)
        except (Unavailable, NoSpace):
            raise
        except Exception as error:
            # One bad version must not stop the others, whatever it raises.
            reason = await self._reason(slot, error)
            logger.warning("%s@%s of %s refused: %r", slot[1], slot[2], slot[0], error)
            LOADS.labels(outcome="refused").inc()
            raise Refused(reason) from None
        LOADS.labels(outcome="loaded").inc()
        return model

    async def _checked(self, manifest: ModelManifest) -> LiveModel:
        loop = asyncio.get_running_loop()
        trunk = await self._trunks.hold(manifest)
        try:
            if (manifest.dim, manifest.modality) != (trunk.trunk.dim, trunk.trunk.modality):
                raise Conflict(f"{manifest.reference} does not fit its trunk")
            head = await loop.run_in_executor(
                self._executor, Head.load, self._registry, manifest, trunk.trunk
            )
        except BaseException:
            self._trunks.release(manifest)
            raise
        return LiveModel(head, trunk)

    def _manifest(self, slot: Slot) -> ModelManifest:
        tenant, name, which = slot
        if isinstance(which, int):
            return self._registry.manifest(tenant, name, which)
        return self._registry.resolve(tenant, ModelReference(name, alias=which))

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

    def _count(self) -> None:
        LIVE_VERSIONS.set(len(self._models))
        LIVE_BYTES.set(self._bytes)
