"""Every metric on records that can be scored by hand."""

import json
import math

import numpy as np
import pytest
import sca_registry
from hypothesis import given
from hypothesis import strategies as st

from sca.data.scenes import COLORS, SHAPE_NAMES, SIZE_NAMES, TEXTURES
from sca.evaluation.records import describe_missing_needs, meets_need

METRIC_NAMES = ("attributes", "class", "mask-iou", "referring", "region-sensitivity", "relations")
CIRCLE = {"color": "red", "shape": "circle", "size": "small", "texture": "plain", "center": [10.0, 50.0]}
SQUARE = {"color": "blue", "shape": "square", "size": "large", "texture": "plain", "center": [90.0, 60.0]}
STAR = {"color": "red", "shape": "star", "size": "small", "texture": "dotted", "center": [12.0, 90.0]}


def compute_scores(name, records):
    return sca_registry.metrics.build(name)(records).values


# --- attributes


def test_attributes_counts_each_attribute_and_all_together(make_record):
    records = [
        make_record("a small plain red circle", attributes=CIRCLE),
        make_record("a small plain red square", attributes=CIRCLE),  # form
        make_record("a large striped red circle left of a blue square", attributes=CIRCLE),  # size and texture
        make_record("", attributes=CIRCLE),
    ]
    assert compute_scores("attributes", records) == {
        "attributes/all": 0.25,
        "attributes/color": 0.75,
        "attributes/shape": 0.5,
        "attributes/size": 0.5,
        "attributes/texture": 0.5,
        "attributes/captions": 4,
    }


def test_attributes_counts_only_captions_of_regions_with_attributes(make_record):
    records = [
        make_record("a small plain red circle", attributes=CIRCLE),
        make_record("circle", task="recognition", attributes=CIRCLE, name="circle"),
        make_record("a tree"),
    ]
    assert compute_scores("attributes", records)["attributes/captions"] == 1
    assert compute_scores("attributes", records)["attributes/all"] == 1


# --- referring


def make_referring_record(make_record, caption, region=0):
    """Return a record of a scene with two equal red circles, left and right, and a blue square to the right of both."""
    shapes = [CIRCLE | {"location": "top left"}, CIRCLE | {"location": "top right"}, SQUARE | {"location": "top right"}]
    shapes[1] |= {"center": [70.0, 50.0]}
    attributes = [shape | {"id": number} for number, shape in enumerate(shapes)]
    distractors = [each for each in attributes if each["id"] != region]
    return make_record(caption, region=region, attributes=shapes[region] | {"distractors": distractors})


@pytest.mark.parametrize(
    ("caption", "is_true", "is_unambiguous"),
    [
        ("a small plain red circle", 1, 0),  # also true of the other circle
        ("a small plain red circle left of a red circle", 1, 1),
        ("a red circle left of a blue square", 1, 0),
        ("red circle on the left", 1, 1),
        ("left blue circle", 0, 0),
        ("a large blue square", 0, 0),  # true of another region only
        ("a thing", 0, 0),
    ],
)
def test_referring_checks_captions_against_all_regions_of_the_image(make_record, caption, is_true, is_unambiguous):
    assert compute_scores("referring", [make_referring_record(make_record, caption)]) == {
        "referring/true": is_true,
        "referring/unambiguous": is_unambiguous,
        "referring/captions": 1,
    }


def test_referring_averages_over_captions_with_known_distractors(make_record):
    captions = ("a red circle", "right red circle", "a square", "a star")
    records = [
        make_referring_record(make_record, caption, region)
        for region, caption in zip((0, 1, 2, 2), captions, strict=True)
    ]
    scores = compute_scores("referring", [*records, make_record("a circle", attributes=CIRCLE)])
    assert scores == {"referring/true": 0.75, "referring/unambiguous": 0.5, "referring/captions": 4}


# --- relations


def make_scene_records(make_record, *captions):
    attributes_by_region = (CIRCLE, SQUARE, STAR)
    return [make_record(text, region=i, attributes=attributes_by_region[i]) for i, text in enumerate(captions)]


def test_relations_counts_stated_and_true_relations(make_record):
    records = make_scene_records(
        make_record,
        "a green cross left of a blue square",  # true even if the rest is wrong
        "a large plain blue square left of a red circle",  # the region is to the right
        "a small dotted red star",  # states no relation
    )
    scores = compute_scores("relations", records)
    assert scores["relations/correct"] == 0.5
    assert scores["relations/stated"] == pytest.approx(2 / 3)
    assert scores["relations/captions"] == 3


def test_relations_ignores_shapes_of_other_images_and_the_region_itself(make_record):
    records = make_scene_records(make_record, "left of a green cross", "right of a blue square", "below a red circle")
    records.append(make_record("", image=2, region=9, attributes=CIRCLE | {"color": "green", "shape": "cross"}))
    records[-1]["truth"]["attributes"] |= {"center": [99.0, 50.0]}
    assert compute_scores("relations", records)["relations/correct"] == pytest.approx(1 / 3)


def test_relations_is_nan_without_stated_relations(make_record):
    scores = compute_scores("relations", make_scene_records(make_record, "a circle", "a square", "a star"))
    assert math.isnan(scores["relations/correct"])
    assert scores["relations/stated"] == 0


# --- class


def test_class_scores_by_count_area_and_mean(make_record):
    cases = [("road", "road", 60), ("road", "car", 20), ("car", "car", 10), ("road", "road", 10)]
    records = [make_record(caption, "recognition", name=name, area=float(area)) for caption, name, area in cases]
    records.append(make_record("a road", attributes=CIRCLE, name="road"))  # a caption is not a class prediction
    assert compute_scores("class", records) == {
        "class/accuracy": 0.75,
        "class/area-accuracy": 0.8,
        "class/mean-accuracy": 0.75,
        "class/regions": 4,
        "class/car": 0.5,
        "class/car/regions": 2,
        "class/road": 1.0,
        "class/road/regions": 2,
    }


def test_class_mean_weights_all_classes_equally(make_record):
    records = [make_record("road", "recognition", name=name) for name in ("road", "road", "road", "car")]
    scores = compute_scores("class", records)
    assert (scores["class/accuracy"], scores["class/mean-accuracy"]) == (0.75, 0.5)


def test_class_ignores_case_and_spacing_only(make_record):
    pairs = [(" Traffic  LIGHT\n", "traffic light"), ("Straße", "STRASSE"), ("trafficlight", "traffic light")]
    records = [make_record(caption, "recognition", name=name) for caption, name in pairs]
    assert compute_scores("class", records)["class/accuracy"] == pytest.approx(2 / 3)


def test_class_accuracy_quotes_a_class_named_like_a_summary(make_record):
    records = [
        make_record(caption, "recognition", name=name) for caption, name in (("x", "mean-accuracy"), ("car", "car"))
    ]
    scores = compute_scores("class", records)
    assert (scores["class/mean-accuracy"], scores['class/"mean-accuracy"']) == (0.5, 0.0)


# --- mask-iou


def test_mask_iou_is_averaged_over_regions(make_record, make_rectangle_mask):
    true_mask = make_rectangle_mask(0, 0, 4, 4)
    masks = [
        true_mask,
        make_rectangle_mask(2, 0, 6, 4),
        make_rectangle_mask(6, 4, 10, 8),
        make_rectangle_mask(0, 0, 4, 2),
    ]  # 1, 8/24, 0, 8/16
    records = [make_record(region=i, mask=mask) for i, mask in enumerate(masks)]
    for record in records:
        record["truth"]["mask"] = true_mask
    scores = compute_scores("mask-iou", records)
    assert scores["mask-iou/mean"] == pytest.approx((1 + 1 / 3 + 0 + 0.5) / 4)
    assert scores["mask-iou/above-0.5"] == 0.25
    assert scores["mask-iou/regions"] == 4


def test_mask_iou_counts_region_of_two_tasks_once(make_record, make_rectangle_mask):
    true_mask, half_mask = make_rectangle_mask(0, 0, 4, 4), make_rectangle_mask(0, 0, 4, 2)
    cases = [
        (1, 1, true_mask, "caption"),
        (1, 1, true_mask, "recognition"),
        (1, 2, half_mask, "caption"),
        (2, 1, half_mask, "caption"),
    ]
    records = [make_record("", task, image, region, mask) for image, region, mask, task in cases]
    for record in records:
        record["truth"]["mask"] = true_mask
    assert compute_scores("mask-iou", records)["mask-iou/mean"] == pytest.approx(2 / 3)


def test_mask_iou_scores_missing_mask_zero_and_skips_missing_truth(make_record, make_rectangle_mask):
    records = [
        make_record(region=i, mask=mask) for i, mask in enumerate([make_rectangle_mask(0, 0, 4, 4)] * 2 + [None])
    ]
    for record in records[::2]:
        record["truth"]["mask"] = make_rectangle_mask(0, 0, 4, 4)
    scores = compute_scores("mask-iou", records)
    assert (scores["mask-iou/mean"], scores["mask-iou/regions"]) == (0.5, 2)


def test_mask_iou_rejects_masks_of_different_sizes(make_record, make_rectangle_mask):
    record = make_record(mask=make_rectangle_mask(0, 0, 4, 4, width=11))
    record["truth"]["mask"] = make_rectangle_mask(0, 0, 4, 4)
    with pytest.raises(ValueError, match=r"mask-iou.*\[8, 11\].*\[8, 10\]"):
        compute_scores("mask-iou", [record])


# --- region-sensitivity


def test_region_sensitivity_counts_captions_closer_to_their_own_region(make_record):
    records = [
        make_record("a small plain red circle", region=1, attributes=CIRCLE),
        make_record("a large plain red circle", region=2, attributes=SQUARE),  # only the size is correct
    ]
    scores = compute_scores("region-sensitivity", records)
    assert scores == {"region-sensitivity/caption": 0.5, "region-sensitivity/caption/pairs": 2}


def test_region_sensitivity_does_not_count_ties(make_record):
    records = [
        make_record("a large red thing", region=1, attributes=CIRCLE),  # its own color, the other region's size
        make_record("a large blue square", region=2, attributes=SQUARE),
    ]
    assert compute_scores("region-sensitivity", records)["region-sensitivity/caption"] == 0.5


def test_region_sensitivity_compares_only_differing_attributes(make_record):
    records = [
        make_record("a small plain red star", region=1, attributes=CIRCLE),  # shape and texture differ: one is correct
        make_record("a small dotted red star", region=2, attributes=STAR),
    ]
    assert compute_scores("region-sensitivity", records)["region-sensitivity/caption"] == 0.5


def test_region_sensitivity_pairs_only_different_regions_of_one_image(make_record):
    records = [
        make_record("a circle", image=1, region=1, attributes=CIRCLE),
        make_record("a circle", image=1, region=2, attributes=CIRCLE | {"center": [1.0, 1.0]}),
        make_record("a square", image=2, region=3, attributes=SQUARE),
    ]
    scores = compute_scores("region-sensitivity", records)
    assert scores["region-sensitivity/caption/pairs"] == 0
    assert math.isnan(scores["region-sensitivity/caption"])


def test_region_sensitivity_scores_recognition_by_name_separately(make_record):
    captions_and_names = [("Car", "car"), ("road", "road"), ("road", "tree")]  # the third has the second's name
    records = [
        make_record(text, "recognition", region=i, name=name) for i, (text, name) in enumerate(captions_and_names)
    ]
    records += [make_record("a small plain red circle", region=i, attributes=f) for i, f in enumerate((CIRCLE, SQUARE))]
    assert compute_scores("region-sensitivity", records) == {
        "region-sensitivity/caption": 0.5,
        "region-sensitivity/caption/pairs": 2,
        "region-sensitivity/recognition": pytest.approx(4 / 6),
        "region-sensitivity/recognition/pairs": 6,
    }


shape_attributes = st.fixed_dictionaries(
    {
        "color": st.sampled_from(COLORS[:3]),
        "shape": st.sampled_from(SHAPE_NAMES[:3]),
        "size": st.sampled_from(SIZE_NAMES),
        "texture": st.sampled_from(TEXTURES),
    }
)


@given(st.lists(shape_attributes, min_size=2, max_size=5), shape_attributes)
def test_region_sensitivity_is_at_most_half_for_a_constant_caption(
    make_record, attributes_by_region, stated_attributes
):
    text = "a {size} {texture} {color} {shape}".format(**stated_attributes)
    records = [make_record(text, region=i, attributes=truth) for i, truth in enumerate(attributes_by_region)]
    assert not compute_scores("region-sensitivity", records)["region-sensitivity/caption"] > 0.5


# --- all metrics


def test_registry_lists_builtin_metrics():
    assert set(METRIC_NAMES) <= set(sca_registry.metrics.list_names())


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_metric_reports_missing_needs(make_record, name):
    with pytest.raises(ValueError, match=f"{name}.*no records"):
        compute_scores(name, [])
    with pytest.raises(ValueError, match=rf"metric '{name}': needs .*(truth\.|task=)"):
        compute_scores(name, [make_record("a tree")])


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_metric_value_is_the_mean_of_per_record_scores(make_record, make_rectangle_mask, name):
    mask = make_rectangle_mask(0, 0, 4, 4)
    texts = "a small plain red circle left of a blue square", "a red star above a red circle", "a red star"
    facts = {"location": "top left", "distractors": [STAR | {"id": 9, "location": "bottom left"}]}
    records = [
        make_record(text, task, 7, region, mask, name=attributes["shape"], attributes=attributes | facts)
        for region, (text, attributes) in enumerate(zip(texts, (CIRCLE, SQUARE, STAR), strict=True))
        for task in ("caption", "recognition")
    ]
    for record in records:
        record["truth"]["mask"] = make_rectangle_mask(0, 0, 3, 4)
    scores = sca_registry.metrics.build(name)(json.loads(json.dumps(records)))
    assert len({len(values) for values in scores.per_record.values()}) == 1
    assert {"image_id", "region_id"} <= scores.per_record.keys()
    score_names = scores.per_record.keys() & scores.values.keys()
    assert score_names
    for key in score_names:
        assert scores.values[key] == pytest.approx(np.nanmean(scores.per_record[key]))


def test_meets_need_accepts_paths_values_and_alternatives(make_record):
    record = make_record("", attributes=CIRCLE)
    assert meets_need(record, "caption")  # the prediction is empty
    assert not meets_need(record, "mask")
    assert meets_need(record, "truth.attributes.color")
    assert not meets_need(record, "truth.attributes.color.red")
    assert meets_need(record, "task=caption")
    assert not meets_need(record, "task=recognition")
    assert meets_need(record, "mask or task=caption")
    assert (
        describe_missing_needs([record, make_record(name="car", task="recognition")], ("task=caption", "truth.name"))
        is not None
    )
