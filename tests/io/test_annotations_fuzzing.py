"""Fuzzing of labeling-tool records: every value is read, counted or rejected in one line."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sca.io.annotations.annotation import SkipCounter
from sca.io.errors import InputError
from sca.io.prompt_files import read_region_prompts
from sca.output.reader import read_captions

pytestmark = pytest.mark.slow

LABEL_STUDIO_RESULT_FIELDS = {
    "original_width": 40,
    "original_height": 30,
    "image_rotation": 0,
    "to_name": "image",
    "id": "a",
    "score": 0.5,
}
LABEL_STUDIO_VALUES = {
    "rectanglelabels": {"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 5, "rectanglelabels": ["cat"]},
    "polygonlabels": {"points": [[1, 2], [30, 4], [5, 60]], "polygonlabels": ["cat"]},
    "ellipselabels": {"x": 1, "y": 2, "radiusX": 3, "radiusY": 4, "rotation": 5},
    "brushlabels": {"format": "rle", "rle": [1, 2, 3]},
    "bitmasklabels": {"imageDataURL": "data:image/png;base64,QUJD"},
    "vectorlabels": {"vertices": [{"x": 1, "y": 2, "isBezier": False}] * 3, "closed": True},
    "keypointlabels": {"x": 1, "y": 2, "width": 3},
    "labels": {"x": 1, "y": 2, "width": 3, "height": 4, "labels": ["cat"]},
    "textarea": {"text": ["a cat"]},
    "choices": {"choices": ["good"]},
}
LABEL_STUDIO_TASKS = [
    {
        "id": 1,
        "data": {"image": "a.png"},
        "annotations": [
            {
                "was_cancelled": False,
                "ground_truth": True,
                "result": [
                    {**LABEL_STUDIO_RESULT_FIELDS, "type": kind, "value": value, "item_index": 0, "parentID": None}
                ],
            }
        ],
        "drafts": [],
        "predictions": [{"model_version": "m", "result": []}],
    }
    for kind, value in LABEL_STUDIO_VALUES.items()
]
LABELME_SHAPE_FIELDS = {
    "label": "cat",
    "group_id": None,
    "description": "a cat",
    "flags": {},
    "score": 0.5,
    "mask": None,
}
LABELME_CONTENTS = [
    {
        "imagePath": "a.png",
        "imageWidth": 40,
        "imageHeight": 30,
        "imageData": "QUJD",
        "shapes": [{**LABELME_SHAPE_FIELDS, "shape_type": kind, "points": [[1, 2], [30, 4], [5, 16]][:number]}],
    }
    for kind, number in {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2, "line": 2, "point": 1, None: 3}.items()
]
COCO_CONTENTS = [
    {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "caption": "a cat", **more}],
        "categories": [{"id": 1, "name": "cat"}],
        "info": {"model": "m"},
    }
    for more in (
        {"segmentation": [[1, 2, 30, 4, 5, 16]], "keypoints": [1, 2, 2], "iscrowd": 0},
        {"segmentation": {"size": [30, 40], "counts": [1200]}, "region_id": 0, "score": 0.5, "isbox": 0},
    )
]

JSON_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([10**400, -1, [], {}])
)
JSON_VALUES = st.recursive(
    JSON_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=4
)


def iterate_key_paths(content, path=()):
    """Yield the path of every value in JSON content."""
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from iterate_key_paths(child, (*path, key))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("tool", ["label-studio", "labelme", "coco"])
def test_annotation_readers_read_or_reject_any_json_value_in_one_line(tmp_path_factory, tool, data):
    records = {
        "label-studio": [[task] for task in LABEL_STUDIO_TASKS],
        "labelme": LABELME_CONTENTS,
        "coco": COCO_CONTENTS,
    }[tool]
    content = copy.deepcopy(data.draw(st.sampled_from(records)))
    *parent_keys, key = data.draw(st.sampled_from(list(iterate_key_paths(content))))
    parent_value = content
    for parent_key in parent_keys:
        parent_value = parent_value[parent_key]
    parent_value[key] = data.draw(JSON_VALUES)
    path = tmp_path_factory.getbasetemp() / "hostile.json"
    path.write_text(json.dumps(content))
    for read_boxes, error_type in ((iterate_caption_boxes, InputError), (iterate_prompt_boxes, InputError)):
        problems = []
        try:
            for box, (width, height) in read_boxes(path, problems):
                x1, y1, x2, y2 = box
                assert 0 <= x1 < x2 <= width
                assert 0 <= y1 < y2 <= height
        except error_type as error:
            problems.append(str(error))
        assert not any("\n" in problem for problem in problems)


def iterate_caption_boxes(path, problems):
    """Return each box with the size of its image; append rejected records to the problems."""
    for image in read_captions(path, SkipCounter(), reject=lambda error: problems.append(str(error))):
        yield from ((caption.box, image.size) for caption in image.captions if caption.box)


def iterate_prompt_boxes(path, problems):
    prompts = read_region_prompts(path)
    for image_key in prompts:
        for image_size in ((40, 30), (80, 60), (30, 40)):
            fitting_prompts, rejections = prompts.fit_prompts(image_key, *image_size)
            problems += rejections
            yield from ((prompt.box, image_size) for prompt in fitting_prompts if prompt.box)
    problems += prompts.problems
