"""Tasks on a Ray cluster (arXiv 1712.05889)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sca.launchers.local import Local
from sca.launchers.task import Task, TaskOutcome
from sca.launchers.worker import LOG_FILE

MAX_RETRIES = 3  # of a task whose node was lost


class Ray:
    """Launcher: every task goes to a node that has the GPUs and the memory it asks for, and `cores`.

    address: of a cluster ("auto": the one that this machine belongs to); None starts one on this machine. The package
    must be installed on the nodes; what is made and logs travel back, so that nothing but the network is shared.
    """

    def __init__(self, address: str | None = None, cores: int = 1):
        if cores < 1:
            raise ValueError(f"cores is {cores}: give 1 or more, what a task takes of a node")
        self.address, self.cores = address, cores

    def map(self, tasks: Sequence[Task]) -> Iterator[TaskOutcome]:
        import ray

        started_ray = not ray.is_initialized()
        if started_ray:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        try:
            run_remotely = ray.remote(max_retries=MAX_RETRIES)(_run_on_node)
            tasks_by_reference = {
                run_remotely.options(
                    num_cpus=self.cores, num_gpus=task.num_gpus, memory=int(task.memory_gib * 2**30) or None
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
    """On the node: a process of its own as on any machine, so that its end is typed there."""
    with tempfile.TemporaryDirectory(prefix="sca-") as folder:
        outcomes = list(Local(num_workers=1).map([replace(task, folder=folder)]))
        log = Path(folder, LOG_FILE)
        return (outcomes[0].result if outcomes else None), log.read_text("utf-8", "replace") if log.is_file() else ""


def _make_error_result(error: Exception) -> Mapping[str, Any] | None:
    """A task that Ray gave up; None where nodes were lost, which says nothing about it."""
    import ray

    node_loss_errors = (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError)
    if isinstance(error, node_loss_errors):
        return None
    return {"state": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "seconds": {}}
