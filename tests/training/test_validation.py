"""Validation during training keeps the best model; trainable groups and learning rates are set per component."""

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
def make_recipe(small_model_table):
    def make(validate=None, loss=None, **options):
        table = {
            "model": small_model_table,
            "data": {"scenes": {"name": "scenes", "num_images": 6, "image_size": 64}},
            "train": {"steps": 4, "batch_size": 2, "warmup_steps": 1, "save_steps": 2, **options},
            "loss": loss or {},
        }
        return Recipe.from_dict("validated", table | ({} if validate is None else {"validate": validate}))

    return make


def read_validation_scores(folder):
    (checkpoint,) = folder.glob("checkpoint-*")
    lines = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line["validation_cider-d"] for line in lines if "validation_cider-d" in line}


@pytest.mark.slow
def test_train_keeps_best_validated_model(make_recipe, tmp_path):
    model = train(make_recipe({"eval_steps": 2, "max_images": 3}, learning_rate=0.02), tmp_path, quiet=True)
    cider_d_scores = read_validation_scores(tmp_path)
    assert cider_d_scores.keys() == {2, 4}
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {
        "step": max(cider_d_scores, key=cider_d_scores.get),
        "metric": "cider-d",
        "score": max(cider_d_scores.values()),
    }
    predictions = read_predictions(tmp_path / f"validation/step-{best['step']}/predictions.jsonl")
    assert predictions.run["split"] == "val"
    assert len({record["image_id"] for record in predictions.records}) == 3
    assert predictions.run["weights_hash"] == hash_weights(load(tmp_path / "best"))
    assert model.training is False


@pytest.mark.slow
def test_train_opens_validation_dataset_once(make_recipe, tmp_path, monkeypatch):
    opened_options = []
    monkeypatch.setattr(
        "sca.training.train.open_validation_dataset",
        lambda options: opened_options.append(options) or open_validation_dataset(options),
    )
    recipe = make_recipe({"eval_steps": 4, "max_images": 1})
    train(recipe, tmp_path, quiet=True)
    assert opened_options == [recipe.validate]


@pytest.mark.slow
def test_validation_does_not_change_trained_weights(make_recipe, tmp_path):
    unvalidated = train(make_recipe(), tmp_path / "one", quiet=True).state_dict()
    validated = train(make_recipe({"eval_steps": 1, "max_images": 2}), tmp_path / "two", quiet=True).state_dict()
    assert all(torch.equal(unvalidated[name], validated[name]) for name in unvalidated)


@pytest.mark.slow
def test_train_reports_validation_without_images(make_recipe, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"image": "a.png", "box": [0, 0, 9, 9], "caption": "a dog"}\n')
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    recipe = make_recipe(
        {"eval_steps": 1, "dataset": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl"), "val_fraction": 0.01}}
    )
    messages = []
    train(recipe, tmp_path / "run", quiet=True, report=messages.append)
    assert messages == [
        "validate (val): no validation, because the dataset is empty; 0 regions, 0 with captions, 0 class names, "
        "0 images; 0 of 1 images held out for validation"
    ]
    assert not (tmp_path / "run/best").exists()


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"split": "test"}, "a test split must not select the model"),
        ({"evl_steps": 3}, "unknown key 'evl_steps' in .*. Did you mean 'eval_steps'"),
        ({"eval_steps": 0}, "expected an integer of at least 1"),
        ({"metrics": "bleu"}, "expected a list"),
        ({"dataset": {"name": 3}}, "dataset of validate"),
    ],
)
def test_recipe_rejects_wrong_validate_table(make_recipe, validate, message):
    with pytest.raises(RegistryError, match=message):
        make_recipe(validate)


def test_train_rejects_best_score_that_is_not_computed(make_recipe, tmp_path):
    with pytest.raises(
        RegistryError,
        match=r"is \['spice'\], and none of these scores can be computed \(spice: .*\); choose another",
    ):
        train(make_recipe({"eval_steps": 1, "max_images": 2, "metric_for_best_model": ["spice"]}), tmp_path, quiet=True)


def write_captioned_dataset(folder, **fields):
    """Build a dataset of one image with a caption for its only region."""
    line = {"image": "a.png", "box": [0, 0, 9, 9], "width": 64, "height": 64, "caption": "a dog", **fields}
    (folder / "mine.jsonl").write_text(json.dumps(line))
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return {"dataset": {"name": "jsonl", "file": str(folder / "mine.jsonl")}}


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"metric_for_best_model": ["foo"]}, r"validate\.metric_for_best_model: no metric has a score 'foo'\."),
        ({"metric_for_best_model": ["cidr-d"]}, r"no metric has a score 'cidr-d'\. Did you mean 'cider-d'"),
        (
            {"metric_for_best_model": ["class/accuracy"]},
            r"class: needs task=recognition, truth\.name, missing in each of 1 records",
        ),
        ({"metrics": ["rouge-l"]}, r"cider-d: not in validate\.metrics; class: not in"),
        ({"metrics": ["class"]}, r"metric 'class': needs task=recognition, truth\.name, .*; choose other metrics"),
        ({"metrics": ["mask-iou"]}, r"metric 'mask-iou': needs truth\.mask, missing in each of 1 records"),
    ],
)
def test_open_validation_dataset_checks_metrics_and_best_against_data(make_recipe, tmp_path, validate, message):
    with pytest.raises(ValueError, match=message):
        open_validation_dataset(make_recipe({**write_captioned_dataset(tmp_path), **validate}).validate)


def test_open_validation_dataset_rejects_data_without_captions_and_names(make_recipe, monkeypatch):
    class UnlabeledDataset:
        metadata = {"regions": 1, "captioned_regions": 0, "class_names": []}  # noqa: RUF012

        def __len__(self):
            return 1

        def iter_annotations(self):
            return iter([(Region(0, (0.0, 0.0, 9.0, 9.0)),)])

    monkeypatch.setattr("sca.training.datasets.datasets", SimpleNamespace(build=lambda *_, **__: UnlabeledDataset()))
    with pytest.raises(ValueError, match=r"no region of validate \(val\) has ground truth"):
        open_validation_dataset(make_recipe({}).validate)


def test_open_validation_dataset_accepts_best_with_later_available_score(make_recipe, tmp_path):
    assert (
        len(
            open_validation_dataset(
                make_recipe(
                    {**write_captioned_dataset(tmp_path), "metric_for_best_model": ["class/accuracy", "rouge-l"]}
                ).validate
            )
        )
        == 1
    )


def test_recipe_rejects_empty_validate_best(make_recipe):
    with pytest.raises(RegistryError, match=r"validate\.metric_for_best_model is \[\]; expected a list of 1 or more"):
        make_recipe({"metric_for_best_model": []})


@pytest.mark.slow
def test_lr_multipliers_set_learning_rate_of_parts(make_recipe, tmp_path):
    initial_state = train(make_recipe(steps=1, learning_rate=1e-30), tmp_path / "start", quiet=True).state_dict()
    model = train(
        make_recipe(steps=3, lr_multipliers={"language_model": 0.0, "mixer": 1.0}), tmp_path / "run", quiet=True
    )
    largest_changes = {name: (tensor - initial_state[name]).abs().max() for name, tensor in model.state_dict().items()}
    changed_parts = {name.split(".")[0] for name, change in largest_changes.items() if change > 1e-20}
    assert "mixer" in changed_parts
    assert "language_model" not in changed_parts


def test_train_rejects_lr_multiplier_of_unknown_part(make_recipe, tmp_path):
    with pytest.raises(RegistryError, match=r"train\.lr_multipliers: no trainable group 'mixr'\. Did you mean 'mixer'"):
        train(make_recipe(lr_multipliers={"mixr": 2.0}), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("report_to", "message"), [("tensorbord", "Did you mean 'tensorboard'"), ("comet_ml", "pip install comet_ml")]
)
def test_train_rejects_unavailable_reporter(make_recipe, tmp_path, report_to, message):
    with pytest.raises(RegistryError, match=message):
        train(make_recipe(report_to=report_to), tmp_path, quiet=True)


@pytest.mark.slow
def test_train_writes_tensorboard_scalars(make_recipe, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard"
    )
    train(make_recipe(), tmp_path, quiet=True)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    scalar_tags = event_accumulator.EventAccumulator(str(file.parent)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/caption", "train/learning_rate"} <= set(scalar_tags)


@pytest.mark.slow
def test_validation_reports_nan_best_score_and_uses_the_next(make_recipe, tmp_path):
    messages = []
    data = {"name": "scenes", "num_images": 1, "image_size": 64}
    recipe = make_recipe(
        {
            "eval_steps": 2,
            "max_images": 1,
            "dataset": data,
            "metric_for_best_model": ["densecap-map", "cider-d", "rouge-l"],
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sca.evaluation.metrics.cider.CiderD.__call__", return_nan_score)
        train(recipe, tmp_path, quiet=True, report=messages.append)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == "rouge-l"
    assert (
        messages[0] == "validate.metric_for_best_model: cider-d is NaN or infinite on this data; rouge-l selects `best`"
    )


def return_nan_score(metric, records):
    return MetricOutput({"cider-d": math.nan}, notes={"cider-d": "no number"})


@pytest.mark.slow
def test_validation_reports_best_score_that_never_changes(make_recipe, tmp_path):
    messages = []
    recipe = make_recipe({"eval_steps": 2, "max_images": 2, "metric_for_best_model": ["rouge-l"]}, learning_rate=0.0)
    train(recipe, tmp_path, quiet=True, report=messages.append)
    (line,) = messages
    assert line.startswith("validate.metric_for_best_model: rouge-l was ")
    assert "in all 2 validations, so `best` is the first model" in line


def test_validation_callback_prefers_earlier_names_of_best():
    callback = ValidationCallback.__new__(ValidationCallback)
    callback.options = ValidationOptions(metric_for_best_model=("a", "b"))
    for previous_best, metric, score, is_better in (
        (None, "b", 0.0, True),
        ({"metric": "b", "score": 0.5}, "b", 0.4, False),
        ({"metric": "b", "score": 0.5}, "b", 0.6, True),
        ({"metric": "b", "score": 0.5}, "a", 0.1, True),
        ({"metric": "a", "score": 0.1}, "b", 0.9, False),
    ):
        assert callback._is_best(metric, score, previous_best) is is_better


@pytest.mark.slow
def test_train_reports_datasets_before_training(make_recipe, tmp_path):
    messages = []
    recipe = make_recipe({"eval_steps": 4, "max_images": 1})
    train(recipe, tmp_path, report=messages.append)
    assert messages[:2] == ["data.scenes (train): 6 images", "validate (val): 6 images"]


@pytest.mark.slow
def test_train_reports_damaged_images(make_recipe, tmp_path, small_model_table):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    lines = [
        {"image": f"{name}.png", "box": [0, 0, 9, 9], "caption": "a dog", "width": 64, "height": 64} for name in "ab"
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.png").write_bytes(b"damaged")
    data = {"own": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl")}}
    recipe = Recipe.from_dict(
        "mine", {"model": small_model_table, "data": data, "train": {"steps": 2, "batch_size": 2}}
    )
    messages = []
    train(recipe, tmp_path / "run", report=messages.append)
    summary = "data.own (train): 2 regions, 2 with captions, 0 class names, 2 images"
    assert messages[0] == summary
    assert messages[-1].startswith(f"{summary}; 1 image unreadable: b.png")
