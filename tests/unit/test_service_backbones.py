"""Trunks of backbones by themselves: whoever cannot wait for one leaves, and it is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from core.errors import DeadlineExceeded
from core.registry import Registry
from core.store import ArtifactStore
from service.backbones import BackboneTrunks
from service.live_models import LiveModels
from tests.builders import add_text_trunk

pytestmark = pytest.mark.anyio


class SlowTrunks:
    """Loads what it is asked for once it is let."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def trunk(self, digest: str) -> str:
        await self.may_end.wait()
        return digest


async def test_a_caller_with_a_deadline_does_not_wait_for_the_load(tmp_path: Path):
    registry = Registry(ArtifactStore(str(tmp_path)))
    manifest = add_text_trunk(registry)
    slow = SlowTrunks()
    trunks = BackboneTrunks(registry, cast(LiveModels, slow))
    with pytest.raises(DeadlineExceeded, match="not loaded before the deadline"):
        await asyncio.wait_for(trunks.get("minilm", timeout_seconds=0.05), 30)
    slow.may_end.set()
    found: Any = await trunks.get("minilm", timeout_seconds=30)
    assert found == manifest.digest
