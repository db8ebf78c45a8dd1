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


def find_changed_pixels(image: Image.Image, captions) -> np.ndarray:
    """Return (height, width) bool: pixels that drawing changes."""
    return (np.asarray(draw_captions(image, captions)) != np.asarray(draw_captions(image, []))).any(-1)


def test_draw_captions_enlarges_a_small_image_by_an_integer_factor(noise_image, captions):
    output = draw_captions(noise_image, [])
    assert output.size == (40 * 13, 30 * 13)
    assert (np.asarray(output)[::13, ::13] == np.asarray(noise_image)).all()
    assert draw_captions(Image.new("RGB", (600, 500)), captions).size == (600, 500)


def test_draw_captions_does_not_modify_its_input_image(captions):
    image = Image.new("RGB", (600, 500))
    draw_captions(image, captions[1:3])
    assert not np.asarray(image).any()


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 3000), (513, 4)])
def test_draw_captions_leaves_room_for_labels_on_extreme_sizes(size):
    caption = Caption("a caption of several words", 1.0, (0, 0, *size), None, None, Prompt(box=(0, 0, *size)), 0)
    output = draw_captions(Image.new("RGB", size), [caption])
    assert output.width >= MIN_CANVAS_SIZE[0]
    assert output.height >= MIN_CANVAS_SIZE[1]
    assert (np.asarray(output) == REGION_COLORS[0]).all(-1).sum() > 1000, "the label's background"


def test_draw_captions_tints_pixels_only_inside_masks():
    """Black under a translucent color is the dimmed color; under the contour it is the color."""
    mask = np.zeros((600, 600), bool)
    mask[200:400, 300:500] = True
    caption = Caption("x", 1.0, None, masks.encode_rle(mask), 1.0, Prompt(mask=mask), 0)
    pixels = np.asarray(draw_captions(Image.new("RGB", (600, 600)), [caption])).astype(int)
    assert np.abs(pixels[300, 400] - np.array(REGION_COLORS[0]) * MASK_OPACITY).max() <= 1
    assert (pixels[200:400, 300] == REGION_COLORS[0]).all(), "the left edge"
    assert (pixels[399, 300:500] == REGION_COLORS[0]).all(), "the lower edge"
    pixels[200:400, 300:500] = 0
    assert not pixels[100:].any(), "outside, but for the label in the corner"


def test_draw_captions_draws_inside_points_green_and_outside_points_red():
    prompt = Prompt(points=((300, 300, 1), (100, 400, 0)))
    output = draw_captions(Image.new("RGB", (600, 600)), [Caption("x", 1.0, None, None, None, prompt, 0)])
    assert output.getpixel((300, 300)) == FOREGROUND_COLOR
    assert output.getpixel((100, 400)) == BACKGROUND_COLOR


def test_place_label_keeps_labels_inside_the_image_and_disjoint():
    """Twelve regions at one corner: every label is fully visible, and none overlap."""
    placer = LabelPlacer((600, 400), [], [])
    label_boxes = [placer.place_label((90, 20), (590, 0, 600, 10)) for _ in range(12)]
    for n, (x1, y1, x2, y2) in enumerate(label_boxes):
        assert 0 <= x1 < x2 <= 600
        assert 0 <= y1 < y2 <= 400
        assert (x2 - x1, y2 - y1) == (90, 20)
        for left, top, right, bottom in label_boxes[:n]:
            assert x2 <= left or right <= x1 or y2 <= top or bottom <= y1


def test_place_label_does_not_cover_neighboring_regions():
    """Small regions are above and below the region: the label goes to a nearby position that hides none."""
    region_boxes = labeled_box, box_above, box_below = (100, 100, 200, 140), (100, 78, 190, 98), (100, 142, 190, 162)
    x1, y1, x2, y2 = LabelPlacer((600, 400), [], region_boxes).place_label((90, 20), labeled_box)
    for left, top, right, bottom in (labeled_box, box_above, box_below):
        assert x2 <= left or right <= x1 or y2 <= top or bottom <= y1
    assert abs(x1 - 100) + abs(y1 - 100) < 150


def test_place_label_cost_is_independent_of_the_number_of_labels():
    """No state per region or label is stored, and the number of executed lines per label is constant."""
    boxes = [(x, y, x + 9, y + 9) for x in range(0, 500, 10) for y in range(0, 400, 10)]
    empty_placer, full_placer = LabelPlacer((600, 400), [], boxes[:1]), LabelPlacer((600, 400), boxes, boxes)
    for box in boxes[:50]:
        full_placer.place_label((90, 20), box)
    labeled_box = (100, 100, 120, 120)
    assert len(pickle.dumps(full_placer)) == len(pickle.dumps(empty_placer))
    assert count_executed_lines(full_placer.place_label, (90, 20), labeled_box) == count_executed_lines(
        empty_placer.place_label, (90, 20), labeled_box
    )


def count_executed_lines(function, *arguments):
    """Return the number of Python lines executed in a call."""
    num_lines = 0

    def trace_lines(frame, event, _):
        nonlocal num_lines
        num_lines += event == "line"
        return trace_lines

    original_trace = sys.gettrace()
    sys.settrace(trace_lines)
    try:
        function(*arguments)
    finally:
        sys.settrace(original_trace)
    return num_lines


def test_label_block_text_fits_its_background():
    for text in ("word", "several words " * 40, "w" * 500, "gjpqy ÄÖ", ""):
        block = LabelBlock(text, 20, 200)
        canvas = Image.new("RGB", (300, 300))
        block.draw(ImageDraw.Draw(canvas), 40, 50, (255, 255, 255), (200, 0, 0))
        box = canvas.getbbox()
        assert box == (40, 50, 40 + block.size[0], 50 + block.size[1])
        assert block.size[0] <= 202
        assert block.text.count("\n") < MAX_LABEL_LINES
        text_pixels = np.asarray(canvas)[..., 2] > 128
        assert text_pixels.any()
        rows, columns = np.nonzero(text_pixels)
        assert rows.min() > 50
        assert rows.max() < box[3] - 1
        assert columns.min() > 40
        assert columns.max() < box[2] - 1


def test_label_block_ends_a_long_caption_with_an_ellipsis():
    assert LabelBlock("several words " * 40, 20, 200).text.endswith("...")


def test_choose_text_color_contrasts_with_every_region_color():
    def compute_luminance(color):
        linear_channels = [(c / 255 + 0.055) ** 2.4 / 1.055**2.4 if c > 10 else c / 255 / 12.92 for c in color]
        return 0.2126 * linear_channels[0] + 0.7152 * linear_channels[1] + 0.0722 * linear_channels[2] + 0.05

    for color in REGION_COLORS:
        luminances = sorted((compute_luminance(color), compute_luminance(choose_text_color(color))))
        assert luminances[1] / luminances[0] > 3


def test_draw_captions_draws_hostile_captions(noise_image, hostile_captions):
    assert find_changed_pixels(noise_image, hostile_captions).any()


def test_label_block_keeps_or_folds_accents():
    assert LabelBlock("café", 20, 200).text in ("café", "cafe")


def test_draw_captions_draws_empty_masks_and_fractional_boxes(noise_image, captions):
    empty_mask_caption = replace(captions[0], mask=masks.encode_rle(np.zeros((30, 40), bool)), box=None)
    thin_box_caption = replace(captions[1], box=(39.9, 29.9, 40.0, 30.0))
    oversized_box_caption = replace(captions[1], box=(-5.0, -5.0, 60.0, 60.0))
    assert find_changed_pixels(noise_image, [empty_mask_caption, thin_box_caption, oversized_box_caption]).any()
