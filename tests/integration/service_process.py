"""A real `bentoml serve` over a real store and a real Redis, and a fake worker beside it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
from openai import AsyncOpenAI

from core.changes import RedisChangeFeed
from core.jobs import Failure, Job, JobKind, JobStatus, Json
from core.queue.connection import connect
from core.queue.protocol import Claim
from core.queue.redis import RedisJobQueue
from core.registry import Registry
from core.store import ArtifactStore
from tests.integration.redis_server import RedisServer
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
LEASE_SECONDS = 30.0
MAX_UPLOAD_BYTES = 8_000_000
MAX_INPUTS = 64
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServiceProcess:
    """`bentoml serve` with its worker processes, its store and its Redis."""

    app = "service.app:Graft"

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", workers: int = 2, **env: str):
        self.folder = folder
        self.host = host
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.redis = RedisServer()
        self.prefix = f"test-{secrets.token_hex(6)}"
        self.store = ArtifactStore(str(folder / "store"))
        self.registry = Registry(self.store)
        self.log = folder / "service.log"
        self._process: subprocess.Popen[bytes] | None = None
        settings = {
            "STORE_URL": str(folder / "store"),
            "REDIS_URL": self.redis.url,
            "REDIS_PREFIX": self.prefix,
            "SERVICE_WORKERS": str(workers),
            "INFERENCE_THREADS": "1",
            "POLL_SECONDS": "2",
            "MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES),
            "MAX_REQUEST_BYTES": "2000000",
            "MAX_INPUTS": str(MAX_INPUTS),
            **env,
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
        self._env = {
            **inherited,
            **{f"GRAFT_{name}": value for name, value in settings.items()},
            "BENTOML_HOME": str(folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
        }

    def launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bentoml", "serve", self.app,
                 "--host", self.host, "--port", str(self.port)],
                cwd=ROOT, env=self._env, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return self._process

    def start(self) -> None:
        self.redis.start()
        process = self.launch()

        def is_ready() -> bool:
            assert process.poll() is None, self.log.read_text()
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/readyz").status_code == 200
            return False

        eventually(is_ready, START_SECONDS, f"ready\n{self.log.read_text()}")
        eventually(lambda: len(self.pids()) > 0, START_SECONDS, "worker processes")

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self.redis.remove()

    def pids(self) -> list[int]:
        """The worker processes, as the operating system sees them."""
        assert self._process is not None
        found = []
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "_bentoml_impl.worker.service" in child.cmdline():
                    found.append(child.pid)
        return sorted(found)

    def openai(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def http(self, **options: object) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=20, **options)  # type: ignore[arg-type]

    @asynccontextmanager
    async def one_client_per_process(self) -> AsyncIterator[dict[int, httpx.AsyncClient]]:
        """Clients of one connection each, by the process at its other end."""
        clients: list[httpx.AsyncClient] = []
        found: dict[int, httpx.AsyncClient] = {}
        try:
            async with asyncio.timeout(60):
                while len(found) < len(self.pids()):
                    one = httpx.Limits(max_connections=1, max_keepalive_connections=1)
                    client = self.http(limits=one)
                    clients.append(client)
                    # A process that starts needs the processor that the next question would take.
                    await asyncio.sleep(0.02)
                    pid = self._other_end(await client.get("/livez"))
                    if pid is not None:
                        found.setdefault(pid, client)
            yield found
        finally:
            for client in clients:
                await client.aclose()

    def _other_end(self, response: httpx.Response) -> int | None:
        stream = response.extensions["network_stream"]
        port = stream.get_extra_info("client_addr")[1]
        for pid in self.pids():
            with suppress(psutil.NoSuchProcess):
                for each in psutil.Process(pid).net_connections("tcp"):
                    if each.raddr and each.raddr.port == port:
                        return pid
        return None


class FakeWorker:
    """What a worker would write to the queue, as a test wants it written."""

    def __init__(self, service: ServiceProcess) -> None:
        client = connect(service.redis.url)
        self.queue = RedisJobQueue(
            client, prefix=service.prefix, max_queued=1000, max_attempts=3, retention_seconds=600
        )
        self.feed = RedisChangeFeed(client, prefix=service.prefix)

    async def claim(self, job_id: str, kind: JobKind = JobKind.FINE_TUNE) -> Claim:
        """Claim until it is this job; others that wait are settled out of the way."""
        async with asyncio.timeout(10):
            while True:
                claim = await self.queue.claim(kind, "fake", LEASE_SECONDS)
                if claim is None:
                    await self.queue.wait(kind, 1)
                elif claim.job.id == job_id:
                    return claim
                else:
                    await self.queue.settle(claim, JobStatus.CANCELLED)

    async def settle(
        self,
        job_id: str,
        status: JobStatus = JobStatus.SUCCEEDED,
        *,
        kind: JobKind = JobKind.FINE_TUNE,
        result: Json | None = None,
        error: Failure | None = None,
    ) -> Job:
        claim = await self.claim(job_id, kind)
        return await self.queue.settle(claim, status, result=result, error=error)
