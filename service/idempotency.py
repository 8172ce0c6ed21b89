"""How a request to make a job is known when it comes again, so that it makes one job only.

A caller may say so with an `Idempotency-Key`, which names one request for a day. The official
`openai` clients send none, but repeat a POST whose answer was lost, and number their tries in
`x-stainless-retry-count`. So a request that says it is a retry is looked up by its own content; a
first try always makes a job, because a person may well want the same job twice.

Both are decided with the adding of the job (core.queue). Not here: how that is kept.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson
from starlette.datastructures import Headers

from core.errors import InvalidRequest
from core.jobs import Once

KEY_HEADER = "Idempotency-Key"
KEY_SECONDS = 86_400
RETRY_HEADER = "x-stainless-retry-count"
REPLAYED_HEADER = "Idempotent-Replayed"
"""Says in an answer that the job was made by an earlier request."""
_KEY = re.compile(r"[\x20-\x7e]{1,255}\Z")


def identify(headers: Headers, body: Any, *, dedupe_seconds: int) -> Once | None:
    """Return how a repeat of this request is known; None when it is not to be.

    `body` is the parsed JSON. Raises `InvalidRequest` for a key that is none.
    """
    digest = _sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))
    key = _key(headers)
    if key is not None:
        name = f"key-{_sha256(key.encode())}"
        return Once(name=name, digest=digest, seconds=KEY_SECONDS)
    if dedupe_seconds == 0:
        return None
    return Once(
        name=f"body-{digest}", digest=digest, seconds=dedupe_seconds, is_repeat=_is_retry(headers)
    )


def _key(headers: Headers) -> str | None:
    given = headers.getlist(KEY_HEADER)
    if not given:
        return None
    if len(given) > 1 or _KEY.match(given[0]) is None:
        raise InvalidRequest(
            f"{KEY_HEADER} must be one header of 1 to 255 printable ASCII characters",
            param=KEY_HEADER, code="invalid_idempotency_key",
        )  # fmt: skip
    return given[0]


def _is_retry(headers: Headers) -> bool:
    count = headers.get(RETRY_HEADER, "")
    return count.isascii() and count.isdigit() and count.strip("0") != ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
