"""`graft demo`: the whole round trip on this machine, checked and timed.

Starts a stack of its own on a free port, then acts as any client would, over HTTP: uploads a text
and an image data set, fine-tunes a model on each, waits until both are served, and predicts rows
that training never saw. Fails unless both beat the majority label by far.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from cli.client import Client, Prediction
from cli.datasets import DEFAULT_BACKBONES
from cli.demo_data import DemoTask, HeldOut, digits, support_intents
from cli.events import Event
from cli.failures import CommandError
from cli.follow import Screen
from cli.serving import prediction_line
from cli.stack import Stack, StackOptions, free_port
from cli.training import describe_failure
from core.jobs import JobStatus

REQUIRED_GAIN = 0.3
STEPS = ("upload", "ingest", "queue", "train", "served", "predict")
SHOWN_PREDICTIONS = 3


@dataclass
class Timing:
    """Seconds of each step, by its name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Time the body as `step`."""
        start = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - start


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    task: DemoTask
    model: str
    accuracy: float
    predictions: Sequence[Prediction]
    timing: Timing

    @property
    def is_convincing(self) -> bool:
        """True when the model beats the majority label by far."""
        return self.accuracy >= self.task.majority_accuracy + REQUIRED_GAIN


def run_demo(data: Path, console: Console) -> None:
    """Run the demo in a fresh directory `data`; raise `CommandError` if anything disappoints."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="graft-demo-") as scratch:
        tasks = [support_intents(), digits(Path(scratch) / "digits.zip")]
        console.print("starting the service, a worker and Redis…")
        options = StackOptions(data, free_port(), own_environment(), is_fresh=True)
        with Stack(options) as stack, Client(stack.url) as client:
            started = time.monotonic() - began
            console.print(f"ready at {stack.url} after {started:.1f} s", highlight=False)
            with Screen(client, console) as screen:
                outcomes = run_tasks(client, tasks, screen)
        for outcome in outcomes:
            show(outcome, console)
    console.print(
        f"everything is stopped; {time.monotonic() - began:.1f} s in all", highlight=False
    )
    if poor := [outcome.task.name for outcome in outcomes if not outcome.is_convincing]:
        raise CommandError(f"hardly better than the majority label: {', '.join(poor)}")


def own_environment() -> dict[str, str]:
    """The environment without Graft's settings: the demo is the same on every machine."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GRAFT_")}


def run_tasks(client: Client, tasks: Sequence[DemoTask], screen: Screen) -> list[Outcome]:
    """Run all tasks at once; the first that fails, or an interrupt, ends the wait for the rest."""
    threads = ThreadPoolExecutor(len(tasks))
    try:
        futures = [threads.submit(run_task, client, task, screen) for task in tasks]
        wait(futures, return_when=FIRST_EXCEPTION)
        # A task that failed is done; one that still runs has nothing to say.
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
    finally:
        # What still runs ends when the client is closed and the stack stopped.
        threads.shutdown(wait=False, cancel_futures=True)


def run_task(client: Client, task: DemoTask, screen: Screen) -> Outcome:
    """Upload, train, wait until served, predict; time each step."""
    timing = Timing()
    with timing.measure("upload"):
        file = client.openai.files.create(file=task.training_file, purpose="fine-tune")
    with timing.measure("ingest"):
        file = client.wait_for_file(file.id)
    if file.status == "error":
        raise CommandError(f"{file.filename}: {file.status_details}")
    job_id = client.create_job(
        backbone=DEFAULT_BACKBONES[task.modality], name=task.name, training_file=file.id
    ).id
    created = started = time.monotonic()

    def note_start(event: Event) -> None:
        nonlocal started
        if event.type == "started":
            started = time.monotonic()

    job = screen.follow(job_id, task.name, note_start)
    ended = time.monotonic()
    if job["status"] != JobStatus.SUCCEEDED:
        raise CommandError(describe_failure(client, job))
    timing.seconds |= {"queue": started - created, "train": ended - started}
    model = str(job["fine_tuned_model"])
    with timing.measure("served"):
        client.wait_until_served(model)
    with timing.measure("predict"):
        predictions = client.predict(model, [row.input for row in task.held_out])
    return Outcome(task, model, accuracy(task.held_out, predictions), predictions, timing)


def accuracy(rows: Sequence[HeldOut], predictions: Sequence[Prediction]) -> float:
    """The share of rows whose predicted label is right; a row with an error is wrong."""
    pairs = zip(rows, predictions, strict=True)
    right = [row.label for row, prediction in pairs if prediction.get("label") == row.label]
    return len(right) / len(rows)


def show(outcome: Outcome, console: Console) -> None:
    """Print one task's accuracy, a few predictions, and the time of each step."""
    task, timing = outcome.task, outcome.timing.seconds
    console.print(
        f"\n[bold]{outcome.model}[/]: accuracy {outcome.accuracy:.3f} on {len(task.held_out)} "
        f"held-out rows; always the most frequent label: {task.majority_accuracy:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    spread = range(0, len(task.held_out), len(task.held_out) // SHOWN_PREDICTIONS)
    for index in spread[:SHOWN_PREDICTIONS]:
        line = prediction_line(task.held_out[index].shown, outcome.predictions[index])
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    steps = "  ".join(f"{step} {timing[step]:.2f}" for step in STEPS)
    console.print(f"  seconds: {steps}", highlight=False, soft_wrap=True)
