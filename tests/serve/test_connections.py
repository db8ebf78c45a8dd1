"""Clients that send slowly, send nothing, read nothing, or send what may be understood in two ways."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest

from sca.serve import server as serving
from sca.serve.limits import ServerLimits

pytestmark = pytest.mark.slow

CLOSING = {
    "error": {
        "message": "the server is shutting down; try again later",
        "type": "server_error",
        "param": None,
        "code": "overloaded",
    }
}
HEAD = "POST /v1/captions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def connect(url, receive=None):
    host, port = url.removeprefix("http://").split(":")
    line = socket.socket()
    if receive:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    line.settimeout(20)
    line.connect((host, int(port)))
    return line


def read_all(line):
    """What comes until the connection is closed; fails if it is not."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            got += piece
    return got


def test_a_connection_is_closed_after_408_though_its_client_goes_on(served):
    line = connect(served(ServerLimits(timeout=1)))
    line.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n".encode())
    stop = threading.Event()

    def dribble():
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                line.sendall(b" ")

    going_on = threading.Thread(target=dribble)
    going_on.start()
    try:
        got = read_all(line)
    finally:
        stop.set()
        going_on.join()
    assert b" 408 " in got
    assert b"connection: close" in got.lower()
    assert b'{"error":{"message":"the request was not there after 1 s",' in got


def test_a_body_that_is_too_large_is_refused_before_it_comes(served):
    line = connect(served(ServerLimits(max_body_bytes=1000)))
    line.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n".encode())
    assert b" 413 " in read_all(line)


def test_content_length_with_transfer_encoding_is_refused(served):
    line = connect(served())
    line.sendall(f"{HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode())
    got = read_all(line)
    assert b" 400 " in got
    assert b"both Content-Length and Transfer-Encoding" in got


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nX-A: ", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /"]
)
def test_a_connection_without_a_whole_head_is_closed(served, sent):
    line = connect(served(ServerLimits(timeout=1)))
    line.sendall(sent)
    read_all(line)


def test_silent_connections_make_room_for_others(served, monkeypatch):
    monkeypatch.setattr(serving, "HEADER_TIMEOUT_SECONDS", 600.0)
    url = served(ServerLimits(max_connections=6))
    silent = [connect(url) for _ in range(12)]
    for each in silent[::3]:
        each.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
    for each in silent[1::3]:
        each.sendall(f"{HEAD}Content-Length: 100\r\n\r\n".encode())
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{url}/health").status_code == 200
    assert read_all(silent[0]) == b"", "the first that came has made room"


def test_more_requests_than_connections_are_told(served, asked, tiny, monkeypatch):
    go, usual = threading.Event(), tiny.caption_batch
    monkeypatch.setattr(tiny, "caption_batch", lambda *a, **b: (go.wait(60), usual(*a, **b))[1])
    url, statuses = served(ServerLimits(max_connections=2)), []

    def ask():
        answer = httpx.post(f"{url}/v1/captions", json=asked(), timeout=60)
        statuses.append((answer.status_code, answer.json().get("error", {}).get("message")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(statuses, key=str) == [
        (200, None),
        (200, None),
        (503, "2 requests are being answered: try again later"),
    ]


def test_a_client_that_does_not_read_is_left(served, asked, scene):
    url = served(ServerLimits(timeout=1))
    line = connect(url, receive=4096)
    box = {"box": [1, 1, 90, 90]}
    body = json.dumps(asked(prompts=[box] * 64, masks=True))
    line.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    for _ in range(200):  # answers that nobody reads
        with contextlib.suppress(OSError):
            line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    deadline = time.monotonic() + 30
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while time.monotonic() < deadline:
            line.sendall(b"\r\n")
            time.sleep(0.2)
    assert time.monotonic() < deadline


def test_an_upload_that_is_given_up_leaves_no_traceback(served, caplog):
    url = served()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with connect(url) as line:
                line.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
                time.sleep(0.1)
        deadline = time.monotonic() + 10
        while 'status="499"' not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_requests_without_an_answer_are_told_when_the_server_ends(served, asked, tiny, monkeypatch):
    """One in a long turn, one that waits, one whose body has not come; and one that is done in time."""
    monkeypatch.setattr(serving, "SHUTDOWN_TIMEOUT_SECONDS", 2.0)
    usual, busy = tiny.caption_batch, threading.Event()

    def answer(encoded, requests, task, **settings):
        if task == "recognition":
            busy.set()
            time.sleep(6)
        return usual(encoded, requests, task, **settings)

    monkeypatch.setattr(tiny, "caption_batch", answer)
    url, told = served(ServerLimits(timeout=30)), {}

    def ask(task):
        got = httpx.post(f"{url}/v1/captions", json=asked(task=task), timeout=60)
        told[task] = got.status_code, got.headers["content-type"], got.json()

    threads = [threading.Thread(target=ask, args=(task,)) for task in ("recognition", "caption")]
    threads[0].start()
    assert busy.wait(60)
    threads[1].start()
    line = connect(url)
    line.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
    time.sleep(0.5)
    start = time.monotonic()
    served.stop()
    assert time.monotonic() - start < 6 - 0.5, "it waits for nobody longer than its grace"
    for thread in threads:
        thread.join()
    expected = 503, "application/json", CLOSING
    assert told == {"recognition": expected, "caption": expected}
    got = read_all(line)
    assert b" 503 " in got
    assert b"the server is shutting down" in got


def test_a_stream_is_told_when_the_server_ends(served, asked, tiny, monkeypatch):
    monkeypatch.setattr(serving, "SHUTDOWN_TIMEOUT_SECONDS", 2.0)
    usual = tiny.caption_batch
    monkeypatch.setattr(tiny, "caption_batch", lambda *a, **b: (time.sleep(0.3), usual(*a, **b))[1])
    url = served(max_regions_per_turn=1)
    body = asked(prompts=[{"box": [0, 0, 50, 50]}] * 200, stream=True)
    with httpx.stream("POST", f"{url}/v1/captions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        rest = list(lines)
        stopping.join()
    assert (first, answer.status_code) == ("event: found", 200)
    assert "event: region" in rest
    assert [line for line in rest if line][-2:] == [
        "event: error",
        f"data: {json.dumps(CLOSING)}",
    ]
