"""What crashes leave is removed, and nothing that anybody may still want or write."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.checkpoints import Checkpoints
from core.datasets import Modality, UploadedFile
from core.errors import AlreadyExists, NotFound, Unavailable
from core.files import FileStore
from core.jobs import Failure, JobKind, JobStatus, NewJob
from core.manifests import ModelManifest
from core.queue import Claim
from core.registry import Registry
from core.runs import RunStore
from core.store import ArtifactStore, StoredObject
from tests import builders
from tests.builders import TENANT, head_files
from tests.twins.feed import MemoryChangeFeed
from tests.twins.memory import MemoryJobQueue
from training.archive import archive_finished
from training.collection import Collector
from training.leftovers import find_leftovers

pytestmark = pytest.mark.anyio

TUNE = JobKind.FINE_TUNE

WRITE_AND_DIE = """
import asyncio, os, sys
from core.store import ArtifactStore

async def chunks():
    for _ in range(10):
        yield b"x" * (6 << 20)
    os.kill(os.getpid(), 9)

asyncio.run(ArtifactStore(sys.argv[1]).put_stream("default/files/file-a/upload", chunks()))
"""


class World:
    """A store, a queue, and a collector that waits for nothing but a second look."""

    def __init__(self, folder: Path) -> None:
        self.store = ArtifactStore(str(folder))
        self.queue = MemoryJobQueue(changes=MemoryChangeFeed())
        self.registry = Registry(self.store)
        self.collector = Collector(self.queue, self.store, age_seconds=0)

    async def run(self, job_id: str) -> Claim:
        await self.queue.enqueue(NewJob(tenant=TENANT, id=job_id, kind=TUNE, spec={}))
        claim = await self.queue.claim(TUNE, "w", 60)
        assert claim is not None
        return claim

    async def end(self, claim: Claim, status: JobStatus = JobStatus.FAILED) -> None:
        error = Failure(code="crashed", message="it crashed")
        failed = status is JobStatus.FAILED
        await self.queue.settle(claim, status, error=error if failed else None)

    def keys(self, prefix: str = "") -> set[str]:
        return {entry.key for entry in self.store.walk(prefix)}

    async def collect(self) -> int:
        return await self.collector.collect()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "store")


def draft(job_id: str, attempt: int = 1) -> ModelManifest:
    trunk: Any = SimpleNamespace(digest="0" * 64, modality=Modality.TEXT, dim=4)
    return builders.draft(trunk, job=job_id, attempt=attempt)


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
async def test_an_ended_job_keeps_whole_checkpoints_only(world: World, status: JobStatus) -> None:
    claim = await world.run("ftjob-a")
    checkpoints = Checkpoints(world.store, TENANT, "ftjob-a")
    checkpoints.save(draft("ftjob-a"), 1, head_files(4))
    checkpoints.save_state(1, 1, b"state")
    world.store.put_new(f"{TENANT}/runs/ftjob-a/checkpoints/000002-0001/head.onnx", b"half")
    assert await world.collect() == 0
    assert checkpoints.latest_state() == b"state"
    await world.end(claim, status)
    await archive_finished(world.queue, RunStore(world.store))
    left = {key.split("/")[4] for key in world.keys(f"{TENANT}/runs/ftjob-a/checkpoints")}
    assert left == (set() if status is JobStatus.CANCELLED else {"000001-0001"})
    assert checkpoints.latest_state() is None
    # A worker that was stopped meanwhile goes on for a moment.
    checkpoints.save_state(1, 2, b"late")
    checkpoints.save(draft("ftjob-a", attempt=2), 3, head_files(4))
    assert await world.collect() == 1
    assert checkpoints.latest_state() is None
    if status is JobStatus.CANCELLED:
        assert checkpoints.list() == []
    before = world.keys()
    await world.collect()
    assert world.keys() == before


async def test_a_job_that_redis_has_lost_leaves_nothing_to_resume(world: World) -> None:
    checkpoints = Checkpoints(world.store, TENANT, "ftjob-lost")
    checkpoints.save_state(1, 1, b"state")
    checkpoints.save(draft("ftjob-lost"), 1, head_files(4))
    assert await world.collect() == 1
    assert world.keys() == set()


async def test_a_version_that_was_never_listed(world: World) -> None:
    claim = await world.run("ftjob-a")
    folder = f"{TENANT}/models/pets/versions"
    world.registry._store_version(draft("ftjob-a"), head_files(4))
    assert await world.collect() == 0
    await world.end(claim)
    assert await world.collect() == 1
    assert world.keys(folder) == {f"{folder}/1/deleted.json"}
    listed = world.registry.publish(draft("ftjob-b"), head_files(4))
    assert listed.version == 2
    assert await world.collect() == 0
    assert world.registry.versions(TENANT, "pets") == [2]


async def test_a_half_deleted_version(world: World) -> None:
    listed = world.registry.publish(draft("ftjob-a"), head_files(4))
    world.store.put_new(f"{listed.folder}/deleted.json", b"{}")
    assert await world.collect() == 1
    assert world.keys(listed.folder) == {f"{listed.folder}/deleted.json"}


async def test_one_group_is_held_at_a_time(world: World) -> None:
    """However much is stored: of what is whole nothing is kept, and the rest is told at once."""
    for number in range(30):
        world.store.put_new(f"{TENANT}/files/file-{number}/upload", b"")
        Checkpoints(world.store, TENANT, f"ftjob-{number}").save_state(1, 1, b"state")
        world.registry._store_version(draft(f"ftjob-{number}"), head_files(4))
    read = 0

    def listing() -> Iterator[StoredObject]:
        nonlocal read
        for entry in world.store.walk(TENANT):
            read += 1
            yield entry

    of_a_group = max(2, len(head_files(4)) + 2)
    found, before = [], 0
    for leftover, _ in find_leftovers(listing()):
        assert read - before <= of_a_group
        before = read
        found.append(leftover)
    assert len(found) == len(set(found)) == 90


async def test_uploads(world: World) -> None:
    files = FileStore(world.store, TENANT)
    for name in ("file-whole", "file-broken"):
        world.store.put_new(files.upload_key(name), b"text,label\n")
    files.complete(UploadedFile(id="file-whole", filename="a.csv", bytes=11, created_at=0))
    world.store.put_new(f"{TENANT}/files/file-gone/data.parquet", b"")
    assert await world.collect() == 2
    assert files.ids() == ["file-whole"]


async def test_what_a_killed_writer_had_not_finished(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "store" / TENANT / "files" / "file-a"
    writer = [sys.executable, "-c", WRITE_AND_DIE, str(tmp_path / "store")]
    assert subprocess.run(writer, timeout=30).returncode == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["upload#1"]
    assert world.keys() == set()
    assert await world.collect() == 1
    assert not folder.exists()


async def test_what_changes_or_is_young_stays(world: World) -> None:
    checkpoints = Checkpoints(world.store, TENANT, "ftjob-lost")
    checkpoints.save_state(1, 1, b"state")
    collector = Collector(world.queue, world.store, age_seconds=0.3)
    assert await collector.collect() == 0
    await asyncio.sleep(0.35)  # time itself is what is waited for
    checkpoints.save_state(1, 2, b"state")
    assert await collector.collect() == 0
    await asyncio.sleep(0.35)
    assert await collector.collect() == 1


async def test_nothing_goes_while_redis_cannot_say(world: World) -> None:
    Checkpoints(world.store, TENANT, "ftjob-a").save_state(1, 1, b"state")

    class Away(MemoryJobQueue):
        async def get(self, tenant: str, job_id: str) -> None:
            raise Unavailable("Redis cannot be reached.")

    away = Collector(Away(changes=MemoryChangeFeed()), world.store, age_seconds=0)
    with pytest.raises(Unavailable):
        await away.collect()
    assert len(world.keys()) == 1


class Stepped(ArtifactStore):
    """A store that writes when it is told to."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.is_dead = False

    def put_new(self, key: str, data: bytes) -> None:
        self.arrived.release()
        self.go.acquire()
        if self.is_dead:
            raise Unavailable("its process was killed")
        super().put_new(key, data)


class Publisher:
    """An attempt that publishes, a write at a time."""

    def __init__(self, url: str, attempt: int) -> None:
        self._store = Stepped(url)
        self._thread = threading.Thread(target=self._publish, args=(attempt,))
        self._thread.start()
        self._store.arrived.acquire()
        self._is_over = False

    def _publish(self, attempt: int) -> None:
        with suppress(AlreadyExists, Unavailable):
            Registry(self._store).publish(draft("ftjob-a", attempt=attempt), head_files(4))
        self._is_over = True
        self._store.arrived.release()

    def step(self) -> None:
        if not self._is_over:
            self._store.go.release()
            self._store.arrived.acquire()

    def kill(self) -> None:
        self._store.is_dead = True
        self._store.go.release()
        self._thread.join()


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.sampled_from(["a", "b", "collect", "end"]), max_size=30))
def test_however_a_publisher_and_the_collector_take_turns(
    tmp_path_factory: pytest.TempPathFactory, turns: list[str]
) -> None:
    """Two attempts of a job publish, the job ends, leftovers are collected, in every order.

    Whatever is listed is whole; and when all have stopped, collecting leaves what is listed only.
    """
    folder = tmp_path_factory.mktemp("w") / "store"
    asyncio.run(take_turns(World(folder), str(folder), turns))


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "unguarded"])
async def test_a_publisher_that_wakes_after_its_files_were_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_guarded: bool
) -> None:
    """The tombstone is what keeps half a version from being listed."""
    folder = tmp_path / "store"
    turns = ["a", "a", "end", "collect", "a", "a", "a"]
    if is_guarded:
        await take_turns(World(folder), str(folder), turns)
        return
    put_same = Registry._put_same

    def without_tombstone(registry: Registry, folder: str, files: dict[str, bytes]) -> None:
        put_same(registry, folder, {n: d for n, d in files.items() if n != "deleted.json"})

    monkeypatch.setattr(Registry, "_put_same", without_tombstone)
    with pytest.raises(AssertionError, match="is listed without head"):
        await take_turns(World(folder), str(folder), turns)


async def take_turns(world: World, url: str, turns: list[str]) -> None:
    claim = await world.run("ftjob-a")
    attempts = {name: Publisher(url, number) for number, name in enumerate("ab", 1)}
    has_ended = False
    try:
        for turn in turns:
            if turn in attempts:
                attempts[turn].step()
            elif turn == "collect":
                await world.collect()
            elif not has_ended:
                has_ended = True
                await world.end(claim)
            check_listed(world)
    finally:
        for attempt in attempts.values():
            attempt.kill()
    if not has_ended:
        await world.end(claim)
    await world.collect()
    check_listed(world)
    listed = world.registry.versions(TENANT, "pets")
    assert len(listed) <= 1
    for key in world.keys(f"{TENANT}/models"):
        folder, _, name = key.rpartition("/")
        assert name == "deleted.json" or int(folder.rpartition("/")[2]) in listed, key


def check_listed(world: World) -> None:
    for number in world.registry.versions(TENANT, "pets"):
        found = world.registry.manifest(TENANT, "pets", number)
        for name in head_files(4):
            try:
                world.store.get(f"{found.folder}/{name}")
            except NotFound:
                raise AssertionError(f"{found.reference} is listed without {name}") from None
