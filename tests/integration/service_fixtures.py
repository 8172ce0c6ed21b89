"""One service of two processes for all tests; what a test makes has a name of its own.

A module that uses it says `pytest_plugins = ["tests.integration.service_fixtures"]`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from openai import AsyncOpenAI

from tests.builders import add_image_trunk, add_text_trunk, publish
from tests.integration.service_process import (
    START_SECONDS,
    FakeWorker,
    ServiceProcess,
    eventually,
)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Two processes that serve `pets` and `other` (text) and `shapes` (images)."""
    running = ServiceProcess(tmp_path_factory.mktemp("service"))
    trunk = add_text_trunk(running.registry)
    publish(running.registry, trunk, "pets", labels=("cat", "dog", "cow"))
    publish(running.registry, trunk, "other")
    publish(running.registry, add_image_trunk(running.registry), "shapes", labels=("a", "b"))
    try:
        running.start()
        eventually(lambda: len(running.pids()) == 2, START_SECONDS, "two processes")
        yield running
    finally:
        running.stop()


@pytest.fixture
async def worker(service: ServiceProcess) -> AsyncIterator[FakeWorker]:
    fake = FakeWorker(service)
    yield fake
    await fake.queue.close()


@pytest.fixture
async def http(service: ServiceProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with service.http() as client:
        yield client


@pytest.fixture
async def openai(service: ServiceProcess) -> AsyncIterator[AsyncOpenAI]:
    async with service.openai() as client:
        yield client
