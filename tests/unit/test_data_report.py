"""The data report: what is planted in a data set is found with its row numbers, no more."""

from __future__ import annotations

import numpy as np
import pytest

from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from tests.builders import MAX_TOKENS, add_text_trunk
from training import duplicates
from training.data_report import RowSet, describe, inspect_data


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    registry = Registry(ArtifactStore(str(tmp_path_factory.mktemp("store"))))
    return Trunk.load(registry, add_text_trunk(registry).digest, threads=1, max_pixels=1)


def rows(count: int, seed: int = 0) -> tuple[RowSet, np.ndarray]:
    """Texts that are all different, features of three well-separated classes."""
    numbers = np.random.default_rng(seed)
    targets = np.arange(count) % 3
    centres = 3 * np.eye(3, 40)
    features = (centres[targets] + 0.3 * numbers.normal(size=(count, 40))).astype(np.float32)
    items = [f"text {seed}-{n}" for n in range(count)]
    return RowSet(items, features, ["abc"[t] for t in targets]), targets


def changed(
    data: RowSet, *, items: dict[int, str] | None = None, labels: dict[int, str] | None = None
) -> RowSet:
    texts, names = [str(item) for item in data.items], list(data.labels)
    for row, text in (items or {}).items():
        texts[row] = text
    for row, label in (labels or {}).items():
        names[row] = label
    return RowSet(texts, data.features, names)


def test_nothing_is_found_in_clean_rows(trunk: Trunk) -> None:
    data, targets = rows(90)
    report = inspect_data(data, targets, None, trunk).report
    assert report.counts == {"a": 30, "b": 30, "c": 30}
    assert report.imbalance == 1
    found = report.summary()
    for name in ("duplicates", "near_duplicates", "conflicting_labels", "outliers", "truncated"):
        assert found[name] == 0, name
    assert report.leaks is None
    assert describe(report) == "90 rows of 3 classes: nothing that stands out."


def test_duplicates_and_labels_that_contradict_each_other(trunk: Trunk) -> None:
    data, targets = rows(90)
    data = changed(data, items={30: "  TEXT  0-3 ", 31: "text 0-4"}, labels={31: "c"})
    report = inspect_data(data, targets, None, trunk).report
    assert (report.duplicates.rows, report.duplicates.conflicting) == (2, 1)
    first, second = report.duplicates.examples
    assert (first.row, first.other, first.label, first.other_label) == (32, 5, "c", "b")
    assert (second.row, second.other) == (31, 4)
    # They count once: as exact ones, not as near ones too.
    assert report.near_duplicates.rows == 0


def test_near_duplicates_and_leaks_are_found_by_features(trunk: Trunk) -> None:
    data, targets = rows(90)
    data.features[60] = data.features[6] * 1.001
    held_out, _ = rows(30, seed=1)
    held_out.features[7] = data.features[9]
    held_out = changed(held_out, items={3: "text 0-0"})
    report = inspect_data(data, targets, held_out, trunk).report
    (pair,) = report.near_duplicates.examples
    assert (pair.row, pair.other) == (61, 7)
    assert pair.similarity > 0.99
    assert report.leaks is not None
    assert (report.leaks.rows, report.leaks.exact) == (2, 1)
    assert {(p.row, p.other) for p in report.leaks.examples} == {(4, 1), (8, 10)}


def test_outliers_and_long_texts(trunk: Trunk) -> None:
    data, targets = rows(90)
    data.features[12] = data.features[1]  # of another class
    long, longest = " ".join(["red"] * MAX_TOKENS), " ".join(["red"] * (MAX_TOKENS + 1))
    data = changed(data, items={5: longest, 8: long})
    report = inspect_data(data, targets, None, trunk).report
    assert report.outliers.examples[0].row == 13
    assert report.outliers.rows <= 2
    assert report.truncated is not None
    assert (report.truncated.rows, report.truncated.examples) == (1, (6,))


def test_blocks_find_what_one_product_would() -> None:
    features = np.random.default_rng(0).normal(size=(2500, 5)).astype(np.float32)
    units = duplicates.unit_rows(features, features.mean(axis=0))
    cosines = np.tril(units @ units.T, -1)
    expected = {int(row) for row in np.flatnonzero(cosines.max(axis=1) >= 0.97)}
    found = duplicates.near_repeats(units, 0.97)
    assert {match.row for match in found} == expected
    assert len(expected) > 100
    assert all(match.other < match.row for match in found)


def test_rows_that_are_all_alike_do_no_harm(trunk: Trunk) -> None:
    data = RowSet(["same"] * 6, np.ones((6, 4), np.float32), ["a", "b"] * 3)
    report = inspect_data(data, np.array([0, 1] * 3), None, trunk).report
    assert report.duplicates.rows == 5
    assert report.outliers.rows == 0


def test_more_rows_than_are_compared(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_COMPARED", 20)
    data, targets = rows(90)
    assert inspect_data(data, targets, None, trunk).report.compared_rows == 20


def test_copies_of_copies_follow_the_first_row(trunk: Trunk) -> None:
    """Exact and near ones; a row that is like a copy but not like the first is its own."""
    data, targets = rows(90)
    data.features[30] = data.features[0] * 1.001
    data.features[60] = data.features[0]
    data.features[61] = data.features[0]  # of another class
    data = changed(data, items={60: "text 0-30", 80: "text 0-7"})
    found = inspect_data(data, targets, None, trunk)
    expected = np.arange(90)
    expected[[30, 60]], expected[80] = 0, 7
    np.testing.assert_array_equal(found.twins, expected)
    angles = np.radians([0, 10, 20])
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    near = duplicates.near_repeats(chain, 0.97)
    assert [(match.row, match.other) for match in near] == [(1, 0), (2, 1)]

    def grouped(classes: list[int], most: int) -> list[int]:
        given = np.arange(3), near, chain, 0.97, np.array(classes), np.full(3, most)
        return duplicates.with_near(*given).tolist()

    assert grouped([0, 0, 0], 2) == [0, 0, 2]
    assert grouped([0, 0, 0], 1) == [0, 1, 2]
    assert grouped([0, 1, 0], 2) == [0, 1, 2]
