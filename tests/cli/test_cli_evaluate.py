"""`sca evaluate`: datasets, files of captions, metrics and reports."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sca.cli.evaluate import PlannedRun, _plan_protocol_runs
from sca.evaluation.predictions import PromptingOptions
from sca.evaluation.protocol import EvaluationProtocol, ProtocolRun


@pytest.fixture
def evaluate_on_scenes(run_sca, checkpoint):
    return lambda *arguments: run_sca("evaluate", checkpoint, "scenes", "num_images=3", "--limit", 2, *arguments)


@pytest.mark.slow
def test_evaluate_prints_score_table_and_writes_scores_and_predictions(evaluate_on_scenes, working_folder):
    result = evaluate_on_scenes("--out", "scores", "--prompt-type", "center", "--split", "test")
    assert result.status == 0
    assert "mask-iou/mean" in result.out
    scores = json.loads((working_folder / "scores/scores.json").read_text())
    assert (scores["num_images"], scores["prompt_type"], scores["split"]) == (2, "center", "test")
    header, *records, footer = [
        json.loads(line) for line in (working_folder / "scores/predictions.jsonl").read_text().splitlines()
    ]
    assert header["run"]["dataset"] == "scenes"
    assert footer["summary"]["num_records"] == len(records)
    assert len({(record["image_id"], record["region_id"]) for record in records}) == scores["num_regions"]
    assert {record["task"] for record in records} == {"caption", "recognition"}
    assert result.err == ["sca: scenes test: 3 images", "sca: wrote scores/predictions.jsonl and scores/scores.json"]


@pytest.mark.slow
def test_evaluate_json_writes_only_json_to_stdout(evaluate_on_scenes):
    result = evaluate_on_scenes("--json")
    assert "mask-iou/mean" in json.loads(result.out)["scores"]
    assert result.err == ["sca: scenes val: 3 images"]


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (("scens",), "Did you mean 'scenes'?"),
        (("scenes", "num_image=3"), "Did you mean 'num_images'?"),
        (("scenes", "num_images"), "write key=value"),
        (("scenes", "--split", "vla"), "choose from train, val, test"),
        (("scenes", "--prompt-type", "bax"), "Did you mean 'box'?"),
        (("scenes", "--device", "gpu"), "device 'gpu' is not available"),
        (("scenes", "--max-images", "0"), "'--max-images'"),
        (("coco",), "set root=FOLDER"),
        (("coco", "root=/nowhere"), "missing: /nowhere/val.json"),
    ],
    ids=str,
)
def test_evaluate_reports_invalid_arguments_in_one_line(get_sca_error, checkpoint, arguments, expected_message):
    assert expected_message in get_sca_error(2, "evaluate", checkpoint, *arguments)


def test_evaluate_suggests_correction_for_unknown_model(get_sca_error):
    assert "Did you mean 'sca-tiny'?" in get_sca_error(2, "evaluate", "sca-tniy", "scenes")


def test_score_computes_metrics_from_predictions_without_the_model(evaluate_on_scenes, run_sca):
    evaluate_on_scenes("--out", "run", "--metrics", "rouge-l", "tokenizer=plain")
    result = run_sca("score", "run", "--metrics", "rouge-l,cider", "tokenizer=plain", "references=first", "--json")
    scores = json.loads(result.out)
    assert set(scores["scores"]) == {"rouge-l", "cider"}
    assert {row["references"] for row in scores["score_details"]} == {"first"}
    assert {row["tokenizer"] for row in scores["score_details"]} == {"plain"}
    result_with_dataset = run_sca("score", "run", "--dataset", "scenes", "--metrics", "class", "dataset.num_images=3")
    assert result_with_dataset.status == 2
    assert "regions of the dataset have no prediction" in result_with_dataset.err[0]


def test_score_recognizes_the_judge_results_of_dlc_bench(run_sca, get_sca_error):
    results = Path(__file__).parents[1] / "data/dlc-bench/gar-dlc-scores.json"
    reports = json.loads(run_sca("score", results, "--json").out)
    assert [round(report["scores"]["judge/mean"], 3) for report in reports] == [0.679, 0.767, 0.674, 0.77]
    assert "gar_8b_eval_gpt" in run_sca("score", results).out
    assert "omit --dataset" in get_sca_error(2, "score", results, "--dataset", "scenes")


@pytest.mark.slow
def test_evaluate_prints_each_control_in_a_separate_column(evaluate_on_scenes):
    result = evaluate_on_scenes("--control", "wrong-region", "--control", "color-swap", "--metrics", "attributes")
    (header,) = [line for line in result.out.splitlines() if "95% CI" in line]
    assert header.index("wrong-region") < header.index("color-swap")


@pytest.mark.slow
def test_compare_and_report_write_pages_for_two_evaluation_runs(evaluate_on_scenes, run_sca, working_folder):
    for prompt in ("box", "center"):
        evaluate_on_scenes("--out", prompt, "--prompt-type", prompt, "--metrics", "mask-iou")
    result = run_sca("compare", "box", "center", "--metrics", "mask-iou,attributes", "--out", "pages/compare.html")
    assert result.status == 0
    assert "mask-iou/mean" in result.out
    assert "prompt_type differs" in result.out
    assert "(box)" in result.out
    assert "(center)" in result.out
    assert (
        run_sca("report", "box", "center", "--metrics", "mask-iou,attributes", "--out", "pages/report.html").status == 0
    )
    for name in ("compare", "report"):
        page = (working_folder / f"pages/{name}.html").read_text()
        assert page.startswith("<!DOCTYPE html>")
        assert re.search(r'<th class="numeric">[^<]*\(box\)</th><th class="numeric">[^<]*\(center\)</th>', page)


@pytest.fixture
def evaluate_proposals(run_sca, checkpoint, save_tiny_proposer):
    """Function that evaluates the boxes of a tiny Grounding DINO."""
    proposer = f"grounding-dino weights={save_tiny_proposer('grounding-dino')} score_thresh=0 max_regions=3"

    def run(dataset, *arguments):
        return run_sca("evaluate", checkpoint, *dataset, "--proposer", proposer, *arguments)

    return run


@pytest.fixture
def coco_folder(working_folder):
    """A folder in COCO's layout whose regions have names and no phrases."""
    (working_folder / "data/val").mkdir(parents=True)
    images, annotations = [], []
    for number in (1, 2):
        Image.new("RGB", (64, 48), (40 * number, 80, 90)).save(working_folder / f"data/val/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        box = {"bbox": [4, 4, 20, 30], "area": 600, "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": 1, **box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}
    (working_folder / "data/val.json").write_text(json.dumps(content))
    return working_folder / "data"


@pytest.mark.slow
def test_evaluate_captions_and_recognizes_proposals_of_text(evaluate_proposals, working_folder):
    arguments = ("--text", "disc", "--text", "red box", "--out", "run", "tokenizer=plain", "--json")
    result = evaluate_proposals(("scenes", "num_images=2"), "proposer.text_thresh=0", *arguments)
    assert result.status == 0, result.err
    report = json.loads(result.out)
    scores = {"densecap-map/rouge-l", "densecap-map/boxes", "detection-map", "detection-map/proposer"}
    assert scores <= {*report["scores"]}
    assert report["run"]["proposer"]["text"] == ["disc", "red box"]
    assert report["run"]["proposer_hash"]
    records = [json.loads(line) for line in (working_folder / "run/predictions.jsonl").read_text().splitlines()[1:-1]]
    assert [record["task"] for record in records] == ["dense", "dense-recognition"] * 2
    assert all(proposal["name"] for record in records for proposal in record["proposals"])


@pytest.mark.slow
def test_evaluate_recognizes_proposals_if_regions_have_only_names(evaluate_proposals, coco_folder):
    dataset = ("coco", f"root={coco_folder}", "--split", "val")
    result = evaluate_proposals(dataset, "--text", "car", "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["scores"]["detection-map/true-boxes"] == 2
    assert report["run"]["tasks"] == ["dense-recognition"]
    assert "densecap-map" in report["skipped_metrics"]
    result = evaluate_proposals(dataset, "--text", "car", "--metrics", "densecap-map")
    assert (result.status, len(result.err)) == (2, 1)
    assert "metric 'densecap-map': needs task=dense, and this evaluation has task=dense-recognition" in result.err[0]


@pytest.mark.slow
def test_evaluate_rejects_folder_of_a_run_with_other_text(evaluate_proposals):
    arguments = ("--metrics", "detection-map", "--out", "run", "--json")

    def get_protocol_id(*more_arguments):
        result = evaluate_proposals(("scenes", "num_images=1"), *arguments, *more_arguments)
        assert result.status == 0, result.err
        return json.loads(result.out)["score_details"][0]["protocol_id"]

    first_id = get_protocol_id("--text", "disc")
    assert get_protocol_id("--text", "disc") == first_id
    result = evaluate_proposals(("scenes", "num_images=1"), *arguments, "--text", "red box")
    assert result.status == 2
    assert re.search(r"proposer: .*disc.* there, .*red box.* now", result.err[-1])
    assert get_protocol_id("--text", "red box", "--overwrite") != first_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "car"), "--text requires --proposer with a proposer that takes text, such as owlv2-base"),
        (("--proposer", "grid", "--text", "car"), "the proposer 'grid' takes no text; omit it, or use another one"),
        (("--proposer", "grounding-dino-tiny"), "no text to find; pass --text PHRASE"),
        (("--proposer", "owlv2-base text=car", "--text", "dog"), "has its text twice; omit the option text or --text"),
        (("--proposer", "gird"), "Did you mean 'grid'?"),
        (("--proposer", "grid", "--prompt-type", "center"), "--proposer finds the regions to caption; omit"),
        (("--proposer", "grid", "--control", "wrong-region"), "--proposer finds the regions to caption; omit"),
        (("proposer.text=car",), "the option proposer.text requires --proposer; add --proposer NAME"),
        (("--proposer", "grid", "--metrics", "class"), "metric 'class': needs task=recognition"),
    ],
    ids=str,
)
def test_evaluate_reports_invalid_proposer_options_in_one_line(get_sca_error, checkpoint, arguments, message):
    assert message in get_sca_error(2, "evaluate", checkpoint, "scenes", "num_images=1", *arguments)


def test_caption_task_applies_to_the_runs_of_a_protocol_with_captions():
    runs = (
        ProtocolRun("names", "scenes", "test", tasks=("recognition",)),
        ProtocolRun("captions", "scenes", "test", tasks=("caption", "recognition")),
    )
    protocol = EvaluationProtocol("mixed", "", "", ("cider-d",), runs)
    requested = PlannedRun({}, "test", PromptingOptions(caption_task="detail"), None, ["cider-d"], {}, None)
    planned_runs = _plan_protocol_runs(protocol, requested, {}, quiet=True)
    assert [run.prompting.caption_task for run in planned_runs] == ["caption", "detail"]


@pytest.mark.parametrize(
    ("protocol", "arguments", "message"),
    [
        ("refcocog-reg", ("--proposer", "grid"), "refcocog-reg prompts the regions of its datasets; omit --proposer"),
        (
            "refcocog-reg",
            ("proposer.points_per_side=2",),
            "refcocog-reg prompts the regions of its datasets; omit the option proposer.points_per_side",
        ),
        (
            "refcoco-comprehension",
            ("proposer.points_per_side=2",),
            "the option proposer.points_per_side requires --proposer; add --proposer NAME",
        ),
        (
            "refcoco-comprehension",
            ("--control", "wrong-region"),
            "the control wrong-region has no effect on the task comprehension; omit it",
        ),
        ("refcoco-comprehension", ("--zoom", "auto"), "the zoom auto has no effect on the task comprehension"),
        (
            "refcoco-comprehension",
            ("generation.num_beams=2",),
            "the option generation.num_beams has no effect on the task comprehension",
        ),
        ("scene-questions", ("--caption-task", "detail"), "generates no captions; omit --caption-task"),
        ("refcocog-reg", ("--caption-all",), "refcocog-reg defines the regions to caption; omit --caption-all"),
        ("refcocog-reg", ("--split", "val"), "the protocol refcocog-reg defines its splits and prompts; omit --split"),
    ],
)
def test_evaluate_protocol_rejects_options_without_effect(get_sca_error, checkpoint, protocol, arguments, message):
    assert message in get_sca_error(2, "evaluate", checkpoint, protocol, "root=.", *arguments)


@pytest.mark.slow
def test_evaluate_with_proposer_computes_dense_captioning_map(run_sca, checkpoint):
    result = run_sca(
        *("evaluate", checkpoint, "scenes", "num_images=2", "--proposer", "grid", "proposer.points_per_side=2"),
        *("--metrics", "densecap-map", "tokenizer=plain", "--json"),
    )
    assert result.status == 0, result.err
    scores = json.loads(result.out)["scores"]
    assert scores["densecap-map/true-boxes"] > 0
    assert 0 <= scores["densecap-map/boxes"] <= 1


@pytest.fixture
def visual_genome_folder(working_folder):
    """One image in the publishers' layout."""
    from PIL import Image

    (working_folder / "vg/VG_100K").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(working_folder / "vg/VG_100K/7.jpg")
    image_data = [{"image_id": 7, "width": 64, "height": 48}]
    region = {"region_id": 3, "image_id": 7, "x": 4, "y": 4, "width": 20, "height": 20, "phrase": "a red car"}
    for name, content in (
        ("image_data.json", image_data),
        ("region_descriptions.json", [{"id": 7, "regions": [region]}]),
        ("densecap_splits.json", {"train": [], "val": [], "test": [7]}),
    ):
        (working_folder / "vg" / name).write_text(json.dumps(content))
    return working_folder / "vg"


@pytest.mark.slow
def test_evaluate_runs_published_protocol_by_name_and_shows_published_scores(
    run_sca, checkpoint, visual_genome_folder, working_folder
):
    result = run_sca("evaluate", checkpoint, "vg-region-captioning", f"root={visual_genome_folder}", "--out", "out")
    assert result.status == 0, result.err
    assert "SCA GPT2-large, pretrained, VG (published)" in result.out
    run_header = json.loads((working_folder / "out/visual-genome-test/predictions.jsonl").read_text().splitlines()[0])[
        "run"
    ]
    assert run_header["generation"]["num_beams"] == 3
    assert run_header["tasks"] == ["caption"]
    assert [line for line in result.err if "skipped the metrics" in line and "spice" in line and "--metrics" in line]
    split_result = run_sca(
        "evaluate", checkpoint, "vg-region-captioning", f"root={visual_genome_folder}", "--split", "val"
    )
    assert "defines its splits" in split_result.err[0]


def test_evaluate_reports_folder_searched_for_missing_images(run_sca, checkpoint, working_folder):
    record = {"image": "gone.png", "box": [0, 0, 4, 4], "caption": "a dog", "width": 8, "height": 8}
    (working_folder / "mine.jsonl").write_text(json.dumps(record))
    result = run_sca("evaluate", checkpoint, "jsonl", "file=mine.jsonl", f"image_root={working_folder}")
    expected_message = f"sca: jsonl val has no usable image: 1 image missing: gone.png (looked in {working_folder})"
    assert (result.status, result.err) == (2, [expected_message])


def test_evaluate_reports_dataset_fields_it_does_not_read(run_sca, checkpoint, working_folder, write_image):
    record = {"image": write_image("a.png"), "box": [0, 0, 4, 4], "name": "dog", "text": "a dog"}
    (working_folder / "mine.jsonl").write_text(json.dumps(record))
    result = run_sca("evaluate", checkpoint, "jsonl", "file=mine.jsonl", "--metrics", "class", "--quiet")
    assert (result.status, result.err) == (0, [])
    result = run_sca("evaluate", checkpoint, "jsonl", "file=mine.jsonl", "--metrics", "class")
    assert "0 with captions, 1 class name, 1 image; 1 caption under 'text', which is not read" in result.err[0]


@pytest.fixture
def predictions_folders(working_folder):
    """Two run folders with a predictions file each, without a model."""
    for name in ("one", "two", "lr=0.1"):
        (working_folder / name).mkdir()
        record = {"image_id": 1, "region_id": 2, "caption": "a red car", "references": ["the red car"]}
        (working_folder / name / "predictions.jsonl").write_text(json.dumps(record) + "\n")


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.slow
def test_compare_and_report_parse_metric_options_the_same_way(predictions_folders, run_sca, get_sca_error, command):
    arguments = (command, "one", "two", "--metrics", "rouge-l", "--out", "page.html")
    assert run_sca(*arguments, "tokenizer=plain", "rouge-l.references=first").status == 0
    assert "Did you mean 'tokenizer'?" in get_sca_error(2, *arguments, "tokenzier=plain")
    assert "unknown metric 'rogue-l'" in get_sca_error(2, *arguments, "rogue-l.references=first")
    assert run_sca(command, "one", "./lr=0.1", "--metrics", "rouge-l", "--out", "page.html").status == 0
    path_arguments = ("one", "lr=0.1") if command == "report" else ("one", "two", "lr=0.1")
    assert "write ./lr=0.1 for the path" in get_sca_error(2, command, *path_arguments, "--metrics", "rouge-l")
