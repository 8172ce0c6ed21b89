"""`full` inside a job: every parameter of the backbone tuned, and a trunk of the model's own.

Judged like `gradual`, of which it is one rung, the last: unless it beats the frozen head by more
than one standard error on held-out rows, the frozen head ships on the trunk that all share. What
ships is an ordinary head on features of an ordinary trunk, exported and checked as every trunk is,
but without slots for deltas, and stored with its version: it is of use to nobody else.

Not here: the search (training.gradual), what is trained (training.whole).
"""

from __future__ import annotations

import math
import time

from core.datasets import Modality
from core.preprocessing import FloatArray
from core.registry import own_trunk_files
from core.trunk import Trunk
from training import decisions
from training.backbones import TorchBackbone
from training.data import Dataset
from training.features import extract
from training.judgement import split
from training.objectives import Objective
from training.plan import Defaults
from training.prospect import foresee
from training.rungs import Source
from training.search import Setting, Tuned, search, tuned
from training.search_state import Ending, Ladder
from training.strategies import row_seconds
from training.strength import STRENGTHS
from training.trunks import export
from training.tuning import Regularisation
from training.whole import ItemRows, WholePart, block_count, largest_state_bytes

STATE_SECONDS = 60.0
"""Between two states, each of four times the backbone's size: 360 MB for MiniLM."""

MAX_STATE_BYTES = 1 << 30
"""A training with a larger state keeps none, and begins anew in the next attempt."""

DEFAULTS = {
    Modality.TEXT: Defaults(
        rank=0,
        learning_rate=2e-3,
        start_strength=STRENGTHS[6],
        steps=160,
        regularisation=Regularisation(label_smoothing=0.1),
        contrast=0.0,
    ),
    Modality.IMAGE: Defaults(
        rank=0,
        learning_rate=2e-3,
        start_strength=STRENGTHS[4],
        steps=80,
        regularisation=Regularisation(label_smoothing=0.1, mixup=0.2),
        contrast=0.0,
    ),
}


def tune_whole(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, objective: Objective,
    features: FloatArray,
) -> tuple[Tuned | None, Ladder]:  # fmt: skip
    """Tune everything; None if the head on frozen `features` ships, with what was tried.

    Raises `Stopped`, with the training's state saved, when the job is to stop.
    """
    request, reporter = setting.request, setting.reporter
    if setting.checkpoints.latest_state() is None:
        needed = _shortest_seconds(setting, trunk, backbone, data, objective)
        left = setting.deadline - time.monotonic()
        if needed > left:
            why = (
                f"one epoch for each training would take about {needed:.0f} s, and "
                f"{max(left, 0):.0f} s are left"
            )
            ladder = Ladder(ending=Ending(reason="time", why=why))
            reporter.event(
                "frozen_head_kept", f"{ladder.why_frozen}; the frozen head ships.",
                seconds_needed=round(needed, 1), seconds_left=round(left, 1), steps=[],
            )  # fmt: skip
            return None, ladder
    plan = DEFAULTS[backbone.modality].plan(
        objective.groups, request.chosen_hyperparameters, request.early_stopping
    )
    setting.decisions.tell(decisions.training(plan, request, len(objective.groups)))
    rows = ItemRows.of(trunk.preprocessor, data.items, objective.targets)
    fits = largest_state_bytes(backbone) <= MAX_STATE_BYTES
    source = Source(
        block_count(backbone), objective, features,
        lambda _: WholePart(backbone), lambda _: rows,
        state_seconds=STATE_SECONDS if fits else math.inf, is_whole=True,
        twins=setting.twins,
    )  # fmt: skip
    outcome = search(setting, source, plan)
    if outcome.part is None:
        reporter.event(
            "frozen_head_kept",
            f"{outcome.ladder.why_frozen}; the frozen head ships.",
            steps=[step.model_dump(mode="json") for step in outcome.ladder.steps],
        )
        return None, outcome.ladder
    manifest, files = export(outcome.part.backbone(), takes_deltas=False)
    own = Trunk(manifest, files["trunk.onnx"], trunk.preprocessor, threads=1)
    served = extract(
        own, data.items, threads=setting.threads, on_progress=lambda *_: reporter.check()
    )
    reporter.event(
        "backbone_tuned",
        f"The tuned backbone ships, as a trunk of the model's own of {own.bytes >> 20} MiB.",
        **outcome.best.model_dump(mode="json"), trunk=manifest.digest,
    )  # fmt: skip
    found = tuned(outcome, served, objective, own, own_files=own_trunk_files(manifest, files))
    return found, outcome.ladder


def _shortest_seconds(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, objective: Objective
) -> float:
    """Return what one epoch of every training will take."""
    return foresee(
        row_seconds(backbone, trunk, data), len(data.items),
        views=0, epochs=1, folds=len(split(objective.groups, setting.request.seed)), share=1.0,
    )  # fmt: skip
