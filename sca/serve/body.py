"""Requests that are too large, too slow or too many are turned away while they arrive."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from sca.serve.memory import ByteBudget, Lease
from sca.serve.problems import ApiError, error_response
from sca.serve.schema import Limits

COPIES = 4  # of a body while it is read: its bytes, the text in its JSON, the file in that text
LINGER = 1.0  # seconds in which a client may still send, so that it comes to read why it was refused


class RequestLimits:
    """ASGI middleware around everything: limits on connections, size, time and memory.

    Reading the body raises ApiError 413 after `limits.body` bytes and 408 after `limits.seconds`. A connection whose
    request was not read to its end is closed. A request that is cancelled, because the server has to end, is answered
    with 503. What a request holds of the memory is in `scope["state"]["lease"]`.
    """

    def __init__(self, app: Any, limits: Limits, budget: ByteBudget):
        self.app, self.limits, self.budget, self.running = app, limits, budget, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.running += 1
        lease = scope.setdefault("state", {})["lease"] = self.budget.lease()
        try:
            with lease:
                await self._answer(scope, receive, send, lease)
        finally:
            self.running -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any, lease: Lease) -> None:
        headers = Headers(scope=scope)
        left, deadline = self.limits.max_body_bytes, asyncio.get_running_loop().time() + self.limits.timeout
        whole = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        started = False

        async def limited() -> Any:
            nonlocal left, whole
            if whole:  # what is awaited now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request was not there after {self.limits.timeout:g} s") from None
            size = len(message.get("body", b""))
            left -= size
            if left < 0:
                raise self._too_large()
            lease.add(COPIES * size)
            whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def sent(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not whole:
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif not whole and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {**message, "body": b""}
            await send(message)

        try:
            refusal = self._refusal(headers)
            if refusal is not None:
                raise refusal
            await self.app(scope, limited, sent)
        except ApiError as error:
            await _close_with(error)(scope, receive, sent)
        except asyncio.CancelledError:
            if started:
                raise
            whole = True  # nothing more is read
            await _close_with(ApiError(503, "the server is shutting down; try again later"))(scope, receive, sent)

    def _refusal(self, headers: Headers) -> ApiError | None:
        """What is wrong with a request before its body is read."""
        length = headers.get("content-length")
        if length is not None and "transfer-encoding" in headers:  # which another server may understand otherwise
            return ApiError(400, "both Content-Length and Transfer-Encoding: send one of them")
        if length is not None and int(length) > self.limits.max_body_bytes:
            return self._too_large()
        if self.running > self.limits.max_connections:
            return ApiError(503, f"{self.limits.max_connections} requests are being answered: try again later")
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request has more than the {self.limits.max_body_bytes:,} bytes that are allowed")


async def _discard(receive: Any) -> None:
    """Reads the rest of a request for a moment."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _close_with(error: ApiError) -> Response:
    return error_response(error, {"Connection": "close"})
