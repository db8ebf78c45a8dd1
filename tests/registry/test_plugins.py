"""Plugins are found by metadata and identified, and a broken one does not affect the others."""

import pytest
from plugin_sources import MIXER_SOURCE
from sca_registry import RegistryError, mixers, refresh_plugins

MIXER_CARDS = """
    [soft]
    factory = "shade.parts:Mean"
    summary = "Soft."
    source = "arXiv 0000.00000"
    license = "MIT"
    parameters = 12
    options = { depth = 5 }
    provides =  ["boxes"]

    [hard]
    factory = "shade.parts:Mean"
"""


def test_refresh_plugins_finds_a_newly_installed_plugin(plugin_site):
    assert "mean" not in mixers
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    refresh_plugins()
    assert "mean" in mixers
    assert mixers.build("mean", "segmenter", depth=3).depth == 3


def test_plugin_entry_states_its_distribution_and_version(plugin_site):
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE}, metadata="Summary: Shades.\n"
    )
    entry = mixers.load_entry("mean")
    assert (entry.distribution, entry.version, entry.factory) == ("shade", "1.0", "shade:Mean")
    assert entry.summary == "Shades."
    assert entry.options == {"depth": 1}


def test_card_file_registers_several_names_with_their_metadata(plugin_site):
    files = {"shade/__init__.py": "", "shade/parts.py": MIXER_SOURCE, "shade/mixers.toml": MIXER_CARDS}
    plugin_site.install_distribution("shade", "[sca_mixers]\nlabel = shade:mixers.toml\n", files)
    entries = {entry.name: entry for entry in mixers.list_entries()}
    assert "label" not in entries
    assert (entries["soft"].summary, entries["soft"].license, entries["soft"].parameters) == ("Soft.", "MIT", 12)
    assert mixers.get_card("soft").provides == ("boxes",)
    assert mixers.build("soft", None).depth == 5
    assert mixers.build("soft", None, depth=6).depth == 6
    assert mixers.load_entry("soft").options == {"depth": 5}
    assert mixers.build("hard", None).depth == 1


def test_plugin_with_a_builtin_name_is_reached_by_its_full_name(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nquery = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    assert {"query", "shade:query"} <= set(mixers.list_names())
    assert mixers.get_card("query").factory == "sca.mixers.query:QueryMixer"
    assert mixers.get_card("segment-caption-anything:query") == mixers.get_card("query")
    assert mixers.get("shade:query").__module__ == "shade"
    assert mixers.load_entry("shade:query").name == "shade:query"


def test_two_plugins_with_one_name_require_full_names(plugin_site):
    for name in ("shade", "light-source"):
        module = name.partition("-")[0]
        plugin_site.install_distribution(name, f"[sca_mixers]\nmean = {module}:Mean\n", {f"{module}.py": MIXER_SOURCE})
    with pytest.raises(RegistryError, match="2 mixers are named 'mean'") as caught:
        mixers.get("mean")
    assert "'shade:mean'" in str(caught.value)
    assert "'light-source:mean'" in str(caught.value)
    assert "mean" not in mixers
    assert mixers.get("shade:mean").__module__ == "shade"
    assert mixers.get("Light_Source:mean").__module__ == "light"


def test_full_plugin_name_works_without_a_conflict(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    assert "shade:mean" in mixers
    assert mixers.get("shade:mean") is mixers.get("mean")


def test_component_with_decorator_and_entry_point_is_listed_once(plugin_site, isolated_registry):
    source = "from sca_registry import mixers\n\n@mixers.register('mean')\nclass Mean: pass\n"
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": source})
    assert mixers.get("mean").__module__ == "shade"
    assert mixers.list_names().count("mean") == 1
    assert mixers.get("mean") is mixers.get("shade:mean")


BROKEN_PLUGINS = {
    "import error": ("b = b:X", "import nowhere_at_all"),
    "SystemExit": ("b = b:X", "raise SystemExit(3)"),
    "ZeroDivisionError": ("b = b:X", "1 / 0"),
    "syntax error": ("b = b:X", "def"),
    "BaseException": ("b = b:X", "class Panic(BaseException): pass\nraise Panic"),
    "missing attribute": ("b = b:X", ""),
    "missing module": ("b = nowhere_at_all:X", ""),
    "factory not callable": ("b = b:X", "X = 3"),
    "entry point without attribute": ("b = b", ""),
    "malformed entry point": ("b = %%%", ""),
    "missing card file": ("b = b:absent.toml", ""),
    "missing package of a card file": ("b = nowhere_at_all:absent.toml", ""),
}


@pytest.mark.parametrize("fault", BROKEN_PLUGINS)
def test_broken_plugin_affects_only_its_own_name_and_gives_a_reason(fault, plugin_site):
    entry_point, module = BROKEN_PLUGINS[fault]
    plugin_site.install_distribution("hostile", f"[sca_mixers]\n{entry_point}\n", {"b.py": module})
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    with pytest.raises(RegistryError, match=r"mixer 'b' of hostile 1\.0 is broken: .*pip install -U hostile"):
        mixers.get("b")
    assert "b" in mixers
    entry = mixers.load_entry("b")
    assert entry.state == "broken"
    assert entry.reason
    with pytest.raises(RegistryError, match="Did you mean 'query'"):
        mixers.get("qurey")
    assert mixers.get("mean").__name__ == "Mean"


def test_broken_builtin_component_points_to_sca_doctor(monkeypatch):
    import importlib

    import_module = importlib.import_module

    def import_or_fail(name):
        if name == "sca.mixers.query":
            raise RuntimeError("operator torchvision::nms does not exist")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", import_or_fail)
    with pytest.raises(RegistryError) as caught:
        mixers.get("query")
    assert str(caught.value).startswith("mixer 'query' is broken: RuntimeError: operator torchvision::nms")
    assert str(caught.value).endswith(". Run `sca doctor` to find the cause.")
    assert "pip install" not in str(caught.value)
    assert mixers.load_entry("query").state == "broken"


def test_plugin_import_propagates_keyboard_interrupt(plugin_site):
    plugin_site.install_distribution("slow", "[sca_mixers]\nslow = slow:X\n", {"slow.py": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        mixers.get("slow")
    with pytest.raises(KeyboardInterrupt):
        mixers.load_entry("slow")


@pytest.mark.parametrize(
    ("cards", "reason"),
    [
        ("[[[", "invalid TOML in the card file"),
        (f"x = {'1' * 5000}", "invalid TOML in the card file"),
        ("x = 1", "'x' has no factory"),
        ("[x]\nsummary = 'none'", "'x' has no factory"),
        ("[x]\nfactory = 'a b'", "not a factory"),
        ("[x]\nfactory = 'a:b'\nsummry = 'typo'", "Did you mean 'summary'"),
        ("[x]\nfactory = 'a:b'\nsummary = 3", "expected a value of type str"),
    ],
)
def test_invalid_card_is_broken_with_a_reason(cards, reason, plugin_site, get_states):
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nx = shade:mixers.toml\n", {"shade/__init__.py": "", "shade/mixers.toml": cards}
    )
    state, listed_reason = get_states(mixers)["x"]
    assert state == "broken"
    assert reason in listed_reason
    assert "query" in mixers


def test_invalid_card_does_not_affect_other_cards_of_its_file(plugin_site, get_states):
    files = {
        "shade/__init__.py": "",
        "shade/parts.py": MIXER_SOURCE,
        "shade/mixers.toml": MIXER_CARDS.replace('"MIT"', "3"),
    }
    plugin_site.install_distribution("shade", "[sca_mixers]\nx = shade:mixers.toml\n", files)
    assert get_states(mixers)["soft"][0] == "broken"
    assert mixers.get("hard").__name__ == "Mean"


@pytest.mark.parametrize("name", ["", "été", "a b", "a:b"])
def test_invalid_plugin_name_is_listed_as_broken_and_cannot_be_used(name, plugin_site, get_states):
    plugin_site.install_distribution(
        "shade", f"[sca_mixers]\n{name} = shade:Mean\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE}
    )
    assert get_states(mixers)[name][0] == "broken"
    assert "cannot be a name" in get_states(mixers)[name][1]
    assert name not in mixers.list_names()
    assert name not in mixers
    assert f"shade:{name}" not in mixers
    assert "mean" in mixers


def test_name_defined_twice_by_one_distribution_is_broken(plugin_site, get_states):
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nmean = shade:Mean\nmean = shade:Other\n", {"shade.py": MIXER_SOURCE}
    )
    assert get_states(mixers)["mean"] == ("broken", "the distribution defines this name twice")


def test_plugin_for_another_contract_version_is_broken_with_a_fix(plugin_site, get_states):
    plugin_site.install_distribution(
        "old", "[sca_api]\nversion = v0\n[sca_mixers]\nold = old:Mean\n", {"old.py": MIXER_SOURCE}
    )
    plugin_site.install_distribution(
        "new", "[sca_api]\nversion = v1\n[sca_mixers]\nnew = new:Mean\n", {"new.py": MIXER_SOURCE}
    )
    with pytest.raises(RegistryError, match="contracts v0 required, but segment-caption-anything provides v1"):
        mixers.get("old")
    assert get_states(mixers)["old"][0] == "broken"
    plugin_site.install_distribution(
        "newer", "[sca_api]\nversion = v99\n[sca_mixers]\nnewer = newer:Mean\n", {"newer.py": MIXER_SOURCE}
    )
    with pytest.raises(RegistryError, match=r"; upgrade it: pip install -U segment-caption-anything\.$"):
        mixers.get("newer")
    plugin_site.install_distribution(
        "odd", "[sca_api]\nversion = 1\n[sca_mixers]\nodd = odd:Mean\n", {"odd.py": MIXER_SOURCE}
    )
    with pytest.raises(RegistryError, match="; write the version as v1"):
        mixers.get("odd")
    assert mixers.get("new").__name__ == "Mean"


@pytest.mark.parametrize("metadata", ["", "Name: \n", "\0\0"])
def test_listing_ignores_damaged_distribution_metadata(metadata, plugin_site):
    dist_info = plugin_site.folder / "damaged-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(metadata)
    (dist_info / "entry_points.txt").write_bytes(b"[sca_mixers]\nx = \xff\n")
    refresh_plugins()
    assert "query" in mixers.list_names()


def test_first_copy_of_a_distribution_on_sys_path_is_used(plugin_site, tmp_path, monkeypatch):
    plugin_site.install_distribution("shade", "[sca_mixers]\nolder = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    first_folder = tmp_path / "first"
    first_folder.mkdir()
    monkeypatch.syspath_prepend(first_folder)
    type(plugin_site)(first_folder).install_distribution(
        "shade", "[sca_mixers]\nnewer = shade:Mean\n", {"shade.py": MIXER_SOURCE}, version="2.0"
    )
    assert "newer" in mixers
    assert "older" not in mixers
