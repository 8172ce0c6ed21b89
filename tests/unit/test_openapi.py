"""The OpenAPI document: valid by the specification, and of the routes that there are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.openapi.document import build_document, described_routes
from service.openapi.operations import OPERATIONS
from service.openapi.page import render_page
from service.routes import PROBES, api


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document([*api.routes, *PROBES])


def test_it_is_valid(document: dict[str, Any]):
    OpenAPIV31SpecValidator(document).validate()


def test_a_wrong_one_would_be_noticed(document: dict[str, Any]):
    wrong = document | {"paths": {"/x": {"get": {"responses": {"200": {}}}}}}
    assert list(OpenAPIV31SpecValidator(wrong).iter_errors())


def test_every_route_is_described_in_full(document: dict[str, Any]):
    routes = {(method, path) for method, path, _ in described_routes([*api.routes, *PROBES])}
    assert routes == set(OPERATIONS)
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    assert described == routes


def test_bodies_that_may_be_left_out_and_answers_of_two_types_are_described(
    document: dict[str, Any],
):
    job = "/v1/fine_tuning/jobs/{job_id}"
    body = document["paths"][job + "/cancel"]["post"]["requestBody"]
    assert body == {
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CancelRequest"}}}
    }
    for path, media in (
        (job + "/events", {"application/json", "text/event-stream"}),
        ("/v1/files/{file_id}/content", {"application/octet-stream", "text/html"}),
    ):
        assert document["paths"][path]["get"]["responses"]["200"]["content"].keys() == media


def test_operations_have_names_of_their_own(document: dict[str, Any]):
    names = [
        operation["operationId"]
        for methods in document["paths"].values()
        for operation in methods.values()
    ]
    assert len(names) == len(set(names))


def test_the_page_shows_all_of_it_and_fetches_nothing(document: dict[str, Any]):
    page = render_page(document)
    for path in document["paths"]:
        assert path in page
    for name in re.findall(r'href="#(\w+)"', page):
        assert f'id="{name}"' in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "<script" not in page
