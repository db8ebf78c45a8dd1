"""`sca demo`: run the web demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import AllowExternal, AllowHost, Device, Host, MaxPixels, Precision, TrustRemoteCode, print_stderr
from sca.devices import resolve_device

MIB = 2**20


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model that visitors can select, as in `sca caption --model`. Repeatable; the first one is selected "
            "by default.",
            rich_help_panel="Model",
        ),
    ] = None,
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model", help="Let visitors load any model by name or checkpoint folder.", rich_help_panel="Model"
        ),
    ] = False,
    device: Device = "cpu",
    precision: Precision = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="Port to bind; 0 selects a free port.", min=0, max=65535, rich_help_panel="Network"),
    ] = 7860,
    allow_host: AllowHost = None,
    root_path: Annotated[
        str,
        typer.Option(
            help="URL path under which a proxy exposes the demo, such as /captions.", rich_help_panel="Network"
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with API keys, one per line. Visitors must enter one of them.", rich_help_panel="Security"
        ),
    ] = None,
    max_body_mb: Annotated[int, typer.Option(help="Maximum upload size in MiB.", min=1, rich_help_panel="Limits")] = 64,
    max_pixels: MaxPixels = 50_000_000,
    open_browser: Annotated[
        bool, typer.Option("--open-browser", help="Open the demo in a web browser.", rich_help_panel="Output")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Start the web demo. Requires the extra `demo`.

    The page works offline. If --host is a loopback address, visitors can select every model listed by `sca list
    models`; otherwise, they can select only the models given with --model.
    """
    import importlib.util
    import os

    from sca_registry import RegistryError, zoo

    from sca.serve.api_keys import read_keys
    from sca.serve.root_path import check_root_path
    from sca.serve.sockets import is_loopback

    if importlib.util.find_spec("gradio") is None:
        raise RegistryError("the demo requires gradio; run pip install 'segment-caption-anything[demo]'")
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    from sca.demo.launch import run_demo

    names = model or ["sca-tiny"]
    trust_options_by_model = {
        name: {"trust_remote_code": trust_remote_code, "allow_external": allow_external} for name in names
    }
    keys = read_keys(api_key_file) if api_key_file else ()
    if is_loopback(host):
        names = list(dict.fromkeys((*names, *zoo.list_names())))
    elif any_model:
        raise RegistryError(
            f"--any-model would let anyone with access to {host} load any folder of this machine; list the models with "
            "--model instead"
        )

    def report_ready(message: str) -> None:
        print_stderr(message)
        if not is_loopback(host) and not keys:
            print_stderr(f"anyone with access to {host} can use this demo; pass --api-key-file FILE to require a key")

    run_demo(
        names,
        resolve_device(device),
        precision,
        host,
        port,
        any_model,
        open_browser,
        report_ready,
        max_body_bytes=max_body_mb * MIB,
        max_pixels=max_pixels,
        allowed_hosts=(host, *(allow_host or ())),
        api_keys=keys,
        trust_options=trust_options_by_model,
        root_path=check_root_path(root_path),
    )
