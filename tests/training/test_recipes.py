"""A recipe says everything a run needs; a mistake in it is refused in one line before anything is built."""

import pytest
from sca_registry import RegistryError

from sca.training.recipe import Recipe, TrainOptions, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_reads_and_is_repeated_by_what_it_writes(name, tmp_path):
    (tmp_path / "own.jsonl").touch()
    recipe = Recipe.read(name, [f"data='{tmp_path}'"] if name == "own-data" else [])
    assert recipe.summary.endswith(".")
    assert recipe.source
    if not isinstance(recipe.model, str):
        recipe.model.check()
    again = Recipe.from_dict(name, recipe.to_dict())
    for field in ("model", "data", "train", "loss", "validate"):
        assert getattr(again, field) == getattr(recipe, field)


def test_a_recipe_goes_on_from_a_model_and_learns_from_a_path(tmp_path):
    (tmp_path / "own.jsonl").touch()
    changed = Recipe.read("sca-tiny", ["model=sca-street", f"data='{tmp_path}'", "data.own.hold_out=0.5"])
    assert changed.model == "sca-street"
    (own,) = changed.data.values()
    assert own.dataset.name == "jsonl"
    assert own.dataset.options["hold_out"] == 0.5
    assert own.names == "both"
    with pytest.raises(RegistryError, match="model is 'sca-street', which has no options to set"):
        Recipe.read("sca-tiny", ["model=sca-street", "mixer.depth=2"])
    with pytest.raises(RegistryError, match=r"the recipe own-data has no data: give data=PATH of your own"):
        Recipe.read("own-data")


def test_overrides_reach_every_table_and_do_not_change_the_recipe():
    plain = Recipe.read("sca-tiny")
    changes = ["train.steps=7", "mixer.depth=1", "loss.mask=0.5", "data.scenes.count=16", "train.prompts.box=0.2"]
    changed = Recipe.read("sca-tiny", changes)
    assert changed.train.steps == 7
    assert changed.model.mixer.options["depth"] == 1
    assert changed.loss["mask"] == 0.5
    assert changed.data["scenes"].dataset.options == {"count": 16}
    assert changed.train.prompts["box"] == 0.2
    assert Recipe.read("sca-tiny", ["train.prompts={point=1}"]).train.prompts == {"point": 1}
    assert Recipe.read("sca-tiny") == plain


def test_what_a_recipe_leaves_out_has_its_default(small_table):
    recipe = Recipe.from_dict("mine", {"model": small_table, "data": {"scenes": {"name": "scenes"}}})
    assert recipe.train == TrainOptions()
    assert recipe.loss == {"caption": 1.0, "mask": 1.0, "iou": 1.0, "attributes": 0.0, "features": 0.0}


def test_a_file_is_a_recipe_of_its_own_name(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'model = { encoder = "tiny-vit", mixer = "query", language_model = "tiny-gpt2" }\n[data.a]\nname = "scenes"'
    )
    assert Recipe.read(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.step=7", "train has no 'step'.*Did you mean 'steps'"),
        ("train.steps=many", "train.steps is 'many': give a whole number"),
        ("train.steps=1.5", "train.steps is 1.5: give a whole number"),
        ("train.steps=0", "train.steps is 0: give a whole number, 1 or more"),
        ("train.images=-4", "train.images is -4"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast': give a number"),
        ("train.warmup=true", "train.warmup is True"),
        ("train.prompts={circle=1.0}", "no prompt is called 'circle'"),
        ("train.prompts={box=0}", "none of them ever is"),
        ("train.prompts.box=-1", "train.prompts.box is -1"),
        ("train.precision=fp16", "no precision 'fp16'.*There are: float32"),
        ("train.telling=2", "train.telling is 2: give a share"),
        ("data.scenes.weight=0", "data.scenes.weight is 0: give a number above 0"),
        ("data.scenes.weight=much", "data.scenes.weight is 'much': give a number"),
        ("data.scenes.augment={flop=1}", "data.scenes.augment has no 'flop'.*Did you mean 'flip'"),
        ("data.scenes.augment={flip=2}", "data.scenes.augment.flip is 2: give a number from 0 to 1"),
        ("loss.masks=1", "loss has no 'masks'.*Did you mean 'mask'"),
        ("loss.mask=much", "loss.mask is 'much': give a number"),
        ("mixer.depth", "does not set anything"),
        ("trian.steps=7", "no 'trian' to set"),
        ("task_tokens=-1", "task_tokens is -1"),
    ],
)
def test_a_wrong_override_is_refused(change, message):
    with pytest.raises(RegistryError, match=message):
        Recipe.read("sca-tiny", [change])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"trian": {}}, "a recipe has no 'trian'.*Did you mean 'train'"),
        ({"train": 3}, r"train of the recipe mine is 3: give a table \[train\]"),
        ({"train": {"epochs": 3}}, r"\[train\] has no 'epochs'"),
        ({"train": {"prompts": {"circle": 1.0}}}, "no prompt is called 'circle'"),
        ({"train": {"learning_rate": 10**400}}, r"train.learning_rate is 10+: give a number"),
        ({"data": {}}, "has no data"),
        ({"model": {"encoder": "tiny-vit"}}, "the mixer is None"),
    ],
)
def test_a_wrong_recipe_is_refused(small_table, table, message):
    whole = {"model": small_table, "data": {"scenes": {"name": "scenes"}}}
    with pytest.raises(RegistryError, match=message):
        Recipe.from_dict("mine", {**whole, **table})


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(RegistryError, match="Did you mean 'sca-tiny'"):
        Recipe.read("sca-tny")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(RegistryError, match="is not TOML"):
        Recipe.read(str(broken))
