"""Measure the speedup of concurrent clients: `python benchmarks/studies/serving_throughput.py [--num-clients 32]`.

Starts `sca serve` and requests captions of the same generated scenes, first one after another and then from many
clients at once for the same time. Prints requests per second of both, their ratio, the latency, and the server's
memory.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from sca_bench.worker import collect_environment

from sca.io.atomic import write_file

NUM_IMAGES = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="sca-tiny", help="Model to serve.")
    parser.add_argument(
        "--duration", type=float, default=120.0, help="Duration with all clients; a quarter of it with one."
    )
    parser.add_argument("--num-clients", type=int, default=32, help="Number of concurrent clients.")
    parser.add_argument("--device", default="cpu", help="Device: cpu or cuda.")
    parser.add_argument("--out", type=Path, help="JSON file for the measurements.")
    args = parser.parse_args()
    request_bodies = make_request_bodies()
    with ServerProcess(args.model, args.device) as server:
        send_requests(server, request_bodies, 1, 3.0)  # warm-up
        single_client = send_requests(server, request_bodies, 1, args.duration / 4)
        memory_before = server.get_memory()
        halves = [send_requests(server, request_bodies, args.num_clients, args.duration / 2), server.get_memory()]
        halves += [send_requests(server, request_bodies, args.num_clients, args.duration / 2), server.get_memory()]
    many_clients = {name: halves[0][name] + halves[2][name] for name in ("num_completed", "num_failed", "seconds")}
    many_clients["latencies"] = halves[0]["latencies"] + halves[2]["latencies"]
    measurements = {
        "single_client": summarize_requests(single_client),
        "multiple_clients": {"num_clients": args.num_clients, **summarize_requests(many_clients)},
        "speedup": compute_request_rate(many_clients) / compute_request_rate(single_client),
        "memory": {"before": memory_before, "halfway": halves[1], "after": halves[3]},
        "environment": collect_environment(args.device),
    }
    print(
        f"1 client: {compute_request_rate(single_client):.1f} requests/s, "
        f"{median(single_client['latencies']) * 1000:.0f} ms each"
    )
    print(
        f"{args.num_clients} clients: {compute_request_rate(many_clients):.1f} requests/s, "
        f"{median(many_clients['latencies']) * 1000:.0f} ms each, {many_clients['num_failed']} failed; "
        f"speedup {measurements['speedup']:.2f}x"
    )
    print("server memory (MiB): " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in measurements["memory"].items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, f"{json.dumps(measurements, indent=1)}\n")


def make_request_bodies() -> list[bytes]:
    """Return request bodies for one region of each of several scenes."""
    from sca.data.scenes import Scenes

    request_bodies = []
    for sample in map(Scenes("test", num_images=NUM_IMAGES).__getitem__, range(NUM_IMAGES)):
        file = io.BytesIO()
        sample.image.save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        request_bodies += [
            json.dumps({"image": image, "prompts": [{"box": region.box}]}).encode() for region in sample.regions[:2]
        ]
    return request_bodies


class ServerProcess:
    """Context manager that runs `sca serve` in a separate process."""

    def __init__(self, model: str, device: str):
        command = [sys.executable, "-m", "sca", "serve", "--model", model, "--device", device, "--port", "0", "--quiet"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> ServerProcess:
        for line in self.process.stderr:
            if match := re.search(r"http://([\d.]+):(\d+)", line):
                self.host, self.port = match[1], int(match[2])
                break
        else:
            raise SystemExit("the server did not start")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                line = http.client.HTTPConnection(self.host, self.port, timeout=5)
                line.request("GET", "/health")
                if line.getresponse().status == 200:
                    return self
            except OSError:
                time.sleep(0.1)
        raise SystemExit("the server does not respond")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()

    def get_memory(self) -> int:
        """Return the resident memory in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def send_requests(
    server: ServerProcess, request_bodies: list[bytes], num_clients: int, seconds: float
) -> dict[str, Any]:
    """Send requests from concurrent clients, each continuing as soon as it has a response.

    Args:
        server: The server.
        request_bodies: JSON bodies, sent in turn.
        num_clients: Concurrent clients.
        seconds: Duration.

    Returns:
        Counts of completed and failed requests, the duration, and the latencies in seconds.
    """
    latencies: list[list[float]] = [[] for _ in range(num_clients)]
    failures = [0] * num_clients
    end = time.monotonic() + seconds

    def run_client(client_index: int) -> None:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        index = client_index
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                connection.request(
                    "POST",
                    "/v1/captions",
                    request_bodies[index % len(request_bodies)],
                    {"Content-Type": "application/json"},
                )
                response = connection.getresponse()
                content = json.loads(response.read())
                is_valid = response.status == 200 and len(content["regions"]) == 1
            except (OSError, http.client.HTTPException):
                is_valid = False
                connection.close()  # the next request reconnects
            if is_valid:
                latencies[client_index].append(time.monotonic() - start)
            else:
                failures[client_index] += 1
            index += num_clients

    start = time.monotonic()
    threads = [threading.Thread(target=run_client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    all_latencies = [latency for one in latencies for latency in one]
    return {
        "num_completed": len(all_latencies),
        "num_failed": sum(failures),
        "seconds": time.monotonic() - start,
        "latencies": all_latencies,
    }


def compute_request_rate(counts: dict[str, Any]) -> float:
    """Return completed requests per second."""
    return counts["num_completed"] / counts["seconds"]


def summarize_requests(counts: dict[str, Any]) -> dict[str, Any]:
    """Return counts, request rate, and median and 99th-percentile latency in seconds."""
    latencies = sorted(counts["latencies"])
    return {
        "num_completed": counts["num_completed"],
        "num_failed": counts["num_failed"],
        "seconds": counts["seconds"],
        "requests_per_second": compute_request_rate(counts),
        "latency": {"median": median(latencies), "p99": latencies[int(0.99 * len(latencies))]},
    }


if __name__ == "__main__":
    main()
