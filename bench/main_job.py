"""The main job on real data, through HTTP only: accuracy, seconds, and where the seconds go.

    python bench/main_job.py --data ../shared/data [--only banking10 banking clothing]

Starts a stack of its own, warms it with one small job per modality (so that trunks are exported and
the spare child is up), then runs each job and predicts the whole test set through `/v1/predict`.
"Seconds to served" run from the POST of the job to the first answered prediction. Absolute times
drift on shared machines; compare within one run.
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from data_sets import Row, as_csv, few_shot, read_banking
from openai import OpenAI

from cli.stack import Stack, StackOptions, free_port

PREDICT_BATCH = 64
Stages = list[tuple[str, float]]


def read_images(folder: Path) -> list[Row]:
    """Images in class folders, as ({"image": base64}, label)."""
    return [
        ({"image": base64.b64encode(path.read_bytes()).decode()}, path.parent.name)
        for path in sorted(folder.glob("*/*.jpg"))
    ]


def as_zip(folder: Path, limit: int | None = None) -> bytes:
    """The folder as an upload, at most `limit` images of each class."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for child in sorted(folder.iterdir()):
            for path in sorted(child.glob("*.jpg"))[:limit]:
                archive.write(path, f"{child.name}/{path.name}")
    return data.getvalue()


class Bench:
    """Runs jobs against a stack and prints one table row each."""

    def __init__(self, url: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="bench", max_retries=0, timeout=60)
        self._http = httpx.Client(base_url=url, timeout=60)

    def job(
        self, model: str, name: str, filename: str, data: bytes, probe: Any
    ) -> tuple[float, Stages]:
        """Upload, train, and wait for the first prediction; return its seconds and the stages."""
        file = self._client.files.create(file=(filename, data), purpose="fine-tune")
        self._client.files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=300)
        begun = time.perf_counter()
        job = self._client.fine_tuning.jobs.create(
            model=model, training_file=file.id, suffix=name, extra_body={"max_seconds": 900}
        )
        while (found := self._client.fine_tuning.jobs.retrieve(job.id)).status not in (
            "succeeded", "failed", "cancelled",
        ):  # fmt: skip
            time.sleep(0.02)
        if found.status != "succeeded" or not found.fine_tuned_model:
            raise SystemExit(f"{name}: {found.status}: {found.error}")
        settled = time.perf_counter()
        while self._predict(found.fine_tuned_model, [probe])[0] is None:
            time.sleep(0.01)
        served = time.perf_counter()
        stages = [("served after settled", served - settled), *self._stages(job.id)]
        return served - begun, stages

    def accuracy(self, model: str, rows: Sequence[Row]) -> tuple[float, float]:
        """Return (accuracy, rows per second) over the rows, through HTTP, one caller."""
        begun = time.perf_counter()
        right = 0
        for batch in _batches(rows, PREDICT_BATCH):
            found = self._predict(model, [item for item, _ in batch])
            right += sum(got == want for got, (_, want) in zip(found, batch, strict=True))
        return right / len(rows), len(rows) / (time.perf_counter() - begun)

    def _predict(self, model: str, inputs: list[Any]) -> list[str | None]:
        answer = self._http.post("/v1/predict", json={"model": model, "inputs": inputs})
        if answer.status_code == 404:
            return [None] * len(inputs)
        answer.raise_for_status()
        return [row.get("label") for row in answer.json()["predictions"]]

    def _stages(self, job: str) -> Stages:
        answer = self._http.get(f"/v1/fine_tuning/jobs/{job}/events", params={"limit": 100})
        events = answer.json()["data"]
        return [
            (event["data"]["stage"], event["data"]["seconds"])
            for event in reversed(events)
            if "seconds" in event["data"]
        ]


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def main() -> None:
    """Run the chosen jobs and print what they took and reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the bench data sets")
    parser.add_argument("--only", nargs="*", default=["banking10", "banking", "clothing"])
    options = parser.parse_args()
    banking, clothing = options.data / "banking77", options.data / "clothing"
    train = read_banking(banking / "train.csv")
    test_texts = read_banking(banking / "test.csv")
    test_images = read_images(clothing / "test")
    jobs = {
        "banking10": ("minilm", "data.csv", as_csv(few_shot(train, 10, seed=0)), test_texts),
        "banking": ("minilm", "data.csv", as_csv(train), test_texts),
        "clothing": ("efficientnet-lite0", "data.zip", as_zip(clothing / "train"), test_images),
    }
    with (
        tempfile.TemporaryDirectory(prefix="graft-bench-") as folder,
        Stack(StackOptions(Path(folder) / "data", free_port(), environment())) as stack,
    ):
        bench = Bench(stack.url)
        texts = as_csv(train[:200:2] + train[-200::2])
        bench.job("minilm", "warm-text", "warm.csv", texts, "hello")
        images = as_zip(clothing / "train", limit=3)
        bench.job("efficientnet-lite0", "warm-images", "warm.zip", images, test_images[0][0])
        for name in options.only:
            model, filename, data, test = jobs[name]
            seconds, stages = bench.job(model, name, filename, data, test[0][0])
            accuracy, rate = bench.accuracy(name, test)
            print(f"{name}: accuracy {accuracy:.4f} on {len(test)} rows ({rate:.0f} rows/s), "
                  f"{seconds:.2f} s from POST to served")  # fmt: skip
            for stage, took in stages:
                print(f"    {stage:<24} {took:8.3f} s")


def environment() -> dict[str, str]:
    """What the stack inherits: this process's environment without a Graft configuration."""
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}


if __name__ == "__main__":
    main()
