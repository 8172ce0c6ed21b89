"""Why a model answered as it did, by occlusion (Zeiler & Fergus 2014, arXiv 1311.2901).

A part of the input is taken away, and the weight of the part is by how much the probability of the
answer's label falls. It asks the served model itself and nothing about its graph, so it is true of
any trunk; it costs one more row of computing for each part. A text's parts are its words, or runs
of words where there are many; an image's are the squares of a grid over the crop that the model
sees. Parts are taken away one at a time, so two words that each suffice have little weight each.

Not here: computing the rows (service.predictor).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.preprocessing import Prepared, PreparedImage

MAX_PARTS = 32
GRID = 4
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Part:
    """A part of a text, `[start, end)` in characters, or of an image, in fractions of the crop."""

    span: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Weight:
    """By how much the label's probability falls without the part; negative if it rises."""

    part: Part
    weight: float


def occlude_text(text: str, prepare: Callable[[str], Prepared]) -> list[tuple[Part, Prepared]]:
    """Return each part with the text prepared without it; none for a text of one word."""
    words = [match.span() for match in _WORD.finditer(text)]
    groups = np.array_split(np.arange(len(words)), min(len(words), MAX_PARTS))
    spans = [(words[group[0]][0], words[group[-1]][1]) for group in groups if len(group)]
    if len(spans) < 2:
        return []
    return [(Part(span=(start, end)), prepare(text[:start] + text[end:])) for start, end in spans]


def occlude_image(image: PreparedImage) -> list[tuple[Part, Prepared]]:
    """Return each square of the grid with the image that is grey there."""
    height, width = image.pixels.shape[1:]
    found: list[tuple[Part, Prepared]] = []
    for row in range(GRID):
        for column in range(GRID):
            pixels = image.pixels.copy()
            top, bottom = row * height // GRID, (row + 1) * height // GRID
            left, right = column * width // GRID, (column + 1) * width // GRID
            pixels[:, top:bottom, left:right] = 0  # normalised: the mean of the channel
            box = (column / GRID, row / GRID, (column + 1) / GRID, (row + 1) / GRID)
            found.append((Part(box=box), PreparedImage(pixels)))
    return found
