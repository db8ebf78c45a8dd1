"""Root path of a server behind a proxy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ROUTES = (
    *("/v1/captions", "/v1/find", "/v1/chat/completions", "/v1/models", "/docs/oauth2-redirect", "/openapi.json"),
    *("/static-offline-docs", "/health", "/metrics", "/predict", "/setup", "/webhook"),
)


def check_root_path(text: str) -> str:
    """Normalize a root path to "/a/b", or "" for the root.

    Args:
        text: Path from the command line.

    Returns:
        The normalized path.

    Raises:
        ValueError: The text is not a path of URL characters, for example a full URL, or a route of the server starts
            with it. The latter would be ambiguous between proxies that strip the path and proxies that do not.
    """
    path = text.strip("/")
    if path and not all(re.fullmatch(r"[\w.~-]+", part, re.ASCII) and part.strip(".") for part in path.split("/")):
        raise ValueError(f"the root path {text!r} is not a URL path; write it like /captions")
    if path and any(f"{route}/".startswith(f"/{path}/") for route in ROUTES):
        raise ValueError(f"the root path {text!r} is a prefix of a route of the server; choose another, like /captions")
    return f"/{path}" if path else ""


class RootPathMiddleware:
    """ASGI middleware that sets the root path, for proxies that strip it from requests and proxies that do not.

    Args:
        app: ASGI application.
        root_path: Result of `check_root_path`.
    """

    def __init__(self, app: ASGIApp, root_path: str):
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            has_prefix = f"{scope['path']}/".startswith(f"{self.root_path}/")
            path = scope["path"] if has_prefix else f"{self.root_path}{scope['path']}"
            scope = {**scope, "root_path": self.root_path, "path": path}
        await self.app(scope, receive, send)
