"""Tasks on this machine: a process each, some at a time."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from sca.io.atomic import remove_drafts
from sca.launchers.child import LOG, MADE, child
from sca.launchers.interrupts import block_interrupts
from sca.launchers.task import Outcome, Task

KILLED = 3  # times that a process may be killed from outside before its task is left for another run


class Local:
    """Launcher: `workers` processes at a time; by default one a GPU, or one for two cores where there is no GPU.

    Processes are forked from one that has imported what the jobs are in, and has done nothing with it.
    """

    def __init__(self, workers: int = 0):
        if workers < 0:
            raise ValueError(f"workers is {workers}: give a number, 0 for as many as suit the machine")
        self.workers = workers

    def map(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Outcomes as they come. A process that was killed from outside is started again, at most `KILLED` times."""
        context = get_context("forkserver")
        jobs = dict.fromkeys(task.job.partition(":")[0] for task in tasks)
        context.set_forkserver_preload(["sca.launchers.child", *jobs])
        waiting, running = deque(tasks), {}
        times: dict[str, int] = {}
        devices = _devices(tasks)
        workers = self.workers or len(devices) or max(1, (os.cpu_count() or 2) // 2)
        free = deque(devices or range(workers))
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    task = waiting.popleft()
                    if time.time() >= task.deadline:
                        continue
                    device = free.popleft() if free else None
                    process = _start(context, task, device if devices else None)
                    running[process.sentinel] = process, task, device, time.monotonic()
                if not running:
                    break
                self._pause(running)
                for sentinel, (process, task, device, start) in list(running.items()):
                    overdue = _time_left(task, start) < 0
                    if process.is_alive() and not overdue:
                        continue
                    del running[sentinel]
                    free.append(device)
                    outcome = _outcome(process, task, overdue, time.monotonic() - start)
                    if outcome is None and time.time() < task.deadline:
                        times[task.key] = times.get(task.key, 0) + 1
                        if times[task.key] < KILLED:
                            waiting.append(task)
                    elif outcome is not None:
                        yield outcome
        finally:
            for process, *_ in running.values():
                _end(process)

    @staticmethod
    def _pause(running: dict[int, Any]) -> None:
        """Until a process ends or is overdue."""
        left = min(_time_left(task, start) for _, task, _, start in running.values())
        wait(list(running), timeout=None if math.isinf(left) else max(0.0, left))


def _time_left(task: Task, start: float) -> float:
    """Seconds until a task is overdue. start: when its process was started, by the monotonic clock."""
    return min(start + task.timeout - time.monotonic(), task.deadline - time.time())


def _devices(tasks: Sequence[Task]) -> list[int]:
    if not any(task.config["device"].startswith("cuda") for task in tasks):
        return []
    import torch

    return list(range(torch.cuda.device_count()))


def _start(context: Any, task: Task, gpu: int | None) -> Any:
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE).unlink(missing_ok=True)
    remove_drafts(folder)
    config = dict(task.config)
    if gpu is not None:
        config["device"] = f"cuda:{gpu}"
    process = context.Process(target=child, args=(task.job, config, str(folder)), daemon=False)
    with block_interrupts():
        process.start()
    return process


def _outcome(process: Any, task: Task, overdue: bool, seconds: float) -> Outcome | None:
    """What became of a process that ended; None if it was killed from outside, which says nothing about the task."""
    if process.is_alive() and overdue:
        _end(process)
    process.join()
    code = process.exitcode
    try:
        made = json.loads(Path(task.folder, MADE).read_text("utf-8"))
    except (OSError, ValueError):
        made = None
    if made is not None:
        made.setdefault("seconds", {})["process"] = seconds
        return Outcome(task, made)
    if overdue and time.time() >= task.deadline:
        return None
    if overdue:
        return Outcome(task, _typed("timed-out", f"it took more than {task.timeout:g} s", seconds))
    if code in (-signal.SIGKILL, -signal.SIGTERM, 255):  # 255: the process that it was forked from is gone
        return None
    if code is not None and code < 0:
        return Outcome(task, _typed("crashed", f"ended by {signal.Signals(-code).name}", seconds))
    return Outcome(task, _typed("crashed", f"ended with status {code}: {_last_words(task)}", seconds))


def _last_words(task: Task) -> str:
    """The last line of a task's log, which of a traceback is the exception."""
    try:
        lines = Path(task.folder, LOG).read_text("utf-8", "replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left nothing")[:300]


def _typed(state: str, reason: str, seconds: float) -> dict[str, Any]:
    return {"state": state, "reason": reason, "seconds": {"process": seconds}}


def _end(process: Any) -> None:
    """The process and what it has started."""
    for kill in (os.killpg, os.kill):
        try:
            kill(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    process.join()
