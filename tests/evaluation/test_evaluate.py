"""From a model and a dataset to a report."""

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
from sca_registry.contracts import MetricOutput

import sca
from sca.data.scenes import COLORS, SHAPE_NAMES, Scenes
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions

DRAWN = ["attributes", "class", "mask-iou", "region-sensitivity", "relations"]


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


def shares(report):
    return {name: value for name, value in report.scores.items() if isinstance(value, float)}


@pytest.mark.slow
def test_who_answers_from_the_truth_scores_one_everywhere(scenes, teller):
    report = evaluate(teller(scenes), scenes, metrics=DRAWN)
    values = shares(report)
    stated = values.pop("relations/stated")
    assert set(values.values()) == {1.0}
    assert stated == pytest.approx(
        sum(len(region.phrases) > 1 for sample in scenes for region in sample.regions) / report.to_dict()["regions"]
    )
    assert report.skipped_metrics == {}
    assert report.end["images"] == 60


@pytest.mark.slow
def test_who_answers_for_another_region_of_the_dataset_scores_about_chance(scenes, teller):
    draw = random.Random(0)
    everything = [region for sample in scenes for region in sample.regions]

    def shuffled(region, regions, task):
        other = draw.choice(everything)
        return other.phrases[-1] if task == "caption" else other.name

    values = shares(evaluate(teller(scenes, shuffled), scenes, metrics=DRAWN))
    assert values["attributes/color"] == pytest.approx(1 / len(COLORS), abs=0.1)
    assert values["attributes/shape"] == pytest.approx(1 / len(SHAPE_NAMES), abs=0.1)
    assert values["attributes/all"] < 0.05
    assert values["class/count"] == pytest.approx(1 / len(SHAPE_NAMES), abs=0.1)
    assert values["relations/right"] < 0.15
    assert 0.2 < values["region-sensitivity/caption"] < 0.5
    assert values["region-sensitivity/recognition"] < 0.3
    assert values["mask-iou/mean"] == 1  # it did not shuffle those


def test_who_says_the_same_of_every_region_of_an_image_is_found_out(scenes, teller):
    def blind(region, regions, task):
        return regions[0].phrases[0] if task == "caption" else regions[0].name

    values = shares(evaluate(teller(scenes, blind), scenes, metrics=DRAWN))
    assert values["region-sensitivity/caption"] <= 0.5
    assert values["region-sensitivity/recognition"] <= 0.5


def test_who_confuses_two_regions_of_an_image_follows_nothing(teller):
    pairs = [sample for sample in Scenes("val", num_images=60) if len(sample.regions) == 2]

    def swapped(region, regions, task):
        other = regions[region.id == regions[0].id]
        return other.phrases[0] if task == "caption" else other.name

    values = shares(evaluate(teller(pairs, swapped), pairs, metrics=DRAWN))
    assert values["region-sensitivity/caption"] == values["region-sensitivity/recognition"] == 0


@pytest.mark.parametrize("prompt", ["box", "mask-point"])
@pytest.mark.slow
def test_a_model_is_evaluated_from_pixels_to_report(model, prompt):
    dataset = {"name": "scenes", "image_size": 64, "num_images": 6}
    report = evaluate(model, dataset, "test", prompting=PromptingOptions(prompt), batch_size=4, metrics=DRAWN)
    plain = report.to_dict()
    assert (plain["model"], plain["dataset"], plain["split"]) == ("tiny-vit+query+tiny-gpt2", "scenes", "test")
    assert (plain["images"], plain["prompt"]) == (6, prompt)
    assert plain["regions"] == report.scores["mask-iou/regions"] == report.scores["attributes/captions"]
    assert all(0 <= value <= 1 or math.isnan(value) for value in shares(report).values())
    assert report.seconds > 0
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_the_same_evaluation_gives_the_same_scores(model, scenes):
    questions = PromptingOptions("mask-point", seed=3)
    first, second = (
        evaluate(sca.Predictor(model), scenes, prompting=questions, limit=4, metrics=DRAWN).to_dict() for _ in "ab"
    )
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_a_metric_that_cannot_be_computed_is_left_out_with_its_reason_and_refused_when_asked_for(teller):
    dataset = Scenes("val", num_images=2)
    names = PromptingOptions(tasks=["recognition"])
    report = evaluate(teller(dataset), dataset, prompting=names)
    assert {"attributes", "relations", "cider-d"} <= set(report.skipped_metrics)
    assert "task=caption" in report.skipped_metrics["attributes"]
    assert "class/count" in report.scores
    with pytest.raises(ValueError, match=r"'relations'.*task=caption"):
        evaluate(teller(dataset), dataset, prompting=names, metrics=["class", "relations"])


def test_only_the_metrics_that_were_named_are_computed(teller):
    dataset = Scenes("val", num_images=2)
    report = evaluate(teller(dataset), dataset, metrics=["class"])
    assert {name.split("/")[0] for name in report.scores} == {"class"}
    assert report.skipped_metrics == {}


def test_a_wrong_metric_or_option_is_refused_before_anything_is_asked():
    class Silent:
        def caption(self, image, prompts, task="caption"):
            raise AssertionError("it was asked")

    dataset = Scenes("val", num_images=2)
    for wrong, said in (
        ({"metrics": ["clas"]}, "Did you mean 'class'"),
        ({"metrics": ["semantic"]}, "semantic.model=FOLDER"),
        ({"metric_options": {"reference": "all"}}, "Did you mean 'references'"),
        ({"metric_options": {"rogue-l.tokenizer": "plain"}}, "Did you mean 'rouge-l'"),
        (
            {"metrics": ["class"], "metric_options": {"rouge-l.tokenizer": "plain"}},
            "'rouge-l' is not among the metrics",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(Silent(), dataset, **wrong)


def test_a_metric_that_somebody_registers_is_computed_with_the_others(teller, monkeypatch):
    class Words:
        required_fields = ("caption",)

        def __call__(self, records):
            return MetricOutput(
                {"words/mean": sum(len(record["caption"].split()) for record in records) / len(records)}
            )

    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.metrics("words")(Words)
    dataset = Scenes("val", num_images=2)
    assert (
        evaluate(teller(dataset), dataset, prompting=PromptingOptions(tasks=["recognition"])).scores["words/mean"] == 1
    )


def test_a_dataset_without_anything_to_ask_for_is_refused(teller):
    with pytest.raises(ValueError, match="no image that can be used"):
        evaluate(teller([]), [])


@pytest.mark.slow
def test_report_table_counts_metrics_left_out_in_one_line(teller):
    dataset = Scenes("val", num_images=2)
    report = evaluate(
        teller(dataset, lambda region, *_: region.name), dataset, prompting=PromptingOptions(tasks=["caption"])
    )
    screen = Console(file=io.StringIO(), width=100)
    screen.print(report.build_table())
    shown = screen.file.getvalue()
    assert all(name in shown for name in report.scores)
    (line,) = [line for line in shown.splitlines() if "left out" in line]
    assert f"{len(report.skipped_metrics)} metrics left out" in line
    assert "`sca list metrics`" in line
    assert "nan" not in shown


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"num_beans": 3}, "generation has no option 'num_beans'. Did you mean 'num_beams'"),
        ({"num_beams": "x"}, "generation.num_beams is 'x'; give an integer"),
        ({"temperature": "hot"}, "generation.temperature is 'hot'; give a number"),
    ],
)
def test_evaluate_rejects_unknown_generation_options_before_it_asks(model, generation, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, {"name": "scenes", "num_images": 1}, prompting=PromptingOptions(generation=generation))


def test_questions_reject_an_empty_list_of_tasks():
    with pytest.raises(ValueError, match="tasks are empty; give one or more of"):
        PromptingOptions(tasks=())


def test_evaluate_rejects_metrics_that_the_data_cannot_have_before_it_loads_a_model(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"image": "a.png", "box": [0, 0, 9, 9], "caption": "a dog", "width": 9, "height": 9}'
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    data = {"name": "jsonl", "file": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=r"metric 'class': needs task=recognition, truth\.name"):
        evaluate("no-such-model", data, metrics=["class"])
    with pytest.raises(ValueError, match="nothing to evaluate: no region of jsonl has what recognition asks for"):
        evaluate("no-such-model", data, prompting=PromptingOptions(tasks=["recognition"]))
