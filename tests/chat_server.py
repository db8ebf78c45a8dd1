"""Chat server of the tests: captions are hashes of the request, and faults are injected."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def make_text(body):
    """Return the text with which the server responds to a request."""
    return f"text {hashlib.sha256(json.dumps(body['messages'], sort_keys=True).encode()).hexdigest()[:12]}"


class ChatServer(ThreadingHTTPServer):
    """Server whose faults are functions of the handler, by the number of the attempt of a request.

    Attributes:
        model_names: Names of its models.
        bodies: Bodies of the POST requests, in order.
        keys: Authorization headers of all requests.
        answered: Number of complete responses by text.
    """

    daemon_threads = True

    def __init__(self, faults=()):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.faults, self.lock = faults, threading.Lock()
        self.model_names = ["stub"]
        self.bodies, self.keys, self.answered, self.attempts = [], [], {}, {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients close connections that are too slow


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send_json(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        with self.server.lock:
            self.server.keys.append(self.headers.get("Authorization"))
        self.send_json({"object": "list", "data": [{"id": name} for name in self.server.model_names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = make_text(body), self.server
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            number = server.attempts.get(text, 0)
            server.attempts[text] = number + 1
            fault = server.faults(text, number) if server.faults else None
        if fault is not None:
            fault(self)
            return
        with server.lock:
            server.answered[text] = server.answered.get(text, 0) + 1
        self.send_json(make_completion(text))


def make_completion(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def respond_overloaded(handler):
    handler.send_json({"error": {"message": "too many requests"}}, 429, Retry_After="0.01")


def respond_failed(handler):
    handler.send_json(b"<html>internal error</html>", 500)


def respond_cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def respond_malformed(handler):
    handler.send_json(b'{"choices": [{"message": {"content": "text')


def respond_nested(handler):
    handler.send_json(b"[" * 100_000)


def respond_with_surrogate(handler):
    handler.send_json(b'{"choices": [{"message": {"content": "\\ud83d"}}]}')


def respond_without_choices(handler):
    handler.send_json({"choices": []})


def respond_slowly(handler):
    """Send one byte at a time, for longer than the timeout of the client."""
    data = json.dumps(make_completion("slow")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for byte in data:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.02)


def respond_with_slow_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100):
        handler.wfile.write(f"X-Header-{number}: 0\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.02)


def drop_connection(handler):
    handler.close_connection = True
    handler.connection.close()


FAULTS = (
    respond_overloaded,
    respond_failed,
    respond_cut,
    respond_malformed,
    respond_nested,
    respond_with_surrogate,
    respond_without_choices,
    respond_slowly,
    respond_with_slow_headers,
    drop_connection,
)


@contextmanager
def run_chat_server(faults=None):
    """Run a server in a thread."""
    server = ChatServer(faults)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
