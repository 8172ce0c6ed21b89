"""Real workers on a real Redis and a real store, jobs with faults in them, and what must hold.

`Rig.check` is the one list of invariants; every fault test ends with it. It waits for nothing:
`Rig.finish` waits until all that was acknowledged has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from core.datasets import UploadedFile
from core.errors import GraftError, Unavailable
from core.files import FileStore
from core.head import Head
from core.jobs import Job, JobEvent, JobKind, JobStatus, NewJob
from core.queue.connection import connect
from core.queue.redis import RedisJobQueue
from core.registry import Registry
from core.runs import RunStore
from core.settings import Settings
from core.store import ArtifactStore
from tests.faults.faults import FOLDER, WITHOUT
from tests.waiting import eventually
from training.archive import archive_finished
from training.collection import Collector
from training.ingest import Limits, ingest

if TYPE_CHECKING:
    from tests.integration.redis_server import RedisServer

T = TypeVar("T")
TENANT = "default"
FILE = "file-1"
ROWS = b"text,label\n" + b"".join(
    b"where is my card %d,card\nthe transfer failed %d,money\n" % (n, n) for n in range(8)
)
LEASE_SECONDS = 1.0
ENDS = {"succeeded", "failed", "cancelled"}


class InvariantBroken(AssertionError):
    """Something that must hold whatever fails does not."""


@dataclass(frozen=True)
class Struck:
    """Whom a fault struck, and when."""

    step: str
    attempt: int
    child: int
    supervisor: int


class Rig:
    """One test's Redis, store and workers."""

    def __init__(self, folder: Path, server: RedisServer, prefix: str, model: str) -> None:
        self.server = server
        self.url = server.url
        self.prefix = prefix
        self.model = model
        self.workers: list[subprocess.Popen[bytes]] = []
        self.acknowledged: list[str] = []
        self.max_attempts = 4
        self._served: dict[tuple[str, int], bytes] = {}
        self.faults = folder / "faults"
        self.faults.mkdir()
        self._log = (folder / "workers.log").open("ab")
        self._store_url = str(folder / "store")
        self.store = ArtifactStore(self._store_url)
        self.registry = Registry(self.store)
        self._runner = asyncio.Runner()
        self.queue = self.run(self._connect())
        self._add_file()

    async def _connect(self) -> RedisJobQueue:
        return RedisJobQueue(
            connect(self.url), prefix=self.prefix, max_queued=1000,
            max_attempts=self.max_attempts, retention_seconds=600,
        )  # fmt: skip

    def _add_file(self) -> None:
        files = FileStore(self.store, TENANT)
        self.store.put_new(files.upload_key(FILE), ROWS)
        files.complete(UploadedFile(id=FILE, filename="rows.csv", bytes=len(ROWS), created_at=0))
        ingest(files, FILE, Limits.from_settings(Settings()))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the queue's."""
        return self._runner.run(coroutine)

    def end_workers(self) -> None:
        """End every worker that is left, and its children."""
        for worker in self.workers:
            if worker.poll() is None:
                children = psutil.Process(worker.pid).children(recursive=True)
                worker.kill()
                for child in children:
                    if child.is_running():
                        child.kill()
                worker.wait()

    def close(self) -> None:
        """End every worker and every connection."""
        self.end_workers()
        self.run(self.queue.close())
        self._runner.close()
        self._log.close()

    def wait_for_redis(self) -> None:
        """Wait until Redis answers on every connection that the rig has."""

        def answers() -> bool:
            with suppress(Unavailable):
                self.run(self.queue.ping())
                return True
            return False

        eventually(answers, 10, "Redis answers")

    # -- workers -----------------------------------------------------------------------------

    def start(
        self,
        *,
        without: Sequence[str] = (),
        light: bool = True,
        lease: float = LEASE_SECONDS,
        url: str | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a worker, which does without some guards; `light` is as in tests.faults.child.

        `url` is its way to Redis, if it is to have one of its own.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")} | {
            "GRAFT_REDIS_URL": url or self.url,
            "GRAFT_REDIS_PREFIX": self.prefix,
            "GRAFT_STORE_URL": self._store_url,
            "GRAFT_EXPORT_WHEN_IDLE": "false",
            "GRAFT_HF_MODELS": json.dumps([self.model.removeprefix("hf:")]),
            "GRAFT_LEASE_SECONDS": str(lease),
            "GRAFT_MAX_ATTEMPTS": str(self.max_attempts),
            # Jobs that share a file would otherwise pass by the step "features".
            "GRAFT_FEATURE_CACHE_BYTES": "0",
            "OMP_NUM_THREADS": "1",
            FOLDER: str(self.faults),
            WITHOUT: ",".join(without),
            "FAULTS_LIGHT": "1" if light else "",
        }
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            env=environment, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self.workers.append(worker)
        return worker

    def keep_up(self, count: int, **options: Any) -> None:
        """Start workers until `count` live, as whatever watches over them would."""
        for _ in range(count - sum(worker.poll() is None for worker in self.workers)):
            self.start(**options)

    # -- jobs --------------------------------------------------------------------------------

    def enqueue(self, name: str, fault: str = "", *, id: str | None = None, **spec: Any) -> str:
        """Add a job that trains `name` and has `fault` in it; return its id."""
        job_id = id or f"ftjob-{len(self.acknowledged):04}"
        request = {"model": self.model, "training_file": FILE, "suffix": name, **spec}
        request["metadata"] = {"fault": fault}
        new = NewJob(tenant=TENANT, id=job_id, kind=JobKind.FINE_TUNE, spec=request)
        self.run(self.queue.enqueue(new))
        self.acknowledged.append(job_id)
        return job_id

    def aliases(self, model: str) -> dict[str, int]:
        """What the aliases of a released model name."""
        release = self.registry.releases.current(TENANT, model)
        assert release is not None
        return dict(release.aliases)

    def job(self, job_id: str) -> Job:
        """Return a job as it is now."""
        job = self.run(self.queue.get(TENANT, job_id))
        assert job is not None, f"{job_id} is lost"
        return job

    def events(self, job_id: str) -> list[JobEvent]:
        """Return a job's history."""
        return self.run(self.queue.events(TENANT, job_id, limit=1000))

    def struck(self, job_id: str, seconds: float = 30) -> Struck:
        """Wait until a job's fault has struck."""
        told = self.faults / f"{job_id}.json"
        text = eventually(lambda: told.exists() and told.read_text(), seconds, f"{job_id} struck")
        return Struck(**json.loads(str(text)))

    def ended(self, job_id: str, seconds: float = 30) -> Job:
        """Wait until a job has ended, however it did."""

        def end() -> Job | None:
            try:
                job = self.job(job_id)
            except Unavailable:
                return None
            return job if job.status.is_terminal else None

        return eventually(end, seconds, f"{job_id} ends")

    def finish(self, seconds: float = 60, *, workers: int = 0, **options: Any) -> None:
        """Wait until every job has ended; `workers` are kept up meanwhile."""

        def all_ended() -> bool:
            self.keep_up(workers, **options)
            try:
                return all(self.job(job_id).status.is_terminal for job_id in self.acknowledged)
            except Unavailable:
                return False

        eventually(all_ended, seconds, "every job ends")

    # -- invariants --------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `InvariantBroken` unless all that must hold does."""
        listed = self._check_versions()
        by_job: dict[str, list[str]] = {}
        for name, number in listed:
            manifest = self.registry.manifest(TENANT, name, number)
            by_job.setdefault(manifest.job, []).append(manifest.reference)
        for job_id, references in by_job.items():
            require(len(references) == 1, f"{job_id} has {references}")
            require(job_id in self.acknowledged, f"{references} are of no job")
        for job_id in self.acknowledged:
            self._check_job(job_id, by_job.get(job_id, []))

    def check_nothing_temporary(self) -> None:
        """Raise `InvariantBroken` if an ended job has left anything that nobody can use."""
        for folder, _, names in os.walk(self._store_url):
            for name in names:
                require("#" not in name, f"{folder}/{name} is half-written")
        versions: dict[str, set[str]] = {}
        for entry in self.store.walk(TENANT):
            match entry.key.split("/"):
                case [_, "runs", job_id, "state", _]:
                    require(not self._has_ended(job_id), f"{entry.key} is of no use")
                case [_, "models", _, "versions", _, name]:
                    versions.setdefault(entry.key.rpartition("/")[0], set()).add(name)
        for key, files in versions.items():
            is_whole = "manifest.json" in files and "deleted.json" not in files
            if not is_whole and files != {"deleted.json"}:
                _, _, name, _, number = key.split("/")
                owner = self.registry.owner(TENANT, name, int(number))
                require(bool(owner and not self._has_ended(owner)), f"{key} is not listed")

    def _has_ended(self, job_id: str) -> bool:
        job = self.run(self.queue.get(TENANT, job_id))
        return job is None or job.status.is_terminal

    def collect(self) -> None:
        """End the workers, so that nobody writes, and do what the next one would do in time."""
        self.end_workers()
        self.wait_for_redis()
        self.run(archive_finished(self.queue, RunStore(self.store)))
        collector = Collector(self.queue, self.store, age_seconds=0)
        while self.run(collector.collect()):
            pass
        self.check_nothing_temporary()

    def _check_versions(self) -> list[tuple[str, int]]:
        """Every listed version is whole and loads, and none that was listed before is gone."""
        found: dict[tuple[str, int], bytes] = {}
        for name, listing in self.registry.catalogue(TENANT).items():
            for number in listing.versions:
                manifest = self.registry.manifest(TENANT, name, number)
                try:
                    for file in manifest.files:
                        self.registry.file(manifest, file)
                    Head.load(self.registry, manifest)
                except GraftError as error:
                    raise InvariantBroken(f"{manifest.reference}: {error.message}") from error
                decided = self.registry.publication(TENANT, manifest.job)
                require(decided == manifest, f"{manifest.reference} is not its job's decision")
                found[name, number] = manifest.model_dump_json().encode()
            release = self.registry.releases.current(TENANT, name)
            for alias, version in (release.aliases if release else {}).items():
                require(version in listing.versions, f"{name}:{alias} is {version}, not listed")
        for key, manifest_bytes in self._served.items():
            require(found.get(key) == manifest_bytes, f"{key} was served and is gone or changed")
        self._served = found
        return list(found)

    def _check_job(self, job_id: str, references: list[str]) -> None:
        """A job has ended once, in one way, and its attempts only grew."""
        job, events = self.job(job_id), self.events(job_id)
        require(job.status.is_terminal, f"{job_id} is {job.status}")
        ends = [event.type for event in events if event.type in ENDS]
        require(ends == [job.status], f"{job_id} is {job.status} and has ended as {ends}")
        require(events[-1].type == job.status, f"{job_id} has {events[-1].type} after its end")
        attempts = [event.data["attempt"] for event in events if event.type == "started"]
        require(attempts == list(range(1, len(attempts) + 1)), f"{job_id} had {attempts}")
        require(job.attempt == len(attempts), f"{job_id} is at {job.attempt} after {attempts}")
        if job.status is JobStatus.SUCCEEDED:
            published = (job.result or {}).get("fine_tuned_model")
            require([published] == references, f"{job_id} says {published}, has {references}")
        else:
            require(not references, f"{job_id} is {job.status} and has {references}")


def require(holds: bool, otherwise: str) -> None:
    """Raise `InvariantBroken` unless it holds."""
    if not holds:
        raise InvariantBroken(otherwise)


def is_running(pid: int) -> bool:
    """Tell whether a process lives; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def resume(*pids: int) -> None:
    """SIGCONT."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
