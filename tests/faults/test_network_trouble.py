"""Between a worker and Redis the network is slow, swallows, resets, or loses answers only."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Mode, Proxy
from tests.faults.rig import LEASE_SECONDS, Rig, is_running
from tests.waiting import eventually

TROUBLE_SECONDS = 1.5 * LEASE_SECONDS


@pytest.fixture
def proxy(rig: Rig) -> Iterator[Proxy]:
    proxy = Proxy(f"{rig.server.folder}/redis.sock")
    yield proxy
    proxy.close()


@pytest.mark.parametrize("mode", [Mode.SLOW, Mode.BLACK_HOLE, Mode.RESET])
def test_trouble_in_the_middle_of_a_job(rig: Rig, proxy: Proxy, mode: Mode) -> None:
    worker = rig.start(url=f"redis://127.0.0.1:{proxy.port}")
    job_id = rig.enqueue("troubled", "pause@fit")
    behind = [rig.enqueue("behind") for _ in range(2)]
    rig.struck(job_id)
    proxy.mode = mode
    time.sleep(TROUBLE_SECONDS)
    proxy.mode = Mode.OPEN
    rig.finish(30)
    assert worker.poll() is None
    for each in (job_id, *behind):
        assert rig.job(each).status == "succeeded", rig.job(each).error
    rig.check()


@pytest.mark.parametrize("without", [(), ("clock",)], ids=["guarded", "unguarded"])
def test_a_worker_that_is_cut_off_gives_way_to_another(
    rig: Rig, proxy: Proxy, without: tuple[str, ...]
) -> None:
    """It cannot know that its job was taken, so it must end its child by its own clock."""
    cut_off = rig.start(url=f"redis://127.0.0.1:{proxy.port}", without=without)
    job_id = rig.enqueue("taken", "gil@fit")
    struck = rig.struck(job_id)
    proxy.mode = Mode.BLACK_HOLE
    rig.start()
    # However long a call to Redis may take, a child does not outlive its lease by much.
    try:
        eventually(lambda: not is_running(struck.child), LEASE_SECONDS + 0.5, "the child ends")
    except AssertionError:
        assert without
        return
    assert not without, "the worker's clock is no guard"
    job = rig.ended(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    proxy.mode = Mode.OPEN
    rig.enqueue("behind")
    rig.finish(20)
    assert cut_off.poll() is None
    rig.check()


def test_answers_that_are_lost_at_random(rig: Rig, proxy: Proxy) -> None:
    """A claim, an event or an end may have happened although nobody was told."""
    rig.max_attempts = 20
    worker = rig.start(url=f"redis://127.0.0.1:{proxy.port}")
    for _ in range(6):
        rig.enqueue("unsure")
    for _ in range(12):
        proxy.mode = Mode.DEAF
        time.sleep(0.05)
        proxy.mode = Mode.OPEN
        time.sleep(0.35)
    rig.finish(30)
    assert worker.poll() is None
    rig.check()
    assert {rig.job(job_id).status for job_id in rig.acknowledged} == {"succeeded"}
