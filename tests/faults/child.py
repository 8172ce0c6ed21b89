"""`training.child` as it is, but for the faults that jobs ask for (tests.faults.faults).

With `FAULTS_LIGHT` set, the stages that need torch are stand-ins, so that a child starts in a fifth
of the time; the pipeline around them, the registry and the child's main are the product's.
"""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

import core.store
import training.child
from core.datasets import Modality
from core.errors import Unavailable
from core.files import sha256
from core.jobs import Job, JobKind
from core.manifests import ModelManifest
from core.novelty import QUANTILES, Novelty
from core.publications import Publications
from core.registry import Registry
from core.store import ArtifactStore
from tests.faults.faults import around, shift_clock, strike, without

SUPERVISOR = os.getppid()
DIM = 4
HEAVY = (
    "torch", "training.assessment", "training.data_report", "training.export",
    "training.features", "training.fit", "training.full", "training.gate", "training.gradual",
    "training.investigation", "training.novelty", "training.objectives", "training.precision",
    "training.reporting", "training.search", "training.search_state", "training.strategies",
    "training.tasks",
    "training.trunks", "training.warm_up",
)  # fmt: skip


def install() -> None:
    """Put the faults around the child's functions."""
    if without("imports"):
        sys.exit("a library is missing on this host")
    current: list[Job] = []

    def reach(step: str) -> None:
        if current:
            strike(current[0], step, supervisor=SUPERVISOR)

    def stored(_: object, key: str, *__: object) -> None:
        match key.split("/"):
            case [_, "models", _, "versions", _, "head.onnx"]:
                reach("write")
            case [_, "models", _, "versions", _, "manifest.json"]:
                reach("manifest")
            case [_, "models", _, "releases", _]:
                reach("release")
            case [_, "runs", _, name] if name.startswith("publication-"):
                reach("publication")

    def storing(_: object, key: str, *__: object) -> None:
        reach("put-release" if "/releases/" in key else f"put-{key.rpartition('/')[2]}")

    shift_clock()
    remove_guards()
    around(ArtifactStore, "put_new", before=storing)
    around(training.child, "run", before=lambda job, *_: current.append(job))
    around(ArtifactStore, "put_new", after=stored)
    if JobKind(sys.argv[1]) is JobKind.FINE_TUNE:
        if os.environ.get("FAULTS_LIGHT"):
            lighten()
        from training import feature_cache, pipeline, preparation

        for owner, name, step in (
            (preparation, "read_dataset", "data"), (preparation, "ensure_trunk", "trunk"),
            (feature_cache, "extract", "features"), (pipeline.FineTune, "_fit", "fit"),
            (pipeline, "export_head", "export"),
        ):  # fmt: skip
            around(owner, name, before=lambda *_, step=step, **__: reach(step))
        if not os.environ.get("FAULTS_LIGHT"):
            from training.search import Watcher

            around(Watcher, "on_epoch", before=lambda *_: reach("epoch"))
        around(training.child.Reporter, "authorise", before=lambda _: reach("ask"))


def remove_guards() -> None:
    """Do without the guards that the worker is to do without."""
    reporter: Any = training.child.Reporter
    if without("lifeline"):
        reporter._listen = lambda self: [self._answered.release() for _ in self._answers]
        if hasattr(training.child, "end_with_supervisor"):
            vars(training.child)["end_with_supervisor"] = lambda: None
    if without("ask"):
        reporter.authorise = lambda self: None
    if without("publication"):
        unique = f"{os.getpid()}-{time.time_ns()}"
        publications: Any = Publications
        publications._key = lambda self, number: f"{self._root}/publication-{unique}-{number}.json"
    if without("room"):
        vars(core.store)["NoSpace"] = Unavailable
    if without("order"):
        around(Registry, "_store_version", before=list_first)


def list_first(registry: Registry, draft: ModelManifest, files: dict[str, bytes]) -> None:
    """List the version before its files are there."""
    number = (
        max(
            map(int, registry._store.children(f"{draft.tenant}/models/{draft.name}/versions")),
            default=0,
        )
        + 1
    )
    hashes = {name: sha256(data) for name, data in files.items()}
    manifest = draft.model_copy(update={"version": number, "files": hashes})
    registry._put_same(manifest.folder, {"manifest.json": manifest.model_dump_json().encode()})


class Stub(ModuleType):
    """A module that has whatever is imported from it, unless it is told to have something else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nothing


def nothing(*_: object, **__: object) -> None:
    """Stand in for what no fault is about."""


def lighten() -> None:
    """Stand in for the stages that need torch, or take their time."""
    from tests.builders import head_files

    for name in HEAVY:
        sys.modules[name] = Stub(name)
    trunk = SimpleNamespace(
        manifest=SimpleNamespace(digest="0" * 64), modality=Modality.TEXT, dim=DIM
    )
    for name, members in {
        "torch": {"get_num_threads": lambda: 1},
        "training.trunks": {"ensure_trunk": lambda *_, **__: trunk},
        "training.precision": {
            "Candidates": lambda open_trunk, *_: open_trunk,
            "choose": lambda _, open_trunk: (open_trunk("fp32"), None),
        },
        "training.features": {"extract": lambda _, rows, **__: np.zeros((len(rows), DIM), "f4")},
        "training.export": {"export_head": lambda *_: head_files(DIM, seed=os.getpid())},
        "training.novelty": {"estimate_novelty": light_novelty},
        "training.search_state": {"Ladder": lambda: SimpleNamespace(steps=())},
    }.items():
        vars(sys.modules[name]).update(members)
    from training.pipeline import FineTune

    light: Any = FineTune
    light._evaluate = lambda *_: SimpleNamespace(head=None, summary=lambda: {"accuracy": 0.5})
    light._inspect = lambda *_: SimpleNamespace(report=None, twins=None)
    light._investigate = nothing
    light._fit = lambda *_: SimpleNamespace(strength=1.0, remedy="none")
    light._report = lambda *_: {"report.json": b"{}"}


def light_novelty(features: Any, targets: Any, classes: int, *, seed: int) -> Novelty:
    """Return statistics to which everything is ordinary."""
    means = np.zeros((classes, DIM), np.float16)
    return Novelty(means, np.zeros(DIM, np.float32), np.zeros(QUANTILES, np.float32))


if __name__ == "__main__":
    install()
    training.child.main()
