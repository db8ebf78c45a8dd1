"""Proposals from a file report changed and skipped boxes."""

import json

import pytest
from PIL import Image

from sca.proposers.boxes_from_coco import BoxesFromCoco


def test_boxes_from_coco_reports_skipped_and_clipped_boxes(tmp_path):
    annotations = [
        {"id": 1, "image_id": 1, "bbox": [1, 1, 5, 5], "keypoints": [3, 3, 2]},
        {"id": 2, "image_id": 1, "bbox": [30, 1, 11, 5]},
    ]
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    with pytest.warns(UserWarning, match="keypoints: 1"):
        propose = BoxesFromCoco(str(tmp_path / "boxes.json"))
    with pytest.warns(UserWarning, match="1 of the boxes for .* are clipped"):
        proposals = propose(Image.new("RGB", (40, 30)), tmp_path / "a.png")
    assert [prompt.box for prompt in proposals.prompts] == [(1, 1, 6, 6), (30, 1, 40, 6)]
