"""Dense captioning mAP: cases computed by hand, and a slow reference implementation."""

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

DISTANT_BOX = [500, 500, 509, 509]


def make_dense_record(image, proposals, regions):
    return {
        "image_id": image,
        "region_id": None,
        "task": "dense",
        "proposals": [{"box": box, "score": score, "caption": caption} for box, score, caption in proposals],
        "truth": {"regions": [{"id": n, "box": box, "phrases": [phrase]} for n, (box, phrase) in enumerate(regions)]},
    }


def compute_scores(*records):
    return DenseCapMap(tokenizer="plain")(records).values


def test_pixel_iou_includes_the_last_pixel():
    assert compute_pixel_ious(np.array([[0, 0, 9, 9]]), np.array([[0, 0, 9, 4]]))[0, 0] == 0.5
    assert compute_pixel_ious(np.array([[0, 0, 9, 9]]), np.array([[10, 0, 19, 9]]))[0, 0] == 0


@pytest.mark.slow
def test_densecap_map_is_one_for_correct_and_zero_for_distant_boxes():
    regions = [([0, 0, 9, 9], "a red car"), ([50, 50, 79, 79], "a tall man")]
    correct_scores = compute_scores(
        make_dense_record(1, [([0, 0, 9, 9], 0.9, "a red car"), ([50, 50, 79, 79], 0.8, "a tall man")], regions)
    )
    assert correct_scores["densecap-map/rouge-l"] == correct_scores["densecap-map/boxes"] == 1
    if not find_java_problem():
        assert correct_scores["densecap-map"] == 1
    wrong_scores = compute_scores(make_dense_record(1, [(DISTANT_BOX, 0.9, "a red car")], regions))
    assert wrong_scores["densecap-map/rouge-l"] == wrong_scores["densecap-map/boxes"] == 0


@pytest.mark.slow
def test_densecap_map_matches_each_box_once_with_the_highest_scored_proposal():
    regions = [([0, 0, 9, 9], "a car")]
    proposals = [([0, 0, 9, 9], 0.5, "a car"), ([0, 0, 9, 9], 0.9, "a dog")]
    scores = compute_scores(make_dense_record(1, proposals, regions))
    assert scores["densecap-map/boxes"] == 1
    # "a dog" is matched to the box; half of its words are correct, which is above every threshold
    assert scores["densecap-map/rouge-l"] == 1
    assert (
        compute_scores(make_dense_record(1, [([0, 0, 9, 9], 0.9, "one dog"), proposals[0]], regions))[
            "densecap-map/rouge-l"
        ]
        == 0
    )


@pytest.mark.slow
def test_densecap_map_excludes_iou_equal_to_threshold():
    regions = [([0, 0, 9, 9], "a car")]
    score = compute_scores(make_dense_record(1, [([0, 0, 9, 4], 0.9, "a car")], regions))["densecap-map/boxes"]
    assert score == pytest.approx(2 / 5)  # above 0.3 and 0.4, not above 0.5


def test_merge_true_boxes_joins_near_duplicates_and_their_phrases():
    boxes, phrases = merge_true_boxes(
        np.array([[0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 59, 59]], float), [["a"], ["b"], ["c"]]
    )
    assert boxes.tolist() == [[0, 0, 9, 8.5], [50, 50, 59, 59]]
    assert phrases == [["a", "b"], ["c"]]


def test_mean_precision_is_sampled_at_101_recalls():
    """The second of two proposals finds one of two boxes: precision 1/2 up to recall 1/2."""
    scores, ious = np.array([0.9, 0.8]), np.array([0.0, 1.0])
    is_first, caption_scores = np.array([False, True]), np.array([-1.0, 1.0])
    assert compute_mean_precision(scores, ious, is_first, caption_scores, num_true_boxes=2) == pytest.approx(
        51 / 101 / 2
    )


@pytest.mark.slow
def test_densecap_map_counts_boxes_of_images_without_proposals():
    regions = [([0, 0, 9, 9], "a car")]
    complete_record = make_dense_record(1, [([0, 0, 9, 9], 0.9, "a car")], regions)
    assert compute_scores(complete_record, make_dense_record(2, [], regions))["densecap-map/boxes"] == pytest.approx(
        51 / 101
    )
    assert compute_scores(make_dense_record(2, [], regions))["densecap-map/boxes"] == 0


def compute_mean_precision_slowly(images, agreement):
    """Compute the definition directly: every threshold, every proposal, every recall."""
    num_true_boxes = sum(len(true_boxes) for _, _, true_boxes in images)
    precisions = []
    for iou_threshold in IOU_THRESHOLDS:
        for caption_threshold in CAPTION_THRESHOLDS:
            scores_and_matches = []
            for image, (proposals, scores, true_boxes) in enumerate(images):
                matched_boxes = set()
                for index in sorted(range(len(proposals)), key=lambda index: -scores[index]):
                    best_iou, best_box = -1.0, None
                    for number, box in enumerate(true_boxes):
                        intersection = 1.0
                        for axis in (0, 1):
                            low = max(proposals[index][axis], box[axis])
                            high = min(proposals[index][axis + 2], box[axis + 2])
                            intersection *= max(0, high - low + 1)
                        areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (proposals[index], box)]
                        iou = intersection / (sum(areas) - intersection)
                        if iou > best_iou:
                            best_iou, best_box = iou, number
                    is_unmatched = best_box is not None and best_box not in matched_boxes
                    matched_boxes.add(best_box)
                    is_correct = (
                        is_unmatched and best_iou > iou_threshold and agreement[image][index] > caption_threshold
                    )
                    scores_and_matches.append((scores[index], is_correct))
            scores_and_matches.sort(key=lambda pair: -pair[0])
            num_correct, precision_recall_points = 0, []
            for count, (_, is_correct) in enumerate(scores_and_matches, 1):
                num_correct += is_correct
                precision_recall_points.append((num_correct / num_true_boxes, num_correct / count))
            steps = np.linspace(0, 1, 101)
            precisions.append(
                np.mean([max((p for r, p in precision_recall_points if r >= step), default=0) for step in steps])
            )
    return np.mean(precisions)


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(n, marks=pytest.mark.all) for n in range(30, 300))])
def test_mean_precision_matches_slow_implementation(seed):
    rng = np.random.default_rng(seed)

    def draw_boxes(count):
        corner = rng.integers(0, 30, (count, 2))
        return np.concatenate((corner, corner + rng.integers(1, 30, (count, 2))), axis=1).astype(float)

    images = []
    for image in range(rng.integers(1, 5)):
        true_boxes = draw_boxes(rng.integers(image == 0, 5))
        near_proposals = np.concatenate(
            [true_boxes + rng.integers(0, 4, true_boxes.shape) * [0, 0, 1, 1], draw_boxes(rng.integers(0, 6))]
        )
        images.append((near_proposals, rng.permutation(len(near_proposals)) / 10 + rng.random() / 20, true_boxes))
    caption_scores = [rng.choice([0.0, 0.03, 0.05, 0.12, 0.3], len(proposals)) for proposals, *_ in images]
    matches, sorted_caption_scores = [], []
    for (proposals, scores, true_boxes), image_caption_scores in zip(images, caption_scores, strict=True):
        order = np.argsort(-scores)
        matches.append(match_proposals(proposals[order], scores[order], true_boxes))
        sorted_caption_scores.append(image_caption_scores[order])
    scores, ious, is_first, _ = (np.concatenate(values) for values in zip(*matches, strict=True))
    mean_precision = compute_mean_precision(
        scores, ious, is_first, np.concatenate(sorted_caption_scores), sum(len(true_boxes) for *_, true_boxes in images)
    )
    assert mean_precision == pytest.approx(compute_mean_precision_slowly(images, caption_scores), abs=1e-12)


def test_densecap_map_without_java_returns_rouge_l_and_boxes(monkeypatch):
    monkeypatch.setattr(densecap_map, "find_java_problem", lambda: "no Java")
    record = make_dense_record(1, [([0, 0, 9, 9], 0.9, "a car")], [([0, 0, 9, 9], "a car")])
    assert set(sca_registry.metrics.build("densecap-map", tokenizer="plain")([record]).values) == {
        *("densecap-map/rouge-l", "densecap-map/boxes", "densecap-map/proposals", "densecap-map/true-boxes")
    }
