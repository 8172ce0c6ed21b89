"""Baselines: the same rows as the model, judged row by row, and said when transfer hurts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from core.datasets import Modality
from training import baselines
from training.advice import Tried, advise
from training.baselines import Transfer, compare
from training.fit import deal
from training.scratch import predict_pixels, predict_words, read_pixels
from training.yardsticks import compare_labels, compare_values

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
WORDS = ["refund", "parcel", "password"]


def texts(rows: int) -> tuple[list[str], np.ndarray]:
    numbers = np.random.default_rng(0)
    targets = np.arange(rows) % 3
    fill = ["please", "help", "with", "my", "the", "again"]
    return [f"{WORDS[t]} {' '.join(numbers.choice(fill, 4))}" for t in targets], targets


def images(rows: int) -> tuple[list[bytes], np.ndarray]:
    numbers = np.random.default_rng(0)
    targets, found = np.arange(rows) % 3, []
    for target in targets:
        noise = numbers.integers(-30, 30, (40, 40, 3))
        pixels = np.clip(np.array(COLOURS[target]) + noise, 0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        found.append(data.getvalue())
    return found, targets


def test_a_model_that_knows_less_than_the_words_is_told_apart() -> None:
    items, targets = texts(90)
    fold_of = deal(targets, 5, 0)
    guesses = np.arange(90) % 2 == 0
    found = compare(Modality.TEXT, items, targets, 3, guesses, train=None, fold_of=fold_of, seed=0)
    assert found.rows == 90
    assert found.scratch_accuracy == 1.0
    assert found.helps is False
    assert found.gain == pytest.approx(-0.5)
    # By hand: half of the differences are -1, half are 0.
    assert found.gain_error == pytest.approx(0.5 / np.sqrt(90))
    assert "does worse" in (advise(found, Tried(), compared_backbones=False) or "")


def test_as_good_as_from_scratch_is_no_help_and_better_is() -> None:
    items, targets = texts(90)
    fold_of = deal(targets, 5, 0)
    right = np.ones(90, np.bool_)
    same = compare(Modality.TEXT, items, targets, 3, right, train=None, fold_of=fold_of, seed=0)
    assert same.helps is False
    assert "no better" in (advise(same, Tried(), compared_backbones=False) or "")
    dull = ["the same words for all"] * 90
    better = compare(Modality.TEXT, dull, targets, 3, right, train=None, fold_of=fold_of, seed=0)
    assert better.helps is True
    assert advise(better, Tried(), compared_backbones=False) is None
    assert better.scratch_accuracy == pytest.approx(1 / 3, abs=0.01)


def test_with_a_validation_file_its_rows_alone_are_judged() -> None:
    items, targets = texts(60)
    correct = np.concatenate([np.zeros(40, np.bool_), np.ones(20, np.bool_)])
    found = compare(
        Modality.TEXT, items, targets, 3, correct,
        train=np.arange(40), fold_of=deal(targets[:40], 5, 0), seed=0,
    )  # fmt: skip
    assert (found.rows, found.model_accuracy) == (20, 1.0)


def test_a_network_learns_colours_and_is_the_same_again() -> None:
    items, targets = images(60)
    pixels = read_pixels(items)
    train, held_out = np.arange(45), np.arange(45, 60)
    first = predict_pixels(pixels, targets, 3, train, held_out, 0)
    assert (first == targets[held_out]).mean() > 0.8
    np.testing.assert_array_equal(first, predict_pixels(pixels, targets, 3, train, held_out, 0))


@pytest.mark.parametrize("odd", [["!!!"] * 6, [""] * 6])
def test_texts_without_words_give_the_commonest_class(odd: list[str]) -> None:
    targets = np.array([1, 1, 1, 0, 0, 1])
    assert predict_words(odd, targets, np.arange(5), np.array([5])).tolist() == [1]


def test_a_class_alone_in_a_fold_is_the_answer() -> None:
    targets = np.array([1, 1, 0])
    assert predict_words(["a few", "more words", "x"], targets, np.arange(2), np.array([2])) == [1]


def test_too_much_work_is_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_TEXTS", 10)
    items, targets = texts(12)
    found = compare(
        Modality.TEXT, items, targets, 3, np.ones(12, np.bool_),
        train=None, fold_of=deal(targets, 3, 0), seed=0,
    )  # fmt: skip
    assert found.helps is None
    assert found.skipped == "not fitted on more than 10 rows"
    assert found.majority_accuracy > 0


def test_images_of_several_labels_and_of_values_have_a_network_from_scratch() -> None:
    items, colours = images(48)
    fold_of = deal(colours, 3, 0)
    truth = np.stack([colours != 0, colours == 1], axis=1)
    nothing = np.zeros_like(truth)
    labels = compare_labels(
        Modality.IMAGE, items, truth.astype(np.float32), nothing,
        train=None, fold_of=fold_of, seed=0,
    )  # fmt: skip
    assert (labels.rows, labels.helps) == (16, False)
    assert labels.scratch_score is not None
    assert labels.scratch_score > 0.8 > 0.5 > labels.model
    values = 1000 + 50.0 * colours
    standing = compare_values(
        Modality.IMAGE, items, values, np.full(48, 1050.0), train=None, fold_of=fold_of, seed=0
    )
    assert (standing.helps, standing.beats_constant) == (False, False)
    assert standing.scratch_score is not None
    assert standing.scratch_score < 0.5 * standing.constant
    assert "convolutional" in standing.scratch


@pytest.mark.parametrize(
    ("tuning", "compared", "said", "not_said"),
    [
        (Tried(), False, ["strategy: auto", "model: auto"], []),
        (Tried(), True, ["strategy: auto", "hf:"], ["model: auto"]),
        (Tried(was_asked=True, steps=2, ships=True), False, ["tuned to it already"], ["strategy"]),
        (Tried(was_asked=True, steps=2), False, ["no step of 2 was better"], ["strategy"]),
        (Tried(was_asked=True, refusal="9 s are left"), False, ["not tried: 9 s"], ["strategy"]),
    ],
)
def test_what_is_advised_is_what_was_not_tried(
    tuning: Tried, compared: bool, said: list[str], not_said: list[str]
) -> None:
    found = Transfer(
        helps=False, rows=90, model_accuracy=0.6, majority_accuracy=0.3, scratch="words",
        scratch_accuracy=0.7, gain=-0.1, gain_error=0.02,
    )  # fmt: skip
    advice = advise(found, tuning, compared_backbones=compared)
    assert advice is not None
    assert all(words in advice for words in said)
    assert not any(words in advice for words in not_said)
    # Where nothing is known, nothing is advised but to look at the data.
    dull = found.model_copy(update={"majority_accuracy": 0.6})
    assert "check the data" in (advise(dull, tuning, compared_backbones=compared) or "")
