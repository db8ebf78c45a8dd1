"""Whatever `sca.output` writes for a labeling tool comes back from `read_captions` as it was."""

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


def pixel(x, y):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y, x] = True
    return mask


ring = np.ones((HEIGHT, WIDTH), bool)
ring[3:9, 3:9] = False
SPECIAL = [pixel(0, 0), pixel(WIDTH - 1, HEIGHT - 1), pixel(5, 6) | pixel(9, 9), ring, np.ones((HEIGHT, WIDTH), bool)]

any_mask = st.one_of(st.sampled_from(SPECIAL), arrays.arrays(bool, (HEIGHT, WIDTH))).filter(np.any)
x, y = st.floats(0, WIDTH - 0.5), st.floats(0, HEIGHT - 0.5)
boxes = st.tuples(x, y, x, y).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 0.25, max(b[1], b[3]) + 0.25)
)
boxes = boxes.filter(lambda box: max(box) > 1)  # those within 0..1 are refused, since normalized
points = st.tuples(x, y).filter(lambda point: max(point) > 1)  # and so are points
texts = st.text(min_size=1, max_size=8)


def of_mask(text, mask):
    return Caption(text, 0.5, masks.mask_to_box(mask), masks.encode_rle(mask), None, Prompt(), 0)


def of_box(text, box):
    return Caption(text, 0.5, box, None, None, Prompt(), 0)


def of_point(text, point):
    return Caption(text, 0.5, None, None, None, Prompt(points=((*point, 1),)), 0)


regions = st.one_of(
    st.builds(of_mask, texts, any_mask), st.builds(of_box, texts, boxes), st.builds(of_point, texts, points)
)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=25)
@given(captions=st.lists(regions, min_size=1, max_size=4))
@example([of_mask("x", mask) for mask in SPECIAL])
@pytest.mark.slow
def test_regions_come_back_exactly(name, captions):
    with tempfile.TemporaryDirectory() as folder:
        with MultiFormatWriter(folder, (name,)) as writers:
            writers.add("a.png", Image.new("RGB", (WIDTH, HEIGHT)), captions)
        skip = SkipCounter()
        (found,) = read_captions(writers.paths[name], skip)
    assert found.size == (WIDTH, HEIGHT)
    assert not skip.counts
    for told, expected in zip(found.captions, captions, strict=True):
        assert (told.text, told.mask, told.score) == (expected.text, expected.mask, 0.5)
        assert told.box == (expected.box if expected.box is None else pytest.approx(expected.box, abs=1e-9))
        if name != "coco" and expected.prompt.points:  # COCO has no place for points
            (at,), (point,) = told.prompt.points, expected.prompt.points
            assert at == pytest.approx(point, abs=1e-9)
        assert math.isnan(told.predicted_iou or math.nan)


@pytest.mark.parametrize("name", FORMATS)
def test_empty_masks_come_back_or_give_way_to_the_box(tmp_path, name):
    nothing = Caption("x", 0.5, (1, 2, 3, 4), masks.encode_rle(np.zeros((HEIGHT, WIDTH), bool)), None, Prompt(), 0)
    with MultiFormatWriter(tmp_path, (name,)) as writers:
        writers.add("a.png", Image.new("RGB", (WIDTH, HEIGHT)), [nothing])
    (found,) = read_captions(writers.paths[name])
    (told,) = found.captions
    assert told.mask == nothing.mask or told.box == nothing.box
