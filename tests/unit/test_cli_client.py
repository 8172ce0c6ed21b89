from __future__ import annotations

from pathlib import Path

import pytest

from cli import client as client_module
from cli.client import Client, Input, batches, image_input, read_input
from cli.failures import CommandError
from tests.unit.cli_fake_service import Answer, file, serve


def test_requests_are_bounded_in_inputs_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_INPUTS", 3)
    monkeypatch.setattr(client_module, "MAX_BATCH_BYTES", 10)
    monkeypatch.setattr(client_module, "INPUTS_PER_IMAGE", 2)
    inputs: list[Input] = ["a", "b", "c", "d", "e" * 20, {"image": "f" * 8}, "g", "hh"]
    assert list(batches(inputs)) == [
        ["a", "b", "c"], ["d"], ["e" * 20], [{"image": "f" * 8}, "g"], ["hh"],
    ]  # fmt: skip
    assert list(batches([])) == []


def test_predictions_of_many_requests_keep_their_order() -> None:
    with serve() as service, Client(service.url) as client:
        service.routes["POST /v1/predict"] = lambda request: Answer(
            {"predictions": [{"label": text} for text in request.json["inputs"]]}
        )
        texts = [str(n) for n in range(600)]
        assert [p["label"] for p in client.predict("m", texts)] == texts
        assert len(service.requests) == 3


def test_only_an_image_file_that_exists_is_sent_as_an_image(tmp_path: Path) -> None:
    image = tmp_path / "a.JPG"
    image.write_bytes(b"jpeg")
    assert read_input(str(image)) == image_input(b"jpeg") == {"image": "anBlZw=="}
    assert read_input("missing.png") == "missing.png"
    assert read_input("x" * 5000) == "x" * 5000
    assert read_input("a\0b.png") == "a\0b.png"
    note = tmp_path / "note.txt"
    note.touch()
    assert read_input(str(note)) == str(note)


def test_a_file_is_waited_for_within_a_deadline() -> None:
    with serve() as service, Client(service.url) as client:
        uploaded = Answer(file("uploaded"))
        client.openai.max_retries = 0  # it has a patience of its own, which is short
        away = Answer({"error": {"message": "Redis cannot be reached."}}, 503)
        service.answer("GET /v1/files/file-1", uploaded, away, Answer(file("processed")))
        assert client.wait_for_file("file-1").status == "processed"
        service.answer("GET /v1/files/file-1", uploaded)
        with pytest.raises(CommandError, match="not processed"):
            client.wait_for_file("file-1", timeout_seconds=0)


def test_a_version_that_the_service_refuses_is_not_waited_for() -> None:
    with serve() as service, Client(service.url) as client:
        service.answer("GET /v1/models/m@1", Answer({"served": False, "refused": "bad hash"}))
        with pytest.raises(CommandError, match="bad hash"):
            client.wait_until_served("m@1")
        away = Answer({"error": {"message": "Redis cannot be reached."}}, 503)
        service.answer("GET /v1/models/m@1", away, Answer({"served": True}))
        client.wait_until_served("m@1")
        service.answer("GET /v1/models/m@1", Answer({"served": False, "refused": None}))
        with pytest.raises(CommandError, match=r"not served after 0\.1 s"):
            client.wait_until_served("m@1", timeout_seconds=0.1)
