"""The packaged backbones side by side: accuracy of the frozen head, `model: auto`, and speed.

    python bench/backbones.py --data ../shared/data

Two tables in Markdown. Each draw of a set is fitted on every backbone of its kind by the pipeline's
own stages; "regret" is how much less accurate on the test rows auto's choice was than the best of
them. Speed is rows to features, as jobs compute them, the backbones in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_sets import DataSet, Split

from core.backbones import candidates
from core.datasets import DatasetManifest, Modality
from core.preprocessing import FloatArray
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from training.backbone_choice import choose_backbone
from training.data import Dataset
from training.features import extract
from training.fit import fit
from training.trunks import ensure_trunk

SETS = (
    "support", "banking@10", "topics@20", "pair@20", "clothing@60", "clothing@10", "digits@10",
)  # fmt: skip
TIMED = {Modality.TEXT: "banking", Modality.IMAGE: "clothing"}
TIMED_ROWS = {Modality.TEXT: 2000, Modality.IMAGE: 120}


class Bench:
    """Trunks, each exported once, and the features of every row that was asked for."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._registry = Registry(ArtifactStore(str(folder)))
        self._threads = threads
        self._known: dict[tuple[str, Any], FloatArray] = {}

    def trunk(self, model: str) -> Trunk:
        return ensure_trunk(
            self._registry, model, hf_models=(), threads=1, max_pixels=25_000_000,
            on_export=lambda: None,
        )  # fmt: skip

    def compute(self, trunk: Trunk, items: Any) -> FloatArray:
        return extract(trunk, items, threads=self._threads, on_progress=lambda *_: None)

    def features(self, model: str, items: list[Any]) -> FloatArray:
        new = [item for item in dict.fromkeys(items) if (model, item) not in self._known]
        rows = self.compute(self.trunk(model), new)
        self._known |= {(model, item): row for item, row in zip(new, rows, strict=True)}
        return np.stack([self._known[model, item] for item in items])


def compare(bench: Bench, name: str, data: Path, seeds: list[int]) -> None:
    """Print a line for a set: each backbone's test accuracy, and what `auto` takes."""
    accuracies: dict[str, list[float]] = {}
    picks: Counter[str] = Counter()
    regrets = []
    for seed in seeds:
        split = DataSet.parse(name).draw(data, seed)
        train = dataset(split)
        classes = train.manifest.classes
        tests = [item for item, _ in split.test]
        truth = np.array([classes.index(label) for _, label in split.test])
        models = candidates(split.modality, ())
        found = {}
        for model in models:
            features = bench.features(model, list(train.items))
            fitted = fit(features, train.targets(classes, param=""), len(classes), seed=seed)
            answers = fitted.head.predict(bench.features(model, tests)).argmax(axis=1)
            found[model] = float((answers == truth).mean())
            accuracies.setdefault(model, []).append(found[model])
        choice = choose_backbone(
            models, lambda model, rows: bench.features(model, list(rows.items)), train, seed
        )
        picks[choice.model] += 1
        regrets.append(max(found.values()) - found[choice.model])
    shown = ", ".join(f"`{model}` {spread(values)}" for model, values in accuracies.items())
    taken = ", ".join(f"`{model}` {times} of {len(seeds)}" for model, times in picks.items())
    print(f"| {name} | {shown} | {taken} | {statistics.mean(regrets):.3f} |", flush=True)


def time_features(bench: Bench, modality: Modality, data: Path, rounds: int) -> None:
    """Print rows a second of each backbone, and its time against the default's in each round."""
    split = DataSet.parse(TIMED[modality]).draw(data, 0)
    items = [item for item, _ in split.train][: TIMED_ROWS[modality]]
    models = candidates(modality, ())
    trunks = {model: bench.trunk(model) for model in models}
    seconds: dict[str, list[float]] = {model: [] for model in models}
    for _ in range(rounds):
        for model in models:
            began = time.perf_counter()
            bench.compute(trunks[model], items)
            seconds[model].append(time.perf_counter() - began)
    for model in models:
        shares = [
            mine / last for mine, last in zip(seconds[model], seconds[models[-1]], strict=True)
        ]
        rate = len(items) / statistics.median(seconds[model])
        print(f"| `{model}` | {rate:.0f} | {statistics.median(shares):.3f} |", flush=True)


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def dataset(split: Split) -> Dataset:
    """The training rows, as they come out of a processed file."""
    labels = [label for _, label in split.train]
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    manifest = DatasetManifest(modality=split.modality, rows=len(labels), counts=counts, sha256="")
    return Dataset("file-1", manifest, [item for item, _ in split.train], labels)


def main() -> None:
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.threads)
        print("| backbone | rows a second | time / the default's |\n|---|---|---|")
        for modality in Modality:
            time_features(bench, modality, options.data, options.rounds)
        print("\n| set | frozen head, test accuracy | `auto` takes | regret |\n|---|---|---|---|")
        for name in options.sets:
            compare(bench, name, options.data, options.seeds)


if __name__ == "__main__":
    main()
