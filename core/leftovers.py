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

from collections.abc import Iterable
from dataclasses import dataclass, field
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


@dataclass
class _Run:
    states: int = 0
    newest: float = 0
    checkpoints: dict[str, _Group] = field(default_factory=dict)
    archived_at: float | None = None

    @property
    def is_leftover(self) -> bool:
        """With a record, the one who archived it has judged what was there by then."""
        if self.states:
            return True
        judged = float("-inf") if self.archived_at is None else self.archived_at
        return any(
            group.newest > judged or LISTED not in group.names
            for group in self.checkpoints.values()
        )


def find_leftovers(entries: Iterable[StoredObject]) -> dict[Leftover, float]:
    """Return what might be left over, with the time of each group's newest object.

    `entries` are all objects of one tenant, in any order.
    """
    runs: dict[str, _Run] = {}
    versions: dict[tuple[str, int], _Group] = {}
    files: dict[str, _Group] = {}
    for entry in entries:
        match entry.key.split("/"):
            case [_, "runs", job, "state", _]:
                run = runs.setdefault(job, _Run())
                run.states += 1
                run.newest = max(run.newest, entry.modified_at)
            case [_, "runs", job, "checkpoints", step, name]:
                run = runs.setdefault(job, _Run())
                run.checkpoints.setdefault(step, _Group()).add(entry, name)
                run.newest = max(run.newest, entry.modified_at)
            case [_, "runs", job, "record.json"]:
                runs.setdefault(job, _Run()).archived_at = entry.modified_at
            case [_, "models", model, "versions", number, name] if number.isdecimal():
                versions.setdefault((model, int(number)), _Group()).add(entry, name)
            case [_, "files", file_id, name]:
                files.setdefault(file_id, _Group()).add(entry, name)
    return (
        {Leftover("run", job): run.newest for job, run in runs.items() if run.is_leftover}
        | {
            Leftover("version", *version): group.newest
            for version, group in versions.items()
            if (TOMBSTONE in group.names and len(group.names) > 1)
            or (TOMBSTONE not in group.names and LISTED not in group.names)
        }
        | {
            Leftover("upload", file_id): group.newest
            for file_id, group in files.items()
            if "upload.json" not in group.names
        }
    )
