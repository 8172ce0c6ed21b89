"""Accuracy of strategies on real data, by the pipeline's own stages, without HTTP or a queue.

    python bench/quality.py --data ../shared/data --sets banking10 clothing --strategies gradual

Prints one line for each set, strategy and seed: test accuracy, seconds, and what was chosen; then
mean and standard deviation. The frozen head is always fitted, so each line has its baseline from
the same rows. Absolute times drift on shared machines; compare within one run.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from main_job import few_shot, read_banking

from core.checkpoints import Checkpoints
from core.datasets import DatasetManifest, Modality
from core.jobs import FineTuneRequest
from core.manifests import DatasetReference, ModelManifest
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from training import backbones
from training.data import Dataset
from training.features import extract
from training.fit import fit
from training.strategies import Setting, unfreeze
from training.trunks import ensure_trunk

BACKBONES = {Modality.TEXT: "minilm", Modality.IMAGE: "efficientnet-lite0"}
Rows = list[tuple[Any, str]]


@dataclass(frozen=True)
class Split:
    """Training and test rows of one draw."""

    modality: Modality
    train: Rows
    test: Rows


def banking(per_class: int | None) -> Callable[[Path, int], Split]:
    """Banking77 whole, or so many training rows of each class."""

    def read(data: Path, seed: int) -> Split:
        train = read_banking(data / "banking77" / "train.csv")
        test = read_banking(data / "banking77" / "test.csv")
        drawn = train if per_class is None else few_shot(train, per_class, seed)
        return Split(Modality.TEXT, drawn, test)

    return read


def clothing(per_class: int) -> Callable[[Path, int], Split]:
    """So many photographs of each class."""

    def read(data: Path, seed: int) -> Split:
        train, test = (
            [(path.read_bytes(), path.parent.name) for path in sorted(folder.glob("*/*.jpg"))]
            for folder in (data / "clothing" / "train", data / "clothing" / "test")
        )
        return Split(Modality.IMAGE, few_shot(train, per_class, seed), test)

    return read


SETS: dict[str, Callable[[Path, int], Split]] = {
    "banking8": banking(8),
    "banking10": banking(10),
    "banking": banking(None),
    "clothing10": clothing(10),
    "clothing": clothing(60),
}


class Printer:
    """A job's reporter that prints what a strategy decides, and never stops it."""

    stop_reason = None

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose

    def event(self, type: str, message: str, **data: object) -> None:
        if self._verbose or type in ("unfrozen", "frozen_head_kept", "deltas_kept"):
            print(f"    {message}", flush=True)

    def progress(self, stage: str, fraction: float) -> None:
        """Nothing to show."""

    def check(self) -> None:
        """Nobody stops it."""

    def authorise(self) -> None:
        """Nothing is published."""


class Bench:
    """Runs strategies on one store, so that a trunk is exported once."""

    def __init__(self, folder: Path, threads: int, verbose: bool) -> None:
        self._store = ArtifactStore(str(folder))
        self._threads = threads
        self._reporter = Printer(verbose=verbose)

    def run(self, split: Split, strategy: str, seed: int) -> tuple[float, float, float]:
        """Return the frozen head's test accuracy, the strategy's, and the strategy's seconds."""
        model = BACKBONES[split.modality]
        trunk = ensure_trunk(
            Registry(self._store), model, hf_models=(), threads=1, max_pixels=25_000_000,
            on_export=lambda: print("    exporting the trunk"),
        )  # fmt: skip
        data = dataset(split)
        targets = data.targets(data.manifest.classes, param="")
        truth = np.array([data.manifest.classes.index(label) for _, label in split.test])
        began = time.perf_counter()
        features = self._features(trunk, data.items)
        fitted = fit(features, targets, len(data.manifest.classes), seed=seed)
        frozen_seconds = time.perf_counter() - began
        tests: Any = [item for item, _ in split.test]
        frozen = _accuracy(fitted.head.predict(self._features(trunk, tests)), truth)
        if strategy == "feature_extraction":
            return frozen, frozen, frozen_seconds
        began = time.perf_counter()
        setting = Setting(
            request=FineTuneRequest(
                model=model, training_file="file-1", seed=seed, strategy="gradual"
            ),
            attempt=1,
            checkpoints=Checkpoints(self._store, "default", f"ftjob-{time.time_ns()}"),
            reporter=self._reporter,
            threads=self._threads,
            deadline=time.monotonic() + 3600,
            draft=lambda step, adapter: _draft(trunk, data, step.blocks, adapter.rank),
        )
        backbone = backbones.load(model, ())
        tuned = unfreeze(setting, trunk, backbone, data, targets, features)
        seconds = frozen_seconds + time.perf_counter() - began
        if tuned is None:
            return frozen, frozen, seconds
        adapted = self._features(trunk, tests, tuned.deltas(trunk))
        return frozen, _accuracy(tuned.head.predict(adapted), truth), seconds

    def _features(self, trunk: Trunk, items: Any, deltas: Any = None) -> Any:
        return extract(
            trunk, items, threads=self._threads, on_progress=lambda *_: None, deltas=deltas
        )


def dataset(split: Split) -> Dataset:
    """The training rows, as they come out of a processed file."""
    labels = [label for _, label in split.train]
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    manifest = DatasetManifest(modality=split.modality, rows=len(labels), counts=counts, sha256="")
    return Dataset("file-1", manifest, [item for item, _ in split.train], labels)


def _draft(trunk: Trunk, data: Dataset, blocks: int, rank: int) -> ModelManifest:
    return ModelManifest(
        tenant="default", name="bench", version=0, kind="low_rank", rank=rank, blocks=blocks,
        job="ftjob-1", attempt=1, created_at=0, backbone=trunk.manifest.backbone,
        trunk=trunk.manifest.digest, modality=trunk.modality, dim=trunk.dim,
        labels=data.manifest.classes, files={}, training={}, metrics={},
        dataset=DatasetReference(file="file-1", sha256="", rows=len(data.items)),
    )  # fmt: skip


def _accuracy(probabilities: Any, truth: Any) -> float:
    return float((probabilities.argmax(axis=1) == truth).mean())


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["banking10", "clothing"])
    parser.add_argument(
        "--strategies", nargs="+", choices=["feature_extraction", "gradual"], default=["gradual"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--test-rows", type=int, default=None)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.threads, options.verbose)
        for name in options.sets:
            for strategy in options.strategies:
                found = []
                for seed in options.seeds:
                    split = SETS[name](options.data, seed)
                    random.Random(0).shuffle(split.test)
                    part = Split(split.modality, split.train, split.test[: options.test_rows])
                    frozen, accuracy, seconds = bench.run(part, strategy, seed)
                    found.append((accuracy, accuracy - frozen))
                    print(
                        f"{name} {strategy} seed {seed}: frozen {frozen:.4f}, {accuracy:.4f}, "
                        f"{seconds:.1f} s",
                        flush=True,
                    )
                mean, gain = np.mean(found, axis=0)
                deviation = np.std([accuracy for accuracy, _ in found])
                print(f"{name} {strategy}: {mean:.4f} ± {deviation:.4f}, {gain:+.4f} over frozen")


if __name__ == "__main__":
    main()
