"""Ctrl+C, which a terminal sends to every process of a command, ends workers without output."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from sca.launchers.signals import accept_interrupts, block_interrupts, kill_process_tree

pytestmark = pytest.mark.slow

SLEEP_PROGRAM = "import time; print('up', flush=True); time.sleep(60)"


def test_block_interrupts_makes_child_process_ignore_sigint():
    with block_interrupts():
        process = subprocess.Popen([sys.executable, "-c", SLEEP_PROGRAM], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.communicate()


def test_block_interrupts_raises_pending_interrupt_on_exit():
    finished = []

    def raise_interrupt_while_blocked():
        with block_interrupts():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            finished.append(True)

    original_handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            raise_interrupt_while_blocked()
    finally:
        signal.signal(signal.SIGINT, original_handler)
    assert finished


def test_accept_interrupts_unblocks_sigint():
    with block_interrupts():
        accept_interrupts()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_kill_process_tree_kills_child_processes():
    launcher_program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP_PROGRAM!r}])"
    process = subprocess.Popen([sys.executable, "-c", launcher_program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    child_processes = psutil.Process(process.pid).children(recursive=True)
    assert child_processes
    kill_process_tree(process.pid)
    process.communicate()
    ended, alive = psutil.wait_procs(child_processes, timeout=5)
    assert ended
    assert not alive
