"""`POST /v1/predict` and BentoML's `predict`: good rows answered, bad ones told, never a 500."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.builders import encoded_image

if TYPE_CHECKING:
    from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

MAX_INPUTS = 64
IMAGE = base64.b64encode(encoded_image()).decode()


async def post(http: httpx.AsyncClient, body: Any, **options: Any) -> httpx.Response:
    return await http.post("/v1/predict", json=body, **options)


async def test_texts(http: httpx.AsyncClient):
    response = await post(http, {"model": "pets", "inputs": ["good cat", "bad dog"]})
    assert response.status_code == 200
    answer = response.json()
    assert answer["model"] == "pets@1"
    assert len(answer["predictions"]) == 2
    for row in answer["predictions"]:
        assert {each["label"] for each in row["scores"]} == {"cat", "dog", "cow"}
        assert (row["label"], row["score"]) == tuple(row["scores"][0].values())
        assert sum(each["score"] for each in row["scores"]) == pytest.approx(1, abs=1e-4)
    assert answer["timing_ms"].keys() == {"prepare", "queue", "trunk", "head", "total"}


@pytest.mark.parametrize("reference", ["pets", "pets@1", "pets:production"])
async def test_references(http: httpx.AsyncClient, reference: str):
    response = await post(http, {"model": reference, "inputs": ["cat"]})
    assert response.json()["model"] == "pets@1"


async def test_images_as_base64_and_as_the_body(http: httpx.AsyncClient):
    as_json = await post(http, {"model": "shapes", "inputs": [{"image": IMAGE}]})
    assert as_json.status_code == 200
    for kind in ("image/png", "IMAGE/PNG; x=y"):
        raw = await http.post(
            "/v1/predict?model=shapes&top_k=1",
            content=encoded_image(),
            headers={"Content-Type": kind},
        )
        (row,) = raw.json()["predictions"]
        assert row["label"] == as_json.json()["predictions"][0]["label"]
        assert len(row["scores"]) == 1


async def test_an_explanation_is_what_the_answer_would_be_without_a_part(http: httpx.AsyncClient):
    text = "good  cat dog"
    body = {"model": "pets", "inputs": [text, "", "cat"], "explain": True}
    whole, bad, one_word = (await post(http, body)).json()["predictions"]
    assert bad.keys() == {"error"}
    assert one_word["explanation"] == []
    assert [part["text"] for part in whole["explanation"]] == ["good", "cat", "dog"]
    for part in whole["explanation"]:
        assert text[part["start"] : part["end"]] == part["text"]
        rest = text[: part["start"]] + text[part["end"] :]
        answer = (await post(http, {"model": "pets", "inputs": [rest]})).json()["predictions"][0]
        scores = {each["label"]: each["score"] for each in answer["scores"]}
        assert part["weight"] == pytest.approx(whole["score"] - scores[whole["label"]], abs=1e-4)
    image = {"model": "shapes", "inputs": [{"image": IMAGE}], "explain": True}
    (row,) = (await post(http, image)).json()["predictions"]
    assert len(row["explanation"]) == 16
    assert row["explanation"][0]["box"] == [0, 0, 0.25, 0.25]
    many = body | {"inputs": ["cat"] * 9}
    assert (await post(http, many)).status_code == 400


ROWS: list[Any] = [
    "", " ", "a" * 20_001, 7, None, True, [], {}, {"image": 3}, {"image": IMAGE},
    {"text": "x"}, ["good cat"], {"image": IMAGE, "more": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", ROWS, ids=lambda row: str(row)[:20])
async def test_one_bad_row_is_an_error_in_its_own_place(http: httpx.AsyncClient, bad: Any):
    response = await post(http, {"model": "pets", "inputs": ["good cat", bad, "dog"]})
    assert response.status_code == 200
    first, second, third = response.json()["predictions"]
    assert first["label"]
    assert third["label"]
    assert second.keys() == {"error"}
    assert second["error"]["message"]
    assert second["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("top_k", [1, 2, 3, 1000])
async def test_top_k(http: httpx.AsyncClient, top_k: int):
    response = await post(http, {"model": "pets", "inputs": ["cat"], "top_k": top_k})
    assert len(response.json()["predictions"][0]["scores"]) == min(top_k, 3)


async def test_as_many_inputs_as_are_allowed_and_one_more(http: httpx.AsyncClient):
    body = {"model": "pets", "inputs": ["cat"] * MAX_INPUTS}
    assert (await post(http, body)).status_code == 200
    body["inputs"] += ["cat"]  # type: ignore[operator]
    response = await post(http, body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


OK = {"model": "pets", "inputs": ["cat"]}
BAD_BODIES: list[tuple[Any, int]] = [
    (OK | {"model": "cats"}, 404),
    (OK | {"model": "pets@9"}, 404),
    (OK | {"model": "pets:nothing"}, 404),
    (OK | {"model": "../pets"}, 400),
    (OK | {"model": "pets\x00"}, 400),
    (OK | {"model": "x" * 129}, 400),
    (OK | {"model": 7}, 400),
    (OK | {"inputs": []}, 400),
    (OK | {"inputs": "cat"}, 400),
    (OK | {"inputs": {"0": "cat"}}, 400),
    (OK | {"inputs": None}, 400),
    (OK | {"top_k": 0}, 400),
    (OK | {"top_k": 1001}, 400),
    (OK | {"top_k": 1e300}, 400),
    (OK | {"top_k": "many"}, 400),
    (OK | {"extra": 1}, 400),
    ({"inputs": ["cat"]}, 400),
    ({}, 400), ([], 400), (None, 400), ("text", 400), (1, 400),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BAD_BODIES, ids=lambda each: str(each)[:40])
async def test_bad_bodies(http: httpx.AsyncClient, body: Any, status: int):
    response = await post(http, body)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


# Bodies that break a careless parser, or what comes behind it.
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a NUL": b'{"model": "pets", "inputs": ["a\x00b"]}',
    "an escaped NUL": rb'{"model": "pets", "inputs": ["a\u0000b"]}',
    "half a surrogate pair": rb'{"model": "pets", "inputs": ["\ud800"]}',
    "half a pair as a key": rb'{"model": "pets", "inputs": ["a"], "\ud800": 1}',
    "half a pair as a model": rb'{"model": "\udfff", "inputs": ["a"]}',
    "half a pair in an image": rb'{"model": "shapes", "inputs": [{"image": "\ud800"}]}',
    "deep lists": b'{"model": "pets", "inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a huge number": b'{"model": "pets", "inputs": [1e999, -1e999], "top_k": 3}',
    "a long number": b'{"model": "pets", "inputs": ["a"], "top_k": ' + b"9" * 10_000 + b"}",
    "a long field": b'{"model": "pets", "inputs": ["a"], "' + b"x" * 500_000 + b'": 1}',
    "many fields": json.dumps({f"f{n}": n for n in range(20_000)}).encode(),
    "NaN": b'{"model": "pets", "inputs": ["a"], "top_k": NaN}',
    "Infinity": b'{"model": "pets", "inputs": [Infinity]}',
    "a byte order mark": b'\xef\xbb\xbf{"model": "pets", "inputs": ["a"]}',
    "UTF-16": '{"model": "pets", "inputs": ["a"]}'.encode("utf-16"),
    "a key twice": b'{"model": "pets", "model": 3, "inputs": ["a"]}',
    "null": b"null",
    "a pickle": b"\x80\x04\x95\x00\x00\x00",
}
PATHS = [
    ("POST", "/v1/predict"), ("POST", "/predict"), ("POST", "/v1/files"),
    ("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel"),
    ("GET", "/v1/files"), ("DELETE", "/v1/files/file-1"), ("GET", "/v1/models/pets"),
    ("DELETE", "/v1/models/nothing"), ("PUT", "/v1/predict"), ("PATCH", "/v1/files"),
    ("GET", "/v1/fine_tuning/jobs?limit=%00&after=%ff"), ("GET", "/v1/files?after=%ed%a0%80"),
    ("GET", "/v1/models/%ff%00"), ("GET", "/v1/models/a/b/c"), ("GET", "/%0a"),
    ("POST", "/metrics"), ("GET", "/v1/fine_tuning/jobs?limit=000000001000000000"),
]  # fmt: skip
TYPES = ["application/json", "text/plain", "image/png", "multipart/form-data; boundary=b",
         "application/vnd.bentoml+pickle", "application/x-www-form-urlencoded", ""]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_nothing_that_is_sent_is_a_500(http: httpx.AsyncClient, name: str):
    for content_type in TYPES:
        answers = await asyncio.gather(
            *(
                http.request(
                    method, path, content=HOSTILE[name], headers={"Content-Type": content_type}
                )
                for method, path in PATHS
            )
        )
        for (method, path), response in zip(PATHS, answers, strict=True):
            assert response.status_code < 500, (method, path, content_type, response.text[:500])
            assert len(response.content) < 100_000
            assert "Traceback" not in response.text


async def test_what_is_no_endpoint_is_said_in_json(http: httpx.AsyncClient):
    for method, path in (
        ("GET", "/v1/nothing"),
        ("PUT", "/v1/files"),
        ("POST", "/metrics"),
        ("GET", "/nothing"),
        ("GET", "/predict"),
        ("GET", "/v1/predict"),
    ):
        response = await http.request(method, path)
        assert response.status_code in (404, 405), path
        assert response.json()["error"]["message"], path


@pytest.mark.parametrize(
    ("value", "status"),
    [("5000", 200), ("999999999999", 200), ("0", 400), ("-1", 400), ("x", 400), ("1.5", 400),
     ("²", 400), ("", 400)],
)  # fmt: skip
async def test_the_callers_deadline(http: httpx.AsyncClient, value: str, status: int):
    headers = {"X-Request-Timeout-Ms": value.encode("latin-1")}
    assert (await post(http, OK, headers=headers)).status_code == status


@pytest.mark.parametrize("path", ["/v1/predict", "/predict"])
async def test_a_deadline_that_passes_is_a_504(http: httpx.AsyncClient, path: str):
    texts = ["good cat " * 2000] * MAX_INPUTS
    headers = {"X-Request-Timeout-Ms": "1"}
    response = await http.post(path, json={"model": "pets", "inputs": texts}, headers=headers)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("path", ["/v1/predict", "/predict"])
async def test_overload_is_a_503_that_says_when_to_come_back(http: httpx.AsyncClient, path: str):
    long = "good cat " * 2000
    many = {"model": "pets", "inputs": [long] * MAX_INPUTS}
    one = {"model": "pets", "inputs": [long]}
    # Some wait to be tokenised: one more of this model would hardly be done in time.
    busy = [asyncio.create_task(post(http, many)) for _ in range(8)]
    # Each on a connection of its own, for the process at its other end may be the other one.
    hurried = {"X-Request-Timeout-Ms": "50", "Connection": "close"}
    refusals = []
    while not refusals and not all(task.done() for task in busy):
        response = await http.post(path, json=one, headers=hurried)
        refusals += [response] if response.status_code == 503 else []
    for task in busy:
        task.cancel()
    (refused,) = refusals
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["Retry-After"]) >= 1
    # Those have gone, and with them what they would have cost.
    assert (await post(http, one)).status_code == 200


async def test_a_wrong_content_type_is_a_415(http: httpx.AsyncClient):
    response = await http.post("/v1/predict", content=b"{}", headers={"Content-Type": "text/csv"})
    assert response.status_code == 415


@pytest.mark.parametrize("path", ["/v1/predict", "/predict"])
async def test_callers_that_go_away_cost_nobody_else(
    service: ServiceProcess, http: httpx.AsyncClient, path: str
):
    async def abandoned() -> int:
        lines = (await http.get("/metrics")).text.splitlines()
        ended = [line.split()[-1] for line in lines if 'outcome="abandoned"' in line]
        gone = [line.split()[-1] for line in lines if f'route="{path}",status="499"' in line]
        return min(sum(map(int, map(float, ended))), sum(map(int, map(float, gone))))

    before = await abandoned()
    body = json.dumps({"model": "pets", "inputs": ["good cat " * 2000] * MAX_INPUTS}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head.encode() + body)
    assert (await post(http, OK)).status_code == 200
    async with asyncio.timeout(20):
        while await abandoned() == before:
            await asyncio.sleep(0.02)


async def test_many_at_once_each_get_their_own(http: httpx.AsyncClient):
    texts = ["good cat", "bad dog", "red", "blue"]
    alone = {}
    for text in texts:
        answer = (await post(http, {"model": "pets", "inputs": [text]})).json()
        alone[text] = answer["predictions"][0]["score"]
    answers = await asyncio.gather(
        *(post(http, {"model": "pets", "inputs": [texts[n % 4]]}) for n in range(100))
    )
    for n, response in enumerate(answers):
        score = response.json()["predictions"][0]["score"]
        assert score == pytest.approx(alone[texts[n % 4]], abs=1e-5)


BENTOML_CLIENT = """
import bentoml, json, sys
with bentoml.SyncHTTPClient(sys.argv[1]) as client:
    print(json.dumps(client.predict(model="pets", inputs=["good cat", ""], top_k=1, explain=True)))
    for bad in ({"model": "cats"}, {"model": "../x"}, {"inputs": []}, {"top_k": 0}):
        try:
            client.predict(**{"model": "pets", "inputs": ["a"]} | bad)
        except bentoml.exceptions.BentoMLException as error:
            print(json.dumps({"status": error.error_code, "message": str(error)}))
"""


def test_bentomls_own_client(service: ServiceProcess):
    run = subprocess.run(
        [sys.executable, "-c", BENTOML_CLIENT, service.url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answer, unknown, malformed, empty, top_0 = map(json.loads, run.stdout.splitlines())
    assert answer["model"] == "pets@1"
    good, bad = answer["predictions"]
    assert good.keys() == {"label", "score", "scores", "explanation"}
    assert bad.keys() == {"error"}
    assert unknown["status"] == 404
    assert "no model cats" in unknown["message"]
    assert malformed["status"] == 400
    assert "model must look like" in malformed["message"]
    for refused, field in ((empty, "inputs"), (top_0, "top_k")):
        assert refused["status"] == 400
        assert f"{field}: " in refused["message"]
