"""Feature extraction over real trunks: order, bounds, progress, cancellation."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import DataError
from core.preprocessing import FloatArray, Prepared, PreparedText, TextPreprocess
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from tests.integration.hf_models import WORDS, save_image_model, save_text_model
from training.features import (
    IMAGES_PER_BATCH,
    TEXTS_PER_CHUNK,
    TEXTS_PER_TASK,
    TOKENS_PER_BATCH,
    extract,
)
from training.trunks import ensure_trunk


def silent(done: int, total: int) -> None:
    """Report nothing."""


class Watched:
    """A trunk that notes its batches and may be slow; the rest is the real one's."""

    def __init__(self, trunk: Trunk, before: Callable[[], None] = lambda: None) -> None:
        self._trunk = trunk
        self._before = before
        self.preprocessor = trunk.preprocessor
        self.dim = trunk.dim
        self.batches: list[tuple[int, int]] = []  # rows, padded size
        self.threads: set[int] = set()

    def encode(self, rows: Sequence[Prepared]) -> FloatArray:
        self._before()
        self.batches.append((len(rows), len(rows) * max(row.cost for row in rows)))
        self.threads.add(threading.get_ident())
        return self._trunk.encode(rows)


def load(tmp_path: Path, folder: str) -> Trunk:
    return ensure_trunk(
        Registry(ArtifactStore(str(tmp_path / "store"))),
        f"hf:{folder}",
        hf_models=(folder,),
        threads=1,
        max_pixels=10**6,
        on_export=lambda: None,
    )


@pytest.fixture
def text_trunk(tmp_path: Path) -> Trunk:
    return load(tmp_path, str(save_text_model("bert", tmp_path / "model")))


@pytest.fixture
def image_trunk(tmp_path: Path) -> Trunk:
    return load(tmp_path, str(save_image_model("vit", tmp_path / "model")))


def sentences(count: int) -> list[str]:
    numbers = np.random.default_rng(0)
    return [" ".join(numbers.choice(WORDS, numbers.integers(0, 30))) for _ in range(count)]


def pictures(count: int) -> list[bytes]:
    numbers = np.random.default_rng(0)
    return [encoded(numbers.integers(0, 256, (9, 7, 3), np.uint8)) for _ in range(count)]


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("threads", [1, 3])
def test_texts_keep_their_order(text_trunk: Trunk, threads: int) -> None:
    texts = sentences(TEXTS_PER_CHUNK + 50)
    features = extract(text_trunk, texts, threads=threads, on_progress=silent)
    assert features.dtype == np.float32
    assert features.shape == (len(texts), 16)
    assert np.isfinite(features).all()
    for index in (0, 1, 7, 500, TEXTS_PER_CHUNK - 1, TEXTS_PER_CHUNK, len(texts) - 1):
        alone = text_trunk.encode([text_trunk.preprocessor.prepare(texts[index])])  # type: ignore[arg-type]
        np.testing.assert_allclose(features[index], alone[0], atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_images_keep_their_order(image_trunk: Trunk, threads: int) -> None:
    images = pictures(2 * IMAGES_PER_BATCH + 3)
    features = extract(image_trunk, images, threads=threads, on_progress=silent)
    for index, image in enumerate(images):
        alone = image_trunk.encode([image_trunk.preprocessor.prepare(image)])  # type: ignore[arg-type]
        np.testing.assert_allclose(features[index], alone[0], atol=1e-5)


def test_no_items_give_no_features(text_trunk: Trunk) -> None:
    assert extract(text_trunk, [], threads=2, on_progress=silent).shape == (0, 16)


def test_batches_are_bounded_and_hold_little_padding(text_trunk: Trunk) -> None:
    watched = Watched(text_trunk)
    texts = sentences(600)
    extract(watched, texts, threads=2, on_progress=silent)  # type: ignore[arg-type]
    assert max(size for _, size in watched.batches) <= TOKENS_PER_BATCH
    assert sum(rows for rows, _ in watched.batches) == 600
    assert isinstance(text_trunk.preprocessor.config, TextPreprocess)
    tokens = sum(text_trunk.preprocessor.prepare(text).cost for text in texts)  # type: ignore[arg-type]
    assert sum(size for _, size in watched.batches) < 1.15 * tokens


def test_a_row_longer_than_a_batch_goes_alone(
    text_trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.features.TOKENS_PER_BATCH", 10)
    watched = Watched(text_trunk)
    extract(watched, ["where is my card " * 5, "help"], threads=1, on_progress=silent)  # type: ignore[arg-type]
    assert [rows for rows, _ in watched.batches] == [1, 1]


def test_images_are_decoded_a_few_at_a_time(image_trunk: Trunk) -> None:
    """While the first batches are held up, nothing beyond them is prepared."""
    held, prepared = threading.Event(), []
    watched = Watched(image_trunk, before=lambda: bool(held.wait(5)) or None)
    real = image_trunk.preprocessor

    class Counting(type(real)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(real.__dict__)

        def prepare(self, item: bytes) -> Prepared:
            prepared.append(item)
            result: Prepared = super().prepare(item)
            return result

    watched.preprocessor = Counting()
    done: list[int] = []
    seen: list[int] = []

    def on_progress(finished: int, total: int) -> None:
        done.append(finished)
        if len(done) == 2:  # half a second in, and nothing has ended
            seen.append(len(prepared))
            held.set()

    extract(watched, pictures(40), threads=2, on_progress=on_progress)  # type: ignore[arg-type]
    assert seen == [2 * IMAGES_PER_BATCH]
    assert done[-1] == len(prepared) == 40


def test_progress_is_told_while_a_batch_runs(text_trunk: Trunk) -> None:
    watched = Watched(text_trunk, before=lambda: time.sleep(1.4))
    told: list[tuple[int, int]] = []
    extract(watched, ["help"], threads=1, on_progress=lambda *now: told.append(now))  # type: ignore[arg-type]
    assert told[0] == (0, 1)
    assert told[-1] == (1, 1)
    assert told.count((0, 1)) >= 3


def test_progress_is_told_while_texts_are_tokenised(text_trunk: Trunk) -> None:
    watched = Watched(text_trunk)
    real = text_trunk.preprocessor

    class Slow(type(real)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(real.__dict__)

        def prepare_many(self, items: list[str]) -> list[PreparedText]:
            assert len(items) <= TEXTS_PER_TASK
            time.sleep(0.7)
            result: list[PreparedText] = super().prepare_many(items)
            return result

    watched.preprocessor = Slow()
    told: list[tuple[int, int]] = []
    count = TEXTS_PER_TASK + 1
    extract(watched, sentences(count), threads=1, on_progress=lambda *now: told.append(now))  # type: ignore[arg-type]
    assert told.count((0, count)) >= 3
    assert told[-1] == (count, count)


def test_progress_may_cancel(text_trunk: Trunk) -> None:
    class Cancelled(Exception):
        pass

    def on_progress(done: int, total: int) -> None:
        if done:
            raise Cancelled

    watched = Watched(text_trunk)
    with pytest.raises(Cancelled):
        extract(watched, sentences(4000), threads=2, on_progress=on_progress)  # type: ignore[arg-type]
    assert len(watched.batches) < 10
    count = len(watched.batches)
    time.sleep(0.1)
    assert len(watched.batches) == count


def test_several_batches_run_at_once(text_trunk: Trunk) -> None:
    both = threading.Barrier(2, timeout=10)
    watched = Watched(text_trunk, before=lambda: bool(both.wait()) or None)
    # Four batches of equal size, two by two.
    texts = ["help " * 14] * (4 * (TOKENS_PER_BATCH // 16))
    extract(watched, texts, threads=2, on_progress=silent)  # type: ignore[arg-type]
    assert len(watched.threads) == 2


def test_an_image_that_cannot_be_read_is_named(image_trunk: Trunk) -> None:
    images = pictures(10)
    images[6] = b"not an image"
    with pytest.raises(DataError, match="row 7: not a readable"):
        extract(image_trunk, images, threads=2, on_progress=silent)
    images[6] = encoded(np.zeros((1001, 1000, 3), np.uint8))
    with pytest.raises(DataError, match="row 7: image is 1000x1001"):
        extract(image_trunk, images, threads=2, on_progress=silent)
