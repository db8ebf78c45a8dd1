"""Errors of the Python API: one line with the fix."""

import inspect

import pytest
import torch
from peft import LoraConfig
from sca_registry import mixers

import sca
from sca.mixers.query import QueryMixer

COMPONENT_NAMES = ("tiny-vit", "query", "tiny-gpt2")


@pytest.fixture(scope="module")
def model():
    return sca.load("sca-tiny")


def assert_one_line_error(function, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        function()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half16"}, "unknown precision 'half16'. Choose from: float32, bfloat16, float16"),
        ({"precision": torch.int64}, "unknown precision 'int64'"),
        ({"device": "gpu"}, "device 'gpu' is not available .* Did you mean 'cuda'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"device": None}, "device 'None' is not available"),
    ],
)
@pytest.mark.parametrize("load", [sca.load, sca.load_captioner])
def test_load_rejects_unknown_devices_and_precisions(load, options, message):
    assert_one_line_error(lambda: load("sca-tiny", **options), message)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_compose_and_captioners_reject_unknown_devices(device):
    assert_one_line_error(lambda: sca.compose(*COMPONENT_NAMES, device=device), f"device '{device}' is not available")
    assert_one_line_error(lambda: sca.load_captioner("blip-base", device=device), f"device '{device}' is not available")


def test_load_and_save_accept_names_of_dtypes(model, tmp_path):
    assert sca.load("sca-tiny", precision="float16").task_tokens.dtype == torch.float16
    sca.save(model, tmp_path / "model", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"unknown dtype 'f16'\. Did you mean 'float16'"):
        sca.save(model, tmp_path / "other", dtype="f16")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "a+b+c",
            r"'a\+b\+c' is a combination of components whose mixer is untrained; build the model with "
            r"sca.compose\('a', 'b', 'c'\), or pass",
        ),
        ("sam-vit-b+blip-base", r"names an encoder and a captioner; use sca.load_captioner\('sam-vit-b\+blip-base'\)"),
        (5, "the model is of type int; pass a model name, a folder or a Hub id"),
        (None, "the model is of type NoneType; pass a model name"),
        ("runs/a+b/model", "no model or folder named 'runs/a\\+b/model'"),
    ],
)
def test_load_rejects_sources_that_are_not_checkpoints(source, message):
    assert_one_line_error(lambda: sca.load(source), message)


def test_save_and_build_reject_wrong_argument_types(model, tmp_path):
    assert_one_line_error(
        lambda: sca.save(sca.Predictor(model), tmp_path), "type Predictor cannot be saved; pass a model"
    )
    assert_one_line_error(
        lambda: sca.build("a+b+c"), r"the spec is of type str; pass an sca.ModelSpec, such as sca.ModelSpec.parse"
    )
    assert_one_line_error(lambda: sca.build(model), "the spec is of type SegmentCaptioner; pass an sca.ModelSpec")


class UnregisteredMixer(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("components", "fields", "message"),
    [
        (("query", "tiny-vit", "tiny-gpt2"), {}, r"no encoders named 'query'\. It is the name of a mixer\."),
        (("tiny-vit", "tiny-gpt2", "query"), {}, r"no mixers named 'tiny-gpt2'\. It is the name of a language model\."),
        (("tiny-vit", "query", "openai-community/gpt2"), {}, r"Did you mean 'gpt2'\?"),
        (("tiny-vit", "query", "facebook/opt-1.3b"), {}, r"use 'hf' with the option weights='facebook/opt-1\.3b'"),
        (("tiny-vit", QueryMixer, "tiny-gpt2"), {}, "the mixer is QueryMixer; pass its name, 'query'"),
        (("tiny-vit", UnregisteredMixer, "tiny-gpt2"), {}, r"register it with @sca_registry\.mixers\('NAME'\)"),
        (
            ("tiny-vit", UnregisteredMixer(), "tiny-gpt2"),
            {},
            r"the mixer is of type UnregisteredMixer; pass its name; register",
        ),
        (COMPONENT_NAMES, {"lora": {"lora_alpha": 8}}, r'the peft names lora_alpha; give lora=\{"alpha": 8\}, or on'),
        (
            COMPONENT_NAMES,
            {"lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}},
            r'names r and lora_alpha; give lora=\{"rank": 8, "alpha": 16, "target_modules": \["q_proj"\]\}, or on the '
            r'command line lora\.rank=8 lora\.alpha=16 lora\.target_modules=\["q_proj"\]$',
        ),
        (COMPONENT_NAMES, {"lora": {"r": 8, "bias": "none"}}, "unknown option lora.r. Did you mean 'rank'"),
        (
            COMPONENT_NAMES,
            {"lora": LoraConfig(r=8, lora_alpha=16)},
            r'^lora is of type LoraConfig; give lora=\{"rank": 8, "alpha": 16\}, or on the command line',
        ),
        (
            COMPONENT_NAMES,
            {"lora": LoraConfig(lora_dropout=0.1, target_modules=["v", "q"])},
            r'"dropout": 0\.1, "target_modules": \["q", "v"\]\}',
        ),
        (COMPONENT_NAMES, {"lora": {"targets": ["q"]}}, "Did you mean 'target_modules'"),
        (
            COMPONENT_NAMES,
            {"lora": "8"},
            "lora is '8'; expected a rank, such as lora=8, or a dict or table of rank, alpha",
        ),
        (COMPONENT_NAMES, {"lora": 8.5}, "lora is 8.5; expected a rank"),
        (COMPONENT_NAMES, {"weights": "model.safetensors"}, "weights must be True or False, not 'model.safetensors'"),
        (
            ({"name": "tiny-vit", "image_size": "64"}, *COMPONENT_NAMES[1:]),
            {},
            "image_size is '64'; expected an integer",
        ),
        ((*COMPONENT_NAMES[:2], {"name": "hf", "weights": 5}), {}, "weights is 5; expected a string"),
    ],
)
def test_compose_error_suggests_a_fix(components, fields, message):
    assert_one_line_error(lambda: sca.compose(*components, **fields), message)


def test_registry_error_names_the_kind_of_a_known_component():
    assert_one_line_error(
        lambda: mixers.get("tiny-vit"), r"no mixers named 'tiny-vit'\. It is the name of an encoder\."
    )


MODEL_TABLE = {"encoder": "tiny-vit", "mixer": "query", "language_model": "tiny-gpt2"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "load",
            {"source": "sca-tiny", "torch_dtype": "float16"},
            "no argument 'torch_dtype'. Did you mean 'precision'",
        ),
        ("load", {"pretrained_model_name_or_path": "sca-tiny"}, "Did you mean 'source'"),
        ("save", {"save_directory": "out"}, "Did you mean 'folder'"),
        ("build", {"specs": None}, "Did you mean 'spec'"),
        ("compose", {**MODEL_TABLE, "seed": 3}, r"compose\(\) has no argument 'seed'"),
        ("compose", {**MODEL_TABLE, "trainables": "mixer"}, "Did you mean 'trainable'"),
        ("compose", {"image_encoder": "tiny-vit"}, "Did you mean 'encoder'"),
        ("compose", {"llm": "gpt2"}, "Did you mean 'language_model'"),
        ("compose", {**MODEL_TABLE, "pretrained": True}, "Did you mean 'weights'"),
        ("compose", {**MODEL_TABLE, "lora_config": None}, r'Use lora=8 for rank 8, or lora=\{"rank": 8, "alpha": 16\}'),
        ("compose", {**MODEL_TABLE, "peft_config": None}, "Use lora=8"),
        ("compose", {**MODEL_TABLE, "lora_r": 8}, "Use lora=8"),
        (
            "compose",
            {"image_encoder": "a", "llm": "b"},
            "arguments 'image_encoder' and 'llm'. For 'image_encoder': Did",
        ),
        ("evaluate", {"prompts": "box"}, "Did you mean 'prompting'"),
        ("train", {"recipe": "sca-tiny", "change": []}, "Did you mean 'changes'"),
        ("open_image", {"source": "a.png"}, r"open_image\(\) has no argument 'source'"),
        ("caption_everything", {"point_per_side": 3}, "Did you mean 'points_per_side'"),
    ],
)
def test_function_rejects_unknown_arguments_with_the_closest_name(name, arguments, message):
    with pytest.raises(TypeError, match=message):
        getattr(sca, name)(**arguments)


@pytest.mark.parametrize(
    "name", ["build", "caption_everything", "compose", "evaluate", "load", "open_image", "save", "train"]
)
def test_function_keeps_its_signature_and_docstring(name):
    function = getattr(sca, name)
    assert function.__name__ == name
    assert "Raises:" in function.__doc__
    assert "TypeError: Unknown keyword argument; the message suggests the closest one." in function.__doc__
    assert "args" not in inspect.signature(function).parameters


def test_compose_accepts_the_table_of_a_spec():
    spec = sca.ModelSpec.from_dict(MODEL_TABLE)
    assert sca.compose(**spec.to_dict(), device="meta").spec.to_dict()["task_tokens"] == spec.task_tokens


def test_load_captioner_suggests_arguments_and_options():
    assert_one_line_error(lambda: sca.load_captioner("sca-tiny", torch_dtype="float16"), "Did you mean 'precision'")
    assert_one_line_error(lambda: sca.load_captioner("sca-tiny", allow_externals=True), "Did you mean 'allow_external'")


@pytest.mark.parametrize("source", ["sca-tiny device=cuda", "blip-base device=cuda", {"name": "crop", "device": "cpu"}])
def test_load_captioner_rejects_its_own_arguments_among_the_options_of_a_source(source):
    message = (
        r"device is not an option of '[\w-]+'; pass it separately: device=\.\.\. in Python, --device on the command"
    )
    assert_one_line_error(lambda: sca.load_captioner(source), message)
