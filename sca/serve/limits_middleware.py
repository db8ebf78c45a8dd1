"""Middleware that rejects requests that are too large, too slow or too many while they arrive."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from sca.serve.errors import ApiError, make_error_response
from sca.serve.limits import ServerLimits
from sca.serve.memory_budget import MemoryBudget, MemoryLease

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_MEMORY_FACTOR = 4  # bytes of memory per byte of a body: the body, its JSON strings, and the decoded file
LINGER_SECONDS = 1.0  # time to discard the rest of a rejected body, so that the client reads the response


class RequestLimitMiddleware:
    """ASGI middleware with limits on connections, body size, time and memory.

    Reading a body raises `ApiError` with status 413 above `limits.max_body_bytes` and 408 after `limits.timeout`. If a
    request was not read completely, its connection is closed. Requests cancelled by a shutdown return status 503. The
    memory lease of a request is `scope["state"]["lease"]`.

    Args:
        app: ASGI application.
        limits: Limits on requests.
        budget: Memory budget of all requests.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits, budget: MemoryBudget):
        self.app = app
        self.limits = limits
        self.budget = budget
        self.num_running: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.num_running += 1
        lease = scope.setdefault("state", {})["lease"] = self.budget.create_lease()
        try:
            with lease:
                await self._handle_request(scope, receive, send, lease)
        finally:
            self.num_running -= 1

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send, lease: MemoryLease) -> None:
        headers = Headers(scope=scope)
        bytes_left, deadline = self.limits.max_body_bytes, asyncio.get_running_loop().time() + self.limits.timeout
        is_fully_read = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        has_started = False

        async def receive_within_limits() -> Message:
            nonlocal bytes_left, is_fully_read
            if is_fully_read:  # waits for the client to disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request did not arrive within {self.limits.timeout:g} s") from None
            size = len(message.get("body", b""))
            bytes_left -= size
            if bytes_left < 0:
                raise self._make_size_error()
            lease.add(BODY_MEMORY_FACTOR * size)
            is_fully_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def send_or_close(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if not is_fully_read:
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif not is_fully_read and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discard_body(receive)
                message = {**message, "body": b""}
            await send(message)

        try:
            header_error = self._find_header_error(headers)
            if header_error is not None:
                raise header_error
            await self.app(scope, receive_within_limits, send_or_close)
        except ApiError as error:
            await _make_closing_response(error)(scope, receive, send_or_close)
        except asyncio.CancelledError:
            if has_started:
                raise
            is_fully_read = True  # do not read the rest of the body
            await _make_closing_response(ApiError(503, "the server is shutting down; try again later"))(
                scope, receive, send_or_close
            )

    def _find_header_error(self, headers: Headers) -> ApiError | None:
        """Return the error of a request that is known before its body is read."""
        content_length = headers.get("content-length")
        # Ambiguous: proxies can disagree on the end of the body (request smuggling).
        if content_length is not None and "transfer-encoding" in headers:
            return ApiError(400, "the request has both Content-Length and Transfer-Encoding; send one of them")
        if content_length is not None and int(content_length) > self.limits.max_body_bytes:
            return self._make_size_error()
        if self.num_running > self.limits.max_connections:
            return ApiError(503, f"{self.limits.max_connections} requests are in progress; try again later")
        return None

    def _make_size_error(self) -> ApiError:
        return ApiError(413, f"the request exceeds the limit of {self.limits.max_body_bytes:,} bytes")


async def _discard_body(receive: Receive) -> None:
    """Discard the rest of a request for `LINGER_SECONDS`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _make_closing_response(error: ApiError) -> Response:
    return make_error_response(error, {"Connection": "close"})
