"""Assignments and overrides that change specs and recipes."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sca_registry import RegistryError
from sca_registry.overrides import apply_overrides, parse_assignment, parse_assignments
from sca_registry.spec import ComponentSpec

RECIPE = {
    "model": {
        "encoder": "tiny-vit",
        "mixer": {"name": "query", "depth": 12, "num_heads": 8},
        "language_model": "tiny-gpt2",
    },
    "data": {"train": "scenes", "val": {"name": "coco", "root": "here"}},
    "train": {"steps": 100, "optimizer": {"rate": 0.1}},
    "loss": {"caption": 1.0, "mask": 1.0},
}

text_strategy = st.text(st.characters(exclude_categories=("Cc", "Cs")))
scalar_strategy = (
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text_strategy
)
value_strategy = scalar_strategy | st.lists(scalar_strategy, max_size=3)
key_strategy = st.text(string.ascii_lowercase + "_", min_size=1).filter(lambda word: word != "name")


def format_toml(value) -> str:
    """JSON writes these values as TOML does."""
    return json.dumps(value, ensure_ascii=False)


@given(value_strategy)
def test_parse_assignment_reads_any_toml_value(value):
    assert parse_assignment(f"a={format_toml(value)}") == (("a",), value)


@given(st.from_regex(r"[a-z][a-z0-9._-]*", fullmatch=True).filter(lambda w: w not in ("true", "false", "nan", "inf")))
def test_parse_assignment_reads_unquoted_names_as_strings(name):
    assert parse_assignment(f"mixer={name}") == (("mixer",), name)


@settings(deadline=None)  # the first example imports the mixer, whose options determine which values are text
@given(key_strategy, value_strategy)
def test_apply_overrides_sets_an_option_and_changes_nothing_else(option, value):
    original_json = json.dumps(RECIPE)
    changed_recipe = apply_overrides(RECIPE, [f"mixer.{option}={format_toml(value)}"])
    assert changed_recipe["model"]["mixer"].pop(option) == value
    expected = json.loads(original_json)
    expected["model"]["mixer"].pop(option, None)
    assert changed_recipe == expected
    assert json.dumps(RECIPE) == original_json


@given(st.text(max_size=30))
def test_parse_assignment_parses_or_rejects_any_text(assignment):
    try:
        path, _ = parse_assignment(assignment)
    except RegistryError:
        return
    assert all(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("1e-4", 1e-4),
        ("true", True),
        ("[1, 'a']", [1, "a"]),
        ("{ name = 'query', depth = 2 }", {"name": "query", "depth": 2}),
        ('"a # b"', "a # b"),
        ("roi-pool", "roi-pool"),
        ("shade:mean", "shade:mean"),
        ("facebook/opt-125m", "facebook/opt-125m"),
        ("/data/coco", "/data/coco"),
        ("~/coco", "~/coco"),
        ("../coco", "../coco"),
        (" spaced ", "spaced"),
    ],
)
def test_parse_assignment_reads_toml_values_and_unquoted_strings(text, value):
    assert parse_assignment(f"key={text}") == (("key",), value)


@pytest.mark.parametrize(
    "assignment",
    [
        "mixer",
        "=2",
        "a.=2",
        ".a=2",
        "a b=2",
        "a=",
        "a=b c",
        "a=2x",
        "a=1 # more",
        "a=1, b=2",
        "a=1}\nb={c=2",
        "a=[1",
        "a='",
        "a=True",
    ],
)
def test_parse_assignment_rejects_ambiguous_text(assignment):
    with pytest.raises(RegistryError):
        parse_assignment(assignment)


def test_apply_overrides_drops_the_options_of_a_replaced_component():
    assert apply_overrides(RECIPE, ["mixer=roi-pool"])["model"]["mixer"] == "roi-pool"
    assert apply_overrides(RECIPE, ["mixer=roi-pool", "mixer.depth=2"])["model"]["mixer"] == {
        "name": "roi-pool",
        "depth": 2,
    }
    assert apply_overrides(RECIPE, ["data.val=scenes"])["data"]["val"] == "scenes"


def test_apply_overrides_accepts_component_keys_without_the_model_prefix():
    for assignment in ("mixer.depth=2", "lora=8", "language-model=x", "projection.norm=pre"):
        assert apply_overrides(RECIPE, [assignment]) == apply_overrides(RECIPE, [f"model.{assignment}"])


def test_apply_overrides_adds_options_to_a_component_given_by_name():
    assert apply_overrides(RECIPE, ["encoder.image_size=64"])["model"]["encoder"] == {
        "name": "tiny-vit",
        "image_size": 64,
    }
    assert apply_overrides(RECIPE, ["data.train.image_size=64"])["data"]["train"] == {
        "name": "scenes",
        "image_size": 64,
    }


def test_apply_overrides_sets_fields_of_recipe_tables():
    changed_recipe = apply_overrides(RECIPE, ["train.steps=5", "train.optimizer.rate=1", "loss.mask=0.5"])
    assert changed_recipe["train"] == {"steps": 5, "optimizer": {"rate": 1}}
    assert changed_recipe["loss"] == {"caption": 1.0, "mask": 0.5}


def test_apply_overrides_replaces_a_nested_table_entirely():
    changed_recipe = apply_overrides(RECIPE, ["train.optimizer={name='lion', rate=2}"])
    assert changed_recipe["train"]["optimizer"] == {"name": "lion", "rate": 2}
    assert changed_recipe["train"]["steps"] == 100


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mixr.depth=2", "Did you mean 'mixer'"),
        ("model.mixr=x", "Did you mean 'mixer'"),
        ("train.stpes=2", "Did you mean 'steps'"),
        ("train.optimizer.rat=2", "unknown key 'rat' in train.optimizer. Did you mean 'rate'"),
        ("trian.steps=2", "Did you mean 'train'"),
        ("train=2", "train is a table; set one of its keys: train.steps, train.optimizer"),
        ("model=x", "model is a table"),
        ("train.steps.x=2", "steps is 100"),
    ],
)
def test_apply_overrides_suggests_the_right_key(assignment, message):
    with pytest.raises(RegistryError, match=message):
        apply_overrides(RECIPE, [assignment])


TEXT_VALUES = [
    ".",
    "..",
    "~",
    "~/x",
    "2024",
    "0123",
    "1_000",
    "1e3",
    "1.50",
    "true",
    "2024-01-01",
    "a#b",
    "#",
    "my photos",
    "фото",
]
TEXT_VALUES += ["写真/a b", "x = y", "a, b", "nan", "5x", "1 # more", "-", "*.png", "C:\\x"]


@given(st.sampled_from(TEXT_VALUES) | text_strategy.filter(lambda value: value.strip() and value.isprintable()))
def test_parse_assignment_reads_text_options_verbatim(value):
    value = value.strip()
    if value[0] in "'\"[{":
        return
    assert parse_assignment(f"root={value}", lambda path: path == ("root",)) == (("root",), value)
    assert parse_assignments([f"root={value}"], lambda option: option == "root") == {"root": value}
    assert parse_assignment(f"root={format_toml(value)}", lambda path: True) == (("root",), value)


@pytest.mark.parametrize(("text", "value"), [("[1, 'a']", [1, "a"]), ("{a = 1}", {"a": 1}), ("''", "")])
def test_parse_assignment_reads_quoted_text_lists_and_tables_as_toml(text, value):
    assert parse_assignment(f"root={text}", lambda path: True) == (("root",), value)


@pytest.mark.parametrize("text", ["", "'", '"a', "[1", "{a"])
def test_parse_assignment_rejects_broken_toml_for_text_options(text):
    with pytest.raises(RegistryError, match="is not valid TOML"):
        parse_assignment(f"root={text}", lambda path: True)


@pytest.mark.parametrize("name", [".", "..", "фото", "写真"])
def test_parse_assignment_needs_no_quotes_for_paths_and_any_alphabet(name):
    assert parse_assignment(f"key={name}") == (("key",), name)


def test_apply_overrides_reads_text_options_verbatim():
    recipe = {
        "data": {"own": {"name": "coco-json", "annotations": "a.json", "image_root": "x"}},
        "train": {"steps": 100, "feature_cache_dir": ""},
        "validate": {"dataset": {"name": "jsonl", "file": "a.jsonl"}},
    }
    changed_recipe = apply_overrides(
        recipe,
        [
            *(
                "data.own.image_root=1_000",
                "data.own.annotations=2024",
                "data.own.max_bad_records=1_000",
                "data.own.weight=2",
            ),
            *("train.steps=1_000", "train.feature_cache_dir=0123", "validate.dataset.image_root=my photos"),
        ],
    )
    assert changed_recipe["data"]["own"] == {
        **{"name": "coco-json", "annotations": "2024", "image_root": "1_000"},
        **{"max_bad_records": 1000, "weight": 2},
    }
    assert changed_recipe["train"] == {"steps": 1000, "feature_cache_dir": "0123"}
    assert changed_recipe["validate"]["dataset"]["image_root"] == "my photos"


def test_part_parse_reads_text_options_verbatim():
    text = "boxes-from-coco annotations=2024"
    assert ComponentSpec.parse(text, "--proposer", "proposers").options == {"annotations": "2024"}
    assert ComponentSpec.parse(text).options == {"annotations": 2024}
