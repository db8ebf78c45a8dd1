"""Referring expression comprehension, and the metric `uniqueness`."""

import math
from dataclasses import replace

import numpy as np
import pytest
import sca_registry
from sca_registry import RegistryError
from sca_registry.contracts import Prompt, Proposals

import sca
from sca.data.export import export_dataset
from sca.data.referring_scenes import ReferringScenes
from sca.data.scenes import Scenes
from sca.evaluation.comprehension import ComprehensionOptions
from sca.evaluation.evaluate import evaluate, score_file
from sca.evaluation.predictions import PromptingOptions
from sca.evaluation.protocol import read_protocol, select_runs
from sca.inference.engine import Engine
from sca.io.errors import InputError

COMPREHENSION = PromptingOptions(tasks=("comprehension",))


@pytest.fixture(scope="module")
def engine():
    return Engine(sca.load("sca-tiny"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Generated scenes in the layout of the publishers of RefCOCO; images of val also have a test expression."""
    scenes = Scenes("val", num_images=6)
    return export_dataset(scenes, tmp_path_factory.mktemp("refcoco"), "refcoco")


@pytest.mark.slow
def test_comprehension_on_refcoco_files_finds_the_described_regions(engine, root, tmp_path):
    dataset = {"name": "refcoco", "root": str(root)}
    report = evaluate(engine, dataset, prompting=COMPREHENSION, metrics=["comprehension"], folder=tmp_path)
    num_expressions = sum(len(region.phrases) for sample in Scenes("val", num_images=6) for region in sample.regions)
    assert report.scores["comprehension/expressions"] == num_expressions
    assert report.scores["comprehension/accuracy"] > 0.95
    assert (report.run["tasks"], report.run["prompt_type"]) == (["comprehension"], "box")
    assert score_file(tmp_path).scores == report.scores
    record = report.records[0]
    assert [each["text"] for each in record["expressions"]] == record["truth"]["phrases"]


def test_comprehension_on_refcoco_files_compares_all_annotated_objects(engine, tmp_path):
    """The only expression of the image is true of another object, which no expression refers to."""
    sample = Scenes("val", num_images=1)[0]
    referent, described, *others = sample.regions
    unreferred = [replace(region, phrases=()) for region in (described, *others)]
    regions = (replace(referent, phrases=(described.phrases[-1],)), *unreferred)
    root = export_dataset({"val": [sample._replace(regions=regions)]}, tmp_path / "files", "refcoco")
    run, *_ = read_protocol("refcoco-comprehension").runs
    dataset = {"name": run.dataset, "root": str(root), **run.dataset_options}
    report = evaluate(engine, dataset, run.split, prompting=run.prompting, metrics=["comprehension"])
    assert report.scores == {"comprehension/accuracy": 0, "comprehension/expressions": 1}
    (record,) = report.records
    assert record["truth"]["box"] == list(referent.box)
    assert record["expressions"][0]["box"] == list(described.box)


@pytest.mark.slow
def test_comprehension_on_exported_files_equals_that_on_the_scenes(engine, tmp_path):
    scenes = ReferringScenes("val", num_images=6)
    (run, *_), (scenes_run, *_) = (
        read_protocol(name).runs for name in ("refcoco-comprehension", "referring-scenes-comprehension")
    )
    root = export_dataset(scenes, tmp_path / "files", "refcoco")
    files = {"name": run.dataset, "root": str(root), **run.dataset_options}
    reports = [
        evaluate(engine, dataset, run.split, prompting=scenes_run.prompting, metrics=["comprehension"])
        for dataset in (files, scenes)
    ]
    first, second = ([(record["region_id"], record["expressions"]) for record in report.records] for report in reports)
    assert [region_id for region_id, _ in first] == [region_id for region_id, _ in second]
    for (_, expressions), (_, expected) in zip(first, second, strict=True):
        assert [(each["text"], each["box"]) for each in expressions] == [
            (each["text"], each["box"]) for each in expected
        ]


class TwoBoxes:
    """Proposes the box of the first region, shifted a little, and one that overlaps no region by half."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, image, image_id):
        x1, y1, x2, y2 = next(s for s in Scenes("val", num_images=6) if s.image_id == image_id).regions[0].box
        shift = self.shift * (x2 - x1)
        boxes = ((x1 + shift, y1, x2 + shift, y2), (0, 0, 127, 127))
        return Proposals(tuple(Prompt(box=box) for box in boxes), (1.0, 1.0), (None, None))


def test_comprehension_among_proposals_requires_an_iou_of_half(engine):
    samples = [(0, Scenes("val", num_images=6)[0])]
    metric = sca_registry.metrics.build("comprehension")
    for shift, is_correct in ((0.1, True), (0.5, False)):
        first, *_ = ComprehensionOptions(TwoBoxes(shift)).predict_records(engine, samples)
        accuracy = metric([first]).values["comprehension/accuracy"]
        assert (accuracy > 0.5) is is_correct


def test_comprehension_without_proposals_counts_as_wrong(engine):
    samples = [(0, Scenes("val", num_images=1)[0])]
    records = ComprehensionOptions(lambda *_: Proposals((), (), ())).predict_records(engine, samples)
    assert records[0]["expressions"][0]["box"] is None
    assert sca_registry.metrics.build("comprehension")(records).values["comprehension/accuracy"] == 0


def test_comprehension_encodes_a_batch_once_and_predicts_no_masks(engine, monkeypatch):
    samples = list(enumerate(Scenes("val", num_images=3)))
    expected = [record for each in samples for record in ComprehensionOptions().predict_records(engine, [each])]
    batch_sizes, encode = [], engine.encode
    monkeypatch.setattr(engine, "encode", lambda images: batch_sizes.append(len(images)) or encode(images))
    monkeypatch.setattr(engine, "predict_best_masks", lambda *_: pytest.fail("predicted masks"))
    records = ComprehensionOptions().predict_records(engine, samples)
    assert batch_sizes == [3]
    assert [each["region_id"] for each in records] == [each["region_id"] for each in expected]
    boxes = [[each["box"] for each in record["expressions"]] for record in records]
    assert boxes == [[each["box"] for each in record["expressions"]] for record in expected]


def test_comprehension_names_an_expression_that_is_too_long(engine, monkeypatch):
    sample = Scenes("val", num_images=1)[0]
    region = replace(sample.regions[0], phrases=("a star " * 60,))
    monkeypatch.setattr(engine, "encode", lambda _: pytest.fail("encoded an image"))
    with pytest.raises(InputError, match=rf"region {region.id} of image {sample.image_id}: the text has 120 tokens"):
        ComprehensionOptions().predict_records(engine, [(0, sample._replace(regions=(region,)))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": ("wrong-region",)}, "the control wrong-region has no effect on the task comprehension; omit it"),
        ({"generation": {"num_beams": 2}}, "the option generation.num_beams has no effect on the task comprehension"),
        ({"zoom": "auto"}, "the zoom auto has no effect on the task comprehension"),
        ({"prompt_type": "center"}, "the prompt type center has no effect on the task comprehension"),
    ],
)
def test_prompting_options_reject_what_has_no_effect_on_comprehension(options, message):
    with pytest.raises(ValueError, match=message):
        PromptingOptions(tasks=("comprehension",), **options)


def test_comprehension_metric_includes_an_iou_of_exactly_half():
    def make_record(box):
        expression = {"text": "a", "box": box, "score": 1.0}
        truth = {"box": [0, 0, 10, 10]}
        fields = {"image_id": 0, "region_id": 0, "task": "comprehension"}
        return {**fields, "expressions": [expression], "truth": truth}

    records = [make_record([0, 0, 10, 5]), make_record([0, 0, 10, 4.9])]
    output = sca_registry.metrics.build("comprehension")(records)
    assert output.per_record["comprehension/accuracy"].tolist() == [1, 0]


def test_comprehension_rejects_a_captioner_without_language_model(make_oracle_captioner):
    scenes = Scenes("val", num_images=1)
    with pytest.raises(ValueError, match="'OracleCaptioner' cannot score a text; use a model with a language model"):
        evaluate(make_oracle_captioner(scenes), scenes, prompting=COMPREHENSION)
    with pytest.raises(ValueError, match="comprehension"):
        PromptingOptions(tasks=("comprehension", "caption"))


def test_protocol_runs_can_be_selected():
    protocol = read_protocol("refcoco-comprehension")
    assert [run.name for run in select_runs(protocol, ["refcocog-val"]).runs] == ["refcocog-val"]
    assert select_runs(protocol, None) == protocol
    with pytest.raises(RegistryError, match=r"refcoco-comprehension: unknown run 'refcocog-tes'. Did you mean"):
        select_runs(protocol, ["refcocog-tes"])


def make_caption_records(sample, captions):
    return [
        {
            "index": 0,
            "image_id": sample.image_id,
            "region_id": region.id,
            "task": "caption",
            "caption": caption,
            "truth": {"box": list(region.box)},
        }
        for region, caption in zip(sample.regions, captions, strict=True)
    ]


def test_uniqueness_accepts_a_caption_of_its_own_region_only():
    sample = next(
        s for s in Scenes("val", num_images=50) if len({r.phrases[0] for r in s.regions}) == len(s.regions) == 4
    )
    descriptions = [region.phrases[0] for region in sample.regions]
    metric = sca_registry.metrics.build("uniqueness", model="sca-tiny")
    captions = [descriptions[0], descriptions[0], "", descriptions[3]]
    output = metric(make_caption_records(sample, captions), lambda record: sample.image)
    assert output.per_record["uniqueness"].tolist() == [1, 0, 0, 1]
    assert output.values == {"uniqueness": 0.5, "uniqueness/chance": 0.25, "uniqueness/regions": 4}


def test_uniqueness_does_not_judge_single_regions_and_ties_are_wrong():
    sample = Scenes("val", num_images=1)[0]
    metric = sca_registry.metrics.build("uniqueness", model="sca-tiny")
    (record, *_) = make_caption_records(sample, ["a"] * len(sample.regions))
    output = metric([record], lambda record: sample.image)
    assert math.isnan(output.values["uniqueness"])
    assert output.values["uniqueness/regions"] == 0
    assert "no image has several regions" in output.notes["uniqueness"]
    output = metric([record, {**record, "region_id": -1}], lambda record: sample.image)
    assert np.array_equal(output.per_record["uniqueness"], [0, 0])


def test_uniqueness_names_a_caption_that_is_too_long():
    sample = Scenes("val", num_images=1)[0]
    metric = sca_registry.metrics.build("uniqueness", model="sca-tiny")
    records = make_caption_records(sample, ["a", "a star " * 60, *[""] * (len(sample.regions) - 2)])
    message = r"region .* of image .*: the text has 120 tokens, but the model reads at most 91; shorten it, or use anot"
    with pytest.raises(InputError, match=message):
        metric(records, lambda record: pytest.fail("read an image"))


def test_uniqueness_requires_a_model_that_scores_text():
    with pytest.raises(RegistryError, match=r"needs a model that scores captions; set uniqueness\.model=NAME"):
        sca_registry.metrics.build("uniqueness")
    with pytest.raises(RegistryError, match="cannot score a text; use a model with a language model"):
        sca_registry.metrics.build("uniqueness", model="sca-tiny+none")


@pytest.mark.slow
def test_evaluate_computes_uniqueness_of_the_model(engine):
    options = {"uniqueness.model": "sca-tiny"}
    dataset = {"name": "scenes", "num_images": 4}
    report = evaluate(engine, dataset, metrics=["uniqueness"], metric_options=options)
    assert report.scores["uniqueness"] > 0.9
