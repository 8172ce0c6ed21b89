"""What to do about a backbone that does no better than a model that knows nothing beforehand.

It depends on what the job has tried already: tuning the backbone, and other backbones. Not here:
the comparison (training.baselines, training.yardsticks), when to tune (training.prospect).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.baselines import Transfer
    from training.yardsticks import Standing


@dataclass(frozen=True)
class Tried:
    """What a job did about tuning its backbone, if it was asked to at all.

    `refusal` says why no step was tried; `ships` that one of the `steps` did better than the frozen
    head.
    """

    was_asked: bool = False
    refusal: str | None = None
    steps: int = 0
    ships: bool = False


def advise(found: Transfer | Standing, tuning: Tried, *, compared_backbones: bool) -> str | None:
    """Return what to do, in a sentence; None if the backbone helps, or nobody knows."""
    if found.helps is not False or found.gain is None or found.gain_error is None:
        return None
    how = "does worse than" if found.gain < -found.gain_error else "does no better than"
    told = f"The pretrained model {how} one that was trained from scratch"
    if not found.beats_constant:
        return f"{told}; even a constant answer is as good: check the data, or add rows."
    other = "an `hf:` model of the domain"
    if not compared_backbones:
        other = f"another backbone (`model: auto` compares those that are set up here), {other}"
    what = f"{_of_tuning(tuning)} {other}, or more rows."
    return f"{told}: its features may not fit this data. {what}"


def _of_tuning(tuning: Tried) -> str:
    if tuning.ships:
        return "They are tuned to it already, so what is left to try is"
    if tuning.refusal is not None:
        return f"Tuning was not tried: {tuning.refusal}. Change that, or try"
    if tuning.was_asked:
        return f"Tuning them has been tried, and no step of {tuning.steps} was better. Try"
    return "Tune them (`strategy: auto` does where that can pay), or try"
