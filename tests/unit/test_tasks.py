"""The fits and metrics of several labels, classes in order, and values; what jobs may ask."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import cohen_kappa_score, f1_score

from core.datasets import DatasetManifest, Modality, Task, ValueRange
from core.jobs import FineTuneRequest
from core.tasks import activate, decide, find_mismatch, find_refusal, group_count
from training.data import Dataset, group
from training.export import export_head
from training.fit import fit, fit_labels, fit_ordered
from training.multi_label import assess_labels, evaluate_labels
from training.ordinal import evaluate_order
from training.regression import assess_values
from training.ridge import conformal, fit_values
from training.scaling import Scaling

NUMBERS = np.random.default_rng(7)
FEATURES = NUMBERS.normal(size=(600, 12)).astype(np.float32)
DIRECTION = np.linspace(-1, 1, 12)


def some_labels(rows: int = 600) -> np.ndarray:
    logits = FEATURES[:rows, :3] * np.array([3.0, 1.0, 2.0]) + np.array([0.0, -1.5, 1.0])
    drawn = np.random.default_rng(1).random(logits.shape) < expit(logits)
    return drawn.astype(np.float32)


def some_ranks(noise: float = 1.0) -> np.ndarray:
    latent = FEATURES @ DIRECTION + noise * np.random.default_rng(2).logistic(size=600)
    return np.digitize(latent, [-3, -1, 1, 3]).astype(np.int64)


class TestSeveralLabels:
    def test_it_is_a_logistic_regression_for_each(self) -> None:
        targets = some_labels()
        fitted = fit_labels(FEATURES, targets, group(Task.MULTI_LABEL, targets), seed=0)
        scaled = Scaling.of(FEATURES).apply(FEATURES).numpy()
        given = fitted.head.predict(FEATURES)
        for label in range(3):
            peer = LogisticRegression(C=1 / (fitted.strength * len(scaled)), tol=1e-8)
            peer.fit(scaled, targets[:, label])
            np.testing.assert_allclose(given[:, label], peer.predict_proba(scaled)[:, 1], atol=2e-3)

    def test_probabilities_are_calibrated_out_of_fold(self) -> None:
        targets = some_labels()
        fitted = fit_labels(FEATURES, targets, group(Task.MULTI_LABEL, targets), seed=0)
        judged = assess_labels(fitted, targets, ["a", "b", "c"], None)
        assert judged.calibration.after.ece < 0.04
        # The temperature that is reported is in the head.
        ratio = fitted.head.weight / judged.head.weight
        np.testing.assert_allclose(ratio, judged.calibration.temperature, rtol=1e-4)
        assert judged.head.output == "sigmoid"
        best = np.mean((expit(FEATURES[:, :3] * [3, 1, 2] + [0, -1.5, 1]) >= 0.5) == targets)
        assert np.mean((judged.outputs >= 0.5) == targets) > best - 0.02

    def test_metrics_are_those_of_scikit_learn(self) -> None:
        targets = some_labels(200)
        probabilities = NUMBERS.random((200, 3)).astype(np.float32)
        said = probabilities >= 0.5
        found = evaluate_labels(probabilities, targets, ["a", "b", "c"])
        assert found.micro_f1 == pytest.approx(f1_score(targets, said, average="micro"))
        assert found.macro_f1 == pytest.approx(f1_score(targets, said, average="macro"))
        assert found.accuracy == pytest.approx((said == (targets > 0.5)).all(axis=1).mean())
        low, high = found.micro_f1_interval
        assert low < found.micro_f1 < high

    def test_folds_share_out_the_rarest_label(self) -> None:
        targets = np.zeros((40, 3), np.float32)
        targets[:30, 0] = targets[:5, 1] = targets[3:13, 2] = 1
        groups = group(Task.MULTI_LABEL, targets)
        assert groups[:5].tolist() == [1] * 5
        assert set(groups[5:13]) == {2}
        assert set(groups[30:]) == {3}
        fitted = fit_labels(FEATURES[:40], targets, groups, seed=0)
        assert sorted(fitted.fold_of[:5]) == [0, 1, 2, 3, 4]


class TestValues:
    def test_a_line_is_found(self) -> None:
        values = 1e5 + 300 * (FEATURES @ DIRECTION)
        fitted = fit_values(FEATURES, values, group(Task.REGRESSION, values), seed=0)
        np.testing.assert_allclose(fitted.head.weight[:, 0], 300 * DIRECTION, atol=0.2)
        judged = assess_values(fitted, values, None)
        assert judged.metrics.r2 > 0.9999
        export_head(judged.head, FEATURES[:8])

    @pytest.mark.parametrize("rows", [9 + 1, 300])
    def test_it_is_the_ridge_of_scikit_learn(self, rows: int) -> None:
        features = FEATURES[:rows]
        values = features @ DIRECTION + np.random.default_rng(3).normal(size=rows)
        fitted = fit_values(features, values, group(Task.REGRESSION, values), seed=0)
        scaled = Scaling.of(features).apply(features).numpy()
        peer = Ridge(alpha=fitted.strength * rows).fit(scaled, values)
        np.testing.assert_allclose(
            fitted.head.predict(features)[:, 0], peer.predict(scaled), atol=1e-4
        )

    def test_noise_has_a_strong_penalty_and_explains_nothing(self) -> None:
        values = np.random.default_rng(4).normal(size=600)
        fitted = fit_values(FEATURES, values, group(Task.REGRESSION, values), seed=0)
        assert fitted.strength >= 1
        assert abs(assess_values(fitted, values, None).metrics.r2) < 0.05

    def test_the_interval_holds_nine_in_ten_new_rows(self) -> None:
        numbers = np.random.default_rng(5)
        held = []
        for _ in range(20):
            features = numbers.normal(size=(400, 12)).astype(np.float32)
            values = features @ DIRECTION + numbers.standard_t(3, 400)
            known, new = slice(0, 100), slice(100, 400)
            groups = group(Task.REGRESSION, values[known])
            judged = assess_values(
                fit_values(features[known], values[known], groups, seed=0), values[known], None
            )
            errors = judged.head.predict(features[new])[:, 0] - values[new]
            held.append(np.mean(np.abs(errors) <= judged.interval.half_width))
            assert judged.metrics.covered == pytest.approx(0.9, abs=0.1)
        assert np.mean(held) == pytest.approx(0.9, abs=0.02)

    def test_the_quantile_counts_the_row_to_come(self) -> None:
        assert conformal(np.arange(1.0, 10.0)).half_width == 9
        assert conformal(np.arange(1.0, 20.0)).half_width == 18


class TestOrder:
    def test_a_latent_line_is_found_and_errors_are_near(self) -> None:
        ranks = some_ranks()
        train, test = slice(0, 150), slice(150, 600)
        ordered = fit_ordered(FEATURES[train], ranks[train], 5, seed=0)
        plain = fit(FEATURES[train], ranks[train], 5, seed=0)
        # One direction for all classes, which is the one that the ranks were made with.
        directions = np.diff(ordered.head.weight, axis=1)
        np.testing.assert_allclose(directions, directions[:, :1] * np.ones(4), rtol=1e-3)
        cosine = directions[:, 0] @ DIRECTION
        cosine /= np.linalg.norm(directions[:, 0]) * np.linalg.norm(DIRECTION)
        assert cosine > 0.97
        errors = [
            evaluate_order(each.head.predict(FEATURES[test]), ranks[test])
            for each in (ordered, plain)
        ]
        assert errors[0].mae < errors[1].mae
        assert errors[0].quadratic_kappa > errors[1].quadratic_kappa

    def test_metrics_are_those_of_scikit_learn(self) -> None:
        ranks = some_ranks()
        probabilities = fit_ordered(FEATURES, ranks, 5, seed=0).out_of_fold
        said = probabilities.argmax(axis=1)
        found = evaluate_order(probabilities, ranks)
        expected = cohen_kappa_score(ranks, said, weights="quadratic")
        assert found.quadratic_kappa == pytest.approx(expected)
        assert found.mae == pytest.approx(np.abs(said - ranks).mean())
        assert found.baseline_mae > found.mae
        assert sum(map(sum, found.confusion)) == 600


def test_what_heads_give() -> None:
    logits = np.array([[-200, 0.0, 200]], np.float32)
    np.testing.assert_allclose(activate("sigmoid", logits.copy()), [[0, 0.5, 1]])
    assert activate("softmax", logits.copy()).sum() == pytest.approx(1)
    assert activate("identity", logits.copy()).tolist() == logits.tolist()
    outputs = np.array([[0.5, 0.49, 0.9], [0, 0, 0.1]], np.float32)
    assert decide(Task.MULTI_LABEL, outputs, "abc") == [frozenset("ac"), frozenset()]
    assert decide(Task.ORDINAL, outputs, "abc") == ["c", "c"]
    assert decide(Task.REGRESSION, outputs, []) == [0.5, 0.0]


def test_every_group_is_one_that_there_can_be() -> None:
    values = np.repeat([1.0, 2.0], [50, 3])
    for task, targets, labels in (
        (Task.MULTI_LABEL, some_labels(), 3), (Task.REGRESSION, values, 0),
        (Task.ORDINAL, some_ranks(), 5),
    ):  # fmt: skip
        assert set(group(task, targets)) <= set(range(group_count(task, labels)))


def data(task: Task = Task.SINGLE_LABEL, *labels: str) -> DatasetManifest:
    values = ValueRange(low=0, high=1, mean=0.5, deviation=0.3)
    return DatasetManifest(
        modality=Modality.TEXT, task=task, rows=20, counts=dict.fromkeys(labels, 10), sha256="0",
        values=values if task is Task.REGRESSION else None,
    )  # fmt: skip


def test_what_a_job_may_not_ask_of_its_data() -> None:
    def param(manifest: DatasetManifest | None, **fields: object) -> str | None:
        request = FineTuneRequest(model="minilm", training_file="file-1", **fields)  # type: ignore[arg-type]
        refusal = find_refusal(request, manifest)
        return refusal.param if refusal else None

    single, several = data(Task.SINGLE_LABEL, *"abc"), data(Task.MULTI_LABEL, *"abc")
    values, gate = data(Task.REGRESSION), {"min_accuracy": 0.5}
    order = ("b", "a", "c")
    assert param(single, order=order) is None
    assert param(single, strategy="gradual") is None
    assert param(single, order=("b", "a", "d")) == "order"
    assert param(single, order=(*order, "d")) == "order"
    assert param(several, order=order) == "order"
    for strategy in ("gradual", "full", "auto"):
        assert {param(each, strategy=strategy) for each in (single, several, values)} == {None}
        assert param(single, order=order, strategy=strategy) is None
    assert param(several, strategy="auto", quality_gate=gate) is None
    assert param(single, strategy="full", precision="auto") is None
    assert param(single, strategy="gradual", precision="int8") is None
    assert param(values, quality_gate=gate) == "quality_gate"
    # What no data would allow is known before it is parsed.
    assert param(None, order=order, strategy="gradual", quality_gate=gate) is None
    assert param(None, strategy="full", precision="int8") == "precision"
    for bad in (("a", "b"), ("a", "b", "a"), ("a", "b", " ")):
        with pytest.raises(ValidationError, match="order"):
            param(single, order=bad)
    assert find_mismatch(single, several) is not None
    assert find_mismatch(single, data(Task.SINGLE_LABEL, "a", "z")) is not None
    assert find_mismatch(several, data(Task.MULTI_LABEL, "a")) is None


def test_rows_are_read_as_numbers() -> None:
    several = Dataset("f", data(Task.MULTI_LABEL, *"ab"), ["x", "y"], [frozenset("b"), frozenset()])
    assert several.targets(["a", "b"], param="").tolist() == [[0, 1], [0, 0]]
    assert several.shown == ["b", "no label"]
