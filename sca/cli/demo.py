"""`sca demo`: masks and captions in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from sca.cli.options import DEVICES, AllowExternal, TrustRemoteCode, complain, find_device, settle

DTYPES = ("float32", "bfloat16", "float16")
HERE = ("127.0.0.1", "localhost", "::1")


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(help="a zoo name, a checkpoint or a captioner to choose from; the first is shown"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for all of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0 for any that is free", min=0, max=65535)] = 7860,
    device: Annotated[str, typer.Option(help=DEVICES)] = "cpu",
    dtype: Annotated[str | None, typer.Option(help=f"{' or '.join(DTYPES)} (default: the model's)")] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    browser: Annotated[bool, typer.Option("--browser", help="open the page in a browser")] = False,
) -> None:
    """A page to point at regions of pictures, or to find them all. Needs the extra `demo`; works offline.

    Where only this machine reaches it, any folder with a model can be chosen there, too.
    """
    import importlib.util
    import os

    from sca_registry import RegistryError

    if dtype:
        settle("dtype", dtype, DTYPES)
    if importlib.util.find_spec("gradio") is None:
        raise RegistryError("the demo needs gradio: pip install 'segment-caption-anything[demo]'")
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    from sca.demo.run import run

    names = model or ["sca-tiny"]
    agreed = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    run(names, find_device(device), dtype, host, port, host in HERE, browser, complain, agreed=agreed)
