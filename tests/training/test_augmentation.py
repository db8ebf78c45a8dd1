"""A picture that is flipped or cropped takes its boxes, masks and words along."""

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
def samples(draw):
    """A gray picture with one to three rectangles, each of its own brightness, that do not overlap."""
    width, height = draw(st.integers(12, 60)), draw(st.integers(6, 40))
    pixels = np.zeros((height, width, 3), np.uint8)
    count = draw(st.integers(1, 3))
    regions = []
    for number in range(count):
        left, right = number * width // count, (number + 1) * width // count
        x1, y1 = draw(st.integers(left, right - 2)), draw(st.integers(0, height - 2))
        x2, y2 = draw(st.integers(x1 + 1, right)), draw(st.integers(y1 + 1, height))
        pixels[y1:y2, x1:x2] = 50 * (number + 1)
        mask = pixels[..., 0] == 50 * (number + 1)
        box = tuple(map(float, (x1, y1, x2, y2)))
        regions.append(Region(number, box, encode_rle(mask), "shape", ("left of a right hand", "leftover bright")))
    return Sample(Image.fromarray(pixels), 1, tuple(regions))


def shown(sample, region):
    """Where the picture has the region's brightness."""
    return np.asarray(sample.image)[..., 0] == 50 * (region.id + 1)


@settings(deadline=None)
@given(samples(), st.integers(0, 2**32 - 1))
def test_boxes_and_masks_stay_on_what_they_show(sample, seed):
    augment = Augmentation(flip=0.5, crop=0.5, keep=0.4)
    changed = augment(sample, np.random.default_rng(seed))
    for region in changed.regions:
        before = sample.regions[region.id]
        assert (decode_rle(region.mask) == shown(changed, region)).all()
        assert region.box == mask_to_box(region.mask)
        assert compute_mask_area(region.mask) >= 0.4 * compute_mask_area(before.mask)
    lost = {region.id for region in sample.regions} - {region.id for region in changed.regions}
    assert all(
        shown(changed, region).sum() < 0.4 * compute_mask_area(region.mask)
        for region in sample.regions
        if region.id in lost
    )


@given(samples())
def test_a_flip_changes_left_and_right_in_words_and_twice_changes_nothing(sample):
    image, regions = flip_horizontally(sample.image, list(sample.regions))
    assert regions[0].phrases == ("right of a left hand", "leftover bright")
    again, back = flip_horizontally(image, regions)
    assert np.array_equal(again, sample.image)
    assert tuple(back) == sample.regions


def test_words_keep_their_capitals_and_text_among_the_attributes_changes_too():
    region = Region(1, (0, 0, 2, 2), None, "hand", ("Left one, right there",), {"relation": "left of", "count": 2})
    _, (mirrored,) = flip_horizontally(Image.new("RGB", (8, 8)), [region])
    assert mirrored.phrases == ("Right one, left there",)
    assert mirrored.attributes == {"relation": "right of", "count": 2}
    assert mirrored.name == "hand"


def test_the_places_that_phrases_of_a_flipped_scene_state_are_true():
    stated = 0
    for sample in Scenes("train", num_images=20, image_size=64, seed=2):
        _, regions = flip_horizontally(sample.image, list(sample.regions))
        places = []
        for region in regions:
            x, y = region.attributes["center"]
            attributes = {**region.attributes, "center": (sample.image.width - x, y)}
            places.append(Region(region.id, region.box, region.mask, region.name, region.phrases, attributes))
        for region in places:
            for phrase in region.phrases[1:]:
                stated += 1
                assert is_relation_true(parse_statement(phrase), region, places), phrase
            relation = region.attributes.get("relation")
            assert relation is None or relation in region.phrases[-1]
    assert stated > 20


def test_a_region_without_a_mask_is_dropped_by_what_is_left_of_its_box():
    region = Region(1, (0.0, 0.0, 10.0, 10.0))
    assert crop_region(region, (5, 0, 20, 20), 100, 0.4).box == (0, 0, 5, 10)
    assert crop_region(region, (7, 0, 20, 20), 100, 0.4) is None
    assert crop_region(region, (10, 0, 20, 20), 100, 0.0) is None


def test_nothing_asked_for_changes_nothing():
    sample = Scenes("train", num_images=1, image_size=64)[0]
    plain = Augmentation(flip=0.0, crop=1.0, color=0.0)(sample, np.random.default_rng(0))
    assert np.array_equal(plain.image, sample.image)
    assert plain.regions == sample.regions


@pytest.mark.parametrize("color", [0.3, 0.9])
def test_colors_stray_and_regions_stay(color):
    sample = Scenes("train", num_images=1, image_size=64)[0]
    changed = Augmentation(flip=0.0, color=color)(sample, np.random.default_rng(0))
    assert changed.image.size == sample.image.size
    assert not np.array_equal(changed.image, sample.image)
    assert changed.regions == sample.regions


@settings(deadline=None)
@given(samples(), st.integers(0, 2**32 - 1), st.sampled_from([(0.1, 2.0), (1.0, 2.0), (0.5, 0.5), (1.0, 1.0)]))
def test_large_scale_jitter_takes_boxes_and_masks_along(sample, seed, scale):
    changed = Augmentation(flip=0.5, scale=scale, keep=0.4)(sample, np.random.default_rng(seed))
    side = max(sample.image.size)
    assert changed.image.size == (side, side)
    for region in changed.regions:
        mask = decode_rle(region.mask)
        assert mask.shape == (side, side)
        assert region.box == mask_to_box(region.mask)
        before = compute_mask_area(sample.regions[region.id].mask)
        assert compute_mask_area(region.mask) <= (2 * scale[1] + 1) ** 2 * before
        x1, y1, x2, y2 = sample.regions[region.id].box
        inner = decode_rle(region.mask)[1:-1, 1:-1]
        if scale[0] >= 1 and min(x2 - x1, y2 - y1) >= 3 and inner.sum() >= 16:  # and not mixed with what is around it
            seen = np.asarray(changed.image)[mask][:, 0].astype(int)
            assert np.abs(seen - 50 * (region.id + 1)).min() <= 2
    if scale == (1.0, 1.0):
        assert len(changed.regions) == len(sample.regions)
        assert [compute_mask_area(r.mask) for r in changed.regions] == [
            compute_mask_area(r.mask) for r in sample.regions
        ]


@settings(deadline=None)
@given(samples(), st.integers(0, 2**32 - 1), st.floats(0.1, 2.0))
def test_what_jitter_shows_whole_has_its_area_scaled_and_points_in_it_stay_on_it(sample, seed, factor):
    changed = Augmentation(flip=0.5, scale=(factor, factor), keep=1.0)(sample, np.random.default_rng(seed))
    for region in changed.regions:
        x1, y1, x2, y2 = region.box
        assert 0 <= x1 < x2 <= changed.image.width
        assert 0 <= y1 < y2 <= changed.image.height
        mask = decode_rle(region.mask)
        outside = mask.copy()
        outside[int(y1) : int(y2), int(x1) : int(x2)] = False
        assert not outside.any()
        before = sample.regions[region.id].box
        across, down = (before[2] - before[0]) * factor, (before[3] - before[1]) * factor
        assert abs(x2 - x1 - across) <= 2 + 0.1 * across  # a picture of a few pixels is scaled by whole ones
        assert abs(y2 - y1 - down) <= 2 + 0.1 * down
        (x, y, _), *_ = sample_point_prompt(region, np.random.default_rng(seed)).points
        assert mask[int(y), int(x)]


@pytest.mark.parametrize("masked", [False, True])
def test_a_crop_and_jitter_together_keep_no_region_that_lost_most_of_its_area(masked):
    pixels = np.zeros((40, 60), bool)
    pixels[10:30, 20:40] = True
    region = Region(1, (20.0, 10.0, 40.0, 30.0), encode_rle(pixels) if masked else None, "thing")
    sample, kept = Sample(Image.new("RGB", (60, 40)), 1, (region,)), []
    for seed in range(300):
        changed = Augmentation(flip=0.5, crop=0.5, scale=(2.0, 2.0), keep=0.4)(sample, np.random.default_rng(seed))
        for x1, y1, x2, y2 in (region.box for region in changed.regions):
            kept.append((x2 - x1) * (y2 - y1) / 2**2)
    assert 20 < len(kept) < 280
    assert min(kept) >= 0.4 * 20 * 20 - 0.5 * 20  # sides are halved to whole pixels


def test_padding_is_at_the_right_and_below_whatever_else_happens():
    sample = Scenes("train", num_images=1, image_size=64)[0]
    for seed in range(10):
        changed = Augmentation(flip=0.5, color=0.5, scale=(0.5, 0.5))(sample, np.random.default_rng(seed))
        pixels = np.asarray(changed.image)
        assert (pixels[32:] == PADDING_COLOR).all()
        assert (pixels[:, 32:] == PADDING_COLOR).all()
        assert (pixels[:32, :32] != PADDING_COLOR).any()


def test_words_of_a_side_are_known_in_all_their_forms():
    told = ("the LEFT one", "leftmost car, Right-hand lane", "rightward", "leftover, bright, upright copyright")
    region = Region(1, (0, 0, 2, 2), None, "hand", told)
    _, (mirrored,) = flip_horizontally(Image.new("RGB", (8, 8)), [region])
    assert mirrored.phrases == ("the RIGHT one", "rightmost car, Left-hand lane", "leftward", told[3])


def test_jitter_scales_a_box_without_a_mask():
    sample = Sample(Image.new("RGB", (100, 50)), 1, (Region(1, (20.0, 10.0, 40.0, 30.0), None, "car"),))
    changed = Augmentation(flip=0, scale=(0.5, 0.5))(sample, np.random.default_rng(0))
    assert changed.image.size == (100, 100)
    assert changed.regions[0].box == (10.0, 5.0, 20.0, 15.0)


def test_what_names_a_side_can_be_left_out_of_a_flipped_picture():
    named = (
        Region(1, (0.0, 0.0, 5.0, 5.0), None, "a", ("the left one",)),
        Region(2, (0.0, 0.0, 5.0, 5.0), None, "a", ("one that is left-handed",)),
        Region(3, (0.0, 0.0, 5.0, 5.0), None, "a", ("leftover",), {"place": "right"}),
        Region(4, (0.0, 0.0, 5.0, 5.0), None, "a", ("leftover",)),
    )
    sample = Sample(Image.new("RGB", (20, 10)), 1, named)
    flipped_one = Augmentation(flip=1.0, sides="drop")(sample, np.random.default_rng(0))
    assert [region.id for region in flipped_one.regions] == [4]
    assert len(Augmentation(flip=0.0, sides="drop")(sample, np.random.default_rng(0)).regions) == 4
