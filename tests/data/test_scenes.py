"""Drawn scenes: the same for the same seed, and everything that is said of them is true."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle
from sca_registry.contracts import Region

from sca.data.scenes import (
    COLORS,
    DEFAULT_SPLIT_SIZES,
    DIAMETERS,
    MIN_VISIBLE_FRACTION,
    RELATIONS,
    SHAPE_NAMES,
    SIZE_NAMES,
    TEXTURES,
    Scenes,
    Statement,
    is_relation_true,
    parse_statement,
)


@pytest.fixture(scope="module")
def samples():
    return list(Scenes("train", num_images=300, seed=5))


@pytest.fixture(scope="module")
def regions(samples):
    return [region for sample in samples for region in sample.regions]


def the_same(one, other):
    return np.array_equal(one.image, other.image) and one[1:] == other[1:]


def test_a_scene_depends_on_seed_split_and_index_alone():
    one, other = Scenes("val", seed=3), Scenes("val", num_images=12, seed=3)
    assert the_same(one[11], other[11])
    assert not the_same(one[11], one[10])
    assert not the_same(one[11], Scenes("val", seed=4)[11])


def test_splits_are_drawn_from_streams_of_their_own_and_share_no_id():
    parts = [list(Scenes(split, num_images=40)) for split in DEFAULT_SPLIT_SIZES]
    pixels = {sample.image.tobytes() for part in parts for sample in part}
    images = {sample.image_id for part in parts for sample in part}
    assert len(pixels) == len(images) == 3 * 40
    ids = [region.id for part in parts for sample in part for region in sample.regions]
    assert len(ids) == len(set(ids))


def test_each_split_has_its_usual_length_and_ends():
    assert {split: len(Scenes(split)) for split in DEFAULT_SPLIT_SIZES} == {"train": 100_000, "val": 500, "test": 500}
    with pytest.raises(IndexError, match="scene 2 of 2"):
        Scenes("val", num_images=2)[2]
    with pytest.raises(IndexError):
        Scenes("val")[-1]


def test_an_unknown_split_or_a_tiny_canvas_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        Scenes("dev")
    with pytest.raises(ValueError, match="least is 32"):
        Scenes("val", image_size=16)


@pytest.mark.parametrize("size", [32, 96, 200])
def test_every_length_grows_with_the_canvas(size):
    for sample in Scenes("val", num_images=10, image_size=size):
        assert sample.image.size == (size, size)
        for region in sample.regions:
            least, most = (limit * size / 128 for limit in DIAMETERS[region.attributes["size"]])
            x1, y1, x2, y2 = region.box
            if region.attributes["visible"] == 1:
                assert least * 0.9 - 2 < max(x2 - x1, y2 - y1) < most * 1.3 + 2


@pytest.mark.slow
def test_the_box_is_the_tight_box_of_the_mask(samples):
    for sample in samples:
        for region in sample.regions:
            assert region.mask["size"] == [sample.image.height, sample.image.width]
            assert isinstance(region.mask["counts"], str)
            rows, columns = np.nonzero(rle.decode(region.mask))
            assert region.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_masks_share_no_pixel(samples):
    for sample in samples:
        assert rle.decode([region.mask for region in sample.regions]).sum(axis=2).max() == 1


def test_two_to_five_shapes_stay_in_sight_and_some_overlap(samples, regions):
    assert {len(sample.regions) for sample in samples} == {2, 3, 4, 5}
    shares = np.array([region.attributes["visible"] for region in regions])
    assert shares.min() >= MIN_VISIBLE_FRACTION
    assert 0.1 < (shares < 1).mean() < 0.3  # those on top are touched by as many overlaps again
    for region in regions:
        assert 4 < min(region.attributes["center"]) <= max(region.attributes["center"]) < 124


def test_every_attribute_takes_every_value_about_as_often_as_it_should(regions):
    for name, values in {"color": COLORS, "shape": SHAPE_NAMES, "size": SIZE_NAMES, "texture": TEXTURES}.items():
        assert Scenes.attribute_values[name] == values
        counts = [sum(region.attributes[name] == value for region in regions) for value in values]
        assert sum(counts) == len(regions)
        assert min(counts) > 0.6 * len(regions) / len(values)


def test_a_shape_shows_its_color_and_a_texture_shows_two_tones(samples):
    plain, textured = [], []
    for sample in samples:
        pixels = np.asarray(sample.image, dtype=float)
        for region in sample.regions:
            inside = pixels[rle.decode(region.mask).astype(bool)]
            spread = np.ptp(np.percentile(inside.max(axis=1), [20, 95]))
            (plain if region.attributes["texture"] == "plain" else textured).append(spread)
            if region.attributes["color"] in ("red", "green", "blue"):
                assert inside.mean(axis=0).argmax() == ("red", "green", "blue").index(region.attributes["color"])
    assert np.median(textured) > 3 * np.median(plain)


def test_every_phrase_parses_back_to_the_truth_and_every_relation_holds(samples):
    stated = set()
    for sample in samples:
        for region in sample.regions:
            facts = region.attributes
            assert region.name == facts["shape"]
            assert 1 <= len(set(region.phrases)) == len(region.phrases) <= 3
            first, *related = map(parse_statement, region.phrases)
            truth = Statement(facts["size"], facts["texture"], facts["color"], facts["shape"])
            assert first == truth
            for statement in related:
                assert statement[:4] == truth[:4]
                assert is_relation_true(statement, region, sample.regions)
                stated.add(statement.relation)
    assert stated == set(RELATIONS)


WORDS = SIZE_NAMES, TEXTURES, COLORS, SHAPE_NAMES, RELATIONS, COLORS, SHAPE_NAMES
SAID = st.tuples(*map(st.sampled_from, WORDS)) | st.tuples(*map(st.sampled_from, WORDS[:4]), *[st.none()] * 3)


@given(SAID, st.sets(st.integers(0, 6)))
def test_parse_finds_what_is_there_and_only_that(said, silent):
    kept = Statement(*(None if place in silent else word for place, word in enumerate(said)))
    if kept.relation is None:
        kept = kept._replace(other_color=None, other_shape=None)
    one, other = (" ".join(filter(None, words)) for words in (kept[:4], kept[5:]))
    text = f"An odd {one}, {kept.relation or ''} the   {other.upper()}!"
    assert parse_statement(text) == (kept if any(kept) else None)


@given(st.text())
def test_parse_never_raises(text):
    assert parse_statement(text) is None or any(parse_statement(text))


def at(identity, x, y, color="red", shape="star"):
    return Region(identity, (0, 0, 1, 1), attributes={"color": color, "shape": shape, "center": (x, y)})


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("a star left of a blue star", True),
        ("a star right of a blue star", False),
        ("a star above a blue star", False),  # the larger difference decides
        ("a star above a green star", True),
        ("a star left of a red star", False),  # it is no neighbor of itself
        ("a star left of a blue circle", False),
        ("a star left of a star", False),  # which one is not said
        ("a star", False),
    ],
)
def test_a_relation_is_judged_by_the_larger_difference_to_a_shape_named_in_full(text, true):
    star = at(1, 50, 50)
    others = [star, at(2, 80, 75, "blue"), at(3, 40, 90, "green")]
    assert is_relation_true(parse_statement(text), star, others) is true


@pytest.mark.slow
def test_drawing_needs_no_torch():
    code = "import sys; from sca.data.scenes import Scenes; Scenes('val')[0]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_last_phrase_is_the_most_telling_and_its_relation_is_among_the_attributes(regions):
    for region in regions:
        last = parse_statement(region.phrases[-1])
        stated = {name: region.attributes.get(name) for name in ("relation", "other_color", "other_shape")}
        assert stated == {"relation": last.relation, "other_color": last.other_color, "other_shape": last.other_shape}
        assert parse_statement(region.phrases[0]).relation is None
