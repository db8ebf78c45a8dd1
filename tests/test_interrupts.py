"""Ctrl+C, which a terminal sends to every process of a command, ends workers without a word of their own."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from sca.launchers.signals import accept_interrupts, block_interrupts, kill_process_tree

pytestmark = pytest.mark.slow

SLEEP = "import time; print('up', flush=True); time.sleep(60)"


def test_process_started_while_interrupts_are_blocked_ignores_one():
    with block_interrupts():
        process = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.communicate()


def test_interrupt_that_comes_while_blocked_is_raised_afterwards():
    finished = []

    def interrupted():
        with block_interrupts():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            finished.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished


def test_interrupts_are_accepted_again_in_a_process_of_its_own():
    with block_interrupts():
        accept_interrupts()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_killing_a_launcher_kills_what_it_has_started():
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    kill_process_tree(process.pid)
    process.communicate()
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert gone
    assert not alive
