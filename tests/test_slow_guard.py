"""tests/slow_guard.py: processes and connections fail tests without the mark `slow`."""

import os
import socket
import subprocess
import sys

import pytest


def test_guard_rejects_a_process():
    with pytest.raises(pytest.fail.Exception, match=r"subprocess\.Popen.* without the mark slow"):
        subprocess.run([sys.executable, "--version"], check=True)


def test_guard_rejects_a_connection():
    with socket.socket() as client, pytest.raises(pytest.fail.Exception, match=r"socket\.connect"):
        client.connect(("127.0.0.1", 9))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_guard_rejects_a_fork():
    with pytest.raises(pytest.fail.Exception, match=r"os\.fork"):
        os.fork()


@pytest.fixture(scope="module")
def rejected_process():
    with pytest.raises(pytest.fail.Exception) as failure:
        subprocess.run([sys.executable, "--version"], check=True)
    return failure


def test_guard_covers_fixtures_of_modules(rejected_process):
    assert "mark slow" in str(rejected_process.value)


@pytest.mark.slow
def test_guard_passes_marked_tests():
    assert subprocess.run([sys.executable, "--version"], capture_output=True, check=True).stdout.startswith(b"Python")
