"""A search inside a job: its events, its states and checkpoints, and what comes out of it.

Not here: the search itself (training.gradual), and what is searched for: deltas
(training.strategies), or a whole backbone (training.full).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Generic

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from safetensors import SafetensorError

from core.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    Deltas,
    feed,
    read_adapter,
    write_adapter,
)
from core.checkpoints import Checkpoints
from core.jobs import FineTuneRequest
from core.manifests import ModelManifest
from core.preprocessing import FloatArray
from core.trunk import Trunk
from training import decisions
from training.data import Targets
from training.decisions import Decisions
from training.fit import Head, IntArray
from training.gradual import Gradual
from training.objectives import Objective
from training.outcome import Outcome
from training.plan import Plan
from training.result_cache import ResultCache
from training.rungs import Source
from training.search_state import Ending, Ladder, Step
from training.trainer import Epoch
from training.tuning import P

if TYPE_CHECKING:
    from training.preparation import Reporter

KEPT_CHECKPOINTS = 3


@dataclass(frozen=True)
class Tuned:
    """A head on what was tuned, and how the same step did on rows that it had not seen.

    `trunk` is what it runs on: with an `adapter` the one that models share, and else its own, whose
    files are `own_files`. `features` [n, dim] are of all training rows, which it has seen;
    `distances` are how far from them unseen rows lie, as quantiles (training.novelty).
    `outputs` [n, width] and `targets` are of those rows, `held_out` [n] their numbers.
    """

    head: Head
    trunk: Trunk
    adapter: Adapter | None
    features: FloatArray
    strength: float
    blocks: int
    outputs: FloatArray
    targets: Targets
    held_out: IntArray
    distances: FloatArray
    own_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def deltas(self) -> Deltas | None:
        """What the trunk is fed for every row of this model."""
        return None if self.adapter is None else feed(self.adapter, self.trunk.manifest.slots)


@dataclass(frozen=True)
class KeptHead:
    """A tuned head as it is kept: `Tuned` without its trunk, its adapter as bytes of two files."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    head: Head
    config: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.uint8]
    features: FloatArray
    strength: float
    blocks: int
    outputs: FloatArray
    targets: Targets
    held_out: IntArray
    distances: FloatArray

    @classmethod
    def of(cls, found: Tuned, backbone: str) -> KeptHead:
        """Return what to keep of a head with an adapter."""
        assert found.adapter is not None
        files = write_adapter(found.adapter, found.trunk.manifest.slots, backbone)
        config, weights = (np.frombuffer(files[n], np.uint8) for n in (CONFIG_FILE, WEIGHTS_FILE))
        own = {each.name for each in fields(cls)} - {"config", "weights"}
        return cls(config=config, weights=weights, **{name: getattr(found, name) for name in own})

    def tuned(self, trunk: Trunk) -> Tuned:
        """Return the head on the trunk that it was tuned for."""
        files = self.config.tobytes(), self.weights.tobytes()
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        del own["config"], own["weights"]
        return Tuned(trunk=trunk, adapter=read_adapter(*files, trunk.manifest.slots), **own)


@dataclass(frozen=True)
class Kept:
    """What a search came to, for a later job that would search the same (training.result_cache)."""

    ladder: Ladder
    best: KeptHead | None


@dataclass(frozen=True)
class Setting:
    """What of a job a search needs. `deadline` is on the clock of `time.monotonic`.

    `twins` [n] are the rows that judge together (training.fit).
    `draft(step, adapter)` makes the manifest of a checkpoint.
    """

    request: FineTuneRequest
    attempt: int
    checkpoints: Checkpoints
    reporter: Reporter
    threads: int
    deadline: float
    twins: IntArray
    decisions: Decisions
    results: ResultCache
    draft: Callable[[Step, Adapter], ModelManifest]


def search(
    setting: Setting, source: Source[P], plan: Plan,
    checkpoint: Callable[[P, Head], tuple[Adapter, dict[str, bytes]]] | None = None,
) -> Outcome[P]:  # fmt: skip
    """Search to the end, from where an earlier attempt left it if one did.

    `checkpoint` makes the files of a model that can be tried already. Raises `Stopped`, with the
    search's state saved, when the job is to stop.
    """
    watcher = Watcher(setting, checkpoint)

    def begin(state: bytes | None) -> Gradual[P]:
        return Gradual(
            source, plan, seed=setting.request.seed, deadline=setting.deadline, watcher=watcher,
            state=state,
        )  # fmt: skip

    # The bytes are in no variable here: they may be large, and the search is long.
    outcome = (_resume(setting, begin) or begin(None)).run()
    for decision in decisions.ladder(outcome.ladder):
        setting.decisions.note(decision)
    return outcome


def _resume(setting: Setting, begin: Callable[[bytes], Gradual[P]]) -> Gradual[P] | None:
    """Return the search of an earlier attempt, if one left a state that can be used."""
    state = setting.checkpoints.latest_state()
    if state is None:
        return None
    try:
        found = begin(state)
    except (KeyError, ValueError, SafetensorError):
        # Of another release of Graft, or damaged: the job is only slower without it.
        setting.reporter.event("state_ignored", "The saved state cannot be used; starting anew.")
        return None
    setting.reporter.event(
        "state_restored",
        f"Training goes on from step {found.resumed_from}.",
        from_step=found.resumed_from,
    )
    return found


def tuned(
    outcome: Outcome[P], features: FloatArray, objective: Objective, trunk: Trunk,
    adapter: Adapter | None = None, own_files: Mapping[str, bytes] | None = None,
) -> Tuned:  # fmt: skip
    """Return what a search found; `features` are of all rows, as they will be served."""
    head = outcome.head
    if head is None:
        rows = np.arange(len(features))
        head = objective.serve(objective.fit_at(features, rows, outcome.best.strength))
    return Tuned(
        head=head,
        trunk=trunk,
        adapter=adapter,
        features=features,
        strength=outcome.best.strength,
        blocks=outcome.best.blocks,
        outputs=outcome.outputs,
        targets=outcome.targets,
        held_out=outcome.held_out,
        distances=outcome.distances,
        own_files=own_files or {},
    )


@dataclass
class Watcher(Generic[P]):
    """Carries a search's news to the job's events, and its states and models to the store."""

    setting: Setting
    checkpoint: Callable[[P, Head], tuple[Adapter, dict[str, bytes]]] | None

    def check(self) -> None:
        self.setting.reporter.check()

    def save(self, step: int, state: bytes) -> None:
        self.setting.checkpoints.save_state(self.setting.attempt, step, state)

    def on_stop(self, step: int) -> None:
        self.setting.reporter.event("state_saved", f"Training stops at step {step}.", step=step)

    def on_end(self, ending: Ending) -> None:
        told = decisions.ending(ending)
        self.setting.reporter.event(
            told.event, f"{told.what} {told.chosen}: {told.why}.", level="info", **told.data
        )

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

    def on_step(self, step: Step, trained_steps: int, part: P, head: Head) -> None:
        self.setting.reporter.event(
            "unfrozen",
            f"{step.name}: {step.score} on held-out rows, "
            f"log-likelihood {step.gain:+.4f} ± {step.gain_error:.4f} against the best before; "
            + ("kept." if step.kept else "not kept."),
            **step.model_dump(mode="json"),
        )
        if not step.kept or self.checkpoint is None:
            return
        adapter, files = self.checkpoint(part, head)
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
