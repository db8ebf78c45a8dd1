"""Launcher of processes on this machine."""

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
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from sca.io.atomic import remove_drafts
from sca.launchers.signals import block_interrupts
from sca.launchers.task import Task, TaskOutcome
from sca.launchers.worker import LOG_FILE, RESULT_FILE, run_task

MAX_KILLS = 3  # kills from outside after which a task is left for another run


class _RunningTask(NamedTuple):
    """Task with its process, its GPU if any, and its start by `time.monotonic`."""

    process: BaseProcess
    task: Task
    gpu: int | None
    start_time: float


class LocalLauncher:
    """Launcher that runs each task in a process on this machine.

    Processes are forked from a fork server that only imports the modules of the tasks.

    Args:
        num_workers: Number of concurrent processes; 0 selects one per GPU, or one per two CPU cores without a GPU.

    Raises:
        ValueError: `num_workers` is negative.
    """

    def __init__(self, num_workers: int = 0):
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; use an integer of 1 or more, or 0 for the default")
        self.num_workers = num_workers

    def run_tasks(self, tasks: Sequence[Task]) -> Iterator[TaskOutcome]:
        """Run tasks and yield their outcomes as they arrive.

        A task whose process is killed from outside, for example by the out-of-memory killer, runs at most `MAX_KILLS`
        times and then has no outcome. Neither has a task that is stopped by its deadline.

        Args:
            tasks: Tasks. A task on "cuda" runs on one GPU, "cuda:N".

        Yields:
            The outcome of a task, in the order of completion.
        """
        context = get_context("forkserver")
        module_names = dict.fromkeys(task.function.partition(":")[0] for task in tasks)
        context.set_forkserver_preload(["sca.launchers.worker", *module_names])
        waiting = deque(tasks)
        running: dict[int, _RunningTask] = {}
        num_kills: dict[str, int] = {}
        devices = _list_gpus(tasks)
        num_workers = self.num_workers or len(devices) or max(1, (os.cpu_count() or 2) // 2)
        free_devices = deque(devices)
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    task = waiting.popleft()
                    if time.time() >= task.deadline:
                        continue
                    device = free_devices.popleft() if free_devices else None
                    process = _start_process(context, task, device)
                    running[process.sentinel] = _RunningTask(process, task, device, time.monotonic())
                if not running:
                    break
                self._wait_for_process(running)
                for sentinel, (process, task, device, start_time) in list(running.items()):
                    is_overdue = _compute_time_left(task, start_time) < 0
                    if process.is_alive() and not is_overdue:
                        continue
                    del running[sentinel]
                    if device is not None:
                        free_devices.append(device)
                    outcome = _collect_outcome(process, task, is_overdue, time.monotonic() - start_time)
                    if outcome is None and time.time() < task.deadline:
                        num_kills[task.key] = num_kills.get(task.key, 0) + 1
                        if num_kills[task.key] < MAX_KILLS:
                            waiting.append(task)
                    elif outcome is not None:
                        yield outcome
        finally:
            for process, *_ in running.values():
                _kill_process(process)

    @staticmethod
    def _wait_for_process(running: dict[int, _RunningTask]) -> None:
        """Wait until a process ends or is overdue."""
        seconds_left = min(_compute_time_left(each.task, each.start_time) for each in running.values())
        wait(list(running), timeout=None if math.isinf(seconds_left) else max(0.0, seconds_left))


def _compute_time_left(task: Task, start_time: float) -> float:
    """Return the seconds until a task is overdue; `start_time` is its start by `time.monotonic`."""
    return min(start_time + task.timeout - time.monotonic(), task.deadline - time.time())


def _list_gpus(tasks: Sequence[Task]) -> list[int]:
    if not any(task.config["device"].startswith("cuda") for task in tasks):
        return []
    import torch

    return list(range(torch.cuda.device_count()))


def _start_process(context: Any, task: Task, gpu: int | None) -> BaseProcess:
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    remove_drafts(folder)
    config = dict(task.config)
    if gpu is not None:
        config["device"] = f"cuda:{gpu}"
    process: BaseProcess = context.Process(target=run_task, args=(task.function, config, str(folder)), daemon=False)
    with block_interrupts():
        process.start()
    return process


def _collect_outcome(process: BaseProcess, task: Task, is_overdue: bool, elapsed: float) -> TaskOutcome | None:
    """Return the outcome of a process that ended; None if it was killed from outside or stopped by its deadline."""
    if process.is_alive() and is_overdue:
        _kill_process(process)
    process.join()
    exit_code = process.exitcode
    try:
        result = json.loads(Path(task.folder, RESULT_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        result = None
    if result is not None:
        result.setdefault("seconds", {})["process"] = elapsed
        return TaskOutcome(task, result)
    if is_overdue and time.time() >= task.deadline:
        return None
    if is_overdue:
        return TaskOutcome(
            task, _make_failure_result("timed-out", f"exceeded the timeout of {task.timeout:g} s", elapsed)
        )
    if exit_code in (-signal.SIGKILL, -signal.SIGTERM, 255):  # 255: the fork server ended
        return None
    if exit_code is not None and exit_code < 0:
        return TaskOutcome(
            task, _make_failure_result("crashed", f"ended by {signal.Signals(-exit_code).name}", elapsed)
        )
    return TaskOutcome(
        task, _make_failure_result("crashed", f"exited with status {exit_code}: {_read_last_log_line(task)}", elapsed)
    )


def _read_last_log_line(task: Task) -> str:
    """Return the last line of a task log; the last line of a traceback is the exception."""
    try:
        lines = Path(task.folder, LOG_FILE).read_text("utf-8", "replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left nothing")[:300]


def _make_failure_result(state: str, reason: str, elapsed: float) -> dict[str, Any]:
    return {"state": state, "reason": reason, "seconds": {"process": elapsed}}


def _kill_process(process: BaseProcess) -> None:
    """Kill a process and its process group."""
    pid = process.pid
    if pid is None:  # not started
        return
    for kill_function in (os.killpg, os.kill):
        try:
            kill_function(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    process.join()
