"""ROIAlign against a plain loop over samples, and against torchvision where it is installed."""

import math

import pytest
import torch

from sca.nn.roi_align import roi_align

BOXES = torch.tensor(
    [[0.0, 0, 7, 5], [1.3, 0.2, 1.9, 4.4], [-3, -2, 4, 3], [2, 1, 11, 9], [3, 3, 3, 3], [6.5, 4.5, 6.9, 4.9]]
)
OWNER = torch.tensor([0, 0, 1, 1, 1, 1])


@pytest.fixture
def image():
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


def sample(image, y, x):
    """Bilinear, (D,): zero further than a cell outside, the border's value up to there."""
    depth, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(depth)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = torch.zeros(depth)
    for row in range(height):
        for column in range(width):
            total += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * image[:, row, column]
    return total


def by_hand(image, box, size):
    x1, y1, x2, y2 = box
    high, wide = (y2 - y1) / size, (x2 - x1) / size
    rows, columns = math.ceil(high), math.ceil(wide)
    pooled = torch.zeros(len(image), size, size)
    for i in range(size):
        for j in range(size):
            for a in range(rows):
                for b in range(columns):
                    y, x = y1 - 0.5 + (i + (a + 0.5) / rows) * high, x1 - 0.5 + (j + (b + 0.5) / columns) * wide
                    pooled[:, i, j] += sample(image, y, x) / (rows * columns)
    return pooled


@pytest.mark.parametrize("size", [1, 3, 6])
def test_each_bin_is_the_mean_of_its_samples(image, size):
    expected = torch.stack(
        [by_hand(image[b], box, size) for b, box in zip(OWNER.tolist(), BOXES.tolist(), strict=True)]
    )
    assert torch.allclose(roi_align(image, OWNER, BOXES, size), expected, atol=1e-5)


def test_it_is_what_torchvision_computes(image):
    try:
        from torchvision.ops import roi_align as theirs
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"torchvision does not import: {error}")
    rois = torch.cat((OWNER[:, None].float(), BOXES), dim=1)
    assert torch.allclose(roi_align(image, OWNER, BOXES, 6), theirs(image, rois, 6, aligned=True), atol=1e-5)


def test_no_regions_are_no_work(image):
    assert roi_align(image, OWNER[:0], BOXES[:0], 6).shape == (0, 3, 6, 6)
