"""Stand-ins for the slow or distant parts, for unit tests only."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from core.adapters import Deltas
from core.changes import Change, ChangeFeed
from core.datasets import Modality
from core.errors import Unavailable
from core.preprocessing import FloatArray, Prepared, PreparedText
from core.registry import Registry
from core.store import ArtifactStore, StoredObject
from tests.twins.feed import MemoryChangeFeed

RAISES, GIVES_NAN, GIVES_TOO_FEW = 1_000_001, 1_000_002, 1_000_003


def row(number: int, width: int = 1) -> PreparedText:
    """A prepared text that the fake encoder answers with `[number, width]`."""
    return PreparedText([number] * width)


class FakeEncoder:
    """An encoder whose features tell which row they are of, with some rows it cannot do.

    `gate` is open at first; while it is closed, `encode` hangs. `batches` are the numbers of the
    rows of each call.
    """

    dim = 2
    modality = Modality.TEXT

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def encode(self, rows: Sequence[Prepared], deltas: Deltas | None = None) -> FloatArray:
        ids = [prepared.ids for prepared in rows if isinstance(prepared, PreparedText)]
        numbers = [each[0] for each in ids]
        self.batches.append(numbers)
        self.entered.set()
        if not self.gate.wait(timeout=30):
            raise TimeoutError("the test never opened the gate")
        if RAISES in numbers:
            raise RuntimeError("this row breaks the whole batch")
        if GIVES_TOO_FEW in numbers:
            return np.zeros((len(rows) - 1, 2), np.float32)
        features = [
            [np.nan if number == GIVES_NAN else number, len(each)]
            for number, each in zip(numbers, ids, strict=True)
        ]
        return np.asarray(features, np.float32)


class FlakyStore(ArtifactStore):
    """A real store that can be taken away, and counts what is read."""

    is_away = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []

    def get(self, key: str) -> bytes:
        self._require()
        self.reads.append(key)
        return super().get(key)

    def children(self, prefix: str) -> list[str]:
        self._require()
        return super().children(prefix)

    def walk(self, prefix: str):  # type: ignore[no-untyped-def]
        self._require()
        found: list[StoredObject] = list(super().walk(prefix))
        return iter(found)

    def _require(self) -> None:
        if self.is_away:
            raise Unavailable("the artifact store does not answer")


class DeafFeed(ChangeFeed):
    """A change feed that never tells anything: every event is lost."""

    async def publish(self, change: Change) -> None:
        raise Unavailable("Redis cannot be reached.")

    async def follow(self, cursor: str | None, timeout_seconds: float) -> tuple[str, list[Change]]:
        raise Unavailable("Redis cannot be reached.")


def flaky_registry(url: str) -> tuple[Registry, FlakyStore]:
    store = FlakyStore(url)
    return Registry(store), store


__all__ = ["DeafFeed", "FakeEncoder", "FlakyStore", "MemoryChangeFeed", "flaky_registry", "row"]
