"""Tests of the regions that the adapter reads from documents, and of the model if lmms-eval is installed."""

import numpy as np
import pytest
from PIL import Image
from sca_lmms_eval.regions import read_region

from sca.io.errors import InputError

IMAGE = Image.new("L", (40, 30))


def test_read_region_converts_the_box_of_a_document():
    image, prompt = read_region({"image": IMAGE, "bbox": [2.5, 3, 10, 28]}, "box", "refcoco, document 0")
    assert (image.mode, prompt.box) == ("RGB", (2.5, 3.0, 12.5, 30.0))  # clipped to the image


@pytest.mark.parametrize("segmentation", [[2, 3, 12, 3, 12, 9, 2, 9], [[2, 3, 12, 3, 12, 9, 2, 9]]])
def test_read_region_converts_the_polygons_of_a_document(segmentation):
    _, prompt = read_region({"image": IMAGE, "segmentation": segmentation}, "mask", "refcoco, document 0")
    expected = np.zeros((30, 40), bool)
    expected[3:9, 2:12] = True
    assert (prompt.mask == expected).all()


@pytest.mark.parametrize(
    ("doc", "prompt_type", "message"),
    [
        ({"image": IMAGE}, "box", "a, document 1 has no image or no 'bbox'; choose a region captioning task"),
        ({"bbox": [1, 2, 3, 4]}, "box", "has no image"),
        ({"image": IMAGE, "bbox": [1, 2, 3]}, "box", "'bbox' is"),
        ({"image": IMAGE, "bbox": [0.1, 0.1, 0.5, 0.5]}, "box", "looks normalized"),
        ({"image": IMAGE, "segmentation": "x"}, "mask", "'segmentation'"),
    ],
)
def test_read_region_rejects_documents_without_a_region(doc, prompt_type, message):
    with pytest.raises(InputError, match=message) as error_info:
        read_region(doc, prompt_type, "a, document 1")
    assert "\n" not in str(error_info.value)


def test_lmms_eval_finds_the_model():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.models import get_model

    model_class = get_model("sca")
    with pytest.raises(ValueError, match="unknown prompt_type 'point'; choose from box, mask"):
        model_class(prompt_type="point")
