"""A picture that is flipped or cropped takes its boxes, masks and words along."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sca_registry.contracts import Region, Sample

from sca.data.scenes import Scenes, parse, relation_holds
from sca.masks import area, box_of, decode, encode
from sca.training.augmentation import Augmentation, cropped, flipped


@st.composite
def samples(draw):
    """A grey picture with one to three rectangles, each of its own brightness, that do not overlap."""
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
        regions.append(Region(number, box, encode(mask), "shape", ("left of a right hand", "leftover bright")))
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
        assert (decode(region.mask) == shown(changed, region)).all()
        assert region.box == box_of(region.mask)
        assert area(region.mask) >= 0.4 * area(before.mask)
    lost = {region.id for region in sample.regions} - {region.id for region in changed.regions}
    assert all(shown(changed, region).sum() < 0.4 * area(region.mask) for region in sample.regions if region.id in lost)


@given(samples())
def test_a_flip_changes_left_and_right_in_words_and_twice_changes_nothing(sample):
    image, regions = flipped(sample.image, list(sample.regions))
    assert regions[0].phrases == ("right of a left hand", "leftover bright")
    again, back = flipped(image, regions)
    assert np.array_equal(again, sample.image)
    assert tuple(back) == sample.regions


def test_words_keep_their_capitals_and_text_among_the_attributes_changes_too():
    region = Region(1, (0, 0, 2, 2), None, "hand", ("Left one, right there",), {"relation": "left of", "count": 2})
    _, (mirrored,) = flipped(Image.new("RGB", (8, 8)), [region])
    assert mirrored.phrases == ("Right one, left there",)
    assert mirrored.attributes == {"relation": "right of", "count": 2}
    assert mirrored.name == "hand"


def test_the_places_that_phrases_of_a_flipped_scene_state_are_true():
    stated = 0
    for sample in Scenes("train", count=20, size=64, seed=2):
        _, regions = flipped(sample.image, list(sample.regions))
        places = []
        for region in regions:
            x, y = region.attributes["centre"]
            attributes = {**region.attributes, "centre": (sample.image.width - x, y)}
            places.append(Region(region.id, region.box, region.mask, region.name, region.phrases, attributes))
        for region in places:
            for phrase in region.phrases[1:]:
                stated += 1
                assert relation_holds(parse(phrase), region, places), phrase
            relation = region.attributes.get("relation")
            assert relation is None or relation in region.phrases[-1]
    assert stated > 20


def test_a_region_without_a_mask_is_dropped_by_what_is_left_of_its_box():
    region = Region(1, (0.0, 0.0, 10.0, 10.0))
    assert cropped(region, (5, 0, 20, 20), 0.4).box == (0, 0, 5, 10)
    assert cropped(region, (7, 0, 20, 20), 0.4) is None
    assert cropped(region, (10, 0, 20, 20), 0.0) is None


def test_nothing_asked_for_changes_nothing():
    sample = Scenes("train", count=1, size=64)[0]
    plain = Augmentation(flip=0.0, crop=1.0, colour=0.0)(sample, np.random.default_rng(0))
    assert np.array_equal(plain.image, sample.image)
    assert plain.regions == sample.regions


@pytest.mark.parametrize("colour", [0.3, 0.9])
def test_colours_stray_and_regions_stay(colour):
    sample = Scenes("train", count=1, size=64)[0]
    changed = Augmentation(flip=0.0, colour=colour)(sample, np.random.default_rng(0))
    assert changed.image.size == sample.image.size
    assert not np.array_equal(changed.image, sample.image)
    assert changed.regions == sample.regions
