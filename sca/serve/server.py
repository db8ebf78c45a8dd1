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

from sca.serve.hosted import Hosted
from sca.serve.listening import bound
from sca.serve.scheduler import RequestScheduler

HEAD_SECONDS = 10.0  # in which the head of a request has to be there, at most
GRACE_SECONDS = 5.0  # that requests have when the server ends
SPARE_SECONDS = 1.0  # of them, in which those without an answer are told


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 for one connection.

    uvicorn's own timeout ends only connections that are idle after a request, and its own limit on connections refuses
    whoever comes when silent connections have taken all places. Here a connection ends if the head of a request is not
    there in time, or if its client does not read what it is sent; and where all places are taken, the connection that
    has waited longest for the rest of a request makes room.
    """

    def __init__(self, *given: Any, seconds: float, connections: int, **more: Any):
        super().__init__(*given, **more)
        self.seconds, self.most = seconds, connections
        self.since = 0.0  # when the connection, or its present request, began
        self._head: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request is there and has no answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_receiving(self) -> bool:
        """Whether a request, or the rest of one, is awaited."""
        return not self.is_answering or (self.cycle.more_body and not self.cycle.response_started)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset("_head")
        self._unset("_stalled")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_answering:
            if self._head is not None:
                self.since = self.loop.time()
            self._unset("_head")
        elif self._head is None:
            self._await_head()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later(HEAD_SECONDS)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later(HEAD_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later(self.seconds)

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._unset("_stalled")
        super().resume_writing()

    def _await_head(self) -> None:
        self.since = self.loop.time()
        self._head = self.loop.call_later(min(self.seconds, HEAD_SECONDS), self.transport.abort)

    def _abort_later(self, seconds: float) -> None:
        """What is still unsent after `seconds` is dropped."""
        self._unset("_stalled")
        self._stalled = self.loop.call_later(seconds, self.transport.abort)

    def _make_room(self) -> None:
        others = [each for each in self.connections if each is not self and each.is_receiving]
        if others:
            min(others, key=lambda each: (each.is_answering, each.since)).transport.abort()

    def _unset(self, timer: str) -> None:
        if getattr(self, timer) is not None:
            getattr(self, timer).cancel()
            setattr(self, timer, None)


class DrainingServer(uvicorn.Server):
    """Drain the scheduler for a while, then answer the remaining requests with 503."""

    def __init__(self, config: uvicorn.Config, scheduler: RequestScheduler):
        super().__init__(config)
        self.scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.scheduler.drain(GRACE_SECONDS - SPARE_SECONDS)
        await super().shutdown(sockets)


def serve_here(hosted: Hosted, host: str, port: int, report: Callable[[str], None]) -> None:
    """Serve a model in this process until interrupted.

    Args:
        hosted: The model, and how to serve it.
        host: The address to listen at.
        port: 0 for any free port.
        report: Called with the URL.

    Raises:
        ValueError: The address cannot be listened at; and what `hosted.captioner` raises.
    """
    captioner = hosted.captioner()  # before anybody can connect, so that its errors are raised first
    with bound(host, port) as listening:
        listening.listen(hosted.clients)  # clients that come before all is ready wait
        shown = f"[{host}]" if ":" in host else host
        app = hosted.application(captioner)
        options = {"seconds": hosted.seconds, "connections": hosted.clients, "log": hosted.log}
        server = make_server(app, app.state.scheduler, **options)
        report(f"http://{shown}:{listening.getsockname()[1]}")
        server.run([listening])


def make_server(
    app: FastAPI, scheduler: RequestScheduler, *, seconds: float, connections: int, log: bool
) -> uvicorn.Server:
    """Set up a server for an application; `run([socket])` starts it.

    Args:
        seconds: Time in which a client has to read a part of what it is sent.
        connections: Maximum connections.
        log: Whether to write a line for each request.
    """
    config = uvicorn.Config(
        app,
        http=partial(DeadlineProtocol, seconds=seconds, connections=connections),  # type: ignore[arg-type]
        ws="none",
        log_level="info" if log else "warning",
        timeout_graceful_shutdown=int(GRACE_SECONDS),
    )
    return DrainingServer(config, scheduler)
