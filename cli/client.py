"""The service over HTTP: the `openai` client for its part of the API, `httpx` for the rest.

Every call has a timeout. Failures are raised as the libraries raise them; `cli.failures.explain`
puts them into words. What waits for something to happen outlives a restart of the service or of
what it needs: `outage_survived`. Not here: following a job's events (cli.events).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import openai
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from cli.failures import CommandError

TIMEOUT_SECONDS = 60.0
UPLOAD_SECONDS = 600.0
MAX_INPUTS = 256
# An image keeps a trunk busy for as long as several texts, and a request has a deadline.
INPUTS_PER_IMAGE = 8
MAX_BATCH_BYTES = 16 << 20
POLL_SECONDS = 0.1
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
PASSING = frozenset({429, 502, 503, 504})
"""Statuses of a service that is busy, starting, or without Redis: the next try may find it well."""

Input = str | dict[str, str]
Prediction = dict[str, Any]


class Client:
    """One service at `url`, to be closed after use. Threads may share it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        # A proxy of the environment is of no use on the way to this very machine.
        trust_env = urlsplit(self.url).hostname not in LOOPBACK
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key or "none",
            timeout=TIMEOUT_SECONDS,
            http_client=openai.DefaultHttpxClient(trust_env=trust_env),
        )
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=TIMEOUT_SECONDS,
            trust_env=trust_env,
        )

    def close(self) -> None:
        """Close all connections."""
        self.openai.close()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def create_job(
        self,
        *,
        backbone: str,
        name: str,
        training_file: str,
        validation_file: str | None = None,
        seed: int | None = None,
        options: Mapping[str, object] | None = None,
    ) -> FineTuningJob:
        """Create a fine-tuning job that publishes versions of the model `name`.

        `options` are the fields that Graft adds to the protocol's, such as `strategy`.
        """
        return self.openai.fine_tuning.jobs.create(
            model=backbone,
            training_file=training_file,
            validation_file=validation_file or openai.omit,
            suffix=name,
            seed=openai.omit if seed is None else seed,
            extra_body=dict(options) if options else None,
        )

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job's record, with our additions to the protocol's fields."""
        answer = self._http.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status()
        record: dict[str, Any] = answer.json()
        return record

    def steer(self, job_id: str, action: str, body: Mapping[str, object] | None = None) -> None:
        """Ask for a job to be cancelled, paused or resumed: `action` is `cancel` and so on."""
        path = f"/v1/fine_tuning/jobs/{job_id}/{action}"
        self._http.post(path, json=body).raise_for_status()

    def wait_for_file(self, file_id: str, timeout_seconds: float = UPLOAD_SECONDS) -> FileObject:
        """Wait until the file is `processed` or in `error`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            with outage_survived():
                file = self.openai.files.retrieve(file_id)
                if file.status != "uploaded":
                    return file
            if time.monotonic() >= deadline:
                raise CommandError(f"{file_id} is not processed after {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def stream_events(
        self, job_id: str, after: str | None, read_seconds: float
    ) -> AbstractContextManager[httpx.Response]:
        """Open the event stream of a job behind the event `after`."""
        return self._http.stream(
            "GET",
            f"/v1/fine_tuning/jobs/{job_id}/events",
            params={"stream": "true"},
            headers={"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {}),
            timeout=httpx.Timeout(10, read=read_seconds),
        )

    def wait_until_served(self, model: str, timeout_seconds: float = 60) -> None:
        """Wait until the service has loaded the model reference, such as `support-intents@3`."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            with outage_survived():
                described = self.model(model)
                if described["served"]:
                    return
                if described["refused"]:
                    raise CommandError(f"{model} is not served: {described['refused']}")
            time.sleep(POLL_SECONDS / 5)
        raise CommandError(
            f"{model} was trained, but is not served after {timeout_seconds:g} s; "
            "the service's log says why"
        )

    def model(self, reference: str) -> dict[str, Any]:
        """Return what the service says of a model or a version."""
        described: dict[str, Any] = (
            self._http.get(f"/v1/models/{reference}").raise_for_status().json()
        )
        return described

    def model_files(self, reference: str) -> dict[str, Any]:
        """Return the list of a version's files, and which version it is as `model`."""
        answer = self._http.get(f"/v1/models/{reference}/files").raise_for_status()
        listed: dict[str, Any] = answer.json()
        return listed

    def model_file(self, reference: str, name: str) -> Iterator[bytes]:
        """Yield the bytes of one of a version's files."""
        with self._http.stream("GET", f"/v1/models/{reference}/files/{name}") as answer:
            if answer.is_error:
                answer.read()
            yield from answer.raise_for_status().iter_bytes()

    def predict(
        self, model: str, inputs: Sequence[Input], top_k: int | None = None
    ) -> list[Prediction]:
        """Return a prediction or an `error` for each input, in as many requests as it takes."""
        predictions: list[Prediction] = []
        for batch in batches(inputs):
            body: dict[str, Any] = {"model": model, "inputs": batch}
            if top_k is not None:
                body["top_k"] = top_k
            answer = self._http.post("/v1/predict", json=body).raise_for_status()
            predictions += answer.json()["predictions"]
        return predictions


@contextmanager
def outage_survived() -> Iterator[None]:
    """Suppress what passes by itself, for a block that is then tried again until a deadline."""
    try:
        yield
    except (httpx.TransportError, openai.APIConnectionError):
        pass
    except (httpx.HTTPStatusError, openai.APIStatusError) as error:
        if error.response.status_code not in PASSING:
            raise


def image_input(image: bytes) -> Input:
    """Return the input that carries an encoded image."""
    return {"image": base64.b64encode(image).decode()}


def read_input(argument: str) -> Input:
    """Return an argument's input: an image if it names an image file, else the text itself."""
    path = Path(argument)
    if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"} and path.is_file():
        return image_input(path.read_bytes())
    return argument


def batches(inputs: Sequence[Input]) -> Iterator[list[Input]]:
    """Split inputs into requests of a size that the service accepts, in order."""
    batch: list[Input] = []
    cost = size = 0
    for item in inputs:
        if isinstance(item, str):
            item_cost, item_size = 1, len(item)
        else:
            item_cost, item_size = INPUTS_PER_IMAGE, len(item["image"])
        if batch and (cost + item_cost > MAX_INPUTS or size + item_size > MAX_BATCH_BYTES):
            yield batch
            batch, cost, size = [], 0, 0
        batch.append(item)
        cost += item_cost
        size += item_size
    if batch:
        yield batch
