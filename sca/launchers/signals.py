"""Handling of Ctrl+C, which a terminal sends to a command and to all its child processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Block SIGINT in a `with` block, also for processes that are started in it; the caller must end those.

    An interrupt that arrives during the block is raised at its end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def accept_interrupts() -> None:
    """Undo `block_interrupts` in a process that was started in it and has left the process group of the terminal."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def kill_process_tree(pid: int) -> None:
    """Kill a process and all its descendants."""
    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in processes:
        with suppress(psutil.NoSuchProcess):
            member.kill()
