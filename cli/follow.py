"""Shows jobs as they run: one line per event, and one progress bar per job on a terminal.

A bar's length is the job's `progress`, asked for twice a second; its events come from the stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cli.client import Client
from cli.events import Event, read_events

POLL_SECONDS = 0.5
LEVEL_STYLES = {"info": "", "warn": "yellow", "error": "red"}


class Screen:
    """Progress bars for any number of jobs, as a context manager; `follow` may run in threads."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client = client
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[stage]}"), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def follow(
        self, job_id: str, label: str, on_event: Callable[[Event], None] | None = None
    ) -> dict[str, Any]:
        """Show a job until it ends and return its record."""
        task = self._progress.add_task(escape(label), total=1.0, stage="")
        ended = threading.Event()
        poll = threading.Thread(target=self._poll, args=(job_id, task, ended), daemon=True)
        poll.start()
        try:
            for event in read_events(self._client, job_id):
                self._console.print(event_line(event, label), highlight=False, soft_wrap=True)
                if on_event is not None:
                    on_event(event)
        finally:
            ended.set()
            poll.join(1)
        job = self._client.job(job_id)
        completed = 1.0 if job["status"] == "succeeded" else None
        self._progress.update(task, stage=job["status"], completed=completed)
        return job

    def _poll(self, job_id: str, task: TaskID, ended: threading.Event) -> None:
        while not ended.is_set():
            # A missed look at the progress costs nothing: the events tell how it ends. A client
            # that was closed meanwhile raises RuntimeError.
            with suppress(httpx.HTTPError, RuntimeError):
                job = self._client.job(job_id)
                progress = job.get("progress") or {}
                self._progress.update(
                    task,
                    stage=progress.get("stage") or job["status"],
                    completed=progress.get("fraction", 0.0),
                )
            ended.wait(POLL_SECONDS)


def event_line(event: Event, label: str) -> str:
    """Return an event as a line of rich markup."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    style = LEVEL_STYLES.get(event.level, "")
    message = escape(event.message)
    shown = f"[{style}]{message}[/]" if style else message
    return f"[dim]{clock}[/] {escape(label)}: {shown}"
