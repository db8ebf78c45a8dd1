"""`sca serve`: serve captions over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import (
    AllowExternal,
    AllowHost,
    Device,
    Host,
    MaxPixels,
    ModelName,
    Precision,
    Seed,
    TrustRemoteCode,
    Zoom,
    print_stderr,
)
from sca.devices import resolve_device
from sca.inference.zoom_options import DEFAULT_ZOOM

MIB = 2**20


def serve(
    model: ModelName = "sca-tiny",
    device: Device = "cpu",
    precision: Precision = None,
    seed: Seed = 0,
    zoom: Zoom = DEFAULT_ZOOM,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind.", min=0, max=65535, rich_help_panel="Network")] = 8000,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web origin allowed to call the server (CORS), such as https://example.org; * allows any. Repeatable.",
            rich_help_panel="Network",
        ),
    ] = None,
    allow_host: AllowHost = None,
    root_path: Annotated[
        str,
        typer.Option(
            help="URL path under which a proxy exposes the server, such as /captions.", rich_help_panel="Network"
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with API keys, one per line. Requests must send Authorization: Bearer KEY, or the key as the "
            "password of basic authentication.",
            rich_help_panel="Security",
        ),
    ] = None,
    label_studio: Annotated[
        bool,
        typer.Option(
            "--label-studio",
            help="Serve predictions for Label Studio, as a machine learning backend: POST /setup, /predict, /webhook.",
            rich_help_panel="Label Studio",
        ),
    ] = False,
    label_studio_url: Annotated[
        str,
        typer.Option(
            help="URL of Label Studio, such as http://localhost:8080, to download the images of tasks. The access "
            "token is read from the environment variable LABEL_STUDIO_API_KEY, or from the file that "
            "LABEL_STUDIO_API_KEY_FILE names.",
            rich_help_panel="Label Studio",
        ),
    ] = "",
    image_url: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of another server that images of tasks are downloaded from, such as https://images.example.org, "
            "or of a folder on it. All other URLs are rejected. Repeatable.",
            rich_help_panel="Label Studio",
        ),
    ] = None,
    max_body_mb: Annotated[
        int, typer.Option(help="Maximum request size in MiB.", min=1, rich_help_panel="Limits")
    ] = 32,
    max_pixels: MaxPixels = 50_000_000,
    max_prompts: Annotated[
        int,
        typer.Option(
            help="Maximum number of prompts per request, and of regions found in everything mode.",
            min=1,
            rich_help_panel="Limits",
        ),
    ] = 4096,
    timeout: Annotated[
        float,
        typer.Option(
            help="Time limit in seconds, applied separately to receiving a request and to responding to it.",
            min=0.1,
            rich_help_panel="Limits",
        ),
    ] = 60,
    max_queue: Annotated[
        int, typer.Option(help="Maximum number of queued regions across all requests.", min=1, rich_help_panel="Limits")
    ] = 10_000,
    max_connections: Annotated[
        int, typer.Option(help="Maximum number of concurrent connections.", min=1, rich_help_panel="Limits")
    ] = 512,
    feature_cache_mb: Annotated[
        int,
        typer.Option(help="Size of the image feature cache in MiB; 0 disables it.", min=0, rich_help_panel="Limits"),
    ] = 512,
    launcher: Annotated[
        str,
        typer.Option(
            help="Launcher that runs the server: local, ray, or 'ray address=ADDRESS' for a cluster.",
            rich_help_panel="Runtime",
        ),
    ] = "local",
    num_replicas: Annotated[
        int,
        typer.Option(
            help="Number of model replicas; more than 1 requires the ray launcher.",
            min=1,
            rich_help_panel="Runtime",
        ),
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not log requests.", rich_help_panel="Output")] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Serve captions over HTTP. Requires the extra `serve`.

    Endpoints: POST /v1/captions, POST /v1/chat/completions, GET /v1/models, GET /health and GET /metrics; their
    documentation is at /docs. Concurrent requests are batched.
    """
    import sca_registry
    from sca_registry import RegistryError
    from sca_registry.spec import ComponentSpec

    from sca.captioners.chat_client import read_api_key
    from sca.launchers.local import LocalLauncher
    from sca.launchers.ray import RayLauncher
    from sca.serve.api_keys import read_keys
    from sca.serve.config import ServerConfig
    from sca.serve.root_path import check_root_path
    from sca.serve.sockets import is_loopback

    component = ComponentSpec.parse(launcher, "--launcher", "launchers")
    built_launcher = sca_registry.launchers.build(component.name, **component.options)
    if not isinstance(built_launcher, LocalLauncher | RayLauncher):
        raise RegistryError(f"the launcher {component.name!r} cannot run a server; choose local or ray")
    if num_replicas != 1 and isinstance(built_launcher, LocalLauncher):
        raise ValueError(
            f"the local launcher supports 1 replica, not {num_replicas}; use --launcher ray for several replicas"
        )
    if (label_studio_url or image_url) and not label_studio:
        raise ValueError("--label-studio-url and --image-url require --label-studio; add it")
    server_config = ServerConfig(
        model,
        device,
        precision,
        seed,
        zoom,
        max_body_bytes=max_body_mb * MIB,
        max_pixels=max_pixels,
        max_prompts=max_prompts,
        timeout=timeout,
        max_queue=max_queue,
        feature_cache_bytes=feature_cache_mb * MIB,
        max_connections=max_connections,
        allowed_origins=tuple(allow_origin or ()),
        allowed_hosts=(host, *(allow_host or ())),
        api_keys=read_keys(api_key_file) if api_key_file else (),
        root_path=check_root_path(root_path),
        label_studio=label_studio,
        label_studio_url=label_studio_url,
        image_urls=tuple(image_url or ()),
        label_studio_key=read_api_key("LABEL_STUDIO_API_KEY", "LABEL_STUDIO_API_KEY_FILE") if label_studio_url else "",
        log_requests=not quiet,
        trust_remote_code=trust_remote_code,
        allow_external=allow_external,
    )
    server_config.check_installed()

    from sca.serve.task_images import TaskImageReader

    TaskImageReader(label_studio_url, server_config.image_urls)  # checks the URLs before the model is loaded
    if isinstance(built_launcher, LocalLauncher):  # Ray reports it for its nodes
        resolve_device(device)

    def report_ready(url: str) -> None:
        print_stderr(f"serving {model} at {url}; press Ctrl+C to stop")
        if not is_loopback(host) and not server_config.api_keys:
            print_stderr(f"anyone with access to {host} can use this server; pass --api-key-file FILE to require a key")

    if isinstance(built_launcher, RayLauncher):
        from sca.serve.ray_server import serve_on_ray

        ray_options = (built_launcher.address, built_launcher.num_cpus)
        serve_on_ray(server_config, host, port, num_replicas, report_ready, *ray_options)
    else:
        from sca.serve.server import serve_locally

        serve_locally(server_config, host, port, report_ready)
