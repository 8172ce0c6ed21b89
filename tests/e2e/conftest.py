"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live_stack import LiveStack, start_stack, stop_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """One stack with two service processes, shared by the tests that break nothing."""
    running = start_stack(
        tmp_path_factory.mktemp("stack"), GRAFT_SERVICE_WORKERS="2", GRAFT_LEASE_SECONDS="2"
    )
    yield running
    stop_stack(running)


@pytest.fixture(scope="session")
def intents() -> bytes:
    """The example data set."""
    return Path("examples/support-intents/train.csv").read_bytes()
