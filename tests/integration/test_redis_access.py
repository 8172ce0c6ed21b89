"""The ways to Redis that GRAFT_REDIS_URL may name, each to real servers: a job goes its whole way.

Password, an ACL user with no more than docs/operations.md grants, TLS, Sentinel and Cluster, the
last two also while the primary is killed.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trustme
from redis.crc import key_slot

from core.changes import Change, RedisChangeFeed
from core.errors import LeaseLost, Unavailable
from core.jobs import Failure, JobKind, JobStatus, NewJob, Once
from core.presence import RedisPresence, Role
from core.queue.connection import connect
from core.queue.discovery import HASH_TAG
from core.queue.redis import RedisJobQueue
from tests.integration.redis_server import Cluster, RedisServer, Sentinels, TcpServer, program

pytestmark = pytest.mark.anyio

T = TypeVar("T", bound=RedisServer | Sentinels | Cluster)
TUNE = JobKind.FINE_TUNE
LONG = 60.0
PASSWORD = "p@ss/w:rd, #1"
QUOTED = "p%40ss%2Fw%3Ard%2C%20%231"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def started() -> Iterator[Callable[[T], T]]:
    """Starts servers, which end with the test."""
    servers: list[RedisServer | Sentinels | Cluster] = []

    def start(server: T) -> T:
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.remove()


class Client:
    """A queue and a feed over one client, as `core.bootstrap` opens them."""

    def __init__(self, url: str, prefix: str) -> None:
        self.redis = connect(url)
        self.queue = RedisJobQueue(
            self.redis, prefix=prefix, max_queued=100, max_attempts=3, retention_seconds=600
        )
        self.feed = RedisChangeFeed(self.redis, prefix=prefix)
        self.presence = RedisPresence(self.redis, prefix=prefix)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.queue.close()


def new_job(id: str, **fields: object) -> NewJob:
    return NewJob.model_validate({"tenant": "acme", "id": id, "kind": TUNE, "spec": {}, **fields})


async def whole_way(url: str, prefix: str) -> None:
    """Every operation of the queue and of the feed once, by a service and a worker."""
    async with Client(url, prefix) as service, Client(url, prefix) as worker:
        await service.queue.ping()
        once = Once(name="n", digest="d", seconds=60, is_repeat=False, age_seconds=0)
        assert await service.queue.recall("acme", once) is None
        cursor, _ = await service.feed.follow(None, 0)
        assert await worker.queue.claim(TUNE, "w", LONG) is None
        waiting = asyncio.create_task(worker.queue.wait(TUNE, LONG))  # blocks in Redis
        await worker.queue.wait(TUNE, 0.02)
        for id in "abc":
            await service.queue.enqueue(new_job(id, once=once if id == "a" else None))
        await asyncio.wait_for(waiting, 10)
        claim = await worker.queue.claim(TUNE, "w", LONG)
        assert claim is not None
        assert await worker.queue.heartbeat(claim, LONG) is None
        following = asyncio.create_task(service.queue.wait_events("acme", "c", "0-1", LONG))
        await worker.queue.append_event(claim, "stage", "features")
        assert (await service.queue.outlook(TUNE)) is not None
        change = Change(tenant="acme", model="m", type="published", version=1)
        await service.feed.publish(change)
        assert (await service.feed.follow(cursor, LONG))[1] == [change]
        await worker.queue.retry(claim, 0, Failure(code="crashed", message="it crashed"))
        with pytest.raises(LeaseLost):
            await worker.queue.settle(claim, JobStatus.SUCCEEDED)
        again = await worker.queue.claim(TUNE, "w", LONG)
        assert again is not None
        await worker.queue.release(again)
        assert await service.queue.position((await service.queue.list("acme", TUNE))[0]) is not None
        await service.queue.cancel("acme", "b")
        await service.queue.pause("acme", "c")
        await service.queue.resume("acme", "c")
        claim = await worker.queue.claim(TUNE, "w", LONG)
        assert claim is not None
        await worker.queue.mark_publishing(claim, LONG)
        await worker.queue.clear_publishing(claim)
        await worker.queue.announce(claim, change, {})
        await worker.queue.settle(claim, JobStatus.SUCCEEDED, result={})
        await worker.presence.beat(Role.WORKER, "w")
        assert await service.presence.live(Role.WORKER) == {"w"}
        await service.presence.acknowledge("acme", "m", 1, "s", serves=True)
        assert await worker.presence.acknowledged("acme", "m", 1) == {"s": True}
        assert {job.status for job in await service.queue.list("acme", TUNE)} >= {"cancelled"}
        for job in await worker.queue.unarchived():
            await worker.queue.mark_archived(job)
        assert len(await following) > 0
        assert (await service.queue.events("acme", "c", newest_first=True))[0].type == "resumed"


async def insist(client: Client, id: str, seconds: float = 30) -> None:
    """Enqueue, claim and settle a job, however often Redis is away meanwhile."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                await client.queue.enqueue(new_job(id))
                while claim := await client.queue.claim(TUNE, "w", LONG):
                    await client.queue.settle(claim, JobStatus.SUCCEEDED)
                job = await client.queue.get("acme", id)
                assert job is not None
                assert job.status is JobStatus.SUCCEEDED
                return
            except Unavailable:
                await asyncio.sleep(0.1)


async def test_password(started: Callable[[TcpServer], TcpServer], prefix: str) -> None:
    server = started(TcpServer(f'requirepass "{PASSWORD}"'))
    await whole_way(f"redis://:{QUOTED}@127.0.0.1:{server.port}/1", prefix)
    for password in ("", ":wrong@"):
        async with Client(f"redis://{password}127.0.0.1:{server.port}", prefix) as stranger:
            with pytest.raises(Unavailable, match="credentials"):
                await stranger.queue.ping()


async def test_a_user_with_no_more_than_what_is_documented(
    started: Callable[[TcpServer], TcpServer],
) -> None:
    (granted,) = re.findall(r"^user graft on (.*)$", OPERATIONS.read_text("utf-8"), re.MULTILINE)
    grants = re.sub(r">\S+", '">' + PASSWORD.replace(" ", "") + '"', granted)
    server = started(TcpServer(f"user graft on {grants}", "user default off"))
    url = f"redis://graft:{QUOTED.replace('%20', '')}@127.0.0.1:{server.port}"
    await whole_way(url, "graft")
    async with Client(url, "other") as stranger:
        with pytest.raises(Unavailable, match="refuses this process a command or a key"):
            await stranger.queue.enqueue(new_job("j"))


class TestTls:
    @pytest.fixture
    def server(
        self, tmp_path: Path, started: Callable[[TcpServer], TcpServer]
    ) -> tuple[TcpServer, Path]:
        """A server that takes TLS only, from clients with a certificate of the test's own CA."""
        probe = subprocess.run(
            [program(), "--port", "0", "--tls-port", "1", "--tls-cert-file", "none"],
            capture_output=True, text=True, timeout=10, cwd=tmp_path,
        )  # fmt: skip
        if "TLS support" in probe.stdout + probe.stderr or "connection type tls" in probe.stdout:
            assert not os.environ.get("GRAFT_TEST_REDIS_SERVER"), (
                "this server was built without TLS"
            )
            pytest.skip("the packaged Valkey has no TLS; `make test-redis` runs this")
        ca = trustme.CA()
        ca.cert_pem.write_to_path(tmp_path / "ca.pem")
        for name in ("127.0.0.1", "client"):
            cert = ca.issue_cert(name)
            cert.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
            cert.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        server = TlsServer(tmp_path)
        started(server)
        return server, tmp_path

    async def test_with_certificates(self, server: tuple[TcpServer, Path], prefix: str) -> None:
        running, folder = server
        own = f"ssl_certfile={folder}/client.pem&ssl_keyfile={folder}/client.key"
        trusted = f"{running.url}?ssl_ca_certs={folder}/ca.pem"
        await whole_way(f"{trusted}&{own}", prefix)
        wrong_name = trusted.replace("127.0.0.1", "localhost")
        for url in (f"{running.url}?{own}", f"{wrong_name}&{own}", trusted):
            async with Client(url, prefix) as stranger:
                with pytest.raises(Unavailable) as trouble:
                    await stranger.queue.ping()
                assert str(folder) not in trouble.value.message
        await whole_way(f"{wrong_name}&{own}&ssl_check_hostname=false", prefix + "-named")


class TlsServer(TcpServer):
    """On a TLS port only."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            "tls-auth-clients yes", f"tls-ca-cert-file {folder}/ca.pem",
            f"tls-cert-file {folder}/127.0.0.1.pem", f"tls-key-file {folder}/127.0.0.1.key",
        )  # fmt: skip
        self._folder = folder
        self.url = f"rediss://127.0.0.1:{self.port}"

    def start(self, *options: str) -> None:
        conf = self.folder / "server.conf"
        text = conf.read_text().replace(f"port {self.port}", f"port 0\ntls-port {self.port}", 1)
        conf.write_text(text)
        self.launch([program(), "server.conf", *options])
        self.wait_for(
            self.url, ssl_ca_certs=f"{self._folder}/ca.pem",
            ssl_certfile=f"{self._folder}/client.pem", ssl_keyfile=f"{self._folder}/client.key",
        )  # fmt: skip


async def test_sentinel_and_a_failover(
    started: Callable[[Sentinels], Sentinels], prefix: str
) -> None:
    group = started(Sentinels("secret"))
    await whole_way(group.url, prefix)
    async with Client(group.url, f"{prefix}-2") as client:
        await insist(client, "before")
        group.sentinels[0].kill()  # the first that is asked
        group.primary.kill()
        await insist(client, "after")
        _, port = await client.redis.connection_pool.connection_kwargs["finder"].find()
        assert port == group.replica.port
    async with Client(group.url.replace("/graft-", "/other-"), prefix) as lost:
        with pytest.raises(Unavailable, match="cannot be reached"):
            await lost.queue.ping()


async def test_cluster_and_a_failover(started: Callable[[Cluster], Cluster], prefix: str) -> None:
    cluster = started(Cluster(key_slot(HASH_TAG.encode())))
    await whole_way(cluster.url, prefix)
    async with Client(cluster.url, f"{prefix}-2") as client:
        await insist(client, "before")
        # The node that the URL names may be the one that dies: others are known by now.
        cluster.owner.kill()
        await insist(client, "after")


async def test_a_primary_that_moves_away_without_dying(
    started: Callable[[Cluster], Cluster], prefix: str
) -> None:
    """Every connection notices at once, when the first of them does."""
    cluster = started(Cluster(key_slot(HASH_TAG.encode())))
    async with Client(cluster.url, prefix) as client:
        await asyncio.gather(*(client.queue.get("acme", "j") for _ in range(8)))
        replica = connect(cluster.nodes[3].url)
        await replica.execute_command("CLUSTER", "FAILOVER")
        async with asyncio.timeout(20):
            while (await replica.execute_command("ROLE"))[0] != "master":
                await asyncio.sleep(0.02)
        await replica.aclose()
        refusals = []
        for n in range(20):
            try:
                await client.queue.enqueue(new_job(f"j{n}"))
            except Unavailable as error:
                refusals.append(error.message)
        assert refusals in ([], ["The Redis cluster has moved the keys."])
        waits = [client.queue.get("acme", "j") for _ in range(8)]
        assert await asyncio.gather(*waits) == [None] * 8
