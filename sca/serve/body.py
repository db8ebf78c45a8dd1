"""Requests that are too large or too slow are turned away while they arrive."""

from __future__ import annotations

import asyncio
from typing import Any

from sca.serve.problems import ApiError


class BodyLimits:
    """ASGI middleware: reading the body raises ApiError 413 after `size` bytes, and 408 after `seconds`.

    Starlette's own limit answers in plain text, and knows no time.
    """

    def __init__(self, app: Any, size: int, seconds: float):
        self.app, self.size, self.seconds = app, size, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        left, deadline, whole = self.size, asyncio.get_running_loop().time() + self.seconds, False

        async def limited() -> Any:
            nonlocal left, whole
            if whole:  # what is awaited now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request was not there after {self.seconds:g} s") from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise ApiError(413, f"the request has more than the {self.size:,} bytes that are allowed")
            whole = not message.get("more_body", False)
            return message

        return await self.app(scope, limited, send)
