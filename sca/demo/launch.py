"""Server of the demo page."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from sca.demo.app import CSS, THEME, ModelPool, build_page
from sca.serve.access_control import HostCheckMiddleware
from sca.serve.api_keys import find_key_index
from sca.serve.sockets import bind_socket

EXAMPLE_SEEDS = (29, 4, 11)  # seeds of synthetic scenes


def run_demo(
    model_names: Sequence[str],
    device: Any,
    precision: str | None,
    host: str,
    port: int,
    allow_any_model: bool,
    open_browser: bool,
    on_ready: Callable[[str], None],
    *,
    trust_options: Mapping[str, Mapping[str, bool]] | None = None,
    max_body_bytes: int,
    max_pixels: int,
    allowed_hosts: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    root_path: str = "",
) -> None:
    """Serve the demo page until interrupted.

    Args:
        model_names: Models to choose from; the first is loaded at the start.
        device: Device of the models.
        precision: Precision of the models, see `sca.load`; None for that of the checkpoint.
        host: Address to bind.
        port: Port to bind; 0 selects a free port.
        allow_any_model: Let visitors load any model name or folder, without options.
        open_browser: Open the page in a web browser.
        on_ready: Function called with a message when the page is available.
        trust_options: Trust options by model name; see `ModelPool`.
        max_body_bytes: Maximum upload size in bytes.
        max_pixels: Maximum number of pixels per image.
        allowed_hosts: Additional Host headers to accept.
        api_keys: API keys, each of which is a password; empty to require none.
        root_path: URL path of the page behind a proxy.

    Raises:
        ValueError: The port cannot be bound, or the first model cannot be loaded.
    """
    with bind_socket(host, port) as bound_socket:
        port = bound_socket.getsockname()[1]
    models = ModelPool(device, precision, model_names, allow_any_model=allow_any_model, trust_options=trust_options)
    with models.acquire_scheduler(model_names[0]):
        pass  # load it now, to raise errors before the page opens and to speed up the first request
    with tempfile.TemporaryDirectory(prefix="sca-demo-") as folder:
        blocks = build_page(models, model_names, _draw_examples(Path(folder)), max_pixels)
        try:
            _, url, _ = blocks.queue(default_concurrency_limit=8).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                show_error=True,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                max_file_size=max_body_bytes,
                auth=(lambda _, password: find_key_index(password, api_keys) is not None) if api_keys else None,
                auth_message="The user name can be anything; the password is an API key." if api_keys else None,
                app_kwargs={"middleware": [Middleware(HostCheckMiddleware, hosts=allowed_hosts)]},
                allowed_paths=[folder],
                footer_links=[],
                theme=THEME,
                css=CSS,
                ssr_mode=False,
                root_path=root_path or None,
            )
            on_ready(f"serving the demo at {url}; press Ctrl+C to stop")
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)
            models.close()


def _draw_examples(folder: Path) -> list[tuple[str, str]]:
    """Draw example scenes in the domain of the bundled model; return their paths and names."""
    from sca.data.scenes import Scenes

    examples = []
    for index, seed in enumerate(EXAMPLE_SEEDS, 1):
        path = folder / f"scene-{index}.png"
        Scenes("test", num_images=1, image_size=512, seed=seed)[0].image.save(path)
        examples.append((str(path), path.name))
    return examples
