"""The path below which a proxy shows a server."""

from __future__ import annotations

import re
from typing import Any


def check_root_path(text: str) -> str:
    """Return a path as "/a/b", or "" for the root.

    Raises:
        ValueError: If the text is not a path of URL characters, such as a whole URL.
    """
    path = text.strip("/")
    if path and not all(re.fullmatch(r"[\w.~-]+", part, re.ASCII) and part.strip(".") for part in path.split("/")):
        raise ValueError(f"the root path {text!r} is not a path; write it as /captions")
    return f"/{path}" if path else ""


class RootPath:
    """ASGI middleware that sets the root path, whether a proxy removes it from a request or leaves it."""

    def __init__(self, app: Any, root_path: str):
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            has_root = f"{scope['path']}/".startswith(f"{self.root_path}/")
            path = scope["path"] if has_root else f"{self.root_path}{scope['path']}"
            scope = {**scope, "root_path": self.root_path, "path": path}
        await self.app(scope, receive, send)
