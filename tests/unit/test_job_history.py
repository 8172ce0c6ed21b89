"""Finished jobs are archived whole, come what may, and answered when Redis is empty."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from core.datasets import FileErrors, FileStatus, UploadedFile
from core.errors import InvalidRequest, NotFound, Unavailable
from core.files import FileStore
from core.jobs import Failure, Job, JobEvent, JobKind, JobStatus, NewJob
from core.registry import Registry
from core.runs import RunStore, parse_result_file_id, result_file_ids
from core.store import ArtifactStore
from service.job_history import JobHistory
from tests.builders import TENANT, add_text_trunk, draft, head_files
from tests.twins.memory import MemoryJobQueue
from training.archive import archive_finished, keep_archive

pytestmark = pytest.mark.anyio
LONG = 60.0
TUNE = JobKind.FINE_TUNE


class FailingStore(ArtifactStore):
    """A store that fails at the writes whose keys end so."""

    failing: str | None = None

    def put_new(self, key: str, data: bytes) -> None:
        if self.failing is not None and key.endswith(self.failing):
            raise Unavailable("the artifact store does not answer")
        super().put_new(key, data)


class Clock:
    """A clock that goes on by a second with every look, so that no two jobs are of one age."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.25

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    return FailingStore(str(tmp_path))


@pytest.fixture
def runs(store: FailingStore) -> RunStore:
    return RunStore(store)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> MemoryJobQueue:
    return MemoryJobQueue(clock=clock)


async def enqueue(queue: MemoryJobQueue, *ids: str) -> None:
    for id in ids:
        await queue.enqueue(NewJob(tenant=TENANT, id=id, kind=TUNE, spec={"model": "minilm"}))


async def succeed(queue: MemoryJobQueue, id: str) -> Job:
    await enqueue(queue, id)
    claim = await queue.claim(TUNE, "w", LONG)
    assert claim is not None
    assert claim.job.id == id
    for epoch in (1, 2):
        data = {"epoch": epoch, "loss": 1 / epoch, "per_class": {"a": 1}}
        await queue.append_event(claim, "metrics", f"epoch {epoch}", data=data)  # type: ignore[arg-type]
    return await queue.settle(claim, JobStatus.SUCCEEDED, result={"fine_tuned_model": "pets@1"})


async def all_events(queue: MemoryJobQueue, id: str) -> list[JobEvent]:
    return await queue.events(TENANT, id, limit=1000)


class TestArchive:
    async def test_record_events_metrics_and_report_are_kept(
        self, queue: MemoryJobQueue, runs: RunStore, store: FailingStore
    ) -> None:
        registry = Registry(store)
        trunk = add_text_trunk(registry)
        files = head_files(trunk.dim) | {"report.json": b'{"accuracy": 0.9}'}
        registry.publish(draft(trunk, job="j"), files)
        job = await succeed(queue, "j")
        assert await archive_finished(queue, runs) is False
        assert runs.get(TENANT, "j") == job
        assert runs.events(TENANT, "j") == await all_events(queue, "j")
        assert runs.result(TENANT, "j", "report.json") == b'{"accuracy": 0.9}'
        header, first, second = runs.result(TENANT, "j", "metrics.csv").decode().splitlines()
        assert header == "created_at,epoch,loss"
        assert first.endswith(",1,1.0")
        assert second.endswith(",2,0.5")
        assert [place.id for place in runs.places(TENANT)] == ["j"]
        assert await queue.unarchived() == []

    async def test_report_outlives_a_model_that_was_deleted_first(
        self, queue: MemoryJobQueue, runs: RunStore
    ) -> None:
        await succeed(queue, "j")
        await archive_finished(queue, runs)
        report = json.loads(runs.result(TENANT, "j", "report.json"))
        assert report["job"] == "j"
        assert report["result"] == {"fine_tuned_model": "pets@1"}

    @pytest.mark.parametrize(
        "at", ["events.jsonl", "metrics.csv", "report.json", "record.json", "-j"]
    )
    async def test_failure_at_each_write_is_made_good(
        self, queue: MemoryJobQueue, runs: RunStore, store: FailingStore, at: str
    ) -> None:
        job = await succeed(queue, "j")
        store.failing = at
        assert await archive_finished(queue, runs) is True
        assert await queue.unarchived() == [job]
        if at != "-j":
            assert runs.get(TENANT, "j") is None
        store.failing = None
        await archive_finished(queue, runs)
        assert runs.get(TENANT, "j") == job
        assert [place.id for place in runs.places(TENANT)] == ["j"]
        assert await queue.unarchived() == []

    @pytest.mark.parametrize("is_there", [True, False])
    async def test_a_file_that_could_not_be_parsed_says_so(
        self, queue: MemoryJobQueue, runs: RunStore, store: FailingStore, is_there: bool
    ) -> None:
        """Or it would be parsed again when Redis has forgotten why, and do the same again."""
        files = FileStore(store, TENANT)
        if is_there:
            store.put_new(files.upload_key("file-a"), b"poison")
            files.complete(UploadedFile(id="file-a", filename="a", bytes=6, created_at=0))
        ingest, spec = JobKind.INGEST, {"file": "file-a"}
        await queue.enqueue(NewJob(tenant=TENANT, id="ingest-file-a", kind=ingest, spec=spec))
        claim = await queue.claim(ingest, "w", LONG)
        assert claim is not None
        failure = Failure(code="crashed", message="the job's process ended with signal 11")
        await queue.settle(claim, JobStatus.FAILED, error=failure)
        assert await archive_finished(queue, runs) is False
        assert await queue.unarchived() == []
        status, errors = files.status("file-a")
        if is_there:
            assert isinstance(errors, FileErrors)
            assert (status, errors.summary()) == (FileStatus.ERROR, failure.message)
        else:
            assert status is FileStatus.UPLOADED
        assert runs.places(TENANT) == []

    async def test_one_job_that_cannot_be_archived_holds_up_none(
        self, queue: MemoryJobQueue, runs: RunStore, store: FailingStore
    ) -> None:
        await succeed(queue, "bad")
        await succeed(queue, "good")
        store.failing = "bad/record.json"
        assert await archive_finished(queue, runs) is True
        assert runs.get(TENANT, "good") is not None
        assert [job.id for job in await queue.unarchived()] == ["bad"]

    async def test_workers_at_once_write_the_same(
        self, queue: MemoryJobQueue, runs: RunStore
    ) -> None:
        jobs = [await succeed(queue, f"j{n}") for n in range(5)]
        await asyncio.gather(*(archive_finished(queue, runs) for _ in range(3)))
        assert [runs.get(TENANT, job.id) for job in jobs] == jobs
        assert await queue.unarchived() == []

    async def test_worker_archives_what_ends_until_it_stops(
        self, queue: MemoryJobQueue, runs: RunStore
    ) -> None:
        stopping = asyncio.Event()
        task = asyncio.create_task(keep_archive(queue, runs, stopping))
        await enqueue(queue, "j")
        job = await queue.cancel(TENANT, "j")
        async with asyncio.timeout(10):
            while runs.get(TENANT, "j") is None:
                await asyncio.sleep(0.02)
        assert runs.get(TENANT, "j") == job
        stopping.set()
        await asyncio.wait_for(task, 1)

    async def test_cancelled_and_failed_jobs_have_no_result_files(
        self, queue: MemoryJobQueue, runs: RunStore
    ) -> None:
        await enqueue(queue, "j")
        job = await queue.cancel(TENANT, "j")
        await archive_finished(queue, runs)
        assert result_file_ids(job) == {}
        for name in ("report.json", "metrics.csv"):
            with pytest.raises(NotFound):
                runs.result(TENANT, "j", name)


def test_a_version_that_the_quality_gate_held_back_has_its_report() -> None:
    job = Job(
        tenant=TENANT, id="ftjob-1", kind=TUNE, status=JobStatus.FAILED, spec={}, created_at=0,
        error=Failure(code="quality_gate", message="not good enough"),
    )  # fmt: skip
    assert set(result_file_ids(job)) == {"metrics.csv", "report.json", "report.html"}
    crashed = job.model_copy(update={"error": Failure(code="crashed", message="")})
    assert result_file_ids(crashed) == {}


def test_result_file_ids_name_their_job() -> None:
    job = Job(
        tenant=TENANT, id="ftjob-1", kind=TUNE, status=JobStatus.SUCCEEDED, spec={}, created_at=0
    )
    for name, file_id in result_file_ids(job).items():
        assert parse_result_file_id(file_id) == ("ftjob-1", name)
    assert parse_result_file_id("file-0123456789abcdef01234567") is None


class TestHistory:
    @pytest.fixture
    def history(self, queue: MemoryJobQueue, runs: RunStore) -> JobHistory:
        return JobHistory(queue, runs, index_seconds=-1)

    async def test_empty_redis_is_not_noticed(
        self, queue: MemoryJobQueue, runs: RunStore, history: JobHistory
    ) -> None:
        job = await succeed(queue, "j")
        before = await all_events(queue, "j")
        results = [await history.result_file(TENANT, id) for id in result_file_ids(job).values()]
        await archive_finished(queue, runs)
        later = JobHistory(MemoryJobQueue(), runs)
        assert await later.get(TENANT, "j") == job
        assert await later.list(TENANT) == [job]
        assert await later.events(job) == before
        assert await later.events(job, limit=2, newest_first=True) == before[:-3:-1]
        behind = await later.events(job, after=before[-2].id, newest_first=True)
        assert behind == before[-3::-1]
        assert await later.wait_events(job, None, LONG) == before
        assert await later.wait_events(job, before[1].id, LONG) == before[2:]
        assert await later.wait_events(job, before[-1].id, 0) == []
        assert [
            await later.result_file(TENANT, id) for id in result_file_ids(job).values()
        ] == results
        assert None not in results

    async def test_unknown_jobs_and_those_of_other_kinds_or_tenants(
        self, queue: MemoryJobQueue, runs: RunStore, history: JobHistory
    ) -> None:
        await succeed(queue, "j")
        await archive_finished(queue, runs)
        await queue.enqueue(NewJob(tenant=TENANT, id="i", kind=JobKind.INGEST, spec={}))
        assert await history.get(TENANT, "i") is None
        assert await history.get("bolt", "j") is None
        assert await history.list("bolt") == []
        for file_id in ("file-report-i", "file-report-none", "file-report-", "file-1"):
            assert await history.result_file(TENANT, file_id) is None
        assert await history.result_file("bolt", "file-report-j") is None

    async def test_job_that_has_not_succeeded_has_no_result_file(
        self, queue: MemoryJobQueue, history: JobHistory
    ) -> None:
        await enqueue(queue, "j")
        assert await history.result_file(TENANT, "file-report-j") is None
        claim = await queue.claim(TUNE, "w", LONG)
        assert claim is not None
        failure = Failure(code="crashed", message="it crashed")
        await queue.settle(claim, JobStatus.FAILED, error=failure)
        assert await history.result_file(TENANT, "file-report-j") is None

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
    async def test_list_is_one_however_the_jobs_are_spread(
        self, clock: Clock, runs: RunStore, limit: int
    ) -> None:
        """Three in the store alone, three in both, and among those in Redis alone an old one."""
        lost = MemoryJobQueue(clock=clock)
        for n in range(3):
            await succeed(lost, f"a{n}")
        await archive_finished(lost, runs)
        queue = MemoryJobQueue(clock=clock)
        for n in range(3):
            await succeed(queue, f"b{n}")
        await archive_finished(queue, runs)
        await enqueue(queue, "c0", "c1")
        gone = MemoryJobQueue(clock=clock)
        await succeed(gone, "d0")
        await archive_finished(gone, runs)
        await enqueue(queue, "e0")
        history = JobHistory(queue, runs, index_seconds=-1)
        seen: list[str] = []
        after = None
        while page := await history.list(TENANT, after=after, limit=limit):
            assert len(page) <= limit
            seen += [job.id for job in page]
            after = page[-1].id
        assert seen == ["e0", "d0", "c1", "c0", "b2", "b1", "b0", "a2", "a1", "a0"]
        with pytest.raises(InvalidRequest):
            await history.list(TENANT, after="gone")
