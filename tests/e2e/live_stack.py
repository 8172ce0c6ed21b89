"""A real stack for the end-to-end tests: `graft up`, driven through HTTP only."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from openai import OpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from cli.stack import free_port
from tests.waiting import eventually

READY_SECONDS = 120
JOB_SECONDS = 300
T = TypeVar("T")


@dataclass
class LiveStack:
    """A running `graft up` and clients for it."""

    process: subprocess.Popen[bytes]
    url: str
    data: Path

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def pids(self, words: str) -> list[int]:
        """Processes of this stack whose command line holds `words`, oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if words in " ".join(child.cmdline()):
                    found.append((child.create_time(), child.pid))
        return [pid for _, pid in sorted(found)]

    def upload(self, filename: str, data: bytes) -> FileObject:
        """Upload a file and wait until it is parsed."""
        file = self.openai.files.create(file=(filename, data), purpose="fine-tune")
        return self.openai.files.wait_for_processing(
            file.id, poll_interval=0.05, max_wait_seconds=60
        )

    def train(self, file_id: str, name: str, model: str = "minilm", **extra: Any) -> FineTuningJob:
        """Create a job."""
        return self.openai.fine_tuning.jobs.create(
            model=model, training_file=file_id, suffix=name, extra_body=extra
        )

    def job(self, job_id: str) -> FineTuningJob:
        """Return a job as it is now."""
        return self.openai.fine_tuning.jobs.retrieve(job_id)

    def finished(self, job_id: str, seconds: float = JOB_SECONDS) -> FineTuningJob:
        """Wait until a job has ended, however it did."""

        def ended() -> FineTuningJob | None:
            job = self.job(job_id)
            return job if job.status in ("succeeded", "failed", "cancelled") else None

        return eventually(ended, seconds, f"{job_id} ends")

    def running(self, job_id: str, seconds: float = 30) -> FineTuningJob:
        """Wait until a worker has the job."""
        return eventually(
            lambda: job if (job := self.job(job_id)).status == "running" else None,
            seconds,
            f"{job_id} runs",
        )

    def predict(self, model: str, inputs: list[Any], **more: Any) -> Any:
        """POST /v1/predict and return the answer's JSON."""
        answer = self.http.post("/v1/predict", json={"model": model, "inputs": inputs, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def served(self, model: str) -> None:
        """Wait until a model answers."""
        body = {"model": model, "inputs": ["hello"]}
        eventually(
            lambda: self.http.post("/v1/predict", json=body).status_code == 200,
            10, f"{model} is served",
        )  # fmt: skip

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All events of a job, oldest first."""
        found = self.http.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100})
        events: list[dict[str, Any]] = found.json()["data"]
        return events[::-1]


def unique_rows(data: bytes, copies: int) -> bytes:
    """A CSV's rows so many times, each a text of its own: what is equal is computed only once."""
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("text", "label"))
    writer.writerows((f"{n} {row['text']}", row["label"]) for n in range(copies) for row in rows)
    return text.getvalue().encode()


def start_stack(folder: Path, **settings: str) -> LiveStack:
    """Start `graft up` on a free port and wait until it is ready."""
    # Under nohup, or behind a shell's `&`, a stack would rightly ignore what is ignored here.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
    log = folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cli.main",
                "up",
                "--port",
                str(port),
                "--data",
                str(folder / "d"),
            ],
            env=environment | {"GRAFT_EXPORT_WHEN_IDLE": "false"} | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    stack = LiveStack(process, f"http://127.0.0.1:{port}", folder / "d")

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            return bool(stack.http.get("/readyz").is_success)
        return False

    eventually(ready, READY_SECONDS, "the stack is ready")
    return stack


def stop_stack(stack: LiveStack) -> None:
    """Ctrl-C, and wait for a clean end."""
    stack.http.close()
    stack.openai.close()
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0
