"""What `GRAFT_REDIS_URL` may be, read into parts.

    redis://[user:password@]host[:port][/db]                one server
    rediss://…                                              the same over TLS
    unix://[user:password@]/path/of/the.sock[?db=0]         a socket of this host
    redis+sentinel://[user:password@]host:port,…/service[/db]    the primary that Sentinels name
    redis+cluster://[user:password@]host:port,…             a Cluster; any of its nodes will do

`rediss+sentinel` and `rediss+cluster` are over TLS, Sentinels too. Options follow as a query:
`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` (paths of PEM files), `ssl_check_hostname=false`,
`sentinel_username`, `sentinel_password`, and `username`, `password`, `db`, which win over the same
in front. User names and passwords are percent-encoded. What is not listed is refused, for a typing
error in an option must not turn it off. No message and no `repr` holds any part of a secret.
Not here: connecting (core.queue.connection).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

REDIS_PORT, SENTINEL_PORT = 6379, 26379
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

Node = tuple[str, int]
Kind = Literal["server", "socket", "sentinel", "cluster"]

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("socket", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}


@dataclass(frozen=True)
class Credentials:
    """Who we are; both None for a server that asks for nothing."""

    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files: whom we trust (None: the system's), and our own certificate."""

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    check_hostname: bool = True


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is and how to get in. `nodes` are the Sentinels or the Cluster's nodes."""

    kind: Kind
    nodes: tuple[Node, ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    credentials: Credentials = Credentials()
    sentinel_credentials: Credentials = Credentials()
    tls: Tls | None = None


def parse_redis_url(url: str) -> RedisAddress:
    """Return the parts of a URL; raise `ValueError`, which says what is wrong and quotes nothing.

    Of what stands in the URL, a message names only an option that is unknown.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"a Redis URL begins with one of {', '.join(f'{s}://' for s in _SCHEMES)}")
    kind, is_secure = _SCHEMES[scheme]
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("the Redis URL cannot be read: percent-encode the password") from None
    if parts.fragment:
        raise ValueError("the Redis URL holds a '#': percent-encode the password")
    options = _options(parts.query, kind, is_secure)
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    words = [unquote(word) for word in parts.path.split("/") if word]
    service = words.pop(0) if kind == "sentinel" and words else ""
    if kind == "sentinel" and not service:
        raise ValueError("a Sentinel URL ends with the service's name: …:26379/mymaster")
    path = unquote(parts.path) if kind == "socket" else ""
    if kind == "socket" and (hosts or len(path) < 2):
        raise ValueError("a Redis socket is written unix:///path/of/the.sock")
    db = _db(options.get("db") or ("" if kind == "socket" else "/".join(words)))
    if kind == "cluster" and db:
        raise ValueError("a Redis Cluster has the database 0 only")
    return RedisAddress(
        kind=kind,
        nodes=() if kind == "socket" else _nodes(hosts, kind),
        path=path,
        service=service,
        db=db,
        credentials=Credentials(
            options.get("username") or unquote(username) or None,
            options.get("password") or unquote(password) or None,
        ),
        sentinel_credentials=Credentials(
            options.get("sentinel_username"), options.get("sentinel_password")
        ),
        tls=_tls(options) if is_secure else None,
    )


def _options(query: str, kind: Kind, is_secure: bool) -> dict[str, str]:
    known = {"username", "password", "db"}
    if is_secure:
        known |= {*TLS_FILES, "ssl_check_hostname"}
    if kind == "sentinel":
        known |= {"sentinel_username", "sentinel_password"}
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in known:
            raise ValueError(f"the Redis URL has an unknown option: {name[:40]!r}")
    return options


def _nodes(hosts: str, kind: Kind) -> tuple[Node, ...]:
    found = []
    for host in hosts.split(","):
        try:
            one = urlsplit(f"//{host}")
            port = one.port
        except ValueError:
            raise ValueError("the Redis URL has a host or a port that is none") from None
        default = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
        # Only a lone server may go unnamed, as it always could.
        name = one.hostname or ("localhost" if kind == "server" and len(hosts) == len(host) else "")
        if not name:
            raise ValueError("the Redis URL names no host")
        found.append((name, port or default))
    if kind == "server" and len(found) > 1:
        raise ValueError("several hosts need redis+sentinel:// or redis+cluster://")
    return tuple(found)


def _db(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError("the database of the Redis URL is not a number")
    return int(text)


def _tls(options: dict[str, str]) -> Tls:
    check = options.get("ssl_check_hostname", "true").lower()
    if check not in ("true", "false"):
        raise ValueError("ssl_check_hostname is true or false")
    return Tls(
        ca_certs=options.get("ssl_ca_certs"),
        certfile=options.get("ssl_certfile"),
        keyfile=options.get("ssl_keyfile"),
        check_hostname=check == "true",
    )
