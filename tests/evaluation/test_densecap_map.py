"""Dense captioning: cases worked by hand, and the rule written out slowly."""

import numpy as np
import pytest
import sca_registry

from sca.evaluation.metrics import densecap_map
from sca.evaluation.metrics.densecap_map import (
    CAPTION_THRESHOLDS,
    IOU_THRESHOLDS,
    DenseCapMap,
    compute_mean_precision,
    compute_pixel_ious,
    match_proposals,
    merge_true_boxes,
)
from sca.evaluation.tokenization import find_java_problem

FAR = [500, 500, 509, 509]


def dense(image, proposals, regions):
    return {
        "image_id": image,
        "region_id": None,
        "task": "dense",
        "proposals": [{"box": box, "score": score, "caption": caption} for box, score, caption in proposals],
        "truth": {"regions": [{"id": n, "box": box, "phrases": [phrase]} for n, (box, phrase) in enumerate(regions)]},
    }


def total(*records):
    return DenseCapMap(tokenizer="plain")(records).values


def test_the_last_pixel_counts():
    assert compute_pixel_ious(np.array([[0, 0, 9, 9]]), np.array([[0, 0, 9, 4]]))[0, 0] == 0.5
    assert compute_pixel_ious(np.array([[0, 0, 9, 9]]), np.array([[10, 0, 19, 9]]))[0, 0] == 0


@pytest.mark.slow
def test_all_right_is_one_and_all_elsewhere_is_nothing():
    regions = [([0, 0, 9, 9], "a red car"), ([50, 50, 79, 79], "a tall man")]
    right = total(dense(1, [([0, 0, 9, 9], 0.9, "a red car"), ([50, 50, 79, 79], 0.8, "a tall man")], regions))
    assert right["densecap-map/rouge-l"] == right["densecap-map/boxes"] == 1
    if not find_java_problem():
        assert right["densecap-map"] == 1
    wrong = total(dense(1, [(FAR, 0.9, "a red car")], regions))
    assert wrong["densecap-map/rouge-l"] == wrong["densecap-map/boxes"] == 0


@pytest.mark.slow
def test_a_box_is_found_once_and_the_better_scored_proposal_has_it():
    regions = [([0, 0, 9, 9], "a car")]
    twice = [([0, 0, 9, 9], 0.5, "a car"), ([0, 0, 9, 9], 0.9, "a dog")]
    found = total(dense(1, twice, regions))
    assert found["densecap-map/boxes"] == 1
    # "a dog" has the box; half of its words are right, which is above every threshold
    assert found["densecap-map/rouge-l"] == 1
    assert total(dense(1, [([0, 0, 9, 9], 0.9, "one dog"), twice[0]], regions))["densecap-map/rouge-l"] == 0


@pytest.mark.slow
def test_an_overlap_at_the_threshold_is_not_above_it():
    regions = [([0, 0, 9, 9], "a car")]
    half = total(dense(1, [([0, 0, 9, 4], 0.9, "a car")], regions))["densecap-map/boxes"]
    assert half == pytest.approx(2 / 5)  # above 0.3 and 0.4, not above 0.5


def test_boxes_that_are_nearly_the_same_are_one_with_the_phrases_of_both():
    boxes, phrases = merge_true_boxes(
        np.array([[0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 59, 59]], float), [["a"], ["b"], ["c"]]
    )
    assert boxes.tolist() == [[0, 0, 9, 8.5], [50, 50, 59, 59]]
    assert phrases == [["a", "b"], ["c"]]


def test_precision_is_read_at_a_hundred_and_one_recalls():
    """One of two boxes found, by the second of two proposals: precision 1/2 up to recall 1/2."""
    scores, overlaps = np.array([0.9, 0.8]), np.array([0.0, 1.0])
    first, agreement = np.array([False, True]), np.array([-1.0, 1.0])
    assert compute_mean_precision(scores, overlaps, first, agreement, num_true_boxes=2) == pytest.approx(51 / 101 / 2)


@pytest.mark.slow
def test_an_image_without_proposals_lowers_recall_and_none_at_all_is_nothing():
    regions = [([0, 0, 9, 9], "a car")]
    whole = dense(1, [([0, 0, 9, 9], 0.9, "a car")], regions)
    assert total(whole, dense(2, [], regions))["densecap-map/boxes"] == pytest.approx(51 / 101)
    assert total(dense(2, [], regions))["densecap-map/boxes"] == 0


def slowly(images, agreement):
    """The rule as it is written: every threshold, every proposal, every recall."""
    boxes = sum(len(true) for _, _, true in images)
    precisions = []
    for least in IOU_THRESHOLDS:
        for agreed in CAPTION_THRESHOLDS:
            judged = []
            for image, (proposals, scores, true) in enumerate(images):
                taken = set()
                for place in sorted(range(len(proposals)), key=lambda place: -scores[place]):
                    best, which = -1.0, None
                    for number, box in enumerate(true):
                        common = 1.0
                        for axis in (0, 1):
                            low = max(proposals[place][axis], box[axis])
                            high = min(proposals[place][axis + 2], box[axis + 2])
                            common *= max(0, high - low + 1)
                        areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (proposals[place], box)]
                        value = common / (sum(areas) - common)
                        if value > best:
                            best, which = value, number
                    free = which is not None and which not in taken
                    taken.add(which)
                    right = free and best > least and agreement[image][place] > agreed
                    judged.append((scores[place], right))
            judged.sort(key=lambda each: -each[0])
            found, points = 0, []
            for count, (_, right) in enumerate(judged, 1):
                found += right
                points.append((found / boxes, found / count))
            steps = np.linspace(0, 1, 101)
            precisions.append(np.mean([max((p for r, p in points if r >= step), default=0) for step in steps]))
    return np.mean(precisions)


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(n, marks=pytest.mark.all) for n in range(30, 300))])
def test_the_fast_way_is_the_slow_way(seed):
    draw = np.random.default_rng(seed)

    def boxes(count):
        corner = draw.integers(0, 30, (count, 2))
        return np.concatenate((corner, corner + draw.integers(1, 30, (count, 2))), axis=1).astype(float)

    images = []
    for image in range(draw.integers(1, 5)):
        true = boxes(draw.integers(image == 0, 5))
        near = np.concatenate([true + draw.integers(0, 4, true.shape) * [0, 0, 1, 1], boxes(draw.integers(0, 6))])
        images.append((near, draw.permutation(len(near)) / 10 + draw.random() / 20, true))
    agreement = [draw.choice([0.0, 0.03, 0.05, 0.12, 0.3], len(proposals)) for proposals, *_ in images]
    given, told = [], []
    for (proposals, scores, true), agreed in zip(images, agreement, strict=True):
        order = np.argsort(-scores)
        given.append(match_proposals(proposals[order], scores[order], true))
        told.append(agreed[order])
    scores, overlaps, first, _ = (np.concatenate(values) for values in zip(*given, strict=True))
    fast = compute_mean_precision(scores, overlaps, first, np.concatenate(told), sum(len(true) for *_, true in images))
    assert fast == pytest.approx(slowly(images, agreement), abs=1e-12)


def test_without_java_the_other_two_are_left(monkeypatch):
    monkeypatch.setattr(densecap_map, "find_java_problem", lambda: "no Java")
    record = dense(1, [([0, 0, 9, 9], 0.9, "a car")], [([0, 0, 9, 9], "a car")])
    assert set(sca_registry.metrics.build("densecap-map", tokenizer="plain")([record]).values) == {
        *("densecap-map/rouge-l", "densecap-map/boxes", "densecap-map/proposals", "densecap-map/true-boxes")
    }
