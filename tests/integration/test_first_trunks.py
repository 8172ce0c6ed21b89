"""Trunks are exported while a worker is idle, in a process that a job ends at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from core.backbones import BACKBONES
from core.registry import Registry
from core.store import ArtifactStore
from tests.waiting import until
from training import first_trunks

pytestmark = pytest.mark.anyio
SECONDS = 240.0


def exporting() -> list[psutil.Process]:
    """The processes of this one that export, as the operating system sees them."""
    found = []
    for child in psutil.Process().children():
        try:
            if "training.first_trunks" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@asynccontextmanager
async def worker(registry: Registry, is_idle: list[bool]) -> AsyncIterator[asyncio.Task[None]]:
    stopping = asyncio.Event()
    task = asyncio.create_task(
        first_trunks.export_when_idle(registry, lambda: is_idle[0], stopping)
    )
    try:
        yield task
    finally:
        stopping.set()
        await task


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("GRAFT_STORE_URL", str(tmp_path))
    monkeypatch.setattr(first_trunks, "IDLE_SECONDS", 0.4)
    return Registry(ArtifactStore(str(tmp_path)))


async def test_a_job_ends_the_export_and_the_next_idle_time_does_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(first_trunks, "BACKBONES", {"minilm": BACKBONES["minilm"]})
    is_idle = [True]
    async with worker(registry, is_idle) as task:
        await until(lambda: bool(exporting()), seconds=30)
        is_idle[0] = False
        await until(lambda: not exporting(), seconds=30)
        assert registry.newest_trunk("minilm") is None
        is_idle[0] = True
        await asyncio.wait_for(asyncio.shield(task), SECONDS)
    manifest = registry.newest_trunk("minilm")
    assert manifest is not None
    assert (manifest.backbone, manifest.precision) == ("minilm", "fp32")


async def test_what_cannot_be_exported_is_left_out_and_stopping_ends_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    absent = replace(BACKBONES["minilm"], package="weights-that-nobody-has")
    rows = {"absent": absent, "nothing": BACKBONES["minilm"]}
    monkeypatch.setattr(first_trunks, "BACKBONES", rows)
    async with worker(registry, [True]) as task:
        await asyncio.wait_for(asyncio.shield(task), SECONDS)
    # What is not installed is not tried, so it is no error either.
    assert [record.args for record in caplog.records if record.levelname == "ERROR"] == [
        ("nothing",)
    ]
    monkeypatch.setattr(first_trunks, "BACKBONES", BACKBONES)
    async with worker(registry, [True]):
        await until(lambda: bool(exporting()), seconds=30)
    assert not exporting()
