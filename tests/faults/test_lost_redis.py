"""Redis is away for long, comes back empty, or its answers get lost half-way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from tests.faults.faults import GIL_SECONDS
from tests.faults.proxy import Mode, Proxy
from tests.faults.rig import LEASE_SECONDS, InvariantBroken, Rig, is_running, resume
from tests.waiting import eventually


@pytest.fixture
def proxy(rig: Rig) -> Iterator[Proxy]:
    proxy = Proxy(rig.server.socket)
    yield proxy
    proxy.close()


def be_away(rig: Rig, job_id: str, seconds: float, child_ends: bool) -> None:
    """Kill Redis in the middle of a job, and start it again when it was away for so long."""
    struck = rig.struck(job_id)
    rig.server.kill()
    gone = time.monotonic()
    if child_ends:
        eventually(lambda: not is_running(struck.child), 10, "the child ends with its lease")
    time.sleep(max(0, seconds - (time.monotonic() - gone)))
    assert is_running(struck.child) is not child_ends
    rig.server.start()
    rig.finish(30)


def test_redis_away_for_fifteen_seconds(rig: Rig) -> None:
    """Three times the lease that workers have by default."""
    worker = rig.start(lease=5)
    job_id = rig.enqueue("lost", "gil@fit!")
    behind = [rig.enqueue("behind") for _ in range(3)]
    be_away(rig, job_id, 15, child_ends=True)
    assert worker.poll() is None
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == ("succeeded", 2)
    assert rig.registry.versions("default", "lost") == [1]
    assert all(rig.job(each).status == "succeeded" for each in behind)
    rig.check()


def test_a_worker_without_a_clock_would_not_end_its_child(rig: Rig) -> None:
    """It believes in its lease for as long as nobody answers, be it fifteen seconds or four."""
    rig.start(lease=LEASE_SECONDS, without=("clock",))
    job_id = rig.enqueue("kept", "gil@fit!")
    be_away(rig, job_id, GIL_SECONDS + LEASE_SECONDS, child_ends=False)
    assert rig.job(job_id).attempt == 1


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "unguarded"])
def test_redis_comes_back_empty(rig: Rig, is_guarded: bool) -> None:
    """What was acknowledged is lost; what nobody knows of must not be published."""
    worker = rig.start(lease=10, without=() if is_guarded else ("ask",))
    struck = rig.struck(rig.enqueue("forgotten", "stop@ask"))
    rig.server.kill()
    shutil.rmtree(rig.server.folder / "appendonlydir")
    rig.server.start()
    rig.wait_for_redis()
    rig.acknowledged.clear()
    resume(struck.child, *([struck.supervisor] if is_guarded else []))
    eventually(lambda: not is_running(struck.child), 20, "its child ends")
    if not is_guarded:
        with pytest.raises(InvariantBroken, match="are of no job"):
            rig.check()
        return
    rig.enqueue("next", id="ftjob-next")
    rig.finish(20)
    assert worker.poll() is None
    assert list(rig.registry.catalogue("default")) == ["next"]
    rig.check()


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "unguarded"])
def test_the_answer_to_a_job_s_end_is_lost(rig: Rig, proxy: Proxy, is_guarded: bool) -> None:
    """The worker must ask again, and Redis refuse: the job has ended."""
    worker = rig.start(
        url=f"redis://127.0.0.1:{proxy.port}", lease=20, without=() if is_guarded else ("fence",)
    )
    rig.enqueue("before")  # a script that the server does not have yet is sent twice anyway
    rig.finish(20)
    job_id = rig.enqueue("unsure", "pause@settle")
    rig.struck(job_id)
    proxy.mode = Mode.HALF_CLOSED
    rig.ended(job_id)
    proxy.mode = Mode.OPEN
    rig.enqueue("behind")
    rig.finish(30)
    assert worker.poll() is None
    if is_guarded:
        rig.check()
    else:
        with pytest.raises(InvariantBroken, match="has ended as"):
            rig.check()
