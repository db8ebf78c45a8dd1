"""The sizes of tiny built-in components: one data file, complete and without stale names."""

import pytest
from sca_registry.cards import read_builtin_cards
from sca_registry.contracts import COMPONENT_KINDS

from sca.testing import tiny

KINDS_WITH_PARAMETERS = (
    "encoders",
    "segmenters",
    "mixers",
    "language_models",
    "captioners",
    "proposers",
)  # kinds that have parameters
COMPONENTS_WITHOUT_SIZES = {
    "segmenters": {"box"},
    "mixers": {"roi-pool"},
    "language_models": {"gguf"},
    "proposers": {"boxes-from-coco"},
    "captioners": {"openai"},
}  # no sizes, or those of a file or a server
OTHER_COMPONENTS = {  # that have an option which makes them quick, or one that is required
    "datasets": {"scenes", "referring-scenes"},
    "metrics": {"uniqueness"},
}


@pytest.mark.parametrize("kind", COMPONENT_KINDS)
def test_tiny_options_exist_for_exactly_the_components_that_need_them(kind):
    expected_names = (
        {*read_builtin_cards(kind)} - COMPONENTS_WITHOUT_SIZES.get(kind, set())
        if kind in KINDS_WITH_PARAMETERS
        else OTHER_COMPONENTS.get(kind, set())
    )
    assert {*tiny._read_builtin_options()[kind]} == expected_names
    assert not [card.name for card in read_builtin_cards(kind).values() if card.tiny_options]


def test_tiny_options_of_a_plugin_come_from_its_card(tmp_path, monkeypatch):
    import sca_registry

    dist_info = tmp_path / "shade-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: shade\nVersion: 1.0\n")
    (dist_info / "entry_points.txt").write_text("[sca_mixers]\ncards = shade:mixers.toml\n")
    (tmp_path / "shade").mkdir()
    (tmp_path / "shade/__init__.py").touch()
    cards = '[shade]\nfactory = "shade:Shade"\ntiny_options = { depth = 1 }\n[query]\nfactory = "shade:Query"\n'
    (tmp_path / "shade/mixers.toml").write_text(cards)
    monkeypatch.syspath_prepend(tmp_path)
    sca_registry.refresh_plugins()
    try:
        assert tiny.get_tiny_options("mixer", "shade") == {"depth": 1}
        assert tiny.get_tiny_options("mixer", "shade:query") == {}
        sizes = tiny.get_tiny_options("mixer", "query")
        assert sizes == tiny.get_tiny_options("mixers", "segment-caption-anything:query") != {}
    finally:
        monkeypatch.undo()
        sca_registry.refresh_plugins()
