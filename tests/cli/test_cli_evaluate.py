"""`sca evaluate` hands on what the library finds out."""

import json

import pytest


@pytest.fixture
def evaluated(shell, checkpoint):
    return lambda *arguments: shell("evaluate", checkpoint, "scenes", "count=3", "--limit", 2, *arguments)


def test_scores_are_printed_as_a_table_and_written_with_the_predictions(evaluated, here):
    result = evaluated("--out", "scores", "--prompt", "point", "--split", "test")
    assert result.status == 0
    assert "mask-iou/mean" in result.out
    scores = json.loads((here / "scores/scores.json").read_text())
    assert (scores["images"], scores["prompt"], scores["split"]) == (2, "point", "test")
    records = [json.loads(line) for line in (here / "scores/predictions.jsonl").read_text().splitlines()]
    assert len({(record["image_id"], record["region_id"]) for record in records}) == scores["regions"]
    assert {record["task"] for record in records} == {"caption", "recognition"}
    assert result.err == ["sca: wrote scores/predictions.jsonl and scores/scores.json"]


def test_json_is_all_there_is_on_standard_output(evaluated):
    result = evaluated("--json")
    assert "mask-iou/mean" in json.loads(result.out)["scores"]
    assert result.err == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scens",), "Did you mean 'scenes'?"),
        (("scenes", "cuont=3"), "Did you mean 'count'?"),
        (("scenes", "count"), "write key=value"),
        (("scenes", "--split", "vla"), "there are: train, val, test"),
        (("scenes", "--prompt", "bax"), "Did you mean 'box'?"),
        (("scenes", "--device", "gpu"), "no device 'gpu' here"),
        (("scenes", "--limit", "0"), "'--limit'"),
        (("coco",), "give root=FOLDER"),
        (("coco", "root=/nowhere"), "not there: /nowhere/val.json"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(refused, checkpoint, arguments, said):
    assert said in refused(2, "evaluate", checkpoint, *arguments)


def test_a_model_that_is_none_is_one_line(refused):
    assert "Did you mean 'sca-tiny'?" in refused(2, "evaluate", "sca-tniy", "scenes")
