"""How a repeated request is known: by its key, or as a retry by its content."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.datastructures import Headers

from core.errors import InvalidRequest
from core.jobs import Once
from service.idempotency import KEY_SECONDS, identify

BODY = {"model": "minilm", "training_file": "file-1"}


def once(body: Any = BODY, dedupe_seconds: int = 30, **headers: str) -> Once:
    given = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    found = identify(given, body, dedupe_seconds=dedupe_seconds)
    assert found is not None
    return found


def test_a_key_names_the_request_for_a_day():
    found = once(idempotency_key="k")
    assert (found.seconds, found.is_repeat) == (KEY_SECONDS, True)
    assert once(idempotency_key="k", body=dict(reversed(BODY.items()))) == found
    other = once(idempotency_key="k", body=BODY | {"seed": 1})
    assert other.name == found.name
    assert other.digest != found.digest
    assert once(idempotency_key="K").name != found.name


@pytest.mark.parametrize("key", ["", "k" * 256, "é", "a\x7f", "a\n"])
def test_a_key_that_is_none(key: str):
    with pytest.raises(InvalidRequest):
        once(idempotency_key=key)


def test_without_a_key_the_content_is_the_name():
    first, retry = once(), once(x_stainless_retry_count="2")
    assert (first.is_repeat, retry.is_repeat) == (False, True)
    assert (first.name, first.seconds) == (retry.name, 30)
    assert once(body=BODY | {"seed": 1}).name != first.name


@pytest.mark.parametrize("count", ["0", "00", "", "x", "-1", "1.5", "²"])
def test_what_is_no_retry(count: str):
    assert not once(x_stainless_retry_count=count).is_repeat


def test_deduplication_may_be_off_but_keys_are_honoured():
    retry = Headers({"x-stainless-retry-count": "1"})
    assert identify(retry, BODY, dedupe_seconds=0) is None
    assert once(dedupe_seconds=0, idempotency_key="k").seconds == KEY_SECONDS
