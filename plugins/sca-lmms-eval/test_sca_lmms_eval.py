"""Tests of the regions and arguments that the adapter reads, and of the model if lmms-eval is installed."""

import numpy as np
import pytest
from PIL import Image
from sca_lmms_eval.arguments import parse_batch_size, parse_stop_strings
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


@pytest.mark.parametrize(
    ("until", "expected"),
    [(None, []), ("\n\n", ["\n\n"]), (["###", ""], ["###"]), (("a", "b"), ["a", "b"]), ("", []), ([], [])],
)
def test_parse_stop_strings_accepts_a_text_or_a_list_without_empty_texts(until, expected):
    assert parse_stop_strings(until, "refcoco") == expected


@pytest.mark.parametrize("until", [3, ["a", None], {"a": 1}])
def test_parse_stop_strings_rejects_other_values(until):
    with pytest.raises(ValueError, match=r"^refcoco: the generation option 'until' is .*; expected a text or a list"):
        parse_stop_strings(until, "refcoco")


def test_parse_batch_size_accepts_integers_and_their_texts():
    assert [parse_batch_size(value) for value in (8, "8")] == [8, 8]


@pytest.mark.parametrize("value", ["auto", "auto:4", "0", -1, None])
def test_parse_batch_size_rejects_values_other_than_positive_integers(value):
    with pytest.raises(ValueError, match=rf"^batch_size is {value!r}; expected an integer of at least 1$"):
        parse_batch_size(value)


def make_model(**options):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from sca_lmms_eval.model import SegmentCaptionAnything

    return SegmentCaptionAnything(device="cpu", **options)


def test_model_returns_captions_up_to_the_first_stop_string():
    model = make_model(batch_size="2")
    from lmms_eval.api.instance import Instance

    doc = {"image": Image.new("RGB", (64, 48), "red"), "bbox": [5, 5, 30, 30]}
    model.task_dict = {"refcoco": {"val": [doc]}}

    def generate(until):
        arguments = ("context", {"until": until}, None, 0, "refcoco", "val")
        metadata = {"task": "refcoco", "doc_id": 0, "repeats": 1}
        request = Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)
        return model.generate_until([request])[0]

    caption = generate(None)
    assert len(caption.split()) > 1
    assert generate("") == generate([""]) == generate("\n\n") == caption
    stop = caption.split()[1]
    assert generate(stop) == generate([stop]) == caption.split(stop)[0]


def test_model_zooms_only_on_request_as_sca_caption_does():
    assert make_model().zoom is None
    assert make_model(zoom="auto").zoom is not None


def test_lmms_eval_finds_the_model():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.models import get_model

    model_class = get_model("sca")
    with pytest.raises(ValueError, match="unknown prompt_type 'point'; choose from box, mask"):
        model_class(prompt_type="point")
