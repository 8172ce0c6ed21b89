"""What goes on when Redis is away, when a process is killed, and what the metrics say of it all."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx
import openai as sdk
import pytest

from tests.builders import add_text_trunk, publish

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]


async def until(check: Callable[[], Awaitable[object]], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.05)


async def predicts(client: httpx.AsyncClient, model: str = "pets") -> bool:
    response = await client.post("/v1/predict", json={"model": model, "inputs": ["good cat"]})
    return response.status_code == 200


async def redis_is(client: httpx.AsyncClient, word: str) -> bool:
    response = await client.get("/readyz")
    return response.status_code == 200 and bool(response.json()["redis"] == word)


async def test_without_redis_predictions_go_on_and_it_recovers(
    service: ServiceProcess, openai: AsyncOpenAI
):
    async with service.one_client_per_process() as processes:
        service.redis.kill()
        try:
            for client in processes.values():
                await until(lambda c=client: redis_is(c, "away"), 10, "away")  # type: ignore[misc]
                assert await predicts(client)
            publish(service.registry, add_text_trunk(service.registry), "meanwhile")
            for client in processes.values():
                await until(lambda c=client: predicts(c, "meanwhile"), 10, "found by the poll")  # type: ignore[misc]
            before = {entry.key for entry in service.store.walk("default/files")}
            with pytest.raises(sdk.InternalServerError, match="Redis") as refused:
                await openai.files.create(file=("a.csv", b"x" * 100), purpose="fine-tune")
            assert refused.value.status_code == 503
            assert refused.value.code == "unavailable"
            assert {entry.key for entry in service.store.walk("default/files")} == before
            for call in (openai.fine_tuning.jobs.list, openai.fine_tuning.jobs.retrieve):
                with pytest.raises(sdk.InternalServerError, match="Redis"):
                    await (call() if call == openai.fine_tuning.jobs.list else call("ftjob-1"))  # type: ignore[call-arg]
            assert [model.id async for model in openai.models.list()]
            assert (await openai.models.delete("meanwhile")).deleted
        finally:
            service.redis.start()
        for client in processes.values():
            await until(lambda c=client: redis_is(c, "connected"), 10, "connected")  # type: ignore[misc]
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    assert file.status == "uploaded"


async def test_a_process_that_is_killed_comes_back_and_serves_the_same(service: ServiceProcess):
    before = service.pids()
    victim = before[0]
    os.kill(victim, signal.SIGKILL)

    async def replaced() -> bool:
        pids = service.pids()
        return victim not in pids and len(pids) == len(before)

    failed: list[httpx.Response] = []
    async with service.http() as client:
        # The process beside it answers all the while.
        deadline = time.monotonic() + 30
        while not await replaced():
            assert time.monotonic() < deadline
            # What the dead process had accepted is lost, so a connection may break, once.
            try:
                body = {"model": "pets", "inputs": ["cat"]}
                response = await client.post("/v1/predict", json=body)
                if response.status_code != 200:
                    failed.append(response)
            except httpx.TransportError:
                continue
    assert failed == []
    async with service.one_client_per_process() as processes:
        assert len(processes) == len(before)
        for client in processes.values():
            assert await predicts(client)
            assert await predicts(client, "other")
            ready = (await client.get("/readyz")).json()
            assert ready["status"] == "ready"


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


async def test_metrics_are_of_all_processes_and_bounded(service: ServiceProcess):
    async with service.one_client_per_process() as processes:
        first, second = processes.values()
        name = 'graft_model_rows_total{model="pets",outcome="ok"}'
        before = (await metrics(first))[name]
        for client in (first, second):
            for n in range(5):
                assert await predicts(client)
                await client.get(f"/v1/files/file-{n}")
                await client.get(f"/nowhere/{n}")
                await client.get(f"/v1/models/unknown-{n}")
        for client in (first, second):
            found = await metrics(client)
            assert found[name] == before + 10
            routes = {m[1] for key in found if (m := re.search(r'route="([^"]*)"', key))}
            assert "/v1/predict" in routes
            assert "/v1/files/{file_id}" in routes
            assert not any(re.search(r"\d", re.sub("^/v[12]", "", route)) for route in routes)
            assert len(found) < 2_000


async def test_a_killed_process_does_not_haunt_the_metrics(
    service: ServiceProcess, http: httpx.AsyncClient
):
    """The gauge is the least of all processes; one that is dead must not hold it down."""
    before = service.pids()
    publish(service.registry, add_text_trunk(service.registry), "newest")
    os.kill(before[0], signal.SIGKILL)

    async def replaced() -> bool:
        pids = service.pids()  # the victim is among them for as long as it dies
        return before[0] not in pids and len(pids) == len(before)

    await until(replaced, 60, "another process")
    async with service.one_client_per_process() as processes:
        for client in processes.values():
            await until(lambda c=client: predicts(c, "newest"), 10, "newest")  # type: ignore[misc]

        async def agree() -> bool:
            ready = [(await client.get("/readyz")).json() for client in processes.values()]
            told = [(await metrics(client))["graft_live_versions"] for client in processes.values()]
            return {*told} == {min(answer["versions"] for answer in ready)}

        # What a process has loaded besides is its own, and it may load or unload at any moment.
        await until(agree, 10, "the least of the living")
