"""Is the report right on real data: calibration on test rows, flipped labels found, seconds taken.

    python bench/reports.py --data ../shared/data [--draws 5]

Features of Banking77 are computed once with MiniLM; then every figure comes from the modules that
jobs use. Exits with an error if a figure misses its target: ECE at most 0.03 on all rows and 0.06
on 10 per class; of 10 % flipped labels of all rows at least 60 % flagged, at a precision of at
least 50 %. With 10 rows per class flips are printed only: there the model itself errs as often.
Seconds are of this machine now; the share of a job is what to compare.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.datasets import Modality
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from training.assessment import assess
from training.calibration import quality
from training.data_report import RowSet, inspect_data
from training.features import extract
from training.fit import Fit, fit
from training.investigation import investigate
from training.label_errors import find_label_errors
from training.trunks import ensure_trunk

MAX_ECE = {"full": 0.03, "10 per class": 0.06}
MIN_RECALL, MIN_PRECISION = 0.6, 0.5
FLIPPED = 0.1


@dataclass(frozen=True)
class Part:
    """Rows of one file, and the index of each row's class."""

    rows: RowSet
    targets: np.ndarray

    def take(self, numbers: np.ndarray) -> Part:
        """Some of the rows."""
        rows = self.rows
        chosen = RowSet(
            [rows.items[n] for n in numbers],
            rows.features[numbers],
            [rows.labels[n] for n in numbers],
        )
        return Part(chosen, self.targets[numbers])


def read(path: Path, trunk: Trunk, classes: list[str]) -> tuple[Part, float]:
    """Return a Banking77 file with its features, and the seconds that they took."""
    with path.open(newline="", encoding="utf-8") as lines:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(lines)]
    classes += sorted({label for _, label in rows} - set(classes))
    texts = [text for text, _ in rows]
    begun = time.perf_counter()
    features = extract(
        trunk, texts, threads=torch.get_num_threads(), on_progress=lambda done, total: None
    )
    seconds = time.perf_counter() - begun
    targets = np.array([classes.index(label) for _, label in rows])
    return Part(RowSet(texts, features, [label for _, label in rows]), targets), seconds


def calibrated(name: str, part: Part, test: Part, labels: list[str]) -> tuple[bool, Fit, float]:
    """Print the ECE on test rows; return whether it is on target, the fit, and its seconds."""
    begun = time.perf_counter()
    fitted = fit(part.rows.features, part.targets, len(labels), seed=0)
    seconds = time.perf_counter() - begun
    head = assess(fitted, part.targets, labels, None).head
    before = quality(fitted.head.predict(test.rows.features), test.targets)
    after = quality(head.predict(test.rows.features), test.targets)
    print(
        f"{name}: ECE {before.ece:.4f} -> {after.ece:.4f}, NLL {before.nll:.4f} -> {after.nll:.4f}"
    )
    return after.ece <= MAX_ECE[name], fitted, seconds


def flips_found(name: str, part: Part, classes: int, seed: int) -> bool:
    """Flip labels at random, print what is flagged, and return whether it is on target."""
    numbers = np.random.default_rng(seed)
    count = len(part.targets)
    flipped = numbers.random(count) < FLIPPED
    given = np.where(
        flipped, (part.targets + numbers.integers(1, classes, count)) % classes, part.targets
    )
    fitted = fit(part.rows.features, given, classes, seed=0)
    doubts = find_label_errors(fitted.out_of_fold, given)
    hits = sum(bool(flipped[doubt.row]) for doubt in doubts)
    recall, precision = hits / flipped.sum(), hits / max(len(doubts), 1)
    print(
        f"{name}: {flipped.sum()} labels flipped, found {recall:.3f} at precision {precision:.3f}"
    )
    return bool(recall >= MIN_RECALL and precision >= MIN_PRECISION)


def report_seconds(part: Part, fitted: Fit, labels: list[str], trunk: Trunk) -> float:
    """Return the seconds that the data report, baselines and learning curve take."""
    begun = time.perf_counter()
    inspect_data(part.rows, part.targets, None, trunk)
    assessment = assess(fitted, part.targets, labels, None)
    investigate(
        Modality.TEXT, part.rows, part.targets, None, fitted, assessment,
        classes=len(labels), seed=0,
    )  # fmt: skip
    return time.perf_counter() - begun


def main() -> None:
    """Run everything; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    labels: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        trunk = ensure_trunk(
            Registry(ArtifactStore(folder)), "minilm", hf_models=(), threads=1, max_pixels=1,
            on_export=lambda: None,
        )  # fmt: skip
    train, extraction = read(options.data / "banking77" / "train.csv", trunk, labels)
    test, _ = read(options.data / "banking77" / "test.csv", trunk, labels)
    passed, fitted, fitting = calibrated("full", train, test, labels)
    seconds = report_seconds(train, fitted, labels, trunk)
    share = seconds / (extraction + fitting)
    print(f"full: report {seconds:.1f} s, {share:.1%} of features and fit")
    results = [passed, flips_found("full", train, len(labels), seed=0)]
    for draw in range(options.draws):
        numbers = np.random.default_rng(draw)
        few = np.concatenate(
            [
                numbers.permutation(np.flatnonzero(train.targets == c))[:10]
                for c in range(len(labels))
            ]
        )
        part = train.take(few)
        passed, fitted, fitting = calibrated("10 per class", part, test, labels)
        seconds = report_seconds(part, fitted, labels, trunk)
        print(f"10 per class: report {seconds:.2f} s, fit {fitting:.2f} s")
        results.append(passed)
        flips_found("10 per class", part, len(labels), draw)
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
