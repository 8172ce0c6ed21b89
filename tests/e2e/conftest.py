"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live_stack import LiveStack, start_stack, stop_stack
from tests.integration.hf_models import save_image_model, save_text_model


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny Hugging Face directories that the operator of the shared stack allows, by modality."""
    folder = tmp_path_factory.mktemp("hf")
    text = save_text_model("bert", folder / "tiny-bert")
    image = save_image_model("resnet", folder / "tiny-resnet")
    return {"text": str(text), "image": str(image)}


@pytest.fixture(scope="session")
def stack(
    tmp_path_factory: pytest.TempPathFactory, hf_models: dict[str, str]
) -> Iterator[LiveStack]:
    """One stack with two service processes, shared by the tests that break nothing."""
    running = start_stack(
        tmp_path_factory.mktemp("stack"),
        GRAFT_SERVICE_WORKERS="2",
        GRAFT_LEASE_SECONDS="2",
        GRAFT_HF_MODELS=json.dumps(list(hf_models.values())),
    )
    yield running
    stop_stack(running)


@pytest.fixture(scope="session")
def intents() -> bytes:
    """The example data set."""
    return Path("examples/support-intents/train.csv").read_bytes()
