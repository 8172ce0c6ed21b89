"""Estimates against what jobs of these sizes were measured to take (service.estimate)."""

from __future__ import annotations

import pytest

from core.datasets import DatasetManifest, Modality
from service.estimate import Estimate, estimate

TEXT, IMAGE = Modality.TEXT, Modality.IMAGE


def estimated(
    modality: Modality, rows: int, classes: int, dim: int, bytes_per_row: int, held_out: int = 0
) -> Estimate:
    def data(number: int) -> DatasetManifest:
        counts = {f"c{n}": number // classes for n in range(classes)}
        return DatasetManifest(modality=modality, rows=number, counts=counts, sha256="0")

    other = data(held_out) if held_out else None
    return estimate(data(rows), other, dim, (rows + held_out) * bytes_per_row)


@pytest.mark.parametrize(
    ("modality", "rows", "bytes_per_row", "seconds"),
    [
        (TEXT, 300, 69, 0.37),
        (TEXT, 300, 286, 1.42),
        (TEXT, 100, 1187, 2.03),
        (IMAGE, 100, 90_000, 0.73),
    ],
)
def test_features_take_what_was_measured_within_a_half(
    modality: Modality, rows: int, bytes_per_row: int, seconds: float
):
    found = estimated(modality, rows, 2, 384, bytes_per_row).features_seconds
    assert 0.67 < found / seconds < 1.5


@pytest.mark.parametrize(
    ("rows", "classes", "dim", "seconds"),
    [(320, 2, 384, 1.35), (3000, 10, 384, 0.72), (5000, 10, 1280, 2.03)],
)
def test_the_fit_takes_what_was_measured_within_a_factor_of_two(
    rows: int, classes: int, dim: int, seconds: float
):
    found = estimated(TEXT, rows, classes, dim, 60).fit_seconds
    assert 0.5 < found / seconds < 2


@pytest.mark.parametrize(
    ("modality", "rows", "dim", "bytes_per_row", "memory"),
    [(TEXT, 500, 384, 60, 547e6), (IMAGE, 60, 1280, 150_000, 486e6)],
)
def test_memory_is_what_was_measured_within_a_fifth(
    modality: Modality, rows: int, dim: int, bytes_per_row: int, memory: float
):
    found = estimated(modality, rows, 2, dim, bytes_per_row).memory_bytes
    assert 0.8 < found / memory < 1.25


def test_a_validation_file_is_computed_but_not_fitted():
    alone = estimated(TEXT, 1000, 2, 384, 60)
    both = estimated(TEXT, 1000, 2, 384, 60, held_out=1000)
    assert both.features_seconds > 1.5 * alone.features_seconds
    assert both.fit_seconds == alone.fit_seconds


def test_long_texts_are_cut():
    assert estimated(TEXT, 10, 2, 384, 2000).seconds == estimated(TEXT, 10, 2, 384, 20_000).seconds
