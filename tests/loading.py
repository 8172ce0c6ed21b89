"""A hot loader over a real registry in a folder, as the tests of loading and predicting use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from core.changes import Change, ChangeFeed
from core.identifiers import ModelReference
from core.registry import Registry
from service.auto_rollback import AutoRollback
from service.hot_loader import HotLoader
from service.inputs import Input
from service.live_models import LiveModel
from service.metrics import ModelLabels
from service.predictor import Predictor
from service.watch import RegistryWatch
from tests.builders import TENANT
from tests.fakes import DeafFeed, FlakyStore
from tests.twins.feed import MemoryChangeFeed
from tests.waiting import until

NEVER = 3600.0


class Loading:
    """A registry and the loader of one process that serves it."""

    def __init__(
        self, folder: Path, feed: ChangeFeed | None = None, poll: float = NEVER,
        memory_bytes: int = 1 << 30, pinned: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.folder = folder
        self.store = FlakyStore(str(folder))
        self.registry = Registry(self.store)
        self.feed = feed or MemoryChangeFeed()
        self.loader = HotLoader(
            self.registry,
            threads=1,
            max_pixels=1_000_000,
            max_queued_rows=1_000,
            memory_bytes=memory_bytes,
            pinned_models=pinned,
        )
        self.watch = RegistryWatch(self.loader, self.feed, poll_seconds=poll)
        labels = ModelLabels(100)
        self.rollback = AutoRollback(
            self.registry.releases, self.feed, self.loader.reconcile_model, labels
        )
        self.predictor = Predictor(
            self.loader, self.rollback, threads=1, max_text_chars=10_000, max_queued_rows=1_000,
            labels=labels,
        )  # fmt: skip

    async def predict(self, model: str, *inputs: Input, timeout: float = 20):  # type: ignore[no-untyped-def]
        return await self.predictor.predict(
            TENANT,
            ModelReference.parse(model),
            list(inputs) or ["good cat"],
            top_k=3,
            timeout_seconds=timeout,
        )

    async def live(self, model: str, routing_key: str = "") -> LiveModel:
        return await self.loader.resolve(TENANT, ModelReference.parse(model), routing_key)

    async def serving(self, model: str) -> str:
        """The version that answers for a reference."""
        answer = await self.predict(model)
        assert not isinstance(answer.rows[0], Exception)
        return str(answer.model)

    async def tell(self, name: str = "pets") -> None:
        await self.feed.publish(Change(tenant=TENANT, model=name, type="published"))

    async def aclose(self) -> None:
        await self.watch.close()
        await self.loader.close()
        await self.predictor.close()
        await self.rollback.close()


@asynccontextmanager
async def loading(
    folder: Path, *, poll: float = NEVER, deaf: bool = False, start: bool = True,
    memory_bytes: int = 1 << 30, pinned: tuple[str, ...] = (),
) -> AsyncIterator[Loading]:  # fmt: skip
    """A running loader; with `deaf` it hears of nothing and must look for itself."""
    it = Loading(folder, DeafFeed() if deaf else None, poll, memory_bytes, pinned)
    try:
        if start:
            it.watch.start()
            await it.loader.wait_complete(10)
            if not deaf:
                await until(lambda: it.watch.hears_changes)
        else:
            await it.loader.reconcile()
        yield it
    finally:
        await it.aclose()
