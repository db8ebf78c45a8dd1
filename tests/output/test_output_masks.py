import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sca.io import masks
from sca.output.contours import mask_to_svg_path

mask_arrays = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(mask_arrays)
def test_a_mask_survives_its_code(mask):
    code = masks.encode_rle(mask)
    assert (masks.decode_rle(code) == mask).all()
    assert masks.compute_mask_area(code) == masks.compute_mask_area(mask) == mask.sum()
    assert masks.parse_rle(code) == code
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if mask.any() else None
    assert masks.mask_to_box(code) == masks.mask_to_box(mask) == box


@given(mask_arrays)
def test_a_code_cut_short_is_refused(mask):
    code = masks.encode_rle(mask)
    with pytest.raises(ValueError, match="counts"):
        masks.parse_rle({**code, "counts": code["counts"][:-1]})


@given(mask_arrays)
def test_an_outline_holds_exactly_its_mask(mask):
    """Filled by the even-odd rule: a pixel is inside if an odd number of vertical edges lies left of it."""
    assert (filled(mask_to_svg_path(mask), mask.shape) == mask).all()


def test_a_large_mask_has_a_coarser_outline_that_loses_nothing():
    mask = np.zeros((3000, 2000), bool)
    mask[5, 7] = True
    mask[2000:2990, 100:1999] = True
    drawn = filled(mask_to_svg_path(mask), mask.shape)
    assert drawn[mask].all()
    assert drawn.sum() < mask.sum() * 1.02
    assert len(mask_to_svg_path(np.random.default_rng(0).random((2000, 2000)) < 0.5)) < 5_000_000


def filled(path: str, shape: tuple[int, int]) -> np.ndarray:
    flips = np.zeros((shape[0], shape[1] + 1), int)
    for loop in path.split("M")[1:]:
        start, *steps = loop.removesuffix("z").split("h")
        x, y = map(int, start.split())
        first = (x, y)
        for step in steps:
            across, down = map(int, step.split("v"))
            x += across
            flips[min(y, y + down) : max(y, y + down), x] += 1
            y += down
        assert (x, y) == first
    return (np.cumsum(flips, 1) % 2 == 1)[:, :-1]
