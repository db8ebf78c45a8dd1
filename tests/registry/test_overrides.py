"""One grammar for changing specs and recipes."""

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

text = st.text(st.characters(exclude_categories=("Cc", "Cs")))
scalars = st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text
values = scalars | st.lists(scalars, max_size=3)
words = st.text(string.ascii_lowercase + "_", min_size=1).filter(lambda word: word != "name")


def toml(value) -> str:
    """JSON writes these values as TOML does."""
    return json.dumps(value, ensure_ascii=False)


@given(values)
def test_any_value_arrives_as_it_was_written(value):
    assert parse_assignment(f"a={toml(value)}") == (("a",), value)


@given(st.from_regex(r"[a-z][a-z0-9._-]*", fullmatch=True).filter(lambda w: w not in ("true", "false", "nan", "inf")))
def test_any_name_is_a_string_without_quotes(name):
    assert parse_assignment(f"mixer={name}") == (("mixer",), name)


@settings(deadline=None)  # the first example imports the mixer, whose options tell what is text
@given(words, values)
def test_an_option_is_set_and_nothing_else_changes(option, value):
    before = json.dumps(RECIPE)
    changed = apply_overrides(RECIPE, [f"mixer.{option}={toml(value)}"])
    assert changed["model"]["mixer"].pop(option) == value
    rest = json.loads(before)
    rest["model"]["mixer"].pop(option, None)
    assert changed == rest
    assert json.dumps(RECIPE) == before


@given(st.text(max_size=30))
def test_whatever_is_written_is_read_or_refused(assignment):
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
def test_values_are_toml_and_plain_words_are_strings(text, value):
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
def test_what_can_be_read_two_ways_is_refused(assignment):
    with pytest.raises(RegistryError):
        parse_assignment(assignment)


def test_replacing_a_part_drops_its_options():
    assert apply_overrides(RECIPE, ["mixer=roi-pool"])["model"]["mixer"] == "roi-pool"
    assert apply_overrides(RECIPE, ["mixer=roi-pool", "mixer.depth=2"])["model"]["mixer"] == {
        "name": "roi-pool",
        "depth": 2,
    }
    assert apply_overrides(RECIPE, ["data.val=scenes"])["data"]["val"] == "scenes"


def test_part_names_are_short_for_the_model_s():
    for short in ("mixer.depth=2", "lora=8", "language-model=x", "projection.norm=pre"):
        assert apply_overrides(RECIPE, [short]) == apply_overrides(RECIPE, [f"model.{short}"])


def test_a_part_that_is_only_a_name_takes_options():
    assert apply_overrides(RECIPE, ["encoder.image_size=64"])["model"]["encoder"] == {
        "name": "tiny-vit",
        "image_size": 64,
    }
    assert apply_overrides(RECIPE, ["data.train.image_size=64"])["data"]["train"] == {
        "name": "scenes",
        "image_size": 64,
    }


def test_a_recipe_s_own_tables_are_set():
    changed = apply_overrides(RECIPE, ["train.steps=5", "train.optimizer.rate=1", "loss.mask=0.5"])
    assert changed["train"] == {"steps": 5, "optimizer": {"rate": 1}}
    assert changed["loss"] == {"caption": 1.0, "mask": 0.5}


def test_a_table_within_a_table_is_replaced_as_a_whole():
    changed = apply_overrides(RECIPE, ["train.optimizer={name='lion', rate=2}"])
    assert changed["train"]["optimizer"] == {"name": "lion", "rate": 2}
    assert changed["train"]["steps"] == 100


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("mixr.depth=2", "Did you mean 'mixer'"),
        ("model.mixr=x", "Did you mean 'mixer'"),
        ("train.stpes=2", "Did you mean 'steps'"),
        ("train.optimizer.rat=2", "train.optimizer has no 'rat'. Did you mean 'rate'"),
        ("trian.steps=2", "Did you mean 'train'"),
        ("train=2", "train is a table; set one of: steps, optimizer"),
        ("model=x", "model is a table"),
        ("train.steps.x=2", "steps is 100"),
    ],
)
def test_a_wrong_key_is_answered_with_the_right_one(assignment, told):
    with pytest.raises(RegistryError, match=told):
        apply_overrides(RECIPE, [assignment])


PATHS = [
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
PATHS += ["写真/a b", "x = y", "a, b", "nan", "5x", "1 # more", "-", "*.png", "C:\\x"]


@given(st.sampled_from(PATHS) | text.filter(lambda word: word.strip() and word.isprintable()))
def test_read_assignment_returns_text_where_text_is_wanted(word):
    word = word.strip()
    if word[0] in "'\"[{":
        return
    assert parse_assignment(f"root={word}", lambda path: path == ("root",)) == (("root",), word)
    assert parse_assignments([f"root={word}"], lambda option: option == "root") == {"root": word}
    assert parse_assignment(f"root={toml(word)}", lambda path: True) == (("root",), word)


@pytest.mark.parametrize(("written", "value"), [("[1, 'a']", [1, "a"]), ("{a = 1}", {"a": 1}), ("''", "")])
def test_read_assignment_reads_strings_lists_and_tables_as_toml(written, value):
    assert parse_assignment(f"root={written}", lambda path: True) == (("root",), value)


@pytest.mark.parametrize("written", ["", "'", '"a', "[1", "{a"])
def test_read_assignment_rejects_broken_toml_where_text_is_wanted(written):
    with pytest.raises(RegistryError, match="is not TOML"):
        parse_assignment(f"root={written}", lambda path: True)


@pytest.mark.parametrize("name", [".", "..", "фото", "写真"])
def test_read_assignment_needs_no_quotes_for_paths_and_any_alphabet(name):
    assert parse_assignment(f"key={name}") == (("key",), name)


def test_override_reads_text_where_the_option_is_text():
    recipe = {
        "data": {"own": {"name": "coco-json", "annotations": "a.json", "images": "x"}},
        "train": {"steps": 100, "cache_features": ""},
        "validate": {"dataset": {"name": "jsonl", "file": "a.jsonl"}},
    }
    changed = apply_overrides(
        recipe,
        [
            *("data.own.images=1_000", "data.own.annotations=2024", "data.own.max_bad=1_000", "data.own.weight=2"),
            *("train.steps=1_000", "train.cache_features=0123", "validate.dataset.images=my photos"),
        ],
    )
    assert changed["data"]["own"] == {
        **{"name": "coco-json", "annotations": "2024", "images": "1_000"},
        **{"max_bad": 1000, "weight": 2},
    }
    assert changed["train"] == {"steps": 1000, "cache_features": "0123"}
    assert changed["validate"]["dataset"]["images"] == "my photos"


def test_part_parse_reads_text_where_the_option_is_text():
    written = "boxes-from-coco annotations=2024"
    assert ComponentSpec.parse(written, "--proposer", "proposers").options == {"annotations": "2024"}
    assert ComponentSpec.parse(written).options == {"annotations": 2024}
