"""`gradual` inside a job: its data and time, its events, its checkpoints and states.

    feature_extraction    fit a head on frozen features; nothing of this module
    gradual               besides, low-rank deltas on the top blocks, for as long as they help
    auto                  `gradual`, if that can pay (training.prospect)

What comes out is judged and made as all heads are: features from the trunk that serves, with the
deltas, and the convex fit on them. Not here: the search itself (training.gradual).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from core.adapters import Adapter, Deltas, feed
from core.checkpoints import Checkpoints
from core.jobs import FineTuneRequest
from core.manifests import ModelManifest
from core.preprocessing import FloatArray
from core.trunk import Trunk
from training import parity, views
from training.backbones import TorchBackbone
from training.data import Dataset
from training.export import export_adapted
from training.features import extract
from training.fit import Fit, Head, IntArray, fit_at
from training.gradual import Gradual, Outcome
from training.judgement import split
from training.plan import DEFAULTS, Plan
from training.prospect import Prospect, afford, foresee, weigh
from training.rungs import Source
from training.search_state import Step
from training.trainer import Epoch
from training.tuning import Rows

if TYPE_CHECKING:
    from training.preparation import Reporter

KEPT_CHECKPOINTS = 3
TIMED_ROWS = 16


@dataclass(frozen=True)
class Tuned:
    """A head with deltas, and how the same step did on rows that it had not seen.

    `features` [n, dim] are of all training rows, which the deltas have seen; `distances` are how
    far from them unseen rows lie, as quantiles (training.novelty).
    `probabilities` [n, classes] and `targets` [n] are of those rows, `held_out` [n] their numbers.
    """

    head: Head
    adapter: Adapter
    features: FloatArray
    strength: float
    blocks: int
    probabilities: FloatArray
    targets: IntArray
    held_out: IntArray
    distances: FloatArray

    def deltas(self, trunk: Trunk) -> Deltas:
        """Return what the trunk is fed for every row of this model."""
        return feed(self.adapter, trunk.manifest.slots)


@dataclass(frozen=True)
class Setting:
    """What of a job `unfreeze` needs. `deadline` is on the clock of `time.monotonic`.

    `draft(step, adapter)` makes the manifest of a checkpoint.
    """

    request: FineTuneRequest
    attempt: int
    checkpoints: Checkpoints
    reporter: Reporter
    threads: int
    deadline: float
    draft: Callable[[Step, Adapter], ModelManifest]


def unfreeze(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, targets: IntArray,
    features: FloatArray,
) -> tuple[Tuned | None, tuple[Step, ...]]:  # fmt: skip
    """Search for deltas that beat the head on frozen `features`; None if there are none.

    The steps are all that were tried. Raises `Stopped`, with the search's state saved, when the
    job is to stop.
    """
    request, reporter = setting.request, setting.reporter
    classes = len(data.manifest.classes)

    def activations(cut: int) -> Rows | None:
        return views.cache(
            backbone, trunk.preprocessor, data.items, targets, cut,
            seed=request.seed, check=reporter.check,
        )  # fmt: skip

    def serve(adapter: Adapter) -> FloatArray:
        return extract(
            trunk,
            data.items,
            threads=setting.threads,
            on_progress=lambda *_: reporter.check(),
            deltas=feed(adapter, trunk.manifest.slots),
        )

    exact = trunk.manifest.precision == "fp32"
    source = Source(
        backbone, trunk.manifest.slots, targets, classes, features, activations,
        serve=None if exact else serve,
    )  # fmt: skip
    watcher = _Watcher(setting, trunk, backbone)
    outcome = _search(setting, source, watcher).run()
    if outcome.adapter is None:
        reporter.event(
            "frozen_head_kept",
            "No step beat the frozen head by more than one standard error; the frozen head ships.",
            steps=[step.model_dump(mode="json") for step in outcome.steps],
        )
        return None, outcome.steps
    adapted = serve(outcome.adapter)
    reporter.event(
        "deltas_kept",
        f"Deltas of rank {outcome.adapter.rank} on the top {outcome.best.blocks} blocks ship.",
        **outcome.best.model_dump(mode="json"),
    )
    return _tuned(outcome, outcome.adapter, adapted, targets, classes), outcome.steps


def decide(
    setting: Setting, trunk: Trunk, backbone: TorchBackbone, data: Dataset, fitted: Fit,
    targets: IntArray,
) -> Prospect:  # fmt: skip
    """Return whether `auto` is to tune the backbone, and say so."""
    prospect = weigh(fitted, targets, has_slots=bool(trunk.manifest.slots))
    # Whoever began this search had the time for it; a run that goes on must not decide otherwise.
    if prospect.tune and setting.checkpoints.latest_state() is None:
        plan, blocks = _plan(setting.request, backbone, targets), trunk.manifest.blocks
        needed = foresee(
            _row_seconds(backbone, trunk, data),
            len(targets),
            views=views.view_count(backbone.modality),
            epochs=plan.epochs,
            folds=len(split(targets, setting.request.seed)),
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


def _row_seconds(backbone: TorchBackbone, trunk: Trunk, data: Dataset) -> float:
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


def _search(setting: Setting, source: Source, watcher: _Watcher) -> Gradual:
    """Return the search, from where an earlier attempt left it if one did."""
    plan = _plan(setting.request, source.backbone, source.targets)
    state = setting.checkpoints.latest_state()
    if state is not None:
        try:
            search = Gradual(
                source, plan, seed=setting.request.seed, deadline=setting.deadline,
                watcher=watcher, state=state,
            )  # fmt: skip
            setting.reporter.event(
                "state_restored",
                f"Training goes on from step {search.resumed_from}.",
                from_step=search.resumed_from,
            )
            return search
        except (KeyError, ValueError, SafetensorError):
            # Of another release of Graft, or damaged: the job is only slower without it.
            setting.reporter.event(
                "state_ignored", "The saved state cannot be used; starting anew."
            )
    return Gradual(
        source, plan, seed=setting.request.seed, deadline=setting.deadline, watcher=watcher
    )


def _plan(request: FineTuneRequest, backbone: TorchBackbone, targets: IntArray) -> Plan:
    defaults = DEFAULTS[backbone.modality]
    return defaults.plan(targets, request.chosen_hyperparameters, request.early_stopping)


def _tuned(
    outcome: Outcome, adapter: Adapter, features: FloatArray, targets: IntArray, classes: int
) -> Tuned:
    return Tuned(
        head=outcome.head or fit_at(features, targets, classes, outcome.best.strength),
        adapter=adapter,
        features=features,
        strength=outcome.best.strength,
        blocks=outcome.best.blocks,
        probabilities=outcome.probabilities,
        targets=outcome.targets,
        held_out=outcome.held_out,
        distances=outcome.distances,
    )


@dataclass
class _Watcher:
    """Carries a search's news to the job's events, and its states and models to the store."""

    setting: Setting
    trunk: Trunk
    backbone: TorchBackbone

    def check(self) -> None:
        self.setting.reporter.check()

    def save(self, step: int, state: bytes) -> None:
        self.setting.checkpoints.save_state(self.setting.attempt, step, state)

    def on_stop(self, step: int) -> None:
        self.setting.reporter.event("state_saved", f"Training stops at step {step}.", step=step)

    def on_slowdown(self, blocks: int, learning_rate: float) -> None:
        self.setting.reporter.event(
            "learning_rate_lowered",
            f"{blocks} blocks: training diverged; it starts anew at a rate of {learning_rate:.1e}.",
            level="warn",
            blocks=blocks,
            learning_rate=learning_rate,
        )

    def on_epoch(self, blocks: int, number: int, epoch: Epoch, step: int) -> None:
        self.setting.reporter.event(
            "epoch_ended",
            f"{blocks} blocks, epoch {number}: loss {epoch.loss:.3f}"
            + (
                "." if epoch.validation_loss is None else f", held out {epoch.validation_loss:.3f}."
            ),
            blocks=blocks,
            epoch=number,
            step=step,
            **epoch.model_dump(mode="json"),
        )

    def on_step(
        self, step: Step, trained_steps: int, model: Callable[[], tuple[Adapter, Head]]
    ) -> None:
        self.setting.reporter.event(
            "unfrozen",
            f"{step.name}: accuracy {step.accuracy:.3f} on held-out rows, "
            f"log-likelihood {step.gain:+.4f} ± {step.gain_error:.4f} against the best before; "
            + ("kept." if step.kept else "not kept."),
            **step.model_dump(mode="json"),
        )
        if not step.kept:
            return
        adapter, head = model()
        files = export_adapted(head, adapter, self.trunk, self.backbone)
        manifest = self.setting.checkpoints.save(
            self.setting.draft(step, adapter), trained_steps, files
        )
        # An earlier attempt's are among them.
        saved = [each.step for each in self.setting.checkpoints.list() if each.step is not None]
        self.setting.checkpoints.drop(keep=saved[-KEPT_CHECKPOINTS:])
        self.setting.reporter.event(
            "checkpoint",
            f"Checkpoint {manifest.reference}.",
            step=trained_steps,
            reference=manifest.reference,
            metrics=manifest.metrics,
        )
