"""Captioners that return ground truth, and hand-written records."""

import numpy as np
import pytest
from sca_registry.contracts import Caption

from sca.io.masks import encode_rle

DEFAULT_BOX = [0.0, 0.0, 2.0, 2.0]


@pytest.fixture(scope="session")
def make_record():
    """Build a record from the fields that a test needs."""

    def make(caption="", task="caption", image=1, region=1, mask=None, **truth):
        truth = {"name": None, "phrases": [], "attributes": {}, "mask": None, "box": DEFAULT_BOX, "area": 4.0} | truth
        return {
            "index": image,
            "image_id": image,
            "region_id": region,
            "task": task,
            "control": None,
            "prompt": {"box": truth["box"]},
            "caption": caption,
            "score": 1.0,
            "mask": mask,
            "predicted_iou": None,
            "truth": truth,
        }

    return make


@pytest.fixture(scope="session")
def make_rectangle_mask():
    """Encode the mask of a rectangle x1 y1 x2 y2 in an image of 10 x 8 pixels (width, height)."""

    def make(x1, y1, x2, y2, width=10, height=8):
        mask = np.zeros((height, width), bool)
        mask[y1:y2, x1:x2] = True
        return encode_rle(mask)

    return make


@pytest.fixture(scope="session")
def make_oracle_captioner():
    """Return a captioner class that captions each region with `describe_region(region, regions, task)`."""

    class OracleCaptioner:
        def __init__(self, dataset, describe_region=None):
            self.regions_by_image = {sample.image.tobytes(): sample.regions for sample in dataset}
            self.describe_region = describe_region or (
                lambda region, _, task: region.phrases[-1] if task == "caption" else region.name
            )

        def caption(self, image, prompts, task="caption"):
            regions = self.regions_by_image[image.tobytes()]
            return [self._caption_prompt(regions, prompt, task, index) for index, prompt in enumerate(prompts)]

        def _caption_prompt(self, regions, prompt, task, index):
            region = next(region for region in regions if region.box == prompt.box)
            return Caption(
                self.describe_region(region, regions, task), 1.0, prompt.box, region.mask, 1.0, prompt, index
            )

    return OracleCaptioner
