"""Images, tiny proposers and comparisons for tests of proposers."""

import numpy as np
import pytest
from PIL import Image
from sca_registry import proposers

from sca.testing.tiny import get_tiny_options


@pytest.fixture(scope="session")
def colored_image():
    """A colored image that is wider than high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 72, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def build_tiny():
    """Function that builds a proposer at its tiny size."""
    return lambda name, **options: proposers.build(name, **{**get_tiny_options("proposers", name), **options})


@pytest.fixture(scope="session")
def check_proposals():
    """Function that checks that proposals equal detections of transformers, clipped to the image and best first."""
    return _check_proposals


def _check_proposals(proposals, image, boxes, scores, names):
    boxes = np.clip(np.asarray(boxes), 0, [image.width, image.height] * 2)
    order = np.argsort(-np.asarray(scores), kind="stable")
    assert np.allclose(proposals.scores, np.asarray(scores)[order])
    assert np.allclose([prompt.box for prompt in proposals.prompts], boxes[order])
    assert proposals.names == tuple(names[row] for row in order)
