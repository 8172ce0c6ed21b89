"""Trunks of backbones by themselves, for embeddings: found in the registry, loaded when asked for.

The first trunk that a process finds for a backbone is the one it keeps, so that the embeddings of
one process can be compared with each other. Not here: exporting one (training.trunks).
"""

from __future__ import annotations

import asyncio

from core.errors import Conflict
from core.registry import Registry
from service.live_models import LiveModels, loaded_within
from service.live_trunks import LiveTrunk


class BackboneTrunks:
    """The trunks that this process answers embeddings with, one for each backbone asked for."""

    def __init__(self, registry: Registry, live: LiveModels) -> None:
        self._registry = registry
        self._live = live
        self._digests: dict[str, str] = {}

    async def get(self, backbone: str, *, timeout_seconds: float) -> LiveTrunk:
        """Return the newest fp32 trunk of a backbone; only give it names that are allowed.

        Raises `Conflict` while none has been exported, or if it is damaged, `Unavailable`, and
        `DeadlineExceeded`; the loading goes on then.
        """
        async with loaded_within(timeout_seconds):
            return await self._find(backbone)

    async def _find(self, backbone: str) -> LiveTrunk:
        digest = self._digests.get(backbone)
        if digest is None:
            manifest = await asyncio.to_thread(self._registry.newest_trunk, backbone)
            if manifest is None:
                raise Conflict(
                    f"the trunk of {backbone} has not been exported yet; "
                    "a worker does it when it is idle, or with the first job that starts from it",
                    param="model",
                    code="trunk_not_exported",
                )
            digest = manifest.digest
        live = await self._live.trunk(digest)
        self._digests.setdefault(backbone, digest)
        return live
