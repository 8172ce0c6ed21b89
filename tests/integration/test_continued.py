"""Continuing from a fine-tuned model: all rows so far, new classes, mended labels, lineage."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import DataError
from core.files import FileStore
from core.registry import Registry
from core.store import ArtifactStore
from tests.builders import TENANT
from tests.integration.hf_models import save_text_model
from tests.integration.workshop import Workshop

OLD = [(f"lost card {word}", "card") for word in ("my", "help", "the", "is", "where", "pin")] + [
    (f"transfer money {word}", "transfer") for word in ("my", "help", "the", "is", "where", "pin")
]
NEW = [(f"failed failed {word}", "login") for word in ("my", "help", "the", "is", "where", "pin")]
KNOWN = OLD[:2]
"""A file needs two classes, and two rows of each; rows that were posted before will do."""


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    store = ArtifactStore(str(tmp_path / "store"))
    shop = Workshop(store, str(save_text_model("bert", tmp_path / "model")))
    shop.upload_texts("file-old", OLD)
    shop.run("ftjob-old", training_file="file-old", suffix="intents")
    return shop


def test_new_classes_come_beside_the_old_ones(workshop: Workshop) -> None:
    workshop.upload_texts("file-new", [*NEW, *KNOWN])
    manifest, recorder = workshop.run(
        "ftjob-new", model="intents@1", training_file="file-new", suffix="intents"
    )
    assert (manifest.reference, manifest.parent) == ("intents@2", "intents@1")
    assert manifest.labels == ["card", "login", "transfer"]
    assert manifest.dataset.rows == len(OLD) + len(NEW)
    assert (manifest.dataset.file, manifest.dataset.earlier) == ("file-new", ("file-old",))
    assert manifest.backbone == f"hf:{workshop.model}"
    _, told = recorder.named("continued")
    assert told["new_classes"] == ["login"]
    assert (told["new_rows"], told["rows"], told["replaced_rows"]) == (8, 18, 2)
    lineage = workshop.report(manifest).lineage
    assert (lineage.parent, lineage.training_file) == ("intents@1", "file-new")


def test_it_is_the_model_that_all_rows_in_one_file_give(workshop: Workshop) -> None:
    workshop.upload_texts("file-new", [*NEW, *KNOWN])
    workshop.upload_texts("file-all", [*NEW, *OLD])
    continued, _ = workshop.run("ftjob-a", model="intents@1", training_file="file-new")
    whole, _ = workshop.run("ftjob-b", training_file="file-all")
    for name in ("head.onnx", "golden.safetensors"):
        assert workshop.file(continued, name) == workshop.file(whole, name)


def test_a_continued_model_can_be_continued(workshop: Workshop) -> None:
    workshop.upload_texts("file-2", [*NEW[:3], *KNOWN])
    workshop.upload_texts("file-3", [*NEW[3:], *KNOWN])
    workshop.run("ftjob-2", model="intents@1", training_file="file-2", suffix="intents")
    manifest, _ = workshop.run(
        "ftjob-3", model="intents@2", training_file="file-3", suffix="intents"
    )
    assert manifest.dataset.earlier == ("file-2", "file-old")
    assert manifest.dataset.rows == len(OLD) + len(NEW)


def test_a_row_that_is_posted_again_has_its_new_label(workshop: Workshop) -> None:
    workshop.upload_texts("file-new", [(text, "transfer") for text, _ in KNOWN] + NEW)
    manifest, recorder = workshop.run("ftjob-new", model="intents@1", training_file="file-new")
    _, told = recorder.named("continued")
    assert (told["rows"], told["replaced_rows"]) == (18, 2)
    assert workshop.report(manifest).dataset.counts == {"card": 4, "login": 6, "transfer": 8}


def test_the_same_file_again_is_the_same_data(workshop: Workshop) -> None:
    manifest, _ = workshop.run("ftjob-new", model="intents@1", training_file="file-old")
    assert manifest.dataset.rows == len(OLD)
    assert manifest.dataset.earlier == ()


def test_old_rows_that_are_gone_are_an_error(workshop: Workshop) -> None:
    workshop.upload_texts("file-new", [*NEW, *KNOWN])
    FileStore(workshop.store, TENANT).delete("file-old")
    with pytest.raises(DataError, match="file-old, which intents@1 was fitted on") as caught:
        workshop.run("ftjob-new", model="intents@1", training_file="file-new")
    assert caught.value.param == "model"
    assert Registry(workshop.store).versions(TENANT, "intents") == [1]


def test_a_parent_that_is_gone_is_an_error(workshop: Workshop) -> None:
    Registry(workshop.store).delete(TENANT, "intents")
    with pytest.raises(DataError, match="intents@1 has been deleted"):
        workshop.run("ftjob-new", model="intents@1", training_file="file-old")
