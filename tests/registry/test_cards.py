"""The built-in cards are correct, as far as this can be tested without building components."""

from importlib.resources import files
from itertools import chain

import pytest
from sca_registry import REGISTRIES
from sca_registry.cards import FACTORY_PATTERN, read_builtin_cards
from sca_registry.contracts import COMPONENT_KINDS

BUILTIN_CARDS = [(kind, card) for kind in COMPONENT_KINDS for card in read_builtin_cards(kind).values()]
parametrize_cards = pytest.mark.parametrize(
    ("kind", "card"), BUILTIN_CARDS, ids=[f"{kind}:{card.name}" for kind, card in BUILTIN_CARDS]
)


@parametrize_cards
def test_card_states_summary_source_and_license(kind, card):
    assert card.summary.endswith(".")
    assert "\n" not in card.summary
    assert card.source
    assert card.license


@parametrize_cards
def test_card_factory_exists_in_its_module(kind, card):
    assert FACTORY_PATTERN.fullmatch(card.factory)
    module, _, attribute = card.factory.partition(":")
    package, *rest = module.split(".")
    source = files(package).joinpath(*rest[:-1], f"{rest[-1]}.py").read_text("utf-8")
    assert f"class {attribute}" in source or f"def {attribute}" in source


@parametrize_cards
def test_card_declares_segmenter_outputs_and_mixer_needs(kind, card):
    known_outputs = {"masks", "boxes", "grid"}
    assert {*(card.provides or ()), *(card.requires or ()), *chain(*card.option_requires.values())} <= known_outputs
    assert kind != "segmenters" or card.provides is not None
    assert kind not in ("segmenters", "mixers") or card.requires is not None


@parametrize_cards
def test_card_extra_is_an_extra_of_the_distribution(kind, card):
    from importlib.metadata import metadata

    extras = metadata("segment-caption-anything").get_all("Provides-Extra") or []
    assert not card.extra or card.extra in extras


def test_card_files_are_named_after_registered_kinds():
    stems = {file.name.removesuffix(".toml") for file in (files("sca_registry") / "cards").iterdir()}
    assert stems <= set(REGISTRIES)
