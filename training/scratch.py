"""Models that know nothing beforehand: what the rows alone can teach, within a second or few.

Both take the rows, which of them to learn from, and which to predict, and are the same for the same
seed. The work is bounded by rows and epochs, not by a clock. They are yardsticks, never served. Not
here: what is made of their answers (training.baselines).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from core.preprocessing import IMAGE_FORMATS
from training.fit import IntArray

SIDE = 32
"""Height and width in pixels to which images are squeezed."""

BATCH = 32
_WORDS = 20_000
_PENALTY = 10.0
_TOLERANCE = 1e-3
_WORD_ITERATIONS = 60
_ROWS_OF_ALL_EPOCHS = 3_000
_MIN_EPOCHS, _MAX_EPOCHS = 3, 40
_RATE = 0.01


def predict_words(
    texts: Sequence[str], targets: IntArray, train: IntArray, held_out: IntArray
) -> IntArray:
    """Return the classes of the `held_out` rows by logistic regression on TF-IDF of words.

    Single words, which did better than pairs on short texts, sublinear counts, and a fixed, weak
    penalty (C = 10).
    """
    known = _word_features(texts, train, held_out)
    if known is None:  # there is not one word among them
        return np.full(len(held_out), np.bincount(targets[train]).argmax())
    return _classify(*known, targets[train])


def predict_word_labels(
    texts: Sequence[str], truth: npt.NDArray[np.bool_], train: IntArray, held_out: IntArray
) -> npt.NDArray[np.bool_]:
    """Return whether each `held_out` row has each label, as `predict_words` would say it."""
    found = np.zeros((len(held_out), truth.shape[1]), np.bool_)
    known = _word_features(texts, train, held_out)
    for label in range(truth.shape[1]):
        answers = truth[train, label].astype(np.int64)
        found[:, label] = answers.mean() >= 0.5 if known is None else _classify(*known, answers)
    return found


def predict_word_values(
    texts: Sequence[str], values: npt.NDArray[np.float64], train: IntArray, held_out: IntArray
) -> npt.NDArray[np.float64]:
    """Return the values of the `held_out` rows by ridge regression on TF-IDF of words."""
    known = _word_features(texts, train, held_out)
    if known is None:
        return np.full(len(held_out), values[train].mean())
    model = Ridge(alpha=1.0, random_state=0)
    with threadpool_limits(1, "blas"):
        model.fit(known[0], values[train])
        predictions: npt.NDArray[np.float64] = model.predict(known[1])
    return predictions


def _word_features(
    texts: Sequence[str], train: IntArray, held_out: IntArray
) -> tuple[Any, Any] | None:
    """Return the TF-IDF of words of both sets of rows; None if there is no word to learn from."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=_WORDS)
    try:
        known = vectorizer.fit_transform([texts[row] for row in train])
    except ValueError:
        return None
    return known, vectorizer.transform([texts[row] for row in held_out])


def _classify(known: Any, asked: Any, targets: IntArray) -> IntArray:
    if len(np.unique(targets)) == 1:
        return np.full(asked.shape[0], targets[0])
    model = LogisticRegression(C=_PENALTY, max_iter=_WORD_ITERATIONS, tol=_TOLERANCE)
    # Threads that wait for each other on products this small take twenty times as long; and nobody
    # will look at the last digits, of whose want scikit-learn warns.
    with (
        threadpool_limits(1, "blas"),
        warnings.catch_warnings(action="ignore", category=ConvergenceWarning),
    ):
        model.fit(known, targets)
    predictions: IntArray = model.predict(asked)
    return predictions


def read_pixels(images: Sequence[bytes]) -> Tensor:
    """Return images squeezed to `SIDE` × `SIDE`, float32 [n, 3, SIDE, SIDE] about zero."""
    pixels = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for row, data in enumerate(images):
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG can be decoded at an eighth
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels[row] = np.asarray(small)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(64).sub_(2)


def predict_pixels(
    pixels: Tensor, targets: IntArray, classes: int, train: IntArray, held_out: IntArray, seed: int
) -> IntArray:
    """Return the classes of the `held_out` rows by a convolutional network of 24,000 weights."""
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    logits = _learn(pixels, torch.from_numpy(targets), classes, loss, train, held_out, seed)
    predictions: IntArray = logits.argmax(1).numpy()
    return predictions


def predict_pixel_labels(
    pixels: Tensor, truth: npt.NDArray[np.bool_], train: IntArray, held_out: IntArray, seed: int
) -> npt.NDArray[np.bool_]:
    """Return whether each `held_out` row has each label, by such a network with a sigmoid each."""
    given = torch.from_numpy(truth).float()
    loss = nn.BCEWithLogitsLoss()
    logits = _learn(pixels, given, truth.shape[1], loss, train, held_out, seed)
    said: npt.NDArray[np.bool_] = (logits >= 0).numpy()
    return said


def predict_pixel_values(
    pixels: Tensor, values: npt.NDArray[np.float64], train: IntArray, held_out: IntArray, seed: int
) -> npt.NDArray[np.float64]:
    """Return the values of the `held_out` rows by such a network, of standardised values."""
    mean, deviation = float(values[train].mean()), float(values[train].std()) or 1.0
    given = torch.from_numpy((values - mean) / deviation).float().unsqueeze(1)
    found = _learn(pixels, given, 1, nn.MSELoss(), train, held_out, seed)
    predictions: npt.NDArray[np.float64] = mean + deviation * found[:, 0].double().numpy()
    return predictions


def _learn(
    pixels: Tensor, truth: Tensor, width: int, loss: nn.Module, train: IntArray,
    held_out: IntArray, seed: int,
) -> Tensor:  # fmt: skip
    """Return what a network of three convolutions gives for the `held_out` rows, [m, width].

    With batch normalisation and mirrored images, by AdamW under a one-cycle schedule.
    """
    generator = torch.Generator().manual_seed(seed)
    network = _network(width, generator)
    rows = torch.from_numpy(train)
    epochs = max(_MIN_EPOCHS, min(_MAX_EPOCHS, _ROWS_OF_ALL_EPOCHS // len(rows)))
    steps = epochs * -(-len(rows) // BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in torch.split(order, BATCH):
            mirrored = torch.rand(len(batch), generator=generator) < 0.5
            images = pixels[batch]
            images[mirrored] = images[mirrored].flip(-1)
            optimiser.zero_grad()
            loss(network(images), truth[batch]).backward()
            optimiser.step()
            schedule.step()
    network.eval()
    asked = pixels[torch.from_numpy(held_out)]
    with torch.inference_mode():
        return torch.cat([network(part) for part in torch.split(asked, 256)])


def _network(classes: int, generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    for module in network:
        # torch draws first weights from a global generator, which is not ours to seed.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network
