"""What `auto` decides, and what it is judged by, on features that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from core.backbones import candidates
from core.datasets import DatasetManifest, Modality
from core.errors import DataError
from core.preprocessing import FloatArray
from training.backbone_choice import choose_backbone
from training.data import Dataset
from training.fit import IntArray, fit
from training.judgement import Judged, Jury, compare, fit_apart, split
from training.novelty import unseen_quantiles
from training.objectives import Classes, class_likelihoods
from training.prospect import afford, foresee, weigh


def clusters(
    rows: int, spread: float, *, dim: int = 8, seed: int = 0
) -> tuple[FloatArray, IntArray]:
    """Two classes in turn, a unit of `dim` apart."""
    numbers = np.random.default_rng(seed)
    targets = np.arange(rows) % 2
    features = numbers.normal(0, spread, (rows, dim))
    features[:, 0] += targets
    return features.astype(np.float32), targets


@pytest.mark.parametrize(
    ("rows", "spread", "has_slots", "tunes", "why"),
    [
        (200, 0.5, True, True, "room"),
        (200, 0.5, False, False, "no layers"),
        (200, 0.01, True, False, "right on 100.0 %"),
        (40, 0.5, True, False, "40 rows are too few"),
    ],
)
def test_tuning_is_tried_only_where_it_can_pay(
    rows: int, spread: float, has_slots: bool, tunes: bool, why: str
) -> None:
    features, targets = clusters(rows, spread)
    prospect = weigh(fit(features, targets, 2, seed=0), Classes(targets, 2), has_slots=has_slots)
    assert prospect.tune is tunes
    assert why in prospect.reason


def test_tuning_is_not_begun_without_the_time_for_it() -> None:
    features, targets = clusters(200, 0.5)
    prospect = weigh(fit(features, targets, 2, seed=0), Classes(targets, 2), has_slots=True)
    needed = foresee(0.01, 200, views=1, epochs=10, folds=1, share=0.5)
    assert needed == pytest.approx(2 * 0.01 * 200 * 16)
    assert foresee(0.01, 200, views=1, epochs=10, folds=3, share=0.5) < 2 * needed
    assert afford(prospect, needed=needed, left=needed + 1).strategy == "gradual"
    refused = afford(prospect, needed=needed, left=10)
    assert refused.strategy == "feature_extraction"
    assert "64 s, and 10 s are left" in refused.reason


def dataset(rows: int) -> Dataset:
    labels = [str(row % 2) for row in range(rows)]
    counts = {"0": rows // 2, "1": rows // 2}
    manifest = DatasetManifest(modality=Modality.TEXT, rows=rows, counts=counts, sha256="")
    return Dataset("file-1", manifest, [str(row) for row in range(rows)], labels)


def features_of(model: str, data: Dataset) -> FloatArray | None:
    if model == "broken":
        raise DataError("no weights")
    if model == "images":
        return None
    spread = {"quick": 1.0, "good": 0.4, "slow": 0.4}[model]
    return clusters(len(data.items), spread, seed=len(model))[0]


def test_the_best_backbone_is_taken_or_the_quickest_that_is_as_good() -> None:
    models = ["images", "broken", "quick", "good", "slow"]
    choice = choose_backbone(models, features_of, dataset(400), 0)
    assert choice.model in ("good", "slow")
    assert {each.model: each.problem for each in choice.candidates}["broken"] == "no weights"
    assert "images" not in {each.model for each in choice.candidates}
    alike = choose_backbone(["good", "good"], features_of, dataset(400), 0)
    assert alike.model == "good"
    assert choose_backbone(["quick"], features_of, dataset(400), 0).model == "quick"
    with pytest.raises(DataError, match="no weights"):
        choose_backbone(["images", "broken"], features_of, dataset(400), 0)


def test_being_too_sure_is_not_held_against_a_classifier() -> None:
    """The same answers, sharpened: without calibration their likelihood would be far lower."""
    features, targets = clusters(600, 0.5)
    probabilities = fit(features, targets, 2, seed=0).out_of_fold
    sharp = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    likely = class_likelihoods(probabilities, targets)
    gain = compare(class_likelihoods(sharp, targets), likely)
    assert abs(gain.mean) < 0.005
    assert not gain.counts
    chance = np.full_like(probabilities, 0.5)
    assert compare(likely, class_likelihoods(chance, targets)).counts


def test_what_is_safer_is_chosen_unless_another_is_surely_better() -> None:
    _, targets = clusters(297, 0.5)
    jury = Jury(Classes(targets, 2), seed=0)

    def judged(spread: float, draw: int) -> Judged:
        return jury.judge([clusters(297, spread, seed=draw)[0]] * 3)

    safe, alike, better = judged(1.0, 0), judged(1.0, 2), judged(0.2, 0)
    assert jury.choose([safe, alike]) is safe
    assert jury.choose([alike, safe]) is alike
    assert jury.choose([safe, alike, better]) is better
    assert (jury.score(better).accuracy or 0) > (jury.score(safe).accuracy or 1)


def test_a_refit_has_the_strength_that_unseen_rows_prefer() -> None:
    """Of many rows one fold judges, of few all do, each by what was fitted without it."""
    for rows, unseen in ((300, 100), (297, 297)):
        features, targets = clusters(rows, 0.6, dim=64)
        folds = split(targets, 0)
        held_out = np.concatenate([fold.held_out for fold in folds])
        assert (len(held_out), len(set(held_out))) == (unseen, unseen)
        assert all(not set(fold.train) & set(fold.held_out) for fold in folds)
        objective = Classes(targets, 2)
        judged = fit_apart([features] * len(folds), objective, folds)
        paths = [list(objective.path(features[f.train], f.train)) for f in folds]
        others = []
        for fitted in zip(*paths, strict=True):
            predicted = [
                h.predict(features[f.held_out]) for (_, h), f in zip(fitted, folds, strict=True)
            ]
            others.append(class_likelihoods(np.concatenate(predicted), targets[held_out]).mean())
        reached = class_likelihoods(judged.outputs, targets[held_out]).mean()
        assert reached == pytest.approx(max(others))
        assert reached > min(others) + 0.01


def test_unseen_rows_tell_how_far_away_an_ordinary_row_is() -> None:
    """Where the rows that were trained on lie on top of each other, their own distances are 0."""
    features, targets = clusters(200, 0.3)
    seen, unseen = features[:100], features[100:]
    drawn = seen.copy()
    drawn[:, :] = np.array([seen[targets[:100] == each].mean(axis=0) for each in (0, 1)])[
        targets[:100]
    ] + 0.1 * (seen - seen.mean(axis=0))
    ordinary = unseen_quantiles(seen, targets[:100], unseen, 2)
    stretched = unseen_quantiles(drawn, targets[:100], unseen, 2)
    assert stretched[100] > 4 * ordinary[100]


def test_a_backbone_that_cannot_be_tuned_is_the_last_choice_of_a_job_that_tunes() -> None:
    assert candidates(Modality.TEXT, ("a",)) == ["wordllama", "minilm", "hf:a"]
    assert candidates(Modality.TEXT, ("a",), to_tune=True) == ["minilm", "hf:a", "wordllama"]
    images = ["mobilenet-v2", "efficientnet-lite0"]
    assert candidates(Modality.IMAGE, ()) == candidates(Modality.IMAGE, (), to_tune=True) == images
