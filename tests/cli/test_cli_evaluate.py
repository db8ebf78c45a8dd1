"""`sca evaluate` hands on what the library finds out."""

import json
import re

import pytest


@pytest.fixture
def evaluated(shell, checkpoint):
    return lambda *arguments: shell("evaluate", checkpoint, "scenes", "num_images=3", "--limit", 2, *arguments)


@pytest.mark.slow
def test_scores_are_printed_as_a_table_and_written_with_the_predictions(evaluated, here):
    result = evaluated("--out", "scores", "--prompt", "center", "--split", "test")
    assert result.status == 0
    assert "mask-iou/mean" in result.out
    scores = json.loads((here / "scores/scores.json").read_text())
    assert (scores["images"], scores["prompt"], scores["split"]) == (2, "center", "test")
    run, *records, end = [json.loads(line) for line in (here / "scores/predictions.jsonl").read_text().splitlines()]
    assert run["run"]["dataset"] == "scenes"
    assert end["end"]["records"] == len(records)
    assert len({(record["image_id"], record["region_id"]) for record in records}) == scores["regions"]
    assert {record["task"] for record in records} == {"caption", "recognition"}
    assert result.err == ["sca: scenes test: 3 images", "sca: wrote scores/predictions.jsonl and scores/scores.json"]


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(evaluated):
    result = evaluated("--json")
    assert "mask-iou/mean" in json.loads(result.out)["scores"]
    assert result.err == ["sca: scenes val: 3 images"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scens",), "Did you mean 'scenes'?"),
        (("scenes", "num_image=3"), "Did you mean 'num_images'?"),
        (("scenes", "num_images"), "write key=value"),
        (("scenes", "--split", "vla"), "there are: train, val, test"),
        (("scenes", "--prompt", "bax"), "Did you mean 'box'?"),
        (("scenes", "--device", "gpu"), "device 'gpu' is not available"),
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


def test_predictions_are_scored_again_without_the_model(evaluated, shell):
    evaluated("--out", "run", "--metrics", "rouge-l", "tokenizer=plain")
    again = shell("score", "run", "--metrics", "rouge-l,cider", "tokenizer=plain", "references=first", "--json")
    scores = json.loads(again.out)
    assert set(scores["scores"]) == {"rouge-l", "cider"}
    assert {row["references"] for row in scores["rows"]} == {"first"}
    assert {row["tokenizer"] for row in scores["rows"]} == {"plain"}
    shown = shell("score", "run", "--dataset", "scenes", "--metrics", "class", "dataset.num_images=3")
    assert shown.status == 2
    assert "regions of the dataset were not asked for" in shown.err[0]


@pytest.mark.slow
def test_controls_stand_in_columns_of_their_own(evaluated):
    result = evaluated("--control", "wrong-region", "--control", "color-swap", "--metrics", "attributes")
    (headings,) = [line for line in result.out.splitlines() if "95 % interval" in line]
    assert headings.index("wrong-region") < headings.index("color-swap")


@pytest.mark.slow
def test_two_runs_are_compared_and_shown_on_pages(evaluated, shell, here):
    for prompt in ("box", "center"):
        evaluated("--out", prompt, "--prompt", prompt, "--metrics", "mask-iou")
    result = shell("compare", "box", "center", "--metrics", "mask-iou,attributes", "--out", "pages/compare.html")
    assert result.status == 0
    assert "mask-iou/mean" in result.out
    assert "prompt differs" in result.out
    assert "(box)" in result.out
    assert "(center)" in result.out
    assert (
        shell("report", "box", "center", "--metrics", "mask-iou,attributes", "--out", "pages/report.html").status == 0
    )
    for name in ("compare", "report"):
        page = (here / f"pages/{name}.html").read_text()
        assert page.startswith("<!DOCTYPE html>")
        assert re.search(r'<th class="numeric">[^<]*\(box\)</th><th class="numeric">[^<]*\(center\)</th>', page)


@pytest.mark.slow
def test_proposed_regions_are_captioned_and_judged(shell, checkpoint):
    result = shell(
        *("evaluate", checkpoint, "scenes", "num_images=2", "--proposer", "grid", "proposer.points_per_side=2"),
        *("--metrics", "densecap-map", "tokenizer=plain", "--json"),
    )
    assert result.status == 0, result.err
    scores = json.loads(result.out)["scores"]
    assert scores["densecap-map/true-boxes"] > 0
    assert 0 <= scores["densecap-map/boxes"] <= 1


@pytest.fixture
def visual_genome(here):
    """One picture in the publishers' layout."""
    from PIL import Image

    (here / "vg/VG_100K").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(here / "vg/VG_100K/7.jpg")
    data = [{"image_id": 7, "width": 64, "height": 48}]
    region = {"region_id": 3, "image_id": 7, "x": 4, "y": 4, "width": 20, "height": 20, "phrase": "a red car"}
    for name, content in (
        ("image_data.json", data),
        ("region_descriptions.json", [{"id": 7, "regions": [region]}]),
        ("densecap_splits.json", {"train": [], "val": [], "test": [7]}),
    ):
        (here / "vg" / name).write_text(json.dumps(content))
    return here / "vg"


@pytest.mark.slow
def test_a_published_protocol_is_run_by_its_name_beside_what_was_published(shell, checkpoint, visual_genome, here):
    result = shell("evaluate", checkpoint, "vg-region-captioning", f"root={visual_genome}", "--out", "out")
    assert result.status == 0, result.err
    assert "SCA GPT2-large, pretrained, VG (published)" in result.out
    run = json.loads((here / "out/visual-genome-test/predictions.jsonl").read_text().splitlines()[0])["run"]
    assert run["generation"]["num_beams"] == 3
    assert run["tasks"] == ["caption"]
    assert [line for line in result.err if "skipped the metrics" in line and "spice" in line and "--metrics" in line]
    refused = shell("evaluate", checkpoint, "vg-region-captioning", f"root={visual_genome}", "--split", "val")
    assert "defines its splits" in refused.err[0]


def test_evaluate_reports_where_missing_images_were_looked_for(shell, checkpoint, here):
    line = {"image": "gone.png", "box": [0, 0, 4, 4], "caption": "a dog", "width": 8, "height": 8}
    (here / "mine.jsonl").write_text(json.dumps(line))
    result = shell("evaluate", checkpoint, "jsonl", "file=mine.jsonl", f"images={here}")
    said = f"sca: jsonl val has no image that can be used: 1 image missing: gone.png (looked in {here})"
    assert (result.status, result.err) == (2, [said])


def test_evaluate_reports_a_dataset_without_the_truth_of_its_tasks(shell, checkpoint, here, picture):
    line = {"image": picture("a.png"), "box": [0, 0, 4, 4], "name": "dog", "text": "a dog"}
    (here / "mine.jsonl").write_text(json.dumps(line))
    result = shell("evaluate", checkpoint, "jsonl", "file=mine.jsonl", "--metrics", "class", "--quiet")
    assert (result.status, result.err) == (0, [])
    result = shell("evaluate", checkpoint, "jsonl", "file=mine.jsonl", "--metrics", "class")
    assert "0 with captions, 1 class name, 1 image; 1 caption under 'text', which is not read" in result.err[0]


@pytest.fixture
def handmade(here):
    """Two predictions files of one run folder each, without a model."""
    for name in ("one", "two", "lr=0.1"):
        (here / name).mkdir()
        line = {"image_id": 1, "region_id": 2, "caption": "a red car", "references": ["the red car"]}
        (here / name / "predictions.jsonl").write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.slow
def test_compare_and_report_read_options_alike(handmade, shell, refused, command):
    arguments = (command, "one", "two", "--metrics", "rouge-l", "--out", "page.html")
    assert shell(*arguments, "tokenizer=plain", "rouge-l.references=first").status == 0
    assert "Did you mean 'tokenizer'?" in refused(2, *arguments, "tokenzier=plain")
    assert "no metric 'rogue-l'" in refused(2, *arguments, "rogue-l.references=first")
    assert shell(command, "one", "./lr=0.1", "--metrics", "rouge-l", "--out", "page.html").status == 0
    last = ("one", "lr=0.1") if command == "report" else ("one", "two", "lr=0.1")
    assert "write ./lr=0.1 for the path" in refused(2, command, *last, "--metrics", "rouge-l")
