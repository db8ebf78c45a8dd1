"""How much faster many clients are answered than one: `python benchmarks/studies/serving.py [--clients 32]`.

Starts `sca serve`, asks it for one caption after another, then from many clients at once for as long, of the same
drawn scenes; prints requests a second of both, their ratio, how long a request took, and the memory of the server.
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

from sca_bench.worker import environment

from sca.io.atomic import write_file

IMAGES = 24


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--model", default="sca-tiny")
    arguments.add_argument("--seconds", type=float, default=120.0, help="of the many; a quarter of it for the one")
    arguments.add_argument("--clients", type=int, default=32)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--out", type=Path, help="a file for what was measured")
    given = arguments.parse_args()
    bodies = _bodies()
    with _Server(given.model, given.device) as server:
        _ask(server, bodies, 1, 3.0)  # to warm up
        one = _ask(server, bodies, 1, given.seconds / 4)
        before = server.memory()
        halves = [_ask(server, bodies, given.clients, given.seconds / 2), server.memory()]
        halves += [_ask(server, bodies, given.clients, given.seconds / 2), server.memory()]
    many = {name: halves[0][name] + halves[2][name] for name in ("answered", "failed", "seconds")}
    many["latencies"] = halves[0]["latencies"] + halves[2]["latencies"]
    found = {
        "one": _told(one),
        "many": {"clients": given.clients, **_told(many)},
        "ratio": _rate(many) / _rate(one),
        "memory": {"before": before, "half way": halves[1], "after": halves[3]},
        "environment": environment(given.device),
    }
    print(f"one client: {_rate(one):.1f} requests/s, {median(one['latencies']) * 1000:.0f} ms each")
    print(
        f"{given.clients} clients: {_rate(many):.1f} requests/s, {median(many['latencies']) * 1000:.0f} ms each, "
        f"{many['failed']} failed: {found['ratio']:.2f} times as many"
    )
    print("memory of the server, MiB: " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in found["memory"].items()))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(given.out, f"{json.dumps(found, indent=1)}\n")


def _bodies() -> list[bytes]:
    """A request for one region of each of some scenes."""
    from sca.data.scenes import Scenes

    bodies = []
    for sample in map(Scenes("test", count=IMAGES).__getitem__, range(IMAGES)):
        file = io.BytesIO()
        sample.image.save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        bodies += [
            json.dumps({"image": image, "prompts": [{"box": region.box}]}).encode() for region in sample.regions[:2]
        ]
    return bodies


class _Server:
    """`sca serve` in a process of its own."""

    def __init__(self, model: str, device: str):
        command = [sys.executable, "-m", "sca", "serve", "--model", model, "--device", device, "--port", "0", "--quiet"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> _Server:
        for line in self.process.stderr:
            if found := re.search(r"http://([\d.]+):(\d+)", line):
                self.host, self.port = found[1], int(found[2])
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
        raise SystemExit("the server does not answer")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()

    def memory(self) -> int:
        """Bytes in memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def _ask(server: _Server, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients got in that time, each asking again as soon as it has its answer."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    failed = [0] * clients
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        line = http.client.HTTPConnection(server.host, server.port, timeout=60)
        place = number
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                line.request("POST", "/v1/captions", bodies[place % len(bodies)], {"Content-Type": "application/json"})
                answer = line.getresponse()
                whole = json.loads(answer.read())
                good = answer.status == 200 and len(whole["regions"]) == 1
            except (OSError, http.client.HTTPException):
                good = False
                line.close()  # the next request opens it again
            if good:
                latencies[number].append(time.monotonic() - start)
            else:
                failed[number] += 1
            place += clients

    start = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    each = [latency for one in latencies for latency in one]
    return {"answered": len(each), "failed": sum(failed), "seconds": time.monotonic() - start, "latencies": each}


def _rate(found: dict[str, Any]) -> float:
    return found["answered"] / found["seconds"]


def _told(found: dict[str, Any]) -> dict[str, Any]:
    latencies = sorted(found["latencies"])
    return {
        "answered": found["answered"],
        "failed": found["failed"],
        "seconds": found["seconds"],
        "requests_per_second": _rate(found),
        "latency": {"median": median(latencies), "p99": latencies[int(0.99 * len(latencies))]},
    }


if __name__ == "__main__":
    main()
