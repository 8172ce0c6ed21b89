"""The predictor: one answer per input, in order, whatever is wrong with the others."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)
from core.preprocessing import ImagePreprocessor
from core.settings import Settings
from service import inputs
from service.api.embeddings import EmbeddingsRequest, embed
from service.inputs import ImageInput
from service.metrics import MODEL_ROWS
from tests.builders import (
    TENANT,
    add_image_trunk,
    add_text_trunk,
    embedding,
    encoded_image,
    head_files,
    publish,
    text_features,
)
from tests.loading import Loading, loading
from tests.waiting import until
from training.novelty import estimate_novelty

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Loading]:
    async with loading(tmp_path, start=False) as it:
        publish(it.registry, add_text_trunk(it.registry), labels=("cat", "dog", "cow"))
        publish(it.registry, add_image_trunk(it.registry), "shapes", labels=("a", "b", "c"))
        await it.loader.reconcile()
        yield it


async def test_the_answer_is_that_of_the_trunk_and_the_head(served: Loading):
    import onnxruntime

    answer = await served.predict("pets", "good cat")
    features = text_features(embedding(0), [2, 6])[None]
    session = onnxruntime.InferenceSession(head_files(4, 3)["head.onnx"])
    (expected,) = session.run(["probabilities"], {"features": features})[0]
    found = dict(answer.rows[0].scores)
    assert [found[label] for label in ("cat", "dog", "cow")] == pytest.approx(expected, abs=1e-5)
    scores = [score for _, score in answer.rows[0].scores]
    assert scores == sorted(scores, reverse=True)
    assert answer.model == "pets@1"
    assert set(answer.timing_ms) == {"prepare", "queue", "trunk", "head", "total"}


async def test_novelty_of_a_model_that_has_the_statistics(served: Loading):
    features = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    novelty = estimate_novelty(features, np.arange(40) % 3, 3, seed=0)
    files = head_files(4, 3) | {"novelty.safetensors": novelty.write()}
    trunk = add_text_trunk(served.registry)
    publish(served.registry, trunk, "novel", labels=("a", "b", "c"), files=files)
    await served.loader.reconcile()
    answer = await served.predict("novel", "good cat", "", "bad")
    expected = novelty.score(np.stack([text_features(embedding(0), ids) for ids in ([2, 6], [3])]))
    assert isinstance(answer.rows[1], InvalidRequest)
    assert [answer.rows[0].novelty, answer.rows[2].novelty] == pytest.approx(expected, abs=1e-4)
    assert (await served.predict("pets", "good cat")).rows[0].novelty is None


async def test_statistics_of_another_model_are_refused(served: Loading):
    features = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    other = estimate_novelty(features, np.arange(40) % 3, 3, seed=0).write()
    files = head_files(4, 3) | {"novelty.safetensors": other}
    trunk = add_text_trunk(served.registry)
    publish(served.registry, trunk, "wrong", labels=("a", "b", "c"), files=files)
    await served.loader.reconcile()
    with pytest.raises((Unavailable, NotFound)):
        await served.predict("wrong", "good cat")


BAD_TEXTS = {
    "an empty text": "",
    "only spaces": " \n\t ",
    "too long a text": "a" * 10_001,
    "half a surrogate pair": "good \ud800 cat",
    "an image": ImageInput("aaaa"),
}


@pytest.mark.parametrize("bad", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
async def test_a_bad_text_is_an_error_in_its_own_place(served: Loading, bad: str | ImageInput):
    answer = await served.predict("pets", "good cat", bad, "bad dog")
    alone = await served.predict("pets", "bad dog")
    assert isinstance(answer.rows[1], InvalidRequest)
    assert dict(answer.rows[2].scores) == pytest.approx(dict(alone.rows[0].scores))


@pytest.mark.parametrize(
    "odd", ["\x00", "good\x00cat", "🦊" * 50, "nothing that is known", "é" * 99]
)
async def test_an_odd_text_is_answered(served: Loading, odd: str):
    answer = await served.predict("pets", odd)
    assert np.isfinite(answer.rows[0].scores[0][1])


GOOD_IMAGE = encoded_image()
BAD_IMAGES = {
    "no base64": ImageInput("%%%"),
    "base64 beyond ASCII": ImageInput("é" * 8),
    "a lone surrogate": ImageInput("\ud800"),
    "no image": ImageInput(base64.b64encode(b"hello").decode()),
    "nothing": ImageInput(b""),
    "a cut image": ImageInput(GOOD_IMAGE[:-30]),
    "a text": "hello",
}


@pytest.mark.parametrize("bad", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
async def test_a_bad_image_is_an_error_in_its_own_place(served: Loading, bad: str | ImageInput):
    text = base64.b64encode(GOOD_IMAGE).decode()
    answer = await served.predict("shapes", ImageInput(text), bad, ImageInput(GOOD_IMAGE))
    assert isinstance(answer.rows[1], InvalidRequest)
    assert dict(answer.rows[0].scores) == pytest.approx(dict(answer.rows[2].scores))


async def test_too_many_pixels_are_refused_by_name(served: Loading):
    answer = await served.predict("shapes", ImageInput(encoded_image(size=(1001, 1000))))
    assert answer.rows[0].error_code == PayloadTooLarge.code


async def test_long_texts_do_not_hold_up_the_event_loop(
    served: Loading, monkeypatch: pytest.MonkeyPatch
):
    """Where a text is tokenised is told by the thread, not by a stopwatch."""
    threads: dict[int, str] = {}
    original = inputs.TextPreprocessor.prepare

    def remember(self, item: str):  # type: ignore[no-untyped-def]
        threads[len(item)] = threading.current_thread().name
        return original(self, item)

    monkeypatch.setattr(inputs.TextPreprocessor, "prepare", remember)
    short, long = "good cat", "good cat " * 600
    alone = await served.predict("pets", short)
    together = await served.predict("pets", short + " ", long)
    assert threads[len(short)] == threading.main_thread().name
    assert threads[len(long)].startswith("line-decode")
    assert dict(together.rows[0].scores) == pytest.approx(dict(alone.rows[0].scores))


async def test_the_deadline_holds_while_inputs_are_decoded(
    served: Loading, monkeypatch: pytest.MonkeyPatch
):
    gate = threading.Event()
    original = ImagePreprocessor.prepare

    def slow(self, item: bytes):  # type: ignore[no-untyped-def]
        assert gate.wait(10)
        return original(self, item)

    monkeypatch.setattr(ImagePreprocessor, "prepare", slow)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await served.predict("shapes", *[ImageInput(GOOD_IMAGE)] * 8, timeout=0.05)
    assert time.monotonic() - began < 5
    gate.set()
    assert (await served.predict("shapes", ImageInput(GOOD_IMAGE))).rows


async def test_embeddings_count_and_take_turns_under_the_name_that_predictions_do(
    served: Loading, monkeypatch: pytest.MonkeyPatch
):
    batcher = (await served.live("pets")).trunk.batcher
    encode, turns = batcher.encode, []

    async def remember(*args: Any, model: str, **options: Any):  # type: ignore[no-untyped-def]
        turns.append(model)
        return await encode(*args, model=model, **options)

    monkeypatch.setattr(batcher, "encode", remember)
    run: Any = SimpleNamespace(settings=Settings(), predictor=served.predictor)
    asked = EmbeddingsRequest(model="pets@1", input=["good cat"])
    rows = MODEL_ROWS.labels(model="pets", outcome="ok")._value
    before = rows.get()
    await served.predict("pets")
    await until(lambda: rows.get() == before + 1)
    answer = await embed(run, TENANT, asked, 20)
    assert answer["model"] == "pets@1"
    assert turns == ["pets", "pets"]
    await until(lambda: rows.get() == before + 2)


async def test_many_requests_at_once_each_get_their_own_answer(served: Loading):
    texts = ["good cat", "bad dog", "red", "blue cat dog", "unheard"]
    alone = {text: (await served.predict("pets", text)).rows[0].scores for text in texts}
    answers = await asyncio.gather(*(served.predict("pets", *texts[n % 5 :]) for n in range(60)))
    for n, answer in enumerate(answers):
        for text, row in zip(texts[n % 5 :], answer.rows, strict=True):
            assert dict(row.scores) == pytest.approx(dict(alone[text]), abs=1e-5)
