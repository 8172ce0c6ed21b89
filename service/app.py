"""The BentoML service: start here to follow a request.

    service.connection ──▶ Guard (id, key, limits) ──▶ service.routes ──▶ service.api.<resource>
                                               └──▶ BentoML's own routes and the API method

`bentoml serve service.app:Graft` imports this module in a parent and in every worker process;
nothing is opened before `on_startup`, so that `bentoml build` may import it too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import bentoml
import click
from bentoml._internal.server.http import traffic
from bentoml.exceptions import BentoMLException
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp
from uvicorn.config import HTTP_PROTOCOLS

from core.errors import GraftError
from core.identifiers import DEFAULT_TENANT
from core.settings import Settings
from service.access import is_loopback
from service.api import embeddings, predict
from service.api.errors import CLIENT_CLOSED_REQUEST, error_response
from service.api.responses import validated, while_connected
from service.guard import Guard
from service.metrics import forget_dead_processes
from service.routes import api, probes
from service.runtime import Runtime


def untimed(app: ASGIApp, timeout: float) -> ASGIApp:
    """Stand in for BentoML's timer, which would be around the guard; the guard has its own.

    BentoML's answers 504 in a form of its own, without a request id and past all metrics. It also
    keeps half a kilobyte for each request until its time is over, and has no option to be left out.
    """
    return app


HTTP_PROTOCOLS["auto"] = "service.connection:Connection"
traffic.TimeoutMiddleware = untimed  # type: ignore[assignment, misc]
SETTINGS = Settings()
START_SECONDS = 15.0

SWITCH_SECONDS = 0.0001
"""How long one thread of Python's may keep another waiting; 5 ms would be the default.

A trunk's thread needs the interpreter for a moment between two batches, just when the event loop
is busiest with the answers to the last; and the loop needs it while images are decoded."""


class Refused(BentoMLException):
    """Ends an API method of BentoML's that is answered by the guard."""


@asynccontextmanager
async def refusing_as_ours(request: Request) -> AsyncIterator[None]:
    """Let an API method be given up and answered as the same request to `/v1` would be.

    BentoML hides the text of an error from 500 up, and has no `Retry-After`.
    """
    try:
        async with while_connected(request):
            yield
    except GraftError as error:
        request.state.answer = error_response(error)
        raise Refused("the guard answers") from None
    except ClientDisconnect:
        request.state.answer = Response(status_code=CLIENT_CLOSED_REQUEST)
        raise Refused("the guard answers") from None


def is_no_refusal(record: logging.LogRecord) -> bool:
    """Keep BentoML from logging what was refused, with a trace and pieces of the caller's input.

    The request log has it. `Input` is what BentoML calls the arguments of an API method.
    """
    error = record.exc_info[1] if record.exc_info else None
    is_bad_input = isinstance(error, ValidationError) and error.title == "Input"
    return not (is_bad_input or isinstance(error, Refused))


@bentoml.service(
    name="graft",
    workers=SETTINGS.service_workers,
    # Each costs more CPU per request than all of ours; /metrics and the guard replace them.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(api, path="/")
class Graft:
    """Fine-tuned models over HTTP."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def refuse_open_door() -> None:
        """Before anything listens: without a key, only loopback is bound."""
        context = click.get_current_context(silent=True)
        host = context.params.get("host") if context else None
        if not SETTINGS.api_key and not is_loopback(host or "0.0.0.0"):  # noqa: S104
            raise click.ClickException(
                "without GRAFT_API_KEY the service binds to loopback only: "
                "set the key, or pass --host 127.0.0.1"
            )

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Once in each worker process, in its event loop."""
        sys.setswitchinterval(SWITCH_SECONDS)
        logging.getLogger("graft").setLevel(logging.INFO)
        logging.getLogger("bentoml._internal.server.http_app").addFilter(is_no_refusal)
        forget_dead_processes()
        self.runtime = Runtime.start(SETTINGS)
        # A process that takes requests before its models are loaded would answer 503 to them, while
        # one beside it could answer them well. The store may be away, so not for ever.
        await self.runtime.loader.wait_complete(START_SECONDS)
        api.state.runtime = probes.state.runtime = self.runtime

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """When the worker process ends."""
        await self.runtime.close()

    @bentoml.api  # type: ignore[untyped-decorator]
    async def predict(
        self,
        model: str,
        inputs: list[Any],
        top_k: int = 3,
        explain: bool = False,
        *,
        ctx: bentoml.Context,
    ) -> dict[str, Any]:
        """Predict texts or images; the same as `POST /v1/predict`."""
        body = {"model": model, "inputs": inputs, "top_k": top_k, "explain": explain}
        async with refusing_as_ours(ctx.request):
            asked = validated(predict.PredictRequest, body)
            return await predict.predict(
                self.runtime,
                DEFAULT_TENANT,
                asked.model,
                [predict.parse_input(item) for item in asked.inputs],
                asked.top_k,
                predict.timeout_seconds(ctx.request, self.runtime),
                asked.explain,
            )

    @bentoml.api  # type: ignore[untyped-decorator]
    async def embed(self, model: str, input: list[Any], *, ctx: bentoml.Context) -> dict[str, Any]:
        """Return the features of texts, or images as data URLs; as `POST /v1/embeddings`."""
        async with refusing_as_ours(ctx.request):
            asked = validated(embeddings.EmbeddingsRequest, {"model": model, "input": input})
            timeout = predict.timeout_seconds(ctx.request, self.runtime)
            return await embeddings.embed(self.runtime, DEFAULT_TENANT, asked, timeout)


Graft.add_asgi_middleware(Guard, settings=SETTINGS, health=probes, api=api)  # type: ignore[attr-defined]
