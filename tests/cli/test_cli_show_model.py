"""`sca show model` reads the facts of a checkpoint or of a training run from its folder."""

import json
import re
import shutil

import pytest

from sca.training.recipe import Recipe
from sca.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training run with two steps."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    table = {"model": "sca-tiny", "data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}}
    steps = {"steps": 2, "batch_size": 1, "warmup_steps": 0, "save_steps": 2, "learning_rate": 1e-5}
    train(Recipe.from_dict("mine", table | {"train": steps}), folder, quiet=True)
    (folder / "best.json").write_text(json.dumps({"step": 2, "metric": "cider-d", "score": 0.5}))
    return folder


def facts(result):
    assert result.status == 0, result.err
    return dict(line.split(":", 1) for line in result.out.splitlines())


def stripped(result):
    return {name: value.strip() for name, value in facts(result).items()}


PARTS = ("encoder", "segmenter", "mixer", "language model", "trainable", "parameters")


@pytest.mark.slow
def test_show_model_prints_the_parts_of_a_name_and_of_its_folder_alike(shell, run):
    named = stripped(shell("show", "model", "sca-tiny"))
    assert named["encoder"].startswith("tiny-vit(")
    for folder in (run, run / "model"):
        shown = stripped(shell("show", "model", folder))
        for part in PARTS:  # a folder has the options that were defaults, too
            (name, *options), (found, *more) = (re.split(r"[(),] ?", each[part]) for each in (named, shown))
            assert found == name
            assert set(options) <= set(more)


def test_show_model_prints_how_a_run_was_trained(shell, run):
    shown = stripped(shell("show", "model", run))
    assert shown["trained by"].startswith("sca train, finished, in ")
    assert (shown["trained from"], shown["trained on"]) == ("sca-tiny", "scenes")
    assert "steps=2" in shown["training"]
    assert shown["best score"] == "cider-d 0.5 at step 2"


def test_show_model_reads_nothing_beside_a_checkpoint_that_is_not_of_a_run(shell, run):
    assert "trained by" in stripped(shell("show", "model", run / "model"))
    other = shutil.copytree(run / "model", run / "other")
    assert "trained by" not in stripped(shell("show", "model", other))


def test_show_model_refuses_what_has_no_model(refused, run, tmp_path):
    assert "no spec.json" in refused(2, "show", "model", tmp_path)
    assert "Did you mean 'sca-tiny'?" in refused(2, "show", "model", "sca-tniy")
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns("model", "checkpoint-*"))
    assert "without a model yet" in refused(2, "show", "model", begun)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "best.json").write_text("[]")
    assert "best.json is damaged" in refused(2, "show", "model", damaged)
