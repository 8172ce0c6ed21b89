"""Finding the server that takes writes when it may move: behind Sentinel, or in a Cluster.

Every key of ours has one hash tag, so at any time one node of a Cluster holds all of them, and a
Cluster is to us what Sentinel is: a way to ask where the primary is now. A connection asks before
it connects; one that hears from its server that it is not the primary (any more) ends, and every
other one before its next use. The command that met this has failed, like one whose answer was lost:
it is not sent again, for it may be a claim. `redis.asyncio.cluster` instead sends commands again by
itself, asks the server for the keys of every blocking read, and has no bound that waits.

Not here: the pool, and errors as we tell them (core.queue.connection).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, SSLConnection
from redis.crc import key_slot

from core.redis_address import Node

ASK_SECONDS = 1.0
MAX_NODES = 32
HASH_TAG = "{graft}"
"""In every key, so that a Cluster keeps them in one place."""

_MOVED = frozenset({"READONLY", "MOVED", "ASK", "CLUSTERDOWN", "MASTERDOWN"})


class Finder(ABC):
    """Tells where the primary is; `era` changes when what it told is no longer to be trusted."""

    def __init__(self, nodes: Sequence[Node], options: Mapping[str, Any]) -> None:
        """`nodes` are asked in turn, over connections with `options`."""
        self.era = 0
        self._nodes = deque(nodes)
        self._options = options

    async def find(self) -> Node:
        """Return host and port, as the first node that answers sees it; raise `ConnectionError`."""
        for node in list(self._nodes):
            client = Redis(
                host=node[0], port=node[1], single_connection_client=True, **self._options
            )
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    found = await self._ask(client, node)
            except (exceptions.RedisError, OSError):
                found = None
            finally:
                await client.aclose()
            if found is not None:
                return found
            self._nodes.rotate(-1)
        raise exceptions.ConnectionError("nobody who was asked knows the primary")

    def distrust(self) -> None:
        """Ask again before any connection is used, and another node first: one may be cut off."""
        self.era += 1
        self._nodes.rotate(-1)

    @abstractmethod
    async def _ask(self, client: Redis, node: Node) -> Node | None:
        """Return what one node knows."""


class SentinelFinder(Finder):
    """Asks the Sentinels who is the primary of a service.

    https://redis.io/docs/latest/develop/reference/sentinel-clients/
    """

    def __init__(self, nodes: Sequence[Node], options: Mapping[str, Any], service: str) -> None:
        super().__init__(nodes, options)
        self._service = service

    async def _ask(self, client: Redis, node: Node) -> Node | None:
        untyped: Any = client
        found = await untyped.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", self._service)
        return (str(found[0]), int(found[1])) if found else None


class ClusterFinder(Finder):
    """Asks the Cluster's nodes who has our slot, and learns of other nodes thereby."""

    _slot = key_slot(HASH_TAG.encode())

    async def _ask(self, client: Redis, node: Node) -> Node | None:
        untyped: Any = client
        return self._owner(await untyped.execute_command("CLUSTER SLOTS"), node)

    def _owner(self, ranges: Sequence[Any], asked: Node) -> Node | None:
        """Read rows of (first slot, last slot, primary, replica, …), a node being (host, port, …).

        https://redis.io/docs/latest/commands/cluster-slots/
        """
        owner = None
        for first, last, *nodes in ranges:
            # A node that does not know its own address says nothing: then it is where we asked.
            addresses = [(host or asked[0], int(port)) for host, port, *_ in nodes]
            for address in addresses:
                if address not in self._nodes and len(self._nodes) < MAX_NODES:
                    self._nodes.append(address)
            if first <= self._slot <= last:
                owner = addresses[0]
        return owner


class FoundConnection(Connection):
    """A connection to wherever the primary is."""

    def __init__(self, *, finder: Finder, **options: Any) -> None:
        super().__init__(**options)
        self._finder = finder
        self._era = finder.era

    async def connect(self) -> None:
        """Connect, to another server than before if need be; the pool calls this before any use."""
        if self.is_connected and self._era != self._finder.era:
            await self.disconnect()
        if not self.is_connected:
            self._era = self._finder.era
            self.host, self.port = await self._finder.find()
        await super().connect()  # type: ignore[no-untyped-call]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read one answer; one that says that this is not the primary ends the connection."""
        try:
            return await super().read_response(*args, **options)
        except exceptions.ResponseError as error:
            # Redis 6.2 wraps the answer to a script's command in a sentence.
            if is_moved(error):
                await self.disconnect()
                if self._era == self._finder.era:
                    self._finder.distrust()
            raise


class FoundSSLConnection(FoundConnection, SSLConnection):
    """The same over TLS."""


def is_moved(error: exceptions.ResponseError) -> bool:
    """Tell whether an error says that its server is not the one to write to."""
    if isinstance(
        error,
        (exceptions.ReadOnlyError, exceptions.AskError, exceptions.ClusterDownError,
         exceptions.MasterDownError),
    ):  # fmt: skip
        return True
    return not _MOVED.isdisjoint(str(error).replace("-", " ").split())
