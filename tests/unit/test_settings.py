"""Settings: read from the environment, checked, and never printed with their secrets."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from core.settings import Settings


def test_every_setting_has_a_default_and_a_description():
    for name, field in Settings.model_fields.items():
        assert not field.is_required(), name
        assert field.description, name
        assert field.description.endswith("."), name


def test_a_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAFT_MAX_INPUTS", "7")
    monkeypatch.setenv("GRAFT_HF_MODELS", '["org/name@1"]')
    settings = Settings()
    assert settings.max_inputs == 7
    assert settings.hf_models == ("org/name@1",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_INPUTS", "0"),
        ("POLL_SECONDS", "-1"),
        ("REDIS_PREFIX", "a:b"),
        ("SERVICE_WORKERS", "x"),
    ],
)
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(f"GRAFT_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


def test_secrets_are_not_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAFT_API_KEY", "hush-hush")
    monkeypatch.setenv("GRAFT_REDIS_URL", "redis://:hush-hush@host/0")
    settings = Settings()
    assert "hush-hush" not in repr(settings)
    assert "hush-hush" not in settings.model_dump_json()


def test_what_is_refused_is_not_quoted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAFT_REDIS_URL", "rediss+sentinel://:hush-hush@host")
    with pytest.raises(ValidationError, match="ends with the service's name") as refused:
        Settings()
    assert "hush" not in str(refused.value)
