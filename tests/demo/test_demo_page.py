"""What a stranger's file is called is text on the page of the demo."""

import pytest

gradio = pytest.importorskip("gradio", reason="the demo is made by gradio")


def test_status_and_errors_of_a_hostile_name_have_no_markup(tmp_path):
    from PIL import Image

    from sca.demo import app

    name = "<img src=x onerror=alert(1)> [a](b).png"
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    _, _, status = app._start_session(str(tmp_path / name), name, 10_000)
    assert "<" not in status
    assert "[a](" not in status
    (tmp_path / name).write_bytes(b"none")
    with pytest.raises(gradio.Error) as caught:
        app._start_session(str(tmp_path / name), name, 10_000)
    assert "<" not in caught.value.message
    assert "&lt;img src=x" in caught.value.message
