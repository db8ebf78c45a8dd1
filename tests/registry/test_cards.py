"""The built-in cards tell the truth, as far as it can be told without building anything."""

from importlib.resources import files
from itertools import chain

import pytest
from sca_registry import REGISTRIES
from sca_registry.cards import FACTORY_PATTERN, read_builtin_cards
from sca_registry.contracts import COMPONENT_KINDS

CARDS = [(kind, card) for kind in COMPONENT_KINDS for card in read_builtin_cards(kind).values()]
each_card = pytest.mark.parametrize(("kind", "card"), CARDS, ids=[f"{kind}:{card.name}" for kind, card in CARDS])


@each_card
def test_a_card_says_what_it_is_where_it_comes_from_and_on_what_terms(kind, card):
    assert card.summary.endswith(".")
    assert "\n" not in card.summary
    assert card.source
    assert card.license


@each_card
def test_the_factory_of_a_card_is_there(kind, card):
    assert FACTORY_PATTERN.fullmatch(card.factory)
    module, _, attribute = card.factory.partition(":")
    package, *rest = module.split(".")
    source = files(package).joinpath(*rest[:-1], f"{rest[-1]}.py").read_text("utf-8")
    assert f"class {attribute}" in source or f"def {attribute}" in source


@each_card
def test_a_segmenter_says_what_it_gives_and_a_mixer_what_it_needs(kind, card):
    things = {"masks", "boxes", "grid"}
    assert {*(card.provides or ()), *(card.requires or ()), *chain(*card.option_requires.values())} <= things
    assert kind != "segmenters" or card.provides is not None
    assert kind not in ("segmenters", "mixers") or card.requires is not None


@each_card
def test_an_extra_of_a_card_is_one_that_can_be_installed(kind, card):
    from importlib.metadata import metadata

    extras = metadata("segment-caption-anything").get_all("Provides-Extra") or []
    assert not card.extra or card.extra in extras


def test_every_card_file_belongs_to_a_kind():
    stems = {file.name.removesuffix(".toml") for file in (files("sca_registry") / "cards").iterdir()}
    assert stems <= set(REGISTRIES)
