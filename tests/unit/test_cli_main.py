from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from tests.unit.cli_fake_service import Answer, FakeService, event, file, job, serve

RUNNER = CliRunner()
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def service() -> Iterator[FakeService]:
    with serve() as fake:
        yield fake


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRAFT_URL", "GRAFT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    # A proxy must not stand between a person and a service on the same machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")


def graft(service: FakeService, *arguments: str, **more: str) -> Result:
    return RUNNER.invoke(app, ["--url", service.url, *arguments], **more)  # type: ignore[arg-type]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "command", [["jobs"], ["models"], ["job", "ftjob-1"], ["predict", "m", "x"]]
)
def test_no_service_says_how_to_start_one(command: list[str]) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    result = RUNNER.invoke(app, ["--url", url, *command])
    assert result.exit_code == 1
    assert f"no service at {url}; start one with `graft up`" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["jobs"], ["predict", "m", "x"]])
def test_a_missing_key_says_how_to_give_one(service: FakeService, command: list[str]) -> None:
    refusal = Answer({"error": {"message": "no key", "code": "invalid_api_key"}}, 401)
    service.answer(f"GET {JOBS}", refusal)
    service.answer("POST /v1/predict", refusal)
    result = graft(service, *command)
    assert result.exit_code == 1
    assert "set GRAFT_API_KEY" in result.stderr


@pytest.mark.parametrize("command", [["jobs"], ["predict", "m", "x"]])
def test_the_key_is_sent_by_both_clients(service: FakeService, command: list[str]) -> None:
    service.answer(f"GET {JOBS}", Answer({"object": "list", "data": [], "has_more": False}))
    service.answer("POST /v1/predict", Answer({"predictions": [{"label": "a", "score": 1.0}]}))
    result = RUNNER.invoke(app, command, env={"GRAFT_URL": service.url, "GRAFT_API_KEY": "secret"})
    assert result.exit_code == 0, result.output
    assert service.requests[-1].headers["authorization"] == "Bearer secret"


def test_a_refusal_is_passed_on(service: FakeService) -> None:
    result = graft(service, "job", "nothing")
    assert result.exit_code == 1
    assert "no such thing (HTTP 404)" in result.stderr


@pytest.mark.parametrize("url", ["localhost:3000", "ftp://host", "http://"])
def test_a_url_must_be_one(url: str) -> None:
    assert RUNNER.invoke(app, ["--url", url, "jobs"]).exit_code == 2


def test_training_is_followed_until_the_model_is_served(
    service: FakeService, tmp_path: Path
) -> None:
    data = tmp_path / "Support Intents.csv"
    data.write_text("text,label\nhello,greeting\n")
    served = job("succeeded", fine_tuned_model="support-intents@1", metrics={"accuracy": 0.875})
    service.answer("POST /v1/files", Answer(file("uploaded")))
    service.answer(f"POST {JOBS}", Answer(job("validating_files")))
    service.answer(
        f"GET {JOBS}/ftjob-1/events",
        Answer(raw=event(1, "started", "[red]Started[/] attempt 1.") + event(2, "succeeded")),
    )
    service.answer(f"GET {JOBS}/ftjob-1", Answer(served))
    service.answer(
        "GET /v1/models/support-intents@1",
        Answer({"served": False, "refused": None}),
        Answer({"served": True, "refused": None}),
    )
    result = graft(service, "train", str(data), "--seed", "7", "--strategy", "gradual")
    assert result.exit_code == 0, result.output
    created = next(r.json for r in service.requests if r.path == JOBS)
    assert created == {
        "model": "minilm", "training_file": "file-1", "suffix": "support-intents", "seed": 7,
        "strategy": "gradual",
    }  # fmt: skip
    upload = next(r.body for r in service.requests if r.path == "/v1/files")
    assert data.read_bytes() in upload
    assert "[red]Started[/] attempt 1." in result.stdout
    assert "accuracy: 0.875" in result.stdout
    assert "graft predict support-intents" in result.stdout


def test_training_need_not_be_waited_for(service: FakeService, tmp_path: Path) -> None:
    for name, class_name in (("a.png", "cat"), ("b.png", "dog")):
        (tmp_path / class_name).mkdir()
        (tmp_path / class_name / name).write_bytes(b"png")
    service.answer("POST /v1/files", Answer(file("uploaded")))
    service.answer(f"POST {JOBS}", Answer(job("validating_files")))
    result = graft(service, "train", str(tmp_path), "--name", "pets", "--no-wait")
    assert result.exit_code == 0, result.output
    created = service.requests[-1].json
    assert (created["model"], created["suffix"]) == ("efficientnet-lite0", "pets")
    assert "graft job ftjob-1 --follow" in result.stdout


def test_a_bad_file_is_refused_with_its_lines(service: FakeService, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n")
    service.answer("POST /v1/files", Answer(file("uploaded")))
    service.answer(f"POST {JOBS}", Answer(job("validating_files")))
    service.answer(f"GET {JOBS}/ftjob-1/events", Answer(raw=event(1, "failed")))
    error = {"code": "data_error", "message": "the file is unusable", "param": None}
    service.answer(f"GET {JOBS}/ftjob-1", Answer(job("failed", error=error)))
    service.answer(
        "GET /v1/files/file-1",
        Answer(
            file(
                "error",
                "line 2, column 'label': is empty; fill it in; line 5: has 3 columns; and 7 more",
            )
        ),
    )
    result = graft(service, "train", str(data))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: data.csv cannot be trained on:",
        "  line 2, column 'label': is empty; fill it in",
        "  line 5: has 3 columns",
        "  and 7 more",
    ]


def test_a_failed_job_is_an_error(service: FakeService) -> None:
    service.answer(f"GET {JOBS}/ftjob-1/events", Answer(raw=event(1, "failed")))
    error = {"code": "timeout", "message": "it took too long", "param": None}
    service.answer(f"GET {JOBS}/ftjob-1", Answer(job("failed", error=error)))
    result = graft(service, "job", "ftjob-1", "--follow")
    assert result.exit_code == 1
    assert "job ftjob-1 failed: it took too long" in result.stderr


def test_a_bad_name_is_refused_before_the_upload(service: FakeService, tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    result = graft(service, "train", str(tmp_path / "a.csv"), "--name", "Not A Name")
    assert result.exit_code == 1
    assert "--name must be" in result.stderr
    assert not service.requests


def test_a_job_is_shown(service: FakeService) -> None:
    running = job("running", progress={"stage": "features", "fraction": 0.5}, cancel_requested=True)
    service.answer(f"GET {JOBS}/ftjob-1", Answer(running))
    result = graft(service, "job", "ftjob-1")
    assert result.exit_code == 0, result.output
    assert "features" in result.stdout
    assert "cancel_requested" in result.stdout


@pytest.mark.parametrize(
    ("words", "body", "status"),
    [
        (["cancel"], None, "cancelled"),
        (["cancel", "--keep-best"], {"keep_best": True}, "cancelled"),
        (["pause"], None, "paused"),
        (["resume"], None, "queued"),
    ],
)
def test_a_job_is_steered(
    service: FakeService, words: list[str], body: object, status: str
) -> None:
    service.answer(f"POST {JOBS}/ftjob-1/{words[0]}", Answer(job(status)))
    service.answer(f"GET {JOBS}/ftjob-1", Answer(job(status)))
    result = graft(service, words[0], "ftjob-1", *words[1:])
    assert result.exit_code == 0, result.output
    asked = service.requests[0]
    assert (asked.path, asked.body and asked.json) == (f"{JOBS}/ftjob-1/{words[0]}", body or b"")
    assert f"ftjob-1 is {status}" in result.stdout


def test_a_cancel_that_takes_a_step_says_so(service: FakeService) -> None:
    running = job("running", cancel_requested=True)
    service.answer(f"POST {JOBS}/ftjob-1/cancel", Answer(running))
    service.answer(f"GET {JOBS}/ftjob-1", Answer(running))
    assert "stops at its next step" in graft(service, "cancel", "ftjob-1").stdout


def test_a_job_that_cannot_be_paused_is_an_error(service: FakeService) -> None:
    refusal = {"error": {"message": "The job is already succeeded."}}
    service.answer(f"POST {JOBS}/ftjob-1/pause", Answer(refusal, 409))
    result = graft(service, "pause", "ftjob-1")
    assert result.exit_code == 1
    assert "The job is already succeeded. (HTTP 409)" in result.stderr


@pytest.mark.parametrize(("name", "file_id"), [("r.html", "file-h"), ("r.json", "file-j")])
def test_a_report_is_saved(service: FakeService, tmp_path: Path, name: str, file_id: str) -> None:
    done = job("succeeded", report="file-j", report_html="file-h")
    service.answer(f"GET {JOBS}/ftjob-1", Answer(done))
    service.answer(f"GET /v1/files/{file_id}/content", Answer(raw=b"the report"))
    result = graft(service, "job", "ftjob-1", "--report", str(tmp_path / name))
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).read_bytes() == b"the report"


def test_a_job_without_report_is_an_error(service: FakeService, tmp_path: Path) -> None:
    service.answer(f"GET {JOBS}/ftjob-1", Answer(job("running", report=None)))
    result = graft(service, "job", "ftjob-1", "--report", str(tmp_path / "r.html"))
    assert result.exit_code == 1
    assert "it is running" in result.stderr
    assert not (tmp_path / "r.html").exists()


def test_jobs_and_models_are_listed(service: FakeService) -> None:
    page = {"object": "list", "data": [job("queued")], "has_more": False}
    service.answer(f"GET {JOBS}", Answer(page))
    model = {"id": "pets", "object": "model", "created": 0, "owned_by": "default"}
    tuned = model | {"labels": [f"l{n}" for n in range(9)]}
    service.answer("GET /v1/models", Answer({"object": "list", "data": [tuned]}))
    assert "ftjob-1" in graft(service, "jobs").stdout
    assert "l0, l1, l2, l3, l4, l5 …" in graft(service, "models").stdout


def test_texts_images_and_lines_of_standard_input_are_predicted(
    service: FakeService, tmp_path: Path
) -> None:
    image = tmp_path / "photo.png"
    image.write_bytes(b"png")
    answers = [{"label": "a", "score": 0.75, "scores": [{"label": "a", "score": 0.75}]}] * 4
    service.answer("POST /v1/predict", Answer({"predictions": answers}))
    result = graft(
        service, "predict", "m", "hello", str(image), "-", "--json", input="one\n\ntwo\n"
    )
    assert result.exit_code == 0, result.output
    assert service.requests[0].json == {
        "model": "m", "inputs": ["hello", {"image": "cG5n"}, "one", "two"],
    }  # fmt: skip
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["input"] for line in lines] == ["hello", str(image), "one", "two"]
    assert lines[0]["label"] == "a"


def test_several_labels_and_values_are_shown(service: FakeService) -> None:
    scores = [{"label": "late", "score": 0.9}, {"label": "rude", "score": 0.6}]
    predictions = [
        {"labels": ["late", "rude"], "scores": scores},
        {"labels": [], "scores": scores},
        {"value": 3.41999, "interval": {"low": 2.6, "high": 4.24, "coverage": 0.9}},
    ]
    service.answer("POST /v1/predict", Answer({"predictions": predictions}))
    result = graft(service, "predict", "m", "x", "y", "z")
    assert result.stdout.splitlines() == [
        "late 0.900, rude 0.600  x", "no label  y", "3.42 (90 % of such are from 2.6 to 4.24)  z",
    ]  # fmt: skip


def test_a_bad_row_is_shown_in_its_place_and_fails_the_command(service: FakeService) -> None:
    predictions = [{"label": "a", "score": 0.75}, {"error": {"message": "too long"}}]
    service.answer("POST /v1/predict", Answer({"predictions": predictions}))
    result = graft(service, "predict", "m", "x", "y", "--top-k", "2")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["a 0.750  x", "too long  y"]
    assert service.requests[0].json["top_k"] == 2


def test_up_refuses_a_port_in_use_before_it_starts_anything(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        data = tmp_path / "data"
        result = RUNNER.invoke(app, ["up", "--port", port, "--data", str(data)])
    assert result.exit_code == 1
    assert f"port {port} cannot be used (address already in use)" in result.stderr
    assert not data.exists()
