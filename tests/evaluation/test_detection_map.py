"""Mean average precision of proposed boxes with class names."""

import math

import pytest
import sca_registry

from sca.evaluation.metrics.detection_map import compute_detection_map

CAR, DOG = [0, 0, 40, 20], [50, 50, 80, 90]


def make_record(image, proposals, regions):
    return {
        "index": image,
        "image_id": image,
        "region_id": None,
        "task": "dense-recognition",
        "proposals": [
            {"box": box, "score": score, "caption": caption, "name": name} for box, score, caption, name in proposals
        ],
        "truth": {"regions": [{"id": index, "box": box, "name": name} for index, (box, name) in enumerate(regions)]},
    }


def compute_scores(*records):
    return sca_registry.metrics.build("detection-map")(records).values


def test_detection_map_scores_predicted_names_and_proposer_names_separately():
    regions = [(CAR, "car"), (DOG, "dog")]
    scores = compute_scores(make_record(1, [(CAR, 0.9, "Car ", "truck"), (DOG, 0.8, "cat", "dog")], regions))
    assert scores["detection-map/boxes"] == pytest.approx(1)
    assert scores["detection-map"] == pytest.approx(0.5)  # car, not dog
    assert scores["detection-map/proposer"] == pytest.approx(0.5)  # dog, not car
    assert (scores["detection-map/proposals"], scores["detection-map/true-boxes"]) == (2, 2)


def test_detection_map_counts_false_positives_of_images_without_regions():
    complete = make_record(1, [(CAR, 0.5, "car", None)], [(CAR, "car")])
    wrong = make_record(2, [(CAR, 0.9, "car", None)], [])
    assert compute_scores(complete)["detection-map"] == pytest.approx(1)
    assert compute_scores(complete, wrong)["detection-map"] == pytest.approx(0.5)  # precision 1/2 at every recall


def test_detection_map_averages_ten_iou_thresholds():
    record = make_record(1, [([0, 0, 40, 14.5], 0.5, "car", None)], [(CAR, "car")])  # IoU 0.725: 0.5, 0.55, ..., 0.7
    assert compute_scores(record)["detection-map/boxes"] == pytest.approx(0.5)


def test_detection_map_omits_proposer_without_names():
    assert "detection-map/proposer" not in compute_scores(make_record(1, [(CAR, 0.5, "car", None)], [(CAR, "car")]))


def test_detection_map_without_boxes():
    assert compute_detection_map([make_record(1, [], [(CAR, "car")])], None) == 0
    assert math.isnan(compute_detection_map([make_record(1, [(CAR, 0.5, "car", None)], [])], None))


def test_detection_map_prints_nothing(capfd):
    compute_scores(make_record(1, [(CAR, 0.5, "car", "car")], [(CAR, "car")]))
    assert capfd.readouterr() == ("", "")
