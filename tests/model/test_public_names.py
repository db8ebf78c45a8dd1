"""Public names of `sca`: each resolves to its object in any import order."""

import copy
import traceback
import types

import pytest

import sca
import sca.checkpoints.load
import sca.checkpoints.native
import sca.inference.predictor


@pytest.fixture(scope="module")
def model():
    return sca.build(sca.ModelSpec.parse("tiny-vit+query+tiny-gpt2"), device="meta")


def test_public_names_are_not_shadowed_by_modules():
    public_objects = {name: getattr(sca, name) for name in sca.__all__ for _ in range(2)}
    assert not [name for name, value in public_objects.items() if isinstance(value, types.ModuleType)]
    assert sca.build(sca.ModelSpec.parse("tiny-vit+query+tiny-gpt2"), device="meta").task_tokens.is_meta


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("create_model", "; use sca.compose"),
        ("from_pretrained", "; use sca.load"),
        ("SCAModel", "; use sca.load"),
        ("AutoModel", "; use sca.load"),
        ("SamPredictor", "; use sca.Predictor"),
        ("SAM2ImagePredictor", "; use sca.Predictor"),
        ("SamAutomaticMaskGenerator", "; use sca.caption_everything"),
        ("AutomaticMaskGenerator", "; use sca.caption_everything"),
        ("Trainer", "; use sca.train"),
        ("TrainingArguments", "; use sca.train"),
        ("list_models", "; use `sca list`"),
        ("register_encoder", '; use import sca_registry and @sca_registry.encoders.register("name")'),
        ("register_model", '; use import sca_registry and @sca_registry.encoders.register("name")'),
        ("register_language_model", '; use import sca_registry and @sca_registry.language_models.register("name")'),
        ("Predicter", ". Did you mean 'Predictor'?"),
        ("captioneverything", ". Did you mean 'caption_everything'?"),
        ("unrelated", ""),
        ("__wrapped__", ""),
    ],
)
def test_unknown_name_raises_attribute_error_with_what_to_use(name, hint):
    assert not hasattr(sca, name)
    with pytest.raises(AttributeError) as caught:
        getattr(sca, name)
    message = f"module 'sca' has no attribute {name!r}{hint}"
    assert traceback.format_exception_only(caught.value) == [f"AttributeError: {message}\n"]  # one suggestion


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("push_to_hub", "; use sca.save(model, FOLDER), then `sca push FOLDER OWNER/NAME`"),
        ("save_pretrained", "; use sca.save(model, FOLDER)"),
        ("from_pretrained", "; use sca.load(NAME)"),
        ("predict", "; use sca.Predictor(model)"),
        ("set_image", "; use sca.Predictor(model)"),
        ("unrelated", ""),
    ],
)
def test_model_names_what_to_use_for_methods_of_other_packages(model, name, hint):
    assert not hasattr(model, name)
    with pytest.raises(AttributeError) as caught:
        getattr(model, name)
    assert str(caught.value) == f"'SegmentCaptioner' object has no attribute {name!r}{hint}"


def test_model_attributes_work_as_those_of_any_module(model):
    assert copy.deepcopy(model).mixer is not model.mixer
    assert model.get_submodule("mixer") is model.mixer
    with pytest.raises(AttributeError, match="push_to_hub"):
        model.mixer.push_to_hub  # noqa: B018
