"""Connections that are slow, silent or ambiguous, and the shutdown of the server."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest

from sca.serve import server as server_module
from sca.serve.limits import ServerLimits

pytestmark = pytest.mark.slow

SHUTDOWN_ERROR = {
    "error": {
        "message": "the server is shutting down; try again later",
        "type": "server_error",
        "param": None,
        "code": "overloaded",
    }
}
REQUEST_HEAD = "POST /v1/captions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def open_connection(url, receive_buffer=None):
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


def read_all(connection):
    """Return the bytes received until the connection is closed; fail on a timeout."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_server_closes_connection_after_408_while_client_keeps_sending(start_server):
    connection = open_connection(start_server(ServerLimits(timeout=1)))
    connection.sendall(f"{REQUEST_HEAD}Content-Length: 100000\r\n\r\n".encode())
    stop = threading.Event()

    def send_slowly():
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                connection.sendall(b" ")

    sender = threading.Thread(target=send_slowly)
    sender.start()
    try:
        received = read_all(connection)
    finally:
        stop.set()
        sender.join()
    assert b" 408 " in received
    assert b"connection: close" in received.lower()
    assert b'{"error":{"message":"the request did not arrive within 1 s",' in received


def test_server_rejects_too_large_body_before_reading_it(start_server):
    connection = open_connection(start_server(ServerLimits(max_body_bytes=1000)))
    connection.sendall(f"{REQUEST_HEAD}Content-Length: 100000\r\n\r\n".encode())
    assert b" 413 " in read_all(connection)


def test_server_rejects_content_length_with_transfer_encoding(start_server):
    connection = open_connection(start_server())
    connection.sendall(f"{REQUEST_HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode())
    received = read_all(connection)
    assert b" 400 " in received
    assert b"both Content-Length and Transfer-Encoding" in received


@pytest.mark.parametrize(
    "sent_bytes", [b"", b"GET /health HTTP/1.1\r\nX-A: ", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /"]
)
def test_server_closes_connection_without_complete_headers(start_server, sent_bytes):
    connection = open_connection(start_server(ServerLimits(timeout=1)))
    connection.sendall(sent_bytes)
    read_all(connection)


def test_server_closes_oldest_silent_connections_at_the_limit(start_server, monkeypatch):
    monkeypatch.setattr(server_module, "HEADER_TIMEOUT_SECONDS", 600.0)
    url = start_server(ServerLimits(max_connections=6))
    silent_connections = [open_connection(url) for _ in range(12)]
    for each in silent_connections[::3]:
        each.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
    for each in silent_connections[1::3]:
        each.sendall(f"{REQUEST_HEAD}Content-Length: 100\r\n\r\n".encode())
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{url}/health").status_code == 200
    assert read_all(silent_connections[0]) == b"", "the oldest connection is closed"


def test_server_rejects_requests_above_max_connections(start_server, make_body, captioner, monkeypatch):
    release, caption_batch = threading.Event(), captioner.caption_batch
    monkeypatch.setattr(
        captioner, "caption_batch", lambda *args, **kwargs: (release.wait(60), caption_batch(*args, **kwargs))[1]
    )
    url, statuses = start_server(ServerLimits(max_connections=2)), []

    def send_request():
        response = httpx.post(f"{url}/v1/captions", json=make_body(), timeout=60)
        statuses.append((response.status_code, response.json().get("error", {}).get("message")))

    threads = [threading.Thread(target=send_request) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(statuses, key=str) == [
        (200, None),
        (200, None),
        (503, "2 requests are in progress; try again later"),
    ]


def test_server_closes_connection_that_does_not_read(start_server, make_body, scene):
    url = start_server(ServerLimits(timeout=1))
    connection = open_connection(url, receive_buffer=4096)
    box = {"box": [1, 1, 90, 90]}
    body = json.dumps(make_body(prompts=[box] * 64, return_masks=True))
    connection.sendall(f"{REQUEST_HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    for _ in range(200):  # responses that are never read
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    deadline = time.monotonic() + 30
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while time.monotonic() < deadline:
            connection.sendall(b"\r\n")
            time.sleep(0.2)
    assert time.monotonic() < deadline


def test_aborted_upload_logs_no_traceback(start_server, caplog):
    url = start_server()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with open_connection(url) as connection:
                connection.sendall(f"{REQUEST_HEAD}Content-Length: 1000\r\n\r\n{{".encode())
                time.sleep(0.1)
        deadline = time.monotonic() + 10
        while 'status="499"' not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_shutdown_returns_503_to_unfinished_requests(start_server, make_body, captioner, monkeypatch):
    """Cover a request in a long turn, a queued request and a request whose body is incomplete."""
    monkeypatch.setattr(server_module, "SHUTDOWN_TIMEOUT_SECONDS", 2.0)
    caption_batch, is_busy = captioner.caption_batch, threading.Event()

    def caption_slowly(encoded, requests, task, **kwargs):
        if task == "recognition":
            is_busy.set()
            time.sleep(6)
        return caption_batch(encoded, requests, task, **kwargs)

    monkeypatch.setattr(captioner, "caption_batch", caption_slowly)
    url, responses = start_server(ServerLimits(timeout=30)), {}

    def send_request(task):
        response = httpx.post(f"{url}/v1/captions", json=make_body(task=task), timeout=60)
        responses[task] = response.status_code, response.headers["content-type"], response.json()

    threads = [threading.Thread(target=send_request, args=(task,)) for task in ("recognition", "caption")]
    threads[0].start()
    assert is_busy.wait(60)
    threads[1].start()
    connection = open_connection(url)
    connection.sendall(f"{REQUEST_HEAD}Content-Length: 1000\r\n\r\n{{".encode())
    time.sleep(0.5)
    start = time.monotonic()
    start_server.stop()
    assert time.monotonic() - start < 6 - 0.5, "the shutdown does not wait beyond its timeout"
    for thread in threads:
        thread.join()
    expected = 503, "application/json", SHUTDOWN_ERROR
    assert responses == {"recognition": expected, "caption": expected}
    received = read_all(connection)
    assert b" 503 " in received
    assert b"the server is shutting down" in received


def test_shutdown_ends_stream_with_an_error_event(start_server, make_body, captioner, monkeypatch):
    monkeypatch.setattr(server_module, "SHUTDOWN_TIMEOUT_SECONDS", 2.0)
    caption_batch = captioner.caption_batch
    monkeypatch.setattr(
        captioner, "caption_batch", lambda *args, **kwargs: (time.sleep(0.3), caption_batch(*args, **kwargs))[1]
    )
    url = start_server(max_regions_per_turn=1)
    body = make_body(prompts=[{"box": [0, 0, 50, 50]}] * 200, stream=True)
    with httpx.stream("POST", f"{url}/v1/captions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first_line = next(lines)
        stop_thread = threading.Thread(target=start_server.stop)
        stop_thread.start()
        remaining_lines = list(lines)
        stop_thread.join()
    assert (first_line, response.status_code) == ("event: captioning_started", 200)
    assert "event: region" in remaining_lines
    assert [line for line in remaining_lines if line][-2:] == [
        "event: error",
        f"data: {json.dumps(SHUTDOWN_ERROR)}",
    ]
