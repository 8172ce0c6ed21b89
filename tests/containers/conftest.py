"""Fixtures of the container tests: without a Docker engine they fail, they do not skip."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.containers.engine import ROOT, Images, Stack, docker

EXAMPLES = ROOT / "examples" / "support-intents"


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    """Both images, built once."""
    docker("version")
    built = Images(tag=f"test-{secrets.token_hex(4)}")
    built.build()
    yield built
    built.remove()


@pytest.fixture(scope="session")
def stack(images: Images) -> Iterator[Stack]:
    """A running stack; tests leave it running."""
    started = Stack(images)
    try:
        started.up()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="session")
def intents() -> bytes:
    """The example data set."""
    return Path(EXAMPLES / "train.csv").read_bytes()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the containers' logs to a failure."""
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(stack, Stack):
        report.sections.append(("containers", stack.logs()))
    return report
