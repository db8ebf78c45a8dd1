"""A model spec survives writing and reading, and refuses what cannot work before anything is built."""

import contextlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sca_registry import RegistryError
from sca_registry.compatibility import check_compatible
from sca_registry.spec import ComponentSpec, ModelSpec
from sources import MIXER

TINY = ModelSpec.parse("tiny-vit+query+tiny-gpt2")

names = st.from_regex(r"[a-z][a-z0-9-]*", fullmatch=True)
options = st.dictionaries(names.filter(lambda name: name != "name"), st.integers() | st.text() | st.booleans())
parts = st.builds(ComponentSpec, names, options)
specs = st.builds(
    ModelSpec,
    encoder=parts,
    mixer=parts,
    language_model=parts,
    segmenter=st.none() | parts,
    projection=st.fixed_dictionaries({}, optional={"type": st.sampled_from(["linear", "mlp"])}),
    task_tokens=st.integers(0, 9),
    lora=st.none() | st.integers(1, 64) | st.fixed_dictionaries({"rank": st.integers(1, 64)}),
    generation=st.fixed_dictionaries({}, optional={"num_beams": st.integers(1, 5)}),
)


def test_three_names_are_a_model():
    assert (TINY.encoder, TINY.mixer, TINY.language_model) == (
        ComponentSpec("tiny-vit"),
        ComponentSpec("query"),
        ComponentSpec("tiny-gpt2"),
    )
    assert TINY.segmenter is None
    assert TINY.lora is None
    assert TINY.task_tokens == 6
    assert TINY.trainable == ("mixer", "projection", "task_tokens", "neck", "lora")
    assert TINY.projection == {"type": "linear", "norm": "none"}
    assert TINY.generation == {"max_new_tokens": 20, "num_beams": 1}


@pytest.mark.parametrize("text", ["", "a", "a+b", "a++c", "a+b+c+d"])
def test_anything_else_is_not(text):
    with pytest.raises(RegistryError, match=r"encoder\+mixer\+language-model"):
        ModelSpec.parse(text)


@given(specs)
@pytest.mark.slow
def test_writing_and_reading_gives_the_same_spec(spec):
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_what_is_written_has_nothing_that_toml_cannot_say():
    written = TINY.apply_overrides(["lora=4"]).to_dict()
    assert None not in written.values()
    assert None not in written["lora"].values()
    assert written["format"] == 2


def test_a_spec_of_another_format_is_refused_with_the_way_out():
    with pytest.raises(RegistryError, match="pip install -U segment-caption-anything"):
        ModelSpec.from_dict({**TINY.to_dict(), "format": 3})
    with pytest.raises(RegistryError, match="spec format 1 is not supported, expected 2"):
        ModelSpec.from_dict({**TINY.to_dict(), "format": 1})


def test_spec_from_dict_accepts_a_name_for_a_component_without_options():
    mixer = {"name": "query", "depth": 2}
    table = {"encoder": "tiny-vit", "mixer": mixer, "language_model": "tiny-gpt2", "lora": 8}
    assert ModelSpec.from_dict(table) == TINY.apply_overrides(["mixer.depth=2", "lora=8"])


def test_a_number_is_short_for_a_rank():
    whole = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": None}
    assert TINY.apply_overrides(["lora=8"]).lora == whole
    assert TINY.apply_overrides(["lora=8", "lora.alpha=4"]).lora == {**whole, "alpha": 4}
    assert TINY.apply_overrides(["lora=8", "lora=0"]).lora is None


def test_overrides_edit_replace_and_leave_the_original_alone():
    changed = TINY.apply_overrides(["mixer.depth=2", "projection=mlp", "projection.norm=pre", "generation.num_beams=3"])
    assert changed.mixer == ComponentSpec("query", {"depth": 2})
    assert changed.projection == {"type": "mlp", "norm": "pre"}
    assert changed.generation == {"max_new_tokens": 20, "num_beams": 3}
    assert changed.apply_overrides(["mixer=roi-pool"]).mixer == ComponentSpec("roi-pool")
    assert changed.apply_overrides(["projection=linear"]).projection == {"type": "linear", "norm": "none"}
    assert ModelSpec.parse("tiny-vit+query+tiny-gpt2") == TINY


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("mixr=query", "Did you mean 'mixer'"),
        ("lora.rnak=2", "Did you mean 'rank'"),
        ("lora=-1", "lora.rank is -1"),
        ("lora=high", "lora is 'high'; give a rank"),
        ("projection=mpl", "Did you mean 'mlp'"),
        ("projection.nrom=pre", "Did you mean 'norm'"),
        ("projection.norm=prae", "Did you mean 'pre'"),
        ("trainable=[mixr]", "not TOML"),
        ("trainable=['mixr']", "Did you mean 'mixer'"),
        ("task_tokens=-1", "task_tokens"),
        ("task_tokens=true", "task_tokens"),
        ("generation=5", "generation"),
        ("mixer=3", "the mixer is 3"),
        ("segmenter.depth=3", "the segmenter is"),
    ],
)
def test_a_spec_with_a_mistake_is_refused_when_it_is_made(assignment, told):
    with pytest.raises(RegistryError, match=told):
        TINY.apply_overrides([assignment])


def test_a_part_left_out_is_named():
    with pytest.raises(RegistryError, match="the language model is None"):
        ModelSpec.from_dict({"encoder": "tiny-vit", "mixer": "query"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tiny-vti+query+tiny-gpt2", "no encoders named 'tiny-vti'. Did you mean 'tiny-vit'"),
        ("tiny-vit+qurey+tiny-gpt2", "no mixers named 'qurey'. Did you mean 'query'"),
        ("tiny-vit+query+tiny-gtp2", "no language models named 'tiny-gtp2'. Did you mean 'tiny-gpt2'"),
    ],
)
def test_check_finds_a_wrong_name_of_any_part(text, told):
    with pytest.raises(RegistryError, match=told):
        check_compatible(ModelSpec.parse(text))
    with pytest.raises(RegistryError, match="no segmenters named 'smam'"):
        check_compatible(TINY.apply_overrides(["segmenter=smam"]))


CARDS = """
    [masked]
    factory = "shade.parts:Mean"
    requires = ["masks"]

    [silent]
    factory = "shade.parts:Mean"
"""


@pytest.fixture
def shade(site):
    source = MIXER + "\n    class Wants(Mean):\n        requires = ('masks', 'grid')\n"
    files = {"shade/__init__.py": "", "shade/parts.py": source, "shade/mixers.toml": CARDS}
    site.install("shade", "[sca_mixers]\nlabel = shade:mixers.toml\nwants = shade.parts:Wants\n", files)


def test_check_refuses_a_mixer_on_a_segmenter_that_cannot_feed_it_and_names_both_and_the_way_out(shade):
    with pytest.raises(RegistryError) as caught:
        check_compatible(TINY.apply_overrides(["segmenter=box", "mixer=masked"]))
    told = str(caught.value)
    assert told.startswith("mixer 'masked' needs masks, but segmenter 'box' provides only boxes; use ")
    assert "segmenter=sam" in told
    assert "mixer=query" in told
    assert "shade.parts" not in sys.modules
    check_compatible(TINY.apply_overrides(["segmenter=sam", "mixer=masked"]))


def test_check_asks_the_class_where_the_card_is_silent(shade):
    with pytest.raises(RegistryError, match="mixer 'wants' needs masks and grid"):
        check_compatible(TINY.apply_overrides(["segmenter=box", "mixer=wants"]))
    check_compatible(TINY.apply_overrides(["segmenter=box", "mixer=silent"]))


def test_check_knows_what_an_option_needs():
    with pytest.raises(RegistryError, match=r"mixer\.mask_pooling=false"):
        check_compatible(TINY.apply_overrides(["segmenter=box", "mixer.mask_pooling=true"]))
    check_compatible(TINY.apply_overrides(["segmenter=sam", "mixer.mask_pooling=true"]))
    check_compatible(TINY.apply_overrides(["segmenter=box", "mixer.mask_pooling=false"]))


def test_check_asks_the_encoder_which_segmenter_it_brings(site, shade):
    brings = "class Blind:\n    default_segmenter = 'box'\n"
    site.install("blind", "[sca_encoders]\nblind = blind:Blind\n", {"blind.py": brings})
    with pytest.raises(RegistryError, match="segmenter 'box' provides only boxes"):
        check_compatible(TINY.apply_overrides(["encoder=blind", "mixer=masked"]))
    check_compatible(TINY.apply_overrides(["encoder=blind", "mixer=query"]))


WRITTEN = TINY.apply_overrides(
    ["lora=4", "encoder.image_size=64", "segmenter=sam", "everything.points_per_side=8"]
).to_dict()
PLACES = [(key,) for key in WRITTEN] + [
    (key, inner) for key, value in WRITTEN.items() if isinstance(value, dict) for inner in value
]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
@pytest.mark.parametrize("value", [None, True, -1, 1.5, float("nan"), "x", [], [[]], {}, {"a": 1}], ids=repr)
def test_a_value_of_any_kind_in_any_place_is_read_or_refused(place, value):
    table = json.loads(json.dumps(WRITTEN))
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with contextlib.suppress(RegistryError):  # anything else is a traceback for a person's mistake
        check_compatible(ModelSpec.from_dict(table))


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("lora.dropout=1.5", "lora.dropout is 1.5; give a number of at most 1"),
        ("lora.alpha=inf", "lora.alpha is inf; give a number of at least 0"),
        ("lora.alpha=nan", "lora.alpha is nan; give a number of at least 0"),
        ("everything.pred_iou_thresh=inf", "everything.pred_iou_thresh is inf; give a number of at least 0"),
        ("generation.num_beams=0", "generation.num_beams is 0; give an integer of at least 1"),
        ("generation.max_new_tokens=many", "generation.max_new_tokens is 'many'; give an integer"),
        ("generation.num_beams=60000000", "generation.num_beams is 60000000; give an integer of at most 64"),
        ("generation.max_new_tokens=60000000", "give an integer of at most 4096"),
        ("generation.num_captions=60000000", "give an integer of at most 64"),
        ("everything.crop_n_layers=60", "everything.crop_n_layers is 60; give an integer of at most 4"),
        ("everything.points_per_side=60000000", "result in more than 1,048,576 points; reduce one of them"),
        (
            "everything={points_per_side=64, crop_n_layers=4}",
            "result in more than 1,048,576 points; reduce one of them",
        ),
        ("everything.points_per_side=1.5", "everything.points_per_side is 1.5; give an integer"),
        ("everything.pred_iou_thresh=high", "everything.pred_iou_thresh is 'high'; give a number"),
        ("everything.crop_overlap_ratio=1", "everything.crop_overlap_ratio is 1; give a fraction"),
        ("everything.caption_from=boxes", "Did you mean 'box'"),
        ("lora={rank=4, alpha='x'}", "lora.alpha is 'x'; give a number"),
        ("lora={target_modules='c_attn'}", "lora.target_modules is 'c_attn'; give a list"),
        ("trainable=3", "trainable is 3; give a list of names"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told(assignment, told):
    with pytest.raises(RegistryError, match=told):
        TINY.apply_overrides([assignment])
