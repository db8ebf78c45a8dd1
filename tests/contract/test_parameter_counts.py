"""Parameter counts in cards and in the zoo equal those of the built models."""

import pytest
import sca_registry
import torch
from sca_registry import zoo

import sca
from sca.builder import build
from sca.checkpoints.pam import build_published_pam_spec

COMPONENTS_WITH_PARAMETERS = [
    (kind, name)
    for kind in ("encoders", "language_models", "proposers")
    for name in sca_registry.get_registry(kind).list_names()
    if sca_registry.get_registry(kind).get_card(name).parameters
]


def count_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("kind", "name"), COMPONENTS_WITH_PARAMETERS)
@pytest.mark.slow
def test_card_parameters_match_the_built_component(kind, name):
    registry = sca_registry.get_registry(kind)
    meta_options = {"pretrained": False, "device": "meta", "text": ["car"]}
    options = {key: meta_options[key] for key in meta_options.keys() & registry.load_entry(name).options.keys()}
    with torch.device("meta"):
        component = registry.build(name, **options)
    assert count_parameters(getattr(component, "model", component)) == registry.get_card(name).parameters


def test_published_model_has_the_parameter_counts_of_the_paper():
    """Table of the paper: a text mixer of 19.1 M, 19.4 M trainable parameters with GPT-2 large."""
    report = sca.compose("sam-vit-h", "query", "gpt2-large", device="meta").summarize_parameters()
    counts = {line[:15].strip(): int(line[15:].split()[0].replace(",", "")) for line in report.splitlines()}
    assert counts["mixer"] == 19_086_464 + 8 * 256  # twelve layers and eight queries
    assert report.endswith("19,432,832 trainable")


@pytest.mark.parametrize("name", zoo.list_names())
@pytest.mark.slow
def test_zoo_parameters_match_the_built_model(name):
    entry = zoo.get_entry(name)
    if entry.folder:
        model = sca.load(name)
    elif entry.config:
        model = build(build_published_pam_spec(entry.config), "meta")
    else:  # a published model: a SAM ViT-H, the mixer of the paper, and one of two language models
        language_model = "open-llama-3b" if "llama" in name else "gpt2-large"
        model = sca.compose("sam-vit-h", "query", language_model, device="meta")
    assert count_parameters(model) == entry.parameters


def test_registries_list_enough_components_with_complete_cards():
    for kind, minimum in (("encoders", 40), ("mixers", 7), ("language_models", 14)):
        registry = sca_registry.get_registry(kind)
        assert len(registry.list_names()) >= minimum
        for name in registry.list_names():
            card = registry.get_card(name)
            assert card.summary.endswith(".")
            assert card.source
            assert card.license
