"""Every route of the HTTP API: which path goes to which endpoint.

The probes are an application of their own, because the guard answers them without a key. What each
route takes and gives is said in service.openapi.operations.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api import (
    checkpoints,
    embeddings,
    files,
    health,
    job_control,
    jobs,
    model_files,
    models,
    predict,
    releases,
)
from service.api.errors import HANDLERS, no_endpoint
from service.api.inference import endpoints, repository
from service.api.reference import reference_routes

Endpoint = Callable[[Request], Awaitable[Response]]
ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def model_routes(suffix: str, endpoint: Endpoint, method: str) -> list[Route]:
    """Routes of the Open Inference Protocol, whose version in the path is optional."""
    model = "/v2/models/{model}"
    return [
        Route(model + suffix, endpoint, methods=[method]),
        Route(model + "/versions/{version}" + suffix, endpoint, methods=[method]),
    ]


ROUTES = [
    Route("/v1/predict", predict.create_prediction, methods=["POST"]),
    Route("/v1/embeddings", embeddings.create_embeddings, methods=["POST"]),
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
        "/v1/fine_tuning/jobs/{job_id}/checkpoints", checkpoints.list_checkpoints, methods=["GET"]
    ),
    Route("/v1/fine_tuning/jobs/{job_id}/events", jobs.list_events, methods=["GET"]),
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{name}/releases", releases.create_release, methods=["POST"]),
    Route("/v1/models/{name}/releases", releases.list_releases, methods=["GET"]),
    Route("/v1/models/{ref}/files", model_files.list_model_files, methods=["GET"]),
    Route("/v1/models/{ref}/files/{file:path}", model_files.get_model_file, methods=["GET"]),
    Route("/v1/models/{ref:path}", models.get_model, methods=["GET"]),
    Route("/v1/models/{ref:path}", models.delete_model, methods=["DELETE"]),
    Route("/v1/{path:path}", no_endpoint, methods=ALL_METHODS),
    Route("/v2", endpoints.server_metadata, methods=["GET"]),
    Route("/v2/health/live", endpoints.server_live, methods=["GET"]),
    Route("/v2/health/ready", endpoints.server_ready, methods=["GET"]),
    *model_routes("", endpoints.model_metadata, "GET"),
    *model_routes("/ready", endpoints.model_ready, "GET"),
    *model_routes("/infer", endpoints.infer, "POST"),
    Route("/v2/repository/index", repository.index, methods=["POST"]),
    Route("/v2/repository/models/{model}/load", repository.load, methods=["POST"]),
    Route("/v2/repository/models/{model}/unload", repository.unload, methods=["POST"]),
    Route("/v2/{path:path}", no_endpoint, methods=ALL_METHODS),
    Route("/metrics", health.metrics, methods=["GET"]),
]
PROBES = [
    Route("/livez", health.livez, methods=["GET"]),
    Route("/readyz", health.readyz, methods=["GET"]),
]
api = Starlette(routes=[*ROUTES, *reference_routes(ROUTES, PROBES)], exception_handlers=HANDLERS)
probes = Starlette(routes=PROBES, exception_handlers=HANDLERS)
