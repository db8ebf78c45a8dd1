"""Evaluation of a model on a dataset, up to the report."""

import io
import json
import math
import random

import catalogue
import pytest
import sca_registry
import torch
from PIL import Image
from rich.console import Console
from sca_registry.contracts import Caption, MetricOutput
from sca_registry.spec import ZoomOptions

import sca
from sca.data.scenes import COLORS, SHAPE_NAMES, Scenes
from sca.evaluation.evaluate import evaluate, score_file
from sca.evaluation.predictions import PromptingOptions

SCENE_METRICS = ["attributes", "class", "mask-iou", "region-sensitivity", "relations"]


@pytest.fixture(scope="module")
def scenes():
    return Scenes("val", num_images=60)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sca.compose(
        {"name": "tiny-vit", "image_size": 64},
        {"name": "query", "num_queries": 4, "depth": 1, "num_heads": 4, "mlp_dim": 64, "mask_pooling": True},
        "tiny-gpt2",
        segmenter={"name": "sam", "num_heads": 4, "mlp_dim": 64, "box_masks": True},
        task_tokens=2,
    )


def select_float_scores(report):
    return {name: value for name, value in report.scores.items() if isinstance(value, float)}


@pytest.mark.slow
def test_evaluate_scores_oracle_captioner_with_one(scenes, make_oracle_captioner):
    report = evaluate(make_oracle_captioner(scenes), scenes, metrics=SCENE_METRICS)
    values = select_float_scores(report)
    stated_fraction = values.pop("relations/stated")
    assert set(values.values()) == {1.0}
    assert stated_fraction == pytest.approx(
        sum(len(region.phrases) > 1 for sample in scenes for region in sample.regions) / report.to_dict()["num_regions"]
    )
    assert report.skipped_metrics == {}
    assert report.summary["num_images"] == 60


@pytest.mark.slow
def test_evaluate_scores_random_captions_at_chance(scenes, make_oracle_captioner):
    rng = random.Random(0)
    all_regions = [region for sample in scenes for region in sample.regions]

    def describe_random_region(region, regions, task):
        other = rng.choice(all_regions)
        return other.phrases[-1] if task == "caption" else other.name

    values = select_float_scores(
        evaluate(make_oracle_captioner(scenes, describe_random_region), scenes, metrics=SCENE_METRICS)
    )
    assert values["attributes/color"] == pytest.approx(1 / len(COLORS), abs=0.1)
    assert values["attributes/shape"] == pytest.approx(1 / len(SHAPE_NAMES), abs=0.1)
    assert values["attributes/all"] < 0.05
    assert values["class/accuracy"] == pytest.approx(1 / len(SHAPE_NAMES), abs=0.1)
    assert values["relations/correct"] < 0.15
    assert 0.2 < values["region-sensitivity/caption"] < 0.5
    assert values["region-sensitivity/recognition"] < 0.3
    assert values["mask-iou/mean"] == 1  # these were not shuffled


def test_evaluate_region_sensitivity_is_at_most_half_for_image_level_captions(scenes, make_oracle_captioner):
    def describe_first_region(region, regions, task):
        return regions[0].phrases[0] if task == "caption" else regions[0].name

    values = select_float_scores(
        evaluate(make_oracle_captioner(scenes, describe_first_region), scenes, metrics=SCENE_METRICS)
    )
    assert values["region-sensitivity/caption"] <= 0.5
    assert values["region-sensitivity/recognition"] <= 0.5


def test_evaluate_region_sensitivity_is_zero_for_swapped_captions(make_oracle_captioner):
    samples_with_two_regions = [sample for sample in Scenes("val", num_images=60) if len(sample.regions) == 2]

    def describe_other_region(region, regions, task):
        other = regions[region.id == regions[0].id]
        return other.phrases[0] if task == "caption" else other.name

    values = select_float_scores(
        evaluate(
            make_oracle_captioner(samples_with_two_regions, describe_other_region),
            samples_with_two_regions,
            metrics=SCENE_METRICS,
        )
    )
    assert values["region-sensitivity/caption"] == values["region-sensitivity/recognition"] == 0


@pytest.mark.parametrize("prompt", ["box", "mask-point"])
@pytest.mark.slow
def test_evaluate_reports_scores_of_a_model(model, prompt):
    dataset = {"name": "scenes", "image_size": 64, "num_images": 6}
    report = evaluate(model, dataset, "test", prompting=PromptingOptions(prompt), batch_size=4, metrics=SCENE_METRICS)
    report_dict = report.to_dict()
    assert (report_dict["model"], report_dict["dataset"], report_dict["split"]) == (
        "tiny-vit+query+tiny-gpt2",
        "scenes",
        "test",
    )
    assert (report_dict["num_images"], report_dict["prompt_type"]) == (6, prompt)
    assert report_dict["num_regions"] == report.scores["mask-iou/regions"] == report.scores["attributes/captions"]
    assert all(0 <= value <= 1 or math.isnan(value) for value in select_float_scores(report).values())
    assert report.seconds > 0
    assert json.loads(json.dumps(report_dict, allow_nan=False)) == report_dict


def test_evaluate_is_deterministic(model, scenes):
    prompting = PromptingOptions("mask-point", seed=3)
    first, second = (
        evaluate(sca.Predictor(model), scenes, prompting=prompting, max_images=4, metrics=SCENE_METRICS).to_dict()
        for _ in "ab"
    )
    times = {"seconds": 0, "prediction_seconds": 0}
    assert first | times == second | times


def test_evaluate_skips_unavailable_metrics_unless_named(make_oracle_captioner):
    dataset = Scenes("val", num_images=2)
    prompting = PromptingOptions(tasks=["recognition"])
    report = evaluate(make_oracle_captioner(dataset), dataset, prompting=prompting)
    assert {"attributes", "relations", "cider-d"} <= set(report.skipped_metrics)
    assert "task=caption" in report.skipped_metrics["attributes"]
    assert "class/accuracy" in report.scores
    with pytest.raises(ValueError, match=r"'relations'.*task=caption"):
        evaluate(make_oracle_captioner(dataset), dataset, prompting=prompting, metrics=["class", "relations"])


def test_evaluate_computes_only_named_metrics(make_oracle_captioner):
    dataset = Scenes("val", num_images=2)
    report = evaluate(make_oracle_captioner(dataset), dataset, metrics=["class"])
    assert {name.split("/")[0] for name in report.scores} == {"class"}
    assert report.skipped_metrics == {}


def test_evaluate_rejects_wrong_metrics_and_options_before_captioning():
    class UnusedCaptioner:
        def caption(self, image, prompts, task="caption"):
            raise AssertionError("caption was called")

    dataset = Scenes("val", num_images=2)
    for arguments, message in (
        ({"metrics": ["clas"]}, "Did you mean 'class'"),
        ({"metrics": ["semantic"]}, "semantic.model=FOLDER"),
        ({"metric_options": {"reference": "all"}}, "Did you mean 'references'"),
        ({"metric_options": {"rogue-l.tokenizer": "plain"}}, "Did you mean 'rouge-l'"),
        (
            {"metrics": ["class"], "metric_options": {"rouge-l.tokenizer": "plain"}},
            "'rouge-l' is not among the metrics",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(UnusedCaptioner(), dataset, **arguments)


def test_evaluate_computes_registered_metrics(make_oracle_captioner, monkeypatch):
    class WordCount:
        required_fields = ("caption",)

        def __call__(self, records):
            return MetricOutput(
                {"words/mean": sum(len(record["caption"].split()) for record in records) / len(records)}
            )

    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the registration ends with the test
    sca_registry.metrics("words")(WordCount)
    dataset = Scenes("val", num_images=2)
    assert (
        evaluate(make_oracle_captioner(dataset), dataset, prompting=PromptingOptions(tasks=["recognition"])).scores[
            "words/mean"
        ]
        == 1
    )


def test_evaluate_rejects_empty_dataset(make_oracle_captioner):
    with pytest.raises(ValueError, match="no usable image"):
        evaluate(make_oracle_captioner([]), [])


@pytest.mark.slow
def test_report_table_counts_skipped_metrics_in_one_line(make_oracle_captioner):
    dataset = Scenes("val", num_images=2)
    report = evaluate(
        make_oracle_captioner(dataset, lambda region, *_: region.name),
        dataset,
        prompting=PromptingOptions(tasks=["caption"]),
    )
    console = Console(file=io.StringIO(), width=100)
    console.print(report.build_table())
    output = console.file.getvalue()
    assert all(name in output for name in report.scores)
    (line,) = [line for line in output.splitlines() if "metrics skipped" in line]
    assert f"{len(report.skipped_metrics)} metrics skipped" in line
    assert "--metrics" in line
    assert "nan" not in output


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"num_beans": 3}, "generation has no option 'num_beans'. Did you mean 'num_beams'"),
        ({"num_beams": "x"}, "generation.num_beams is 'x'; expected an integer"),
        ({"temperature": "hot"}, "generation.temperature is 'hot'; expected a number"),
    ],
)
def test_evaluate_rejects_wrong_generation_options(model, generation, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, {"name": "scenes", "num_images": 1}, prompting=PromptingOptions(generation=generation))


def test_prompting_options_reject_empty_tasks():
    with pytest.raises(ValueError, match="tasks is empty; choose one or more of"):
        PromptingOptions(tasks=())


def test_evaluate_rejects_metrics_unsupported_by_data_before_loading_model(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"image": "a.png", "box": [0, 0, 9, 9], "caption": "a dog", "width": 9, "height": 9}'
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    data = {"name": "jsonl", "file": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=r"metric 'class': needs task=recognition, truth\.name"):
        evaluate("no-such-model", data, metrics=["class"])
    message = r"no region of jsonl has ground truth for recognition \(phrases or judge questions for captions, a name"
    with pytest.raises(ValueError, match=message):
        evaluate("no-such-model", data, prompting=PromptingOptions(tasks=["recognition"]))


class LeftCaptioner:
    """Captioner whose captions all state that the region is on the left."""

    def caption(self, image, prompts, task="caption", **generation):
        mask = {"size": [9, 9], "counts": "a2"}
        return [
            Caption("a car on the left", 0.5, each.box, mask, 1.0, each, index) for index, each in enumerate(prompts)
        ]


def test_caption_all_captions_regions_without_phrases(tmp_path):
    lines = [{"box": [0, 0, 4, 4], "caption": "a dog"}, {"box": [5, 0, 9, 4], "name": "car"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"image": "a.png", "width": 9, "height": 9, **each}) + "\n" for each in lines))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    data, metrics = {"name": "jsonl", "file": str(file)}, ["positions"]
    assert evaluate(LeftCaptioner(), data, metrics=metrics).scores["positions/captions"] == 1
    prompting = PromptingOptions(tasks=("caption",), caption_all=True)
    report = evaluate(LeftCaptioner(), data, prompting=prompting, metrics=metrics, folder=tmp_path / "predictions")
    assert report.scores["positions/captions"] == 2
    assert report.scores["positions/correct"] == 0.5
    assert score_file(tmp_path / "predictions", metrics, dataset=data).scores == report.scores
    options = {"prompting": prompting, "metrics": ["cider-d"], "metric_options": {"tokenizer": "plain"}}
    assert evaluate(LeftCaptioner(), data, **options).to_dict()["num_regions"] == 2
    with pytest.raises(ValueError, match="caption_all has no effect on the task recognition; omit it"):
        PromptingOptions(tasks=("recognition",), caption_all=True)
    with pytest.raises(ValueError, match="caption_all refers to the regions of the dataset; omit it, or the proposer"):
        evaluate(LeftCaptioner(), data, prompting=prompting, proposer="grid")


@pytest.mark.slow
def test_evaluate_records_zoom_only_if_it_is_on(model):
    scenes = Scenes("val", num_images=2, image_size=512)
    runs = {
        zoom: evaluate(model, scenes, prompting=PromptingOptions(zoom=zoom), metrics=["mask-iou"])
        for zoom in ("off", "auto", 1000)
    }
    assert "zoom" not in runs["off"].run
    assert runs["auto"].run == runs["off"].run  # the model has no measured options
    assert runs["auto"].records == runs["off"].records
    assert runs[1000].run["zoom"] == vars(ZoomOptions(1000.0))
    assert runs[1000].records != runs["off"].records
    ids = {zoom: report.scoring.scores[0].protocol_id for zoom, report in runs.items()}
    assert ids["off"] == ids["auto"] != ids[1000]


@pytest.mark.slow
def test_evaluate_zooms_into_proposals(model):
    scenes = Scenes("val", num_images=1, image_size=512)
    grid = {"name": "grid", "points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    options = {"proposer": {key: grid[key] for key in ("name", "points_per_side")}, "metrics": ["densecap-map"]}
    runs = [evaluate(model, scenes, prompting=PromptingOptions(zoom=zoom), **options).run for zoom in ("off", 1000)]
    assert "zoom" not in runs[0]
    assert runs[1]["zoom"]["max_cells"] == 1000.0
