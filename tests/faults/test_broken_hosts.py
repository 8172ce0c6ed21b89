"""A host on which no child gets as far as its job, beside one that is well."""

from __future__ import annotations

import pytest

from tests.faults.rig import Rig
from tests.waiting import eventually


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "unguarded"])
def test_a_broken_host_uses_up_no_attempts(rig: Rig, is_guarded: bool) -> None:
    rig.start(without=("imports",) if is_guarded else ("imports", "ready"))
    job_id = rig.enqueue("patient")
    log = rig.faults.parent / "workers.log"
    eventually(lambda: "a spare child ended" in log.read_text() or rig.job(job_id).attempt, 20)
    if not is_guarded:
        eventually(lambda: rig.job(job_id).attempt > 0, 20, "an attempt is wasted")
        return
    assert rig.job(job_id).attempt == 0
    rig.start()
    rig.finish(30)
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == ("succeeded", 1)
    rig.check()
