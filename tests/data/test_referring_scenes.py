"""Each referring expression is true of exactly one region of its scene, by a check that shares no code with it."""

import math
import re

import numpy as np
import pytest
from sca_registry import datasets
from sca_registry.contracts import Region

from sca.data.export import export_dataset
from sca.data.referring_scenes import COLLECTION_SPLITS, ReferringScenes, is_statement_true
from sca.data.scenes import COLORS, SHAPE_NAMES, SIZE_NAMES, TEXTURES, parse_statement

SIDE = 128
ATTRIBUTES = ("size", "texture", "color", "shape")
VALUES = dict(zip(ATTRIBUTES, (SIZE_NAMES, TEXTURES, COLORS, SHAPE_NAMES), strict=True))
EXPRESSION = re.compile(r"(?P<head>.+?)( (?P<relation>to the left of|to the right of|above|below) an? (?P<other>.+))?")
DIRECTIONS = {"to the right of": 0, "below": 90, "to the left of": 180, "above": -90}  # degrees, y down
NAMES = {"refcoco": "refcoco", "refcoco+": "refcoco-plus", "refcocog": "refcocog"}


def is_true(text, shape, shapes, max_angle=45.0):
    """Return whether an expression is true of a shape, with relations up to an angle from the axis."""
    match = EXPRESSION.fullmatch(text)
    x, y = shape["center"]
    for word in match["head"].split():
        if word in ("left", "right", "top", "bottom"):
            position = x if word in ("left", "right") else y
            if (position < SIDE / 2) != (word in ("left", "top")):
                return False
        elif word not in ("the", "on", "at"):
            (name,) = (name for name in ATTRIBUTES if word in VALUES[name])
            if shape[name] != word:
                return False
    if match["relation"] is None:
        return True
    others = [each for each in shapes if each is not shape and f"{each['color']} {each['shape']}" == match["other"]]
    return any(
        abs((get_angle(shape, other) - DIRECTIONS[match["relation"]] + 180) % 360 - 180) < max_angle for other in others
    )


def get_angle(shape, other):
    (x, y), (other_x, other_y) = shape["center"], other["center"]
    return math.degrees(math.atan2(y - other_y, x - other_x))


def iter_expressions(collection, split, num_images):
    """Yield each expression with the index of its region, and the attributes of all regions."""
    for sample in ReferringScenes(split, collection, num_images):
        shapes = [region.attributes for region in sample.regions]
        for index, region in enumerate(sample.regions):
            for text in region.phrases:
                yield text, index, shapes


def check_expressions(collection, split, num_images):
    expressions = list(iter_expressions(collection, split, num_images))
    assert len(expressions) > num_images
    for text, index, shapes in expressions:
        assert [each for each, shape in enumerate(shapes) if is_true(text, shape, shapes)] == [index], text


@pytest.mark.parametrize("collection", COLLECTION_SPLITS)
def test_expression_is_true_of_exactly_one_region(collection):
    check_expressions(collection, "val", 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("collection", "split"), [(name, split) for name, splits in COLLECTION_SPLITS.items() for split in splits]
)
def test_expression_is_true_of_exactly_one_region_in_many_scenes(collection, split):
    check_expressions(collection, split, 300)


def test_expressions_differ_by_collection():
    texts_by_name = {
        name: [text.split() for text, *_ in iter_expressions(name, "train", 30)] for name in COLLECTION_SPLITS
    }
    has_location = {
        name: np.mean([bool({"left", "right", "top", "bottom"} & set(each)) for each in texts])
        for name, texts in texts_by_name.items()
        if name != "refcocog"
    }
    assert 0.3 < has_location["refcoco"] < 0.8
    assert has_location["refcoco+"] == 0
    lengths = {name: np.mean([*map(len, texts)]) for name, texts in texts_by_name.items()}
    assert lengths["refcoco+"] < lengths["refcoco"] < 4 < 9 < lengths["refcocog"]
    assert all(parse_statement(" ".join(each)).relation for each in texts_by_name["refcocog"])


def test_refcoco_plus_expression_needs_each_of_its_words():
    for text, _, shapes in iter_expressions("refcoco+", "val", 60):
        *modifiers, _ = text.split()
        for word in modifiers:
            shorter = " ".join(each for each in text.split() if each != word)
            assert sum(is_true(shorter, shape, shapes) for shape in shapes) > 1, text


def test_refcoco_location_is_in_outer_third_of_the_image():
    num_checked = 0
    for text, index, shapes in iter_expressions("refcoco", "val", 60):
        for word in set(text.split()) & {"left", "right", "top", "bottom"}:
            position = shapes[index]["center"][word in ("top", "bottom")]
            assert (position < SIDE / 3) if word in ("left", "top") else (position > SIDE * 2 / 3), text
            num_checked += 1
    assert num_checked > 50


def test_refcocog_relation_is_not_close_to_a_diagonal():
    steepest_angle = math.degrees(math.atan(1 / 1.25))
    for text, index, shapes in iter_expressions("refcocog", "val", 80):
        assert is_true(text, shapes[index], shapes, steepest_angle + 1e-6), text
        assert sum(is_true(text, shape, shapes, 90 - steepest_angle) for shape in shapes) == 1, text


@pytest.mark.parametrize(
    ("split", "expected_names"),
    [("testA", {"circle"}), ("testB", set(SHAPE_NAMES) - {"circle"}), ("val", set(SHAPE_NAMES))],
)
def test_referents_are_of_the_split_and_share_their_name_with_another_region(split, expected_names):
    samples = list(ReferringScenes(split, num_images=40))
    referents = [(sample, region) for sample in samples for region in sample.regions if region.phrases]
    assert {region.name for _, region in referents} == expected_names
    assert all(sum(other.name == region.name for other in sample.regions) > 1 for sample, region in referents)
    assert {len(sample.regions) for sample in samples} == {3, 4, 5}


def test_most_shapes_share_two_attributes_with_another_and_some_share_all():
    num_shared = np.array(
        [
            max(sum(each[name] == region.attributes[name] for name in ATTRIBUTES) for each in distractors)
            for sample in ReferringScenes("val", num_images=60)
            for region in sample.regions
            if (distractors := region.attributes["distractors"])
        ]
    )
    assert (num_shared >= 2).mean() > 0.85
    assert 0.2 < (num_shared == 4).mean() < 0.6


def test_collections_have_the_same_scenes_with_other_expressions():
    scenes = {name: ReferringScenes("val", name, num_images=3)[2] for name in COLLECTION_SPLITS}
    assert len({sample.image.tobytes() for sample in scenes.values()}) == 1
    assert (
        len({repr([(region.id, region.box, region.attributes) for region in s.regions]) for s in scenes.values()}) == 1
    )
    assert len({repr([region.phrases for region in s.regions]) for s in scenes.values()}) == 3


def test_distractors_are_the_attributes_of_all_other_regions():
    for sample in ReferringScenes("val", num_images=5):
        for region in sample.regions:
            distractors = {each["id"]: each for each in region.attributes["distractors"]}
            assert distractors == {
                other.id: {"id": other.id}
                | {name: other.attributes[name] for name in (*ATTRIBUTES, "center", "location")}
                for other in sample.regions
                if other.id != region.id
            }


def test_referring_scenes_reject_unknown_collection_and_split():
    with pytest.raises(
        ValueError, match=r"unknown collection 'refcoco-plus'; choose from refcoco, refcoco\+, refcocog"
    ):
        ReferringScenes("val", "refcoco-plus")
    with pytest.raises(ValueError, match=r"'refcocog' has no split 'testA'; choose from train, val, test$"):
        ReferringScenes("testA", "refcocog")


@pytest.mark.parametrize(
    ("text", "own", "other"),
    [
        ("circle", True, True),
        ("red circle", True, False),
        ("left circle", True, False),
        ("circle at the top left", True, False),
        ("circle at the top", True, True),
        ("bottom circle", False, False),
        ("the small circle to the left of a blue circle", True, False),
        ("a red circle right of a blue circle", False, False),
    ],
)
def test_is_statement_true_checks_attributes_location_and_relation(text, own, other):
    facts = {"size": "small", "texture": "plain", "shape": "circle"}
    regions = [
        Region(1, (0, 0, 1, 1), attributes={**facts, "color": "red", "center": (10, 9), "location": "top left"}),
        Region(2, (0, 0, 1, 1), attributes={**facts, "color": "blue", "center": (90, 8), "location": "top right"}),
    ]
    assert [is_statement_true(parse_statement(text), region, regions) for region in regions] == [own, other]


@pytest.mark.parametrize(
    ("collection", "splits", "split_by"),
    [
        ("refcoco", ("testA", "testB"), "unc"),
        ("refcoco+", ("val",), "unc"),
        *[("refcocog", ("val",), by) for by in ("google", "umd")],
    ],
)
def test_export_in_the_layout_of_refcoco_reads_back_equal(tmp_path, collection, splits, split_by):
    scenes = {split: ReferringScenes(split, collection, num_images=4, image_size=64) for split in splits}
    export_dataset(scenes, tmp_path / collection, "refcocog" if collection == "refcocog" else "refcoco")
    for split, split_scenes in scenes.items():
        read_back = datasets.build(NAMES[collection], split, root=str(tmp_path), split_by=split_by)
        samples = [
            (sample, referents)
            for sample in split_scenes
            if (referents := [region for region in sample.regions if region.phrases])
        ]
        assert [sample.image_id for sample in read_back] == [sample.image_id for sample, _ in samples]
        for read_sample, (sample, referents) in zip(read_back, samples, strict=True):
            assert np.array_equal(read_sample.image, sample.image)
            fields = [(each.box, each.mask, each.name, each.phrases) for each in read_sample.regions]
            assert fields == [(each.box, each.mask, each.name, each.phrases) for each in referents]
        with_all_objects = datasets.build(
            NAMES[collection], split, root=str(tmp_path), split_by=split_by, objects="all"
        )
        for read_sample, (sample, _) in zip(with_all_objects, samples, strict=True):
            fields = [(each.id, each.box, each.mask, each.name, each.phrases) for each in read_sample.regions]
            assert fields == [(each.id, each.box, each.mask, each.name, each.phrases) for each in sample.regions]
    assert any(len(referents) < len(sample.regions) for sample, referents in samples)
