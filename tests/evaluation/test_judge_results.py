"""Judge results of DLC-Bench: files, scores and invalid entries."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sca.evaluation.evaluate import score_stored_records
from sca.evaluation.judge_results import read_judge_results, score_judge_results
from sca.evaluation.judgments import Judgment, score_judgments

STORED_RESULTS = Path(__file__).parents[1] / "data/dlc-bench/gar-dlc-scores.json"
PUBLISHED_SCORES = {  # positive, negative and mean; GPT-4o for GAR-1B: the average of the file, not the published line
    "gar_1b_eval": (0.489, 0.870, 0.679),
    "gar_8b_eval": (0.502, 0.846, 0.674),
    "gar_1b_eval_gpt": (0.658, 0.876, 0.767),
    "gar_8b_eval_gpt": (0.680, 0.860, 0.770),
}


def make_entry(positives=(1, 0.5), negatives=(1,), recognition="correct", **fields):
    details = {"details_positives": positives, "details_negatives": negatives, "details_recognition": [recognition]}
    return {
        "pred": "a red car",
        **{name: [{"question": "?", "eval_result": each} for each in results] for name, results in details.items()},
        **fields,
    }


def write_results(path, **entries):
    path.write_text(json.dumps({**entries, "avg_pos": 0.5, "avg_neg": 0.5}, indent=4))
    return path


def test_stored_results_of_gar_have_the_published_scores():
    reports = {report.label: report.scores for report in score_judge_results(STORED_RESULTS)}
    for name, published_scores in PUBLISHED_SCORES.items():
        scores = [reports[name][f"judge/{part}"] for part in ("positive", "negative", "mean")]
        assert tuple(round(score, 3) for score in scores) == published_scores


def test_mean_has_an_interval_and_intermediate_scores_are_those_of_the_files():
    (report, *_) = score_judge_results(STORED_RESULTS)
    mean = next(score for score in report.scoring.scores if score.name == "judge/mean")
    assert mean.ci_low < mean.value < mean.ci_high
    entries = json.loads(STORED_RESULTS.read_text())["gar_1b_eval"]["images"]
    per_record = report.scoring.outputs["judgments", None].per_record
    assert per_record["judge/positive"] == pytest.approx([entry["score_pos"] for entry in entries.values()])
    assert per_record["judge/recognition"].mean() == np.mean(
        [entry["recognition_result"] for entry in entries.values()]
    )


def test_results_in_the_layout_of_the_publishers_are_read(tmp_path):
    path = write_results(tmp_path / "model_eval.json", **{"1592437_0": make_entry(), "1592437_10": make_entry((-1,))})
    ((name, records),) = read_judge_results(path).items()
    assert name == ""
    assert [(each["image_id"], each["region_id"]) for each in records] == [(1592437, 0), (1592437, 10)]
    assert records[0]["caption"] == "a red car"
    (report,) = score_judge_results(path)
    assert report.label == "model_eval"
    assert report.scores["judge/positive"] == pytest.approx((0.75 - 1) / 2)


def test_stored_score_0_of_a_region_without_positive_questions_is_omitted(tmp_path):
    entries = {"one": make_entry(positives=(), score_pos=0), "two": make_entry(score_pos=0.75)}
    (report,) = score_judge_results(write_results(tmp_path / "results.json", **entries))
    assert report.scores["judge/positive"] == 0.75


def test_wrong_recognition_limits_every_question_to_zero():
    questions = [Judgment("positive", 1.0), Judgment("positive", -1.0), Judgment("negative", 0.5)]
    assert score_judgments([Judgment("recognition", 1.0), *questions]) == (0.0, 0.5, 1.0)
    assert score_judgments([*questions, Judgment("recognition", 0.0)]) == (-0.5, 0.0, 0.0)


def test_region_without_negative_questions_is_omitted_from_their_mean(tmp_path):
    path = write_results(tmp_path / "results.json", one=make_entry(negatives=()), two=make_entry(negatives=(0.5,)))
    (report,) = score_judge_results(path)
    assert report.scores["judge/negative"] == 0.5
    (alone,) = score_judge_results(write_results(path, one=make_entry(negatives=())))
    assert math.isnan(alone.scores["judge/mean"])
    assert "judge/negative: no negative questions" in alone.notes


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (make_entry(recognition="maybe"), "details_recognition.0.: eval_result is 'maybe'; expected correct or incor"),
        (make_entry(positives=("1",)), "details_positives.0.: eval_result is '1'; expected a number"),
        (make_entry(score_pos=0.2), "score_pos is 0.2, and its details average to 0.75; judge the caption again"),
        (make_entry(negatives=(), score_neg=0.5), "score_neg is 0.5, and it has no negative questions; judge the cap"),
        (make_entry(score_neg="good"), "score_neg is 'good'; expected a number"),
        ({"details_positives": []}, "details_recognition"),
    ],
)
def test_invalid_entries_are_named(tmp_path, entry, message):
    path = write_results(tmp_path / "results.json", **{"2391781": entry})
    with pytest.raises(ValueError, match=message) as caught:
        read_judge_results(path)
    assert f"{path}: 2391781" in str(caught.value)


def test_values_of_other_keys_are_not_read(tmp_path):
    path = write_results(tmp_path / "results.json", judge="llama", avg_recognition=0.5, **{"7": make_entry()})
    assert [each["region_id"] for each in read_judge_results(path)[""]] == ["7"]
    with pytest.raises(ValueError, match=r"results\.json: 8 is None; expected an object"):
        read_judge_results(write_results(path, **{"7": make_entry(), "8": None}))


def test_truncated_file_of_judge_results_is_reported(tmp_path):
    path = write_results(tmp_path / "results.json", **{"7": make_entry(), "8": make_entry()})
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=r"results\.json is not valid JSON: .* correct the file, or copy it again"):
        score_judge_results(path)


@pytest.mark.parametrize(
    "content", ['{"image_id": 1, "caption": "a"}\n{"image_id": 2, "caption": "b"}\n', "[]", "{}", "{"]
)
def test_other_files_are_not_judge_results(tmp_path, content):
    path = tmp_path / "predictions.json"
    path.write_text(content)
    assert read_judge_results(path) is None
    assert read_judge_results(tmp_path) is None


def test_judgments_of_handmade_records_are_scored(make_record):
    judgments = [{"kind": "recognition", "score": 1}, {"kind": "positive", "score": 0.5}]
    records = [make_record("a dog") | {"judgments": judgments}, make_record("a cat")]
    assert score_stored_records(records, ["judgments"]).scores["judge/positive"] == 0.5
