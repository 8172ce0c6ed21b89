"""Rows that are there twice: the same bytes, or so near in feature space that it makes no odds.

Texts are the same if they differ in case and white space only. Nearness is the cosine of centred
features (uncentred, all images of some backbones point one way); the thresholds are where, on real
data, pairs stop being one thing written or photographed twice. Products are computed in blocks of
rows, and of each row only its best match is kept, so memory stays bounded even if all are alike.

Not here: what a report makes of it (training.data_report), the folds in which copies stay together
(training.fit).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.datasets import Modality
from core.preprocessing import FloatArray

IntArray = npt.NDArray[np.int64]
NEAR = {Modality.TEXT: 0.97, Modality.IMAGE: 0.9}
MAX_COMPARED = 15_000
"""Rows that are compared with each other; of more, as many are taken at even steps."""

_BLOCK = 1024


class Match(NamedTuple):
    """A row, the row that it resembles, by what cosine, and whether the content is the same."""

    row: int
    other: int
    similarity: float
    is_exact: bool = False


def content_key(item: str | bytes) -> bytes:
    """Return what two rows have in common if and only if their content is the same."""
    data = " ".join(item.split()).casefold().encode() if isinstance(item, str) else item
    return hashlib.blake2b(data, digest_size=16).digest()


def repeats(keys: Sequence[bytes], earlier: Sequence[bytes] | None = None) -> list[Match]:
    """Return each row whose content an earlier row, or any row of `earlier`, has, and the first."""
    first: dict[bytes, int] = {}
    for row, key in enumerate(earlier or ()):
        first.setdefault(key, row)
    found = []
    for row, key in enumerate(keys):
        other = first.get(key)
        if other is not None:
            found.append(Match(row, other, 1.0, is_exact=True))
        elif earlier is None:
            first[key] = row
    return found


def twins(items: Sequence[str] | Sequence[bytes]) -> IntArray:
    """Return for each row the first one with the same content, [n]; itself if there is none."""
    first = np.arange(len(items))
    for match in repeats([content_key(item) for item in items]):
        first[match.row] = match.other
    return first


def with_near(
    twins: IntArray, near: Sequence[Match], units: FloatArray, least: float, groups: IntArray,
    most: IntArray,
) -> IntArray:  # fmt: skip
    """Return `twins` [n] in which near repeats, by row, follow the first one that they resemble.

    It is of the same of `groups` [n]: rows of two classes that are all but the same are not told
    apart by the backbone, and whoever learns from one does worse on the other. All rows of a group
    are nearly the first one: of a chain of rows, each like the next, the far end is in another. A
    group of more than `most` [n] rows, as its first row has it, is none: so many alike are not
    copies either.
    """
    first = twins.copy()
    for match in near:
        leader = first[match.other]
        is_alike = units[match.row] @ units[leader] >= least
        if is_alike and groups[match.row] == groups[leader]:
            first[match.row] = leader
    first = first[first]
    too_large = (np.bincount(first, minlength=len(first)) > most)[first]
    found: IntArray = np.where(too_large, twins, first)
    return found


def unit_rows(features: FloatArray, centre: FloatArray) -> FloatArray:
    """Return centred features of length 1, float32 [n, dim]; a row at the centre stays zero."""
    moved = features - centre
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    scaled: FloatArray = moved / np.maximum(lengths, np.float32(1e-12))
    return scaled


def near_repeats(units: FloatArray, threshold: float) -> list[Match]:
    """Return each row of `units` with the nearest earlier one, if that is near enough."""
    found: list[Match] = []
    for begin in range(0, len(units), _BLOCK):
        block = units[begin : begin + _BLOCK]
        cosines = block @ units[: begin + len(block)].T
        # Of the block's own rows only those before each row count.
        cosines[:, begin:] = np.tril(cosines[:, begin:], -1)
        found += _above(cosines, threshold, begin)
    return found


def near_matches(units: FloatArray, earlier: FloatArray, threshold: float) -> list[Match]:
    """Return each row of `units` with the nearest of the rows `earlier`, if that is near enough."""
    found: list[Match] = []
    for begin in range(0, len(units), _BLOCK):
        found += _above(units[begin : begin + _BLOCK] @ earlier.T, threshold, begin)
    return found


def sample_rows(rows: int) -> np.ndarray:
    """Return the numbers of the rows to compare: all, or `MAX_COMPARED` at even steps."""
    if rows <= MAX_COMPARED:
        return np.arange(rows)
    return np.linspace(0, rows - 1, MAX_COMPARED).astype(np.int64)


def _above(cosines: FloatArray, threshold: float, begin: int) -> list[Match]:
    best = cosines.argmax(axis=1)
    values = cosines[np.arange(len(best)), best]
    return [
        Match(begin + int(n), int(best[n]), min(1.0, float(values[n])))
        for n in np.flatnonzero(values >= threshold)
    ]
