"""Features of items that some job has computed already, in the artifact store.

    <tenant>/features/<trunk>/<created ms>-<token>.features   float32, rows × dim
    <tenant>/features/<trunk>/<created ms>-<token>.keys       16 bytes of each row's SHA-256, behind
                                                              that of both files; written last

A *block* is what one job computed in one go. Blocks are written create-exclusive and never changed,
so that workers share them without locks; what two of them compute at once is stored twice, which
costs room and nothing else. The oldest blocks go when there are too many, too large or too old. A
damaged block counts as absent. Items are known by their content, within one tenant: whether another
tenant has the same text cannot be told from how long a job takes.

A re-run of a job computes nothing anew, one on appended data only what was appended, and one whose
worker died goes on behind the last block. Not here: computing features (training.features).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from core.errors import NoSpace, NotFound, Unavailable
from core.preprocessing import FloatArray
from core.store import ArtifactStore
from core.trunk import Trunk
from training.features import extract

BLOCK_ROWS = 4096
MAX_BLOCKS = 500
"""Blocks of one trunk: a job reads the keys of all of them, which are small."""
_READERS = 8
_KEY_BYTES = 16
_DIGEST_BYTES = 32
_SECONDS_PER_DAY = 86_400


class _Block(NamedTuple):
    """A stored block: the beginning of its keys' names, and its size."""

    name: str
    bytes: int

    def created_at(self) -> float:
        return int(self.name.rsplit("/", 1)[-1].partition("-")[0]) / 1000


class FeatureCache:
    """The features that one trunk gave for a tenant's items. `max_bytes` = 0 keeps nothing."""

    def __init__(
        self, store: ArtifactStore, tenant: str, trunk: Trunk, *, max_bytes: int, max_days: int
    ) -> None:
        self._store = store
        self._trunk = trunk
        self._folder = f"{tenant}/features/{trunk.manifest.digest}"
        self._max_bytes = max_bytes
        self._max_days = max_days
        self._listed: list[_Block] | None = None

    def extract(
        self,
        items: Sequence[str] | Sequence[bytes],
        *,
        threads: int,
        on_progress: Callable[[int, int], None],
    ) -> FloatArray:
        """Return the features of texts or encoded images, float32 [len(items), dim], in order.

        What is not known is computed, each distinct item once, and kept for the next job. As
        `training.features.extract` otherwise; `on_progress` counts distinct items.
        """
        self._listed = None
        keys = [_key(item) for item in items]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        known = self._find(set(first))
        missing = sorted(row for key, row in first.items() if key not in known)
        done = len(first) - len(missing)
        on_progress(done, len(first))
        for begin in range(0, len(missing), BLOCK_ROWS):
            rows = missing[begin : begin + BLOCK_ROWS]
            features = self._compute(items, rows, done + begin, len(first), threads, on_progress)
            block = [keys[row] for row in rows]
            known.update(zip(block, features, strict=True))
            self._add(block, features)
        return np.stack([known[key] for key in keys]) if keys else _no_rows(self._trunk.dim)

    def _compute(
        self, items: Sequence[str] | Sequence[bytes], rows: Sequence[int], done: int, total: int,
        threads: int, on_progress: Callable[[int, int], None],
    ) -> FloatArray:  # fmt: skip
        return extract(
            self._trunk,
            [items[row] for row in rows],  # type: ignore[arg-type]
            threads=threads,
            on_progress=lambda now, _: on_progress(done + now, total),
            row_of=lambda index: rows[index],
        )

    def _find(self, wanted: set[bytes]) -> dict[bytes, FloatArray]:
        """Return what blocks hold of `wanted`, newest block first."""
        found: dict[bytes, FloatArray] = {}
        try:
            self._listed = self._blocks()
        except Unavailable:
            return found
        blocks = self._listed[::-1]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="feature-cache") as pool:
            for block, keys in zip(blocks, pool.map(self._keys, blocks), strict=True):
                hits = {key: row for row, key in enumerate(keys.rows) if key in wanted}
                if hits:
                    features = self._features(block, keys)
                    found |= {key: features[row] for key, row in hits.items() if len(features)}
                    wanted = wanted - found.keys()
        return found

    def _keys(self, block: _Block) -> _Keys:
        try:
            data = self._store.get(f"{block.name}.keys")
        except (NotFound, Unavailable):
            data = b""
        body = data[_DIGEST_BYTES:]
        starts = range(0, len(body) - _KEY_BYTES + 1, _KEY_BYTES)
        return _Keys(data[:_DIGEST_BYTES], [body[start : start + _KEY_BYTES] for start in starts])

    def _features(self, block: _Block, keys: _Keys) -> FloatArray:
        """Return a block's features, or none of them if they are not what was written."""
        try:
            data = self._store.get(f"{block.name}.features")
        except (NotFound, Unavailable):
            return _no_rows(self._trunk.dim)
        if _digest(data, keys.rows) != keys.digest:
            return _no_rows(self._trunk.dim)
        return np.frombuffer(data, np.float32).reshape(len(keys.rows), self._trunk.dim)

    def _add(self, keys: Sequence[bytes], features: FloatArray) -> None:
        """Keep a block; a store that is full or away only means that the next job computes it."""
        data = features.tobytes()
        if len(data) > self._max_bytes or not np.isfinite(features).all():
            return
        name = f"{self._folder}/{int(time.time() * 1000):013}-{secrets.token_hex(6)}"
        try:
            self._evict(len(data))
            self._store.put_new(f"{name}.features", data)
            known = _digest(data, keys) + b"".join(keys)
            self._store.put_new(f"{name}.keys", known)
            self._known_blocks().append(_Block(name, len(data) + len(known)))
        except (NoSpace, Unavailable):
            self._store.delete(f"{name}.features")

    def _evict(self, coming_bytes: int) -> None:
        """Remove the oldest blocks until the next one has room.

        The folder is listed once for all that is added in one go. What other workers add meanwhile
        the next job counts, and to remove what they have removed changes nothing.
        """
        blocks = self._known_blocks()
        total = sum(block.bytes for block in blocks) + coming_bytes
        oldest = time.time() - self._max_days * _SECONDS_PER_DAY
        while blocks:
            is_excess = total > self._max_bytes or len(blocks) >= MAX_BLOCKS
            if not is_excess and blocks[0].created_at() >= oldest:
                break
            self._store.delete(f"{blocks[0].name}.keys", f"{blocks[0].name}.features")
            total -= blocks.pop(0).bytes

    def _known_blocks(self) -> list[_Block]:
        if self._listed is None:
            self._listed = self._blocks()
        return self._listed

    def _blocks(self) -> list[_Block]:
        """Return every block, oldest first; one whose keys were never written is among them."""
        sizes: dict[str, int] = {}
        for entry in self._store.walk(self._folder):
            name = entry.key.rpartition(".")[0]
            sizes[name] = sizes.get(name, 0) + entry.bytes
        return [_Block(name, size) for name, size in sorted(sizes.items())]


class _Keys(NamedTuple):
    """The digest of a block, and whose its features are, row by row."""

    digest: bytes
    rows: list[bytes]


def _key(item: str | bytes) -> bytes:
    data = item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass")
    return sha256(data).digest()[:_KEY_BYTES]


def _digest(features: bytes, keys: Sequence[bytes]) -> bytes:
    return sha256(features + b"".join(keys)).digest()


def _no_rows(dim: int) -> FloatArray:
    return np.empty((0, dim), np.float32)
