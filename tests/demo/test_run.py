"""The demo starts with the options of its command."""

import pytest

gradio = pytest.importorskip("gradio", reason="needs the extra demo")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("given", "expected"), [("/captions/", "/captions"), ("", None)])
def test_demo_is_shown_below_its_root_path(monkeypatch, given, expected):
    from sca.cli import run_command

    started = {}

    def launch(_, **options):
        started.update(options)
        raise ValueError("started")

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    assert run_command(["demo", "--port", "0", *(["--root-path", given] if given else [])]) == 2
    assert started["root_path"] == expected
