"""The quality gate: is a version good enough to be released? Asked before it is published.

`min_accuracy` is a floor for the held-out accuracy. `min_improvement_over_current` compares with
the version that production names now, on the same held-out rows: its own head, on the same features
where it shares the trunk and through its own trunk where not. Rows that the current version was
fitted on would flatter it, so they are left out. In a second job on the same file none are left:
then both have been cross-validated on the same rows, and the accuracy that the current version
recorded stands in. Where neither is possible the gate stays shut, and says what to do.

What the numbers decide is in `training.pipeline`: the version is kept, and released only if the
gate lets it pass (docs/decisions/0013).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from core.errors import DataError, NotFound
from core.files import FileStore
from core.head import Head
from core.identifiers import ModelReference
from core.jobs import QualityGate
from core.manifests import GateBasis, GateOutcome, ModelManifest
from core.preprocessing import FloatArray
from core.registry import Registry
from training.data import read_dataset
from training.duplicates import content_key
from training.lineage import files_of

MIN_FRESH_ROWS = 20
"""Fewer rows that the current version has not seen say less than the accuracy it recorded."""

Items = Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class HeldOut:
    """The rows that a new version was judged on, and its answers; `features` are by its `trunk`.

    `dataset` is the hash of the training data if the rows are those, each answered out of fold.
    """

    items: Items
    features: FloatArray
    trunk: str
    labels: Sequence[str]
    answers: Sequence[str]
    dataset: str | None


@dataclass(frozen=True)
class Comparison:
    """The accuracy of the version in production and of the new one on the rows of `basis`.

    Without a basis there is nothing that both were judged on fairly.
    """

    current: str
    current_accuracy: float | None
    new_accuracy: float
    basis: GateBasis | None
    rows: int


def judge(gate: QualityGate, accuracy: float, comparison: Comparison | None) -> GateOutcome:
    """Return what the gate says; without a current version, none has to be improved on."""
    reasons = []
    if gate.min_accuracy is not None and accuracy < gate.min_accuracy:
        reasons.append(f"accuracy {accuracy:.3f} is below min_accuracy {gate.min_accuracy:g}")
    wanted = gate.min_improvement_over_current
    improvement = None
    if comparison is not None and wanted is not None:
        if comparison.current_accuracy is None:
            reasons.append(
                f"every row at hand is one that {comparison.current} was fitted on, so the two "
                "cannot be compared: give a validation_file that neither was fitted on"
            )
        else:
            improvement = comparison.new_accuracy - comparison.current_accuracy
            # Rates that differ by a whole number of rows must not fail by rounding.
            if improvement < wanted - 1e-9:
                reasons.append(
                    f"accuracy changes by {improvement:+.3f} against {comparison.current}, "
                    f"below min_improvement_over_current {wanted:g}"
                )
    return GateOutcome(
        passed=not reasons,
        reasons=tuple(reasons),
        min_accuracy=gate.min_accuracy,
        accuracy=accuracy,
        min_improvement_over_current=wanted,
        improvement=improvement,
        current=comparison.current if comparison else None,
        current_accuracy=comparison.current_accuracy if comparison else None,
        basis=comparison.basis if comparison else None,
        rows=comparison.rows if comparison else 0,
    )


def compare_with_current(
    registry: Registry,
    files: FileStore,
    tenant: str,
    name: str,
    held_out: HeldOut,
    load: Callable[[ModelManifest], tuple[Head, FloatArray]],
    contents: Mapping[str, set[bytes]] | None = None,
) -> Comparison | None:
    """Judge the version that production names on the same rows; None if it names none.

    `load` gives another version's head, and the held-out items' features as that version sees them:
    on another trunk, or with deltas. `contents` is what has been read of files already
    (training.lineage).
    """
    try:
        current = registry.resolve(tenant, ModelReference(name))
    except NotFound:
        return None
    right = np.array(
        [said == label for said, label in zip(held_out.answers, held_out.labels, strict=True)]
    )
    seen = _content_of(files, current, contents or {})
    fresh = np.array([content_key(item) not in seen for item in held_out.items])
    if fresh.sum() < MIN_FRESH_ROWS:
        is_alike = (
            held_out.dataset is not None
            and current.dataset.sha256 == held_out.dataset
            and current.training.get("validation_file") is None
        )
        return Comparison(
            current=current.reference,
            current_accuracy=current.metrics["accuracy"] if is_alike else None,
            new_accuracy=float(right.mean()),
            basis="recorded" if is_alike else None,
            rows=len(right),
        )
    if current.kind == "linear" and current.trunk == held_out.trunk:
        head, features = Head.load(registry, current), held_out.features
    else:
        head, features = load(current)
    answers = head.predict(features[fresh]).argmax(axis=1)
    truth = np.asarray(held_out.labels, object)[fresh]
    old_right = np.asarray(current.labels, object)[answers] == truth
    return Comparison(
        current=current.reference,
        current_accuracy=float(old_right.mean()),
        new_accuracy=float(right[fresh].mean()),
        basis="same_rows",
        rows=int(fresh.sum()),
    )


def _content_of(
    files: FileStore, model: ModelManifest, contents: Mapping[str, set[bytes]]
) -> set[bytes]:
    """Return what a version was fitted on, as far as its files have not been deleted since."""
    seen: set[bytes] = set()
    for file in files_of(model):
        if file in contents:
            seen |= contents[file]
            continue
        with suppress(DataError, NotFound):
            dataset = read_dataset(files, file, param="training_file")
            seen |= {content_key(item) for item in dataset.items}
    return seen
