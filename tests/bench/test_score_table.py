"""Score differences of the studies, and their table."""

import json

import pytest

import score_table
from sca.evaluation.evaluate import score_file


@pytest.fixture
def score_names(tmp_path):
    """Function that scores predicted class names of as many images, all of which are "dog"."""

    def score(names):
        records = [
            {
                "image_id": index,
                "region_id": index,
                "caption": name,
                "task": "recognition",
                "truth": {"name": "dog", "area": 9},
            }
            for index, name in enumerate(names)
        ]
        path = tmp_path / "predictions.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return score_file(path, ["class"])

    return score


def test_score_differences_are_means_over_seeds_with_an_interval(score_names):
    first = [score_names(["dog"] * 8), score_names(["dog"] * 6 + ["cat"] * 2)]
    second = [score_names(["dog"] * 4 + ["cat"] * 4), score_names(["cat"] * 8)]
    result = score_table.compute_differences(first, second, ["class/accuracy", "unknown"])
    assert result.keys() == {"class/accuracy"}
    difference = result["class/accuracy"]
    assert difference["per_seed"] == [0.5, 0.75]
    assert difference["mean"] == 0.625
    assert 0 < difference["ci_low"] < 0.625 < difference["ci_high"] < 1


def test_table_has_scores_and_differences_with_a_dash_for_missing_ones():
    difference = {"mean": 0.25, "ci_low": -0.1, "ci_high": 0.6}
    table = score_table.render_table({"a": "A", "b": "B"}, {"x": {"a": 0.5, "b": 0.1}}, {"x to y": {"a": difference}})
    assert table.splitlines() == [
        "| | A | B |",
        "| --- | ---: | ---: |",
        "| x | 50.0 | 10.0 |",
        "| x to y (95% CI) | +25.0 (-10.0 to +60.0) | – |",
    ]
