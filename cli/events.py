"""A job's events as they happen: oldest first, each once, up to the one that ends the job.

The stream of server-sent events may break at any time. It is taken up behind the last event seen
(`Last-Event-ID`), so a restart of the service is not even noticed by who reads. Not here: how
events look on a terminal (cli.follow).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from cli.client import Client, outage_survived
from cli.failures import CommandError
from core.jobs import TERMINAL

SILENCE_SECONDS = 30.0
GIVE_UP_SECONDS = 120.0


@dataclass(frozen=True)
class Message:
    """One server-sent event. `id` is empty when the server gave none."""

    id: str
    data: str


@dataclass(frozen=True)
class Event:
    """One line of a job's history; `created_at` is Unix time."""

    id: str
    created_at: float
    type: str
    level: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def is_terminal(self) -> bool:
        """True for the event that ends the job."""
        return self.type in TERMINAL


def parse_messages(lines: Iterable[str]) -> Iterator[Message]:
    """Parse a stream of server-sent events; comments and half a message at the end are dropped."""
    message_id = ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield Message(message_id, "\n".join(data))
            data = []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            message_id = value
        elif name == "data":
            data.append(value)


def read_events(
    client: Client,
    job_id: str,
    *,
    silence_seconds: float = SILENCE_SECONDS,
    give_up_seconds: float = GIVE_UP_SECONDS,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Event]:
    """Yield the events of a job until it ends, reconnecting as often as needed.

    Raises `CommandError` when the service cannot be reached for `give_up_seconds`, and
    `httpx.HTTPStatusError` when it refuses, such as for an unknown job.
    """
    last_id: str | None = None
    last_contact = time.monotonic()
    wait = 0.1
    while True:
        # A broken or silent stream is opened again.
        with outage_survived():
            with client.stream_events(job_id, last_id, silence_seconds) as response:
                _require_success(response)
                last_contact, wait = time.monotonic(), 0.1
                for message in parse_messages(response.iter_lines()):
                    event = _event(message)
                    if event is None or event.id == last_id:
                        continue
                    last_id = event.id
                    yield event
                    if event.is_terminal:
                        return
                    last_contact = time.monotonic()
            if client.job(job_id)["status"] in TERMINAL:
                # Its last event was dropped, as old ones are; the record still tells.
                return
        if time.monotonic() - last_contact > give_up_seconds:
            raise CommandError(
                f"lost the service at {client.url} for {give_up_seconds:g} s; "
                f"once it is back, see `graft job {job_id}`"
            )
        pause(wait)
        wait = min(5.0, wait * 2)


def _require_success(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
    response.raise_for_status()


def _event(message: Message) -> Event | None:
    try:
        body = json.loads(message.data)
    except ValueError:
        return None
    if not isinstance(body, dict) or "event" not in body:
        return None
    return Event(
        id=message.id or str(body.get("id", "")),
        created_at=float(body.get("created_at") or 0),
        type=str(body["event"]),
        level=str(body.get("level", "info")),
        message=str(body.get("message", "")),
        data=body.get("data") or {},
    )
