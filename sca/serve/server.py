"""uvicorn, with deadlines for clients that neither send nor read, room for new ones, and an orderly end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from sca.serve.config import ServerConfig
from sca.serve.scheduler import RequestScheduler
from sca.serve.sockets import bind_socket

HEADER_TIMEOUT_SECONDS = 10.0  # in which the head of a request has to be there, at most
SHUTDOWN_TIMEOUT_SECONDS = 5.0  # that requests have when the server ends
SHUTDOWN_MARGIN_SECONDS = 1.0  # of them, in which those without an answer are told


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 for one connection.

    uvicorn's own timeout ends only connections that are idle after a request, and its own limit on connections refuses
    whoever comes when silent connections have taken all places. Here a connection ends if the head of a request is not
    there in time, or if its client does not read what it is sent; and where all places are taken, the connection that
    has waited longest for the rest of a request makes room.
    """

    def __init__(self, *args: Any, write_timeout: float, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.write_timeout, self.max_connections = write_timeout, max_connections
        self.waiting_since = 0.0  # when the connection, or its present request, began
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def has_pending_request(self) -> bool:
        """Whether a request is there and has no answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_awaiting_request(self) -> bool:
        """Whether a request, or the rest of one, is awaited."""
        return not self.has_pending_request or (self.cycle.more_body and not self.cycle.response_started)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()
        if len(self.connections) > self.max_connections:
            self._close_longest_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer("_header_timer")
        self._cancel_timer("_stall_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.has_pending_request:
            if self._header_timer is not None:
                self.waiting_since = self.loop.time()
            self._cancel_timer("_header_timer")
        elif self._header_timer is None:
            self._start_header_timer()

    def on_response_complete(self) -> None:
        self.waiting_since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_stall_timer(HEADER_TIMEOUT_SECONDS)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_stall_timer(HEADER_TIMEOUT_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_stall_timer(self.write_timeout)

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._cancel_timer("_stall_timer")
        super().resume_writing()

    def _start_header_timer(self) -> None:
        self.waiting_since = self.loop.time()
        timeout = min(self.write_timeout, HEADER_TIMEOUT_SECONDS)
        self._header_timer = self.loop.call_later(timeout, self.transport.abort)

    def _start_stall_timer(self, timeout: float) -> None:
        """Abort the connection if data is still unsent after `timeout` seconds."""
        self._cancel_timer("_stall_timer")
        self._stall_timer = self.loop.call_later(timeout, self.transport.abort)

    def _close_longest_waiting(self) -> None:
        waiting = [each for each in self.connections if each is not self and each.is_awaiting_request]
        if waiting:
            min(waiting, key=lambda each: (each.has_pending_request, each.waiting_since)).transport.abort()

    def _cancel_timer(self, timer_name: str) -> None:
        if getattr(self, timer_name) is not None:
            getattr(self, timer_name).cancel()
            setattr(self, timer_name, None)


class DrainingServer(uvicorn.Server):
    """Drain the scheduler for a while, then answer the remaining requests with 503."""

    def __init__(self, config: uvicorn.Config, scheduler: RequestScheduler):
        super().__init__(config)
        self.scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.scheduler.drain(SHUTDOWN_TIMEOUT_SECONDS - SHUTDOWN_MARGIN_SECONDS)
        await super().shutdown(sockets)


def serve_locally(config: ServerConfig, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve a model in this process until interrupted.

    Args:
        config: The model and the server settings.
        host: Address to bind.
        port: Port to bind; 0 selects a free port.
        on_ready: Called with the URL.

    Raises:
        ValueError: The address cannot be bound; or an error of `config.load_captioner`.
    """
    captioner = config.load_captioner()  # before anybody can connect, so that its errors are raised first
    with bind_socket(host, port) as bound_socket:
        bound_socket.listen(config.max_connections)  # clients that come before all is ready wait
        url_host = f"[{host}]" if ":" in host else host
        app = config.create_app(captioner)
        options = {"write_timeout": config.timeout, "max_connections": config.max_connections}
        server = make_server(app, app.state.scheduler, log_requests=config.log_requests, **options)
        on_ready(f"http://{url_host}:{bound_socket.getsockname()[1]}")
        server.run([bound_socket])


def make_server(
    app: FastAPI, scheduler: RequestScheduler, *, write_timeout: float, max_connections: int, log_requests: bool
) -> uvicorn.Server:
    """Set up a server for an application; `run([socket])` starts it.

    Args:
        scheduler: The scheduler that is drained at shutdown.
        write_timeout: Seconds in which a client has to read sent data.
        max_connections: Maximum concurrent connections.
        log_requests: Log each request.
    """
    timeouts = {"write_timeout": write_timeout, "max_connections": max_connections}
    config = uvicorn.Config(
        app,
        http=partial(DeadlineProtocol, **timeouts),  # type: ignore[arg-type]
        ws="none",
        log_level="info" if log_requests else "warning",
        timeout_graceful_shutdown=int(SHUTDOWN_TIMEOUT_SECONDS),
    )
    return DrainingServer(config, scheduler)
