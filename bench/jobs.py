"""The job system's promises, measured on real processes: a service, workers, a Redis, a store.

    python bench/jobs.py [--queued 10000] [--repeats 5] [--only queue memory served cancel ...]

Each part prints what it measured beside what was promised. Absolute times drift on shared machines;
the ratios and the breakdown do not. Texts are made up, so nothing has to be downloaded.

    queue      claim latency and Redis memory with many queued jobs
    memory     a worker supervisor's own memory
    served     a 320-row text job on a warm worker, from POST to a served prediction
    cancel     from POST to `cancelled`, while features are computed
    pause      from POST to `paused`, likewise
    takeover   from SIGKILL of a worker to the next attempt's start, against the lease
    forecast   how far `estimated_start` and `seconds_remaining` are off
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from cli import embedded_redis
from cli.stack import Stack, StackOptions, free_port
from core.datasets import Modality
from core.estimate import Workload, estimate
from core.jobs import FineTuneRequest, JobKind, NewJob
from core.queue.connection import connect
from core.queue.redis import RedisJobQueue

LEASE_SECONDS = 5.0
MODEL = "minilm"
INTENTS = ("refund", "late parcel", "change address", "close account")
ENDED = ("succeeded", "failed", "cancelled")
SIZES = (40, 400, 2000)
"""Rows of the jobs whose forecasts are measured."""


def texts(rows: int, salt: str) -> bytes:
    """A data set of four classes, whose rows no other data set has."""
    lines = (
        f"{salt} {n}: i want to ask about my {INTENTS[n % 4]} please,{INTENTS[n % 4]}"
        for n in range(rows)
    )
    return "\n".join(("text,label", *lines)).encode()


def show(name: str, seconds: Sequence[float], promise: str) -> None:
    """Print the median and the worst of some durations."""
    worst, middle = max(seconds), statistics.median(seconds)
    print(f"{name:<34} median {middle:7.3f} s  worst {worst:7.3f} s  n={len(seconds)}  {promise}")


class Bench:
    """A stack with one worker, more workers on demand, and clients."""

    def __init__(self, stack: Stack, environment: dict[str, str], queue: Any, repeats: int) -> None:
        self.environment = environment
        self.queue = queue
        self.repeats = repeats
        self._http = httpx.Client(base_url=stack.url, timeout=60)
        self._salt = 0
        self._stack_pid = os.getpid()

    # -- through HTTP ------------------------------------------------------------------------

    def upload(self, rows: int) -> str:
        """Upload rows that were never seen, wait until they are parsed, return the file's id."""
        self._salt += 1
        form = {"file": ("rows.csv", texts(rows, f"set {self._salt}"))}
        answer = self._http.post("/v1/files", files=form, data={"purpose": "fine-tune"})
        answer.raise_for_status()
        file_id: str = answer.json()["id"]
        self.poll(
            lambda: self._http.get(f"/v1/files/{file_id}").json()["status"] == "processed", 120
        )
        return file_id

    def post(self, file_id: str, name: str = "bench") -> str:
        """Create a job and return its id."""
        body = {"model": MODEL, "training_file": file_id, "suffix": name}
        answer = self._http.post("/v1/fine_tuning/jobs", json=body)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job as it is now."""
        found: dict[str, Any] = self._http.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        return found

    def ask(self, job_id: str, what: str) -> None:
        """Cancel, pause or resume a job."""
        self._http.post(f"/v1/fine_tuning/jobs/{job_id}/{what}").raise_for_status()

    def poll(self, check: Callable[[], Any], seconds: float = 300) -> Any:
        """Return the first true answer."""
        deadline = time.monotonic() + seconds
        while not (found := check()):
            if time.monotonic() > deadline:
                raise SystemExit("the bench waited in vain")
            time.sleep(0.005)
        return found

    def reached(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """Wait until a job has one of some statuses."""
        return self.poll(  # type: ignore[no-any-return]
            lambda: job if (job := self.job(job_id))["status"] in statuses else None
        )

    def computing(self, job_id: str) -> None:
        """Wait until a job computes features."""
        self.poll(lambda: (self.job(job_id)["progress"] or {}).get("stage") == "features")

    def warm(self) -> None:
        """Wait until the worker's spare child is there and has nothing left to do."""

        def is_idle() -> bool:
            found = [each for each in psutil.process_iter(["cmdline"])
                     if "training.child" in (each.info["cmdline"] or ())
                     and JobKind.FINE_TUNE.value in each.info["cmdline"]
                     and self._stack_pid in {parent.pid for parent in each.parents()}]  # fmt: skip
            if len(found) != 1:
                return False
            with suppress(psutil.NoSuchProcess):
                before = sum(found[0].cpu_times()[:2])
                time.sleep(0.3)
                return before > 1 and sum(found[0].cpu_times()[:2]) == before
            return False

        self.poll(is_idle, 60)

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """One more worker."""
        process = subprocess.Popen(
            [sys.executable, "-m", "training.worker"], env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    # -- parts -------------------------------------------------------------------------------

    def memory(self) -> None:
        """A supervisor's own memory, its children left out."""
        with self.worker() as worker:
            self.poll(lambda: psutil.Process(worker.pid).children())
            time.sleep(2)
            used = psutil.Process(worker.pid).memory_full_info()
            print(f"supervisor memory: {used.rss / 1e6:.0f} MB resident, {used.uss / 1e6:.0f} MB "
                  "its own; promised ≤ 80 MB")  # fmt: skip

    def served(self) -> None:
        """POST to served, with the breakdown that the events give."""
        took: list[float] = []
        for n in range(self.repeats):
            file_id, name = self.upload(320), f"served-{n}"
            self.warm()
            begun = time.perf_counter()
            job_id = self.post(file_id, name)
            body = {"model": name, "inputs": ["where is my parcel"]}
            self.poll(lambda body=body: self._http.post("/v1/predict", json=body).is_success)
            took.append(time.perf_counter() - begun)
            self.reached(job_id, *ENDED)
        show("320 rows, POST to served", took, "promised ≤ 3 s")
        found = self._http.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100})
        events = found.json()["data"][::-1]
        for event in events:
            at = int(event["id"].removeprefix("ftevent-").partition("-")[0]) / 1000
            first = int(events[0]["id"].removeprefix("ftevent-").partition("-")[0]) / 1000
            print(f"    {at - first:7.3f} s  {event['event']:<12} {event['message']}")

    def stop(self, what: str, status: str, promise: str) -> None:
        """From asking to the status, in the middle of the features."""
        took = []
        for _ in range(self.repeats):
            job_id = self.post(self.upload(6000))
            self.computing(job_id)
            begun = time.perf_counter()
            self.ask(job_id, what)
            self.reached(job_id, status)
            took.append(time.perf_counter() - begun)
            if what == "pause":
                self.ask(job_id, "cancel")
        show(f"{what} to {status}", took, promise)

    def takeover(self) -> None:
        """Kill the worker of a running job while another one waits."""
        took = []
        for _ in range(self.repeats):
            # One of two: the stack's, which it starts again, or this one.
            with self.worker() as extra:
                self.poll(lambda extra=extra: psutil.Process(extra.pid).children())
                job_id = self.post(self.upload(6000))
                self.computing(job_id)
                job = self.queue.run(self.queue.get("default", job_id))
                os.kill(int(job.worker.rsplit("-", 2)[1]), signal.SIGKILL)
                begun = time.perf_counter()
                self.poll(lambda job_id=job_id: self.job(job_id)["attempt"] == 2, 60)
                took.append(time.perf_counter() - begun)
                self.ask(job_id, "cancel")
                self.reached(job_id, *ENDED)
        show("SIGKILL to next attempt", took, f"promised ≤ {LEASE_SECONDS + 1:g} s")

    def forecast(self) -> None:
        """Jobs of three sizes at once: when each was said to start and to end, and when it did.

        Each start is asked for once, when all are posted, and each end ten times a second.
        """
        for rows in SIZES:  # what was learned of them is applied
            self.reached(self.post(self.upload(rows)), *ENDED)
        self.warm()
        sizes = [SIZES[n] for n in (2, 0, 1, 0, 2, 1, 0, 1, 2)] * max(1, self.repeats // 5)
        files = [self.upload(rows) for rows in sizes]
        jobs = [self.post(each) for each in files]
        asked = time.time()
        starts = [(each, asked, self.job(each)["estimated_start"]) for each in jobs]
        ends = []
        while len(jobs) > sum(self.job(each)["status"] in ENDED for each in jobs):
            for each in jobs:
                found, now = self.job(each), time.time()
                if found["progress"] is not None:
                    left = found["progress"]["seconds_remaining"]
                    ends.append((each, now, None if left is None else now + left))
            time.sleep(0.1)
        done = [self.queue.run(self.queue.get("default", each)) for each in jobs]
        gaps = [b.started_at - a.finished_at for a, b in pairwise(done)]
        print(f"from a job's end to the next one's claim: median {statistics.median(gaps):.2f} s")
        first = list({each: told for each, *told in reversed(ends)}.items())
        self.compare("estimated_start", starts, "started_at")
        self.compare("seconds_remaining, first", [(e, *told) for e, told in first], "finished_at")
        self.compare("seconds_remaining, all", ends, "finished_at")

    def compare(
        self, name: str, told: list[tuple[str, float, float | None]], field: str
    ) -> None:  # fmt: skip
        """Print how far forecasts, each of a job and made at a time, were from what came."""
        came = {each: getattr(self.queue.run(self.queue.get("default", each)), field)
                for each, _, _ in told}  # fmt: skip
        known = [(came[each] - asked, abs(said - came[each]))
                 for each, asked, said in told if said is not None]  # fmt: skip
        if known:
            errors = [error for _, error in known]
            ahead = sum(max(0, away) for away, _ in known)
            print(f"{name:<26} median error {statistics.median(errors):.2f} s, worst "
                  f"{max(errors):.2f} s, sum {sum(errors) / max(1, ahead):.0%} of the time ahead, "
                  f"known {len(known)} times of {len(told)}")  # fmt: skip


class Queue:
    """The stack's queue, seen from outside."""

    def __init__(self, url: str, prefix: str) -> None:
        self._runner = asyncio.Runner()
        self._queue = self.run(self._open(url, prefix))
        self.get = self._queue.get

    async def _open(self, url: str, prefix: str) -> RedisJobQueue:
        return RedisJobQueue(
            connect(url), prefix=prefix, max_queued=10**6, max_attempts=3, retention_seconds=600
        )

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine of the queue's."""
        return self._runner.run(coroutine)

    def measure(self, queued: int) -> None:
        """Fill the queue, then claim; in a prefix of its own nobody else works on it."""
        self.run(self._measure(queued))

    async def _measure(self, queued: int) -> None:
        client = self._queue._client
        spec = FineTuneRequest(model=MODEL, training_file="file-" + "0" * 24, suffix="bench")
        work = Workload(
            model=MODEL, modality=Modality.TEXT, dim=384, rows=400, new_rows=400, classes=4,
            stored_bytes=25_000,
        )  # fmt: skip
        before = (await client.info("memory"))["used_memory"]
        for n in range(queued):
            await self._queue.enqueue(
                NewJob(
                    tenant="default", id=f"ftjob-{n:024}", kind=JobKind.FINE_TUNE,
                    spec=spec.model_dump(mode="json"), estimate=estimate(work),
                )
            )  # fmt: skip
        used = ((await client.info("memory"))["used_memory"] - before) / queued
        took = []
        for _ in range(min(queued, 2000)):
            begun = time.perf_counter()
            assert await self._queue.claim(JobKind.FINE_TUNE, "bench", 600)
            took.append(time.perf_counter() - begun)
        took.sort()
        print(f"{queued} queued: claim p50 {took[len(took) // 2] * 1e3:.2f} ms, p99 "
              f"{took[len(took) * 99 // 100] * 1e3:.2f} ms (promised ≤ 5 ms); "
              f"{used:.0f} bytes a job in Redis (promised ≤ 4000)")  # fmt: skip


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A private server, as the local stack starts it; yields its URL."""
    server = embedded_redis.find_server()
    if server is None:
        raise SystemExit("no Redis found: install Redis or Valkey")
    path = folder / "redis.sock"
    process = subprocess.Popen(
        embedded_redis.command(server, folder, path), stdout=subprocess.DEVNULL
    )
    try:
        embedded_redis.wait_until_answering(path, 30)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    """Run the chosen parts."""
    parts = ("queue", "memory", "served", "cancel", "pause", "takeover", "forecast")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="graft-bench-", dir="/tmp") as name,
        ExitStack() as live,
    ):
        folder = Path(name)
        url = live.enter_context(redis_server(folder))
        if "queue" in options.only:
            Queue(url, f"bench-{secrets.token_hex(4)}").measure(options.queued)
        if set(options.only) == {"queue"}:
            return
        clean = {key: v for key, v in os.environ.items() if not key.startswith("GRAFT_")}
        environment = clean | {
            "GRAFT_REDIS_URL": url,
            "GRAFT_STORE_URL": str(folder / "store"),
            "GRAFT_EXPORT_WHEN_IDLE": "false",
            "GRAFT_LEASE_SECONDS": str(LEASE_SECONDS),
        }
        stack = live.enter_context(Stack(StackOptions(folder / "data", free_port(), environment)))
        bench = Bench(stack, environment, Queue(url, "graft"), options.repeats)
        bench.reached(bench.post(bench.upload(80)), *ENDED)  # exports the trunk, warms the spare
        for part in options.only:
            match part:
                case "cancel":
                    bench.stop("cancel", "cancelled", "promised ≤ 1 s")
                case "pause":
                    bench.stop("pause", "paused", "")
                case "memory" | "served" | "takeover" | "forecast":
                    getattr(bench, part)()


if __name__ == "__main__":
    main()
