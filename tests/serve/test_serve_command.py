"""The command `sca serve` in a separate process."""

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from sca.cli import run_command

pytestmark = pytest.mark.slow


def start_server(*arguments):
    """Start a server in a separate process; return the process and its URL."""
    process = subprocess.Popen([sys.executable, "-m", "sca", "serve", *arguments], stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"serving sca-tiny at (http://\S+);", line):
            return process, match[1]
    raise AssertionError("".join(lines))


def request_captions(url, fields):
    request = urllib.request.Request(f"{url}/v1/captions", json.dumps(fields).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_serve_command_runs_until_interrupted(make_body):
    process, url = start_server("--port", "0", "--quiet")
    try:
        assert request_captions(url, make_body())["regions"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT, 130)
    finally:
        process.kill()


@pytest.mark.all
def test_serve_command_serves_replicas_on_ray(make_body):
    pytest.importorskip("ray.serve", reason="requires the extra ray")
    process, url = start_server("--port", "18765", "--quiet", "--launcher", "ray", "--num-replicas", "2")
    try:
        expected = request_captions(url, make_body())
        assert [request_captions(url, make_body()) for _ in range(6)] == [expected] * 6
        process.send_signal(signal.SIGINT)
        process.wait(180)
    finally:
        process.kill()


@pytest.mark.all
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "no model, captioner or folder named 'nothing'"),
        (("--device", "cuda", "--num-replicas", "100"), "100 replicas require 100 GPUs"),
        (("--num-replicas", "500"), "500 replicas require 500 cores"),
        (("--host", "256.0.0.1"), "cannot bind 256.0.0.1, port 8000"),
    ],
)
def test_serve_command_reports_ray_errors_in_one_line(arguments, message):
    pytest.importorskip("ray.serve", reason="requires the extra ray")
    command = [sys.executable, "-m", "sca", "serve", "--launcher", "ray", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 2
    assert message in completed.stderr.splitlines()[-1]
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "no model, captioner or folder named 'nothing'"),
        (("--device", "gpu9"), "device 'gpu9' is not available"),
        (("--num-replicas", "2"), "the local launcher supports 1 replica, not 2"),
        (("--launcher", "slurm"), "slurm"),
        (("--precision", "int3"), "unknown precision 'int3'. Did you mean 'int8'?"),
        (("--host", "256.0.0.1"), "cannot bind 256.0.0.1, port 8000"),
        (("--label-studio-url", "http://localhost:8080"), "require --label-studio; add it"),
        (("--label-studio", "--image-url", "images"), "the URL of --image-url is invalid; write it like"),
    ],
)
def test_serve_command_reports_errors_in_one_line(arguments, message, capfd):
    assert run_command(["serve", *arguments]) == 2
    error_output = capfd.readouterr().err.strip()
    assert message in error_output
    assert len(error_output.splitlines()) == 1


def test_docs_page_loads_no_external_files(browser):
    process, url = start_server("--port", "0", "--quiet", "--allow-origin", "https://example.org")
    try:
        page, requested_urls = browser.new_page(), []
        page.on("request", lambda request: requested_urls.append(request.url))
        page.goto(url)
        page.get_by_text("/v1/captions", exact=False).first.wait_for()
        page.close()
        assert [each for each in requested_urls if not each.startswith((url, "data:"))] == []
        origin = urllib.request.Request(f"{url}/health", headers={"Origin": "https://example.org"}, method="HEAD")
        with urllib.request.urlopen(origin) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"
    finally:
        process.terminate()
        process.wait(30)
