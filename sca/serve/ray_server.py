"""Server with model replicas on a Ray cluster (arXiv 1712.05889)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sca.serve.config import ServerConfig
from sca.serve.sockets import bind_socket


def serve_on_ray(
    config: ServerConfig,
    host: str,
    port: int,
    num_replicas: int,
    on_ready: Callable[[str], None],
    address: str | None = None,
    num_cpus: int = 1,
) -> None:
    """Serve replicas of a model with Ray Serve until interrupted. Every node routes requests to all replicas.

    Args:
        config: Configuration of the server.
        host: Address to bind on every node.
        port: Port to bind; 0 selects a free port, if `address` is None.
        num_replicas: Number of model replicas.
        on_ready: Function called with the URL of the server.
        address: Address of a Ray cluster; None starts one on this machine.
        num_cpus: CPU cores per replica.

    Raises:
        ValueError: The address cannot be bound, the machine has too few cores or GPUs, or the model cannot be loaded.
    """
    import ray

    if address is None:  # check the port before starting Ray; only possible on this machine
        with bind_socket(host, port) as bound_socket:
            port = bound_socket.getsockname()[1]
    started_ray = not ray.is_initialized()
    if started_ray:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    from ray import serve

    num_gpus = int(config.device.startswith("cuda"))
    actor_resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def create_app() -> Any:  # Ray treats a function with parameters as the application itself
        return config.create_app()

    try:
        if address is None:  # other clusters can scale up
            _check_cluster_capacity(actor_resources, num_replicas, ray.cluster_resources())
        ray.get(ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_load_captioner).remote(config))
        serve.start(http_options={"host": host, "port": port})
        deployment = serve.deployment(
            num_replicas=num_replicas,
            ray_actor_options=actor_resources,
            max_ongoing_requests=config.max_connections,
        )(serve.ingress(create_app)())
        serve.run(deployment.bind(), name="sca")
        on_ready(f"http://{host}:{port}")
        while True:
            time.sleep(3600)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        serve.shutdown()
        if started_ray:
            ray.shutdown()


def _check_cluster_capacity(
    actor_resources: Mapping[str, int], num_replicas: int, cluster_resources: Mapping[str, float]
) -> None:
    """Raise ValueError if the replicas would wait forever for cores or GPUs."""
    for label, resource in (("GPUs", "GPU"), ("cores", "CPU")):
        required, available = (
            num_replicas * actor_resources[f"num_{resource.lower()}s"],
            int(cluster_resources.get(resource, 0)),
        )
        if required > available:
            raise ValueError(
                f"{num_replicas} replicas require {required} {label}, and this machine has {available}; use fewer "
                "replicas, or a cluster with --launcher 'ray address=...'"
            )


def _load_captioner(config: ServerConfig) -> None:
    """Load the model on a node, to raise its errors before the server starts."""
    config.load_captioner()
