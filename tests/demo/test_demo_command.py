"""Options of the command `sca demo`."""

import pytest

gradio = pytest.importorskip("gradio", reason="requires the extra demo")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("root_path", "expected"), [("/captions/", "/captions"), ("", None)])
def test_demo_command_passes_the_root_path_to_gradio(monkeypatch, root_path, expected):
    from sca.cli import run_command

    launch_options = {}

    def record_launch(_, **options):
        launch_options.update(options)
        raise ValueError("started")

    monkeypatch.setattr(gradio.Blocks, "launch", record_launch)
    assert run_command(["demo", "--port", "0", *(["--root-path", root_path] if root_path else [])]) == 2
    assert launch_options["root_path"] == expected
