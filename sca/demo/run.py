"""Starts the page."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from sca.demo.app import CSS, THEME, Models, page
from sca.serve.access import HostCheck
from sca.serve.keys import find_key
from sca.serve.listening import bound

EXAMPLES = (29, 4, 11)  # seeds of drawn scenes


def run(
    names: Sequence[str],
    device: Any,
    dtype: str | None,
    host: str,
    port: int,
    any_model: bool,
    browser: bool,
    report: Callable[[str], None],
    *,
    agreed: Mapping[str, Mapping[str, bool]] | None = None,
    body: int,
    pixels: int,
    hosts: Sequence[str] = (),
    keys: Sequence[str] = (),
    root_path: str = "",
) -> None:
    """Serve the page until it is interrupted.

    Args:
        names: Models to choose from.
        device: Device of the models.
        dtype: Type of their parameters, None for their own.
        host: Address to listen at.
        port: Port to listen at, 0 for any that is free.
        any_model: Whether other names and folders, without options, may be entered.
        browser: Whether to open the page.
        report: Called with a line when the page is there.
        agreed: What each model may do, see `Models`.
        body: Maximum bytes of an upload.
        pixels: Maximum pixels of an image.
        hosts: Names accepted in the Host header.
        keys: API keys, one of which is the password; none if there are none.
        root_path: Path below which a proxy shows the page.

    Raises:
        ValueError: For a port that cannot be had, and for a model.
    """
    with bound(host, port) as door:
        port = door.getsockname()[1]
    models = Models(device, dtype, names, any_model=any_model, agreed=agreed)
    with models.scheduler(names[0]):
        pass  # a mistake in its name is told before anybody comes, and the first answer does not wait for it
    with tempfile.TemporaryDirectory(prefix="sca-demo-") as folder:
        demo = page(models, names, _examples(Path(folder)), pixels)
        try:
            _, url, _ = demo.queue(default_concurrency_limit=8).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                show_error=True,
                inbrowser=browser,
                prevent_thread_lock=True,
                max_file_size=body,
                auth=(lambda _, password: find_key(password, keys) is not None) if keys else None,
                auth_message="The user name can be anything; the password is an API key." if keys else None,
                app_kwargs={"middleware": [Middleware(HostCheck, hosts=hosts)]},
                allowed_paths=[folder],
                footer_links=[],
                theme=THEME,
                css=CSS,
                ssr_mode=False,
                root_path=root_path or None,
            )
            report(f"the demo is at {url}; Ctrl+C ends it")
            demo.block_thread()
        finally:
            demo.close(verbose=False)
            models.close()


def _examples(folder: Path) -> list[tuple[str, str]]:
    """Drawn scenes: what the shipped model knows."""
    from sca.data.scenes import Scenes

    made = []
    for number, seed in enumerate(EXAMPLES, 1):
        path = folder / f"scene-{number}.png"
        Scenes("test", count=1, size=512, seed=seed)[0].image.save(path)
        made.append((str(path), path.name))
    return made
