"""Access control middleware: allowed Host headers and API keys."""

from __future__ import annotations

import base64
import ipaddress
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from sca.serve.api_keys import find_key_index
from sca.serve.errors import ApiError, make_error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
PUBLIC_PATHS = ("/health",)  # need no API key


class HostCheckMiddleware:
    """ASGI middleware that rejects requests with an unknown Host header, against DNS rebinding.

    A malicious page whose domain was rebound to this address sends its own Host header. IP addresses cannot be rebound
    and are always allowed, as are localhost and the host name of this machine.

    Args:
        app: ASGI application.
        hosts: Additional host names to allow; "*" allows all.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = ()):
        self.app = app
        self.allows_every_host: bool = "*" in hosts
        self.allowed_hosts: set[str] = {
            name.lower().rstrip(".") for name in (*LOCAL_HOSTS, socket.gethostname(), *hosts)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self.allows_every_host:
            return await self.app(scope, receive, send)
        host_header = Headers(scope=scope).get("host", "")
        if self._is_allowed(host_header):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        message = f"the host {host_header[:100]!r} is not allowed; start the server with --allow-host NAME to allow it"
        await make_error_response(ApiError(403, message))(scope, receive, send)

    def _is_allowed(self, host_header: str) -> bool:
        try:
            host_name = (urlsplit(f"//{host_header}").hostname or "").rstrip(".")
            if host_name in self.allowed_hosts:
                return True
            ipaddress.ip_address(host_name)
        except ValueError:
            return False
        return True


class KeyCheckMiddleware:
    """ASGI middleware that requires an API key, except for `PUBLIC_PATHS`.

    The key is sent as `Authorization: Bearer KEY`, or as the password of HTTP basic authentication with any user name.
    Clients with the same key count as one client, stored in `scope["state"]["client"]`.

    Args:
        app: ASGI application.
        keys: Valid API keys.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in PUBLIC_PATHS:
            return await self.app(scope, receive, send)
        key = _read_key(Headers(scope=scope).get("authorization", ""))
        key_index = find_key_index(key, self.keys) if key else None
        if key_index is None:
            fix = "send it as Authorization: Bearer KEY, or as the password of basic authentication"
            error = ApiError(401, f"missing or invalid API key; {fix}")
            return await make_error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        scope.setdefault("state", {})["client"] = f"key {key_index}"
        await self.app(scope, receive, send)


def _read_key(authorization: str) -> str:
    """Return the key in an Authorization header; "" without one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:  # including binascii.Error and UnicodeDecodeError
        return ""
