"""Recipes: reading, overriding, and one-line errors before a model or dataset is built."""

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
def test_bundled_recipe_reads_and_round_trips(name, tmp_path):
    (tmp_path / "own.jsonl").touch()
    recipe = Recipe.read(name, [f"data='{tmp_path}'"] if name == "own-data" else [])
    assert recipe.summary.endswith(".")
    assert recipe.source
    if not isinstance(recipe.model, str):
        check_compatible(recipe.model)
    round_tripped = Recipe.from_dict(name, recipe.to_dict())
    for field in ("model", "data", "train", "loss", "validate"):
        assert getattr(round_tripped, field) == getattr(recipe, field)


def test_recipe_accepts_model_name_and_data_path(tmp_path):
    (tmp_path / "own.jsonl").touch()
    overridden = Recipe.read("sca-tiny", ["model=sca-street", f"data='{tmp_path}'", "data.own.val_fraction=0.5"])
    assert overridden.model == "sca-street"
    (source,) = overridden.data.values()
    assert source.dataset.name == "jsonl"
    assert source.dataset.options["val_fraction"] == 0.5
    assert source.class_name_task == "both"
    with pytest.raises(RegistryError, match="components of the checkpoint 'sca-street' are fixed"):
        Recipe.read("sca-tiny", ["model=sca-street", "mixer.depth=2"])
    with pytest.raises(RegistryError, match=r"the recipe own-data has no data; set data=PATH"):
        Recipe.read("own-data")
    with pytest.raises(RegistryError, match=r"'data.own.val_fraction=0.5': data is empty; set it first: data=PATH"):
        Recipe.read("own-data", ["data.own.val_fraction=0.5"])


def test_recipe_overrides_reach_every_table_and_keep_the_original():
    original = Recipe.read("sca-tiny")
    changes = [
        "train.steps=7",
        "mixer.depth=1",
        "loss.mask=0.5",
        "data.scenes.num_images=16",
        "train.prompt_weights.box=0.2",
    ]
    overridden = Recipe.read("sca-tiny", changes)
    assert overridden.train.steps == 7
    assert overridden.model.mixer.options["depth"] == 1
    assert overridden.loss["mask"] == 0.5
    assert overridden.data["scenes"].dataset.options == {"num_images": 16}
    assert overridden.train.prompt_weights["box"] == 0.2
    assert Recipe.read("sca-tiny", ["train.prompt_weights={point=1}"]).train.prompt_weights == {"point": 1}
    assert Recipe.read("sca-tiny") == original


def test_recipe_fills_in_defaults(small_model_table):
    recipe = Recipe.from_dict("mine", {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}})
    assert recipe.train == TrainOptions()
    assert recipe.loss == {"caption": 1.0, "mask": 1.0, "iou": 1.0, "attributes": 0.0, "feature_attributes": 0.0}


def test_recipe_file_is_named_after_its_stem(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'model = { encoder = "tiny-vit", mixer = "query", language_model = "tiny-gpt2" }\n[data.a]\nname = "scenes"'
    )
    assert Recipe.read(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=7", "unknown key 'step' in train.*Did you mean 'steps'"),
        ("train.steps=many", "train.steps is 'many'; expected an integer"),
        ("train.steps=1.5", "train.steps is 1.5; expected an integer"),
        ("train.steps=0", "train.steps is 0; expected an integer of at least 1"),
        ("train.batch_size=-4", "train.batch_size is -4"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; expected a number"),
        ("train.warmup_steps=true", "train.warmup_steps is True"),
        ("train.prompt_weights={circle=1.0}", "unknown key 'circle' in train.prompt_weights"),
        ("train.prompt_weights={box=0}", "prompt_weights are all 0"),
        ("train.prompt_weights.box=-1", "train.prompt_weights.box is -1"),
        ("train.precision=fp16", "train.precision is 'fp16'.*Choose from: float32"),
        ("train.longest_caption_prob=2", "train.longest_caption_prob is 2; expected a number from 0 to 1"),
        ("data.scenes.weight=0", "data.scenes.weight is 0; expected a number greater than 0"),
        ("data.scenes.weight=much", "data.scenes.weight is 'much'; expected a number"),
        (
            "data.scenes.augment={flop_prob=1}",
            "unknown key 'flop_prob' in data.scenes.augment.*Did you mean 'flip_prob'",
        ),
        ("data.scenes.augment={flip_prob=2}", "data.scenes.augment.flip_prob is 2; expected a number from 0 to 1"),
        ("loss.masks=1", "unknown key 'masks' in loss.*Did you mean 'mask'"),
        ("loss.mask=much", "loss.mask is 'much'; expected a number"),
        ("mixer.depth", "is not an assignment"),
        ("trian.steps=7", "unknown key 'trian'"),
        ("task_tokens=-1", "task_tokens is -1"),
        ("train.max_steps=7", "'train.max_steps=7': unknown key 'train.max_steps'; use train.steps$"),
        ("train.num_train_epochs=7", "; use train.steps$"),
        ("train.per_device_train_batch_size=7", "; use train.batch_size$"),
        ("train.lr=1e-3", "; use train.learning_rate$"),
        ("lr=1e-3", "'lr=1e-3': unknown key 'lr'; use train.learning_rate$"),
        ("epochs=3", "; use train.steps$"),
        ("steps=3", "; use train.steps$"),
        ("batch-size=3", "; use train.batch_size$"),
        ("learning_rate=1e-3", "; use train.learning_rate$"),
        ("output_dir=runs/x", "'output_dir'; the run folder is an option: --out FOLDER, or folder=... in Python$"),
        ("train.output_dir=x", "the run folder is an option: --out FOLDER"),
    ],
)
def test_recipe_rejects_wrong_override(override, message):
    with pytest.raises(RegistryError, match=message):
        Recipe.read("sca-tiny", [override])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"trian": {}}, "unknown key 'trian' in the recipe.*Did you mean 'train'"),
        ({"train": 3}, r"the recipe mine: train is 3; expected a table \[train\]"),
        ({"train": {"epochs": 3}}, r"unknown key 'epochs' in \[train\]; use train\.steps$"),
        ({"lr": 0.1}, "unknown key 'lr' in the recipe; use train.learning_rate$"),
        ({"batch_size": 4}, "unknown key 'batch_size' in the recipe; use train.batch_size$"),
        ({"train": {"prompt_weights": {"circle": 1.0}}}, "unknown key 'circle' in train.prompt_weights"),
        ({"train": {"learning_rate": 10**400}}, r"train.learning_rate is 10+; expected a number"),
        ({"data": {}}, "has no data"),
        ({"model": {"encoder": "tiny-vit"}}, 'the model has no mixer; add `mixer = "query"`'),
    ],
)
def test_recipe_rejects_wrong_table(small_model_table, table, message):
    valid_table = {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}}
    with pytest.raises(RegistryError, match=message):
        Recipe.from_dict("mine", {**valid_table, **table})


def test_recipe_read_names_a_missing_recipe():
    with pytest.raises(RegistryError, match=r"^the recipe is missing before 'data=photos'; write: sca train own-data"):
        Recipe.read("data=photos", ["model=sca-tiny"])


def test_recipe_read_suggests_similar_names_and_reports_invalid_toml(tmp_path):
    with pytest.raises(RegistryError, match="Did you mean 'sca-tiny'"):
        Recipe.read("sca-tny")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(RegistryError, match="is not valid TOML"):
        Recipe.read(str(broken))


VALUES_OF_WRONG_TYPE = {  # values that do not have the type
    bool: (1, "true", []),
    int: (True, 1.5, "1", [1]),
    float: (True, "1", [1.0], float("nan")),
    str: (True, 1, [], {}),
    dict: (True, 1, "x", []),
    list: (True, 1, "x", {}),
}
TYPE_MESSAGES = {
    bool: "expected true or false",
    int: "expected an integer",
    float: "expected a number",
    str: "expected a string|Choose from: ",
    dict: "expected a table",
    list: "expected a list",
}
DEFAULT_OPTIONS = {"train": vars(TrainOptions()), "validate": vars(ValidationOptions()), "loss": DEFAULT_LOSS_WEIGHTS}
FIELDS = [(section, name, default) for section, table in DEFAULT_OPTIONS.items() for name, default in table.items()]
FIELDS += [
    ("data.scenes", name, vars(DataSource(ComponentSpec("scenes")))[name])
    for name in ("split", "weight", "phrases", "class_name_task")
]
FIELDS += [("data.scenes.augment", name, default) for name, default in vars(Augmentation()).items()]


def get_field_type(default):
    default = (
        dict(default) if isinstance(default, Mapping) else list(default) if isinstance(default, tuple) else default
    )
    return type(default)


@pytest.mark.parametrize(("section", "name", "default"), FIELDS)
def test_recipe_rejects_a_wrong_type_in_any_field(small_model_table, section, name, default):
    field_type = get_field_type(default)
    for value in VALUES_OF_WRONG_TYPE[field_type]:
        table = {"model": small_model_table, "data": {"scenes": {"name": "scenes", "augment": {}}}}
        subtable = table
        for key in section.split("."):
            subtable = subtable.setdefault(key, {})
        subtable[name] = value
        with pytest.raises(RegistryError) as caught:
            Recipe.from_dict("mine", table)
        message = str(caught.value)
        assert name in message
        assert re.search(TYPE_MESSAGES[field_type], message), message
        assert "\n" not in message


OUT_OF_RANGE_NUMBERS = {float: (-1.0, math.inf, -math.inf, math.nan), int: (-1,)}
NUMERIC_FIELDS = [
    (section, name, default) for section, name, default in FIELDS if type(default) in OUT_OF_RANGE_NUMBERS
]
NUMERIC_FIELDS += [("train.lr_multipliers", "mixer", 1.0), ("train.prompt_weights", "box", 1.0)]


@pytest.mark.parametrize(("section", "name", "default"), NUMERIC_FIELDS)
def test_recipe_rejects_negative_and_infinite_numbers_in_any_field(small_model_table, section, name, default):
    for value in OUT_OF_RANGE_NUMBERS[type(default)]:
        table = {"model": small_model_table, "data": {"scenes": {"name": "scenes", "augment": {}}}}
        subtable = table
        for key in section.split("."):
            subtable = subtable.setdefault(key, {})
        subtable[name] = value
        with pytest.raises(RegistryError, match=rf"^{section}\.{name} is {value!r}; expected "):
            Recipe.from_dict("mine", table)


def test_recipe_rejects_seed_above_numpy_limit(small_model_table):
    table = {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}}
    assert Recipe.from_dict("mine", table | {"train": {"seed": MAX_SEED}}).train.seed == MAX_SEED
    with pytest.raises(RegistryError, match=r"train\.seed is 4294967296; expected an integer from 0 to 4294967295"):
        Recipe.from_dict("mine", table | {"train": {"seed": MAX_SEED + 1}})


@pytest.mark.parametrize("section", ["model", "data", "train", "loss", "validate", "summary", "source"])
def test_recipe_rejects_a_wrong_type_in_any_section(small_model_table, section):
    table = {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}}
    for value in (3, True, ["x"]):
        with pytest.raises(RegistryError, match=rf"{section}.* is .*; expected (a table|a string)"):
            Recipe.from_dict("mine", {**table, section: value})


@pytest.mark.parametrize("key", ["metrics", "metric_for_best_model"])
def test_recipe_rejects_mixed_lists_in_validate(small_model_table, key):
    table = {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}, "validate": {key: ["cider", 3]}}
    with pytest.raises(
        RegistryError, match=rf"validate\.{key} is \['cider', 3\]; expected a list of (1 or more )?strings"
    ):
        Recipe.from_dict("mine", table)


def test_recipe_override_replaces_model_name_with_table(tmp_path):
    (tmp_path / "own.jsonl").touch()
    override = 'model={encoder="tiny-vit", mixer="query", language_model="tiny-gpt2"}'
    for name in ("own-data", "sca-tiny"):
        recipe = Recipe.read(name, [f"data='{tmp_path}'", override, "mixer.depth=1"])
        assert recipe.model.mixer == ComponentSpec("query", {"depth": 1})
    for wrong_override in ('model={encoder="tiny-vit"}', "model=[1]"):
        with pytest.raises(RegistryError, match=r"the model has no mixer|the recipe own-data: model is"):
            Recipe.read("own-data", [f"data='{tmp_path}'", wrong_override])


def test_recipe_accepts_whole_tables_as_overrides(tmp_path):
    overrides = ['data={x={name="scenes", num_images=3}}', "train={steps=7}", "train.batch_size=2", "loss={mask=0.5}"]
    recipe = Recipe.read("sca-tiny", overrides)
    assert recipe.data == {"x": DataSource(ComponentSpec("scenes", {"num_images": 3}))}
    assert recipe.train == TrainOptions(steps=7, batch_size=2)
    assert recipe.loss == DEFAULT_LOSS_WEIGHTS | {"mask": 0.5}
    with pytest.raises(RegistryError, match=r"unknown key 'stps' in \[train\] of the recipe\. Did you mean 'steps'"):
        Recipe.read("sca-tiny", ["train={stps=7}"])


def test_recipe_accepts_overrides_of_all_validate_fields(small_model_table):
    table = {
        "model": small_model_table,
        "data": {"a": {"name": "scenes", "num_images": 9}},
        "validate": {"eval_steps": 3},
    }
    overrides = ['validate.metric_for_best_model=["rouge-l"]', 'validate.metrics=["rouge-l"]']
    overrides += ["validate.max_images=4", "validate.prompt_type=mask"]
    options = Recipe.from_dict(
        "mine", table, [*overrides, "validate.dataset.image_size=64", "data.a.num_images=8"]
    ).validate
    dataset = {"name": "scenes", "num_images": 8, "image_size": 64}
    assert options == ValidationOptions(
        3, dataset, max_images=4, prompt_type="mask", metrics=("rouge-l",), metric_for_best_model=("rouge-l",)
    )
    with pytest.raises(
        RegistryError,
        match=r"unknown key 'metric_for_best' in validate\. Did you mean 'metric_for_best_model'\? Choose from: ",
    ):
        Recipe.from_dict("mine", table, ["validate.metric_for_best=3"])
    with pytest.raises(RegistryError, match=r"unknown key 'valdate'\. Did you mean 'validate'"):
        Recipe.from_dict("mine", table, ["valdate.eval_steps=3"])


@pytest.mark.parametrize("override", ["validate.eval_steps=3", "validate={eval_steps=3}"])
def test_recipe_adds_validate_from_override(small_model_table, override):
    table = {"model": small_model_table, "data": {"a": {"name": "scenes"}}}
    assert Recipe.from_dict("mine", table).validate is None
    assert Recipe.from_dict("mine", table, [override]).validate == ValidationOptions(3, {"name": "scenes"})


def test_recipe_rejects_lora_that_would_not_train(tmp_path):
    with pytest.raises(
        RegistryError, match=r"lora=8 is not trainable, .* set trainable=\[.*\"task_tokens\", \"lora\"\]"
    ):
        Recipe.read("sca-tiny", ["lora=8"])
    recipe = Recipe.read("sca-tiny", ["lora=8", 'trainable=["mixer", "projection", "task_tokens", "lora"]'])
    model = sca.build(recipe.model, "meta")
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert any("lora_" in name for name, _ in model.named_parameters())
    (tmp_path / "own.jsonl").touch()
    with pytest.raises(
        RegistryError, match=r"checkpoint 'sca-tiny' are fixed; set model=\{encoder=\.\.\., mixer=\.\.\.,"
    ):
        Recipe.read("own-data", [f"data='{tmp_path}'", "lora=8"])


def test_recipe_read_reports_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "latin.toml"
    file.write_bytes(b'summary = "caf\xe9"')
    with pytest.raises(ValueError, match=r"latin\.toml is not UTF-8 \(byte 14\)"):
        Recipe.read(str(file))
    file.write_bytes(b'\xef\xbb\xbfmodel = "sca-tiny"\n[data.a]\nname = "scenes"')  # with the line ends of Windows
    assert Recipe.read(str(file)).model == "sca-tiny"
    file.write_text("train.steps = 2024-01-01")
    with pytest.raises(RegistryError, match="2024-01-01 is a date or a time; write text in quotes"):
        Recipe.read(str(file))


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"metrics": ["cidr"]}, "no metrics named 'cidr'"),
        ({"prompt_type": "circle"}, "prompt_type is 'circle'"),
        ({"dataset": {"name": "scene"}}, "no datasets named 'scene'"),
        ({"dataset": {"name": "scenes", "cuont": 3}}, "has no option 'cuont'"),
    ],
)
def test_open_validation_dataset_rejects_unknown_names(small_model_table, validate, message):
    table = {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}, "validate": validate}
    recipe = Recipe.from_dict("mine", table)
    with pytest.raises(RegistryError if "prompt" not in message else ValueError, match=message):
        open_validation_dataset(recipe.validate)


def test_open_training_datasets_rejects_dataset_without_usable_images(small_model_table, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"image": "gone.png", "box": [0, 0, 9, 9], "caption": "a dog"}\n')
    data = {"own": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl")}}
    recipe = Recipe.from_dict("mine", {"model": small_model_table, "data": data})
    with pytest.raises(ValueError, match=r"data\.own \(train\) has no usable image: 1 image missing: gone\.png"):
        open_training_datasets(recipe)
    (tmp_path / "gone.png").write_bytes(b"damaged")
    data["own"] |= {"file": str(tmp_path / "mine.jsonl")}
    with pytest.raises(ValueError, match=r"1 image unreadable: gone\.png"):
        open_training_datasets(recipe)


DATA_TABLE = {"data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}}
LARGE_MODEL = {"encoder": "sam-vit-h", "mixer": "query", "language_model": "mistral-7b", "lora": 4}


@pytest.mark.parametrize("model", ["sca-tiny", LARGE_MODEL])
def test_check_recipe_downloads_no_weights(model, monkeypatch):
    monkeypatch.setattr("sca.io.hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    check_recipe(Recipe.from_dict("mine", {"model": model, **DATA_TABLE}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"lr_multipliers": {"nothing": 1.0}}}, "nothing"),
        ({"train": {"feature_cache_dir": "features"}}, "feature_cache_dir"),
        ({"train": {"report_to": "nobody"}}, "unknown integration 'nobody'"),
        (
            {"model": {**LARGE_MODEL, "language_model": {"name": "hf", "config": {"model_type": "gpt2"}}}},
            "no tokenizer",
        ),
    ],
)
def test_check_recipe_rejects_invalid_options(change, message):
    with pytest.raises(RegistryError, match=message):
        check_recipe(Recipe.from_dict("mine", {"model": "sca-tiny", **DATA_TABLE, **change}))
