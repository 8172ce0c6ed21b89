"""The model registry: append-only, create-exclusive, in the artifact store.

    trunks/<digest>/…                                     trunks by content, shared by all tenants
    backbones/<key>.json                                  which trunk a backbone was exported to
    <tenant>/models/<name>/versions/<n>/owner.json        the job that took the number; comes first
    <tenant>/models/<name>/versions/<n>/…                 files, then manifest.json; among the files
                                                          is its trunk, if that is its own
    <tenant>/models/<name>/versions/<n>/deleted.json      a deleted version's number stays taken
    <tenant>/models/<name>/releases/<n>.json              see core.releases

A number is taken by whoever creates its first object. No locks, and two workers that publish at
once get two versions. A job publishes at most once, whatever its attempts do: which manifest it is
stands in the job's own records first (core.publications); an attempt that comes second finds it
there, rolls it forward, and its own version is never listed. The registry is on disk; what is
served is `service.serving_set`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from core.checkpoints import Checkpoints, parse_checkpoint
from core.errors import AlreadyExists, Conflict, NotFound
from core.files import sha256
from core.identifiers import ModelReference, is_identifier
from core.manifests import OWN_TRUNK, ModelManifest, TrunkManifest
from core.publications import Publications
from core.releases import Releases, object_number
from core.store import ArtifactStore

SHARED_FOLDERS = frozenset({"trunks", "backbones"})


@dataclass(frozen=True)
class Listing:
    """A model's listed version numbers, ascending, and the number of its current release or 0."""

    versions: tuple[int, ...]
    release: int
    changed_at: float = field(default=0.0, compare=False)
    """When its latest release or version was stored, in seconds since the epoch."""


def own_trunk_files(manifest: TrunkManifest, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a trunk as files of the one version that it is made for."""
    described = {"manifest.json": manifest.model_dump_json().encode()}
    return {f"{OWN_TRUNK}{name}": data for name, data in {**files, **described}.items()}


@dataclass(frozen=True)
class StoredFile:
    """Where a file of a model is, and its hash."""

    key: str
    sha256: str


class Registry:
    """Reads and writes trunks and versions; `releases` has the histories of what answers."""

    def __init__(self, store: ArtifactStore) -> None:
        self.releases = Releases(store)
        self._store = store

    # -- trunks ------------------------------------------------------------------------------

    def find_trunk(self, key: str) -> TrunkManifest | None:
        """Return the trunk that was exported under `key` (backbone digest, precision, recipe)."""
        try:
            digest = self._store.get(f"backbones/{key}.json").decode()
        except NotFound:
            return None
        return self.trunk(digest)

    def add_trunk(
        self, key: str, manifest: TrunkManifest, files: Mapping[str, bytes]
    ) -> TrunkManifest:
        """Store a trunk and let `key` name it; return the trunk that `key` names in the end.

        Keys under `trunks/` are content-addressed, so a second writer writes the same bytes.
        """
        self._put_same(f"trunks/{manifest.digest}", files)
        self._put_same(
            f"trunks/{manifest.digest}", {"manifest.json": manifest.model_dump_json().encode()}
        )
        self._put_same("backbones", {f"{key}.json": manifest.digest.encode()})
        return self.find_trunk(key) or manifest

    def newest_trunk(self, backbone: str, precision: str = "fp32") -> TrunkManifest | None:
        """Return the trunk that was exported last from a backbone, or None."""
        found: list[TrunkManifest] = []
        for digest in self._store.children("trunks"):
            with suppress(NotFound):  # its manifest is written last
                found.append(self.trunk(digest))
        return max(
            (each for each in found if (each.backbone, each.precision) == (backbone, precision)),
            key=lambda each: each.created_at,
            default=None,
        )

    def trunk(self, digest: str) -> TrunkManifest:
        """Return a trunk's manifest; raise `NotFound`."""
        return TrunkManifest.model_validate_json(self._store.get(f"trunks/{digest}/manifest.json"))

    def trunk_file(self, manifest: TrunkManifest, name: str) -> bytes:
        """Return a trunk's file after comparing its hash; raise `Conflict` if it differs."""
        return self._checked(f"trunks/{manifest.digest}/{name}", manifest.files[name])

    def own_trunk(self, model: ModelManifest) -> TrunkManifest:
        """Return the manifest of the trunk that is a version's own.

        Raises `Conflict` if it is not the one that was published, `NotFound` if it is not there.
        """
        manifest = TrunkManifest.model_validate_json(self.file(model, f"{OWN_TRUNK}manifest.json"))
        if manifest.digest != model.trunk:
            raise Conflict(f"{model.reference} does not have the trunk of its manifest")
        return manifest

    def trunk_bytes(self, manifest: TrunkManifest) -> int:
        """Return the size of a trunk's files."""
        folder = f"trunks/{manifest.digest}"
        return sum(self._store.size(f"{folder}/{name}") or 0 for name in manifest.files)

    # -- versions ----------------------------------------------------------------------------

    def publish(self, draft: ModelManifest, files: Mapping[str, bytes]) -> ModelManifest:
        """Store a new version of `draft.name` for the job `draft.job`; return its manifest.

        `draft.version` is not used: the version is the lowest number above all that were taken.
        Raises `AlreadyExists` when a later attempt of the job has published, or has withdrawn this
        one's leave.
        """
        publications = self._publications(draft.tenant, draft.job)
        published = publications.decision()
        if published is None:
            published = publications.decide(self._store_version(draft, files))
        elif published.attempt > draft.attempt:
            raise AlreadyExists(f"attempt {published.attempt} of {draft.job} has published")
        return self.roll_forward(published)

    def publication(self, tenant: str, job: str) -> ModelManifest | None:
        """Return the manifest that a job decided to publish, or None."""
        return self._publications(tenant, job).decision()

    def withdraw(self, tenant: str, job: str, attempt: int) -> ModelManifest | None:
        """Keep a job's earlier attempts from publishing; return what one of them has, or None."""
        return self._publications(tenant, job).withdraw(attempt)

    def roll_forward(self, manifest: ModelManifest) -> ModelManifest:
        """List the version that a job decided on; harmless when it is listed already."""
        if self._store.size(f"{manifest.folder}/deleted.json") is None:
            self._put_same(manifest.folder, {"manifest.json": manifest.model_dump_json().encode()})
        return manifest

    def manifest(self, tenant: str, name: str, version: int) -> ModelManifest:
        """Return a listed version's manifest; raise `NotFound`."""
        folder = f"{tenant}/models/{name}/versions/{version}"
        try:
            return ModelManifest.model_validate_json(self._store.get(f"{folder}/manifest.json"))
        except NotFound:
            raise NotFound(f"no model {name}@{version}", param="model") from None

    def file(self, manifest: ModelManifest, name: str) -> bytes:
        """Return a version's file after comparing its hash; raise `Conflict` if it differs."""
        return self._checked(f"{manifest.folder}/{name}", manifest.files[name])

    def stored_files(self, manifest: ModelManifest) -> dict[str, StoredFile]:
        """Return all that a version needs to answer, by name; its trunk's files as `trunk/…`.

        Raises `NotFound` if its trunk is not there.
        """
        found = {
            name: StoredFile(f"{manifest.folder}/{name}", digest)
            for name, digest in manifest.files.items()
        }
        if manifest.has_own_trunk:
            return {
                f"trunk/{name.removeprefix(OWN_TRUNK)}"
                if name.startswith(OWN_TRUNK)
                else name: file
                for name, file in found.items()
            }
        folder = f"trunks/{manifest.trunk}"
        described = self._store.get(f"{folder}/manifest.json")
        trunk = TrunkManifest.model_validate_json(described)
        hashes = {**trunk.files, "manifest.json": sha256(described)}
        return found | {
            f"trunk/{name}": StoredFile(f"{folder}/{name}", digest)
            for name, digest in hashes.items()
        }

    def versions(self, tenant: str, name: str) -> list[int]:
        """Return the numbers of a model's listed versions, ascending."""
        listing = self.catalogue(tenant, name).get(name)
        return list(listing.versions) if listing else []

    def catalogue(self, tenant: str, name: str | None = None) -> dict[str, Listing]:
        """Return what a tenant has (or one model of it), by model name, from one listing."""
        versions: dict[str, set[int]] = {}
        deleted: dict[str, set[int]] = {}
        releases: dict[str, int] = {}
        changed: dict[str, float] = {}
        for entry in self._store.walk(f"{tenant}/models" + (f"/{name}" if name else "")):
            match entry.key.split("/"):
                case [_, "models", model, "versions", number, "manifest.json"]:
                    versions.setdefault(model, set()).add(object_number(number))
                    changed[model] = max(changed.get(model, 0.0), entry.modified_at)
                case [_, "models", model, "versions", number, "deleted.json"]:
                    deleted.setdefault(model, {0}).add(object_number(number))
                case [_, "models", model, "releases", file]:
                    releases[model] = max(releases.get(model, 0), object_number(file))
                    changed[model] = max(changed.get(model, 0.0), entry.modified_at)
        return {
            model: Listing(tuple(sorted(listed)), releases.get(model, 0), changed[model])
            for model, numbers in versions.items()
            # An attempt that rolls forward while its version is deleted may leave both.
            if (listed := numbers - deleted.get(model, {0}))
        }

    def names(self, tenant: str) -> list[str]:
        """Return the names that a tenant's models have or had, sorted: no more than one listing."""
        return self._store.children(f"{tenant}/models")

    def tenants(self) -> list[str]:
        """Return every tenant that has ever stored anything."""
        # A disk's root may hold folders that are not ours, such as lost+found.
        return [
            name
            for name in self._store.children("")
            if name not in SHARED_FOLDERS and is_identifier(name)
        ]

    # -- references --------------------------------------------------------------------------

    def resolve(self, tenant: str, reference: ModelReference) -> ModelManifest:
        """Return the version or checkpoint that a reference means now; raise `NotFound`."""
        if (checkpoint := parse_checkpoint(reference)) is not None:
            job, step = checkpoint
            manifest = Checkpoints(self._store, tenant, job).get(step)
            if manifest.name != reference.name:
                raise NotFound(f"no model {reference}", param="model")
            return manifest
        version = reference.version
        if version is None:
            release = self.releases.current(tenant, reference.name)
            version = release.aliases.get(reference.alias) if release else None
        if version is None:
            raise NotFound(f"no model {reference}", param="model")
        return self.manifest(tenant, reference.name, version)

    def delete(self, tenant: str, name: str, version: int | None = None) -> list[int]:
        """Delete one version or all of them; return the numbers, or raise `NotFound`.

        A version that the current release names goes only with the whole model (`Conflict`).
        """
        listed = self.versions(tenant, name)
        doomed = listed if version is None else [n for n in listed if n == version]
        if not doomed:
            raise NotFound(f"no model {ModelReference(name, version)}", param="model")
        current = self.releases.current(tenant, name)
        used = current.versions if current else frozenset()
        if version in used:
            raise Conflict(
                f"{name}@{version} is released; release another version first, or delete {name}",
                param="model",
            )
        if doomed == listed:
            self.releases.delete(tenant, name)
        for number in doomed:
            self.bury(tenant, name, number)
        return doomed

    def bury(self, tenant: str, name: str, number: int) -> None:
        """Remove a version that shall not be listed, or never was; its number stays taken.

        Whoever still writes it, however late, cannot list it any more.
        """
        folder = f"{tenant}/models/{name}/versions/{number}"
        self._put_same(folder, {"deleted.json": b"{}"})
        self._store.delete(f"{folder}/manifest.json")
        self._store.delete(
            *(e.key for e in self._store.walk(folder) if not e.key.endswith("/deleted.json"))
        )

    def is_listed(self, tenant: str, name: str, number: int) -> bool:
        """Tell whether a version can be found, and was not deleted."""
        folder = f"{tenant}/models/{name}/versions/{number}"
        sizes = [self._store.size(f"{folder}/{file}") for file in ("manifest.json", "deleted.json")]
        return sizes[0] is not None and sizes[1] is None

    def owner(self, tenant: str, name: str, number: int) -> str | None:
        """Return the id of the job that took a version's number; None if nobody has."""
        try:
            data = self._store.get(f"{tenant}/models/{name}/versions/{number}/owner.json")
        except NotFound:
            return None
        return str(json.loads(data)["job"])

    # -- inside ------------------------------------------------------------------------------

    def _store_version(self, draft: ModelManifest, files: Mapping[str, bytes]) -> ModelManifest:
        """Take a number by saying whose it is, then store the files."""
        owner = json.dumps({"job": draft.job, "attempt": draft.attempt}).encode()
        folder = f"{draft.tenant}/models/{draft.name}/versions"
        number = max(map(object_number, self._store.children(folder)), default=0) + 1
        while True:
            try:
                self._store.put_new(f"{folder}/{number}/owner.json", owner)
                break
            except AlreadyExists:
                number += 1
        for name, content in files.items():
            self._store.put_new(f"{folder}/{number}/{name}", content)
        hashes = {name: sha256(content) for name, content in files.items()}
        return draft.model_copy(update={"version": number, "files": hashes})

    def _checked(self, key: str, expected: str) -> bytes:
        data = self._store.get(key)
        if sha256(data) != expected:
            raise Conflict(f"{key.rsplit('/', 1)[-1]} does not match its hash")
        return data

    def _put_same(self, folder: str, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            with suppress(AlreadyExists):
                self._store.put_new(f"{folder}/{name}", data)

    def _publications(self, tenant: str, job: str) -> Publications:
        return Publications(self._store, tenant, job)
