"""A whole job in this process, on a tiny real trunk: its report, its verdicts and its gate."""

from __future__ import annotations

import numpy as np
import pytest

from core.datasets import RowError
from core.errors import QualityGateFailed
from core.head import Head
from core.registry import Registry
from core.store import ArtifactStore
from tests.builders import TENANT
from tests.integration.hf_models import WORDS, save_text_model
from tests.integration.workshop import Workshop
from training.report_html import render

SCRIPT = "<script>document.title='gotcha'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    model = save_text_model("bert", folder / "tiny")
    made = Workshop(ArtifactStore(str(folder / "store")), str(model))
    # Words that the tiny model does not tell apart, and one that asks for trouble.
    rows = words(120)
    rows[7] = (f"parcel {SCRIPT}", "order")
    rows[50] = rows[20]
    made.upload_texts("file-train", rows)
    made.upload_texts("file-other", words(60, seed=1))
    return made


def words(count: int, seed: int = 0) -> list[tuple[str, str]]:
    numbers = np.random.default_rng(seed)
    topics = [("parcel", "order"), ("refund", "money"), ("password", "login")]
    fill = ["please", "today", "again", "soon", "really", "kindly", "now", "also", "still", "sadly"]
    return [
        (f"{topics[n % 3][0]} {' '.join(numbers.choice(fill, 5))} {seed} {n}", topics[n % 3][1])
        for n in range(count)
    ]


def test_the_report_of_a_job(workshop: Workshop) -> None:
    manifest, recorder = workshop.run("ftjob-report", training_file="file-train", suffix="topics")
    report = workshop.report(manifest)
    assert (report.format, report.job, report.model) == (
        "graft-report-1", "ftjob-report", "topics",
    )  # fmt: skip
    assert report.evaluated_on == "cross_validation"
    low, high = report.metrics.accuracy_interval
    assert low < report.metrics.accuracy < high
    assert report.lineage.trunk == manifest.trunk
    assert report.lineage.dataset == manifest.dataset.sha256
    assert report.peak_memory_bytes > 50e6
    assert {"data", "features", "inspect", "fit", "evaluate", "report_baselines"} <= (
        report.seconds.keys()
    )
    # What is planted in the data is said before the fit.
    level, found = recorder.named("data_report")
    assert (level, found["duplicates"]) == ("info", 1)
    kinds = [name for name, _, data in recorder.events]
    assert kinds.index("data_report") < kinds.index("metrics")
    # The words alone tell the topics apart; a model with random weights knows no words.
    assert report.transfer.helps is False
    assert report.transfer.scratch_accuracy == 1.0
    level, transfer = recorder.named("transfer")
    assert (level, transfer["helps"]) == ("warn", False)
    assert report.verdicts[0].level == "warn"
    # The head that is served is the calibrated one.
    assert manifest.metrics["ece"] == pytest.approx(report.calibration.after.ece)
    assert manifest.metrics["nll"] == pytest.approx(report.calibration.after.nll)
    Head.load(Registry(workshop.store), manifest)


def test_the_page_holds_no_markup_of_the_data(workshop: Workshop) -> None:
    manifest, _ = workshop.run("ftjob-page", training_file="file-train", suffix="page")
    page = workshop.file(manifest, "report.html").decode()
    assert SCRIPT not in page
    assert "<script" not in page
    assert "<img" not in page
    for address in ("http://", "https://", "//cdn", "url("):
        assert address not in page
    assert page.count("<svg") >= 2
    # Nor of the names of images that were left out.
    report = workshop.report(manifest)
    left_out = (RowError(entry=f"cat/{SCRIPT}.png", reason="image is damaged"),)
    data = report.data.model_copy(update={"unreadable": left_out})
    page = render(report.model_copy(update={"data": data}), {}, {}, {}).decode()
    assert "Images that could not be read" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_rows_of_a_validation_file_are_what_is_listed(workshop: Workshop) -> None:
    manifest, _ = workshop.run(
        "ftjob-validated", training_file="file-train", validation_file="file-other", suffix="val"
    )
    report = workshop.report(manifest)
    assert report.evaluated_on == "validation_file"
    assert report.metrics.rows == report.transfer.rows == 60
    texts = [text for text, _ in words(60, seed=1)]
    assert report.worst_errors
    for error in report.worst_errors:
        assert error.text == texts[error.row - 1]
    assert report.data.leaks is not None


def test_the_gate_keeps_a_version_and_does_not_release_it(workshop: Workshop) -> None:
    registry = Registry(workshop.store)
    first, recorder = workshop.run(
        "ftjob-good", training_file="file-train", suffix="gated",
        quality_gate={"min_accuracy": 0.0, "min_improvement_over_current": 0.5},
    )  # fmt: skip
    assert recorder.named("gate_passed")[1]["current"] is None
    with pytest.raises(QualityGateFailed, match=r"gated@2 is kept but not released"):
        workshop.run(
            "ftjob-bad", training_file="file-train", suffix="gated",
            quality_gate={"min_improvement_over_current": 0.01},
        )  # fmt: skip
    release = registry.releases.current(TENANT, "gated")
    assert release is not None
    assert release.aliases == {"production": first.version}
    kept = registry.manifest(TENANT, "gated", 2)
    assert kept.gate is not None
    assert (kept.gate.passed, kept.gate.current, kept.gate.basis) == (False, "gated@1", "recorded")
    assert workshop.report(kept).gate == kept.gate
    # An attempt that finds the version published comes to the same end.
    with pytest.raises(QualityGateFailed):
        workshop.run(
            "ftjob-bad", training_file="file-train", suffix="gated",
            quality_gate={"min_improvement_over_current": 0.01},
        )  # fmt: skip
    # Nobody asked for a release: the gate has its say in the events, and the job succeeds.
    quiet, recorder = workshop.run(
        "ftjob-quiet", training_file="file-train", suffix="gated", promote=False,
        quality_gate={"min_accuracy": 1.0},
    )  # fmt: skip
    assert quiet.version == 3
    assert recorder.named("gate_failed")[0] == "warn"


def test_the_same_job_gives_the_same_head_and_report(workshop: Workshop) -> None:
    """Computed anew or recalled; and what a seed has a part in is recalled for the same only."""
    heads, reports = [], []
    for seed, recalled in (
        (3, {"data report"}), (3, set()), (3, {"data report", "fit", "findings"}),
        (4, {"data report"}),
    ):  # fmt: skip
        if not recalled:
            results = workshop.store.walk(f"{TENANT}/results")
            workshop.store.delete(*[entry.key for entry in results])
        manifest, recorder = workshop.run(
            f"ftjob-same-{len(heads)}", training_file="file-train", seed=seed
        )
        told = {data["what"] for name, _, data in recorder.events if name == "recalled"}
        assert told == recalled
        heads.append(workshop.file(manifest, "head.onnx"))
        report = workshop.report(manifest)
        varying = {"job", "model", "created_at", "seconds", "peak_memory_bytes"}
        reports.append(report.model_dump(exclude=varying))
        assert ("report_baselines" in report.seconds) is ("findings" not in recalled)
    assert heads[0] == heads[1] == heads[2]
    assert reports[0] == reports[1] == reports[2]


def test_copies_do_not_flatter_a_job(workshop: Workshop) -> None:
    """Few texts, each there many times, with labels drawn by lot: known by heart or not at all."""
    numbers = np.random.default_rng(1)
    texts = [" ".join(numbers.choice(WORDS, 5)) for _ in range(60)]
    rows = [(text, str(numbers.integers(2))) for text in texts] * 4
    rows = [(text.upper() if n % 2 else text, label) for n, (text, label) in enumerate(rows)]
    workshop.upload_texts("file-copies", rows)
    manifest, _ = workshop.run("ftjob-copies", training_file="file-copies", suffix="copies")
    assert manifest.metrics["accuracy"] == pytest.approx(0.5, abs=0.1)
    verdicts = [verdict.text for verdict in workshop.report(manifest).verdicts]
    assert any("180 rows (75 %) repeat another, 180 exactly" in text for text in verdicts)
