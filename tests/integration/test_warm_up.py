"""A spare child's warm-up: the trunk is there before the job, and is used only if it is the one."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk
from tests.integration.hf_models import save_text_model
from training import trunks, warm_up


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    models = tuple(str(save_text_model(kind, tmp_path / kind)) for kind in ("bert", "distilbert"))
    return Settings(store_url=str(tmp_path / "store"), hf_models=models)


def ensure(settings: Settings, model: str, loaded: Trunk | None = None) -> Trunk:
    return trunks.ensure_trunk(
        Registry(ArtifactStore(settings.store_url)), model, hf_models=settings.hf_models,
        threads=1, max_pixels=settings.max_pixels, on_export=lambda: None, loaded=loaded,
    )  # fmt: skip


def test_a_loaded_trunk_is_used_if_it_is_the_job_s(settings: Settings) -> None:
    one, other = (f"hf:{folder}" for folder in settings.hf_models)
    # A spare child never exports: that may take long, and the job may never come.
    assert warm_up.warm_up(settings, one) is None
    digest = ensure(settings, one).manifest.digest
    warm = warm_up.warm_up(settings, one)
    assert warm is not None
    assert warm.manifest.digest == digest
    assert ensure(settings, one, warm) is warm
    assert ensure(settings, other, warm).manifest.digest != digest


def test_what_is_too_large_or_damaged_is_left_to_the_job(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"hf:{settings.hf_models[0]}"
    digest = ensure(settings, model).manifest.digest
    with monkeypatch.context() as context:
        context.setattr(warm_up, "MAX_TRUNK_BYTES", 1)
        assert warm_up.warm_up(settings, model) is None
    assert warm_up.warm_up(settings, None) is None
    assert warm_up.warm_up(settings, "hf:no such model") is None
    (Path(settings.store_url) / "trunks" / digest / "trunk.onnx").write_bytes(b"damaged")
    assert warm_up.warm_up(settings, model) is None
