"""Tasks on a Ray cluster (arXiv 1712.05889)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sca.launchers.child import LOG
from sca.launchers.local import Local
from sca.launchers.task import Outcome, Task
from sca.serve.listening import bound

if TYPE_CHECKING:
    from sca.serve.hosted import Hosted

RETRIES = 3  # of a task whose node was lost


class Ray:
    """Launcher: every task goes to a node that has the GPUs and the memory it asks for, and `cores`.

    address: of a cluster ("auto": the one that this machine belongs to); None starts one on this machine. The package
    must be installed on the nodes; what is made and logs travel back, so that nothing but the network is shared.
    """

    def __init__(self, address: str | None = None, cores: int = 1):
        if cores < 1:
            raise ValueError(f"cores is {cores}: give 1 or more, what a task takes of a node")
        self.address, self.cores = address, cores

    def map(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        import ray

        started = not ray.is_initialized()
        if started:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        try:
            remote = ray.remote(max_retries=RETRIES)(_make)
            waiting = {
                remote.options(num_cpus=self.cores, num_gpus=task.gpus, memory=int(task.memory * 2**30) or None).remote(
                    task
                ): task
                for task in tasks
            }
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                task = waiting.pop(ready)
                try:
                    made, log = ray.get(ready)
                except ray.exceptions.RayError as error:
                    made = _lost(error)
                    log = f"{made['reason']}\n" if made else ""
                if made is not None:
                    Path(task.folder).mkdir(parents=True, exist_ok=True)
                    Path(task.folder, LOG).write_text(log, "utf-8")
                    yield Outcome(task, made)
        finally:
            if started:
                ray.shutdown()

    def serve(self, hosted: Hosted, host: str, port: int, replicas: int, report: Callable[[str], None]) -> None:
        """Serves copies of the model with Ray Serve until it is interrupted: at every node, requests go to any copy.

        ValueError for an address that cannot be had, and whatever is wrong with the model, as where it is built.
        """
        import ray

        if self.address is None:  # on this machine, where it can be seen beforehand
            with bound(host, port) as door:
                port = door.getsockname()[1]
        started = not ray.is_initialized()
        if started:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        from ray import serve

        needs = {"num_cpus": self.cores, "num_gpus": int(hosted.device.startswith("cuda"))}

        def application() -> Any:  # without parameters: Ray takes any other function for the application itself
            return hosted.application()

        try:
            if self.address is None:  # another cluster may grow
                _fits(needs, replicas, ray.cluster_resources())
            ray.get(ray.remote(**needs)(_tried).remote(hosted))
            serve.start(http_options={"host": host, "port": port})
            copies = serve.deployment(
                num_replicas=replicas,
                ray_actor_options=needs,
                max_ongoing_requests=hosted.clients,
            )(serve.ingress(application)())
            serve.run(copies.bind(), name="sca")
            report(f"http://{host}:{port}")
            while True:
                time.sleep(3600)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            serve.shutdown()
            if started:
                ray.shutdown()


def _fits(needs: Mapping[str, int], replicas: int, there: Mapping[str, float]) -> None:
    """ValueError for replicas that would wait forever for cores or GPUs."""
    for name, kind in (("GPUs", "GPU"), ("cores", "CPU")):
        asked, had = replicas * needs[f"num_{kind.lower()}s"], int(there.get(kind, 0))
        if asked > had:
            raise ValueError(
                f"{replicas} replicas need {asked} {name} and this machine has {had}: ask for fewer, or name a cluster "
                "with 'ray address=...'"
            )


def _tried(hosted: Hosted) -> None:
    """On a node: a mistake in the model is told before anybody is let in, in its own words."""
    hosted.captioner()


def _make(task: Task) -> tuple[dict[str, Any] | None, str]:
    """On the node: a process of its own as on any machine, so that its end is typed there."""
    with tempfile.TemporaryDirectory(prefix="sca-") as folder:
        outcomes = list(Local(workers=1).map([replace(task, folder=folder)]))
        log = Path(folder, LOG)
        return (outcomes[0].made if outcomes else None), log.read_text("utf-8", "replace") if log.is_file() else ""


def _lost(error: Exception) -> Mapping[str, Any] | None:
    """A task that Ray gave up; None where nodes were lost, which says nothing about it."""
    import ray

    gone = (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError)
    if isinstance(error, gone):
        return None
    return {"state": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "seconds": {}}
