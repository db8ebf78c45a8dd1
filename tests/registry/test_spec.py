"""Model specs: round trips through files, and validation before any component is built."""

import contextlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_sources import MIXER_SOURCE
from sca_registry import RegistryError
from sca_registry.compatibility import check_compatible
from sca_registry.spec import ComponentSpec, ModelSpec, ZoomOptions

TINY_SPEC = ModelSpec.parse("tiny-vit+query+tiny-gpt2")

name_strategy = st.from_regex(r"[a-z][a-z0-9-]*", fullmatch=True)
option_strategy = st.dictionaries(
    name_strategy.filter(lambda name: name != "name"), st.integers() | st.text() | st.booleans()
)
part_strategy = st.builds(ComponentSpec, name_strategy, option_strategy)
spec_strategy = st.builds(
    ModelSpec,
    encoder=part_strategy,
    mixer=part_strategy,
    language_model=part_strategy,
    segmenter=st.none() | part_strategy,
    projection=st.fixed_dictionaries({}, optional={"type": st.sampled_from(["linear", "mlp"])}),
    task_tokens=st.integers(0, 9),
    lora=st.none() | st.integers(1, 64) | st.fixed_dictionaries({"rank": st.integers(1, 64)}),
    generation=st.fixed_dictionaries({}, optional={"num_beams": st.integers(1, 5)}),
)


def test_model_spec_parse_fills_in_defaults_for_three_names():
    assert (TINY_SPEC.encoder, TINY_SPEC.mixer, TINY_SPEC.language_model) == (
        ComponentSpec("tiny-vit"),
        ComponentSpec("query"),
        ComponentSpec("tiny-gpt2"),
    )
    assert TINY_SPEC.segmenter is None
    assert TINY_SPEC.lora is None
    assert TINY_SPEC.task_tokens == 6
    assert TINY_SPEC.trainable == ("mixer", "projection", "task_tokens", "neck", "lora")
    assert TINY_SPEC.projection == {"type": "linear", "norm": "none"}
    assert TINY_SPEC.generation == {"max_new_tokens": 20, "num_beams": 1}


@pytest.mark.parametrize("text", ["", "a", "a+b", "a++c", "a+b+c+d"])
def test_model_spec_parse_rejects_anything_but_three_names(text):
    with pytest.raises(RegistryError, match=r"encoder\+mixer\+language-model"):
        ModelSpec.parse(text)


@given(spec_strategy)
@pytest.mark.slow
def test_model_spec_survives_a_json_round_trip(spec):
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_model_spec_to_dict_contains_no_none():
    table = TINY_SPEC.apply_overrides(["lora=4"]).to_dict()
    assert None not in table.values()
    assert None not in table["lora"].values()
    assert table["format"] == 2


def test_model_spec_rejects_other_format_versions_with_a_fix():
    with pytest.raises(RegistryError, match="pip install -U segment-caption-anything"):
        ModelSpec.from_dict({**TINY_SPEC.to_dict(), "format": 3})
    with pytest.raises(RegistryError, match="spec format 1 is not supported, expected 2"):
        ModelSpec.from_dict({**TINY_SPEC.to_dict(), "format": 1})


def test_model_spec_from_dict_accepts_a_name_for_a_component_without_options():
    mixer = {"name": "query", "depth": 2}
    table = {"encoder": "tiny-vit", "mixer": mixer, "language_model": "tiny-gpt2", "lora": 8}
    assert ModelSpec.from_dict(table) == TINY_SPEC.apply_overrides(["mixer.depth=2", "lora=8"])


def test_model_spec_reads_a_lora_number_as_its_rank():
    lora = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": None}
    assert TINY_SPEC.apply_overrides(["lora=8"]).lora == lora
    assert TINY_SPEC.apply_overrides(["lora=8", "lora.alpha=4"]).lora == {**lora, "alpha": 4}
    assert TINY_SPEC.apply_overrides(["lora=8", "lora=0"]).lora is None


def test_model_spec_overrides_edit_and_replace_without_changing_the_original():
    changed_spec = TINY_SPEC.apply_overrides(
        ["mixer.depth=2", "projection=mlp", "projection.norm=pre", "generation.num_beams=3"]
    )
    assert changed_spec.mixer == ComponentSpec("query", {"depth": 2})
    assert changed_spec.projection == {"type": "mlp", "norm": "pre"}
    assert changed_spec.generation == {"max_new_tokens": 20, "num_beams": 3}
    assert changed_spec.apply_overrides(["mixer=roi-pool"]).mixer == ComponentSpec("roi-pool")
    assert changed_spec.apply_overrides(["projection=linear"]).projection == {"type": "linear", "norm": "none"}
    assert ModelSpec.parse("tiny-vit+query+tiny-gpt2") == TINY_SPEC


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mixr=query", "Did you mean 'mixer'"),
        ("lora.rnak=2", "Did you mean 'rank'"),
        ("lora=-1", "lora.rank is -1"),
        ("lora=high", "lora is 'high'; expected a rank"),
        ("projection=mpl", "Did you mean 'mlp'"),
        ("projection.nrom=pre", "Did you mean 'norm'"),
        ("projection.norm=prae", "Did you mean 'pre'"),
        ("trainable=[mixr]", "not valid TOML"),
        ("trainable=['mixr']", "Did you mean 'mixer'"),
        ("task_tokens=-1", "task_tokens"),
        ("task_tokens=true", "task_tokens"),
        ("generation=5", "generation"),
        ("mixer=3", "the mixer is 3"),
        ("segmenter.depth=3", "the segmenter is"),
    ],
)
def test_model_spec_rejects_invalid_overrides(assignment, message):
    with pytest.raises(RegistryError, match=message):
        TINY_SPEC.apply_overrides([assignment])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encoder", 'the model has no encoder; add `encoder = "sam-vit-b"` to [model]'),
        ("mixer", 'the model has no mixer; add `mixer = "query"` to [model]'),
        ("language_model", 'the model has no language model; add `language_model = "gpt2"` to [model]'),
    ],
)
def test_model_spec_names_a_missing_component(kind, message):
    table = {"encoder": "tiny-vit", "mixer": "query", "language_model": "tiny-gpt2"}
    for incomplete_table in ({**table, kind: None}, {key: table[key] for key in table.keys() - {kind}}):
        with pytest.raises(RegistryError) as caught:
            ModelSpec.from_dict(incomplete_table)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny-vti+query+tiny-gpt2", "no encoders named 'tiny-vti'. Did you mean 'tiny-vit'"),
        ("tiny-vit+qurey+tiny-gpt2", "no mixers named 'qurey'. Did you mean 'query'"),
        ("tiny-vit+query+tiny-gtp2", "no language models named 'tiny-gtp2'. Did you mean 'tiny-gpt2'"),
    ],
)
def test_check_compatible_rejects_unknown_names_of_any_component(text, message):
    with pytest.raises(RegistryError, match=message):
        check_compatible(ModelSpec.parse(text))
    with pytest.raises(RegistryError, match="no segmenters named 'smam'"):
        check_compatible(TINY_SPEC.apply_overrides(["segmenter=smam"]))


MIXER_CARDS = """
    [masked]
    factory = "shade.parts:Mean"
    requires = ["masks"]

    [silent]
    factory = "shade.parts:Mean"
"""


@pytest.fixture
def shade_plugin(plugin_site):
    source = MIXER_SOURCE + "\n    class Wants(Mean):\n        requires = ('masks', 'grid')\n"
    files = {"shade/__init__.py": "", "shade/parts.py": source, "shade/mixers.toml": MIXER_CARDS}
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nlabel = shade:mixers.toml\nwants = shade.parts:Wants\n", files
    )


def test_check_compatible_rejects_a_mixer_whose_needs_the_segmenter_does_not_provide(shade_plugin):
    with pytest.raises(RegistryError) as caught:
        check_compatible(TINY_SPEC.apply_overrides(["segmenter=box", "mixer=masked"]))
    message = str(caught.value)
    assert message.startswith("mixer 'masked' needs masks, but segmenter 'box' provides only boxes; use ")
    assert "segmenter=sam" in message
    assert "mixer=query" in message
    assert "shade.parts" not in sys.modules
    check_compatible(TINY_SPEC.apply_overrides(["segmenter=sam", "mixer=masked"]))


def test_check_compatible_reads_needs_from_the_class_if_no_card_states_them(shade_plugin):
    with pytest.raises(RegistryError, match="mixer 'wants' needs masks and grid"):
        check_compatible(TINY_SPEC.apply_overrides(["segmenter=box", "mixer=wants"]))
    check_compatible(TINY_SPEC.apply_overrides(["segmenter=box", "mixer=silent"]))


def test_check_compatible_considers_the_needs_of_options():
    with pytest.raises(RegistryError, match=r"mixer\.mask_pooling=false"):
        check_compatible(TINY_SPEC.apply_overrides(["segmenter=box", "mixer.mask_pooling=true"]))
    check_compatible(TINY_SPEC.apply_overrides(["segmenter=sam", "mixer.mask_pooling=true"]))
    check_compatible(TINY_SPEC.apply_overrides(["segmenter=box", "mixer.mask_pooling=false"]))


def test_check_compatible_uses_the_default_segmenter_of_the_encoder(plugin_site, shade_plugin):
    encoder_source = "class Blind:\n    default_segmenter = 'box'\n"
    plugin_site.install_distribution("blind", "[sca_encoders]\nblind = blind:Blind\n", {"blind.py": encoder_source})
    with pytest.raises(RegistryError, match="segmenter 'box' provides only boxes"):
        check_compatible(TINY_SPEC.apply_overrides(["encoder=blind", "mixer=masked"]))
    check_compatible(TINY_SPEC.apply_overrides(["encoder=blind", "mixer=query"]))


SPEC_TABLE = TINY_SPEC.apply_overrides(
    ["lora=4", "encoder.image_size=64", "segmenter=sam", "everything.points_per_side=8"]
).to_dict()
KEY_PATHS = [(key,) for key in SPEC_TABLE] + [
    (key, inner) for key, value in SPEC_TABLE.items() if isinstance(value, dict) for inner in value
]


@pytest.mark.parametrize("key_path", KEY_PATHS, ids=".".join)
@pytest.mark.parametrize("value", [None, True, -1, 1.5, float("nan"), "x", [], [[]], {}, {"a": 1}], ids=repr)
def test_model_spec_accepts_or_rejects_any_value_at_any_key(key_path, value):
    table = json.loads(json.dumps(SPEC_TABLE))
    parent = table
    for key in key_path[:-1]:
        parent = parent[key]
    parent[key_path[-1]] = value
    with contextlib.suppress(RegistryError):  # any other exception would be a traceback for a user error
        check_compatible(ModelSpec.from_dict(table))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lora.dropout=1.5", "lora.dropout is 1.5; expected a number of at most 1"),
        ("lora.alpha=inf", "lora.alpha is inf; expected a number of at least 0"),
        ("lora.alpha=nan", "lora.alpha is nan; expected a number of at least 0"),
        ("everything.pred_iou_thresh=inf", "everything.pred_iou_thresh is inf; expected a number of at least 0"),
        ("generation.num_beams=0", "generation.num_beams is 0; expected an integer of at least 1"),
        ("generation.max_new_tokens=many", "generation.max_new_tokens is 'many'; expected an integer"),
        ("generation.num_beams=60000000", "generation.num_beams is 60000000; expected an integer of at most 64"),
        ("generation.max_new_tokens=60000000", "expected an integer of at most 4096"),
        ("generation.num_captions=60000000", "expected an integer of at most 64"),
        ("everything.crop_n_layers=60", "everything.crop_n_layers is 60; expected an integer of at most 4"),
        ("everything.points_per_side=60000000", "result in more than 1,048,576 points; reduce one of them"),
        (
            "everything={points_per_side=64, crop_n_layers=4}",
            "result in more than 1,048,576 points; reduce one of them",
        ),
        ("everything.points_per_side=1.5", "everything.points_per_side is 1.5; expected an integer"),
        ("everything.pred_iou_thresh=high", "everything.pred_iou_thresh is 'high'; expected a number"),
        ("everything.crop_overlap_ratio=1", "everything.crop_overlap_ratio is 1; expected a fraction"),
        ("everything.caption_from=boxes", "Did you mean 'box'"),
        ("zoom.max_cells=-1", "zoom.max_cells is -1; expected a number of at least 0"),
        ("zoom.context=1", "zoom.context is 1; expected a number of at least 1.5"),
        ("zoom.max_upscale=inf", "zoom.max_upscale is inf; expected a number of at least 0"),
        ("zoom.max_cell=4", "unknown option zoom.max_cell. Did you mean 'max_cells'"),
        ("lora={rank=4, alpha='x'}", "lora.alpha is 'x'; expected a number"),
        ("lora={target_modules='c_attn'}", "lora.target_modules is 'c_attn'; expected a list"),
        ("trainable=3", "trainable is 3; expected a list of names"),
    ],
)
def test_model_spec_rejects_values_of_the_wrong_type_or_range(assignment, message):
    with pytest.raises(RegistryError, match=message):
        TINY_SPEC.apply_overrides([assignment])


def test_model_spec_stores_zoom_options_only_if_they_were_measured():
    assert "zoom" not in TINY_SPEC.to_dict()
    assert TINY_SPEC.zoom_options == ZoomOptions(max_cells=None)
    spec = TINY_SPEC.apply_overrides(["zoom={max_cells=4, context=2.0}"])
    assert spec.to_dict()["zoom"] == {"max_cells": 4, "context": 2.0}
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).zoom_options == ZoomOptions(4, 2.0)


def test_model_spec_rejects_a_number_for_keep_best_caption():
    with pytest.raises(RegistryError, match=r"zoom\.keep_best_caption is 1; expected true or false"):
        TINY_SPEC.apply_overrides(["zoom.keep_best_caption=1"])
