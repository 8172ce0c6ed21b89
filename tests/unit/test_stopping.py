"""A job's line to its supervisor: being asked to stop, and leave to publish."""

from __future__ import annotations

import io
import os

import pytest

from core.jobs import StopReason
from tests.waiting import eventually
from training.child import Reporter, outcome_of
from training.process import GoMessage, StopMessage, StoppedMessage
from training.stopping import Stopped


class Line:
    """A reporter, and the supervisor's end of its standard input."""

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        self.said = io.BytesIO()
        self.reporter = Reporter(self.said, os.fdopen(reading, "rb"))

    def send(self, message: GoMessage | StopMessage) -> None:
        os.write(self._writing, message.model_dump_json().encode() + b"\n")


@pytest.fixture
def line() -> Line:
    """Never closed: a reporter whose supervisor is gone ends its process."""
    return Line()


def test_a_job_goes_on_until_it_is_asked(line: Line) -> None:
    line.reporter.check()
    assert line.reporter.stop_reason is None
    line.send(StopMessage(reason=StopReason.PAUSE))
    eventually(lambda: line.reporter.stop_reason is StopReason.PAUSE, 10, "the job is asked")
    with pytest.raises(Stopped) as stopped:
        line.reporter.check()
    assert outcome_of(stopped.value) == StoppedMessage(reason=StopReason.PAUSE)


def test_the_last_reason_counts(line: Line) -> None:
    for reason in (StopReason.RELEASE, StopReason.CANCEL):
        line.send(StopMessage(reason=reason))
    eventually(lambda: line.reporter.stop_reason is StopReason.CANCEL, 10, "the job is asked")


def test_who_waits_for_leave_is_stopped_instead(line: Line) -> None:
    line.send(StopMessage(reason=StopReason.CANCEL))
    with pytest.raises(Stopped):
        line.reporter.authorise()


def test_who_has_leave_is_not_stopped(line: Line) -> None:
    line.send(GoMessage())
    line.reporter.authorise()
    assert line.said.getvalue() == b'{"type":"ask"}\n'
    line.send(StopMessage(reason=StopReason.CANCEL))
    line.send(GoMessage())
    line.reporter.authorise()
    line.reporter.check()
