"""The quality gate: is a version good enough to be released? Asked before it is published.

`min_accuracy` is a floor for the held-out accuracy. `min_improvement_over_current` compares with
the version that production names now, on the same held-out rows: its own head, on the same features
where it shares the trunk and through its own trunk where not. Rows that the current version was
fitted on would flatter it, so they are left out; where all of them are such rows, as in a second
job on the same file, the accuracy it recorded when it was made, on rows it had not seen, stands in.

What the numbers decide is in `training.pipeline`: the version is kept, and released only if the
gate lets it pass (docs/decisions/0013).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from core.errors import Conflict, GraftError, NotFound
from core.files import FileStore
from core.identifiers import ModelReference
from core.jobs import QualityGate
from core.manifests import GateOutcome, ModelManifest
from core.preprocessing import FloatArray
from core.registry import Registry
from core.trunk import create_session
from training.data import read_dataset
from training.duplicates import content_key
from training.fit import IntArray

MIN_FRESH_ROWS = 20
"""Fewer rows that the current version has not seen say less than the accuracy it recorded."""

Items = Sequence[str] | Sequence[bytes]
BoolArray = npt.NDArray[np.bool_]


def judge(
    gate: QualityGate, accuracy: float, current: str | None, current_accuracy: float | None,
    new_accuracy: float, basis: str | None,
) -> GateOutcome:  # fmt: skip
    """Return what the gate says. `new_accuracy` is of the rows that `current_accuracy` is of."""
    reasons = []
    if gate.min_accuracy is not None and accuracy < gate.min_accuracy:
        reasons.append(f"accuracy {accuracy:.3f} is below min_accuracy {gate.min_accuracy:g}")
    improvement = None if current_accuracy is None else new_accuracy - current_accuracy
    wanted = gate.min_improvement_over_current
    # Two rates of the same rows that differ by a whole number of rows must not fail by rounding.
    if wanted is not None and improvement is not None and improvement < wanted - 1e-9:
        reasons.append(
            f"accuracy changes by {improvement:+.3f} against {current}, "
            f"less than min_improvement_over_current {wanted:g}"
        )
    return GateOutcome(
        passed=not reasons,
        reasons=tuple(reasons),
        min_accuracy=gate.min_accuracy,
        min_improvement_over_current=wanted,
        accuracy=accuracy,
        current=current,
        current_accuracy=current_accuracy,
        improvement=improvement,
        basis=basis,
    )
