"""The trunks in this process's memory: each lives as long as something holds it.

One that models share is found by its content, and loaded once however many ask for it. One that is
a version's own (core.manifests) is found by that version, so that tenants share nothing, whatever
it holds. When the last holder lets go, it is let go too; a request keeps what it uses until it has
ended, and only then is memory given back.

Not here: which versions are in memory, and how much they may take (service.live_models).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from core.manifests import ModelManifest
from core.registry import Registry
from core.trunk import Trunk
from service.batcher import Batcher
from service.single_flight import SingleFlight

OWN_TRUNKS = "own"
"""What the batchers of all trunks that are one version's own are called, so that names are few."""


@dataclass(frozen=True)
class LiveTrunk:
    """A trunk with its batcher; shared by every head that was fitted on it."""

    trunk: Trunk
    batcher: Batcher


class LiveTrunks:
    """The loaded trunks of one process. Belongs to one event loop."""

    def __init__(
        self, registry: Registry, executor: ThreadPoolExecutor, *, threads: int, max_pixels: int,
        max_queued_rows: int,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._executor = executor
        self._threads = threads
        self._max_pixels = max_pixels
        self._max_queued_rows = max_queued_rows
        self._trunks: dict[str, LiveTrunk] = {}
        self._holders: Counter[str] = Counter()
        self._kept: set[str] = set()
        self._loading = SingleFlight[str, LiveTrunk]()

    async def hold(self, model: ModelManifest) -> LiveTrunk:
        """Return a version's trunk, loaded if it is not; it stays until `release`.

        Raises `NotFound`, `Conflict` and `Unavailable`, and holds nothing then.
        """
        key = _key(model)
        self._holders[key] += 1  # it must not go while it is on its way
        try:
            return await self._get(
                key,
                lambda: Trunk.load_for(
                    self._registry, model, threads=self._threads, max_pixels=self._max_pixels
                ),
            )
        except BaseException:
            self.release(model)
            raise

    def release(self, model: ModelManifest) -> None:
        """Let go what `hold` returned for a version."""
        self._holders[_key(model)] -= 1
        for key in [each for each in self._trunks if self._holders[each] <= 0]:
            del self._trunks[key], self._holders[key]

    async def keep(self, digest: str) -> LiveTrunk:
        """Return a trunk that models share for its own sake; from then on it stays."""
        live = await self._get(
            digest,
            lambda: Trunk.load(
                self._registry, digest, threads=self._threads, max_pixels=self._max_pixels
            ),
        )
        if digest not in self._kept:
            self._kept.add(digest)
            self._holders[digest] += 1
            # Its last holder may have let go while this task waited to go on.
            self._trunks.setdefault(digest, live)
        return live

    def trim(self, *, collect: bool) -> None:
        """Give freed memory back to the system; `collect` what was let go in circles, too."""
        banks = [live.trunk.bank for live in self._trunks.values()]

        def trim() -> None:
            for bank in banks:
                bank.shrink()
            _give_back(collect)

        with suppress(RuntimeError):
            asyncio.get_running_loop().run_in_executor(self._executor, trim)

    async def close(self) -> None:
        """Stop loading, and end every batcher."""
        await self._loading.close()
        for live in self._trunks.values():
            await live.batcher.close()

    async def _get(self, key: str, read: Callable[[], Trunk]) -> LiveTrunk:
        live = self._trunks.get(key)
        return live or await self._loading.run(key, lambda: self._load(key, read))

    async def _load(self, key: str, read: Callable[[], Trunk]) -> LiveTrunk:
        loop = asyncio.get_running_loop()
        trunk = await loop.run_in_executor(self._executor, read)
        weakref.finalize(trunk, self._request_trim, loop).atexit = False
        name = key[:12] if key == trunk.manifest.digest else OWN_TRUNKS
        live = LiveTrunk(trunk, Batcher(trunk, name, self._max_queued_rows, trunk.bank))
        self._trunks[key] = live
        return live

    def _request_trim(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called when a trunk's last user has gone, on whichever thread that was."""
        with suppress(RuntimeError):  # the loop has ended, and the process will
            loop.call_soon_threadsafe(lambda: self.trim(collect=True))


def _key(model: ModelManifest) -> str:
    return model.folder if model.has_own_trunk else model.trunk


def _give_back(collect: bool) -> None:
    """Return freed memory to the system, which the allocator would keep (200 MB of a trunk)."""
    if collect:
        gc.collect()
    with suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
