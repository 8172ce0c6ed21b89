"""Releases: the history of which version answers for a model's name.

    <tenant>/models/<name>/releases/<n>.json    the highest number holds

A release is put create-exclusive behind the one it was made from, so of two at once one comes
second and is made again from what holds then, or refused. Nothing is ever changed: to go back is a
new release with the content of an older one. Who reads this sees a release whole or not at all.
Not here: what a request gets (service.routing), whether a version loads (service.hot_loader).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from pydantic import ValidationError

from core.errors import AlreadyExists, Conflict, NotFound
from core.identifiers import PRODUCTION
from core.manifests import ModelManifest, Release, ReleaseContent
from core.store import ArtifactStore

MAX_SKEW_SECONDS = 2 * 3600.0
"""Two hosts' clocks differ by less."""

Change = Callable[[ReleaseContent | None], ReleaseContent]
"""From what the current release says, or None, to what the next one shall say."""


class Releases:
    """Reads and appends releases; may raise `Unavailable` and `NoSpace`."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def append(
        self, tenant: str, name: str, change: Change, *, created_by: str, reason: str,
        behind: int | None = None,
    ) -> Release:  # fmt: skip
        """Append what `change` makes of the current release.

        With `behind`, only if that is the current number, and otherwise raise `Conflict`. Raises
        `NotFound` for a version that is not listed.
        """
        while True:
            current = self.current(tenant, name)
            number = current.number if current else 0
            if behind is not None and behind != number:
                raise Conflict(f"the current release of {name} is {number}", param="behind")
            content = change(current)
            for version in content.versions:
                self._require_version(tenant, name, version)
            with suppress(AlreadyExists):  # someone took the number; look at their release
                return self._put(tenant, name, number + 1, content, created_by, reason)

    def alias(
        self, tenant: str, name: str, aliases: dict[str, int], *, created_by: str, reason: str
    ) -> Release:
        """Append a release that changes `aliases` and keeps the others, without a split."""
        return self.append(
            tenant, name, lambda current: _with(current, aliases),
            created_by=created_by, reason=reason,
        )  # fmt: skip

    def promote(self, manifest: ModelManifest, *, created_by: str, reason: str) -> None:
        """Let production name a new version, once; raise `NotFound` if the version is not listed.

        An attempt that took over, or one that was stopped for a while, may come late: what was
        promoted since, or has been rolled back since, is left as it is.
        """
        tenant, name, version = manifest.tenant, manifest.name, manifest.version
        self._require_version(tenant, name, version)
        while not self._was_promoted(manifest, current := self.current(tenant, name)):
            content = _with(current, {PRODUCTION: version})
            number = current.number if current else 0
            with suppress(AlreadyExists):
                self._put(tenant, name, number + 1, content, created_by, reason)
                return

    def current(self, tenant: str, name: str) -> Release | None:
        """Return the release with the highest number, or None."""
        numbers = self.numbers(tenant, name)
        return self.read(tenant, name, numbers[-1]) if numbers else None

    def numbers(self, tenant: str, name: str) -> list[int]:
        """Return the numbers of a model's releases, ascending."""
        entries = self._store.walk(self._folder(tenant, name))
        found = {object_number(entry.key.rsplit("/", 1)[-1]) for entry in entries}
        return sorted(found - {0})

    def read(self, tenant: str, name: str, number: int) -> Release:
        """Return one release; raise `NotFound`."""
        try:
            data = self._store.get(f"{self._folder(tenant, name)}/{number}.json")
        except NotFound:
            raise NotFound(f"{name} has no release {number}", param="release") from None
        return Release.model_validate_json(data)

    def applied(
        self, tenant: str, name: str, number: int, *, lives: Callable[[int], bool], depth: int = 20
    ) -> Release | None:
        """Return release `number` without versions that do not live, or None if there is none.

        An alias of such a version keeps the last one of its earlier releases that lives, up to
        `depth` releases back. A release that cannot be read is passed over.
        """
        applied: Release | None = None
        for earlier in range(number, max(0, number - depth), -1):
            try:
                release = self.read(tenant, name, earlier)
            except (NotFound, ValidationError):
                continue
            applied = _restricted(release, lives) if applied is None else applied
            names = {alias: v for alias, v in applied.aliases.items() if not lives(v)}
            named = {a: release.aliases[a] for a in names if lives(release.aliases.get(a, 0))}
            applied = applied.model_copy(update={"aliases": {**applied.aliases, **named}})
            if all(map(lives, applied.aliases.values())):
                break
        return applied

    def delete(self, tenant: str, name: str) -> None:
        """Forget a model's history, when the model itself is deleted."""
        self._store.delete(*(entry.key for entry in self._store.walk(self._folder(tenant, name))))

    # -- inside ------------------------------------------------------------------------------

    def _put(
        self, tenant: str, name: str, number: int, content: ReleaseContent, created_by: str,
        reason: str,
    ) -> Release:  # fmt: skip
        """Raise `AlreadyExists` if the number is taken."""
        release = Release(
            **content.model_dump(include=_CONTENT),
            number=number,
            created_at=time.time(),
            created_by=created_by,
            reason=reason,
        )
        key = f"{self._folder(tenant, name)}/{number}.json"
        self._store.put_new(key, release.model_dump_json().encode())
        return release

    def _was_promoted(self, manifest: ModelManifest, release: Release | None) -> bool:
        """Tell if production named this version or a later one since this one was made."""
        while release is not None:
            if release.aliases.get(PRODUCTION, 0) >= manifest.version:
                return True
            age = manifest.created_at - release.created_at
            if age > MAX_SKEW_SECONDS or release.number == 1:
                return False
            try:
                release = self.read(manifest.tenant, manifest.name, release.number - 1)
            except NotFound:  # the model was deleted meanwhile
                return False
        return False

    def _require_version(self, tenant: str, name: str, version: int) -> None:
        key = f"{tenant}/models/{name}/versions/{version}/manifest.json"
        if self._store.size(key) is None:
            raise NotFound(f"no model {name}@{version}", param="model")

    @staticmethod
    def _folder(tenant: str, name: str) -> str:
        return f"{tenant}/models/{name}/releases"


_CONTENT = set(ReleaseContent.model_fields)


def _with(current: ReleaseContent | None, aliases: dict[str, int]) -> ReleaseContent:
    return ReleaseContent(aliases={**(current.aliases if current else {}), **aliases})


def _restricted(release: Release, lives: Callable[[int], bool]) -> Release:
    """Return a release whose split and shadow name only versions that live."""
    traffic = tuple(share for share in release.traffic if lives(share.version))
    shadow = release.shadow if release.shadow is not None and lives(release.shadow) else None
    return release.model_copy(update={"traffic": traffic, "shadow": shadow})


def object_number(name: str) -> int:
    """Return the number of a version's folder or a release's file; 0 for what is not ours."""
    digits = name.removesuffix(".json")
    return int(digits) if digits.isascii() and digits.isdigit() else 0
