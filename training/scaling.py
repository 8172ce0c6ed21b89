"""Features as fits take them: centred, divided by one number, and turned to the axes they vary in.

One divisor makes the mean squared length of a row 1, so that an L2 strength means the same for unit
vectors of text and for unbounded image features. (Dividing each feature by its own deviation was no
better on text and worse on images; docs/decisions/0008.) Turning changes no optimum, for the
penalty is the same in all directions, but says how far rows reach in each (training.convex); those
in which they do not vary, as most do not when there are fewer rows than features, are left out.
Both are folded back into the head, which is a plain affine map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.preprocessing import FloatArray

_NEGLIGIBLE = 1e-6
"""Share of the largest variance below which a direction says nothing."""


@dataclass(frozen=True)
class Scaling:
    """Centre, and one divisor for all features."""

    mean: npt.NDArray[np.float64]
    divisor: float

    @classmethod
    def of(cls, features: FloatArray) -> Scaling:
        """Return the scaling under which features [n, dim] have a mean squared length of 1."""
        mean = features.mean(axis=0, dtype=np.float64)
        length = float(np.sqrt(np.square(features - mean).sum(axis=1).mean()))
        return cls(mean, length or 1.0)

    def apply(self, features: FloatArray) -> Tensor:
        """Return scaled features."""
        return torch.from_numpy(((features - self.mean) / self.divisor).astype(np.float32))

    def unscaled(self, solution: Tensor) -> tuple[FloatArray, FloatArray]:
        """Return weight and bias that do to features what `solution` does to scaled ones."""
        values = solution.double().numpy()
        weight = values[:-1] / self.divisor
        bias = values[-1] - self.mean @ weight
        return weight.astype(np.float32), bias.astype(np.float32)


@dataclass(frozen=True)
class Axes:
    """A scaling, and the directions [dim, rank] that rows vary in, by `variances` [rank]."""

    scaling: Scaling
    directions: Tensor
    variances: Tensor

    @classmethod
    def of(cls, features: FloatArray) -> Axes:
        """Return the axes of features [n, dim]; run it on one thread for the same bits anywhere."""
        scaling = Scaling.of(features)
        rows = scaling.apply(features)
        count, dim = rows.shape
        if count < dim:
            few = rows.double()
            variances, places = torch.linalg.eigh(few @ few.T / count)
            directions = few.T @ places / (count * variances.clamp(min=1e-30)).sqrt()
        else:
            variances, directions = torch.linalg.eigh((rows.T @ rows / count).double())
        kept = variances > _NEGLIGIBLE * variances[-1]
        return cls(scaling, directions[:, kept].float(), variances[kept].float())

    def apply(self, features: FloatArray) -> Tensor:
        """Return features along the axes, [n, rank]."""
        return self.scaling.apply(features) @ self.directions

    def unscaled(self, solution: Tensor) -> tuple[FloatArray, FloatArray]:
        """Return weight and bias that do to features what `solution` does along the axes."""
        return self.scaling.unscaled(torch.cat([self.directions @ solution[:-1], solution[-1:]]))
