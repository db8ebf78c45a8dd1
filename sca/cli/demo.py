"""`sca demo`: masks and captions in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import AllowExternal, AllowHost, Device, Dtype, TrustRemoteCode, print_stderr
from sca.devices import resolve_device

MIB = 2**20


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(help="a zoo name, a checkpoint or a captioner to choose from; the first is shown"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for all of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0 for any that is free", min=0, max=65535)] = 7860,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Allow any model name or folder to be entered in the page.")
    ] = False,
    max_body_mb: Annotated[int, typer.Option(help="MiB per upload.", min=1)] = 64,
    max_pixels: Annotated[int, typer.Option(help="Pixels per image.", min=1)] = 50_000_000,
    allow_host: AllowHost = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one per line; the page then asks for one.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path below which a proxy shows the demo, such as /captions.")] = "",
    browser: Annotated[bool, typer.Option("--browser", help="open the page in a browser")] = False,
) -> None:
    """A page to point at regions of pictures, or to find them all. Needs the extra `demo`; works offline.

    Where only this machine reaches it, the models of the zoo can be chosen, too; elsewhere only those named.
    """
    import importlib.util
    import os

    from sca_registry import RegistryError, zoo

    from sca.serve.api_keys import read_keys
    from sca.serve.root_path import check_root_path
    from sca.serve.sockets import is_loopback

    if importlib.util.find_spec("gradio") is None:
        raise RegistryError("the demo needs gradio: pip install 'segment-caption-anything[demo]'")
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
            f"--any-model lets everyone who reaches {host} load any folder of this machine; name models with --model"
        )

    def report_ready(message: str) -> None:
        print_stderr(message)
        if not is_loopback(host) and not keys:
            print_stderr(f"anyone who reaches {host} can use this demo; pass --api-key-file FILE to require a key")

    run_demo(
        names,
        resolve_device(device),
        dtype,
        host,
        port,
        any_model,
        browser,
        report_ready,
        max_body_bytes=max_body_mb * MIB,
        max_pixels=max_pixels,
        allowed_hosts=(host, *(allow_host or ())),
        api_keys=keys,
        trust_options=trust_options_by_model,
        root_path=check_root_path(root_path),
    )
