"""The main job: data in, a served model out, through HTTP only and with the real client."""

from __future__ import annotations

import base64
import csv
import io
import threading
import time
import zipfile
from pathlib import Path

import httpx
from PIL import Image, ImageDraw

from tests.e2e.live_stack import LiveStack, unique_rows


def shapes(per_class: int, seed: int) -> dict[str, bytes]:
    """PNG files of two classes that no trained backbone confuses: `circle/0.png`, …"""
    files = {}
    for kind in ("circle", "square"):
        for n in range(per_class):
            image = Image.new("RGB", (96, 96), (n * 7 % 60, 20, seed % 60))
            box = (10 + n % 20, 10 + n % 13, 60 + n % 20, 60 + n % 13)
            draw = ImageDraw.Draw(image)
            (draw.ellipse if kind == "circle" else draw.rectangle)(box, fill=(250, 200, n % 255))
            data = io.BytesIO()
            image.save(data, "PNG")
            files[f"{kind}/{n}.png"] = data.getvalue()
    return files


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_text_job_from_upload_to_predictions(stack: LiveStack, intents: bytes) -> None:
    file = stack.upload("train.csv", intents)
    assert file.status == "processed", file.status_details
    created = stack.train(file.id, "intents")
    assert created.status in ("validating_files", "queued", "running")
    assert created.model == "minilm"

    job = stack.finished(created.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "intents@1"
    stack.served("intents")

    with Path("examples/support-intents/heldout.csv").open(newline="") as lines:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(lines)]
    answer = stack.predict("intents", [text for text, _ in rows])
    assert answer["model"] == "intents@1"
    right = sum(
        got["label"] == label for got, (_, label) in zip(answer["predictions"], rows, strict=True)
    )
    # A majority guess gets a tenth, words counted one by one half (examples/support-intents).
    assert right / len(rows) > 0.6
    for row in answer["predictions"]:
        assert abs(row["scores"][0]["score"] - row["score"]) < 1e-9
        assert 0 < sum(score["score"] for score in row["scores"]) <= 1 + 1e-5

    kinds = [event["event"] for event in stack.events(job.id)]
    for kind in (
        "queued", "started", "stage", "data_report", "metrics", "exported", "published",
        "succeeded",
    ):  # fmt: skip
        assert kind in kinds
    assert kinds[-1] == "succeeded"


def test_quality_gate_keeps_a_version_without_releasing_it(
    stack: LiveStack, intents: bytes
) -> None:
    file = stack.upload("train.csv", intents)
    job = stack.finished(stack.train(file.id, "gated", quality_gate={"min_accuracy": 1.0}).id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "quality_gate"
    assert "gated@1 is kept but not released" in job.error.message
    assert "gate_failed" in [event["event"] for event in stack.events(job.id)]
    # It can be looked at, and even asked, but nobody who asks for `gated` gets it.
    report = stack.openai.files.content(job.to_dict()["report_html"])  # type: ignore[arg-type]
    assert report.text.startswith("<!doctype html>")
    stack.served("gated@1")
    answer = stack.http.post("/v1/predict", json={"model": "gated", "inputs": ["hi"]})
    assert answer.status_code == 404


def test_image_job_and_a_bad_row_in_its_own_place(stack: LiveStack) -> None:
    file = stack.upload("shapes.zip", zipped(shapes(12, seed=1)))
    assert file.status == "processed", file.status_details
    job = stack.finished(stack.train(file.id, "shapes", model="efficientnet-lite0").id)
    assert job.status == "succeeded", job.error

    held_out = shapes(6, seed=40)
    inputs = [{"image": base64.b64encode(data).decode()} for data in held_out.values()]
    stack.served("shapes")
    answer = stack.predict("shapes", [*inputs, {"image": "AAAA"}, "a text"])
    *good, damaged, text = answer["predictions"]
    assert [row["label"] for row in good] == [name.split("/")[0] for name in held_out]
    assert "JPEG" in damaged["error"]["message"]
    assert "images" in text["error"]["message"]

    raw = stack.http.post(
        "/v1/predict?model=shapes",
        content=held_out["circle/0.png"],
        headers={"content-type": "image/png"},
    )
    assert raw.json()["predictions"][0]["label"] == "circle"


def test_hugging_face_directories(
    stack: LiveStack, hf_models: dict[str, str], intents: bytes
) -> None:
    uploads = {
        "text": ("train.csv", intents, "hello"),
        "image": (
            "shapes.zip",
            zipped(shapes(8, seed=2)),
            {"image": base64.b64encode(shapes(1, seed=3)["circle/0.png"]).decode()},
        ),
    }
    for modality, (filename, data, probe) in uploads.items():
        file = stack.upload(filename, data)
        model = f"hf:{hf_models[modality]}"
        job = stack.finished(stack.train(file.id, f"tiny-{modality}", model=model).id)
        assert job.status == "succeeded", job.error
        stack.served(f"tiny-{modality}@1")
        answer = stack.predict(f"tiny-{modality}@1", [probe])
        assert (
            answer["predictions"][0]["label"]
            in stack.openai.models.retrieve(f"tiny-{modality}").to_dict()["labels"]
        )  # type: ignore[operator]


def test_second_version_is_served_at_once_and_the_first_stays_pinned(
    stack: LiveStack, intents: bytes
) -> None:
    file = stack.upload("train.csv", intents)
    for number in (1, 2):
        job = stack.finished(stack.train(file.id, "twice").id)
        assert job.fine_tuned_model == f"twice@{number}"
    stack.served("twice@2")
    deadline = time.monotonic() + 5
    while stack.predict("twice", ["hi"])["model"] != "twice@2":
        assert time.monotonic() < deadline
    assert stack.predict("twice@1", ["hi"])["model"] == "twice@1"
    listed = stack.http.get("/v1/models/twice").json()
    assert listed["versions"] == [1, 2]
    assert listed["aliases"] == {"production": 2}


def test_publish_disturbs_no_other_model(stack: LiveStack, intents: bytes) -> None:
    file = stack.upload("train.csv", intents)
    assert stack.finished(stack.train(file.id, "steady").id).status == "succeeded"
    stack.served("steady")
    failures: list[str] = []
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=stack.url, timeout=30) as http:
            while not stop.is_set():
                body = {"model": "steady", "inputs": ["where is my parcel"]}
                answer = http.post("/v1/predict", json=body)
                if answer.status_code != 200:
                    failures.append(answer.text)

    caller = threading.Thread(target=load)
    caller.start()
    try:
        job = stack.finished(stack.train(file.id, "newcomer").id)
        assert job.status == "succeeded", job.error
        # Every process answers within a second of the publish: ask more often than chance allows.
        stack.served("newcomer")
        time.sleep(1)
        for _ in range(40):
            with httpx.Client(base_url=stack.url, timeout=30) as fresh:
                body = {"model": "newcomer", "inputs": ["hello"]}
                assert fresh.post("/v1/predict", json=body).status_code == 200
    finally:
        stop.set()
        caller.join()
    assert failures == []


def test_validation_file_is_what_the_metrics_are_of(stack: LiveStack, intents: bytes) -> None:
    train = stack.upload("train.csv", intents)
    held_out = stack.upload("v.csv", Path("examples/support-intents/heldout.csv").read_bytes())
    job = stack.finished(stack.train(train.id, "validated", validation_file=held_out.id).id)
    assert job.status == "succeeded", job.error
    metrics = stack.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["metrics"]
    assert metrics["rows"] == 140
    assert metrics["accuracy"] > metrics["majority_accuracy"]


def test_cancel_a_running_job(stack: LiveStack, intents: bytes) -> None:
    file = stack.upload("many.csv", unique_rows(intents, 3))
    job = stack.train(file.id, "cancelled")
    stack.running(job.id)
    answer = stack.openai.fine_tuning.jobs.cancel(job.id)
    assert answer.status in ("running", "cancelled")
    assert stack.finished(job.id, seconds=15).status == "cancelled"
    assert stack.http.get("/v1/models/cancelled").status_code == 404


def test_events_stream_and_resume(stack: LiveStack, intents: bytes) -> None:
    file = stack.upload("train.csv", intents)
    job = stack.train(file.id, "streamed")
    path = f"/v1/fine_tuning/jobs/{job.id}/events"
    with stack.http.stream("GET", path, params={"stream": "true"}, timeout=60) as stream:
        ids = [x.removeprefix("id: ") for x in stream.iter_lines() if x.startswith("id: ")]
    assert ids == [event["id"] for event in stack.events(job.id)]
    assert len(set(ids)) == len(ids)
    with stack.http.stream(
        "GET", path, headers={"accept": "text/event-stream", "last-event-id": ids[2]}, timeout=60
    ) as stream:
        resumed = [x.removeprefix("id: ") for x in stream.iter_lines() if x.startswith("id: ")]
    assert resumed == ids[3:]
