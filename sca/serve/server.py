"""uvicorn server with deadlines for slow clients, a limit on connections, and graceful shutdown."""

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

HEADER_TIMEOUT_SECONDS = 10.0  # maximum time to receive the headers of a request
SHUTDOWN_TIMEOUT_SECONDS = 5.0  # time for requests to complete at shutdown
SHUTDOWN_MARGIN_SECONDS = 1.0  # part of the shutdown timeout for error responses to the remaining requests


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 protocol of one connection, with deadlines.

    The timeout of uvicorn applies only to connections that are idle after a request, and its connection limit rejects
    new clients while silent connections hold all slots. This protocol aborts a connection if the headers of a request
    do not arrive in time, or if the client does not read its response. At the connection limit, it aborts the
    connection that has waited longest for the rest of a request.

    Args:
        *args: Arguments of `H11Protocol`.
        write_timeout: Seconds for the client to read sent data.
        max_connections: Maximum concurrent connections.
        **kwargs: Keyword arguments of `H11Protocol`.
    """

    def __init__(self, *args: Any, write_timeout: float, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.write_timeout = write_timeout
        self.max_connections = max_connections
        self.waiting_since: float = 0.0  # start of the connection or of its current request
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def has_pending_request(self) -> bool:
        """Whether a request has arrived and has no complete response."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_awaiting_request(self) -> bool:
        """Whether the connection waits for a request or for the rest of one."""
        return not self.has_pending_request or (self.cycle.more_body and not self.cycle.response_started)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
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
        waiting = [
            each
            for each in self.connections
            if isinstance(each, DeadlineProtocol) and each is not self and each.is_awaiting_request
        ]
        if waiting:
            min(waiting, key=lambda each: (each.has_pending_request, each.waiting_since)).transport.abort()

    def _cancel_timer(self, timer_name: str) -> None:
        if getattr(self, timer_name) is not None:
            getattr(self, timer_name).cancel()
            setattr(self, timer_name, None)


class DrainingServer(uvicorn.Server):
    """Server that drains the scheduler at shutdown, then rejects the remaining requests with status 503.

    Args:
        config: Configuration of uvicorn.
        scheduler: Scheduler to drain.
    """

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
    captioner = config.load_captioner()  # before binding, so that its errors are raised first
    with bind_socket(host, port) as bound_socket:
        bound_socket.listen(config.max_connections)  # early clients wait until the server is ready
        url_host = f"[{host}]" if ":" in host else host
        app = config.create_app(captioner)
        server = make_server(
            app,
            app.state.scheduler,
            write_timeout=config.timeout,
            max_connections=config.max_connections,
            log_requests=config.log_requests,
        )
        on_ready(f"http://{url_host}:{bound_socket.getsockname()[1]}")
        server.run([bound_socket])


def make_server(
    app: FastAPI, scheduler: RequestScheduler, *, write_timeout: float, max_connections: int, log_requests: bool
) -> uvicorn.Server:
    """Create the uvicorn server of an application; `run([socket])` starts it.

    Args:
        app: Application.
        scheduler: Scheduler to drain at shutdown.
        write_timeout: Seconds for a client to read sent data.
        max_connections: Maximum concurrent connections.
        log_requests: Log each request.

    Returns:
        The server.
    """
    protocol = partial(DeadlineProtocol, write_timeout=write_timeout, max_connections=max_connections)
    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]  # declared as a class, and only called
        ws="none",
        log_level="info" if log_requests else "warning",
        timeout_graceful_shutdown=int(SHUTDOWN_TIMEOUT_SECONDS),
    )
    return DrainingServer(config, scheduler)
