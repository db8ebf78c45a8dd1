"""`sca serve`: captions over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import AllowExternal, AllowHost, Device, Dtype, ModelName, Seed, TrustRemoteCode, print_stderr
from sca.devices import resolve_device

MIB = 2**20


def serve(
    model: ModelName = "sca-tiny",
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for all of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at", min=0, max=65535)] = 8000,
    device: Device = "cpu",
    dtype: Dtype = None,
    body: Annotated[int, typer.Option(help="MiB of a request, at most", min=1)] = 32,
    pixels: Annotated[int, typer.Option(help="pixels of an image, at most", min=1)] = 50_000_000,
    prompts: Annotated[int, typer.Option(help="prompts of a request, at most", min=1)] = 4096,
    seconds: Annotated[
        float, typer.Option(help="until a request is there, and again until its answer is", min=0.1)
    ] = 60,
    waiting: Annotated[int, typer.Option(help="regions that may wait, of all requests", min=1)] = 10_000,
    clients: Annotated[int, typer.Option(help="connections at a time, at most", min=1)] = 512,
    cache: Annotated[int, typer.Option(help="MiB of image features to keep", min=0)] = 512,
    origin: Annotated[
        list[str] | None, typer.Option(help="whose pages may ask from a browser: https://example.org, or * for all")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    allow_host: AllowHost = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one per line; requests then need Authorization: Bearer KEY.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path below which a proxy shows the server, such as /captions.")] = "",
    seed: Seed = 0,
    launcher: Annotated[
        str, typer.Option(help="where it runs: local, 'ray address=auto', ...; one that can serve")
    ] = "local",
    replicas: Annotated[int, typer.Option(help="copies of the model, with a launcher that spreads them", min=1)] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="no line for each request")] = False,
) -> None:
    """Answers over HTTP: POST /v1/captions, POST /v1/chat/completions, /health, /metrics; the page at /docs tells all.

    Requests of many clients are answered together. Needs the extra `serve`.
    """
    import sca_registry
    from sca_registry import RegistryError
    from sca_registry.spec import Part

    from sca.launchers.local import Local
    from sca.launchers.ray import Ray
    from sca.serve.api_keys import read_keys
    from sca.serve.config import ServerConfig
    from sca.serve.root_path import check_root_path
    from sca.serve.sockets import is_loopback

    part = Part.parse(launcher, "--launcher", "launchers")
    built_launcher = sca_registry.launchers.build(part.name, **part.options)
    if not isinstance(built_launcher, Local | Ray):
        raise RegistryError(f"the launcher {part.name!r} runs tasks and serves nothing: choose local or ray")
    if replicas != 1 and isinstance(built_launcher, Local):
        raise ValueError(f"this machine serves one copy of a model, not {replicas}: spread copies with ray")
    server_config = ServerConfig(
        model,
        device,
        dtype,
        seed,
        max_body_bytes=body * MIB,
        max_pixels=pixels,
        max_prompts=prompts,
        timeout=seconds,
        max_queue=waiting,
        feature_cache_bytes=cache * MIB,
        max_connections=clients,
        allowed_origins=tuple(origin or ()),
        allowed_hosts=(host, *(allow_host or ())),
        api_keys=read_keys(api_key_file) if api_key_file else (),
        root_path=check_root_path(root_path),
        log_requests=not quiet,
        trust_remote_code=trust_remote_code,
        allow_external=allow_external,
    )
    server_config.check_installed()
    if isinstance(built_launcher, Local):  # Ray reports it for its nodes
        resolve_device(device)

    def report_ready(url: str) -> None:
        print_stderr(f"{model} answers at {url}; Ctrl+C ends it")
        if not is_loopback(host) and not server_config.api_keys:
            print_stderr(f"anyone who reaches {host} can use this server; pass --api-key-file FILE to require a key")

    if isinstance(built_launcher, Ray):
        from sca.serve.ray_server import serve_on_ray

        serve_on_ray(server_config, host, port, replicas, report_ready, built_launcher.address, built_launcher.cores)
    else:
        from sca.serve.server import serve_locally

        serve_locally(server_config, host, port, report_ready)
