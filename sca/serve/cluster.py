"""Copies of a model on a Ray cluster (arXiv 1712.05889)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sca.serve.hosted import Hosted
from sca.serve.listening import bound


def serve_on_ray(
    hosted: Hosted,
    host: str,
    port: int,
    replicas: int,
    report: Callable[[str], None],
    address: str | None = None,
    cores: int = 1,
) -> None:
    """Serve copies of a model with Ray Serve until interrupted; every node passes requests to any copy.

    Args:
        hosted: The model, and how to serve it.
        host: The address to listen at, on every node.
        port: 0 for any free port, on this machine alone.
        replicas: Copies of the model.
        report: Called with the URL.
        address: Of a cluster; None starts one on this machine.
        cores: CPU cores of a copy.

    Raises:
        ValueError: The address cannot be listened at, or there are too few cores or GPUs; and what `hosted.captioner`
            raises.
    """
    import ray

    if address is None:  # on this machine, where it can be seen beforehand
        with bound(host, port) as listening:
            port = listening.getsockname()[1]
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    from ray import serve

    needs = {"num_cpus": cores, "num_gpus": int(hosted.device.startswith("cuda"))}

    def application() -> Any:  # without parameters: Ray takes any other function for the application itself
        return hosted.application()

    try:
        if address is None:  # another cluster may grow
            _check_fits(needs, replicas, ray.cluster_resources())
        ray.get(ray.remote(**needs)(_load).remote(hosted))
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


def _check_fits(needs: Mapping[str, int], replicas: int, resources: Mapping[str, float]) -> None:
    """Raise ValueError for replicas that would wait forever for cores or GPUs."""
    for name, kind in (("GPUs", "GPU"), ("cores", "CPU")):
        asked, available = replicas * needs[f"num_{kind.lower()}s"], int(resources.get(kind, 0))
        if asked > available:
            raise ValueError(
                f"{replicas} replicas need {asked} {name} and this machine has {available}: ask for fewer, or name a "
                "cluster with 'ray address=...'"
            )


def _load(hosted: Hosted) -> None:
    """Load the model on a node, so that its errors are raised before the server starts."""
    hosted.captioner()
