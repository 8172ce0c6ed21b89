"""An HTTP load generator in a process of its own: fixed requests, kept connections, exact times.

    python bench/load_generator.py '{"port": 3000, "concurrency": 8, "seconds": 5, "bodies": […]}'

Closed loop: each of `concurrency` connections sends its next request when the last is answered.
Open loop, with `rate`: requests leave on a schedule of their own, whatever becomes of those before
them, and a request's time counts from when it should have left; what finds no free connection is
counted as `unsent`. Prints one line of JSON. Python's HTTP clients cost a millisecond a request,
as much as a server may take; this writes bytes and reads a status and a length, on uvloop, for what
it takes of a core it takes from the server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass
class Plan:
    """What to send, to where, how often. A body is [path, content type, text or hex of bytes]."""

    port: int
    concurrency: int
    seconds: float
    bodies: list[list[str]]
    rate: float | None = None
    warm_seconds: float = 1.0
    timeout_ms: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Load:
    """Sends a plan and keeps what came back."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._requests = itertools.cycle([_request(plan, body) for body in plan.bodies])
        self._answers: list[tuple[float, float, int]] = []
        self._unsent = 0

    async def run(self) -> dict[str, Any]:
        """Warm up, measure, and return the summary."""
        began = time.perf_counter()
        end = began + self._plan.warm_seconds + self._plan.seconds
        if self._plan.rate is None:
            loops = (self._closed(end) for _ in range(self._plan.concurrency))
            await asyncio.gather(*loops)
        else:
            await self._open(end, self._plan.rate)
        return self._summary(began + self._plan.warm_seconds, end)

    async def _closed(self, end: float) -> None:
        connection = await Connection.open(self._plan.port)
        while (sent := time.perf_counter()) < end:
            status = await connection.ask(next(self._requests))
            self._answers.append((sent, time.perf_counter(), status))
            if status == 0:
                connection = await Connection.open(self._plan.port)
        connection.close()

    async def _open(self, end: float, rate: float) -> None:
        free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        for _ in range(self._plan.concurrency):
            free.put_nowait(await Connection.open(self._plan.port))
        numbers = random.Random(0)
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while due < end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if free.empty():
                    self._unsent += 1
                else:
                    group.create_task(self._one(free, free.get_nowait(), due))
                due += numbers.expovariate(rate)
        while not free.empty():
            free.get_nowait().close()

    async def _one(
        self, free: asyncio.LifoQueue[Connection], connection: Connection, due: float
    ) -> None:
        status = await connection.ask(next(self._requests))
        self._answers.append((due, time.perf_counter(), status))
        free.put_nowait(connection if status else await Connection.open(self._plan.port))

    def _summary(self, begin: float, end: float) -> dict[str, Any]:
        answers = [answer for answer in self._answers if begin <= answer[1] <= end]
        good = sorted(done - sent for sent, done, status in answers if status == 200)
        statuses: dict[str, int] = {}
        for _, _, status in answers:
            statuses[str(status)] = statuses.get(str(status), 0) + 1
        return {
            "seconds": end - begin,
            "rate": len(good) / (end - begin),
            "p50_ms": _percentile(good, 0.5) * 1000,
            "p99_ms": _percentile(good, 0.99) * 1000,
            "statuses": statuses,
            "unsent": self._unsent,
        }


class Connection(asyncio.Protocol):
    """One kept connection; status 0 means that it broke."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._received = b""
        self._answer: asyncio.Future[int] | None = None

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to a port of this machine."""
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(cls, "127.0.0.1", port))[1]

    async def ask(self, request: bytes) -> int:
        """Send a request; return its status when the answer is complete."""
        if self._transport.is_closing():
            return 0
        self._received = b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    # -- what asyncio calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keep the way to write."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Read what has come of the answer, and tell when it is complete."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end and len(body) >= int(_LENGTH.search(head)[1]):  # type: ignore[index]
            self._tell(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        """There will be no answer."""
        self._tell(0)

    def _tell(self, status: int) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)


def _request(plan: Plan, body: list[str]) -> bytes:
    path, content_type, text = body
    data = text.encode() if content_type == "application/json" else bytes.fromhex(text)
    headers = {"Host": "127.0.0.1", "Content-Type": content_type, "Content-Length": str(len(data))}
    if plan.timeout_ms:
        headers["X-Request-Timeout-Ms"] = str(plan.timeout_ms)
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | plan.headers).items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


if __name__ == "__main__":
    source = sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read()
    print(json.dumps(uvloop.run(Load(Plan(**json.loads(source))).run())))
