"""A service that answers from a table: enough HTTP for the command line's unit tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What a handler is told."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """What a handler returns; JSON unless `raw` is given. The connection closes after it."""

    body: Any = None
    status: int = 200
    raw: bytes | None = None


Handler = Callable[[Request], Answer]


@dataclass
class FakeService:
    """Maps `METHOD /path` (without the query) to a handler; everything else is a 404."""

    url: str = ""
    routes: dict[str, Handler] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def answer(self, route: str, *answers: Answer) -> None:
        """Give these answers in order, the last one for ever."""
        waiting = list(answers)
        self.routes[route] = lambda _: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def event(number: int, kind: str, message: str = "") -> bytes:
    """A job event as the service streams it."""
    body = {"id": f"ftevent-{number}-0", "created_at": 1_700_000_000 + number, "level": "info",
            "message": message or kind, "type": "message", "event": kind, "data": {}}  # fmt: skip
    return f"id: ftevent-{number}-0\nevent: {kind}\ndata: {json.dumps(body)}\n\n".encode()


def job(status: str, **more: Any) -> dict[str, Any]:
    """A job object with the fields that OpenAI's client requires."""
    return {"id": "ftjob-1", "object": "fine_tuning.job", "created_at": 1_700_000_000,
            "model": "minilm", "status": status, "training_file": "file-1", "seed": 0,
            "validation_file": None, "organization_id": "default", "result_files": [],
            "hyperparameters": {}, "error": None, "fine_tuned_model": None} | more  # fmt: skip


def file(status: str, details: str | None = None) -> dict[str, Any]:
    """A file object."""
    return {"id": "file-1", "object": "file", "bytes": 3, "created_at": 1_700_000_000,
            "filename": "data.csv", "purpose": "fine-tune", "status": status,
            "status_details": details}  # fmt: skip


@contextmanager
def serve() -> Iterator[FakeService]:
    """Run a fake service on a port of its own."""
    fake = FakeService()

    class Endpoint(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            fake.requests.append(request)
            handler = fake.routes.get(f"{self.command} {self.path.partition('?')[0]}")
            missing = Answer({"error": {"message": "no such thing"}}, 404)
            answer = handler(request) if handler else missing
            self.send_response(answer.status)
            content = answer.raw if answer.raw is not None else json.dumps(answer.body).encode()
            kind = "application/json" if answer.raw is None else "text/event-stream"
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = respond  # noqa: N815 - the names http.server looks for

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
