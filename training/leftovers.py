"""What crashes leave behind in the artifact store, found from one listing of a tenant.

A *leftover* is a group of objects that no reader will ever ask for, if it stays as it is:

    run       resume states, or checkpoints that nobody has judged since they were written
    version   a number taken and files, but neither a manifest nor a whole tombstone
    upload    bytes of a file that was never completed, or has been deleted half-way
    staged    a file that its writer has not finished (a directory's only)

Each may just as well be the work of someone who is still at it: being found is no verdict. A run's
`publication-<k>.json` is no leftover: it holds against an attempt that wakes however late. Not
here: whether its job has ended, how long to wait, and removal (training.collection).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

from core.store import StoredObject

LISTED = "manifest.json"
TOMBSTONE = "deleted.json"


class Leftover(NamedTuple):
    """A group of objects: a run's or a file's id, a version's name and number, or a staged key."""

    kind: Literal["run", "version", "upload", "staged"]
    name: str
    number: int = 0


@dataclass
class _Group:
    names: set[str] = field(default_factory=set)
    newest: float = 0

    def add(self, entry: StoredObject, name: str) -> None:
        self.names.add(name)
        self.newest = max(self.newest, entry.modified_at)


def find_leftovers(entries: Iterable[StoredObject]) -> Iterator[tuple[Leftover, float]]:
    """Yield what might be left over, with the time of each group's newest object.

    `entries` are all objects of one tenant, those of a folder one after another. One run, version
    or file is held at a time, however many there are.
    """
    for found, group in groupby(entries, _place):
        if found is not None:
            newest = _LOOKS[found.kind](group)
            if newest is not None:
                yield found, newest


def _place(entry: StoredObject) -> Leftover | None:
    """The run, version or file that an object is of."""
    match entry.key.split("/"):
        case [_, "runs", job, _, *_]:
            return Leftover("run", job)
        case [_, "models", model, "versions", number, _] if number.isdecimal():
            return Leftover("version", model, int(number))
        case [_, "files", file_id, _]:
            return Leftover("upload", file_id)
    return None


def _look_at_run(entries: Iterable[StoredObject]) -> float | None:
    """With a record, the one who archived it has judged what was there by then."""
    has_state, newest, judged = False, 0.0, float("-inf")
    checkpoints: dict[str, _Group] = {}
    for entry in entries:
        match entry.key.split("/")[3:]:
            case ["state", _]:
                has_state = True
            case ["checkpoints", step, name]:
                checkpoints.setdefault(step, _Group()).add(entry, name)
            case ["record.json"]:
                judged = entry.modified_at
                continue
            case _:
                continue
        newest = max(newest, entry.modified_at)
    is_leftover = has_state or any(
        group.newest > judged or LISTED not in group.names for group in checkpoints.values()
    )
    return newest if is_leftover else None


def _look_at_version(entries: Iterable[StoredObject]) -> float | None:
    group = _grouped(entries)
    is_whole = LISTED in group.names and TOMBSTONE not in group.names
    return None if is_whole or group.names == {TOMBSTONE} else group.newest


def _look_at_file(entries: Iterable[StoredObject]) -> float | None:
    group = _grouped(entries)
    return None if "upload.json" in group.names else group.newest


def _grouped(entries: Iterable[StoredObject]) -> _Group:
    group = _Group()
    for entry in entries:
        group.add(entry, entry.key.rpartition("/")[2])
    return group


_LOOKS = {"run": _look_at_run, "version": _look_at_version, "upload": _look_at_file}
