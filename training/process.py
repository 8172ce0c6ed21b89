"""The child process that runs one job, and the messages between it and its supervisor.

A child is a fresh interpreter (`python -m training.child <kind>`), never a fork: its memory goes
with it, and whatever kills it kills one job's attempt. It imports its heavy libraries and then
waits for one job on its standard input, so a child that was started early is a *warm spare*. It
inherits neither the API key nor the Redis URL: only the supervisor talks to Redis.

Messages are JSON, one a line. Supervisor to child: the job, then `go` for each `ask`, and `stop`
when the job is to stop between two steps. Child to supervisor: `event`, `progress`, `ask`, and as
its last `succeeded`, `failed`, `retry` or `stopped`. A child whose standard input closes has lost
its supervisor and ends itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field, TypeAdapter

from core.jobs import EventLevel, Failure, Job, JobKind, Json, StopReason
from core.outlook import Progress

MESSAGE_BYTES = 4 << 20
"""Longest message; a longer one is a crash."""


class EventMessage(BaseModel, frozen=True):
    """Something for the job's history."""

    type: Literal["event"] = "event"
    event: str
    message: str
    level: EventLevel = "info"
    data: Json = Field(default_factory=dict)


class ProgressMessage(BaseModel, frozen=True):
    """How far the job is; only the newest matters."""

    type: Literal["progress"] = "progress"
    progress: Progress


class AskMessage(BaseModel, frozen=True):
    """May this attempt still publish? The child waits for `go`; a lost lease never answers."""

    type: Literal["ask"] = "ask"


class SucceededMessage(BaseModel, frozen=True):
    """The job's result. `model` and `version` name what was published, if anything was.

    `seconds` is what it took, from when the child had the job; None if it did not measure.
    """

    type: Literal["succeeded"] = "succeeded"
    result: Json
    model: str | None = None
    version: int | None = None
    seconds: float | None = None


class FailedMessage(BaseModel, frozen=True):
    """The job cannot succeed."""

    type: Literal["failed"] = "failed"
    failure: Failure


class RetryMessage(BaseModel, frozen=True):
    """This attempt failed of something that may pass."""

    type: Literal["retry"] = "retry"
    failure: Failure


class StoppedMessage(BaseModel, frozen=True):
    """The job has stopped between two steps, as it was asked to, and saved what it has to save."""

    type: Literal["stopped"] = "stopped"
    reason: StopReason


class GoMessage(BaseModel, frozen=True):
    """The answer to an `ask`: this attempt may publish, and is not asked to stop any more."""

    type: Literal["go"] = "go"


class StopMessage(BaseModel, frozen=True):
    """The job is to stop between two steps."""

    type: Literal["stop"] = "stop"
    reason: StopReason


Message: TypeAlias = (
    EventMessage
    | ProgressMessage
    | AskMessage
    | SucceededMessage
    | FailedMessage
    | RetryMessage
    | StoppedMessage
)
MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])
ANSWERS: TypeAdapter[GoMessage | StopMessage] = TypeAdapter(
    Annotated[GoMessage | StopMessage, Field(discriminator="type")]
)

_SECRETS = ("GRAFT_API_KEY", "GRAFT_REDIS_URL")


READY = b'{"type":"ready"}\n'
"""A child's first line: its imports are done, and a job may be claimed for it."""


_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """Return this process's environment without what a child must not know."""
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


def end_with_supervisor() -> None:
    """Have Linux kill this process when its supervisor is gone.

    A child's `Reporter` sees that too, but not while a library holds the interpreter's lock.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ChildProcess:
    """A running child, seen from the supervisor."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls, kind: JobKind, model: str | None = None) -> ChildProcess:
        """Start a child that gets ready for a job of `kind`, most likely on `model`."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "training.child", kind.value, *([model] if model else []),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=child_environment(),
                limit=MESSAGE_BYTES,
                # Signals for the supervisor's group, such as Ctrl-C, are not for its children.
                start_new_session=True,
            )
        )  # fmt: skip

    async def wait_until_ready(self) -> bool:
        """Return True when the child has done its imports, False if it ends or cannot do them.

        Call it once, before any job is claimed for the child: a host on which no child gets ready
        must not use up attempts.
        """
        try:
            return await self._stdout.readline() == READY
        except ValueError:  # longer than MESSAGE_BYTES
            return False

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """True until the child's exit has been seen."""
        return self._process.returncode is None

    async def send_job(self, job: Job) -> None:
        """Give the child its job."""
        await self._send(job.model_dump_json())

    async def send_go(self) -> None:
        """Answer an `ask`."""
        await self._send(GoMessage().model_dump_json())

    async def send_stop(self, reason: StopReason) -> None:
        """Ask the child to stop between two steps; it may not listen."""
        await self._send(StopMessage(reason=reason).model_dump_json())

    async def receive(self) -> Message | None:
        """Return the next message, or None when the child has ended or speaks nonsense."""
        try:
            line = await self._stdout.readline()
            return MESSAGES.validate_json(line) if line else None
        except ValueError:
            # Longer than MESSAGE_BYTES, or not a message: treated as a crash.
            self.kill()
            return None

    async def wait(self) -> int:
        """Wait for the exit; return its code, negative for a signal."""
        return await self._process.wait()

    async def ends_within(self, seconds: float) -> bool:
        """Wait for the exit for so long; return whether it came."""
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL when the grace is over; return when the child is gone."""
        if self.is_alive:
            self._signal(signal.SIGTERM)
            if not await self.ends_within(grace_seconds):
                self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """SIGKILL the child and all that it started."""
        if self.is_alive:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    async def _send(self, line: str) -> None:
        try:
            self._stdin.write(line.encode() + b"\n")
            await self._stdin.drain()
        except ConnectionError:
            return  # the child is gone; `receive` and `wait` tell
