"""Ctrl+C, which a terminal sends to a command and to every process that it has started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Block SIGINT, for processes that are started meanwhile as well: the caller ends those processes itself.

    An interrupt that this thread receives meanwhile is raised at the end.
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
    """Undo `block_interrupts` in a process that was started meanwhile and has left the terminal's process group."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def kill_process_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in processes:
        with suppress(psutil.NoSuchProcess):
            member.kill()
