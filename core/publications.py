"""Which version a job publishes, if any: decided once, in the artifact store.

    <tenant>/runs/<job>/publication-<k>.json   k = 1, 2, …; a ModelManifest, or a Withdrawal

Each record is put, create-exclusive, into the first free number, by someone who has read all before
it. A manifest is the job's decision and the last record of all: whoever comes second finds it. A
*withdrawal* says that no attempt before its own may decide any more; an attempt that was frozen
after it had leave to publish finds it when it wakes, and gives up. So Redis may end a job as
cancelled or failed as soon as its next attempt has put a withdrawal.

Records stay with the job's archive, for nobody knows how long a frozen attempt sleeps. Not here:
the version itself (core.registry), and who withdraws when (training.attempt).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, TypeAdapter

from core.errors import AlreadyExists, NotFound
from core.manifests import ModelManifest
from core.store import ArtifactStore


class Withdrawal(BaseModel):
    """No attempt before `withdrawn_by` may publish."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    withdrawn_by: int


Record = ModelManifest | Withdrawal
_RECORDS: TypeAdapter[Record] = TypeAdapter(Record)


class Publications:
    """The records of one job; may raise `Unavailable` and `NoSpace`."""

    def __init__(self, store: ArtifactStore, tenant: str, job_id: str) -> None:
        self._store = store
        self._root = f"{tenant}/runs/{job_id}"

    def decision(self) -> ModelManifest | None:
        """Return the manifest that the job decided to publish, or None."""
        return _decision(self._read())

    def decide(self, manifest: ModelManifest) -> ModelManifest:
        """Let the job publish `manifest`, unless it has decided before; return its decision.

        Raises `AlreadyExists` if a later attempt has published, or has withdrawn this one's leave.
        """
        while True:
            records = self._read()
            latest = max(map(_author, records), default=0)
            if latest > manifest.attempt:
                raise AlreadyExists(f"attempt {latest} of {manifest.job} came first")
            if (decided := _decision(records)) is not None:
                return decided
            with suppress(AlreadyExists):  # someone was faster; read what they say
                self._put(len(records) + 1, manifest)
                return manifest

    def withdraw(self, attempt: int) -> ModelManifest | None:
        """Keep all attempts before this one from deciding; return the decision if there is one."""
        while True:
            records = self._read()
            decided = _decision(records)
            if decided is not None or any(_author(record) >= attempt for record in records):
                return decided
            with suppress(AlreadyExists):
                self._put(len(records) + 1, Withdrawal(withdrawn_by=attempt))
                return None

    def _read(self) -> list[Record]:
        """Return every record in order."""
        records: list[Record] = []
        with suppress(NotFound):
            while True:
                data = self._store.get(self._key(len(records) + 1))
                records.append(_RECORDS.validate_json(data))
        return records

    def _put(self, number: int, record: Record) -> None:
        self._store.put_new(self._key(number), record.model_dump_json().encode())

    def _key(self, number: int) -> str:
        return f"{self._root}/publication-{number}.json"


def _author(record: Record) -> int:
    return record.attempt if isinstance(record, ModelManifest) else record.withdrawn_by


def _decision(records: Sequence[Record]) -> ModelManifest | None:
    """Return the manifest, which is the last record if there is one."""
    last = records[-1] if records else None
    return last if isinstance(last, ModelManifest) else None
