"""Every metric on records small enough to score by hand."""

import json
import math

import numpy as np
import pytest
import sca_registry
from hypothesis import given
from hypothesis import strategies as st

from sca.data.scenes import COLORS, SHAPE_NAMES, SIZE_NAMES, TEXTURES
from sca.evaluation.records import describe_missing_needs, meets_need

NAMES = ("attributes", "class", "mask-iou", "region-sensitivity", "relations")
CIRCLE = {"color": "red", "shape": "circle", "size": "small", "texture": "plain", "center": [10.0, 50.0]}
SQUARE = {"color": "blue", "shape": "square", "size": "large", "texture": "plain", "center": [90.0, 60.0]}
STAR = {"color": "red", "shape": "star", "size": "small", "texture": "dotted", "center": [12.0, 90.0]}


def total(name, records):
    return sca_registry.metrics.build(name)(records).values


# --- attributes


def test_each_attribute_is_counted_alone_and_all_four_together(make_record):
    records = [
        make_record("a small plain red circle", attributes=CIRCLE),
        make_record("a small plain red square", attributes=CIRCLE),  # form
        make_record("a large striped red circle left of a blue square", attributes=CIRCLE),  # size and texture
        make_record("", attributes=CIRCLE),
    ]
    assert total("attributes", records) == {
        "attributes/all": 0.25,
        "attributes/color": 0.75,
        "attributes/shape": 0.5,
        "attributes/size": 0.5,
        "attributes/texture": 0.5,
        "attributes/captions": 4,
    }


def test_only_captions_of_regions_with_known_attributes_are_counted(make_record):
    records = [
        make_record("a small plain red circle", attributes=CIRCLE),
        make_record("circle", task="recognition", attributes=CIRCLE, name="circle"),
        make_record("a tree"),
    ]
    assert total("attributes", records)["attributes/captions"] == 1
    assert total("attributes", records)["attributes/all"] == 1


# --- relations


def scene(make_record, *captions):
    facts = (CIRCLE, SQUARE, STAR)
    return [make_record(text, region=i, attributes=facts[i]) for i, text in enumerate(captions)]


def test_a_relation_is_right_if_such_a_shape_lies_there(make_record):
    records = scene(
        make_record,
        "a green cross left of a blue square",  # true, whatever else is wrong
        "a large plain blue square left of a red circle",  # it is right of it
        "a small dotted red star",  # states none
    )
    scores = total("relations", records)
    assert scores["relations/right"] == 0.5
    assert scores["relations/stated"] == pytest.approx(2 / 3)
    assert scores["relations/captions"] == 3


def test_a_relation_to_a_shape_of_another_image_or_to_itself_does_not_hold(make_record):
    records = scene(make_record, "left of a green cross", "right of a blue square", "below a red circle")
    records.append(make_record("", image=2, region=9, attributes=CIRCLE | {"color": "green", "shape": "cross"}))
    records[-1]["truth"]["attributes"] |= {"center": [99.0, 50.0]}
    assert total("relations", records)["relations/right"] == pytest.approx(1 / 3)


def test_no_relation_at_all_is_neither_right_nor_wrong(make_record):
    scores = total("relations", scene(make_record, "a circle", "a square", "a star"))
    assert math.isnan(scores["relations/right"])
    assert scores["relations/stated"] == 0


# --- class


def test_classes_by_count_by_area_and_by_mean(make_record):
    answers = [("road", "road", 60), ("road", "car", 20), ("car", "car", 10), ("road", "road", 10)]
    records = [make_record(said, "recognition", name=name, area=float(area)) for said, name, area in answers]
    records.append(make_record("a road", attributes=CIRCLE, name="road"))  # a caption is no answer to this
    assert total("class", records) == {
        "class/count": 0.75,
        "class/area": 0.8,
        "class/mean": 0.75,
        "class/regions": 4,
        "class/car": 0.5,
        "class/car/regions": 2,
        "class/road": 1.0,
        "class/road/regions": 2,
    }


def test_the_mean_over_classes_does_not_let_the_common_ones_decide(make_record):
    records = [make_record("road", "recognition", name=name) for name in ("road", "road", "road", "car")]
    scores = total("class", records)
    assert (scores["class/count"], scores["class/mean"]) == (0.75, 0.5)


def test_letter_case_and_spacing_are_no_mistakes_but_other_words_are(make_record):
    pairs = [(" Traffic  LIGHT\n", "traffic light"), ("Straße", "STRASSE"), ("trafficlight", "traffic light")]
    records = [make_record(said, "recognition", name=name) for said, name in pairs]
    assert total("class", records)["class/count"] == pytest.approx(2 / 3)


def test_a_class_called_mean_does_not_hide_the_mean(make_record):
    records = [make_record(said, "recognition", name=name) for said, name in (("x", "mean"), ("car", "car"))]
    scores = total("class", records)
    assert (scores["class/mean"], scores['class/"mean"']) == (0.5, 0.0)


# --- mask-iou


def test_overlap_in_pixels_is_averaged_over_regions(make_record, rectangle):
    truth = rectangle(0, 0, 4, 4)
    masks = [truth, rectangle(2, 0, 6, 4), rectangle(6, 4, 10, 8), rectangle(0, 0, 4, 2)]  # 1, 8/24, 0, 8/16
    records = [make_record(region=i, mask=mask) for i, mask in enumerate(masks)]
    for record in records:
        record["truth"]["mask"] = truth
    scores = total("mask-iou", records)
    assert scores["mask-iou/mean"] == pytest.approx((1 + 1 / 3 + 0 + 0.5) / 4)
    assert scores["mask-iou/over-0.5"] == 0.25
    assert scores["mask-iou/regions"] == 4


def test_a_region_asked_for_two_tasks_counts_once(make_record, rectangle):
    truth, half = rectangle(0, 0, 4, 4), rectangle(0, 0, 4, 2)
    asked = [(1, 1, truth, "caption"), (1, 1, truth, "recognition"), (1, 2, half, "caption"), (2, 1, half, "caption")]
    records = [make_record("", task, image, region, mask) for image, region, mask, task in asked]
    for record in records:
        record["truth"]["mask"] = truth
    assert total("mask-iou", records)["mask-iou/mean"] == pytest.approx(2 / 3)


def test_a_missing_mask_scores_nothing_and_a_missing_truth_is_not_counted(make_record, rectangle):
    records = [make_record(region=i, mask=mask) for i, mask in enumerate([rectangle(0, 0, 4, 4)] * 2 + [None])]
    for record in records[::2]:
        record["truth"]["mask"] = rectangle(0, 0, 4, 4)
    scores = total("mask-iou", records)
    assert (scores["mask-iou/mean"], scores["mask-iou/regions"]) == (0.5, 2)


def test_masks_of_two_sizes_are_refused(make_record, rectangle):
    record = make_record(mask=rectangle(0, 0, 4, 4, width=11))
    record["truth"]["mask"] = rectangle(0, 0, 4, 4)
    with pytest.raises(ValueError, match=r"mask-iou.*\[8, 11\].*\[8, 10\]"):
        total("mask-iou", [record])


# --- region-sensitivity


def test_an_answer_follows_if_it_is_more_about_its_own_region_than_about_the_other(make_record):
    records = [
        make_record("a small plain red circle", region=1, attributes=CIRCLE),
        make_record("a large plain red circle", region=2, attributes=SQUARE),  # size is its own; color, shape are not
    ]
    scores = total("region-sensitivity", records)
    assert scores == {"region-sensitivity/caption": 0.5, "region-sensitivity/caption/pairs": 2}


def test_a_tie_is_not_followed(make_record):
    records = [
        make_record("a large red thing", region=1, attributes=CIRCLE),  # its color, the other's size
        make_record("a large blue square", region=2, attributes=SQUARE),
    ]
    assert total("region-sensitivity", records)["region-sensitivity/caption"] == 0.5


def test_only_the_facts_that_differ_are_compared(make_record):
    records = [
        make_record("a small plain red star", region=1, attributes=CIRCLE),  # shape and texture differ: one of each
        make_record("a small dotted red star", region=2, attributes=STAR),
    ]
    assert total("region-sensitivity", records)["region-sensitivity/caption"] == 0.5


def test_regions_that_are_alike_or_in_two_images_are_no_pair(make_record):
    records = [
        make_record("a circle", image=1, region=1, attributes=CIRCLE),
        make_record("a circle", image=1, region=2, attributes=CIRCLE | {"center": [1.0, 1.0]}),
        make_record("a square", image=2, region=3, attributes=SQUARE),
    ]
    scores = total("region-sensitivity", records)
    assert scores["region-sensitivity/caption/pairs"] == 0
    assert math.isnan(scores["region-sensitivity/caption"])


def test_recognition_is_compared_by_name_and_apart_from_captions(make_record):
    said = [("Car", "car"), ("road", "road"), ("road", "tree")]  # the third takes the second's name
    records = [make_record(text, "recognition", region=i, name=name) for i, (text, name) in enumerate(said)]
    records += [make_record("a small plain red circle", region=i, attributes=f) for i, f in enumerate((CIRCLE, SQUARE))]
    assert total("region-sensitivity", records) == {
        "region-sensitivity/caption": 0.5,
        "region-sensitivity/caption/pairs": 2,
        "region-sensitivity/recognition": pytest.approx(4 / 6),
        "region-sensitivity/recognition/pairs": 6,
    }


facts = st.fixed_dictionaries(
    {
        "color": st.sampled_from(COLORS[:3]),
        "shape": st.sampled_from(SHAPE_NAMES[:3]),
        "size": st.sampled_from(SIZE_NAMES),
        "texture": st.sampled_from(TEXTURES),
    }
)


@given(st.lists(facts, min_size=2, max_size=5), facts)
def test_an_answer_that_ignores_the_prompt_never_follows_more_than_half(make_record, truths, said):
    text = "a {size} {texture} {color} {shape}".format(**said)
    records = [make_record(text, region=i, attributes=truth) for i, truth in enumerate(truths)]
    assert not total("region-sensitivity", records)["region-sensitivity/caption"] > 0.5


# --- what every metric promises


def test_the_built_in_metrics_are_these():
    assert set(NAMES) <= set(sca_registry.metrics.list_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_that_lacks_something_says_what(make_record, name):
    with pytest.raises(ValueError, match=f"{name}.*no records"):
        total(name, [])
    with pytest.raises(ValueError, match=rf"metric '{name}': needs .*(truth\.|task=)"):
        total(name, [make_record("a tree")])


@pytest.mark.parametrize("name", NAMES)
def test_single_judgments_add_up_to_the_total(make_record, rectangle, name):
    mask = rectangle(0, 0, 4, 4)
    texts = "a small plain red circle left of a blue square", "a red star above a red circle", "a red star"
    records = [
        make_record(text, task, 7, region, mask, name=facts["shape"], attributes=facts)
        for region, (text, facts) in enumerate(zip(texts, (CIRCLE, SQUARE, STAR), strict=True))
        for task in ("caption", "recognition")
    ]
    for record in records:
        record["truth"]["mask"] = rectangle(0, 0, 3, 4)
    scores = sca_registry.metrics.build(name)(json.loads(json.dumps(records)))
    assert len({len(values) for values in scores.per_record.values()}) == 1
    assert {"image_id", "region_id"} <= scores.per_record.keys()
    shared = scores.per_record.keys() & scores.values.keys()
    assert shared
    for key in shared:
        assert scores.values[key] == pytest.approx(np.nanmean(scores.per_record[key]))


def test_needs_are_paths_values_and_choices(make_record):
    record = make_record("", attributes=CIRCLE)
    assert meets_need(record, "caption")  # said nothing, but was asked
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
