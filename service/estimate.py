"""How long a fine-tune job will take and how much memory, before anything is computed.

These are estimates from the size of the data and the costs below, measured on 2 shared cores with
two threads (docs/decisions/0008 says how features are computed and a head is fitted). They leave
out the wait for a worker, and the export of a trunk that a store has not seen.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from core.datasets import DatasetManifest, Modality
from core.jobs import Json

START_SECONDS = 1.0
"""Claim, reading the data, loading the trunk."""
FINISH_SECONDS = 0.5
"""Export, checks, publishing."""
TEXT_ROW_SECONDS = 1.5e-3
"""A short text through MiniLM: 1.2 ms were measured for 11 words."""
TOKEN_SECONDS = 0.1e-3
"""Each token of a longer one: 4.7 ms were measured for 50 words, 20 ms for 200."""
BYTES_PER_TOKEN = 5
MAX_TOKENS = 256
IMAGE_SECONDS = 7.5e-3
"""A 640×480 JPEG, decoded, resized and through EfficientNet-Lite0: 7.3 ms, 13.8 ms of CPU."""
FIT_SECONDS = 1.0
FIT_CELL_SECONDS = 3e-8
"""For each row × feature × class, over all folds and strengths: 2e-8 to 6e-8 were measured."""

CHILD_BYTES = 310_000_000
"""A child process that has imported torch."""
TRUNK_BYTES = {Modality.TEXT: 240_000_000, Modality.IMAGE: 180_000_000}
"""What a loaded trunk and its largest batches add."""
FEATURE_COPIES = 8
"""The features, scaled, and once more in the folds."""
ITEM_COPIES = 2
"""The rows as stored, and as read."""


@dataclass(frozen=True)
class Estimate:
    """Seconds from the claim to the published version, and peak bytes of the job's process."""

    seconds: float
    features_seconds: float
    fit_seconds: float
    memory_bytes: int

    def as_json(self) -> Json:
        """Return it as an answer shows it."""
        return asdict(self)


def estimate(
    train: DatasetManifest, held_out: DatasetManifest | None, dim: int, stored_bytes: int,
    row_cost: float = 1.0,
) -> Estimate:  # fmt: skip
    """Estimate a job on `train`, features of width `dim`; `stored_bytes` is of all its uploads.

    `row_cost` is the backbone's: what follows below was measured with the default ones.
    """
    rows = train.rows + (held_out.rows if held_out else 0)
    features = rows * row_cost * _row_seconds(train.modality, stored_bytes / rows)
    fit = FIT_SECONDS + FIT_CELL_SECONDS * train.rows * dim * len(train.counts)
    floats = 4 * rows * dim * FEATURE_COPIES
    memory = CHILD_BYTES + TRUNK_BYTES[train.modality] + floats + ITEM_COPIES * stored_bytes
    return Estimate(
        seconds=_rounded(START_SECONDS + features + fit + FINISH_SECONDS),
        features_seconds=_rounded(features),
        fit_seconds=_rounded(fit),
        memory_bytes=memory,
    )


def _row_seconds(modality: Modality, bytes_per_row: float) -> float:
    if modality is Modality.IMAGE:
        return IMAGE_SECONDS
    tokens = min(MAX_TOKENS, math.ceil(bytes_per_row / BYTES_PER_TOKEN))
    return max(TEXT_ROW_SECONDS, TOKEN_SECONDS * tokens)


def _rounded(seconds: float) -> float:
    """Two digits are all that an estimate knows."""
    return float(f"{seconds:.2g}")
