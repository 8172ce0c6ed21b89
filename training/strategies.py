"""`gradual` inside a job: its data and time, and what ships.

    feature_extraction    fit a head on frozen features; nothing of this module
    gradual               besides, low-rank deltas on the top blocks, for as long as they help
    full                  every parameter, if that is better than none (training.full)
    auto                  `gradual`, if that can pay (training.prospect)

What comes out is judged and made as all heads are: features from the trunk that serves, with the
deltas, and the convex fit on them. Not here: the search itself (training.gradual), its events and
states (training.search).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from core.adapters import Adapter, feed
from core.jobs import FineTuneRequest
from core.preprocessing import FloatArray
from core.trunk import Trunk
from training import parity, views
from training.backbones import TorchBackbone
from training.data import Dataset
from training.export import export_adapted
from training.features import extract
from training.fit import Fit, Head
from training.judgement import split
from training.objectives import Objective
from training.plan import DEFAULTS, Plan
from training.prospect import Prospect, afford, foresee, weigh
from training.rungs import Source
from training.search import Setting, Tuned, search, tuned
from training.search_state import Step
from training.tuning import CachedRows, DeltaPart

TIMED_ROWS = 16


def unfreeze(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, objective: Objective,
    features: FloatArray,
) -> tuple[Tuned | None, tuple[Step, ...]]:  # fmt: skip
    """Search for deltas that beat the head on frozen `features`; None if there are none.

    The steps are all that were tried. Raises `Stopped`, with the search's state saved, when the
    job is to stop.
    """
    request, reporter = setting.request, setting.reporter
    slots = trunk.manifest.slots
    plan = _plan(request, backbone, objective)

    def deltas(blocks: int) -> DeltaPart:
        return DeltaPart(
            backbone, slots, trunk.manifest.blocks - blocks, plan.rank,
            layer_decay=plan.layer_decay, seed=request.seed,
        )  # fmt: skip

    def activations(blocks: int) -> CachedRows | None:
        return views.cache(
            backbone, trunk.preprocessor, data.items, objective.targets,
            trunk.manifest.blocks - blocks, seed=request.seed, check=reporter.check,
        )  # fmt: skip

    def serve(adapter: Adapter) -> FloatArray:
        return extract(
            trunk,
            data.items,
            threads=setting.threads,
            on_progress=lambda *_: reporter.check(),
            deltas=feed(adapter, slots),
        )

    def checkpoint(part: DeltaPart, head: Head) -> tuple[Adapter, dict[str, bytes]]:
        adapter = part.adapter()
        return adapter, export_adapted(head, adapter, trunk, backbone)

    exact = trunk.manifest.precision == "fp32"
    source = Source(
        trunk.manifest.blocks, objective, features, deltas, activations,
        serve=None if exact else lambda part: serve(part.adapter()),
    )  # fmt: skip
    outcome = search(setting, source, plan, checkpoint)
    if outcome.part is None:
        reporter.event(
            "frozen_head_kept",
            "No step beat the frozen head by more than one standard error; the frozen head ships.",
            steps=[step.model_dump(mode="json") for step in outcome.steps],
        )
        return None, outcome.steps
    adapter = outcome.part.adapter()
    adapted = serve(adapter)
    reporter.event(
        "deltas_kept",
        f"Deltas of rank {adapter.rank} on the top {outcome.best.blocks} blocks ship.",
        **outcome.best.model_dump(mode="json"),
    )
    return tuned(outcome, adapted, objective, trunk, adapter), outcome.steps


def decide(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, fitted: Fit,
    objective: Objective,
) -> Prospect:  # fmt: skip
    """Return whether `auto` is to tune the backbone, and say so."""
    prospect = weigh(fitted, objective, has_slots=bool(trunk.manifest.slots))
    # Whoever began this search had the time for it; a run that goes on must not decide otherwise.
    if prospect.tune and setting.checkpoints.latest_state() is None:
        plan, blocks = _plan(setting.request, backbone, objective), trunk.manifest.blocks
        needed = foresee(
            row_seconds(backbone, trunk, data),
            len(objective.groups),
            views=views.view_count(backbone.modality),
            epochs=plan.epochs,
            folds=len(split(objective.groups, setting.request.seed)),
            share=plan.ladder(blocks)[0] / blocks,
        )
        prospect = afford(prospect, needed=needed, left=setting.deadline - time.monotonic())
    setting.reporter.event(
        "strategy_chosen",
        f"Strategy {prospect.strategy}: {prospect.reason}.",
        strategy=prospect.strategy,
        **prospect.model_dump(mode="json"),
    )
    return prospect


def row_seconds(backbone: TorchBackbone, trunk: Trunk, data: Dataset) -> float:
    """Return how long one row takes through the whole backbone in torch."""
    rows = np.random.default_rng(0).permutation(len(data.items))[:TIMED_ROWS]
    items: Any = [data.items[row] for row in rows]
    prepared = [trunk.preprocessor.prepare(item) for item in items]
    inputs = parity.torch_inputs(backbone, prepared)
    with torch.no_grad():
        backbone.module(*inputs)
        began = time.perf_counter()
        backbone.module(*inputs)
    return (time.perf_counter() - began) / len(rows)


def _plan(request: FineTuneRequest, backbone: TorchBackbone, objective: Objective) -> Plan:
    defaults = DEFAULTS[backbone.modality]
    plan = defaults.plan(objective.groups, request.chosen_hyperparameters, request.early_stopping)
    # Rows of several labels, or of values, are nobody's mates.
    return plan if objective.has_classes else replace(plan, contrast=0.0)
