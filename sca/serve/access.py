"""Who may use a server: the hosts that it is reached as, and who has a key."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from sca.serve.keys import find_key
from sca.serve.problems import ApiError, error_response

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health",)  # that are answered without a key


class HostCheck:
    """ASGI middleware that answers only requests whose Host header is an IP address or one of `hosts`.

    A page of a stranger whose name was bound to this address (DNS rebinding) has another Host. An address cannot be
    bound to another, so any address is allowed. "*" in `hosts` allows every name.
    """

    def __init__(self, app: Any, hosts: Sequence[str] = ()):
        self.app = app
        self.every = "*" in hosts
        self.hosts = {name.lower().rstrip(".") for name in (*LOCAL, socket.gethostname(), *hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or self.every:
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("host", "")
        if self._is_allowed(given):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        message = f"the host {given[:100]!r} is not served here; start with --allow-host NAME to allow it"
        await error_response(ApiError(403, message))(scope, receive, send)

    def _is_allowed(self, given: str) -> bool:
        try:
            name = (urlsplit(f"//{given}").hostname or "").rstrip(".")
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class KeyCheck:
    """ASGI middleware that answers only requests with a key, sent as `Authorization: Bearer KEY`.

    Clients with the same key count as one client: `scope["state"]["client"]`.
    """

    def __init__(self, app: Any, keys: Sequence[str]):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return await self.app(scope, receive, send)
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        place = find_key(given.strip(), self.keys) if scheme.lower() == "bearer" else None
        if place is None:
            error = ApiError(401, "no valid API key; send Authorization: Bearer KEY")
            return await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        scope.setdefault("state", {})["client"] = f"key {place}"
        await self.app(scope, receive, send)
