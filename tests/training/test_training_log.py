"""The training log: one line per logging step, and no output with quiet."""

import re

import pytest

from sca.training.log import format_logs
from sca.training.recipe import Recipe
from sca.training.train import train

STEP_LINE_PATTERN = r"step [12]/2  loss \S+ \(caption \S+, mask \S+, iou \S+\)  learning rate \S+e-\d\d  \d\d:\d\d left"


@pytest.fixture
def make_recipe(small_model_table):
    def make(**tables):
        train_table = {"steps": 2, "batch_size": 1, "warmup_steps": 0, "save_steps": 2}
        data = {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}
        return Recipe.from_dict("tiny", {"model": small_model_table, "data": data, "train": train_table, **tables})

    return make


@pytest.mark.slow
def test_training_log_writes_one_line_per_step(make_recipe, tmp_path, capfd):
    train(make_recipe(validate={"eval_steps": 2, "max_images": 1}), tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith(("step ", "trained "))]
    assert [line.split()[1] for line in lines[:-1]] == ["1/2", "2/2", "2/2"]
    assert lines[-1].startswith("trained 2 steps in 00:")
    first, last = (line for line in lines if "loss" in line)
    assert re.fullmatch(STEP_LINE_PATTERN, first)
    assert last.endswith("00:00 left")
    assert [line for line in lines if "validation cider-d " in line]
    assert "{" not in err
    assert "\r" not in err  # no progress bar without a terminal


@pytest.mark.slow
def test_quiet_training_writes_nothing(make_recipe, tmp_path, capfd):
    train(make_recipe(validate={"eval_steps": 2, "max_images": 1}), tmp_path, quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {"loss": 3.21456, "learning_rate": 1e-4, "grad_norm": 2.0, "caption": 2.5, "mask": 0.7, "epoch": 0.1},
            "step   50/2000  loss 3.215 (caption 2.5, mask 0.7)  learning rate 1.00e-04  12:34 left",
        ),
        ({"validation_rouge-l": 0.25, "validation_cider-d": 0.5}, "step   50/2000  validation cider-d 50.0"),
        ({"validation_words": 3.0}, ""),
        ({"train_runtime": 3.0, "train_loss": 2.0}, ""),
    ],
)
def test_format_logs_returns_readable_line(logs, line):
    assert format_logs(logs, 50, 2000, 754.0, ("caption", "mask"), ("cider-d", "rouge-l")) == line
