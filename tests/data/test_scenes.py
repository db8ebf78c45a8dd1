"""Drawn scenes are reproducible by seed, and their captions are true."""

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
from sca.io.errors import InputError

PHRASES_OF_SEED_29 = [
    "a small striped red circle right of a cyan star",
    "a medium striped cyan star right of a yellow square",
    "a small striped orange square above a yellow square",
    "a medium dotted white triangle above a cyan star",
    "a medium plain yellow square below an orange square",
]


@pytest.fixture(scope="module")
def samples():
    return list(Scenes("train", num_images=300, seed=5))


@pytest.fixture(scope="module")
def regions(samples):
    return [region for sample in samples for region in sample.regions]


def are_samples_equal(first, second):
    return np.array_equal(first.image, second.image) and first[1:] == second[1:]


def test_scenes_depend_only_on_seed_split_and_index():
    scenes, scenes_of_other_count = Scenes("val", seed=3), Scenes("val", num_images=12, seed=3)
    assert are_samples_equal(scenes[11], scenes_of_other_count[11])
    assert not are_samples_equal(scenes[11], scenes[10])
    assert not are_samples_equal(scenes[11], Scenes("val", seed=4)[11])


def test_scenes_of_a_seed_stay_the_same():
    assert [region.phrases[-1] for region in Scenes("test", seed=29)[0].regions] == PHRASES_OF_SEED_29


def test_scenes_splits_share_no_images_or_ids():
    splits = [list(Scenes(split, num_images=40)) for split in DEFAULT_SPLIT_SIZES]
    image_bytes = {sample.image.tobytes() for samples_of_split in splits for sample in samples_of_split}
    image_ids = {sample.image_id for samples_of_split in splits for sample in samples_of_split}
    assert len(image_bytes) == len(image_ids) == 3 * 40
    region_ids = [region.id for samples_of_split in splits for sample in samples_of_split for region in sample.regions]
    assert len(region_ids) == len(set(region_ids))


def test_scenes_splits_have_default_lengths_and_check_index():
    assert {split: len(Scenes(split)) for split in DEFAULT_SPLIT_SIZES} == {"train": 100_000, "val": 500, "test": 500}
    with pytest.raises(IndexError, match="scene 2 of 2"):
        Scenes("val", num_images=2)[2]
    with pytest.raises(IndexError):
        Scenes("val")[-1]


def test_scenes_reject_unknown_split_and_small_size():
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        Scenes("dev")
    with pytest.raises(ValueError, match="use 32 or more"):
        Scenes("val", image_size=16)


@pytest.mark.parametrize("size", [32, 96, 200])
def test_scenes_shapes_scale_with_image_size(size):
    for sample in Scenes("val", num_images=10, image_size=size):
        assert sample.image.size == (size, size)
        for region in sample.regions:
            min_diameter, max_diameter = (limit * size / 128 for limit in DIAMETERS[region.attributes["size"]])
            x1, y1, x2, y2 = region.box
            if region.attributes["visible"] == 1:
                assert min_diameter * 0.9 - 2 < max(x2 - x1, y2 - y1) < max_diameter * 1.3 + 2


@pytest.mark.slow
def test_scenes_boxes_are_tight_around_masks(samples):
    for sample in samples:
        for region in sample.regions:
            assert region.mask["size"] == [sample.image.height, sample.image.width]
            assert isinstance(region.mask["counts"], str)
            rows, columns = np.nonzero(rle.decode(region.mask))
            assert region.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_scenes_masks_do_not_overlap(samples):
    for sample in samples:
        assert rle.decode([region.mask for region in sample.regions]).sum(axis=2).max() == 1


def test_scenes_have_two_to_five_visible_shapes_and_some_overlap(samples, regions):
    assert {len(sample.regions) for sample in samples} == {2, 3, 4, 5}
    visible_fractions = np.array([region.attributes["visible"] for region in regions])
    assert visible_fractions.min() >= MIN_VISIBLE_FRACTION
    assert 0.1 < (visible_fractions < 1).mean() < 0.3  # each overlap also involves the region on top
    for region in regions:
        assert 4 < min(region.attributes["center"]) <= max(region.attributes["center"]) < 124


def test_scenes_attribute_values_are_about_equally_frequent(regions):
    for name, values in {"color": COLORS, "shape": SHAPE_NAMES, "size": SIZE_NAMES, "texture": TEXTURES}.items():
        assert Scenes.attribute_values[name] == values
        counts = [sum(region.attributes[name] == value for region in regions) for value in values]
        assert sum(counts) == len(regions)
        assert min(counts) > 0.6 * len(regions) / len(values)


def test_scenes_pixels_show_color_and_texture_of_shapes(samples):
    plain_spreads, textured_spreads = [], []
    for sample in samples:
        pixels = np.asarray(sample.image, dtype=float)
        for region in sample.regions:
            region_pixels = pixels[rle.decode(region.mask).astype(bool)]
            spread = np.ptp(np.percentile(region_pixels.max(axis=1), [20, 95]))
            (plain_spreads if region.attributes["texture"] == "plain" else textured_spreads).append(spread)
            if region.attributes["color"] in ("red", "green", "blue"):
                assert region_pixels.mean(axis=0).argmax() == ("red", "green", "blue").index(region.attributes["color"])
    assert np.median(textured_spreads) > 3 * np.median(plain_spreads)


def test_scenes_phrases_parse_to_true_attributes_and_true_relations(samples):
    stated_relations = set()
    for sample in samples:
        for region in sample.regions:
            attributes = region.attributes
            assert region.name == attributes["shape"]
            assert 1 <= len(set(region.phrases)) == len(region.phrases) <= 3
            first_statement, *relation_statements = map(parse_statement, region.phrases)
            true_statement = Statement(
                attributes["size"], attributes["texture"], attributes["color"], attributes["shape"]
            )
            assert first_statement == true_statement
            for statement in relation_statements:
                assert statement[:4] == true_statement[:4]
                assert is_relation_true(statement, region, sample.regions)
                stated_relations.add(statement.relation)
    assert stated_relations == set(RELATIONS)


STATEMENT_FIELD_VALUES = SIZE_NAMES, TEXTURES, COLORS, SHAPE_NAMES, RELATIONS, COLORS, SHAPE_NAMES
STATEMENT_VALUES = st.tuples(*map(st.sampled_from, STATEMENT_FIELD_VALUES)) | st.tuples(
    *map(st.sampled_from, STATEMENT_FIELD_VALUES[:4]), *[st.none()] * 3
)


@given(STATEMENT_VALUES, st.sets(st.integers(0, 6)))
def test_parse_statement_finds_only_stated_values(values, omitted):
    statement = Statement(*(None if index in omitted else value for index, value in enumerate(values)))
    if statement.relation is None:
        statement = statement._replace(other_color=None, other_shape=None)
    subject, related_shape = (" ".join(filter(None, parts)) for parts in (statement[:4], statement[5:]))
    text = f"An odd {subject}, {statement.relation or ''} the   {related_shape.upper()}!"
    assert parse_statement(text) == (statement if any(statement) else None)


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("left red circle", "left"),
        ("red circle at the top left", "top left"),
        ("left top circle", "top left"),
        ("a circle left of a blue star", None),
        ("the circle to the right of a blue star", None),
        ("bottom star above a red cross", "bottom"),
    ],
)
def test_parse_statement_finds_location_before_the_relation(text, location):
    assert parse_statement(text).location == location


@given(st.text())
def test_parse_statement_never_raises(text):
    assert parse_statement(text) is None or any(parse_statement(text))


def make_region_at(region_id, x, y, color="red", shape="star"):
    return Region(region_id, (0, 0, 1, 1), attributes={"color": color, "shape": shape, "center": (x, y)})


@pytest.mark.parametrize(
    ("text", "is_true"),
    [
        ("a star left of a blue star", True),
        ("a star right of a blue star", False),
        ("a star above a blue star", False),  # the larger difference determines the relation
        ("a star above a green star", True),
        ("a star left of a red star", False),  # a region is not its own neighbor
        ("a star left of a blue circle", False),
        ("a star left of a star", False),  # the reference is ambiguous
        ("a star", False),
    ],
)
def test_is_relation_true_uses_larger_difference_to_fully_named_shape(text, is_true):
    star = make_region_at(1, 50, 50)
    shapes = [star, make_region_at(2, 80, 75, "blue"), make_region_at(3, 40, 90, "green")]
    assert is_relation_true(parse_statement(text), star, shapes) is is_true


@pytest.mark.slow
def test_scenes_do_not_import_torch():
    code = "import sys; from sca.data.scenes import Scenes; Scenes('val')[0]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scenes_last_phrase_states_relation_of_attributes(regions):
    for region in regions:
        last_statement = parse_statement(region.phrases[-1])
        relation_attributes = {name: region.attributes.get(name) for name in ("relation", "other_color", "other_shape")}
        assert relation_attributes == {
            "relation": last_statement.relation,
            "other_color": last_statement.other_color,
            "other_shape": last_statement.other_shape,
        }
        assert parse_statement(region.phrases[0]).relation is None


def test_scenes_name_regions_by_the_chosen_attributes():
    default, named = (Scenes("val", 3, **options)[1] for options in ({}, {"name_attributes": ["color", "shape"]}))
    assert [region.name for region in default.regions] == [region.attributes["shape"] for region in default.regions]
    assert [region.name for region in named.regions] == [
        f"{region.attributes['color']} {region.attributes['shape']}" for region in default.regions
    ]
    assert [region.phrases for region in named.regions] == [region.phrases for region in default.regions]
    for attributes in ([], ["colors"]):
        with pytest.raises(InputError, match="choose one or more of size, texture, color, shape"):
            Scenes("val", name_attributes=attributes)
