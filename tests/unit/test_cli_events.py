from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from cli.client import Client
from cli.events import Message, parse_messages, read_events
from cli.failures import CommandError
from tests.unit.cli_fake_service import Answer, FakeService, event, job, serve

EVENTS = "GET /v1/fine_tuning/jobs/ftjob-1/events"
JOB = "GET /v1/fine_tuning/jobs/ftjob-1"


@pytest.fixture
def service() -> Iterator[FakeService]:
    with serve() as fake:
        yield fake


@pytest.fixture
def client(service: FakeService) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


def no_pause(_: float) -> None:
    pass


def test_messages_are_separated_by_blank_lines_and_comments_dropped() -> None:
    lines = [": hello", "id: 1", "event: started", "data: one", "data:two", "", "", "data: half"]
    assert list(parse_messages(lines)) == [Message("1", "one\ntwo")]


def test_events_come_in_order_up_to_the_terminal_one(service: FakeService, client: Client) -> None:
    stream = event(1, "started") + event(2, "metrics") + event(3, "succeeded") + event(4, "late")
    service.answer(EVENTS, Answer(raw=stream))
    assert [e.type for e in read_events(client, "ftjob-1")] == ["started", "metrics", "succeeded"]


def test_a_broken_stream_is_taken_up_behind_the_last_event(
    service: FakeService, client: Client
) -> None:
    service.answer(
        EVENTS,
        Answer(raw=event(1, "started") + event(2, "metrics") + b"id: ftevent-3-0\ndata: {"),
        Answer({"error": {"message": "starting"}}, 503),
        Answer(raw=event(3, "succeeded")),
    )
    service.answer(JOB, Answer({"error": {"message": "starting"}}, 503), Answer(job("running")))
    found = [e.id for e in read_events(client, "ftjob-1", pause=no_pause)]
    assert found == ["ftevent-1-0", "ftevent-2-0", "ftevent-3-0"]
    resumed = [r.headers.get("last-event-id") for r in service.requests if "events" in r.path]
    assert resumed == [None, "ftevent-2-0", "ftevent-2-0"]


def test_an_event_sent_again_is_not_shown_again(service: FakeService, client: Client) -> None:
    service.answer(
        EVENTS,
        Answer(raw=event(1, "started")),
        Answer(raw=event(1, "started") + event(2, "failed")),
    )
    service.answer(JOB, Answer(job("running")))
    found = [e.type for e in read_events(client, "ftjob-1", pause=no_pause)]
    assert found == ["started", "failed"]


def test_the_record_ends_what_the_stream_no_longer_can(
    service: FakeService, client: Client
) -> None:
    service.answer(EVENTS, Answer(raw=b": still here\n\n"))
    service.answer(JOB, Answer(job("succeeded")))
    assert list(read_events(client, "ftjob-1", pause=no_pause)) == []


def test_a_refusal_is_raised_at_once(service: FakeService, client: Client) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        list(read_events(client, "ftjob-1", pause=no_pause))
    assert len(service.requests) == 1


def test_a_lost_service_is_given_up_after_a_while(service: FakeService, client: Client) -> None:
    service.answer(EVENTS, Answer({"error": {"message": "away"}}, 503))
    service.answer(JOB, Answer({"error": {"message": "away"}}, 503))
    with pytest.raises(CommandError, match="lost the service"):
        list(read_events(client, "ftjob-1", give_up_seconds=0, pause=no_pause))
