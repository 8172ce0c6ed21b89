"""What a caller wants of a job, its checkpoints and its forecast, through the official client."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import openai as sdk
import pytest

from core.changes import Change
from core.checkpoints import Checkpoints
from core.jobs import JobKind, JobStatus, StopReason
from core.outlook import Progress
from core.presence import RedisPresence
from core.queue.connection import connect
from core.runs import RunStore
from service.api.files import ingest_job_id
from tests.builders import DIM, add_text_trunk, draft, head_files, publish
from tests.integration.test_service_jobs import create, file_id
from training.acknowledgement import wait_served

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI

    from tests.integration.service_process import FakeWorker, ServiceProcess

__all__ = ["file_id"]

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]


async def test_pausing_a_waiting_job_and_a_running_one(
    openai: AsyncOpenAI, worker: FakeWorker, file_id: str
):
    jobs = openai.fine_tuning.jobs
    waiting, running = await create(openai, file_id), await create(openai, file_id, priority=9)
    paused = await jobs.pause(waiting.id)
    assert (paused.status, paused.stop_reason) == ("paused", "paused")  # type: ignore[attr-defined]
    assert (await jobs.resume(waiting.id)).status == "queued"
    with pytest.raises(sdk.ConflictError, match="not paused"):
        await jobs.resume(waiting.id)

    claim = await worker.claim(running.id)
    asked = await jobs.pause(running.id)
    assert (asked.status, asked.pause_requested) == ("running", True)  # type: ignore[attr-defined]
    assert await worker.queue.heartbeat(claim, 30) is StopReason.PAUSE
    await worker.queue.release(claim)
    assert (await jobs.retrieve(running.id)).status == "paused"
    with pytest.raises(sdk.ConflictError, match=running.id):
        await openai.files.delete(file_id)
    cancelled = await jobs.cancel(running.id)
    assert (cancelled.status, cancelled.stop_reason) == ("cancelled", "cancelled")  # type: ignore[attr-defined]
    for ask in (jobs.pause, jobs.resume):
        with pytest.raises(sdk.ConflictError, match="already cancelled"):
            await ask(running.id)
    kinds = [event.event async for event in jobs.list_events(running.id)]  # type: ignore[attr-defined]
    assert kinds[::-1] == ["queued", "started", "pause_requested", "paused", "cancelled"]
    await jobs.cancel(waiting.id)


async def test_pausing_a_job_whose_file_is_not_parsed_yet(openai: AsyncOpenAI, worker: FakeWorker):
    jobs = openai.fine_tuning.jobs
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    job = await create(openai, file.id)
    assert (await jobs.pause(job.id)).status == "paused"
    await worker.settle(ingest_job_id(file.id), kind=JobKind.INGEST)
    assert (await jobs.retrieve(job.id)).status == "paused"
    assert (await jobs.resume(job.id)).status == "queued"
    await jobs.cancel(job.id)


async def test_checkpoints_and_what_a_cancel_leaves_of_them(
    openai: AsyncOpenAI, worker: FakeWorker, service: ServiceProcess, file_id: str
):
    jobs = openai.fine_tuning.jobs
    job = await create(openai, file_id, suffix="steps")
    claim = await worker.claim(job.id)
    trunk = add_text_trunk(service.registry)
    checkpoints = Checkpoints(service.store, "default", job.id)
    for step, nll in ((10, 0.9), (20, 0.4), (30, 0.6)):
        manifest = draft(trunk, "steps", job=job.id).model_copy(update={"metrics": {"nll": nll}})
        checkpoints.save(manifest, step, head_files(DIM))
    checkpoints.save_state(1, 30, b"state")

    listed = [each async for each in jobs.checkpoints.list(job.id, limit=2)]
    assert [each.step_number for each in listed] == [30, 20, 10]
    first = listed[0]
    assert (first.object, first.fine_tuning_job_id) == ("fine_tuning.job.checkpoint", job.id)
    assert (first.metrics.step, first.metrics.valid_loss) == (30, 0.6)
    assert first.fine_tuned_model_checkpoint == checkpoints.get(30).reference
    page = await jobs.checkpoints.list(job.id, after=listed[1].id)
    assert ([each.step_number for each in page.data], page.has_more) == ([10], False)
    with pytest.raises(sdk.BadRequestError):
        await jobs.checkpoints.list(job.id, after="ftckpt-none-1")

    await jobs.cancel(job.id, extra_body={"keep_best": True})
    await worker.queue.settle(claim, JobStatus.CANCELLED)
    # At once, and not only when a worker has removed the others.
    assert [each.step_number async for each in jobs.checkpoints.list(job.id)] == [20]
    ended = await worker.queue.get("default", job.id)
    assert ended is not None
    RunStore(service.store).tidy(ended)
    assert [each.step for each in checkpoints.list()] == [20]
    assert checkpoints.latest_state() is None
    RunStore(service.store).tidy(ended.model_copy(update={"keep_best": False}))
    assert checkpoints.list() == []


async def test_a_cancel_takes_only_what_it_knows(
    openai: AsyncOpenAI, http: httpx.AsyncClient, file_id: str
):
    job = await create(openai, file_id)
    path = f"/v1/fine_tuning/jobs/{job.id}/cancel"
    for body in ({"keep_best": "perhaps"}, {"keep": True}, []):
        assert (await http.post(path, json=body)).status_code == 400, body
    assert (await http.post(path, json={})).json()["status"] == "cancelled"


async def test_forecasts_follow_from_the_size_of_the_data_and_what_was_learned(
    openai: AsyncOpenAI, worker: FakeWorker, file_id: str
):
    jobs = openai.fine_tuning.jobs
    create = partial(jobs.create, model="efficientnet-lite0", training_file=file_id)
    first = await create()
    claim = await worker.claim(first.id)
    estimate = claim.job.estimate
    assert estimate is not None
    assert not estimate.is_rough
    await worker.queue.heartbeat(claim, 30, Progress(stage="data", fraction=0.01))
    behind = await create()

    async def remaining(job_id: str) -> float:
        progress = (await jobs.retrieve(job_id)).progress  # type: ignore[attr-defined]
        seconds = progress["seconds_remaining"]
        assert isinstance(seconds, float)
        return seconds

    # A process keeps its picture for a moment.
    async with asyncio.timeout(10):
        while (await jobs.retrieve(behind.id)).estimated_start is None:  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
    assert await remaining(first.id) < 60
    await worker.queue.settle(claim, JobStatus.SUCCEEDED, seconds=100 * estimate.seconds)
    claim = await worker.claim(behind.id)
    await worker.queue.heartbeat(claim, 30, Progress(stage="data", fraction=0.01))
    async with asyncio.timeout(10):
        while await remaining(behind.id) < 20 * estimate.seconds:
            await asyncio.sleep(0.1)
    await worker.queue.settle(claim, JobStatus.SUCCEEDED)


async def test_every_live_process_acknowledges_a_version(
    worker: FakeWorker, service: ServiceProcess
):
    client = connect(service.redis.url)
    presence = RedisPresence(client, prefix=service.prefix)
    trunk = add_text_trunk(service.registry)
    manifest = publish(service.registry, trunk, "acknowledged")
    await worker.feed.publish(
        Change(tenant="default", model="acknowledged", type="published", version=manifest.version)
    )
    told = await wait_served(presence, "default", "acknowledged", manifest.version)
    assert told is not None
    assert (told.acknowledged, told.refused, told.of) == (2, 0, 2)
    await client.aclose()


async def test_result_files_are_not_listed_and_the_answer_says_where_they_are(openai: AsyncOpenAI):
    with pytest.raises(sdk.BadRequestError, match="result_files"):
        await openai.files.list(purpose="fine-tune-results")
