"""Who may ask: whoever has the key, or without one only this machine.

Without a key the connection must have come to a loopback address, and the `Host` header must name
one, so that a page in a browser that has its name rebound to 127.0.0.1 gets nothing; so must
`Origin`, so that other sites' pages cannot post here. That the socket is bound to loopback is
checked at start (service.app).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import Scope

from core.errors import Unauthorized
from core.settings import Settings


class Access:
    """Checks requests against the key of the settings, if they have one."""

    def __init__(self, settings: Settings) -> None:
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key else None

    def require(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raise `Unauthorized` for a request that is not allowed."""
        if self._key is None:
            address, _ = scope.get("server") or ("", 0)
            host = re.sub(r":\d+\Z", "", headers.get("host", "localhost"))
            if not (is_loopback(address or "") and is_loopback(host) and _is_own_page(headers)):
                raise Unauthorized("set GRAFT_API_KEY to serve other machines than this one")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Headers come as Latin-1, whatever bytes the caller sent.
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("latin-1"), self._key
        ):
            raise Unauthorized("send the API key as 'Authorization: Bearer …'")


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_own_page(headers: Mapping[str, str]) -> bool:
    """Tell whether a browser sent this for a page of this machine; other programs name no origin.

    A page of any site may post a form, or text, to 127.0.0.1 without being asked for permission.
    """
    origin = headers.get("origin")
    if origin is None:
        return True
    with suppress(ValueError):
        return is_loopback(urlsplit(origin).hostname or "")
    return False
