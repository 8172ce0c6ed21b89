"""`training.worker` as it is, but for the faults that jobs ask for (tests.faults.faults).

Its children are `tests.faults.child`, and it does not wait long to retry a job.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import core.presence
import core.queue.redis_views
import training.attempt
import training.process
import training.settlement
from core.queue import Claim
from core.queue.redis import RedisJobQueue
from core.registry import Registry
from tests.faults.faults import around, shift_clock, strike, without
from training.worker import Lane, main

CLOCK = "local seconds, micros = tonumber(time[1])"
DECISION = (
    "if instead == '' then redis.call('HSET', key, 'publishing', 1) end",
    "redis.call('HSET', job_key(ARGV[1], ARGV[2]), 'result', ARGV[7])",
)
LEASE = "redis.call('ZADD', leases, now_ms + tonumber(lease), tenant .. '/' .. id)"
RENEWAL = "redis.call('ZADD', leases, now_ms"
FENCE = "return job[1] == 'running' and job[2] == attempt and job[3] == worker"


def install() -> None:
    """Put the faults around the supervisor's functions."""
    shift_clock()
    start = asyncio.create_subprocess_exec

    async def start_child(*command: str, **options: Any) -> asyncio.subprocess.Process:
        words = ["tests.faults.child" if word == "training.child" else word for word in command]
        return await start(*words, **options)

    vars(asyncio)["create_subprocess_exec"] = start_child
    vars(training.settlement)["random"] = SimpleNamespace(uniform=lambda low, high: 0.05)

    def at(step: str) -> Any:
        def reach(_: object, claim: Claim, *__: object, **___: object) -> None:
            strike(claim.job, step, supervisor=os.getpid())

        return reach

    around(Lane, "_attempt", before=at("claim"))
    around(RedisJobQueue, "announce", before=at("announce"))
    around(RedisJobQueue, "settle", before=at("settle"))
    around(RedisJobQueue, "__init__", after=shift_server_clock)
    if without("ready"):
        process: Any = training.process.ChildProcess
        process.wait_until_ready = lambda _: asyncio.sleep(0, True)
    if without("clock"):
        vars(training.attempt)["time"] = SimpleNamespace(monotonic=lambda: 0.0)
    if without("patience"):
        attempt: Any = training.attempt.Attempt
        attempt._renew = attempt._heartbeat
    if without("translation"):
        for module in (core.queue.redis_views, core.presence):
            vars(module)["translated"] = nullcontext
    if without("lease"):
        around(RedisJobQueue, "__init__", after=remove_lease)
    if without("fence"):
        around(RedisJobQueue, "__init__", after=remove_fence)
    if without("shortening"):
        around(RedisJobQueue, "__init__", after=lengthen_leases)
    if without("withdrawal"):
        registry: Any = Registry
        registry.withdraw = lambda self, tenant, job, _: self.publication(tenant, job)
    if without("decision"):
        around(RedisJobQueue, "__init__", after=remove_decision)


def remove_fence(queue: RedisJobQueue, client: Any, **_: object) -> None:
    """Let every script of a queue believe whoever calls it."""
    for name, script in queue._scripts.items():
        assert FENCE in script.script
        queue._scripts[name] = client.register_script(script.script.replace(FENCE, "return true"))


def shift_server_clock(queue: RedisJobQueue, client: Any, **_: object) -> None:
    """Let a queue's scripts read a clock that is off by the milliseconds in the key `shift`.

    A server's own clock cannot be set without setting that of the whole host.
    """
    shifted = f"{CLOCK} + tonumber(redis.call('GET', KEYS[1] .. ':shift') or 0) / 1000"
    for name, script in queue._scripts.items():
        assert CLOCK in script.script
        queue._scripts[name] = client.register_script(script.script.replace(CLOCK, shifted))


def remove_lease(queue: RedisJobQueue, client: Any, **_: object) -> None:
    """Let a claim begin no lease; the first heartbeat does."""
    script = queue._scripts["claim"].script
    assert LEASE in script
    queue._scripts["claim"] = client.register_script(script.replace(LEASE, ""))


def lengthen_leases(queue: RedisJobQueue, client: Any, **_: object) -> None:
    """Let a heartbeat only ever move the end of a lease away."""
    script = queue._scripts["heartbeat"].script
    assert RENEWAL in script
    longer = RENEWAL.replace("leases,", "leases, 'GT',")
    queue._scripts["heartbeat"] = client.register_script(script.replace(RENEWAL, longer))


def remove_decision(queue: RedisJobQueue, client: Any, **_: object) -> None:
    """Let a queue not know that a job has decided to publish."""
    for name, line in zip(("mark_publishing", "announce"), DECISION, strict=True):
        script = queue._scripts[name].script
        assert line in script
        queue._scripts[name] = client.register_script(script.replace(line, ""))


if __name__ == "__main__":
    install()
    main()
