"""Measure the impact of one heavy client: `python benchmarks/studies/heavy_client.py [--num-clients 16]`.

Starts `sca serve`. Some clients request one caption after another, first alone and then alongside one client that
cycles through the largest accepted requests and beyond: points, prompts, everything mode, pixels, beams, bodies at one
byte per second, and silent connections. Prints the others' latency in both phases, the response statuses of both, and
the server's memory before, at the peak, and after a pause.
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
from sca_bench.worker import collect_environment

from serving_throughput import ServerProcess, make_request_bodies, send_requests, summarize_requests

NUM_SILENT_CONNECTIONS = 600
REQUEST_TIMEOUT = 5.0  # seconds until the heavy client sends its next request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="sca-tiny", help="Model to serve.")
    parser.add_argument("--device", default="cpu", help="Device: cpu or cuda.")
    parser.add_argument("--duration", type=float, default=60.0, help="Duration with the heavy client.")
    parser.add_argument("--pause", type=float, default=60.0, help="Pause before memory is measured again.")
    parser.add_argument("--num-clients", type=int, default=16, help="Number of other clients.")
    parser.add_argument("--out", type=Path, help="JSON file for the measurements.")
    args = parser.parse_args()
    with ServerProcess(args.model, args.device) as server:
        measurements = measure_impact(server, args.num_clients, args.duration, args.pause)
    measurements["environment"] = collect_environment(args.device)
    for line in describe_measurements(measurements):
        print(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(f"{json.dumps(measurements, indent=1)}\n", "utf-8")


def measure_impact(server: Any, num_clients: int, seconds: float, pause: float) -> dict[str, Any]:
    """Measure the other clients' latency and statuses with and without the heavy client, and server memory in bytes."""
    request_bodies = make_request_bodies()
    send_requests(server, request_bodies, num_clients, 3.0)  # warm-up
    memory_before = server.get_memory()
    counts_without = send_requests(server, request_bodies, num_clients, seconds / 2)
    statuses: dict[str, Counter[Any]] = {}
    peak_memory, stop = [memory_before], threading.Event()
    threads = [
        threading.Thread(target=_run_heavy_client, args=(server, stop, statuses)),
        threading.Thread(target=_track_peak_memory, args=(server, stop, peak_memory)),
    ]
    for thread in threads:
        thread.start()
    counts_with = send_requests(server, request_bodies, num_clients, seconds)
    stop.set()
    for thread in threads:
        thread.join()
    time.sleep(pause)
    return {
        "num_clients": num_clients,
        "without_heavy_client": summarize_requests(counts_without),
        "with_heavy_client": summarize_requests(counts_with),
        "p99_ratio": summarize_requests(counts_with)["latency"]["p99"]
        / summarize_requests(counts_without)["latency"]["p99"],
        "heavy_client_statuses": {
            name: {str(status): count for status, count in each.items()} for name, each in statuses.items()
        },
        "memory": {"before": memory_before, "peak": peak_memory[0], "after": server.get_memory()},
    }


def describe_measurements(measurements: dict[str, Any]) -> Iterator[str]:
    """Yield the measurements as lines to print."""
    for name in ("without_heavy_client", "with_heavy_client"):
        summary = measurements[name]
        latency = {each: f"{1000 * value:.0f} ms" for each, value in summary["latency"].items()}
        yield (
            f"{measurements['num_clients']} clients {name.replace('_', ' ')}: "
            f"{summary['requests_per_second']:.1f} requests/s, median {latency['median']}, p99 {latency['p99']}, "
            f"{summary['num_failed']} failed"
        )
    yield f"p99 latency with the heavy client: {measurements['p99_ratio']:.1f}x"
    yield f"responses to the heavy client: {measurements['heavy_client_statuses']}"
    yield "server memory (MiB): " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in measurements["memory"].items())


def _run_heavy_client(server: Any, stop: threading.Event, statuses: dict[str, Counter[Any]]) -> None:
    requests = _make_heavy_requests()
    while not stop.is_set():
        for name, send in requests.items():
            if not stop.is_set():
                statuses.setdefault(name, Counter())[send(server)] += 1


def _make_heavy_requests() -> dict[str, Callable[[Any], Any]]:
    small, large = _encode_png(256), _encode_png(7000)
    box = {"box": [10, 10, 200, 200]}
    default_grid = {"points_per_side": 64, "crop_n_layers": 2}
    grid = {
        "points_per_side": 64,
        "crop_n_layers": 2,
        "pred_iou_thresh": 0,
        "stability_score_thresh": 0,
        "box_nms_thresh": 1,
    }
    request_tables = {
        "most points": {"image": small, "prompts": [{"points": [[n % 256, n % 199, 1] for n in range(256)]}] * 64},
        "too many points": {"image": small, "prompts": [{"points": [[n % 256, 9, 1] for n in range(45_000)]}]},
        "most prompts": {"image": small, "prompts": [box] * 4096},
        "everything": {"image": small, "everything": grid},
        "everything with its own thresholds": {"image": small, "everything": default_grid},
        "largest image": {"image": large, "prompts": [box] * 4},
        "everything in the largest image": {"image": large, "everything": default_grid},
        "most beams": {"image": small, "prompts": [box] * 64, "num_beams": 10, "max_new_tokens": 128},
        "10 beams of 512 tokens": {"image": small, "prompts": [box] * 64, "num_beams": 10, "max_new_tokens": 512},
    }
    requests: dict[str, Callable[[Any], Any]] = {}
    for name, body in request_tables.items():
        content = json.dumps(body).encode()
        requests[name] = lambda server, content=content: _post_request(server, content)
    return {**requests, "one byte per second": _send_slow_bodies, "silent connections": _hold_silent_connections}


def _encode_png(side: int) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _post_request(server: Any, content: bytes) -> int | str:
    connection = HTTPConnection(server.host, server.port, timeout=REQUEST_TIMEOUT)
    try:
        connection.request("POST", "/v1/captions", content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    except OSError as error:
        return type(error).__name__  # the heavy client continues with its next request
    finally:
        connection.close()


def _send_slow_bodies(server: Any) -> str:
    """Send bodies at one byte per second."""
    head = b"POST /v1/captions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(50)]
        for connection in connections:
            connection.sendall(head)
        for _ in range(int(REQUEST_TIMEOUT)):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(b" ")
            time.sleep(1)
    return "sent"


def _hold_silent_connections(server: Any) -> str:
    with contextlib.ExitStack() as stack:
        for _ in range(NUM_SILENT_CONNECTIONS):
            stack.enter_context(socket.create_connection((server.host, server.port)))
        time.sleep(REQUEST_TIMEOUT)
    return "sent"


def _track_peak_memory(server: Any, stop: threading.Event, peak_memory: list[int]) -> None:
    while not stop.wait(0.05):
        peak_memory[0] = max(peak_memory[0], server.get_memory())


if __name__ == "__main__":
    main()
