"""What a spare child does while it waits for its job: what every job would do first.

The first fit of a process costs as much as ten others, for torch imports its compiler then, and
loading a trunk as much as a small job's features. Both are done here, the trunk being the one that
the last job used: the next is likely to want the same, and if not, has lost nothing but memory,
which is bounded. A job that comes early waits for what it would have had to do itself.

Nothing is decided here: that the trunk is the one that a job means, its content's digest tells when
the job comes (training.trunks).
"""

from __future__ import annotations

import logging

import numpy as np

from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk
from training.fit import fit
from training.trunks import load_known

logger = logging.getLogger("graft.worker")

MAX_TRUNK_BYTES = 256 << 20


def warm_up(settings: Settings, model: str | None) -> Trunk | None:
    """Return the fp32 trunk of `model` if the store has it, not too large; never raises."""
    try:
        rows = np.eye(8, dtype=np.float32)
        fit(rows, np.arange(8) % 2, 2, seed=0)
        if model is None:
            return None
        registry = Registry(ArtifactStore(settings.store_url))
        return load_known(
            registry, model, hf_models=settings.hf_models, threads=1,
            max_pixels=settings.max_pixels, max_bytes=MAX_TRUNK_BYTES,
        )  # fmt: skip
    except Exception:
        # Whatever it is, the job will meet it too, and can tell.
        logger.exception("a spare child is not warm")
        return None
