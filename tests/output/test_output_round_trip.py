"""Round trips: `read_captions` returns what `sca.output` wrote for a labeling tool."""

import math
import tempfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations.annotation import SkipCounter
from sca.output.formats import MultiFormatWriter
from sca.output.reader import read_captions

WIDTH, HEIGHT = 23, 17
FORMATS = ("coco", "label-studio", "labelme", "jsonl", "geojson")


def make_pixel_mask(x, y):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y, x] = True
    return mask


RING_MASK = np.ones((HEIGHT, WIDTH), bool)
RING_MASK[3:9, 3:9] = False
SPECIAL_MASKS = [
    make_pixel_mask(0, 0),
    make_pixel_mask(WIDTH - 1, HEIGHT - 1),
    make_pixel_mask(5, 6) | make_pixel_mask(9, 9),
    RING_MASK,
    np.ones((HEIGHT, WIDTH), bool),
]

MASK_ARRAYS = st.one_of(st.sampled_from(SPECIAL_MASKS), arrays.arrays(bool, (HEIGHT, WIDTH))).filter(np.any)
X_COORDINATES, Y_COORDINATES = st.floats(0, WIDTH - 0.5), st.floats(0, HEIGHT - 0.5)
BOXES = st.tuples(X_COORDINATES, Y_COORDINATES, X_COORDINATES, Y_COORDINATES).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 0.25, max(b[1], b[3]) + 0.25)
)
BOXES = BOXES.filter(lambda box: max(box) > 1)  # those within 0..1 are refused, since normalized
POINTS = st.tuples(X_COORDINATES, Y_COORDINATES).filter(lambda point: max(point) > 1)  # and so are points
TEXTS = st.text(min_size=1, max_size=8)


def make_mask_caption(text, mask):
    return Caption(text, 0.5, masks.mask_to_box(mask), masks.encode_rle(mask), None, Prompt(), 0)


def make_box_caption(text, box):
    return Caption(text, 0.5, box, None, None, Prompt(), 0)


def make_point_caption(text, point):
    return Caption(text, 0.5, None, None, None, Prompt(points=((*point, 1),)), 0)


CAPTIONS = st.one_of(
    st.builds(make_mask_caption, TEXTS, MASK_ARRAYS),
    st.builds(make_box_caption, TEXTS, BOXES),
    st.builds(make_point_caption, TEXTS, POINTS),
)


@pytest.mark.parametrize("format_name", FORMATS)
@settings(deadline=None, max_examples=25)
@given(captions=st.lists(CAPTIONS, min_size=1, max_size=4))
@example([make_mask_caption("x", mask) for mask in SPECIAL_MASKS])
@example([make_point_caption("x", (3.0, 4.0))])
@pytest.mark.slow
def test_read_captions_returns_written_regions_unchanged(format_name, captions):
    with tempfile.TemporaryDirectory() as folder:
        with MultiFormatWriter(folder, (format_name,)) as writers:
            writers.add("a.png", Image.new("RGB", (WIDTH, HEIGHT)), captions)
        skip_counter = SkipCounter()
        (captioned_image,) = read_captions(writers.paths[format_name], skip_counter)
    assert captioned_image.size == (WIDTH, HEIGHT)
    assert not skip_counter.counts
    if format_name == "coco":  # has no place for points
        captions = [caption for caption in captions if caption.box is not None or caption.mask is not None]
    for caption, expected in zip(captioned_image.captions, captions, strict=True):
        assert (caption.text, caption.mask, caption.score) == (expected.text, expected.mask, 0.5)
        assert caption.box == (expected.box if expected.box is None else pytest.approx(expected.box, abs=1e-9))
        if format_name != "coco" and expected.prompt.points:
            (read_point,), (point,) = caption.prompt.points, expected.prompt.points
            assert read_point == pytest.approx(point, abs=1e-9)
        assert math.isnan(caption.predicted_iou or math.nan)


@pytest.mark.parametrize("format_name", FORMATS)
def test_read_captions_returns_the_empty_mask_or_the_box(tmp_path, format_name):
    empty_caption = Caption(
        "x", 0.5, (1, 2, 3, 4), masks.encode_rle(np.zeros((HEIGHT, WIDTH), bool)), None, Prompt(), 0
    )
    with MultiFormatWriter(tmp_path, (format_name,)) as writers:
        writers.add("a.png", Image.new("RGB", (WIDTH, HEIGHT)), [empty_caption])
    (captioned_image,) = read_captions(writers.paths[format_name])
    (caption,) = captioned_image.captions
    assert caption.mask == empty_caption.mask or caption.box == empty_caption.box
