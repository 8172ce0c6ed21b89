"""Automatic rollback: a release that goes wrong is taken back without waiting for a person.

Off unless the release has a `guard`. Each process judges what it has seen itself, `min_rows` rows
of one version at a time, so that one with a small part of the traffic is not hidden by the others:
the rows that could not be computed, and those on which the shadow disagreed. If a limit is passed
it appends a release with the content of the one before, and without a guard, so that two
releases never take each other back in turns. It is put behind the release that was judged: of
several processes one succeeds, and a person who was faster is never overruled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from core.changes import Change, ChangeFeed
from core.errors import Conflict, GraftError, Unavailable
from core.manifests import Guard, Release, ReleaseContent
from core.releases import Releases
from service.live_models import LiveModel
from service.metrics import ModelLabels
from service.serving_set import ModelKey

logger = logging.getLogger("graft.service")

RELEASED_BY = "service"


@dataclass
class _Tally:
    """Bad rows of all rows since the last judgement."""

    bad: int = 0
    rows: int = 0

    def judge(self, limit: float | None, min_rows: int) -> float | None:
        """Return the rate of bad rows if there are enough and it is above the limit."""
        if limit is None or self.rows < min_rows:
            return None
        rate = self.bad / self.rows
        self.bad = self.rows = 0
        return rate if rate > limit else None


class _Watched:
    """What this process has seen of one release, by the version that answered."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.errors: defaultdict[int, _Tally] = defaultdict(_Tally)
        self.comparisons: defaultdict[int, _Tally] = defaultdict(_Tally)


class AutoRollback:
    """Judges the releases that have a guard. Belongs to one event loop."""

    def __init__(
        self,
        releases: Releases,
        feed: ChangeFeed,
        reconcile: Callable[[str, str], Awaitable[None]],
        labels: ModelLabels,
    ) -> None:
        self._releases = releases
        self._feed = feed
        self._reconcile = reconcile
        self._labels = labels
        self._watched: dict[ModelKey, _Watched] = {}
        self._tasks: dict[ModelKey, asyncio.Task[None]] = {}

    def answered(self, model: LiveModel, rows: int, failed: int) -> None:
        """Take note of an answer; `failed` rows failed through no fault of the caller's."""
        if model.release is None:
            return
        self._count(model, model.release, rows, failed)
        if model.release.guard is not None:
            tally = self._of(model, model.release).errors[model.manifest.version]
            tally.rows += rows
            tally.bad += failed
            self._judge(model, model.release, model.release.guard)

    def compared(self, model: LiveModel, agreed: int, disagreed: int) -> None:
        """Take note of what a shadow made of rows that `model` answered."""
        if model.release is not None and model.release.guard is not None:
            tally = self._of(model, model.release).comparisons[model.manifest.version]
            tally.rows += agreed + disagreed
            tally.bad += disagreed
            self._judge(model, model.release, model.release.guard)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _count(self, model: LiveModel, release: Release, rows: int, failed: int) -> None:
        """Count the rows of a split release, for people to judge."""
        if len(release.traffic) > 1:
            newest = max(share.version for share in release.traffic)
            side = "newest" if model.manifest.version == newest else "others"
            answered, not_answered = self._labels.meters(model.manifest.name).split_rows[side]
            answered.inc(rows - failed)
            not_answered.inc(failed)

    def _of(self, model: LiveModel, release: Release) -> _Watched:
        key = model.manifest.tenant, model.manifest.name
        watched = self._watched.get(key)
        # By time, for a model that is deleted and made again counts its releases from 1.
        if watched is None or watched.release.created_at < release.created_at:
            watched = self._watched[key] = _Watched(release)
        return watched

    def _judge(self, model: LiveModel, release: Release, guard: Guard) -> None:
        key = model.manifest.tenant, model.manifest.name
        watched, version = self._watched[key], model.manifest.version
        if watched.release != release or key in self._tasks:
            return
        for tally, limit, what in (
            (watched.errors[version], guard.max_error_rate, "error rate"),
            (watched.comparisons[version], guard.max_disagreement, "disagreement"),
        ):
            rate = tally.judge(limit, guard.min_rows)
            if rate is not None:
                reason = (
                    f"{what} {rate:.3f} of version {version} in release {release.number} "
                    f"is above {limit}"
                )
                task = asyncio.create_task(self._roll_back(key, release, reason))
                self._tasks[key] = task
                task.add_done_callback(lambda _: self._tasks.pop(key, None))
                return

    async def _roll_back(self, key: ModelKey, release: Release, reason: str) -> None:
        tenant, name = key

        def before(_: ReleaseContent | None) -> ReleaseContent:
            earlier = self._releases.read(tenant, name, release.number - 1)
            return earlier.model_copy(update={"guard": None})

        try:
            made = await asyncio.to_thread(
                self._releases.append, tenant, name, before,
                created_by=RELEASED_BY, reason=reason, behind=release.number,
            )  # fmt: skip
        except Conflict:
            return  # somebody has released something else by now
        except GraftError as error:
            logger.error("%s: %s, and it cannot be taken back: %s", name, reason, error.message)
            return
        logger.warning("%s: %s; release %d takes it back", name, reason, made.number)
        self._labels.meters(name).rollbacks.inc()
        with suppress(Unavailable):  # others look by themselves
            await self._feed.publish(Change(tenant=tenant, model=name, type="released"))
            await self._reconcile(tenant, name)
