"""Which version answers a reference, by the release that holds.

A split is sticky: the same key gets the same version in every process and after every restart, and
when weights change no more keys move than must. Not here: whether that version is in memory.
"""

from __future__ import annotations

from hashlib import blake2b

from core.identifiers import PRODUCTION
from core.manifests import Release, Share


def choose_version(release: Release, name: str, alias: str, routing_key: str) -> int | None:
    """Return the version that `alias` means to a caller with this key, or None for no such alias.

    Only the production alias is split.
    """
    if alias == PRODUCTION and release.traffic:
        return _share(release.traffic, _place(f"{name}\0{routing_key}"))
    return release.aliases.get(alias)


def _place(key: str) -> float:
    """Return where a key lies in [0, 1)."""
    return int.from_bytes(blake2b(key.encode(errors="replace"), digest_size=7).digest()) / (1 << 56)


def _share(traffic: tuple[Share, ...], place: float) -> int:
    # In the order of their numbers, so that a newer version that gets more takes from its
    # neighbour only.
    shares = sorted(traffic, key=lambda share: share.version)
    left = place * sum(share.weight for share in shares)
    for share in shares:
        left -= share.weight
        if left < 0:
            return share.version
    return shares[-1].version
