"""A fine-tuning job from beginning to end; read this first.

    data ─▶ trunk ─▶ features ─▶ inspect ─▶ fit ─▶ (unfreeze) ─▶ evaluate ─▶ report
         ─▶ export ─▶ publish

Each stage is a module of its own and is reported as an event with its seconds; what differs between
tasks is a row of `training.tasks`. The pipeline runs in a child process (training.child), knows
nothing of Redis, and may be run again from the start by another attempt at any time: what it stores
is content-addressed or create-exclusive.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from core.checkpoints import Checkpoints
from core.datasets import Task
from core.files import FileStore
from core.head import Head
from core.jobs import EventLevel, Job
from core.manifests import GateOutcome, ModelManifest
from core.novelty import NOVELTY_FILE, Novelty
from core.preprocessing import FloatArray
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.tasks import decide, group_count
from core.trunk import Trunk
from training import backbones, decisions, strategies
from training.advice import Tried, advise
from training.assessment import Alternative
from training.data import Dataset, group
from training.data_report import Inspection, describe, inspect_data
from training.drafts import Origin, draft, release
from training.export import export_adapted, export_head
from training.fit import Fit
from training.full import tune_whole
from training.gate import Comparison, HeldOut, compare_with_current, judge
from training.gradual import RESERVED_SHARE
from training.novelty import estimate_novelty, estimate_tuned_novelty
from training.preparation import Preparation, Reporter, Rows
from training.reporting import Evidence, common_fields, write_report
from training.search import Setting, Tuned
from training.search_state import Ladder
from training.strategies import unfreeze
from training.tasks import TASKS, Judged


class FineTune:
    """One attempt at one job; `run` is its table of contents."""

    def __init__(
        self, job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter,
        trunk: Trunk | None = None,
    ) -> None:  # fmt: skip
        self._job = job
        self._registry = Registry(store)
        self._files = FileStore(store, job.tenant)
        self._settings = settings
        self._reporter = reporter
        self._checkpoints = Checkpoints(store, job.tenant, job.id)
        self._began = time.monotonic()
        self._threads = torch.get_num_threads()
        self._made_of = Preparation(job, store, settings, reporter, self._threads, trunk)
        self._seconds: dict[str, float] = {}
        self._ladder = Ladder()
        self._tuning = Tried()

    def run(self) -> ModelManifest:
        """Return the published version's manifest; raises the errors of `core.errors`."""
        published = self._registry.publication(self._job.tenant, self._job.id)
        if published is not None:
            # An attempt before this one got as far as deciding what to publish.
            self._reporter.authorise()
            return self._release(self._registry.roll_forward(published))

        made_of = self._made_of
        with self._stage("data", 0.0):
            train, held_out = made_of.read()
            task, labels = made_of.task(train)
        with self._stage("trunk", 0.05):
            trunk = made_of.trunk(train, held_out)
        origin = Origin(
            self._job, made_of.request, trunk, train, task, labels, made_of.parent, made_of.earlier
        )
        with self._stage("features", 0.1):
            targets = train.targets(labels, param="")
            rows = Rows(train, made_of.extract(trunk, train, 0.1, 0.55), targets)
            other = None if held_out is None else self._held_out(origin, held_out)
        with self._stage("inspect", 0.6):
            data = self._inspect(origin, rows, other)
        with self._stage("fit", 0.62):
            fitted = self._fit(origin, rows, data)
        tuned, seen = None, other
        if origin.request.strategy != "feature_extraction":
            with self._stage("unfreeze", 0.7):
                tuned = self._unfreeze(origin, rows, data, fitted)
                if tuned is not None and held_out is not None:
                    seen = self._as_tuned(tuned, held_out, origin.labels)
        with self._stage("evaluate", 0.85):
            assessment = self._evaluate(origin, fitted, tuned, rows, seen)
            comparison, gate = self._gate(origin, assessment, other or rows)
        with self._stage("report", 0.87):
            found = self._investigate(origin, rows, other, fitted, assessment)
            evidence = Evidence(
                task, labels, train, rows.row_set, targets, held_out,
                other.row_set if other else None, trunk, data.report, fitted, self._ladder.steps,
                assessment, found, gate, comparison.current if comparison else None,
                tuple(made_of.decisions.made),
                origin.parent.reference if origin.parent else None,
                tuned.trunk.manifest.digest if tuned else trunk.manifest.digest,
                tuned is not None,
            )  # fmt: skip
            report = self._report(origin, evidence)
        with self._stage("export", 0.94):
            files = self._export(origin, assessment, tuned, rows) | report
            files[NOVELTY_FILE] = self._novelty(origin, tuned, rows).write()
            self._reporter.event("exported", "Head exported to ONNX and checked against torch.")
        with self._stage("publish", 0.95):
            self._reporter.authorise()
            manifest = self._draft(origin, fitted, tuned, assessment, gate)
            return self._release(self._registry.publish(manifest, files))

    # -- stages ------------------------------------------------------------------------------

    def _held_out(self, origin: Origin, data: Dataset) -> Rows:
        targets = data.targets(origin.labels, param="validation_file")
        return Rows(data, self._made_of.extract(origin.trunk, data, 0.55, 0.6), targets)

    def _inspect(self, origin: Origin, rows: Rows, other: Rows | None) -> Inspection:
        groups, manifest = group(origin.task, rows.targets), rows.data.manifest
        held_out = other.row_set if other else None
        found = self._made_of.recall(
            "data report", Inspection, inspect_data,
            rows.row_set, groups, held_out, origin.trunk, manifest.counts,
            manifest.unreadable,
        )  # fmt: skip
        summary = found.report.summary()
        level: EventLevel = "warn" if summary["leaked_rows"] else "info"
        self._reporter.event("data_report", describe(found.report), level=level, **summary)
        return found

    def _fit(self, origin: Origin, rows: Rows, data: Inspection) -> Fit:
        fitted = self._made_of.recall(
            "fit", Fit, TASKS[origin.task].fit,
            rows.features, rows.targets, len(origin.labels), origin.request.seed, data.twins,
        )  # fmt: skip
        self._made_of.decisions.tell(decisions.strength(fitted))
        if origin.task in (Task.SINGLE_LABEL, Task.ORDINAL):
            self._made_of.decisions.tell(decisions.remedy(fitted))
        return fitted

    def _unfreeze(self, origin: Origin, rows: Rows, data: Inspection, fitted: Fit) -> Tuned | None:
        strategy, trunk = origin.request.strategy, origin.trunk
        if strategy == "gradual" and not trunk.manifest.slots:
            self._reporter.event(
                "frozen_head_kept",
                "This backbone has no layers that take deltas; the frozen head ships.",
            )
            reason = "this backbone has no layers that take deltas"
            self._tuning = Tried(was_asked=True, refusal=reason)
            return None
        setting = Setting(
            request=origin.request,
            attempt=self._job.attempt,
            checkpoints=self._checkpoints,
            reporter=self._reporter,
            threads=self._threads,
            deadline=self._began
            + (1 - RESERVED_SHARE) * (origin.request.max_seconds - self._job.ran_seconds),
            twins=data.twins,
            decisions=self._made_of.decisions,
            results=self._made_of.results,
            draft=lambda step, adapter: draft(
                origin, step.strength, step.metrics(), adapter=adapter, blocks=step.blocks,
                interval=step.interval, training={"imbalance_remedy": fitted.remedy},
            ),
        )  # fmt: skip
        backbone = backbones.load(origin.request.model, self._settings.hf_models)
        objective = TASKS[origin.task].objective(rows.targets, len(origin.labels), fitted.remedy)
        if strategy == "auto":
            prospect = strategies.decide(
                setting, trunk, backbone, origin.train, fitted, objective, rows.features
            )
            self._made_of.decisions.tell(decisions.strategy(prospect))
            if not prospect.tune:
                self._tuning = Tried(was_asked=True, refusal=prospect.reason)
                return None
        tune = tune_whole if strategy == "full" else unfreeze
        tuned, self._ladder = tune(setting, trunk, backbone, origin.train, objective, rows.features)
        tried, ending = len(self._ladder.steps[1:]), self._ladder.ending
        self._tuning = Tried(
            was_asked=True, steps=tried, ships=tuned is not None,
            refusal=None if tried or ending is None else ending.why,
        )  # fmt: skip
        return tuned

    def _as_tuned(self, tuned: Tuned, data: Dataset, labels: list[str]) -> Rows:
        """The validation file's rows as the tuned model sees them."""
        features = self._made_of.tuned(tuned.trunk, data, tuned.deltas)
        return Rows(data, features, data.targets(labels, param="validation_file"))

    def _evaluate(
        self, origin: Origin, fitted: Fit, tuned: Tuned | None, rows: Rows, other: Rows | None
    ) -> Any:
        """On the validation file if there is one, or else on rows that the model has not seen."""
        held_out = None if other is None else (other.features, other.targets)
        alternative = None
        if tuned is not None:
            alternative = Alternative(tuned.head, tuned.held_out, tuned.outputs)
        assessment: Judged = TASKS[origin.task].assess(
            fitted, rows.targets, origin.labels, held_out, alternative
        )
        for decision in assessment.decisions():
            self._made_of.decisions.tell(decision)
        self._reporter.event("metrics", assessment.sentence(), level="info", **assessment.summary())
        return assessment

    def _gate(
        self, origin: Origin, assessment: Any, judged: Rows
    ) -> tuple[Comparison | None, GateOutcome | None]:
        """What the quality gate says, if the request has one."""
        gate = origin.request.quality_gate
        if gate is None:
            return None, None
        answers = decide(origin.task, assessment.outputs, origin.labels)
        fitted_on = origin.train.manifest if origin.request.validation_file is None else None
        if assessment.rows is not None:
            judged = judged.subset(assessment.rows)
        held_out = HeldOut(
            items=judged.data.items,
            features=judged.features,
            trunk=origin.trunk.manifest.digest,
            labels=judged.data.answers,
            answers=answers,
            dataset=fitted_on.sha256 if fitted_on else None,
        )
        comparison = None
        if gate.min_improvement_over_current is not None:
            comparison = compare_with_current(
                self._registry, self._files, self._job.tenant, origin.name, held_out,
                lambda current: self._as_seen_by(current, judged), self._made_of.contents,
            )  # fmt: skip
        return comparison, judge(gate, assessment.accuracy, comparison)

    def _as_seen_by(self, current: ModelManifest, rows: Rows) -> tuple[Head, FloatArray]:
        """Another version's head, and the rows' features by its trunk and its adapter."""
        trunk = Trunk.load_for(
            self._registry, current, threads=1, max_pixels=self._settings.max_pixels
        )
        head = Head.load(self._registry, current, trunk)
        return head, self._made_of.tuned(trunk, rows.data, trunk.bank.gather([head.adapter]))

    def _investigate(
        self, origin: Origin, rows: Rows, other: Rows | None, fitted: Fit, assessment: Any
    ) -> Any:
        task = TASKS[origin.task]
        found = self._made_of.recall(
            "findings", task.findings, task.investigate,
            origin.trunk.modality, rows.row_set, rows.targets, other.row_set if other else None,
            fitted, assessment, origin.request.seed,
        )  # fmt: skip
        compared = any(each.event == "backbone_chosen" for each in self._made_of.decisions.made)
        advice = advise(found.yardstick, self._tuning, compared_backbones=compared)
        found = found.advised(advice)
        told = found.yardstick
        if told.advice is not None:
            self._reporter.event(
                "transfer", told.advice, level="warn", **told.model_dump(exclude={"advice"})
            )
        return found

    def _report(self, origin: Origin, evidence: Evidence) -> dict[str, bytes]:
        common = common_fields(self._job.id, origin.name, origin.request, evidence, self._seconds)
        return write_report(TASKS[origin.task].report(evidence, common), evidence)

    def _export(
        self, origin: Origin, assessment: Judged, tuned: Tuned | None, rows: Rows
    ) -> dict[str, bytes]:
        if tuned is None or tuned.adapter is None:
            features, own = (tuned.features, tuned.own_files) if tuned else (rows.features, {})
            return export_head(assessment.head, features) | dict(own)
        backbone = backbones.load(origin.request.model, self._settings.hf_models)
        return export_adapted(assessment.head, tuned.adapter, origin.trunk, backbone)

    def _novelty(self, origin: Origin, tuned: Tuned | None, rows: Rows) -> Novelty:
        groups = group(origin.task, rows.targets)
        count = group_count(origin.task, len(origin.labels))
        if tuned is None:
            return estimate_novelty(rows.features, groups, count, seed=origin.request.seed)
        return estimate_tuned_novelty(tuned.features, groups, count, tuned.distances)

    def _draft(
        self, origin: Origin, fitted: Fit, tuned: Tuned | None, assessment: Any,
        gate: GateOutcome | None,
    ) -> ModelManifest:  # fmt: skip
        made = draft(
            origin, tuned.strength if tuned else fitted.strength, assessment.summary(),
            adapter=tuned.adapter if tuned else None,
            own=tuned.trunk if tuned and tuned.own_files else None,
            blocks=tuned.blocks if tuned else 0,
            interval=assessment.interval if origin.task is Task.REGRESSION else None,
            training={"imbalance_remedy": fitted.remedy},
        )  # fmt: skip
        return made.model_copy(update={"gate": gate})

    def _release(self, manifest: ModelManifest) -> ModelManifest:
        self._checkpoints.drop_states()
        return release(self._registry, manifest, self._made_of.request, self._reporter)

    @contextmanager
    def _stage(self, name: str, fraction: float) -> Iterator[None]:
        self._reporter.check()
        self._reporter.progress(name, fraction)
        begun = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - begun, 3)
        self._reporter.event(
            "stage", f"{name}: {self._seconds[name]} s", stage=name, seconds=self._seconds[name]
        )


def fine_tune(
    job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter,
    trunk: Trunk | None = None,
) -> ModelManifest:  # fmt: skip
    """Run a `fine_tune` job; return what it published. `trunk` has been loaded, if it helps."""
    return FineTune(job, store, settings, reporter, trunk).run()
