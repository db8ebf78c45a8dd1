"""Launcher of tasks on a Ray cluster (arXiv 1712.05889)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sca.launchers.local import LocalLauncher
from sca.launchers.task import Task, TaskOutcome
from sca.launchers.worker import LOG_FILE

MAX_RETRIES = 3  # per task, if its node is lost


class RayLauncher:
    """Launcher that runs each task on a node of a Ray cluster with the required GPUs, memory and cores.

    The package must be installed on every node. Results and logs are sent back over the network; no shared file system
    is needed.

    Args:
        address: Address of the cluster, "auto" for the cluster of this machine; None starts one on this machine.
        num_cpus: CPU cores per task.

    Raises:
        ValueError: `num_cpus` is less than 1.
    """

    def __init__(self, address: str | None = None, num_cpus: int = 1):
        if num_cpus < 1:
            raise ValueError(f"num_cpus is {num_cpus}; use an integer of 1 or more")
        self.address = address
        self.num_cpus = num_cpus

    def run_tasks(self, tasks: Sequence[Task]) -> Iterator[TaskOutcome]:
        """Run tasks and yield their outcomes as they arrive. Tasks whose nodes were lost have no outcome."""
        import ray

        started_ray = not ray.is_initialized()
        if started_ray:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        try:
            run_remotely = ray.remote(max_retries=MAX_RETRIES)(_run_on_node)
            tasks_by_reference = {
                run_remotely.options(
                    num_cpus=self.num_cpus, num_gpus=task.num_gpus, memory=int(task.memory_gib * 2**30) or None
                ).remote(task): task
                for task in tasks
            }
            while tasks_by_reference:
                (finished_reference,), _ = ray.wait(list(tasks_by_reference), num_returns=1)
                task = tasks_by_reference.pop(finished_reference)
                try:
                    result, log = ray.get(finished_reference)
                except ray.exceptions.RayError as error:
                    result = _make_error_result(error)
                    log = f"{result['reason']}\n" if result else ""
                if result is not None:
                    Path(task.folder).mkdir(parents=True, exist_ok=True)
                    Path(task.folder, LOG_FILE).write_text(log, "utf-8")
                    yield TaskOutcome(task, result)
        finally:
            if started_ray:
                ray.shutdown()


def _run_on_node(task: Task) -> tuple[dict[str, Any] | None, str]:
    """Run a task with `LocalLauncher`, which classifies how its process ends; return the result and the log."""
    with tempfile.TemporaryDirectory(prefix="sca-") as folder:
        outcomes = list(LocalLauncher(num_workers=1).run_tasks([replace(task, folder=folder)]))
        log = Path(folder, LOG_FILE)
        return (outcomes[0].result if outcomes else None), log.read_text("utf-8", "replace") if log.is_file() else ""


def _make_error_result(error: Exception) -> Mapping[str, Any] | None:
    """Return the result of a task that failed in Ray; None if its node was lost, which does not concern the task."""
    import ray

    node_loss_errors = (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError)
    if isinstance(error, node_loss_errors):
        return None
    return {"state": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "seconds": {}}
