"""Who gets in: the service refuses to stand open, and with a key every door has it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import AuthenticationError

from tests.integration.service_process import ServiceProcess

pytest_plugins = ["tests.integration.service_fixtures"]

KEY = "test-key-with-ümlaut"


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", None), ("::", "")])
def test_without_a_key_only_loopback_is_bound(tmp_path: Path, host: str, key: str | None):
    env = {} if key is None else {"API_KEY": key}
    refused = ServiceProcess(tmp_path, host=host, workers=1, **env)
    try:
        process = refused.launch()
        opened = False
        while process.poll() is None:
            with socket.socket() as probe:
                opened = opened or probe.connect_ex(("127.0.0.1", refused.port)) == 0
        assert process.returncode != 0
        assert not opened
        text = refused.log.read_text()
        assert "GRAFT_API_KEY" in text
        assert "Traceback" not in text
    finally:
        refused.redis.folder.rmdir()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    running = ServiceProcess(
        tmp_path_factory.mktemp("keyed"), host="0.0.0.0", workers=1, API_KEY=KEY
    )
    try:
        running.start()
        yield running
    finally:
        running.stop()


ROUTES = [
    ("GET", "/"), ("GET", "/docs.json"), ("GET", "/schema.json"), ("POST", "/predict"),
    ("GET", "/static_content/index.css"), ("GET", "/healthz"), ("GET", "/metrics"),
    ("POST", "/v1/predict"), ("POST", "/v1/files"), ("GET", "/v1/files"),
    ("GET", "/v1/files/file-1"), ("DELETE", "/v1/files/file-1"),
    ("GET", "/v1/files/file-1/content"), ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"), ("GET", "/v1/fine_tuning/jobs/ftjob-1"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel"),
    ("GET", "/v1/fine_tuning/jobs/ftjob-1/events"), ("GET", "/v1/models"),
    ("GET", "/v1/models/pets"), ("DELETE", "/v1/models/pets"), ("GET", "/nowhere"),
    ("GET", "/v1"), ("OPTIONS", "/v1/files"), ("TRACE", "/"), ("GET", "//livez"),
    ("GET", "/livez/../v1/files"), ("GET", "/livez%2f"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_the_key(keyed: ServiceProcess, method: str, path: str):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        raw = {name: value.encode() for name, value in headers.items()}
        response = httpx.request(method, keyed.url + path, headers=raw)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in response.text


@pytest.mark.parametrize("path", ["/", "/docs.json", "/schema.json", "/v1/models", "/metrics"])
def test_the_key_opens(keyed: ServiceProcess, path: str):
    headers = {"Authorization": f"Bearer {KEY}".encode()}
    assert httpx.get(keyed.url + path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_the_probes_need_none(keyed: ServiceProcess, path: str):
    assert httpx.get(keyed.url + path).status_code == 200


@pytest.mark.anyio
async def test_the_openai_client_sees_an_authentication_error(keyed: ServiceProcess):
    async with keyed.openai("wrong") as client:
        with pytest.raises(AuthenticationError):
            await client.models.list()


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}],
)
def test_without_a_key_other_sites_pages_get_nothing(
    service: ServiceProcess, headers: dict[str, str]
):
    for method, path in (("GET", "/v1/models"), ("POST", "/predict"), ("POST", "/v1/files")):
        response = httpx.request(method, service.url + path, headers=headers)
        assert response.status_code == 401


def answers(connection: socket.socket, count: int) -> list[int]:
    """Read that many answers of a connection; return their statuses."""
    connection.settimeout(20)
    data = b""
    while True:
        found = [int(each) for each in re.findall(rb"HTTP/1.1 (\d+)", data)]
        if len(found) >= count and data.rstrip().endswith(b"}"):
            return found
        more = connection.recv(65_536)
        assert more, data
        data += more


def test_an_early_refusal_leaves_the_connection_usable(keyed: ServiceProcess):
    """The answer comes while the body is still being sent; the next request must not suffer."""
    body = b"x" * 3_000_000
    post = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=20) as connection:
        connection.sendall(post + body + probe)
        assert answers(connection, 2) == [401, 200]


def test_a_head_that_does_not_end_is_given_up(keyed: ServiceProcess):
    """Nothing has asked for the key yet."""
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=20) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            connection.sendall(b"a" * 10_000_000)


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(service: ServiceProcess):
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(head)
        assert answers(connection, 1) == [413]
