import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.output.colors import BACKGROUND_COLOR, FOREGROUND_COLOR, REGION_COLORS, choose_text_color
from sca.output.label_layout import MAX_LABEL_LINES, LabelBlock, LabelPlacer
from sca.output.png import MASK_OPACITY, MIN_CANVAS_SIZE, draw_captions


def changed(image: Image.Image, captions) -> np.ndarray:
    """(height, width) bool: where drawing makes a difference."""
    return (np.asarray(draw_captions(image, captions)) != np.asarray(draw_captions(image, []))).any(-1)


def test_a_small_picture_is_enlarged_by_a_whole_factor(picture, captions):
    drawn = draw_captions(picture, [])
    assert drawn.size == (40 * 13, 30 * 13)
    assert (np.asarray(drawn)[::13, ::13] == np.asarray(picture)).all()
    assert draw_captions(Image.new("RGB", (600, 500)), captions).size == (600, 500)


def test_the_picture_given_is_not_drawn_on(captions):
    image = Image.new("RGB", (600, 500))
    draw_captions(image, captions[1:3])
    assert not np.asarray(image).any()


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 3000), (513, 4)])
def test_extreme_pictures_leave_room_for_words(size):
    caption = Caption("a caption of several words", 1.0, (0, 0, *size), None, None, Prompt(box=(0, 0, *size)), 0)
    drawn = draw_captions(Image.new("RGB", size), [caption])
    assert drawn.width >= MIN_CANVAS_SIZE[0]
    assert drawn.height >= MIN_CANVAS_SIZE[1]
    assert (np.asarray(drawn) == REGION_COLORS[0]).all(-1).sum() > 1000, "the label's background"


def test_masks_are_tinted_inside_and_nowhere_else():
    """Black under a translucent color is the dimmed color, under the contour the color itself."""
    mask = np.zeros((600, 600), bool)
    mask[200:400, 300:500] = True
    caption = Caption("x", 1.0, None, masks.encode_rle(mask), 1.0, Prompt(mask=mask), 0)
    drawn = np.asarray(draw_captions(Image.new("RGB", (600, 600)), [caption])).astype(int)
    assert np.abs(drawn[300, 400] - np.array(REGION_COLORS[0]) * MASK_OPACITY).max() <= 1
    assert (drawn[200:400, 300] == REGION_COLORS[0]).all(), "the left edge"
    assert (drawn[399, 300:500] == REGION_COLORS[0]).all(), "the lower edge"
    drawn[200:400, 300:500] = 0
    assert not drawn[100:].any(), "outside, but for the label in the corner"


def test_points_are_green_inside_and_red_outside():
    prompt = Prompt(points=((300, 300, 1), (100, 400, 0)))
    drawn = draw_captions(Image.new("RGB", (600, 600)), [Caption("x", 1.0, None, None, None, prompt, 0)])
    assert drawn.getpixel((300, 300)) == FOREGROUND_COLOR
    assert drawn.getpixel((100, 400)) == BACKGROUND_COLOR


def test_labels_stay_inside_and_apart():
    """A dozen regions at one corner: every label is whole, none covers another."""
    placement = LabelPlacer((600, 400), [], [])
    taken = [placement.place_label((90, 20), (590, 0, 600, 10)) for _ in range(12)]
    for n, (x1, y1, x2, y2) in enumerate(taken):
        assert 0 <= x1 < x2 <= 600
        assert 0 <= y1 < y2 <= 400
        assert (x2 - x1, y2 - y1) == (90, 20)
        for a, b, c, d in taken[:n]:
            assert x2 <= a or c <= x1 or y2 <= b or d <= y1


def test_a_label_leaves_its_neighbors_in_sight():
    """Above and below the region are small ones: of the places close by, the label takes one that hides nothing."""
    shown = near, above, below = (100, 100, 200, 140), (100, 78, 190, 98), (100, 142, 190, 162)
    x1, y1, x2, y2 = LabelPlacer((600, 400), [], shown).place_label((90, 20), near)
    for a, b, c, d in (near, above, below):
        assert x2 <= a or c <= x1 or y2 <= b or d <= y1
    assert abs(x1 - 100) + abs(y1 - 100) < 150


def test_placing_a_label_costs_the_same_beside_thousands_of_others():
    """Nothing is kept of single regions and labels, and the same number of lines runs for each label."""
    boxes = [(x, y, x + 9, y + 9) for x in range(0, 500, 10) for y in range(0, 400, 10)]
    few, many = LabelPlacer((600, 400), [], boxes[:1]), LabelPlacer((600, 400), boxes, boxes)
    for box in boxes[:50]:
        many.place_label((90, 20), box)
    near = (100, 100, 120, 120)
    assert len(pickle.dumps(many)) == len(pickle.dumps(few))
    assert count_lines(many.place_label, (90, 20), near) == count_lines(few.place_label, (90, 20), near)


def count_lines(function, *arguments):
    """How many lines of Python run in a call."""
    counted = 0

    def trace(frame, event, _):
        nonlocal counted
        counted += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return counted


def test_a_label_fits_its_background():
    for text in ("word", "several words " * 40, "w" * 500, "gjpqy ÄÖ", ""):
        block = LabelBlock(text, 20, 200)
        canvas = Image.new("RGB", (300, 300))
        block.draw(ImageDraw.Draw(canvas), 40, 50, (255, 255, 255), (200, 0, 0))
        box = canvas.getbbox()
        assert box == (40, 50, 40 + block.size[0], 50 + block.size[1])
        assert block.size[0] <= 202
        assert block.text.count("\n") < MAX_LABEL_LINES
        words = np.asarray(canvas)[..., 2] > 128
        assert words.any()
        rows, columns = np.nonzero(words)
        assert rows.min() > 50
        assert rows.max() < box[3] - 1
        assert columns.min() > 40
        assert columns.max() < box[2] - 1


def test_a_long_caption_ends_in_an_ellipsis():
    assert LabelBlock("several words " * 40, 20, 200).text.endswith("...")


def test_words_stand_out_from_every_background():
    def light(color):
        linear = [(c / 255 + 0.055) ** 2.4 / 1.055**2.4 if c > 10 else c / 255 / 12.92 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    for color in REGION_COLORS:
        pair = sorted((light(color), light(choose_text_color(color))))
        assert pair[1] / pair[0] > 3


def test_hostile_captions_are_drawn(picture, hostile):
    assert changed(picture, hostile).any()


def test_accents_are_legible_or_folded():
    assert LabelBlock("café", 20, 200).text in ("café", "cafe")


def test_empty_masks_and_fractional_boxes_are_drawn(picture, captions):
    empty = replace(captions[0], mask=masks.encode_rle(np.zeros((30, 40), bool)), box=None)
    thin = replace(captions[1], box=(39.9, 29.9, 40.0, 30.0))
    beyond = replace(captions[1], box=(-5.0, -5.0, 60.0, 60.0))
    assert changed(picture, [empty, thin, beyond]).any()
