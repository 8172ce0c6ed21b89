"""The scan for jobs by metadata: bounded, and its pages without gap or repeat."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.jobs import JobKind, NewJob
from core.runs import RunStore
from core.store import ArtifactStore
from service.api.job_filter import search
from service.job_history import JobHistory
from tests.twins.memory import MemoryJobQueue

pytestmark = pytest.mark.anyio


async def history_of(folder: Path, jobs: int, every: int) -> JobHistory:
    """Jobs j0, j1, …, of which every `every`th is blue."""
    queue = MemoryJobQueue()
    for n in range(jobs):
        metadata = {"team": "blue" if n % every == 0 else "red"}
        spec = {"metadata": metadata}
        await queue.enqueue(NewJob(tenant="t", id=f"j{n}", kind=JobKind.FINE_TUNE, spec=spec))
    return JobHistory(queue, RunStore(ArtifactStore(str(folder))))


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
async def test_pages_hold_every_match_once(limit: int, tmp_path: Path):
    history = await history_of(tmp_path, 450, every=100)
    seen: list[str] = []
    after, has_more = None, True
    while has_more:
        page = await search(history, "t", {"team": "blue"}, after=after, limit=limit)
        assert len(page.jobs) <= limit
        seen += [job.id for job in page.jobs]
        after, has_more = seen[-1], page.has_more
    assert seen == ["j400", "j300", "j200", "j100", "j0"]


async def test_a_search_that_ends_at_its_bound_says_where(tmp_path: Path):
    history = await history_of(tmp_path, 700, every=650)
    wanted = {"team": "blue"}
    first = await search(history, "t", wanted, after=None, limit=5, max_scanned=200)
    assert [job.id for job in first.jobs] == ["j650"]
    assert (first.has_more, first.scanned_to) == (True, "j500")
    seen, page = [], first
    while page.has_more:
        page = await search(history, "t", wanted, after=page.scanned_to, limit=5, max_scanned=200)
        seen += [job.id for job in page.jobs]
    assert seen == ["j0"]
