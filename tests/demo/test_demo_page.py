"""Escaping of file names on the demo page."""

import numpy as np
import pytest
from PIL import Image

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
    initial = models.get_defaults("sca-tiny").slider_values
    arguments = ("sca-tiny", initial, "", 0.6, initial.points_per_side, initial.pred_iou_thresh)
    with pytest.raises(gradio.Error, match="no image is open"):
        next(app._find_regions(models, None, *arguments))
    with pytest.raises(gradio.Error, match="the text is empty; pass a word or a phrase"):
        next(app._find_regions(models, Session(scene.image, "a.png"), *arguments))
    models.close()


@pytest.mark.slow
def test_every_tab_shows_confidences_and_marks_images_unlike_the_training_images(scene):
    from sca.demo import app
    from sca.demo.session import Session

    models = app.ModelPool("cpu", None, ["sca-tiny"])
    initial = models.get_defaults("sca-tiny").slider_values
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    event = {"action": "box", "box": [1, 1, 60, 60]}
    search = (6, 0.3)  # points per side and minimum predicted IoU
    for image, is_unlike in ((scene.image, False), (noise, True)):
        session = Session(image, "a.png")
        *_, (_, canvas, _) = app._caption_prompted_region(models, event, session, "sca-tiny", initial, "caption", 1)
        assert canvas["is_out_of_distribution"] is is_unlike
        assert (canvas["regions"][0]["confidence"] is None) is is_unlike
    for steps in (
        app._caption_everything(models, Session(scene.image, "a.png"), "sca-tiny", initial, "caption", 1, *search),
        app._find_regions(models, Session(scene.image, "a.png"), "sca-tiny", initial, "a circle", -100, *search),
    ):
        *_, (_, canvas, _) = steps
        assert canvas["regions"]
        assert all(region["confidence"] is not None for region in canvas["regions"])
        assert canvas["is_out_of_distribution"] is False
    models.close()
