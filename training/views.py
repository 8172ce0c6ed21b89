"""Items to cached activations: each row's, and for images those of a few augmented views.

An epoch shows one of an image's views, drawn anew each time. They are made once: plain, mirrored,
and two crops of 60 to 90 % of the area, one of them mirrored, so augmentation costs nothing in an
epoch. A text has one view. Texts of one length are run together.

They are kept in a file on the scratch disk that is mapped into memory: the system holds in memory
what there is room for, and nothing is rounded. `measure` says beforehand what they will take.

Not here: running the blocks (training.activations), mix-up (training.tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import cast

import numpy as np
import torch
from torch.nn import functional

from core.datasets import Modality
from core.preprocessing import Prepared, PreparedImage, Preprocessor, TextPreprocessor
from training import scratch_disk
from training.activations import capture
from training.backbones import TorchBackbone
from training.data import Targets
from training.tuning import CachedRows

IMAGE_VIEWS = 4
TOKENS_PER_BATCH = 512
IMAGES_PER_BATCH = 4
MAX_BYTES = 4 << 30
"""Of activations: 10,000 texts of 256 tokens in MiniLM."""

DISK_SHARE = 0.5
"""Of what is free on the scratch disk, which others write to as well."""

_LEAST_AREA, _MOST_AREA = 0.6, 0.9
_GIB = 1 << 30

Items = Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class Room:
    """What the rows take at a cut, one view of each, and what they may take."""

    bytes_needed: int
    bytes_allowed: int
    most_views: int

    @property
    def views(self) -> int:
        """How many views of each row there is room for; 0 if not even the rows as they are."""
        return min(self.most_views, self.bytes_allowed // self.bytes_needed)

    @property
    def shortage(self) -> str:
        """What does not fit, for people."""
        views = self.views + 1
        needed, allowed = views * self.bytes_needed / _GIB, self.bytes_allowed / _GIB
        what = f"{views} views of them take" if views > 1 else "they take"
        return f"{what} {needed:.3g} GiB at this cut, and they may take {allowed:.3g} GiB"


def measure(backbone: TorchBackbone, preprocessor: Preprocessor, items: Items, cut: int) -> Room:
    """Return what the activations of items at a cut will take: one row of them is run."""
    if isinstance(preprocessor, TextPreprocessor):
        texts = preprocessor.prepare_many(list(cast("Sequence[str]", items)))
        longest = max(texts, key=lambda text: text.cost)
        [hidden] = capture(backbone, cut, [longest])
        needed = hidden.nbytes // longest.cost * sum(text.cost for text in texts)
    else:
        # Images are of one size.
        [hidden] = capture(backbone, cut, [preprocessor.prepare(cast(bytes, items[0]))])
        needed = hidden.nbytes * len(items)
    free = int(DISK_SHARE * scratch_disk.free_bytes())
    return Room(needed, min(MAX_BYTES, free), view_count(backbone.modality))


def cache(
    backbone: TorchBackbone, preprocessor: Preprocessor, items: Items, targets: Targets, cut: int,
    *, views: int, seed: int, check: Callable[[], None],
) -> CachedRows:  # fmt: skip
    """Return the activations of items at a cut, with so many views of each.

    `check` is called between batches. Raises `NoSpace` if the scratch disk is full.
    """
    found: list[list[tuple[int, torch.Size]]] = [[] for _ in items]
    with scratch_disk.full_disk_errors(), TemporaryFile() as file:
        end = 0
        for indices, rows in _batches(preprocessor, items):
            check()
            for view in range(views):
                seen = [
                    augment(row, view, np.random.default_rng((seed, index, view)))
                    for index, row in zip(indices, rows, strict=True)
                ]
                for index, hidden in zip(indices, capture(backbone, cut, seen), strict=True):
                    file.write(hidden.contiguous().numpy().data)
                    found[index].append((end, hidden.shape))
                    end += hidden.numel()
        file.flush()
        # Private: torch wants what it may write to, though nobody does.
        values = torch.from_numpy(np.memmap(file, np.float32, mode="c"))
    return CachedRows(
        [
            [values[start : start + shape.numel()].view(shape) for start, shape in row]
            for row in found
        ],
        targets,
    )


def view_count(modality: Modality) -> int:
    """Return how many views a row has at most."""
    return IMAGE_VIEWS if modality is Modality.IMAGE else 1


def _batches(
    preprocessor: Preprocessor, items: Items
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
