"""The BentoML service: start here to follow a request.

    BentoML's server ──▶ Guard (id, key, limits) ──▶ routes below ──▶ service.api.<resource>
                                                └──▶ BentoML's own routes and the API method

`bentoml serve service.app:Graft` imports this module in a parent and in every worker process;
nothing is opened before `on_startup`, so that `bentoml build` may import it too.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import bentoml
import click
from bentoml.exceptions import BentoMLException
from starlette.applications import Starlette
from starlette.routing import Route

from core.errors import GraftError
from core.identifiers import DEFAULT_TENANT
from core.settings import Settings
from service.api import checkpoints, files, health, job_control, jobs, models, predict
from service.api.errors import HANDLERS, no_endpoint, status_of
from service.guard import Guard, is_loopback
from service.metrics import forget_dead_processes
from service.runtime import Runtime

SETTINGS = Settings()
START_SECONDS = 15.0
ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

api = Starlette(
    routes=[
        Route("/v1/predict", predict.create_prediction, methods=["POST"]),
        Route("/v1/files", files.create_file, methods=["POST"]),
        Route("/v1/files", files.list_files, methods=["GET"]),
        Route("/v1/files/{file_id}", files.get_file, methods=["GET"]),
        Route("/v1/files/{file_id}", files.delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", files.get_content, methods=["GET"]),
        Route("/v1/fine_tuning/jobs", jobs.create_job, methods=["POST"]),
        Route("/v1/fine_tuning/jobs", jobs.list_jobs, methods=["GET"]),
        Route("/v1/fine_tuning/jobs/{job_id}", jobs.get_job, methods=["GET"]),
        Route("/v1/fine_tuning/jobs/{job_id}/cancel", job_control.cancel_job, methods=["POST"]),
        Route("/v1/fine_tuning/jobs/{job_id}/pause", job_control.pause_job, methods=["POST"]),
        Route("/v1/fine_tuning/jobs/{job_id}/resume", job_control.resume_job, methods=["POST"]),
        Route(
            "/v1/fine_tuning/jobs/{job_id}/checkpoints",
            checkpoints.list_checkpoints,
            methods=["GET"],
        ),
        Route("/v1/fine_tuning/jobs/{job_id}/events", jobs.list_events, methods=["GET"]),
        Route("/v1/models", models.list_models, methods=["GET"]),
        Route("/v1/models/{ref:path}", models.get_model, methods=["GET"]),
        Route("/v1/models/{ref:path}", models.delete_model, methods=["DELETE"]),
        Route("/v1/{path:path}", no_endpoint, methods=ALL_METHODS),
        Route("/metrics", health.metrics, methods=["GET"]),
    ],
    exception_handlers=HANDLERS,
)
probes = Starlette(
    routes=[Route("/livez", health.livez), Route("/readyz", health.readyz)],
    exception_handlers=HANDLERS,
)


class Refused(BentoMLException):
    """An error of ours, as BentoML's API methods answer it."""

    def __init__(self, error: GraftError) -> None:
        super().__init__(error.message)
        self.error_code = HTTPStatus(status_of(error)[0])


@bentoml.service(
    name="graft",
    workers=SETTINGS.service_workers,
    # Until the first byte of an answer. Long enough for the upload of a large file; not longer,
    # because BentoML keeps half a kilobyte for each request until this has passed.
    traffic={"timeout": 300},
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
        logging.getLogger("graft").setLevel(logging.INFO)
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
    async def predict(self, model: str, inputs: list[Any], top_k: int = 3) -> dict[str, Any]:
        """Predict texts or images; the same as `POST /v1/predict`."""
        try:
            return await predict.predict(
                self.runtime,
                DEFAULT_TENANT,
                model,
                [predict.parse_input(item) for item in inputs],
                max(1, min(top_k, predict.MAX_TOP_K)),
                SETTINGS.predict_timeout_seconds,
            )
        except GraftError as error:
            raise Refused(error) from None


Graft.add_asgi_middleware(Guard, settings=SETTINGS, health=probes)  # type: ignore[attr-defined]
