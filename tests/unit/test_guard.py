"""The guard: whom it lets through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.access import is_loopback
from tests.guarded import client, message

pytestmark = pytest.mark.anyio

# -- keys ----------------------------------------------------------------------------------------

GOOD = ["Bearer s3cret", "bearer s3cret", "BEARER   s3cret "]
BAD = ["", "s3cret", "Basic s3cret", "Bearer", "Bearer ", "Bearer wrong", "Bearer s3cret2",
       "Bearer s3cre", "Bearer S3CRET", "Token s3cret"]  # fmt: skip


@pytest.mark.parametrize("header", GOOD)
async def test_the_right_key_opens(header: str):
    async with client("s3cret") as http:
        assert (await http.get("/echo", headers={"Authorization": header})).status_code == 200


@pytest.mark.parametrize("header", BAD)
@pytest.mark.parametrize("path", ["/echo", "/v1/files", "/bug", "/nowhere", "/livez/", "//livez"])
async def test_any_other_does_not(header: str, path: str):
    async with client("s3cret") as http:
        response = await http.get(path, headers={"Authorization": header})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "s3cret" not in response.text
    assert message(response)


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "🔑"])
async def test_a_key_beyond_ascii(key: str):
    async with client(key) as http:
        right = await http.get("/echo", headers={"Authorization": f"Bearer {key}".encode()})
        wrong = await http.get("/echo", headers={"Authorization": f"Bearer {key}x".encode()})
        junk = await http.get("/echo", headers={"Authorization": b"Bearer \xff\xfe"})
    assert [right.status_code, wrong.status_code, junk.status_code] == [200, 401, 401]


async def test_with_a_key_the_host_and_the_address_do_not_matter():
    async with client("s3cret", server=("10.0.0.1", 80)) as http:
        headers = {"Authorization": "Bearer s3cret", "Host": "graft.example", "Origin": "http://x"}
        assert (await http.get("/echo", headers=headers)).status_code == 200


@pytest.mark.parametrize("key", [None, "s3cret"])
async def test_the_probes_are_open(key: str | None):
    async with client(key, server=("10.0.0.1", 80)) as http:
        assert (await http.get("/livez", headers={"Host": "evil.example"})).text == "live"


# -- without a key: this machine only ------------------------------------------------------------

LOOPBACK = ["127.0.0.1", "127.0.0.1:3000", "localhost", "localhost:3000", "LOCALHOST:1", "[::1]",
            "[::1]:3000", "127.9.9.9"]  # fmt: skip
FOREIGN = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:3000", "10.0.0.1",
           "0.0.0.0", "[::]", "127.0.0.1@evil.example", "", "::1:x", "localhost:"]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_loopback_host_gets_through(host: str):
    async with client() as http:
        assert (await http.get("/echo", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_rebound_name_does_not(host: str):
    async with client() as http:
        response = await http.get("/echo", headers={"Host": host})
    assert response.status_code == 401
    assert "GRAFT_API_KEY" in message(response)


@pytest.mark.parametrize("server", [("10.0.0.1", 3000), ("0.0.0.0", 3000), None, ("/x.sock", None)])
async def test_a_connection_from_elsewhere_does_not(server: object):
    async with client(server=server) as http:
        assert (await http.get("/echo")).status_code == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:3000", 200), ("http://localhost:5173", 200), ("http://[::1]", 200),
        ("https://evil.example", 401), ("null", 401), ("", 401), ("http://[", 401),
        ("http://localhost.evil.example", 401), ("http://localhost@evil.example", 401),
    ],
)  # fmt: skip
async def test_only_pages_of_this_machine_may_post(origin: str, status: int):
    async with client() as http:
        response = await http.post("/echo", content=b"x", headers={"Origin": origin})
    assert response.status_code == status


@given(st.text(max_size=60))
def test_no_name_but_loopback_is_loopback(name: str):
    if is_loopback(name):
        assert name.lower() == "localhost" or re.match(r"\[*(127\.|0*:|::)", name)
