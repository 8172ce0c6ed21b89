"""`/livez`, `/readyz`, `/metrics`: is this process well, and what has it done?

Ready means that every model of the registry has been looked at once. Redis may be away: predictions
go on from the last known set, and the answer says so.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from service.api.responses import json_response
from service.metrics import render
from service.runtime import Runtime


async def livez(_: Request) -> Response:
    """GET /livez"""
    return json_response({"status": "live"})


async def readyz(request: Request) -> Response:
    """GET /readyz"""
    run: Runtime | None = getattr(request.app.state, "runtime", None)
    if run is None or not run.loader.current.is_complete:
        return json_response({"status": "starting"}, 503)
    current = run.loader.current
    return json_response(
        {
            "status": "ready",
            "models": len(current.models),
            "versions": len(run.loader.live),
            "refused": sum(len(state.refused) for state in current.models.values()),
            "redis": "connected" if run.watch.hears_changes else "away",
        }
    )


async def metrics(_: Request) -> Response:
    """GET /metrics"""
    text, content_type = render()
    return Response(text, media_type=content_type)
