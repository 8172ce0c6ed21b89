"""An HTTP load generator in a process of its own: fixed requests, kept connections, exact times.

    python bench/load_generator.py '{"port": 3000, "concurrency": 8, "seconds": 5, "bodies": […]}'

Closed loop: each of `concurrency` connections sends its next request when the last is answered.
Open loop, with `rate`: requests leave on a schedule of their own, whatever becomes of those before
them, and a request's time counts from when it should have left; what finds no free connection is
counted as `unsent`. Prints one line of JSON. Python's HTTP clients cost a millisecond a request,
as much as a server may take; this writes bytes and reads a status and a length.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any


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


class Connection:
    """One kept connection; status 0 means that it broke."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to a port of this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> int:
        """Send a request; return its status when the answer is complete."""
        try:
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = head.lower().index(b"content-length:") + 15
            await self._reader.readexactly(int(head[length : head.index(b"\r", length)]))
            return int(head[9:12])
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.close()
            return 0

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


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
    print(json.dumps(asyncio.run(Load(Plan(**json.loads(source))).run())))
