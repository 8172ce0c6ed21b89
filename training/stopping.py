"""How a job is asked to stop between two steps, and how it says that it did.

Who trains calls `check` between steps; once a stop was asked for, it raises `Stopped`. Whoever has
a state worth keeping catches that, saves, and raises it again: there is time for one save
(`Settings.stop_seconds`), after which the child is ended. A job that has leave to publish is not
asked any more. Not here: who asks, and why (training.attempt), and the messages (training.process).
"""

from __future__ import annotations

from typing import Protocol

from core.jobs import StopReason

__all__ = ["StopReason", "Stoppable", "Stopped"]


class Stopped(Exception):
    """Raised between steps by a job that was asked to stop; no error, so in no tree of errors."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Stoppable(Protocol):
    """What a job looks at between steps; `training.child.Reporter` is the real one."""

    def check(self) -> None:
        """Raise `Stopped` if the job was asked to stop."""
