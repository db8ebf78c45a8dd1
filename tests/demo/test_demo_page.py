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


def test_find_reports_empty_text_and_missing_image(scene):
    from sca.demo import app
    from sca.demo.session import Session

    models = app.ModelPool("cpu", None, ["sca-tiny"])
    initial = models.get_slider_values("sca-tiny")
    arguments = ("sca-tiny", initial, "", 0.6, initial.points_per_side, initial.pred_iou_thresh)
    with pytest.raises(gradio.Error, match="no image is open"):
        next(app._find_regions(models, None, *arguments))
    with pytest.raises(gradio.Error, match="the text is empty; pass a word or a phrase"):
        next(app._find_regions(models, Session(scene.image, "a.png"), *arguments))
    models.close()
