"""What a search tries next, and what it trains with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from core.datasets import Modality
from core.jobs import EarlyStopping, Hyperparameters
from training.plan import DEFAULTS, Rung, ladder, next_rung
from training.search_state import Ending, Step
from training.tuning import CONTRAST_TEMPERATURE, contrastive_loss

FROZEN = (0, 0.0, True)


def step(blocks: int, contrast: float, kept: bool) -> Step:
    return Step(
        blocks=blocks, contrast=contrast, share=1, kept=kept, epochs=1, learning_rate=0, strength=0,
        accuracy=0, nll=0, gain=0, gain_error=0, seconds=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "contrast", "expected"),
    [
        ([], 1.0, Rung(2)),
        ([(2, 0.0, True)], 1.0, Rung(2, 1.0)),
        ([(2, 0.0, False)], 1.0, Rung(2, 1.0)),
        ([(2, 0.0, True), (2, 1.0, True)], 1.0, Rung(6, 1.0)),
        ([(2, 0.0, True), (2, 1.0, False)], 1.0, Rung(6)),
        ([(2, 0.0, False), (2, 1.0, False)], 1.0, "misses"),
        ([(2, 0.0, True), (2, 1.0, True), (6, 1.0, True)], 1.0, "top"),
        ([(2, 0.0, False)], 0.0, Rung(6)),
        ([(2, 0.0, True), (6, 0.0, False)], 0.0, "top"),
    ],
)
def test_a_search_goes_deeper_with_what_was_better(
    steps: list[tuple[int, float, bool]], contrast: float, expected: Rung | str
) -> None:
    tried = [step(*each) for each in [FROZEN, *steps]]
    found = next_rung(tried, [2, 6], contrast)
    assert (found.reason if isinstance(found, Ending) else found) == expected


def test_a_ladder_ends_after_two_depths_that_do_not_help() -> None:
    tried = [step(*each) for each in [FROZEN, (3, 0.0, False), (9, 0.0, False)]]
    assert ladder(12) == [3, 9, 12]
    ending = next_rung(tried, ladder(12), 0.0)
    assert isinstance(ending, Ending)
    assert ending.reason == "misses"


@pytest.mark.parametrize(
    ("rows", "classes", "chosen", "expected"),
    [
        (770, 77, {}, {"epochs": 6, "batch_size": 32, "contrast": 1.0}),
        (40, 4, {}, {"epochs": 30, "batch_size": 16, "contrast": 1.0}),
        (5000, 2, {}, {"epochs": 3, "batch_size": 32, "contrast": 0.0}),
        (
            40, 4, {"n_epochs": 2, "batch_size": 5, "learning_rate_multiplier": 2},
            {"epochs": 2, "batch_size": 5, "learning_rate": 6e-3},
        ),
    ],
)  # fmt: skip
def test_a_plan_suits_the_rows_unless_the_job_says_otherwise(
    rows: int, classes: int, chosen: dict[str, Any], expected: dict[str, float]
) -> None:
    plan = DEFAULTS[Modality.TEXT].plan(
        np.arange(rows) % classes, Hyperparameters(**chosen), EarlyStopping(patience=4)
    )
    assert {name: getattr(plan, name) for name in expected} == expected
    assert plan.patience == 4


def test_the_contrastive_loss_is_that_of_the_paper() -> None:
    """Khosla et al. 2020, equation 2, row by row; a row without a mate adds nothing."""
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 0, 0, 1, 1, 2, 1])
    unit = functional.normalize(features, dim=1)
    expected = 0.0
    for row in range(7):
        others = [other for other in range(7) if other != row]
        mates = [other for other in others if targets[other] == targets[row]]
        weights = {o: float(torch.exp(unit[row] @ unit[o] / CONTRAST_TEMPERATURE)) for o in others}
        for mate in mates:
            expected -= float(np.log(weights[mate] / sum(weights.values()))) / len(mates)
    assert float(contrastive_loss(features, targets)) == pytest.approx(expected / 7, rel=1e-4)
