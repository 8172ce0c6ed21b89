"""Images and stacks of containers, driven through the Docker command line.

$DOCKER and $COMPOSE name the commands, `docker` and `docker compose` by default; $DOCKER_HOST is
Docker's own. Everything made here has a random tag or project name, and is removed by its maker.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from cli.stack import free_port
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
DOCKER = shlex.split(os.environ.get("DOCKER", "docker"))
COMPOSE = shlex.split(os.environ.get("COMPOSE", "docker compose"))
WHEELHOUSE = "wheelhouse:local"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_SECONDS = 900
UP_SECONDS = 120
JOB_SECONDS = 300


def run(
    command: list[str], *, seconds: float = 60, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, within a deadline."""
    return subprocess.run(
        command, cwd=ROOT, env=env, timeout=seconds, capture_output=True, text=True, check=False
    )


def output(command: list[str], *, seconds: float = 60, env: Mapping[str, str] | None = None) -> str:
    """Run a command that must succeed; return its standard output."""
    ended = run(command, seconds=seconds, env=env)
    assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout.strip()


def docker(*words: str, seconds: float = 60) -> str:
    """Run a Docker command that must succeed; return its standard output."""
    return output([*DOCKER, *words], seconds=seconds)


@dataclass(frozen=True)
class Images:
    """Both images, built from this checkout."""

    tag: str

    @property
    def service(self) -> str:
        """The service's image."""
        return f"graft-service:{self.tag}"

    @property
    def worker(self) -> str:
        """The worker's image."""
        return f"graft-worker:{self.tag}"

    def build(self) -> None:
        """Build both, with a CPU-only torch from the local wheels if there are any."""
        if run([*DOCKER, "image", "inspect", WHEELHOUSE]).returncode == 0:
            torch = f"WHEELHOUSE={WHEELHOUSE}"
        else:
            torch = f"TORCH_INDEX={os.environ.get('TORCH_INDEX', CPU_TORCH_INDEX)}"
        for target, image in (("service", self.service), ("worker", self.worker)):
            output(
                [*DOCKER, "build", "--target", target, "--tag", image, "--build-arg", torch, "."],
                seconds=BUILD_SECONDS,
                env=os.environ | {"DOCKER_BUILDKIT": "1"},
            )

    def remove(self) -> None:
        """Remove the tags; the build cache stays, so that the next build is quick."""
        docker("image", "rm", "--force", self.service, self.worker)


class Stack:
    """`docker compose` with a project, a port and a key of its own."""

    def __init__(self, images: Images) -> None:
        self.project = f"graft-test-{secrets.token_hex(4)}"
        self.key = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._env = environment() | {
            "GRAFT_TAG": images.tag,
            "GRAFT_PORT": str(port),
            "GRAFT_API_KEY": self.key,
        }
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key=self.key, timeout=30)

    def compose(self, *words: str, seconds: float = 60) -> str:
        """Run a compose command of this project."""
        # A developer's own .env is not read.
        command = [*COMPOSE, "--env-file", os.devnull, "--project-name", self.project, *words]
        return output(command, seconds=seconds, env=self._env)

    def up(self, *, workers: int = 1) -> None:
        """Start what is not running and wait until all of it is healthy."""
        try:
            words = ("up", "--detach", "--no-build", "--pull", "never", "--wait")
            words += ("--scale", f"worker={workers}")
            self.compose(*words, "--wait-timeout", str(UP_SECONDS), seconds=UP_SECONDS + 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def down(self, *words: str) -> None:
        """Remove the containers, and with `--volumes` the data."""
        self.compose("down", *words, seconds=120)

    def close(self) -> None:
        """Remove everything."""
        self.openai.close()
        self.down("--volumes", "--remove-orphans")

    def logs(self) -> str:
        """Return the end of every container's log."""
        return self.compose("logs", "--no-color", "--timestamps", "--tail", "150")

    def container(self, service: str) -> str:
        """Return the id of a service's container."""
        return self.compose("ps", "--all", "--quiet", service)

    def containers(self, service: str) -> list[str]:
        """Return the ids of all of a service's containers."""
        return self.container(service).split()

    def container_logs(self, container: str) -> str:
        """Return all that a container has said."""
        ended = run([*DOCKER, "logs", container])
        return ended.stdout + ended.stderr

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what Docker knows about a service's container."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", self.container(service)))
        return found[0]

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a service's container."""
        return run([*DOCKER, "exec", self.container(service), *command])

    def healthy(self, service: str) -> None:
        """Wait until a container's health check passes."""
        eventually(
            lambda: self.inspect(service)["State"]["Health"]["Status"] == "healthy",
            UP_SECONDS, f"{service} is healthy",
        )  # fmt: skip

    def get(self, path: str, *, key: str | None = None) -> httpx.Response:
        """GET with the stack's key, or another one; an empty one sends none."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30)

    def upload(self, filename: str, data: bytes) -> FileObject:
        """Upload a file and wait until it is parsed."""
        file = self.openai.files.create(file=(filename, data), purpose="fine-tune")
        parsed = self.openai.files.wait_for_processing(
            file.id, poll_interval=0.1, max_wait_seconds=60
        )
        assert parsed.status == "processed", parsed.status_details
        return parsed

    def train(self, file_id: str, name: str) -> FineTuningJob:
        """Create a job."""
        return self.openai.fine_tuning.jobs.create(
            model="minilm", training_file=file_id, suffix=name
        )

    def job(self, job_id: str) -> FineTuningJob:
        """Return a job as it is now."""
        return self.openai.fine_tuning.jobs.retrieve(job_id)

    def succeeded(self, job_id: str) -> FineTuningJob:
        """Wait until a job has succeeded."""

        def ended() -> FineTuningJob | None:
            job = self.job(job_id)
            return job if job.status in ("succeeded", "failed", "cancelled") else None

        job = eventually(ended, JOB_SECONDS, f"{job_id} ends")
        assert job.status == "succeeded", job.error
        return job

    def predict(self, model: str, inputs: list[str]) -> list[dict[str, Any]]:
        """Wait until a model is served, and return its predictions."""
        headers = {"Authorization": f"Bearer {self.key}"}
        body = {"model": model, "inputs": inputs}

        def answered() -> httpx.Response | None:
            answer = httpx.post(f"{self.url}/v1/predict", headers=headers, json=body, timeout=30)
            return answer if answer.is_success else None

        predictions: list[dict[str, Any]] = eventually(answered, 30, f"{model} is served").json()[
            "predictions"
        ]
        return predictions


def environment() -> dict[str, str]:
    """Return this process's environment without any setting of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
