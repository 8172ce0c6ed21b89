"""`/openapi.json` and `/docs`: the API described by itself; made once, when first asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.openapi.document import build_document
from service.openapi.page import render_page

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def reference_routes(described: Sequence[Route], probes: Iterable[object]) -> list[Route]:
    """Return the routes that describe others, and themselves."""

    async def openapi(_: Request) -> Response:
        """GET /openapi.json"""
        return Response(document()[0], media_type="application/json")

    async def docs(_: Request) -> Response:
        """GET /docs"""
        headers = {"Content-Security-Policy": _POLICY}
        return Response(document()[1], media_type="text/html", headers=headers)

    routes = [
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/docs", docs, methods=["GET"]),
    ]

    @cache
    def document() -> tuple[bytes, str]:
        made = build_document([*described, *routes, *probes])
        return orjson.dumps(made), render_page(made)

    return routes
