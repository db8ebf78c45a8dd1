"""Fails tests that start a process or connect to a network without the mark `slow`: `make quick` stays quick."""

import sys

import pytest

FORBIDDEN_EVENTS = frozenset(  # see https://docs.python.org/3/library/audit_events.html
    {
        *("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"),
        *("socket.connect", "socket.getaddrinfo"),
    }
)
ALLOWED_PROGRAMS = frozenset(
    {
        "git",  # `sca.save` records the commit
        "uname",  # libraries call `platform.processor` when they are imported
    }
)

guarded_tests = []  # the test that runs, unless it is marked


def fail_if_guarded(event, arguments):
    """Audit hook: abort a forbidden operation of a guarded test."""
    if event not in FORBIDDEN_EVENTS or not guarded_tests:
        return
    if event == "subprocess.Popen" and arguments[1][0] in ALLOWED_PROGRAMS:
        return
    pytest.fail(f"{event}{arguments[:2]!r} in a test without the mark slow; add @pytest.mark.slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Guard a test with its fixtures."""
    is_marked = item.get_closest_marker("slow") is not None or item.get_closest_marker("all") is not None
    guarded_tests[:] = [] if is_marked else [item]
    try:
        return (yield)
    finally:
        guarded_tests.clear()


sys.addaudithook(fail_if_guarded)
