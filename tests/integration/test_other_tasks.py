"""Several labels, classes in order and values: whole jobs on a tiny real trunk, then served.

The jobs whose models are served tune the trunk, for a head on frozen features is far from perfect.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from core.datasets import Task
from core.errors import DataError
from core.head import Head
from core.manifests import ModelManifest
from core.preprocessing import FloatArray
from core.registry import Registry
from core.trunk import Trunk
from service.openapi.predictions import PredictionRow
from tests.integration.hf_models import WORDS, save_wide_model
from tests.integration.service_process import ServiceProcess
from tests.integration.workshop import Workshop
from training.report import MultiLabelReport, RegressionReport, Report

ROWS = 300
"""Of so many, one in three judges a tuned model."""

FEW_EPOCHS = {"n_epochs": 5, "learning_rate_multiplier": 10, "batch_size": 32}
TOPICS = ("card", "money", "pin")
LEVELS = ("poor", "fair", "good", "best")


def texts(seed: int = 0) -> list[str]:
    numbers = random.Random(seed)
    fill = [word for word in WORDS if word not in TOPICS]
    rows = []
    for row in range(ROWS):
        topics = [topic for place, topic in enumerate(TOPICS) if row >> place & 1]
        words = numbers.sample(fill, 2) + topics
        numbers.shuffle(words)
        rows.append(" ".join(words))
    return rows


def topics_of(text: str) -> list[str]:
    return [topic for topic in TOPICS if topic in text.split()]


def value_of(text: str) -> float:
    return 1000 + 100 * len(topics_of(text)) + 5 * ("help" in text)


def as_jsonl(column: str, answers: list[Any], rows: list[str]) -> bytes:
    lines = ({"text": text, column: a} for text, a in zip(rows, answers, strict=True))
    return "\n".join(map(json.dumps, lines)).encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workshop, ServiceProcess]]:
    """A service over the store of a workshop, which has data of every task."""
    folder = tmp_path_factory.mktemp("tasks")
    service = ServiceProcess(folder, workers=1)
    workshop = Workshop(service.store, str(save_wide_model(folder / "tiny")))
    rows = texts()
    levels = [LEVELS[len(topics_of(text))] for text in rows]
    for name, column, answers in (
        ("labels", "labels", [topics_of(text) for text in rows]),
        ("values", "value", [value_of(text) for text in rows]),
        ("levels", "label", levels),
    ):
        workshop.upload(f"file-{name}", f"{name}.jsonl", as_jsonl(column, answers, rows))
    try:
        service.start()
        yield workshop, service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def workshop(served: tuple[Workshop, ServiceProcess]) -> Workshop:
    return served[0]


@pytest.fixture(scope="module")
def topics(workshop: Workshop) -> ModelManifest:
    return workshop.run(
        "ftjob-topics", training_file="file-labels", suffix="topics", strategy="auto",
        precision="auto", quality_gate={"min_accuracy": 0.5, "min_improvement_over_current": 0},
        hyperparameters=FEW_EPOCHS,
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def price(workshop: Workshop) -> ModelManifest:
    return workshop.run(
        "ftjob-price", training_file="file-values", suffix="price", strategy="gradual",
        hyperparameters=FEW_EPOCHS,
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def level(workshop: Workshop) -> ModelManifest:
    return workshop.run(
        "ftjob-level", training_file="file-levels", suffix="level", order=LEVELS,
        strategy="gradual", hyperparameters=FEW_EPOCHS,
    )[0]  # fmt: skip


def test_their_tuned_models_are_judged_on_rows_kept_apart_and_win(
    workshop: Workshop, topics: ModelManifest, price: ModelManifest, level: ModelManifest
) -> None:
    report: MultiLabelReport | RegressionReport | Report
    for manifest, kind in (
        (topics, MultiLabelReport), (price, RegressionReport), (level, Report),
    ):  # fmt: skip
        report = kind.model_validate_json(workshop.file(manifest, "report.json"))
        first, last = report.steps[0], [step for step in report.steps if step.kept][-1]
        assert (manifest.kind, manifest.blocks) == ("low_rank", last.blocks)
        assert last.nll < first.nll - 0.2
        assert report.evaluated_on == "held_out_rows"
        assert manifest.metrics["rows"] == pytest.approx(ROWS / 3, abs=5)  # twins stay together
        quoted = "rmse" if manifest is price else "accuracy"
        assert manifest.metrics[quoted] == pytest.approx(getattr(last, quoted))
        assert {step.name for step in report.steps[1:]} <= {each.what for each in report.decisions}
        # What is listed as wrong is of the rows that judged.
        rows = texts()
        for worst in report.worst_errors:
            assert worst.text == rows[worst.row - 1]


def answer(workshop: Workshop, manifest: ModelManifest) -> FloatArray:
    """What a model gives for two rows of zeros."""
    registry = Registry(workshop.store)
    trunk = Trunk.load(registry, manifest.trunk, threads=1, max_pixels=1)
    return Head.load(registry, manifest, trunk).predict(np.zeros((2, manifest.dim), np.float32))


def test_a_job_of_several_labels(workshop: Workshop, topics: ModelManifest) -> None:
    assert (topics.task, topics.labels, topics.threshold) == (
        Task.MULTI_LABEL, list(TOPICS), 0.5,
    )  # fmt: skip
    report = MultiLabelReport.model_validate_json(workshop.file(topics, "report.json"))
    assert report.metrics.micro_f1 > 0.8
    assert report.metrics.accuracy > report.metrics.majority_accuracy + 0.3
    assert report.metrics.accuracy == topics.metrics["accuracy"]
    assert report.calibration.after.nll <= report.calibration.before.nll + 0.02
    assert {one.label for one in report.metrics.labels} == set(TOPICS)
    # What the request left open is said: int8 is not for this task.
    chosen = {decision.what: decision for decision in report.decisions}
    assert chosen["Strategy"].chosen == "gradual"
    assert chosen["Precision"].chosen == "fp32"
    assert (chosen["Threshold"].chosen, chosen["Threshold"].event) == ("0.5", "threshold_chosen")
    assert report.gate is not None
    assert report.gate.passed
    assert report.standing.scratch_score is not None
    page = workshop.file(topics, "report.html").decode()
    assert "Micro F1" in page
    assert "By label" in page
    assert answer(workshop, topics).shape == (2, 3)


def test_a_job_of_values(workshop: Workshop, price: ModelManifest) -> None:
    assert (price.task, price.labels, price.threshold) == (Task.REGRESSION, [], None)
    report = RegressionReport.model_validate_json(workshop.file(price, "report.json"))
    found = report.metrics
    assert found.mae < 0.65 * found.baseline_mae
    assert found.r2 > 0.6
    assert found.covered == pytest.approx(0.9, abs=0.08)
    assert price.interval == report.interval
    assert "strength" in report.of_frozen_head
    interval = report.decisions[-1]
    assert (interval.event, interval.data) == ("interval_chosen", report.interval.model_dump())
    assert price.metrics["rmse"] == found.rmse
    assert report.worst_errors[0].loss >= report.worst_errors[-1].loss
    assert report.data.counts == {}
    page = workshop.file(price, "report.html").decode()
    assert "Mean absolute error" in page
    assert answer(workshop, price).shape == (2, 1)


def test_a_job_of_classes_in_order(workshop: Workshop, level: ModelManifest) -> None:
    assert (level.task, level.labels) == (Task.ORDINAL, list(LEVELS))
    report = Report.model_validate_json(workshop.file(level, "report.json"))
    assert report.ordinal is not None
    assert report.ordinal.mae < 0.6 * report.ordinal.baseline_mae
    assert report.ordinal.quadratic_kappa > 0.6
    assert level.metrics["mae"] == report.ordinal.mae
    assert "Quadratic weighted kappa" in workshop.file(level, "report.html").decode()


def test_a_validation_file_is_what_they_are_judged_on(workshop: Workshop) -> None:
    rows = texts(seed=1)[:60]
    other = as_jsonl("labels", [topics_of(text) for text in rows], rows)
    workshop.upload("file-other-labels", "other.jsonl", other)
    values = as_jsonl("value", [value_of(text) for text in rows], rows)
    workshop.upload("file-other-values", "other.jsonl", values)
    for name, strategy, kind in (
        ("labels", "feature_extraction", "linear"), ("values", "full", "full"),
    ):  # fmt: skip
        manifest, recorder = workshop.run(
            f"ftjob-val-{name}", training_file=f"file-{name}", strategy=strategy,
            validation_file=f"file-other-{name}", promote=False, hyperparameters=FEW_EPOCHS,
        )  # fmt: skip
        assert (manifest.kind, manifest.metrics["rows"]) == (kind, 60)
        report = json.loads(workshop.file(manifest, "report.json"))
        assert report["standing"]["rows"] == 60
        assert report["data"]["leaks"] is not None
        assert report["worst_errors"][0]["text"] in rows
        assert recorder.named("metrics")
    with pytest.raises(DataError, match="column 'labels'"):
        workshop.run(
            "ftjob-mixed", training_file="file-labels", validation_file="file-other-values"
        )


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"training_file": "file-values", "quality_gate": {"min_accuracy": 0.5}}, "quality_gate"),
        ({"training_file": "file-levels", "order": ("poor", "good", "best")}, "order"),
        ({"training_file": "file-values", "model": "topics@1"}, "model"),
    ],
)
def test_what_is_refused(
    workshop: Workshop, topics: ModelManifest, request_: dict[str, Any], param: str
) -> None:
    with pytest.raises(DataError) as caught:
        workshop.run("ftjob-refused", **request_)
    assert caught.value.param == param


def test_they_are_continued(workshop: Workshop, topics: ModelManifest) -> None:
    rows = ["lost transfer", "where transfer", "failed transfer pin", "help card", "is my card"]
    answers = [["transfer"], ["transfer"], ["pin", "transfer"], ["card"], ["card"]]
    workshop.upload("file-more", "more.jsonl", as_jsonl("labels", [*answers, ["pin"]],
                                                        [*rows, "the pin"]))  # fmt: skip
    manifest, _ = workshop.run(
        "ftjob-more", model="topics@1", training_file="file-more", suffix="topics-more"
    )
    assert manifest.labels == ["card", "money", "pin", "transfer"]
    assert (manifest.parent, manifest.task) == ("topics@1", Task.MULTI_LABEL)


class TestServed:
    """All three, in a real service."""

    @pytest.fixture
    def url(
        self, served: tuple[Workshop, ServiceProcess], topics: ModelManifest,
        price: ModelManifest, level: ModelManifest,
    ) -> str:  # fmt: skip
        for model in ("topics", "price", "level"):
            httpx.post(f"{served[1].url}/v2/repository/models/{model}/load").raise_for_status()
        return served[1].url

    def test_predictions(self, url: str) -> None:
        inputs = texts()[:40]

        def ask(model: str, inputs: list[str], **more: object) -> list[dict[str, Any]]:
            body = {"model": model, "inputs": inputs, "top_k": 3, **more}
            answer = httpx.post(f"{url}/v1/predict", json=body).raise_for_status()
            rows: list[dict[str, Any]] = answer.json()["predictions"]
            for row in rows:
                PredictionRow.model_validate(row)
                assert 0 <= row["novelty"] <= 1
            return rows

        several = ask("topics", inputs)
        for row in several:
            likely = {each["label"] for each in row["scores"] if each["score"] >= 0.5}
            assert set(row["labels"]) == likely
            assert "label" not in row
        right = [
            row["labels"] == topics_of(text) for row, text in zip(several, inputs, strict=True)
        ]
        assert np.mean(right) > 0.6
        assert {len(row["labels"]) for row in several} >= {0, 1, 2}
        values = ask("price", inputs)
        held = []
        for row, text in zip(values, inputs, strict=True):
            interval = row["interval"]
            held.append(interval["low"] <= value_of(text) <= interval["high"])
            assert interval["coverage"] == 0.9
            assert "scores" not in row
        assert np.mean(held) > 0.75
        levels = [row["label"] for row in ask("level", inputs)]
        assert (
            np.mean(
                [LEVELS[len(topics_of(t))] == said for t, said in zip(inputs, levels, strict=True)]
            )
            > 0.5
        )
        # What a word is worth: by how much the value falls without it.
        weights = [
            part["weight"]
            for row in ask("price", inputs[7:39:8], explain=True)
            for part in row["explanation"]
            if part["text"] in TOPICS
        ]
        assert np.mean(weights) > 20
        (first,) = ask("topics", inputs[7:8], explain=True)
        assert {part["text"] for part in first["explanation"]} == set(inputs[7].split())
        # BentoML's own method, as its clients call it.
        answer = httpx.post(f"{url}/predict", json={"model": "price", "inputs": inputs}).json()
        assert [row["value"] for row in answer["predictions"]] == pytest.approx(
            [row["value"] for row in values], rel=1e-5
        )

    def test_tensors(self, url: str) -> None:
        outputs = {
            "topics": [("probabilities", [-1, 3])],
            "price": [("value", [-1, 1])],
            "level": [("probabilities", [-1, 4]), ("label", [-1])],
        }
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        for model, expected in outputs.items():
            described = client.get_model_metadata(model)
            found = [(output["name"], output["shape"]) for output in described["outputs"]]
            assert found == expected
            text = triton.InferInput("text", [2], "BYTES")
            text.set_data_from_numpy(np.array([b"help money card", b"my pin"], object))
            answer = client.infer(model, [text])
            values = answer.as_numpy(expected[0][0])
            assert values.shape == (2, expected[0][1][1])
            assert values.dtype == np.float32
            rows = httpx.post(
                f"{url}/v1/predict",
                json={"model": model, "inputs": ["help money card", "my pin"], "top_k": 9},
            ).json()["predictions"]
            for row, value in zip(rows, values, strict=True):
                if model == "price":
                    assert row["value"] == pytest.approx(float(value[0]), rel=1e-5)
                else:
                    scores = {each["label"]: each["score"] for each in row["scores"]}
                    given = [scores[label] for label in described["labels"]]
                    assert given == pytest.approx(value.tolist(), abs=1e-5)
        with pytest.raises(triton.InferenceServerException, match="there is 'value'"):
            client.infer("price", [text], outputs=[triton.InferRequestedOutput("label")])
        client.close()

    def test_models_say_their_task(self, url: str) -> None:
        tasks = {}
        for model in ("topics", "price", "level"):
            described = httpx.get(f"{url}/v1/models/{model}").json()
            tasks[model] = (described["task"], described["threshold"], described["labels"])
        assert tasks == {
            "topics": ("multi_label", 0.5, list(TOPICS)),
            "price": ("regression", None, []),
            "level": ("ordinal", None, list(LEVELS)),
        }

    def test_jobs_that_cannot_be_done_are_not_made(self, url: str) -> None:
        def refuse(**fields: object) -> str | None:
            body = {"model": "minilm", **fields}
            for query in ("", "?dry_run=true"):
                answer = httpx.post(f"{url}/v1/fine_tuning/jobs{query}", json=body)
                assert answer.status_code == 400, answer.text
            param: str | None = answer.json()["error"]["param"]
            return param

        gate = {"min_accuracy": 0.5}
        assert refuse(training_file="file-values", quality_gate=gate) == "quality_gate"
        assert refuse(training_file="file-levels", order=["good", "fair", "poor"]) == "order"
        assert refuse(training_file="file-values", order=["a", "b", "c"]) == "order"
        assert refuse(training_file="file-values", model="topics") == "model"
        assert (
            refuse(training_file="file-labels", validation_file="file-values") == "validation_file"
        )
        preview = httpx.post(
            f"{url}/v1/fine_tuning/jobs?dry_run=true",
            json={"model": "minilm", "training_file": "file-values", "strategy": "auto"},
        ).json()
        assert preview["task"] == "regression"
        assert preview["resolved"]["strategy"] == "auto"
        dataset = preview["training_file"]["dataset"]
        assert (dataset["task"], dataset["classes"]) == ("regression", 0)
        assert dataset["values"]["low"] == 1000
