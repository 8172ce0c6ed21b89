"""How unlike a model's training rows an input is, from features that are computed anyway.

The distance of a row is to the nearest class mean, each feature measured in the spread that it has
within classes: the Mahalanobis distance of Lee et al. (2018, arXiv 1807.03888) with a diagonal
covariance, which a few hundred rows suffice for. What a distance means is learned from rows that
were held out: the score is the part of them that were nearer. So 0.5 is an ordinary row, and of
rows like those trained on one in a hundred has more than 0.99.

Not here: estimating it (training.novelty).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from core.errors import Conflict
from core.preprocessing import FloatArray
from core.tensors import write_tensors

NOVELTY_FILE = "novelty.safetensors"
QUANTILES = 201


@dataclass(frozen=True)
class Novelty:
    """Means [classes, dim] in units of the spread, as float16; `scale` [dim] is 1 / spread.

    `quantiles` [QUANTILES] are of the squared distances of held-out rows, ascending.
    """

    means: npt.NDArray[np.float16]
    scale: FloatArray
    quantiles: FloatArray

    @classmethod
    def read(cls, data: bytes, classes: int, dim: int) -> Novelty:
        """Read what `write` gave; raise `Conflict` if it is not of so many classes and features."""
        arrays = load(data)
        found = cls(arrays["means"], arrays["scale"], arrays["quantiles"])
        shapes = found.means.shape, found.scale.shape, found.quantiles.shape
        values = (found.means, found.scale, found.quantiles)
        if shapes != ((classes, dim), (dim,), (QUANTILES,)) or not all(
            np.isfinite(each).all() for each in values
        ):
            raise Conflict("the novelty statistics are not of this model")
        return found

    def write(self) -> bytes:
        """Return `novelty.safetensors`."""
        return write_tensors(
            {"means": self.means, "scale": self.scale, "quantiles": self.quantiles}
        )

    @cached_property
    def _squares(self) -> FloatArray:
        """Squared lengths of the means, [classes]."""
        squares: FloatArray = np.square(self.means, dtype=np.float32).sum(axis=1)
        return squares

    @property
    def bytes(self) -> int:
        """What the arrays take."""
        return self.means.nbytes + self.scale.nbytes + self.quantiles.nbytes

    def score(self, features: FloatArray) -> FloatArray:
        """Return how novel rows [n, dim] are, float32 [n] in 0..1."""
        means = self.means.astype(np.float32)
        distances = nearest(features * self.scale, means, self._squares)
        scores: FloatArray = np.interp(
            distances, self.quantiles, np.linspace(0, 1, QUANTILES)
        ).astype(np.float32)
        return scores


def nearest(rows: FloatArray, means: FloatArray, squares: FloatArray | None = None) -> FloatArray:
    """Return the squared distance [n] of rows [n, dim] to the nearest of the means [m, dim].

    `squares` [m] are the squared lengths of the means, if they are known.
    """
    if squares is None:
        squares = np.square(means).sum(axis=1)
    least = (squares - 2 * (rows @ means.T)).min(axis=1)
    distances: FloatArray = np.maximum(least + np.square(rows).sum(axis=1), 0)
    return distances
