"""Fixtures of the fault tests: a tiny model that jobs train on, and a rig of each test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Rig
from tests.integration.conftest import prefix, redis_url
from tests.integration.hf_models import save_text_model
from tests.integration.redis_server import RedisServer

__all__ = ["prefix", "redis_url"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two narrow layers with random weights, as a job names it."""
    return f"hf:{save_text_model('bert', tmp_path_factory.mktemp('hf') / 'tiny-bert')}"


@pytest.fixture
def rig(tmp_path: Path, tiny_model: str) -> Iterator[Rig]:
    """A Redis, a store and no worker yet; in the end, nothing temporary may be left."""
    server = RedisServer()
    try:
        server.start()
        rig = Rig(tmp_path, server, "faults", tiny_model)
        yield rig
        rig.collect()
        rig.close()
    finally:
        server.remove()
