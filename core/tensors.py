"""Arrays as safetensors, which hold no code and are read at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save


def write_tensors(
    arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> bytes:
    """Return arrays, by name, as a safetensors file; `safetensors.numpy.load` reads it.

    The library writes what lies in memory, whatever the strides say, so all are laid out first.
    """
    laid_out: dict[str, Any] = {name: np.ascontiguousarray(each) for name, each in arrays.items()}
    data: bytes = save(laid_out, metadata)
    return data
