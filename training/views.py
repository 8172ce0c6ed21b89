"""Items to cached activations: each row's, and for images those of a few augmented views.

An epoch shows one of an image's views, drawn anew each time. They are made once: plain, mirrored,
and two crops of 60 to 90 % of the area, one of them mirrored, so augmentation costs nothing in an
epoch. A text has one view. Texts of one length are run together.

Not here: running the blocks (training.activations), mix-up (training.tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.datasets import Modality
from core.preprocessing import Prepared, PreparedImage, Preprocessor, TextPreprocessor
from training.activations import capture
from training.backbones import TorchBackbone
from training.data import Targets
from training.tuning import CachedRows

IMAGE_VIEWS = 4
TOKENS_PER_BATCH = 512
IMAGES_PER_BATCH = 4
MAX_BYTES = 1 << 30
"""Activations that are kept; above it images have one view, and then a cut is not for this job."""

_LEAST_AREA, _MOST_AREA = 0.6, 0.9


def cache(
    backbone: TorchBackbone, preprocessor: Preprocessor, items: Sequence[str] | Sequence[bytes],
    targets: Targets, cut: int, *, seed: int, check: Callable[[], None],
    max_bytes: int = MAX_BYTES,
) -> CachedRows | None:  # fmt: skip
    """Return the activations of items at a cut, or None if they take more than `max_bytes`.

    `check` is called between batches.
    """
    found: list[list[Tensor]] = [[] for _ in items]
    views = view_count(backbone.modality)
    taken = 0
    for indices, rows in _batches(preprocessor, items):
        check()
        for view in range(views):
            seen = [
                augment(row, view, np.random.default_rng((seed, index, view)))
                for index, row in zip(indices, rows, strict=True)
            ]
            for index, hidden in zip(indices, capture(backbone, cut, seen), strict=True):
                found[index].append(hidden)
                taken += hidden.nbytes
        if isinstance(preprocessor, TextPreprocessor):
            too_much = taken > max_bytes
        else:
            # All images are of one size, so the first batch tells.
            each = found[indices[0]][0].nbytes * len(items)
            views = views if each * views <= max_bytes else 1
            too_much = each > max_bytes
        if too_much:
            return None
    return CachedRows([row[:views] for row in found], targets)


def view_count(modality: Modality) -> int:
    """Return how many views a row has at most."""
    return IMAGE_VIEWS if modality is Modality.IMAGE else 1


def _batches(
    preprocessor: Preprocessor, items: Sequence[str] | Sequence[bytes]
) -> Iterator[tuple[list[int], list[Prepared]]]:
    if not isinstance(preprocessor, TextPreprocessor):
        for start in range(0, len(items), IMAGES_PER_BATCH):
            indices = list(range(start, min(start + IMAGES_PER_BATCH, len(items))))
            yield indices, [preprocessor.prepare(cast(bytes, items[index])) for index in indices]
        return
    prepared = preprocessor.prepare_many(list(cast("Sequence[str]", items)))
    group: list[int] = []
    for index in sorted(range(len(items)), key=lambda index: prepared[index].cost):
        if group and prepared[index].cost * (len(group) + 1) > TOKENS_PER_BATCH:
            yield group, [prepared[i] for i in group]
            group = []
        group.append(index)
    if group:
        yield group, [prepared[i] for i in group]


def augment(row: Prepared, view: int, numbers: np.random.Generator) -> Prepared:
    """Return one view of a row, with `numbers` for what it draws; view 0 is the row as it is."""
    if view == 0 or not isinstance(row, PreparedImage):
        return row
    pixels = torch.from_numpy(row.pixels)
    if view >= 2:
        height, width = pixels.shape[1:]
        side = float(np.sqrt(numbers.uniform(_LEAST_AREA, _MOST_AREA)))
        tall, wide = round(height * side), round(width * side)
        top, left = numbers.integers(height - tall + 1), numbers.integers(width - wide + 1)
        part = pixels[None, :, top : top + tall, left : left + wide]
        pixels = functional.interpolate(
            part, (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    if view % 2:
        pixels = pixels.flip(2)
    return PreparedImage(np.ascontiguousarray(pixels.numpy()))
