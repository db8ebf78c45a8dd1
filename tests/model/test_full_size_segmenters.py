"""Full-size segmenters with random weights predict masks on a CPU."""

from pathlib import Path

import pytest
from sca_registry.contracts import Prompt

import sca

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
BOXES = [(52, 356, 190, 494), (370, 434, 448, 512)]


@pytest.mark.all
@pytest.mark.parametrize("name", ["sam-vit-b", "sam-hq-vit-b", "sam2.1-hiera-tiny", "edgetam", "sam3-tracker"])
def test_full_size_segmenter_predicts_masks(name):
    captioner = sca.load_captioner({"name": "none", "encoder": {"name": name, "pretrained": False}})
    side = captioner.processor.image_format.size
    assert side >= 1008
    image = sca.open_image(SCENE)
    captions = captioner.caption(image, [*(Prompt(box=box) for box in BOXES), Prompt(points=((121, 425, 1),))])
    assert [caption.array.shape for caption in captions] == [(512, 512)] * 3
    assert all(0 <= caption.predicted_iou <= 1 for caption in captions)
