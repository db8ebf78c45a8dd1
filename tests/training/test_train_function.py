"""`sca.train` and `sca.evaluate` match the commands of the same names."""

from pathlib import Path

import pytest
from sca_registry import RegistryError

import sca
from sca.training.recipe import Recipe

QUICK_OVERRIDES = [
    "train.steps=1",
    "train.batch_size=2",
    "data.scenes.image_size=64",
    "data.scenes.num_images=2",
    "train.report_to=none",
]


@pytest.mark.slow
def test_train_accepts_recipe_name_and_evaluate_accepts_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = sca.train("sca-tiny", changes=QUICK_OVERRIDES, quiet=True)
    assert isinstance(model, sca.SegmentCaptioner)
    assert Path("runs/sca-tiny/model/weights.safetensors").is_file()
    report = sca.evaluate(model, {"name": "scenes", "num_images": 2, "image_size": 64}, metrics=["class"])
    assert 0 <= report.scores["class/mean-accuracy"] <= 1


@pytest.mark.slow
def test_train_accepts_recipe_file_or_recipe_with_changes(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'model = "sca-tiny"\n[data.scenes]\nname = "scenes"\nimage_size = 64\nnum_images = 2\n'
    )
    overrides = [*QUICK_OVERRIDES[:2], "train.report_to=none"]
    sca.train(tmp_path / "mine.toml", tmp_path / "one", changes=overrides, quiet=True)
    recipe = Recipe.read(str(tmp_path / "mine.toml"), overrides)
    sca.train(recipe, tmp_path / "two", changes=["train.seed=3"], quiet=True)
    weights = [(tmp_path / run / "model/weights.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] != weights[1]


def test_train_rejects_unknown_recipe():
    with pytest.raises(RegistryError, match="sca-tiny"):
        sca.train("sca-tinny")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"model": "sca-tiny"}, 'Change the recipe: changes=["model=VALUE"].'),
        ({"data": "photos"}, 'Change the recipe: changes=["data=VALUE"].'),
        ({"steps": 5}, 'Change the recipe: changes=["train.steps=VALUE"].'),
        ({"max_steps": 5}, 'Change the recipe: changes=["train.steps=VALUE"].'),
        ({"lr": 1e-4}, 'Change the recipe: changes=["train.learning_rate=VALUE"].'),
        ({"output_dir": "out"}, "Did you mean 'folder'?"),
    ],
)
def test_train_names_the_change_of_the_recipe_for_an_unknown_argument(arguments, hint):
    (name,) = arguments
    with pytest.raises(TypeError) as caught:
        sca.train("own-data", **arguments)
    assert str(caught.value) == f"train() has no argument {name!r}. {hint}"
