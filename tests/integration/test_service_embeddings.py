"""`/v1/embeddings` through OpenAI's own client, and BentoML's `embed`."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, ConflictError, NotFoundError

from tests.builders import DIM, embedding, encoded_image, text_features

if TYPE_CHECKING:
    from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

IMAGE_URL = "data:image/png;base64," + base64.b64encode(encoded_image((255, 0, 0))).decode()


@pytest.mark.parametrize("model", ["minilm", "pets", "pets@1"])
async def test_base64_and_numbers_are_the_features(openai: AsyncOpenAI, model: str):
    """The client asks for base64 by itself, and decodes it."""
    texts = ["good cat", "bad"]
    expected = [text_features(embedding(0), ids) for ids in ([2, 6], [3])]
    for given in ({}, {"encoding_format": "float"}):
        answer = await openai.embeddings.create(model=model, input=texts, **given)  # type: ignore[call-overload]
        assert [row.index for row in answer.data] == [0, 1]
        for row, features in zip(answer.data, expected, strict=True):
            assert row.embedding == pytest.approx(features.tolist(), abs=1e-5)
        assert answer.model == ("minilm" if model == "minilm" else "pets@1")
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


async def test_one_text(openai: AsyncOpenAI):
    answer = await openai.embeddings.create(model="minilm", input="good cat", dimensions=DIM)
    assert len(answer.data) == 1
    assert answer.usage.prompt_tokens == 2


@pytest.mark.parametrize("model", ["efficientnet-lite0", "shapes"])
async def test_images_as_data_urls(openai: AsyncOpenAI, model: str):
    answer = await openai.embeddings.create(model=model, input=[IMAGE_URL, IMAGE_URL])
    for row in answer.data:
        assert row.embedding == pytest.approx([1, 0, 0], abs=1e-3)
    assert answer.usage.total_tokens == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": [[1, 2]]}, "input 0: send text"),
    ({"input": [1, 2]}, "input 0: send text"),
    ({"input": []}, "at least one"),
    ({"input": ["good", " "]}, "input 1: the text is empty"),
    ({"input": IMAGE_URL}, "reads text"),
    ({"input": "x", "dimensions": 2}, "dimensions"),
    ({"input": "x", "model": "shapes"}, "reads images.*for embeddings a data URL"),
    ({"input": "data:image/png;base64,%%%", "model": "shapes"}, "base64"),
    ({"input": "data:image/png,abc", "model": "shapes"}, "base64"),
    ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "x", "model": "../pets"}, "model"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda each: str(each)[:50])
async def test_a_bad_request_is_refused_with_its_reason(
    openai: AsyncOpenAI, changes: dict[str, Any], message: str
):
    with pytest.raises(BadRequestError, match=message):
        await openai.embeddings.create(**{"model": "pets", **changes})


async def test_an_unknown_model_is_a_404(openai: AsyncOpenAI):
    with pytest.raises(NotFoundError):
        await openai.embeddings.create(model="nothing", input="x")


async def test_a_backbone_without_a_trunk_says_what_to_do(bare_openai: AsyncOpenAI):
    with pytest.raises(ConflictError, match="a worker does it") as caught:
        await bare_openai.embeddings.create(model="minilm", input="x")
    assert caught.value.code == "trunk_not_exported"


@pytest.fixture
async def bare_openai(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from tests.integration.service_process import ServiceProcess

    bare = ServiceProcess(tmp_path_factory.mktemp("bare"), workers=1)
    try:
        bare.start()
        async with bare.openai() as client:
            yield client
    finally:
        bare.stop()


BENTOML_CLIENT = """
import bentoml, json, sys
with bentoml.SyncHTTPClient(sys.argv[1]) as client:
    print(json.dumps(client.embed(model="minilm", input=["good cat"])))
    for bad in ({"model": "nothing", "input": ["a"]}, {"model": "pets", "input": [""]}):
        try:
            client.embed(**bad)
        except bentoml.exceptions.BentoMLException as error:
            print(json.dumps({"status": error.error_code, "message": str(error)}))
"""


def test_bentomls_own_client(service: ServiceProcess):
    run = subprocess.run(
        [sys.executable, "-c", BENTOML_CLIENT, service.url],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answer, unknown, empty = map(json.loads, run.stdout.splitlines())
    assert answer["data"][0]["embedding"] == pytest.approx(
        np.asarray(text_features(embedding(0), [2, 6])).tolist(), abs=1e-5
    )
    assert unknown["status"] == 404
    assert empty["status"] == 400
