"""While it trains, a model is evaluated, and the best is kept; what is learned and how fast can be chosen by part."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sca_registry import RegistryError
from sca_registry.contracts import MetricOutput, Region

from sca.checkpoints.load import load
from sca.checkpoints.tensors import hash_weights
from sca.evaluation.predictions_file import read_predictions
from sca.training.datasets import open_validation_dataset
from sca.training.recipe import Recipe, ValidationOptions
from sca.training.train import train
from sca.training.validation import ValidationCallback


@pytest.fixture
def plan(small_table):
    def make(validate=None, loss=None, **options):
        table = {
            "model": small_table,
            "data": {"scenes": {"name": "scenes", "num_images": 6, "image_size": 64}},
            "train": {"steps": 4, "batch_size": 2, "warmup_steps": 1, "save_steps": 2, **options},
            "loss": loss or {},
        }
        return Recipe.from_dict("validated", table | ({} if validate is None else {"validate": validate}))

    return make


def scores(folder):
    (last,) = folder.glob("checkpoint-*")
    lines = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line["validation_cider-d"] for line in lines if "validation_cider-d" in line}


@pytest.mark.slow
def test_the_best_of_the_validated_models_is_kept(plan, tmp_path):
    model = train(plan({"every": 2, "limit": 3}, learning_rate=0.02), tmp_path, quiet=True)
    found = scores(tmp_path)
    assert found.keys() == {2, 4}
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": max(found, key=found.get), "metric": "cider-d", "score": max(found.values())}
    asked = read_predictions(tmp_path / f"validation/step-{best['step']}/predictions.jsonl")
    assert asked.run["split"] == "val"
    assert len({record["image_id"] for record in asked.records}) == 3
    assert asked.run["weights"] == hash_weights(load(tmp_path / "best"))
    assert model.training is False


@pytest.mark.slow
def test_train_opens_the_dataset_of_validate_once(plan, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "sca.training.train.open_validation_dataset", lambda each: opened.append(each) or open_validation_dataset(each)
    )
    recipe = plan({"every": 4, "limit": 1})
    train(recipe, tmp_path, quiet=True)
    assert opened == [recipe.validate]


@pytest.mark.slow
def test_validating_changes_nothing_of_what_is_learned(plan, tmp_path):
    straight = train(plan(), tmp_path / "one", quiet=True).state_dict()
    watched = train(plan({"every": 1, "limit": 2}), tmp_path / "two", quiet=True).state_dict()
    assert all(torch.equal(straight[name], watched[name]) for name in straight)


@pytest.mark.slow
def test_train_reports_a_validation_without_images(plan, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"image": "a.png", "box": [0, 0, 9, 9], "caption": "a dog"}\n')
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    recipe = plan({"every": 1, "dataset": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl"), "hold_out": 0.01}})
    told = []
    train(recipe, tmp_path / "run", quiet=True, report=told.append)
    assert told == [
        "validate (val): nothing is validated; 0 regions, 0 with captions, 0 class names, 0 images; "
        "0 of 1 images held out for validation"
    ]
    assert not (tmp_path / "run/best").exists()


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"split": "test"}, "what is tested must not choose"),
        ({"evry": 3}, "has no 'evry'. Did you mean 'every'"),
        ({"every": 0}, "give an integer of at least 1"),
        ({"metrics": "bleu"}, "give a list"),
        ({"dataset": {"name": 3}}, "dataset of validate"),
    ],
)
def test_a_wrong_validation_is_refused(plan, validate, message):
    with pytest.raises(RegistryError, match=message):
        plan(validate)


def test_a_best_score_that_is_not_scored_is_refused(plan, tmp_path):
    with pytest.raises(
        RegistryError,
        match=r"validate\.best is \['spice'\], and none of these scores is computed \(spice: .*\); name",
    ):
        train(plan({"every": 1, "limit": 2, "best": ["spice"]}), tmp_path, quiet=True)


def captioned(folder, **fields):
    """The [validate] table of one image with a caption for its only region."""
    line = {"image": "a.png", "box": [0, 0, 9, 9], "width": 64, "height": 64, "caption": "a dog", **fields}
    (folder / "mine.jsonl").write_text(json.dumps(line))
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return {"dataset": {"name": "jsonl", "file": str(folder / "mine.jsonl")}}


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"best": ["foo"]}, r"validate\.best: no metric has a score 'foo'\."),
        ({"best": ["cidr-d"]}, r"no metric has a score 'cidr-d'\. Did you mean 'cider-d'"),
        ({"best": ["class/count"]}, r"class: needs task=recognition, truth\.name, which none of the 1 records has"),
        ({"metrics": ["rouge-l"]}, r"cider-d: it is not among validate\.metrics; class: it is not among"),
        ({"metrics": ["class"]}, r"metric 'class': needs task=recognition, truth\.name, .*; choose other metrics"),
        ({"metrics": ["mask-iou"]}, r"metric 'mask-iou': needs truth\.mask, which none of the 1 records has"),
    ],
)
def test_validation_checks_metrics_and_best_against_the_data(plan, tmp_path, validate, message):
    with pytest.raises(ValueError, match=message):
        open_validation_dataset(plan({**captioned(tmp_path), **validate}).validate)


def test_validation_rejects_data_without_captions_and_names(plan, monkeypatch):
    class Wordless:
        metadata = {"regions": 1, "captioned": 0, "names": []}  # noqa: RUF012

        def __len__(self):
            return 1

        def iter_annotations(self):
            return iter([(Region(0, (0.0, 0.0, 9.0, 9.0)),)])

    monkeypatch.setattr("sca.training.datasets.datasets", SimpleNamespace(build=lambda *_, **__: Wordless()))
    with pytest.raises(ValueError, match=r"nothing to evaluate: no region of validate \(val\) has what"):
        open_validation_dataset(plan({}).validate)


def test_validation_accepts_a_score_that_a_later_name_of_best_replaces(plan, tmp_path):
    assert len(open_validation_dataset(plan({**captioned(tmp_path), "best": ["class/count", "rouge-l"]}).validate)) == 1


def test_validation_rejects_an_empty_best(plan):
    with pytest.raises(RegistryError, match=r"validate\.best is \[\]; give a list of 1 or more"):
        plan({"best": []})


@pytest.mark.slow
def test_a_part_learns_at_its_own_rate(plan, tmp_path):
    start = train(plan(steps=1, learning_rate=1e-30), tmp_path / "start", quiet=True).state_dict()
    model = train(plan(steps=3, lr_multipliers={"language_model": 0.0, "mixer": 1.0}), tmp_path / "run", quiet=True)
    changes = {name: (tensor - start[name]).abs().max() for name, tensor in model.state_dict().items()}
    moved = {name.split(".")[0] for name, change in changes.items() if change > 1e-20}
    assert "mixer" in moved
    assert "language_model" not in moved


def test_a_rate_for_what_does_not_train_is_refused(plan, tmp_path):
    with pytest.raises(
        RegistryError, match=r"train\.lr_multipliers\.mixr is for nothing that trains\. Did you mean 'mixer'"
    ):
        train(plan(lr_multipliers={"mixr": 2.0}), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("names", "message"), [("tensorbord", "Did you mean 'tensorboard'"), ("comet_ml", "pip install comet_ml")]
)
def test_a_reporter_that_is_not_there_is_refused(plan, tmp_path, names, message):
    with pytest.raises(RegistryError, match=message):
        train(plan(report_to=names), tmp_path, quiet=True)


@pytest.mark.slow
def test_curves_are_written_for_tensorboard_where_it_is_installed(plan, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    train(plan(), tmp_path, quiet=True)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file.parent)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/caption", "train/learning_rate"} <= set(found)


@pytest.mark.slow
def test_validating_reports_a_score_that_is_not_a_number(plan, tmp_path):
    told = []
    data = {"name": "scenes", "num_images": 1, "image_size": 64}
    recipe = plan({"every": 2, "limit": 1, "dataset": data, "best": ["densecap-map", "cider-d", "rouge-l"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sca.evaluation.metrics.cider.CiderD.__call__", undefined)
        train(recipe, tmp_path, quiet=True, report=told.append)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == "rouge-l"
    assert told[0] == "validate.best: cider-d is not a number on this data; rouge-l chooses `best`"


def undefined(metric, records):
    return MetricOutput({"cider-d": math.nan}, notes={"cider-d": "no number"})


@pytest.mark.slow
def test_validating_reports_a_score_that_never_changes(plan, tmp_path):
    told = []
    recipe = plan({"every": 2, "limit": 2, "best": ["rouge-l"]}, learning_rate=0.0)
    train(recipe, tmp_path, quiet=True, report=told.append)
    (line,) = told
    assert line.startswith("validate.best: rouge-l was ")
    assert "at all 2 validations, so `best` is the first of them" in line


def test_validating_prefers_the_earlier_names_of_best():
    kept = ValidationCallback.__new__(ValidationCallback)
    kept.options = ValidationOptions(best=("a", "b"))
    for before, metric, score, better in (
        (None, "b", 0.0, True),
        ({"metric": "b", "score": 0.5}, "b", 0.4, False),
        ({"metric": "b", "score": 0.5}, "b", 0.6, True),
        ({"metric": "b", "score": 0.5}, "a", 0.1, True),
        ({"metric": "a", "score": 0.1}, "b", 0.9, False),
    ):
        assert kept._is_best(metric, score, before) is better


@pytest.mark.slow
def test_train_reports_each_dataset_first(plan, tmp_path):
    told = []
    recipe = plan({"every": 4, "limit": 1})
    train(recipe, tmp_path, report=told.append)
    assert told[:2] == ["data.scenes (train): 6 images", "validate (val): 6 images"]


@pytest.mark.slow
def test_train_reports_images_that_it_finds_damaged(plan, tmp_path, small_table):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    lines = [
        {"image": f"{name}.png", "box": [0, 0, 9, 9], "caption": "a dog", "width": 64, "height": 64} for name in "ab"
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.png").write_bytes(b"damaged")
    data = {"own": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl")}}
    recipe = Recipe.from_dict("mine", {"model": small_table, "data": data, "train": {"steps": 2, "batch_size": 2}})
    told = []
    train(recipe, tmp_path / "run", report=told.append)
    summary = "data.own (train): 2 regions, 2 with captions, 0 class names, 2 images"
    assert told[0] == summary
    assert told[-1].startswith(f"{summary}; 1 image unreadable: b.png")
