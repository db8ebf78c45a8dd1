"""`sca serve` as it is started."""

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from sca.cli import run_command

pytestmark = pytest.mark.slow


def begin(*arguments):
    """A server in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, "-m", "sca", "serve", *arguments], stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"answers at (http://\S+);", line):
            return process, found[1]
    raise AssertionError("".join(said))


def ask(address, fields):
    asked = urllib.request.Request(f"{address}/v1/captions", json.dumps(fields).encode(), method="POST")
    asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def test_it_serves_until_it_is_interrupted(asked):
    process, address = begin("--port", "0", "--quiet")
    try:
        assert ask(address, asked())["regions"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT, 130)
    finally:
        process.kill()


@pytest.mark.all
def test_copies_are_served_on_ray(asked):
    pytest.importorskip("ray.serve", reason="needs the extra ray")
    process, address = begin("--port", "18765", "--quiet", "--launcher", "ray", "--num-replicas", "2")
    try:
        alone = ask(address, asked())
        assert [ask(address, asked()) for _ in range(6)] == [alone] * 6
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()


@pytest.mark.all
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nothing"), "no model or captioner named 'nothing'"),
        (("--device", "cuda", "--num-replicas", "100"), "100 replicas need 100 GPUs"),
        (("--num-replicas", "500"), "500 replicas need 500 cores"),
        (("--host", "256.0.0.1"), "cannot listen at 256.0.0.1, port 8000"),
    ],
)
def test_a_mistake_is_told_by_ray_as_well(arguments, words):
    pytest.importorskip("ray.serve", reason="needs the extra ray")
    command = [sys.executable, "-m", "sca", "serve", "--launcher", "ray", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert words in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nothing"), "no model or captioner named 'nothing'"),
        (("--device", "gpu9"), "device 'gpu9' is not available"),
        (("--num-replicas", "2"), "the local launcher serves one replica of a model, not 2"),
        (("--launcher", "slurm"), "slurm"),
        (("--dtype", "int3"), "no dtype 'int3'"),
        (("--host", "256.0.0.1"), "cannot listen at 256.0.0.1, port 8000"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capfd):
    assert run_command(["serve", *arguments]) == 2
    said = capfd.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1


def test_the_page_of_its_fields_is_there_and_loads_nothing_from_elsewhere(browser):
    process, address = begin("--port", "0", "--quiet", "--allow-origin", "https://example.org")
    try:
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_text("/v1/captions", exact=False).first.wait_for()
        page.close()
        assert [url for url in asked if not url.startswith((address, "data:"))] == []
        origin = urllib.request.Request(f"{address}/health", headers={"Origin": "https://example.org"}, method="HEAD")
        with urllib.request.urlopen(origin) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    finally:
        process.terminate()
        process.wait(30)
