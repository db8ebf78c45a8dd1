"""The path below which a proxy shows a server."""

from __future__ import annotations

import re
from typing import Any

ROUTES = (
    *("/v1/captions", "/v1/chat/completions", "/v1/models", "/docs/oauth2-redirect", "/openapi.json"),
    *("/static-offline-docs", "/health", "/metrics"),
)


def check_root_path(text: str) -> str:
    """Return a path as "/a/b", or "" for the root.

    Raises:
        ValueError: If the text is not a path of URL characters, such as a whole URL, or if a route of the server starts
            with it: a proxy that removes the path and one that leaves it could not be told apart.
    """
    path = text.strip("/")
    if path and not all(re.fullmatch(r"[\w.~-]+", part, re.ASCII) and part.strip(".") for part in path.split("/")):
        raise ValueError(f"the root path {text!r} is not a path; write it as /captions")
    if path and any(f"{route}/".startswith(f"/{path}/") for route in ROUTES):
        raise ValueError(
            f"the root path {text!r} is the start of a route of the server; choose another, like /captions"
        )
    return f"/{path}" if path else ""


class RootPathMiddleware:
    """ASGI middleware that sets the root path, whether a proxy removes it from a request or leaves it."""

    def __init__(self, app: Any, root_path: str):
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            has_prefix = f"{scope['path']}/".startswith(f"{self.root_path}/")
            path = scope["path"] if has_prefix else f"{self.root_path}{scope['path']}"
            scope = {**scope, "root_path": self.root_path, "path": path}
        await self.app(scope, receive, send)
