"""A job decides once what it publishes; a withdrawal keeps those before it from deciding."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.datasets import Modality
from core.errors import AlreadyExists
from core.manifests import DatasetReference, ModelManifest
from core.publications import Publications
from core.store import ArtifactStore

JOB = "ftjob-1"


def version(attempt: int) -> ModelManifest:
    return ModelManifest(
        tenant="default", name="pets", version=attempt, job=JOB, attempt=attempt, created_at=0,
        backbone="minilm", trunk="0" * 64, modality=Modality.TEXT, dim=4, labels=["a", "b"],
        files={}, dataset=DatasetReference(file="file-1", sha256="", rows=2), training={},
        metrics={},
    )  # fmt: skip


@pytest.fixture
def publications(tmp_path: Path) -> Publications:
    return Publications(ArtifactStore(str(tmp_path)), "default", JOB)


def test_the_first_decision_is_the_only_one(publications: Publications) -> None:
    assert publications.decision() is None
    assert publications.decide(version(1)) == version(1)
    assert publications.decide(version(2)) == version(1)
    assert publications.withdraw(3) == version(1)
    assert publications.decision() == version(1)


def test_who_withdraws_keeps_earlier_attempts_from_deciding(publications: Publications) -> None:
    assert publications.withdraw(2) is None
    with pytest.raises(AlreadyExists):
        publications.decide(version(1))
    assert publications.decision() is None
    assert publications.withdraw(2) is None
    assert publications.decide(version(2)) == version(2)
    with pytest.raises(AlreadyExists):
        publications.decide(version(1))


def test_of_several_withdrawals_the_last_counts(publications: Publications) -> None:
    for attempt in (2, 3):
        assert publications.withdraw(attempt) is None
    with pytest.raises(AlreadyExists):
        publications.decide(version(2))
    assert publications.withdraw(2) is None
    assert publications.decide(version(3)) == version(3)
    assert publications.withdraw(2) == version(3)


def test_deciding_and_withdrawing_at_once_agree(tmp_path: Path) -> None:
    """Either the version was decided on and the next attempt knows, or it never will be."""
    start = threading.Barrier(2)
    outcomes = set()
    with ThreadPoolExecutor(2) as pool:
        for number in range(100):
            publications = Publications(ArtifactStore(str(tmp_path)), "default", f"job-{number}")

            def decide(publications: Publications = publications) -> ModelManifest | None:
                start.wait(10)
                try:
                    return publications.decide(version(1))
                except AlreadyExists:
                    return None

            def withdraw(publications: Publications = publications) -> ModelManifest | None:
                start.wait(10)
                return publications.withdraw(2)

            decided, known = (pool.submit(decide), pool.submit(withdraw))
            assert decided.result(10) == known.result(10) == publications.decision()
            outcomes.add(decided.result() is None)
    assert outcomes
