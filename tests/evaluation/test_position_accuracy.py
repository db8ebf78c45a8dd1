"""Positions in captions: which phrases state one, and when it is true."""

import numpy as np
import pytest

from sca.evaluation.metrics.position_accuracy import PositionAccuracy, is_position_true, parse_position
from sca.evaluation.scoring import score_records
from sca.training.template_phrases import make_template_phrases


def make_record(region_id, caption, box):
    return {
        "image_id": 0,
        "region_id": region_id,
        "task": "caption",
        "caption": caption,
        "mask": None,
        "truth": {"box": box, "mask": {"size": [50, 100], "counts": ""}},
    }


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a car on the left", {"left"}),
        ("A large building at the Top Right", {"top", "right"}),
        ("the road at the bottom", {"bottom"}),
        ("a sign in the middle", {"middle"}),
        ("a dog in the upper-left corner of the image", {"top", "left"}),
        ("a bus on the far right side of the photo", {"right"}),
        ("a cup on the left side", {"left"}),
        ("a red circle left of a blue square", set()),
        ("a man on the left of a car", set()),
        ("a man on the right side of the car", set()),
        ("a left hand", set()),
        ("a sign on the left-hand side of the image", {"left"}),
        ("a car on the left with a red roof", {"left"}),
        ("a pocket on the top right of a shirt", set()),
        ("a car on the left-hand side of a truck", set()),
        ("a label at the bottom left of the shirt", set()),
        ("a bat in the right hand of a man", set()),
        ("a watch on the left wrist", set()),
        ("", set()),
    ],
)
def test_parse_position_finds_positions_in_the_image_only(caption, words):
    assert parse_position(caption) == words


@pytest.mark.parametrize(
    ("words", "center", "is_true"),
    [
        ({"left"}, (0.4, 0.9), True),
        ({"left"}, (0.6, 0.1), False),
        ({"top", "right"}, (0.6, 0.4), True),
        ({"top", "right"}, (0.6, 0.6), False),
        ({"middle"}, (0.3, 0.7), True),
        ({"middle"}, (0.1, 0.5), False),
        ({"middle", "left"}, (0.1, 0.5), True),
        ({"middle", "left"}, (0.1, 0.9), False),
    ],
)
def test_position_is_true_for_the_center_of_the_region(words, center, is_true):
    assert is_position_true(words, *center) == is_true


def test_positions_of_template_phrases_are_true():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = rng.uniform(0, 90, 2)
        box = (x, y, x + 10, y + 10)
        phrase = make_template_phrases("car", box, (100, 100), is_unique=False)[1]
        words = parse_position(phrase)
        assert words
        assert is_position_true(words, (x + 5) / 100, (y + 5) / 100)


def test_position_accuracy_counts_stated_and_correct_positions():
    records = [
        make_record(0, "a car on the left", [0, 0, 40, 20]),
        make_record(1, "a car on the right", [0, 0, 40, 20]),
        make_record(2, "a car", [0, 0, 40, 20]),
        make_record(3, "a car at the bottom", [0, 30, 40, 50]),
    ]
    with pytest.raises(ValueError, match="no caption states a position"):
        PositionAccuracy()(records[2:3])
    output = PositionAccuracy()(records)
    assert output.values == {
        "positions/correct": pytest.approx(2 / 3),
        "positions/stated": 0.75,
        "positions/captions": 4,
    }
    assert np.array_equal(output.per_record["positions/correct"], [1, 0, np.nan, 1], equal_nan=True)


def test_positions_are_skipped_with_a_reason_if_no_caption_states_one():
    result = score_records([make_record(0, "a car", [0, 0, 40, 20])])
    assert result.skipped_metrics["positions"] == "no caption states a position in the image"
