"""What a running job keeps on its way: models that can be tried already, and where to resume.

    <tenant>/runs/<job>/checkpoints/<step>-<attempt>/…     a model's files, then manifest.json
    <tenant>/runs/<job>/state/<attempt>-<step>             one state of training, as its trainer
                                                           wrote it

A *checkpoint* is a model like a version's, under the reference `name:ckpt-<job>-<step>`; it belongs
to its job and has no version number. A *state* is for the next attempt of the same job and for
nobody else. Both are written create-exclusive under the attempt, so that a worker whose lease was
taken disturbs nobody: of one step the latest attempt counts, and of states the latest attempt's
last. A checkpoint's files are read like a version's (core.registry). Not here: when to write them
(training), who removes what was forgotten (training.collection).
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from core.errors import AlreadyExists, NotFound
from core.files import sha256
from core.identifiers import ModelReference
from core.manifests import JOB_PREFIX, ModelManifest
from core.store import ArtifactStore

KEPT_STATES = 2
"""A state that is being written when its worker dies leaves the one before it."""

_ALIAS = re.compile(r"ckpt-(?P<job>[a-z0-9_-]{1,48})-(?P<step>[0-9]{1,9})\Z")


def parse_checkpoint(reference: ModelReference) -> tuple[str, int] | None:
    """Return the job and the step that a checkpoint's reference means; None for any other."""
    match = None if reference.version is not None else _ALIAS.match(reference.alias)
    return None if match is None else (JOB_PREFIX + match["job"], int(match["step"]))


def best_checkpoint(checkpoints: Sequence[ModelManifest]) -> ModelManifest | None:
    """Return the one of the lowest held-out loss, the latest of equals; None of none."""
    return min(
        checkpoints,
        key=lambda each: (each.metrics.get("nll", float("inf")), -(each.step or 0)),
        default=None,
    )


class Checkpoints:
    """The checkpoints and states of one job; may raise `Unavailable` and `NoSpace`."""

    def __init__(self, store: ArtifactStore, tenant: str, job_id: str) -> None:
        self._store = store
        self._root = f"{tenant}/runs/{job_id}"

    # -- checkpoints -------------------------------------------------------------------------

    def save(self, draft: ModelManifest, step: int, files: Mapping[str, bytes]) -> ModelManifest:
        """Store a model of the training step `step`; return its manifest.

        Raises `AlreadyExists` when this attempt has stored the step before.
        """
        manifest = draft.model_copy(
            update={
                "version": 0,
                "step": step,
                "files": {name: sha256(data) for name, data in files.items()},
            }
        )
        for name, data in files.items():
            self._store.put_new(f"{manifest.folder}/{name}", data)
        self._store.put_new(f"{manifest.folder}/manifest.json", manifest.model_dump_json().encode())
        return manifest

    def list(self) -> list[ModelManifest]:
        """Return the manifests of the checkpoints, one a step, ascending."""
        latest: dict[str, str] = {}
        for entry in self._store.walk(f"{self._root}/checkpoints"):
            folder, _, file = entry.key.removeprefix(f"{self._root}/checkpoints/").partition("/")
            if file == "manifest.json":
                step = folder.partition("-")[0]
                latest[step] = max(folder, latest.get(step, ""))
        found = []
        for folder in sorted(latest.values()):
            with suppress(NotFound):  # removed meanwhile
                found.append(self._read(folder))
        return found

    def get(self, step: int) -> ModelManifest:
        """Return the checkpoint of a step; raise `NotFound`."""
        for manifest in self.list():
            if manifest.step == step:
                return manifest
        raise NotFound("there is no such checkpoint", param="model")

    def drop(self, keep: Collection[int] = ()) -> None:
        """Remove the checkpoints of all steps but those in `keep`; the manifest goes first."""
        keys = [
            entry.key
            for entry in self._store.walk(f"{self._root}/checkpoints")
            if int(entry.key.removeprefix(f"{self._root}/checkpoints/").partition("-")[0])
            not in keep
        ]
        self._store.delete(*sorted(keys, key=lambda key: not key.endswith("/manifest.json")))

    def drop_unlisted(self) -> None:
        """Remove what is there of checkpoints without a manifest; nobody may be writing one."""
        keys = [entry.key for entry in self._store.walk(f"{self._root}/checkpoints")]
        listed = {key.rpartition("/")[0] for key in keys if key.endswith("/manifest.json")}
        self._store.delete(*(key for key in keys if key.rpartition("/")[0] not in listed))

    # -- states ------------------------------------------------------------------------------

    def save_state(self, attempt: int, step: int, data: bytes) -> None:
        """Store where training is, and remove all but the newest states."""
        with suppress(AlreadyExists):  # the same attempt at the same step is in the same state
            self._store.put_new(f"{self._root}/state/{attempt:06}-{step:09}", data)
        self._store.delete(*self._states()[:-KEPT_STATES])

    def latest_state(self) -> bytes | None:
        """Return the newest state: the latest attempt's last; None if there is none."""
        for key in reversed(self._states()):
            with suppress(NotFound):  # removed by a newer one
                return self._store.get(key)
        return None

    def drop_states(self) -> None:
        """Remove every state."""
        self._store.delete(*self._states())

    def _states(self) -> builtins.list[str]:
        return sorted(entry.key for entry in self._store.walk(f"{self._root}/state"))

    def _read(self, folder: str) -> ModelManifest:
        return ModelManifest.model_validate_json(
            self._store.get(f"{self._root}/checkpoints/{folder}/manifest.json")
        )
