"""`sca show model` reads the facts of a checkpoint or of a training run from its folder."""

import json
import re
import shutil

import pytest

from sca.training.recipe import Recipe
from sca.training.train import train


@pytest.fixture(scope="module")
def training_run_folder(tmp_path_factory):
    """The folder of a training run with two steps."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    model_and_data = {"model": "sca-tiny", "data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}}
    train_options = {"steps": 2, "batch_size": 1, "warmup_steps": 0, "save_steps": 2, "learning_rate": 1e-5}
    train(Recipe.from_dict("mine", model_and_data | {"train": train_options}), folder, quiet=True)
    (folder / "best.json").write_text(json.dumps({"step": 2, "metric": "cider-d", "score": 0.5}))
    return folder


def parse_facts(result):
    assert result.status == 0, result.err
    return dict(line.split(":", 1) for line in result.out.splitlines())


def strip_facts(result):
    return {name: value.strip() for name, value in parse_facts(result).items()}


COMPARED_FIELDS = ("encoder", "segmenter", "mixer", "language model", "trainable", "parameters")


@pytest.mark.slow
def test_show_model_prints_same_components_for_name_and_folder(run_sca, training_run_folder):
    facts_of_name = strip_facts(run_sca("show", "model", "sca-tiny"))
    assert facts_of_name["encoder"].startswith("tiny-vit(")
    for folder in (training_run_folder, training_run_folder / "model"):
        facts_of_folder = strip_facts(run_sca("show", "model", folder))
        for part in COMPARED_FIELDS:  # a folder has the options that were defaults, too
            (name, *options), (folder_part_name, *folder_options) = (
                re.split(r"[(),] ?", each[part]) for each in (facts_of_name, facts_of_folder)
            )
            assert folder_part_name == name
            assert set(options) <= set(folder_options)


def test_show_model_prints_training_details_of_run_folder(run_sca, training_run_folder):
    facts_of_run = strip_facts(run_sca("show", "model", training_run_folder))
    assert facts_of_run["trained by"].startswith("sca train, finished, in ")
    assert (facts_of_run["trained from"], facts_of_run["trained on"]) == ("sca-tiny", "scenes")
    assert "steps=2" in facts_of_run["training"]
    assert facts_of_run["best score"] == "cider-d 50.0 at step 2"


def test_show_model_prints_no_training_details_of_copied_checkpoint(run_sca, training_run_folder):
    assert "trained by" in strip_facts(run_sca("show", "model", training_run_folder / "model"))
    copied_checkpoint = shutil.copytree(training_run_folder / "model", training_run_folder / "other")
    assert "trained by" not in strip_facts(run_sca("show", "model", copied_checkpoint))


def test_show_model_names_the_model_type_of_a_folder_in_another_format(get_sca_error, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "sam9"}')
    error = get_sca_error(2, "show", "model", tmp_path)
    assert "has the model type 'sam9', which is not a promptable segmenter; pass one of the types sam, " in error
    (tmp_path / "config.json").write_text("{}")
    assert "has no spec.json; pass a folder written by `sca train`" in get_sca_error(2, "show", "model", tmp_path)


def test_show_model_rejects_folders_without_readable_model(get_sca_error, training_run_folder, tmp_path):
    assert "has no checkpoint; expected spec.json" in get_sca_error(2, "show", "model", tmp_path)
    assert "Did you mean 'sca-tiny'?" in get_sca_error(2, "show", "model", "sca-tniy")
    unfinished_run = tmp_path / "begun"
    shutil.copytree(training_run_folder, unfinished_run, ignore=shutil.ignore_patterns("model", "checkpoint-*"))
    assert "without a model yet" in get_sca_error(2, "show", "model", unfinished_run)
    damaged_run = shutil.copytree(training_run_folder, tmp_path / "damaged")
    (damaged_run / "best.json").write_text("[]")
    assert "best.json does not contain a JSON object" in get_sca_error(2, "show", "model", damaged_run)
