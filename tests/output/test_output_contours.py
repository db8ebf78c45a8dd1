import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sca.io import masks
from sca.output.contours import mask_to_svg_path

MASK_ARRAYS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(MASK_ARRAYS)
def test_encode_rle_round_trips_any_mask(mask):
    rle = masks.encode_rle(mask)
    assert (masks.decode_rle(rle) == mask).all()
    assert masks.compute_mask_area(rle) == masks.compute_mask_area(mask) == mask.sum()
    assert masks.parse_rle(rle) == rle
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if mask.any() else None
    assert masks.mask_to_box(rle) == masks.mask_to_box(mask) == box


@given(MASK_ARRAYS)
def test_parse_rle_rejects_truncated_counts(mask):
    rle = masks.encode_rle(mask)
    with pytest.raises(ValueError, match="counts"):
        masks.parse_rle({**rle, "counts": rle["counts"][:-1]})


@given(MASK_ARRAYS)
def test_mask_to_svg_path_encloses_exactly_the_mask(mask):
    """Fill by the even-odd rule: a pixel is inside if the number of vertical edges to its left is odd."""
    assert (fill_svg_path(mask_to_svg_path(mask), mask.shape) == mask).all()


def test_mask_to_svg_path_simplifies_large_masks_without_losing_pixels():
    mask = np.zeros((3000, 2000), bool)
    mask[5, 7] = True
    mask[2000:2990, 100:1999] = True
    filled_mask = fill_svg_path(mask_to_svg_path(mask), mask.shape)
    assert filled_mask[mask].all()
    assert filled_mask.sum() < mask.sum() * 1.02
    assert len(mask_to_svg_path(np.random.default_rng(0).random((2000, 2000)) < 0.5)) < 5_000_000


def fill_svg_path(path: str, shape: tuple[int, int]) -> np.ndarray:
    flips = np.zeros((shape[0], shape[1] + 1), int)
    for loop in path.split("M")[1:]:
        start, *steps = loop.removesuffix("z").split("h")
        x, y = map(int, start.split())
        start_point = (x, y)
        for step in steps:
            delta_x, delta_y = map(int, step.split("v"))
            x += delta_x
            flips[min(y, y + delta_y) : max(y, y + delta_y), x] += 1
            y += delta_y
        assert (x, y) == start_point
    return (np.cumsum(flips, 1) % 2 == 1)[:, :-1]
