"""Redis URLs: every form is read, every mistake is named, and no secret is quoted."""

from __future__ import annotations

import pytest

from core.redis_address import Credentials, RedisAddress, Tls, parse_redis_url

LOGIN = Credentials("graft", "p@ss/word")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress("server", (("h", 6379),))),
        ("redis:///2", RedisAddress("server", (("localhost", 6379),), db=2)),
        (
            "redis://graft:p%40ss%2Fword@h:7/3",
            RedisAddress("server", (("h", 7),), db=3, credentials=LOGIN),
        ),
        (
            "redis://:old@h?username=graft&password=p%40ss%2Fword",
            RedisAddress("server", (("h", 6379),), credentials=LOGIN),
        ),
        (
            "rediss://[::1]:7?ssl_ca_certs=/ca.pem&ssl_check_hostname=false",
            RedisAddress("server", (("::1", 7),), tls=Tls("/ca.pem", check_hostname=False)),
        ),
        ("unix:///run/r.sock?db=1", RedisAddress("socket", path="/run/r.sock", db=1)),
        (
            "redis+sentinel://:p@a:1,b/primary/2?sentinel_password=s",
            RedisAddress(
                "sentinel", (("a", 1), ("b", 26379)), service="primary", db=2,
                credentials=Credentials(None, "p"), sentinel_credentials=Credentials(None, "s"),
            ),
        ),
        (
            "rediss+cluster://a,[::2]:8?ssl_certfile=/c&ssl_keyfile=/k",
            RedisAddress("cluster", (("a", 6379), ("::2", 8)), tls=Tls(None, "/c", "/k")),
        ),
    ],
)  # fmt: skip
def test_is_read(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("hush", "begins with"),
        ("http://:hush@h", "begins with"),
        ("redis://:hush#@h", "percent-encode"),
        ("redis://:[hush@h", "percent-encode"),
        ("redis://:hush@h:port", "a port that is none"),
        ("redis://:hush@a,b", "redis\\+sentinel"),
        ("redis://:hush@h/x", "not a number"),
        ("redis://:hush@h?socket_timeout=0", "unknown option: 'socket_timeout'"),
        ("redis://:hush@h?ssl_ca_certs=/x", "unknown option"),
        ("rediss://:hush@h?ssl_cert_reqs=none", "unknown option"),
        ("rediss://:hush@h?ssl_check_hostname=no", "true or false"),
        ("redis+sentinel://:hush@a:1", "service"),
        ("redis+sentinel://:hush@/primary", "names no host"),
        ("redis+cluster://:hush@a/1", "database 0"),
        ("unix://r.sock?password=hush", "unix:///"),
    ],
)
def test_a_mistake_is_named_and_no_secret_quoted(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as mistake:
        parse_redis_url(url)
    assert "hush" not in str(mistake.value)
    assert mistake.value.__suppress_context__ or mistake.value.__context__ is None


def test_no_secret_is_printed() -> None:
    address = parse_redis_url("redis+sentinel://me:hush@a/p?sentinel_password=hush")
    assert "hush" not in repr(address)
