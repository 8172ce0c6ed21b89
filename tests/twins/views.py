"""What there is to see of the jobs in memory, and how to wait for a change of them.

Not here: anything that changes a job (tests.twins.memory).
"""

from __future__ import annotations

import asyncio
import builtins
import time
from contextlib import suppress

from core.jobs import Job, JobEvent, JobKind, event_order
from core.outlook import Line, Outlook, Running
from core.queue.protocol import JobViews
from core.queue.records import require_event_id
from tests.twins.ledger import Ledger

OUTLOOK_JOBS = 500


class MemoryJobViews(JobViews):
    """Reads the jobs and events of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._changed = asyncio.Event()

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Return the job, or None."""
        entry = self._ledger.find(tenant, job_id)
        return entry.job if entry else None

    async def position(self, job: Job) -> int | None:
        """How many jobs of the tenant and kind go before this queued one; None if not queued."""
        ids = [entry.job.id for entry in self._ledger.pending(job.kind, job.tenant)]
        return ids.index(job.id) if job.id in ids else None

    async def outlook(self, kind: JobKind) -> Outlook:
        """Return what a forecast is made from, of all tenants."""
        ledger = self._ledger
        running = [entry for entry in ledger.of(kind) if entry.lease_ends is not None]
        return Outlook(
            now=ledger.clock(),
            running=tuple(
                Running(
                    id=e.job.id, claimed_at=e.job.claimed_at or 0,
                    estimate=e.job.estimate, progress=e.job.progress,
                )
                for e in sorted(running, key=lambda e: (e.lease_ends, e.job.tenant, e.job.id))
            ),
            ratios={pace: took / due for pace, (took, due) in ledger.speeds[kind].items()},
            pending={tenant: self._line(kind, tenant) for tenant in ledger.turns[kind]},
        )  # fmt: skip

    def _line(self, kind: JobKind, tenant: str) -> Line:
        share = OUTLOOK_JOBS // len(self._ledger.turns[kind])
        jobs = [entry.job for entry in self._ledger.pending(kind, tenant)]
        return Line(count=len(jobs), first=tuple(job.estimate for job in jobs[:share]))

    async def waiters(self, job: Job, limit: int = 100) -> builtins.list[Job]:
        """Return jobs that wait for this one and have no estimate yet."""
        waiting = [
            entry.job
            for entry in self._ledger.entries.values()
            if job.id in entry.waits_for and not entry.job.status.is_terminal
        ]
        found = [each for each in waiting if each.tenant == job.tenant and each.estimate is None]
        return found[:limit]

    async def events(
        self,
        tenant: str,
        job_id: str,
        *,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = False,
    ) -> list[JobEvent]:
        """Return events strictly behind `after` in the chosen direction."""
        entry = self._ledger.find(tenant, job_id)
        events = list(entry.events) if entry else []
        if newest_first:
            events.reverse()
        if after:
            cursor = event_order(require_event_id(after))
            events = [
                event
                for event in events
                if event_order(event.id) != cursor
                and (event_order(event.id) < cursor) == newest_first
            ]
        return events[:limit]

    async def wait_events(
        self, tenant: str, job_id: str, after: str | None, timeout_seconds: float
    ) -> list[JobEvent]:
        """Return the events behind `after`, oldest first, waiting for the first if none."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            events = await self.events(tenant, job_id, after=after, limit=10_000)
            remaining = deadline - time.monotonic()
            if events or remaining <= 0:
                return events
            await self._change(remaining)

    async def list(
        self, tenant: str, kind: JobKind, *, after: str | None = None, limit: int = 20
    ) -> list[Job]:
        """Return up to `limit` jobs, newest first, beginning behind the job `after`."""
        jobs = [entry.job for entry in reversed(self._ledger.of(kind, tenant))]
        if after:
            ids = [job.id for job in jobs]
            jobs = jobs[ids.index(after) + 1 :] if after in ids else []
        return jobs[:limit]

    async def ping(self) -> None:
        """Return: memory always answers."""

    async def close(self) -> None:
        """Return: there is nothing to release."""

    async def unarchived(self, limit: int = 100) -> builtins.list[Job]:
        """Return ended jobs that nobody has marked as archived, oldest first."""
        return [entry.job for entry in self._ledger.unarchived[:limit]]

    def _ring(self) -> None:
        """Let every `_change` return; each looks for itself whether it was meant."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, timeout_seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
