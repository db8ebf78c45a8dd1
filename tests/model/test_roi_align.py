"""ROIAlign, compared with a plain loop over samples, and with torchvision if installed."""

import math
from types import SimpleNamespace

import pytest
import torch

from sca.nn.boxes import require_boxes
from sca.nn.roi_align import roi_align

BOXES = torch.tensor(
    [[0.0, 0, 7, 5], [1.3, 0.2, 1.9, 4.4], [-3, -2, 4, 3], [2, 1, 11, 9], [3, 3, 3, 3], [6.5, 4.5, 6.9, 4.9]]
)
IMAGE_INDEX = torch.tensor([0, 0, 1, 1, 1, 1])


@pytest.fixture
def image():
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


def sample_bilinear(image, y, x):
    """Sample (D,) bilinearly: the border value up to one cell outside, zero beyond."""
    num_channels, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(num_channels)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = torch.zeros(num_channels)
    for row in range(height):
        for column in range(width):
            total += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * image[:, row, column]
    return total


def pool_with_loops(image, box, output_size):
    x1, y1, x2, y2 = box
    bin_height, bin_width = (y2 - y1) / output_size, (x2 - x1) / output_size
    num_rows, num_columns = math.ceil(bin_height), math.ceil(bin_width)
    pooled = torch.zeros(len(image), output_size, output_size)
    for bin_row in range(output_size):
        for bin_column in range(output_size):
            for sample_row in range(num_rows):
                for sample_column in range(num_columns):
                    y, x = (
                        y1 - 0.5 + (bin_row + (sample_row + 0.5) / num_rows) * bin_height,
                        x1 - 0.5 + (bin_column + (sample_column + 0.5) / num_columns) * bin_width,
                    )
                    pooled[:, bin_row, bin_column] += sample_bilinear(image, y, x) / (num_rows * num_columns)
    return pooled


@pytest.mark.parametrize("output_size", [1, 3, 6])
def test_roi_align_bin_is_the_mean_of_its_samples(image, output_size):
    expected = torch.stack(
        [
            pool_with_loops(image[index], box, output_size)
            for index, box in zip(IMAGE_INDEX.tolist(), BOXES.tolist(), strict=True)
        ]
    )
    assert torch.allclose(roi_align(image, IMAGE_INDEX, BOXES, output_size), expected, atol=1e-5)
    assert torch.allclose(roi_align(image[IMAGE_INDEX], None, BOXES, output_size), expected, atol=1e-5)


def test_roi_align_matches_torchvision(image):
    try:
        from torchvision.ops import roi_align as theirs
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"torchvision does not import: {error}")
    rois = torch.cat((IMAGE_INDEX[:, None].float(), BOXES), dim=1)
    assert torch.allclose(roi_align(image, IMAGE_INDEX, BOXES, 6), theirs(image, rois, 6, aligned=True), atol=1e-5)


def test_roi_align_of_no_regions_is_empty(image):
    assert roi_align(image, IMAGE_INDEX[:0], BOXES[:0], 6).shape == (0, 3, 6, 6)


def test_require_boxes_names_the_mixer_and_the_fix():
    regions = SimpleNamespace(boxes=None)
    with pytest.raises(
        ValueError, match=r"the mixer 'roi-query' requires boxes; pass box prompts, or use segmenter=sam"
    ):
        require_boxes(regions, "roi-query")
    regions.boxes = BOXES
    assert require_boxes(regions, "roi-query") is BOXES
