"""What one heavy client costs the others: `python benchmarks/studies/heavy_client.py [--seconds 60] [--clients 16]`.

Starts `sca serve`, lets some clients ask for one caption after another, first alone and then beside one client that
sends in turn the largest requests the server accepts, and more: points, prompts, everything, pixels, beams, bodies of
one byte per second, and silent connections. Prints the latency of the others in both, what either was answered, and the
memory of the server before, at most, and after a pause.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from PIL import Image
from sca_bench.worker import environment

from serving import _ask, _bodies, _Server, _told

SILENT = 600  # connections
PATIENCE = 5.0  # seconds after which the heavy client goes on to its next request


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--model", default="sca-tiny")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--seconds", type=float, default=60.0, help="Time beside the heavy client.")
    arguments.add_argument("--pause", type=float, default=60.0, help="Time after which memory is measured again.")
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument("--out", type=Path, help="A file for the measurements.")
    given = arguments.parse_args()
    with _Server(given.model, given.device) as server:
        found = measure(server, given.clients, given.seconds, given.pause)
    found["environment"] = environment(given.device)
    for line in describe(found):
        print(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(f"{json.dumps(found, indent=1)}\n", "utf-8")


def measure(server: Any, clients: int, seconds: float, pause: float) -> dict[str, Any]:
    """Latency and statuses of the others without and beside the heavy client, and the memory of the server in bytes."""
    bodies = _bodies()
    _ask(server, bodies, clients, 3.0)  # to warm up
    before = server.memory()
    alone = _ask(server, bodies, clients, seconds / 2)
    statuses: dict[str, Counter[Any]] = {}
    highest, stop = [before], threading.Event()
    threads = [
        threading.Thread(target=_be_heavy, args=(server, stop, statuses)),
        threading.Thread(target=_watch, args=(server, stop, highest)),
    ]
    for thread in threads:
        thread.start()
    beside = _ask(server, bodies, clients, seconds)
    stop.set()
    for thread in threads:
        thread.join()
    time.sleep(pause)
    return {
        "clients": clients,
        "alone": _told(alone),
        "beside": _told(beside),
        "ratio": _told(beside)["latency"]["p99"] / _told(alone)["latency"]["p99"],
        "heavy": {name: {str(status): count for status, count in each.items()} for name, each in statuses.items()},
        "memory": {"before": before, "highest": highest[0], "after": server.memory()},
    }


def describe(found: dict[str, Any]) -> Iterator[str]:
    for name in ("alone", "beside"):
        one = found[name]
        latency = {each: f"{1000 * value:.0f} ms" for each, value in one["latency"].items()}
        yield (
            f"{found['clients']} clients {name}: {one['requests_per_second']:.1f} requests/s, median "
            f"{latency['median']}, p99 {latency['p99']}, {one['failed']} failed"
        )
    yield f"p99 beside the heavy client: {found['ratio']:.1f} times as long"
    yield f"the heavy client: {found['heavy']}"
    yield "memory of the server, MiB: " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in found["memory"].items())


def _be_heavy(server: Any, stop: threading.Event, statuses: dict[str, Counter[Any]]) -> None:
    requests = _heavy_requests()
    while not stop.is_set():
        for name, send in requests.items():
            if not stop.is_set():
                statuses.setdefault(name, Counter())[send(server)] += 1


def _heavy_requests() -> dict[str, Callable[[Any], Any]]:
    small, large = _png(256), _png(7000)
    box = {"box": [10, 10, 200, 200]}
    grid = {"points": 64, "crops": 2, "iou": 0, "stability": 0, "nms": 1}
    bodies = {
        "most points": {"image": small, "prompts": [{"points": [[n % 256, n % 199, 1] for n in range(256)]}] * 64},
        "too many points": {"image": small, "prompts": [{"points": [[n % 256, 9, 1] for n in range(45_000)]}]},
        "most prompts": {"image": small, "prompts": [box] * 4096},
        "everything": {"image": small, "everything": grid},
        "everything with its own thresholds": {"image": small, "everything": {"points": 64, "crops": 2}},
        "largest image": {"image": large, "prompts": [box] * 4},
        "everything in the largest image": {"image": large, "everything": {"points": 64, "crops": 2}},
        "most beams": {"image": small, "prompts": [box] * 64, "beams": 10, "max_new_tokens": 128},
        "10 beams of 512 tokens": {"image": small, "prompts": [box] * 64, "beams": 10, "max_new_tokens": 512},
    }
    requests: dict[str, Callable[[Any], Any]] = {}
    for name, body in bodies.items():
        content = json.dumps(body).encode()
        requests[name] = lambda server, content=content: _post(server, content)
    return {**requests, "one byte per second": _dribble, "silent connections": _keep_silent}


def _png(side: int) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _post(server: Any, content: bytes) -> int | str:
    line = HTTPConnection(server.host, server.port, timeout=PATIENCE)
    try:
        line.request("POST", "/v1/captions", content, {"Content-Type": "application/json"})
        answer = line.getresponse()
        answer.read()
        return answer.status
    except OSError as error:
        return type(error).__name__  # this client has other things to send
    finally:
        line.close()


def _dribble(server: Any) -> str:
    """Bodies at one byte per second."""
    head = b"POST /v1/captions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n"
    with contextlib.ExitStack() as opened:
        lines = [opened.enter_context(socket.create_connection((server.host, server.port))) for _ in range(50)]
        for line in lines:
            line.sendall(head)
        for _ in range(int(PATIENCE)):
            for line in lines:
                with contextlib.suppress(OSError):
                    line.sendall(b" ")
            time.sleep(1)
    return "sent"


def _keep_silent(server: Any) -> str:
    with contextlib.ExitStack() as opened:
        for _ in range(SILENT):
            opened.enter_context(socket.create_connection((server.host, server.port)))
        time.sleep(PATIENCE)
    return "sent"


def _watch(server: Any, stop: threading.Event, highest: list[int]) -> None:
    while not stop.wait(0.05):
        highest[0] = max(highest[0], server.memory())


if __name__ == "__main__":
    main()
