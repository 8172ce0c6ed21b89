"""What waits in a line: rows that came together, and how their request ends.

It ends once: answered when its last row is, refused, expired, or left by its caller, who cancels
it. Not here: when that happens (service.line).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from core.adapter_bank import BankedAdapter
from core.errors import DeadlineExceeded, GraftError, Overloaded
from service.caller import Lane
from service.row_queue import Item, Model

Result = TypeVar("Result")


@dataclass(eq=False)
class Request(Generic[Item, Result]):
    """Rows that come together; answered together when the last of them is done.

    `deadline` is on the clock of `time.monotonic`; `model` is whose turn the rows take.
    """

    items: Sequence[Item]
    deadline: float
    model: Model = None
    lane: Lane = Lane.NORMAL
    adapter: BankedAdapter | None = None
    seconds_after: float = 0.0
    """What the rows are expected to wait for behind this line, before the deadline."""
    taken: float | None = None
    """When the first of its rows left the queue."""
    results: dict[int, Result | GraftError] = field(default_factory=dict)
    done: asyncio.Future[None] = field(init=False)

    def is_dead(self) -> bool:
        """Tell whether nobody waits for its rows any more."""
        return self.done.done() or self.deadline <= time.monotonic()

    def finish(self, index: int, result: Result | GraftError) -> None:
        """Take the result of one row."""
        self.results.setdefault(index, result)
        if len(self.results) == len(self.items) and not self.done.done():
            self.done.set_result(None)

    def refuse(self, error: GraftError) -> None:
        """End it with an error for the whole."""
        if not self.done.done():
            self.done.set_exception(error)

    def expire(self) -> None:
        """End it because its time is up."""
        self.refuse(too_late())


def not_computed() -> GraftError:
    """What is said of a row through no fault of its own."""
    return GraftError("this input could not be computed")


def too_many(wait_seconds: float) -> Overloaded:
    """What is said to one for whom there is no room, or no time."""
    return Overloaded("too many predictions are waiting", retry_after_seconds=wait_seconds)


def too_late() -> DeadlineExceeded:
    """What is said to one whose time is up."""
    return DeadlineExceeded("the prediction was not ready before its deadline")


def shutting_down() -> Overloaded:
    """What is said to those that wait when the process ends."""
    return Overloaded("the service is shutting down", retry_after_seconds=1)
