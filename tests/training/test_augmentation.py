"""Augmentation flips, crops and scales boxes, masks and phrases together with the image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sca_registry.contracts import Region, Sample

from sca.data.point_prompts import sample_point_prompt
from sca.data.scenes import Scenes, is_relation_true, parse_statement
from sca.io.masks import compute_mask_area, decode_rle, encode_rle, mask_to_box
from sca.training.augmentation import PADDING_COLOR, Augmentation, crop_region, flip_horizontally


@st.composite
def draw_samples(draw):
    """Draw a gray image with one to three rectangles of different brightness that do not overlap."""
    width, height = draw(st.integers(12, 60)), draw(st.integers(6, 40))
    pixels = np.zeros((height, width, 3), np.uint8)
    num_regions = draw(st.integers(1, 3))
    regions = []
    for index in range(num_regions):
        left, right = index * width // num_regions, (index + 1) * width // num_regions
        x1, y1 = draw(st.integers(left, right - 2)), draw(st.integers(0, height - 2))
        x2, y2 = draw(st.integers(x1 + 1, right)), draw(st.integers(y1 + 1, height))
        pixels[y1:y2, x1:x2] = 50 * (index + 1)
        mask = pixels[..., 0] == 50 * (index + 1)
        box = tuple(map(float, (x1, y1, x2, y2)))
        regions.append(Region(index, box, encode_rle(mask), "shape", ("left of a right hand", "leftover bright")))
    return Sample(Image.fromarray(pixels), 1, tuple(regions))


def locate_region_pixels(sample, region):
    """Return the pixels that have the region's brightness, a boolean mask of shape (H, W)."""
    return np.asarray(sample.image)[..., 0] == 50 * (region.id + 1)


@settings(deadline=None)
@given(draw_samples(), st.integers(0, 2**32 - 1))
def test_augmentation_keeps_boxes_and_masks_on_their_regions(sample, seed):
    augment = Augmentation(flip_prob=0.5, min_crop_fraction=0.5, min_visibility=0.4)
    augmented = augment(sample, np.random.default_rng(seed))
    for region in augmented.regions:
        original_region = sample.regions[region.id]
        assert (decode_rle(region.mask) == locate_region_pixels(augmented, region)).all()
        assert region.box == mask_to_box(region.mask)
        assert compute_mask_area(region.mask) >= 0.4 * compute_mask_area(original_region.mask)
    dropped_ids = {region.id for region in sample.regions} - {region.id for region in augmented.regions}
    assert all(
        locate_region_pixels(augmented, region).sum() < 0.4 * compute_mask_area(region.mask)
        for region in sample.regions
        if region.id in dropped_ids
    )


@given(draw_samples())
def test_flip_swaps_left_and_right_in_phrases_and_is_its_own_inverse(sample):
    flipped_image, flipped_regions = flip_horizontally(sample.image, list(sample.regions))
    assert flipped_regions[0].phrases == ("right of a left hand", "leftover bright")
    restored_image, restored_regions = flip_horizontally(flipped_image, flipped_regions)
    assert np.array_equal(restored_image, sample.image)
    assert tuple(restored_regions) == sample.regions


def test_flip_keeps_capitalization_and_swaps_sides_in_attributes():
    region = Region(1, (0, 0, 2, 2), None, "hand", ("Left one, right there",), {"relation": "left of", "count": 2})
    _, (mirrored,) = flip_horizontally(Image.new("RGB", (8, 8)), [region])
    assert mirrored.phrases == ("Right one, left there",)
    assert mirrored.attributes == {"relation": "right of", "count": 2}
    assert mirrored.name == "hand"


def test_flip_keeps_relations_in_scene_phrases_true():
    num_relations = 0
    for sample in Scenes("train", num_images=20, image_size=64, seed=2):
        _, regions = flip_horizontally(sample.image, list(sample.regions))
        mirrored_regions = []
        for region in regions:
            x, y = region.attributes["center"]
            attributes = {**region.attributes, "center": (sample.image.width - x, y)}
            mirrored_regions.append(Region(region.id, region.box, region.mask, region.name, region.phrases, attributes))
        for region in mirrored_regions:
            for phrase in region.phrases[1:]:
                num_relations += 1
                assert is_relation_true(parse_statement(phrase), region, mirrored_regions), phrase
            relation = region.attributes.get("relation")
            assert relation is None or relation in region.phrases[-1]
    assert num_relations > 20


def test_crop_drops_region_without_mask_by_remaining_box_area():
    region = Region(1, (0.0, 0.0, 10.0, 10.0))
    assert crop_region(region, (5, 0, 20, 20), 100, 0.4).box == (0, 0, 5, 10)
    assert crop_region(region, (7, 0, 20, 20), 100, 0.4) is None
    assert crop_region(region, (10, 0, 20, 20), 100, 0.0) is None


def test_augmentation_with_all_options_off_changes_nothing():
    sample = Scenes("train", num_images=1, image_size=64)[0]
    augmented = Augmentation(flip_prob=0.0, min_crop_fraction=1.0, color_jitter=0.0)(sample, np.random.default_rng(0))
    assert np.array_equal(augmented.image, sample.image)
    assert augmented.regions == sample.regions


@pytest.mark.parametrize("color", [0.3, 0.9])
def test_color_jitter_changes_pixels_and_keeps_regions(color):
    sample = Scenes("train", num_images=1, image_size=64)[0]
    augmented = Augmentation(flip_prob=0.0, color_jitter=color)(sample, np.random.default_rng(0))
    assert augmented.image.size == sample.image.size
    assert not np.array_equal(augmented.image, sample.image)
    assert augmented.regions == sample.regions


@settings(deadline=None)
@given(draw_samples(), st.integers(0, 2**32 - 1), st.sampled_from([(0.1, 2.0), (1.0, 2.0), (0.5, 0.5), (1.0, 1.0)]))
def test_scale_jitter_transforms_boxes_and_masks_with_the_image(sample, seed, scale):
    augmented = Augmentation(flip_prob=0.5, scale_range=scale, min_visibility=0.4)(sample, np.random.default_rng(seed))
    side = max(sample.image.size)
    assert augmented.image.size == (side, side)
    for region in augmented.regions:
        mask = decode_rle(region.mask)
        assert mask.shape == (side, side)
        assert region.box == mask_to_box(region.mask)
        original_area = compute_mask_area(sample.regions[region.id].mask)
        assert compute_mask_area(region.mask) <= (2 * scale[1] + 1) ** 2 * original_area
        x1, y1, x2, y2 = sample.regions[region.id].box
        mask_interior = decode_rle(region.mask)[1:-1, 1:-1]
        if (
            scale[0] >= 1 and min(x2 - x1, y2 - y1) >= 3 and mask_interior.sum() >= 16
        ):  # and not blended with its surroundings
            pixel_values = np.asarray(augmented.image)[mask][:, 0].astype(int)
            assert np.abs(pixel_values - 50 * (region.id + 1)).min() <= 2
    if scale == (1.0, 1.0):
        assert len(augmented.regions) == len(sample.regions)
        assert [compute_mask_area(r.mask) for r in augmented.regions] == [
            compute_mask_area(r.mask) for r in sample.regions
        ]


@settings(deadline=None)
@given(draw_samples(), st.integers(0, 2**32 - 1), st.floats(0.1, 2.0))
def test_scale_jitter_scales_fully_visible_boxes_and_keeps_point_prompts_in_masks(sample, seed, factor):
    augmented = Augmentation(flip_prob=0.5, scale_range=(factor, factor), min_visibility=1.0)(
        sample, np.random.default_rng(seed)
    )
    for region in augmented.regions:
        x1, y1, x2, y2 = region.box
        assert 0 <= x1 < x2 <= augmented.image.width
        assert 0 <= y1 < y2 <= augmented.image.height
        mask = decode_rle(region.mask)
        mask_outside_box = mask.copy()
        mask_outside_box[int(y1) : int(y2), int(x1) : int(x2)] = False
        assert not mask_outside_box.any()
        original_box = sample.regions[region.id].box
        expected_width, expected_height = (
            (original_box[2] - original_box[0]) * factor,
            (original_box[3] - original_box[1]) * factor,
        )
        assert (
            abs(x2 - x1 - expected_width) <= 2 + 0.1 * expected_width
        )  # the size of a tiny image is rounded to whole pixels
        assert abs(y2 - y1 - expected_height) <= 2 + 0.1 * expected_height
        (x, y, _), *_ = sample_point_prompt(region, np.random.default_rng(seed)).points
        assert mask[int(y), int(x)]


@pytest.mark.parametrize("has_mask", [False, True])
def test_crop_with_scale_jitter_drops_regions_that_lost_most_of_their_area(has_mask):
    pixels = np.zeros((40, 60), bool)
    pixels[10:30, 20:40] = True
    region = Region(1, (20.0, 10.0, 40.0, 30.0), encode_rle(pixels) if has_mask else None, "thing")
    sample, kept_areas = Sample(Image.new("RGB", (60, 40)), 1, (region,)), []
    for seed in range(300):
        augmented = Augmentation(flip_prob=0.5, min_crop_fraction=0.5, scale_range=(2.0, 2.0), min_visibility=0.4)(
            sample, np.random.default_rng(seed)
        )
        for x1, y1, x2, y2 in (region.box for region in augmented.regions):
            kept_areas.append((x2 - x1) * (y2 - y1) / 2**2)
    assert 20 < len(kept_areas) < 280
    assert min(kept_areas) >= 0.4 * 20 * 20 - 0.5 * 20  # half sizes are rounded to whole pixels


def test_scale_jitter_pads_only_right_and_bottom():
    sample = Scenes("train", num_images=1, image_size=64)[0]
    for seed in range(10):
        augmented = Augmentation(flip_prob=0.5, color_jitter=0.5, scale_range=(0.5, 0.5))(
            sample, np.random.default_rng(seed)
        )
        pixels = np.asarray(augmented.image)
        assert (pixels[32:] == PADDING_COLOR).all()
        assert (pixels[:, 32:] == PADDING_COLOR).all()
        assert (pixels[:32, :32] != PADDING_COLOR).any()


def test_flip_swaps_all_word_forms_of_left_and_right():
    phrases = ("the LEFT one", "leftmost car, Right-hand lane", "rightward", "leftover, bright, upright copyright")
    region = Region(1, (0, 0, 2, 2), None, "hand", phrases)
    _, (mirrored,) = flip_horizontally(Image.new("RGB", (8, 8)), [region])
    assert mirrored.phrases == ("the RIGHT one", "rightmost car, Left-hand lane", "leftward", phrases[3])


def test_scale_jitter_scales_box_without_mask():
    sample = Sample(Image.new("RGB", (100, 50)), 1, (Region(1, (20.0, 10.0, 40.0, 30.0), None, "car"),))
    augmented = Augmentation(flip_prob=0, scale_range=(0.5, 0.5))(sample, np.random.default_rng(0))
    assert augmented.image.size == (100, 100)
    assert augmented.regions[0].box == (10.0, 5.0, 20.0, 15.0)


def test_augmentation_can_drop_flipped_regions_that_name_a_side():
    regions = (
        Region(1, (0.0, 0.0, 5.0, 5.0), None, "a", ("the left one",)),
        Region(2, (0.0, 0.0, 5.0, 5.0), None, "a", ("one that is left-handed",)),
        Region(3, (0.0, 0.0, 5.0, 5.0), None, "a", ("leftover",), {"place": "right"}),
        Region(4, (0.0, 0.0, 5.0, 5.0), None, "a", ("leftover",)),
    )
    sample = Sample(Image.new("RGB", (20, 10)), 1, regions)
    flipped = Augmentation(flip_prob=1.0, side_words="drop")(sample, np.random.default_rng(0))
    assert [region.id for region in flipped.regions] == [4]
    assert len(Augmentation(flip_prob=0.0, side_words="drop")(sample, np.random.default_rng(0)).regions) == 4
