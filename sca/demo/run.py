"""Starts the page."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sca.demo.app import CSS, THEME, Models, page
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
    told: Callable[[str], None],
    *,
    agreed: Mapping[str, bool] | None = None,
) -> None:
    """Serves the page until it is interrupted. ValueError for a port that cannot be had, and for a model."""
    with bound(host, port) as door:
        port = door.getsockname()[1]
    models = Models(device, dtype, agreed=dict.fromkeys(names, agreed or {}))
    with models.engine(names[0]):
        pass  # a mistake in its name is told before anybody comes, and the first answer does not wait for it
    with tempfile.TemporaryDirectory(prefix="sca-demo-") as folder:
        demo = page(models, names, _examples(Path(folder)), any_model)
        try:
            _, url, _ = demo.queue(default_concurrency_limit=8).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                show_error=True,
                inbrowser=browser,
                prevent_thread_lock=True,
                max_file_size="64mb",
                allowed_paths=[folder],
                footer_links=[],
                theme=THEME,
                css=CSS,
                ssr_mode=False,
            )
            told(f"the demo is at {url}; Ctrl+C ends it")
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
