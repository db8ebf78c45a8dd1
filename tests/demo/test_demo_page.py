"""Escaping of file names on the demo page."""

import pytest

gradio = pytest.importorskip("gradio", reason="requires the extra demo")


def test_status_and_errors_escape_file_names(tmp_path):
    from PIL import Image

    from sca.demo import app

    name = "<img src=x onerror=alert(1)> [a](b).png"
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    _, _, status = app._start_session(str(tmp_path / name), name, 10_000)
    assert "<" not in status
    assert "[a](" not in status
    (tmp_path / name).write_bytes(b"not an image")
    with pytest.raises(gradio.Error) as raised:
        app._start_session(str(tmp_path / name), name, 10_000)
    assert "<" not in raised.value.message
    assert "&lt;img src=x" in raised.value.message
