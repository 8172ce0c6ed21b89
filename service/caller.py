"""What a request says of itself in its headers, for whoever decides how it is served.

    X-Routing-Key   requests with the same key get the same side of a traffic split
    X-Priority      high, normal or low: the lane in which its rows wait, also a parameter of `/v2`

The guard reads them once for every protocol alike and keeps them in a context variable, because
they have to pass through BentoML's own endpoints too. Without a key the request's id serves, so
that a retry under the same id goes where the first try went.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum

from core.errors import InvalidRequest

ROUTING_HEADER = "x-routing-key"
PRIORITY_HEADER = "x-priority"
MAX_KEY_CHARS = 256


class Lane(IntEnum):
    """Where rows wait; a lower number goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True)
class Caller:
    """How one request wants to be served."""

    routing_key: str = ""
    lane: Lane = Lane.NORMAL


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039


def read_caller(headers: Mapping[str, str], request_id: str) -> Caller:
    """Return what the headers say; raise `InvalidRequest` for what cannot be understood."""
    key = headers.get(ROUTING_HEADER) or request_id
    if len(key) > MAX_KEY_CHARS:
        raise InvalidRequest(
            f"{ROUTING_HEADER} has more than {MAX_KEY_CHARS} characters", param=ROUTING_HEADER
        )
    priority = headers.get(PRIORITY_HEADER)
    if priority is None:
        return Caller(key)
    try:
        return Caller(key, Lane[priority.upper()])
    except KeyError:
        raise InvalidRequest(
            f"{PRIORITY_HEADER} must be high, normal or low", param=PRIORITY_HEADER
        ) from None
