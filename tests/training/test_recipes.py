"""A recipe says everything a run needs; a mistake in it is refused in one line before anything is built."""

import math
import re
from collections.abc import Mapping

import pytest
from sca_registry import RegistryError
from sca_registry.compatibility import check_compatible
from sca_registry.spec import ComponentSpec

import sca
from sca.training.augmentation import Augmentation
from sca.training.datasets import open_training_datasets, open_validation_dataset
from sca.training.recipe import (
    DEFAULT_LOSS_WEIGHTS,
    MAX_SEED,
    DataSource,
    Recipe,
    TrainOptions,
    ValidationOptions,
    list_recipes,
)
from sca.training.train import check_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_reads_and_is_repeated_by_what_it_writes(name, tmp_path):
    (tmp_path / "own.jsonl").touch()
    recipe = Recipe.read(name, [f"data='{tmp_path}'"] if name == "own-data" else [])
    assert recipe.summary.endswith(".")
    assert recipe.source
    if not isinstance(recipe.model, str):
        check_compatible(recipe.model)
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
    changes = ["train.steps=7", "mixer.depth=1", "loss.mask=0.5", "data.scenes.num_images=16", "train.prompts.box=0.2"]
    changed = Recipe.read("sca-tiny", changes)
    assert changed.train.steps == 7
    assert changed.model.mixer.options["depth"] == 1
    assert changed.loss["mask"] == 0.5
    assert changed.data["scenes"].dataset.options == {"num_images": 16}
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
        ("train.steps=many", "train.steps is 'many'; give an integer"),
        ("train.steps=1.5", "train.steps is 1.5; give an integer"),
        ("train.steps=0", "train.steps is 0; give an integer of at least 1"),
        ("train.batch_size=-4", "train.batch_size is -4"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; give a number"),
        ("train.warmup_steps=true", "train.warmup_steps is True"),
        ("train.prompts={circle=1.0}", "train.prompts has no 'circle'"),
        ("train.prompts={box=0}", "none of them ever is"),
        ("train.prompts.box=-1", "train.prompts.box is -1"),
        ("train.precision=fp16", "train.precision is 'fp16'.*Choose from: float32"),
        ("train.longest_caption_prob=2", "train.longest_caption_prob is 2; give a number from 0 to 1"),
        ("data.scenes.weight=0", "data.scenes.weight is 0; give a number above 0"),
        ("data.scenes.weight=much", "data.scenes.weight is 'much'; give a number"),
        ("data.scenes.augment={flop=1}", "data.scenes.augment has no 'flop'.*Did you mean 'flip'"),
        ("data.scenes.augment={flip=2}", "data.scenes.augment.flip is 2; give a number from 0 to 1"),
        ("loss.masks=1", "loss has no 'masks'.*Did you mean 'mask'"),
        ("loss.mask=much", "loss.mask is 'much'; give a number"),
        ("mixer.depth", "is not an assignment"),
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
        ({"train": 3}, r"train of the recipe mine is 3; give a table \[train\]"),
        ({"train": {"epochs": 3}}, r"\[train\] has no 'epochs'"),
        ({"train": {"prompts": {"circle": 1.0}}}, "train.prompts has no 'circle'"),
        ({"train": {"learning_rate": 10**400}}, r"train.learning_rate is 10+; give a number"),
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


WRONG = {  # of each type some values that are of another one
    bool: (1, "true", []),
    int: (True, 1.5, "1", [1]),
    float: (True, "1", [1.0], float("nan")),
    str: (True, 1, [], {}),
    dict: (True, 1, "x", []),
    list: (True, 1, "x", {}),
}
WANTED = {
    bool: "give true or false",
    int: "give an integer",
    float: "give a number",
    str: "give text|Choose from: ",
    dict: "give a table",
    list: "give a list",
}
DEFAULTS = {"train": vars(TrainOptions()), "validate": vars(ValidationOptions()), "loss": DEFAULT_LOSS_WEIGHTS}
FIELDS = [(section, name, default) for section, table in DEFAULTS.items() for name, default in table.items()]
FIELDS += [
    ("data.scenes", name, vars(DataSource(ComponentSpec("scenes")))[name])
    for name in ("split", "weight", "phrases", "names")
]
FIELDS += [("data.scenes.augment", name, default) for name, default in vars(Augmentation()).items()]


def kind_of(default):
    default = (
        dict(default) if isinstance(default, Mapping) else list(default) if isinstance(default, tuple) else default
    )
    return type(default)


@pytest.mark.parametrize(("section", "name", "default"), FIELDS)
def test_recipe_rejects_a_wrong_type_in_any_field(small_table, section, name, default):
    kind = kind_of(default)
    for value in WRONG[kind]:
        table = {"model": small_table, "data": {"scenes": {"name": "scenes", "augment": {}}}}
        place = table
        for key in section.split("."):
            place = place.setdefault(key, {})
        place[name] = value
        with pytest.raises(RegistryError) as caught:
            Recipe.from_dict("mine", table)
        message = str(caught.value)
        assert name in message
        assert re.search(WANTED[kind], message), message
        assert "\n" not in message


SIGNS = {float: (-1.0, math.inf, -math.inf, math.nan), int: (-1,)}
NUMBERS = [(section, name, default) for section, name, default in FIELDS if type(default) in SIGNS]
NUMBERS += [("train.lr_multipliers", "mixer", 1.0), ("train.prompts", "box", 1.0)]


@pytest.mark.parametrize(("section", "name", "default"), NUMBERS)
def test_recipe_rejects_negative_and_infinite_numbers_in_any_field(small_table, section, name, default):
    for value in SIGNS[type(default)]:
        table = {"model": small_table, "data": {"scenes": {"name": "scenes", "augment": {}}}}
        place = table
        for key in section.split("."):
            place = place.setdefault(key, {})
        place[name] = value
        with pytest.raises(RegistryError, match=rf"^{section}\.{name} is {value!r}; give "):
            Recipe.from_dict("mine", table)


def test_recipe_rejects_a_seed_that_numpy_does_not_take(small_table):
    table = {"model": small_table, "data": {"scenes": {"name": "scenes"}}}
    assert Recipe.from_dict("mine", table | {"train": {"seed": MAX_SEED}}).train.seed == MAX_SEED
    with pytest.raises(RegistryError, match=r"train\.seed is 4294967296; give an integer from 0 to 4294967295"):
        Recipe.from_dict("mine", table | {"train": {"seed": MAX_SEED + 1}})


@pytest.mark.parametrize("section", ["model", "data", "train", "loss", "validate", "summary", "source"])
def test_recipe_rejects_a_wrong_type_in_any_section(small_table, section):
    table = {"model": small_table, "data": {"scenes": {"name": "scenes"}}}
    for value in (3, True, ["x"]):
        with pytest.raises(RegistryError, match=rf"{section}.* is .*; give (a table|text)"):
            Recipe.from_dict("mine", {**table, section: value})


@pytest.mark.parametrize("key", ["metrics", "best"])
def test_validation_rejects_lists_of_other_types(small_table, key):
    table = {"model": small_table, "data": {"scenes": {"name": "scenes"}}, "validate": {key: ["cider", 3]}}
    with pytest.raises(RegistryError, match=rf"validate\.{key} is \['cider', 3\]; give a list of (1 or more )?strings"):
        Recipe.from_dict("mine", table)


def test_recipe_model_table_replaces_a_name(tmp_path):
    (tmp_path / "own.jsonl").touch()
    written = 'model={encoder="tiny-vit", mixer="query", language_model="tiny-gpt2"}'
    for name in ("own-data", "sca-tiny"):
        recipe = Recipe.read(name, [f"data='{tmp_path}'", written, "mixer.depth=1"])
        assert recipe.model.mixer == ComponentSpec("query", {"depth": 1})
    for wrong in ('model={encoder="tiny-vit"}', "model=[1]"):
        with pytest.raises(RegistryError, match=r"the mixer is None|model of the recipe own-data is"):
            Recipe.read("own-data", [f"data='{tmp_path}'", wrong])


def test_recipe_takes_whole_tables_as_assignments(tmp_path):
    written = ['data={x={name="scenes", num_images=3}}', "train={steps=7}", "train.batch_size=2", "loss={mask=0.5}"]
    recipe = Recipe.read("sca-tiny", written)
    assert recipe.data == {"x": DataSource(ComponentSpec("scenes", {"num_images": 3}))}
    assert recipe.train == TrainOptions(steps=7, batch_size=2)
    assert recipe.loss == DEFAULT_LOSS_WEIGHTS | {"mask": 0.5}
    with pytest.raises(RegistryError, match=r"a recipe's \[train\] has no 'stps'\. Did you mean 'steps'"):
        Recipe.read("sca-tiny", ["train={stps=7}"])


def test_recipe_takes_every_field_of_validate_as_an_assignment(small_table):
    table = {"model": small_table, "data": {"a": {"name": "scenes", "num_images": 9}}, "validate": {"every": 3}}
    assigned = ['validate.best=["rouge-l"]', 'validate.metrics=["rouge-l"]', "validate.limit=4", "validate.prompt=mask"]
    found = Recipe.from_dict(
        "mine", table, [*assigned, "validate.dataset.image_size=64", "data.a.num_images=8"]
    ).validate
    dataset = {"name": "scenes", "num_images": 8, "image_size": 64}
    assert found == ValidationOptions(3, dataset, limit=4, prompt="mask", metrics=("rouge-l",), best=("rouge-l",))
    with pytest.raises(
        RegistryError, match=r"validate has no 'bst'\. Did you mean 'best'\? Choose from: every, dataset"
    ):
        Recipe.from_dict("mine", table, ["validate.bst=3"])
    with pytest.raises(RegistryError, match=r"no 'valdate' to set\. Did you mean 'validate'"):
        Recipe.from_dict("mine", table, ["valdate.best=3"])


@pytest.mark.parametrize("assignment", ["validate.every=3", "validate={every=3}"])
def test_recipe_without_validate_takes_it_from_assignments(small_table, assignment):
    table = {"model": small_table, "data": {"a": {"name": "scenes"}}}
    assert Recipe.from_dict("mine", table).validate is None
    assert Recipe.from_dict("mine", table, [assignment]).validate == ValidationOptions(3, {"name": "scenes"})


def test_recipe_rejects_lora_that_would_not_train(tmp_path):
    with pytest.raises(
        RegistryError, match=r"lora=8 would not train: .* give trainable=\[.*\"task_tokens\", \"lora\"\]"
    ):
        Recipe.read("sca-tiny", ["lora=8"])
    recipe = Recipe.read("sca-tiny", ["lora=8", 'trainable=["mixer", "projection", "task_tokens", "lora"]'])
    model = sca.build(recipe.model, "meta")
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert any("lora_" in name for name, _ in model.named_parameters())
    (tmp_path / "own.jsonl").touch()
    with pytest.raises(RegistryError, match=r"model is 'sca-tiny'.*; give model=\{encoder=\.\.\., mixer=\.\.\.,"):
        Recipe.read("own-data", [f"data='{tmp_path}'", "lora=8"])


def test_recipe_read_reports_text_that_is_not_utf_8(tmp_path):
    file = tmp_path / "latin.toml"
    file.write_bytes(b'summary = "caf\xe9"')
    with pytest.raises(ValueError, match=r"latin\.toml is not UTF-8 \(byte 14\)"):
        Recipe.read(str(file))
    file.write_bytes(b'\xef\xbb\xbfmodel = "sca-tiny"\n[data.a]\nname = "scenes"')  # as Windows writes it
    assert Recipe.read(str(file)).model == "sca-tiny"
    file.write_text("train.steps = 2024-01-01")
    with pytest.raises(RegistryError, match="2024-01-01 is a date or a time; write text in quotes"):
        Recipe.read(str(file))


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"metrics": ["cidr"]}, "no metrics named 'cidr'"),
        ({"prompt": "circle"}, "prompt is 'circle'"),
        ({"dataset": {"name": "scene"}}, "no datasets named 'scene'"),
        ({"dataset": {"name": "scenes", "cuont": 3}}, "has no option 'cuont'"),
    ],
)
def test_open_validation_rejects_unknown_names(small_table, validate, message):
    table = {"model": small_table, "data": {"scenes": {"name": "scenes"}}, "validate": validate}
    recipe = Recipe.from_dict("mine", table)
    with pytest.raises(RegistryError if "prompt" not in message else ValueError, match=message):
        open_validation_dataset(recipe.validate)


def test_open_sources_rejects_a_dataset_without_usable_images(small_table, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"image": "gone.png", "box": [0, 0, 9, 9], "caption": "a dog"}\n')
    data = {"own": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl")}}
    recipe = Recipe.from_dict("mine", {"model": small_table, "data": data})
    with pytest.raises(
        ValueError, match=r"data\.own \(train\) has no image that can be used: 1 image missing: gone\.png"
    ):
        open_training_datasets(recipe)
    (tmp_path / "gone.png").write_bytes(b"damaged")
    data["own"] |= {"file": str(tmp_path / "mine.jsonl")}
    with pytest.raises(ValueError, match=r"1 image unreadable: gone\.png"):
        open_training_datasets(recipe)


DATA = {"data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}}
LARGE = {"encoder": "sam-vit-h", "mixer": "query", "language_model": "mistral-7b", "lora": 4}


@pytest.mark.parametrize("model", ["sca-tiny", LARGE])
def test_recipe_is_checked_without_weights(model, monkeypatch):
    monkeypatch.setattr("sca.io.hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    check_recipe(Recipe.from_dict("mine", {"model": model, **DATA}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"lr_multipliers": {"nothing": 1.0}}}, "nothing"),
        ({"train": {"cache_features": "features"}}, "cache_features"),
        ({"train": {"report_to": "nobody"}}, "nothing is called 'nobody'"),
        ({"model": {**LARGE, "language_model": {"name": "hf", "config": {"model_type": "gpt2"}}}}, "no tokenizer"),
    ],
)
def test_check_recipe_finds_mistakes_that_need_no_weights(change, message):
    with pytest.raises(RegistryError, match=message):
        check_recipe(Recipe.from_dict("mine", {"model": "sca-tiny", **DATA, **change}))
