"""The error tree: drawn as it is, and every class with an HTTP status."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from core import errors
from core.errors import (
    GraftError,
    JobFailure,
    Overloaded,
    Unauthorized,
    Unavailable,
    VersionRefused,
)
from service.api.errors import STATUS, error_body, error_response, of_row, on_bug, status_of
from service.api.responses import invalid_body

CLASSES = [
    each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, GraftError)
]


def make(kind: type[GraftError], message: str = "why") -> GraftError:
    return Overloaded(message, retry_after_seconds=0.2) if kind is Overloaded else kind(message)


def test_the_drawing_is_the_tree():
    drawn: dict[str, str] = {"GraftError": "Exception"}
    stack = ["GraftError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:│   |    )*)[├└]── (\w+)", line)
        if match:
            depth = len(match[1]) // 4 + 1
            drawn[match[2]] = stack[depth - 1]
            stack[depth:] = [match[2]]
    assert drawn == {each.__name__: each.__bases__[0].__name__ for each in CLASSES}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_says_when_it_is_raised_and_has_a_code(kind: type[GraftError]):
    assert kind.__doc__
    assert re.fullmatch(r"[a-z_]+", kind.code)


EXPECTED = {
    "InvalidRequest": 400, "PayloadTooLarge": 413, "UnsupportedMedia": 415, "Unauthorized": 401,
    "NotFound": 404, "Conflict": 409, "Overloaded": 503, "DeadlineExceeded": 504,
    "Unavailable": 503, "VersionRefused": 503, "NoSpace": 507,
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_the_status_that_fits_it(kind: type[GraftError]):
    status, type_ = status_of(make(kind))
    assert status == EXPECTED.get(kind.__name__, 500)
    assert (type_ == "server_error") == (status == 500)
    if status == 500:
        # The rest are between a worker and its job, or end one; none is for an HTTP caller.
        own = (GraftError, errors.LeaseLost, errors.AlreadyExists)
        assert kind in own or issubclass(kind, JobFailure)


def test_no_row_of_the_table_is_hidden_by_one_above_it():
    kinds = [kind for kind, _, _ in STATUS]
    for index, kind in enumerate(kinds):
        assert not any(issubclass(kind, above) for above in kinds[:index])


def test_job_failures_are_found_by_their_code():
    assert {each.code for each in JobFailure.__subclasses__()} == errors.JOB_FAILURES.keys()


def test_the_body_is_that_of_the_openai_protocol():
    error = errors.InvalidRequest("too short", param="inputs", code="short")
    response = error_response(error)
    assert response.status_code == 400
    assert json.loads(response.body) == {
        "error": {
            "message": "too short",
            "type": "invalid_request_error",
            "param": "inputs",
            "code": "short",
        }
    }
    assert error_body(error)["code"] == "short"


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (Overloaded("", retry_after_seconds=0.01), "Retry-After", "1"),
        (Overloaded("", retry_after_seconds=2.2), "Retry-After", "3"),
        (Unavailable(""), "Retry-After", "1"),
        (Unauthorized(""), "WWW-Authenticate", "Bearer"),
    ],
)
def test_headers_that_tell_what_to_do_next(error: GraftError, header: str, value: str):
    assert error_response(error).headers[header] == value


def test_a_version_that_is_refused_for_good_is_not_to_be_tried_again():
    assert "Retry-After" not in error_response(VersionRefused("")).headers


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    count: int


def refusal(data: object) -> errors.InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(data)
    return invalid_body(caught.value)


def test_an_invalid_body_names_every_field():
    error = refusal({"count": "x"})
    assert "name: " in error.message
    assert "count: " in error.message
    assert error.param == "name"


def test_an_invalid_body_does_not_echo_a_long_one():
    error = refusal({"x" * 100_000 + str(n): 1 for n in range(50)})
    assert len(error.message) < 2_000
    assert len(error.param or "") < 100


@pytest.mark.anyio
async def test_a_bug_is_logged_under_its_request_and_not_told(caplog: pytest.LogCaptureFixture):
    request = Request({"type": "http", "state": {"request_id": "r-1"}, "headers": []})
    response = await on_bug(request, RuntimeError("/etc/secret"))
    assert response.status_code == 500
    assert b"secret" not in response.body
    assert "r-1" in caplog.text
    assert "/etc/secret" in caplog.text


def test_a_row_that_the_service_fails_is_no_fault_of_its_caller():
    failed = GraftError("this input could not be computed")
    assert of_row(failed, "row 3", param="text") is failed
    empty = of_row(errors.PayloadTooLarge("too long", code="text_too_long"), "row 3", param="text")
    assert (status_of(empty)[0], str(empty)) == (400, "row 3: too long")
    assert (empty.param, empty.error_code) == ("text", "text_too_long")
