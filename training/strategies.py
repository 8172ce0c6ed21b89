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
from core.errors import NoSpace
from core.jobs import FineTuneRequest
from core.preprocessing import FloatArray
from core.trunk import Trunk
from training import decisions, parity, views
from training.backbones import TorchBackbone
from training.data import Dataset
from training.export import export_adapted
from training.features import extract
from training.fit import Fit, Head
from training.judgement import split
from training.objectives import Objective
from training.plan import DEFAULTS, Plan
from training.prospect import Prospect, afford, foresee, weigh
from training.result_cache import digest_of
from training.rungs import Source
from training.search import Kept, KeptHead, Setting, Tuned, search, tuned
from training.search_state import Ladder
from training.tuning import CachedRows, DeltaPart

TIMED_ROWS = 16


def unfreeze(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, objective: Objective,
    features: FloatArray,
) -> tuple[Tuned | None, Ladder]:  # fmt: skip
    """Search for deltas that beat the head on frozen `features`; None if there are none.

    The ladder is all that was tried. Raises `Stopped`, with the search's state saved, when the
    job is to stop.
    """
    request, reporter = setting.request, setting.reporter
    slots = trunk.manifest.slots
    plan = _plan(request, backbone, objective)
    setting.decisions.tell(decisions.training(plan, request, len(objective.groups)))
    key = _key(setting, trunk, data, objective, features, plan)
    known = setting.results.find(key, Kept)
    if known is not None:
        return _recalled(setting, known, trunk)

    def deltas(blocks: int) -> DeltaPart:
        return DeltaPart(
            backbone, slots, trunk.manifest.blocks - blocks, plan.rank, seed=request.seed
        )

    fewer_views: list[int] = []

    def activations(blocks: int) -> CachedRows:
        cut = trunk.manifest.blocks - blocks
        room = views.measure(backbone, trunk.preprocessor, data.items, cut)
        if not room.views:
            raise NoSpace(f"the rows' activations are too large: {room.shortage}")
        if room.views < room.most_views:
            fewer_views.append(blocks)
            reporter.event(
                "views_dropped",
                f"{blocks} blocks: {room.views} of {room.most_views} views of each row are trained "
                f"on, for {room.shortage}.",
                level="warn", blocks=blocks, views=room.views, of=room.most_views,
                bytes_needed=room.bytes_needed, bytes_allowed=room.bytes_allowed,
            )  # fmt: skip
        return views.cache(
            backbone, trunk.preprocessor, data.items, objective.targets, cut,
            views=room.views, seed=request.seed, check=reporter.check,
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
        serve=None if exact else lambda part: serve(part.adapter()), twins=setting.twins,
    )  # fmt: skip
    outcome = search(setting, source, plan, checkpoint)
    # What the machine had a part in is for this job only.
    serves_others = not outcome.is_hurried and not fewer_views
    if outcome.part is None:
        reporter.event(
            "frozen_head_kept",
            f"{outcome.ladder.why_frozen}; the frozen head ships.",
            steps=[step.model_dump(mode="json") for step in outcome.ladder.steps],
        )
        if serves_others:
            setting.results.keep(key, Kept, Kept(outcome.ladder, None))
        return None, outcome.ladder
    adapter = outcome.part.adapter()
    adapted = serve(adapter)
    reporter.event(
        "deltas_kept",
        f"Deltas of rank {adapter.rank} on the top {outcome.best.blocks} blocks ship.",
        **outcome.best.model_dump(mode="json"),
    )
    found = tuned(outcome, adapted, objective, trunk, adapter)
    if serves_others:
        best = KeptHead.of(found, trunk.manifest.backbone)
        setting.results.keep(key, Kept, Kept(outcome.ladder, best))
    return found, outcome.ladder


def _recalled(setting: Setting, known: Kept, trunk: Trunk) -> tuple[Tuned | None, Ladder]:
    """Return what an earlier job searched for with the same data, plan and seed."""
    setting.reporter.event(
        "recalled", "The search of an earlier job on the same data serves.", what="search"
    )
    for decision in decisions.ladder(known.ladder):
        setting.decisions.tell(decision)
    return known.best.tuned(trunk) if known.best else None, known.ladder


def _key(
    setting: Setting, trunk: Trunk, data: Dataset, objective: Objective, features: FloatArray,
    plan: Plan,
) -> str:  # fmt: skip
    """Return what names the outcome of a search on which the clock has no part."""
    return digest_of(
        unfreeze,
        [trunk, data.items, *objective.identity(), features, setting.twins, plan,
         setting.request.seed, setting.threads],
    )  # fmt: skip


def decide(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, fitted: Fit,
    objective: Objective, features: FloatArray,
) -> Prospect:  # fmt: skip
    """Return whether `auto` is to tune the backbone."""
    prospect = weigh(fitted, objective, has_slots=bool(trunk.manifest.slots))
    # Whoever began this search had the time for it; a run that goes on must not decide otherwise.
    if prospect.tune and setting.checkpoints.latest_state() is None:
        plan, blocks = _plan(setting.request, backbone, objective), trunk.manifest.blocks
        key = _key(setting, trunk, data, objective, features, plan)
        if setting.results.find(key, Kept) is not None:
            return prospect
        unfrozen = plan.ladder(blocks)[0]
        room = views.measure(backbone, trunk.preprocessor, data.items, blocks - unfrozen)
        needed = foresee(
            row_seconds(backbone, trunk, data),
            len(objective.groups),
            views=room.views,
            epochs=plan.epochs,
            folds=len(split(objective.groups, setting.request.seed)),
            share=unfrozen / blocks,
        )
        prospect = afford(prospect, needed=needed, left=setting.deadline - time.monotonic())
        if not room.views:
            prospect = prospect.refused(f"the rows' activations are too large: {room.shortage}")
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
