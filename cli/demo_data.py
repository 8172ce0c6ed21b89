"""The demo's two data sets: customer messages from `examples/`, and scikit-learn's digits.

Both come with rows held out from training, to measure on. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cli.client import Input, image_input
from cli.failures import CommandError
from core.datasets import Modality

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HELD_OUT_FRACTION = 0.3
SEED = 0


@dataclass(frozen=True)
class HeldOut:
    """A row that training never sees; `shown` is what a person is told it is."""

    input: Input
    label: str
    shown: str


@dataclass(frozen=True)
class DemoTask:
    """One model to make: the file to train on, and the rows to measure it on."""

    name: str
    modality: Modality
    training_file: Path
    held_out: Sequence[HeldOut]

    @property
    def majority_accuracy(self) -> float:
        """The accuracy of always answering the most frequent label."""
        counts = Counter(row.label for row in self.held_out)
        return max(counts.values()) / len(self.held_out)


def support_intents() -> DemoTask:
    """Customer messages in ten intents; the held-out ones are written in another voice."""
    folder = EXAMPLES / "support-intents"
    if not folder.is_dir():
        raise CommandError("the demo needs the folder examples/: run it in a source checkout")
    with (folder / "heldout.csv").open(newline="", encoding="utf-8") as file:
        held_out = [HeldOut(row["text"], row["label"], row["text"]) for row in csv.DictReader(file)]
    return DemoTask("support-intents", Modality.TEXT, folder / "train.csv", held_out)


def digits(target: Path) -> DemoTask:
    """Handwritten digits, 8×8 grey; writes the training zip to `target`, holds out 30 %."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise CommandError("the demo needs scikit-learn: pip install 'graft[demo]'") from error
    bunch = load_digits()
    images = [_png(pixels) for pixels in bunch.images]
    labels = [str(label) for label in bunch.target]
    rows = list(zip(images, labels, strict=True))
    train, test = train_test_split(
        rows, test_size=HELD_OUT_FRACTION, stratify=labels, random_state=SEED
    )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for number, (image, label) in enumerate(train):
            archive.writestr(f"{label}/{number:04}.png", image)
    held_out = [HeldOut(image_input(image), label, f"a {label}") for image, label in test]
    return DemoTask("digits", Modality.IMAGE, target, held_out)


def _png(pixels: Sequence[Sequence[float]]) -> bytes:
    # The data set counts ink from 0 to 16.
    ink = bytes(min(255, round(value * 255 / 16)) for row in pixels for value in row)
    buffer = io.BytesIO()
    Image.frombytes("L", (8, 8), ink).save(buffer, "PNG")
    return buffer.getvalue()
