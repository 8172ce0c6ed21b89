"""What can go wrong with one job, as told by the job itself, inside a real worker.

A job's metadata may hold `fault`, such as `kill@export`: an action, and the step of the job at
which it strikes, once, whichever attempt comes there first; with a `!` at the end, every time. A
file named for the job then tells who was struck. The environment variable `FAULTS_WITHOUT` names
guards that a worker does without, to see a test fail. None of this is in the product:
`tests.faults.worker` and `tests.faults.child` put it around the product's functions.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.jobs import Job

ORPHAN_SECONDS = 3.0
"""How long a child whose supervisor was killed waits to be ended before it goes on regardless."""

GIL_SECONDS = 3
FOLDER = "FAULTS_FOLDER"
WITHOUT = "FAULTS_WITHOUT"
SWITCH = "without-room"


def folder() -> Path:
    """Where this worker's faults tell of themselves."""
    return Path(os.environ[FOLDER])


def shift_clock() -> None:
    """Let this process's wall clock be off by the seconds in the file `clock`, while there is one.

    What measures by it instead of by a monotonic clock is out of time.
    """
    real, monotonic = time.time, time.monotonic
    told = folder() / "clock"

    def shift() -> float:
        try:
            return float(told.read_text())
        except FileNotFoundError:
            return 0.0

    time.time = lambda: real() + shift()  # type: ignore[assignment]
    if without("monotonic"):
        time.monotonic = lambda: monotonic() + shift()  # type: ignore[assignment]


def without(guard: str) -> bool:
    """Tell whether this worker does without a guard."""
    return guard in os.environ.get(WITHOUT, "").split(",")


def strike(job: Job, step: str, *, supervisor: int) -> None:
    """Do what the job asks for at `step`, if it does; called by the child or the supervisor."""
    action, _, where = str(_metadata(job).get("fault", "")).partition("@")
    if where.rstrip("!") != step:
        return
    told = folder() / f"{job.id}.json"
    fields = {"step": step, "attempt": job.attempt, "child": os.getpid(), "supervisor": supervisor}
    # Written whole before it has its name, for the test reads it as soon as it is there.
    draft = told.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(fields))
    try:
        os.link(draft, told)
    except FileExistsError:
        if not where.endswith("!"):
            return
    finally:
        draft.unlink()
    ACTIONS[action](supervisor)


def around(owner: Any, name: str, *, before: Callable[..., Any] | None = None,
           after: Callable[..., Any] | None = None) -> None:  # fmt: skip
    """Call `before` or `after` with the arguments of each call of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapper)


def _metadata(job: Job) -> dict[str, Any]:
    found = job.spec.get("metadata")
    return found if isinstance(found, dict) else {}


def _kill(supervisor: int) -> None:
    os.kill(supervisor, signal.SIGKILL)
    time.sleep(ORPHAN_SECONDS)


def _host(supervisor: int) -> None:
    """As when the host loses power: nobody runs on, not even for a moment."""
    os.kill(supervisor, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(supervisor: int) -> None:
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)


def _eat(_: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    bytearray(256 << 20)


def _hold_gil(_: int) -> None:
    ctypes.PyDLL(None).sleep(GIL_SECONDS)  # PyDLL, unlike CDLL, does not let the lock go


def _cut(supervisor: int) -> None:
    """The supervisor dies while no thread of the child's can see it."""
    os.kill(supervisor, signal.SIGKILL)
    _hold_gil(supervisor)


def _fill(_: int) -> None:
    """Leave no room on the disk that the artifact store is on."""
    fill_disk(folder() / "ballast")


def fill_disk(ballast: Path) -> None:
    """Write to a file, or to what it is a link to, until there is no room left."""
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 16, 1 << 9):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


ACTIONS: dict[str, Callable[[int], Any]] = {
    "kill": _kill,
    "host": _host,
    "stop": _stop,
    "segfault": lambda _: ctypes.string_at(0),
    "exit": lambda _: os._exit(7),
    "oomkill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "eat": _eat,
    "gil": _hold_gil,
    "cut": _cut,
    "fill": _fill,
    "pause": lambda _: time.sleep(1.5),
}
