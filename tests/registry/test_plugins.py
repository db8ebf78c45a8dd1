"""Other people's distributions: found by metadata, told apart, and unable to harm one another."""

import pytest
from sca_registry import RegistryError, mixers, refresh_plugins
from sources import MIXER

CARDS = """
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


def test_a_plugin_installed_later_is_seen_after_refresh(site):
    assert "mean" not in mixers
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    refresh_plugins()
    assert "mean" in mixers
    assert mixers.build("mean", "segmenter", depth=3).depth == 3


def test_a_plugin_tells_its_distribution_and_version(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER}, metadata="Summary: Shades.\n")
    entry = mixers.load_entry("mean")
    assert (entry.distribution, entry.version, entry.factory) == ("shade", "1.0", "shade:Mean")
    assert entry.summary == "Shades."
    assert entry.options == {"depth": 1}


def test_a_card_file_brings_many_names_and_their_facts(site):
    files = {"shade/__init__.py": "", "shade/parts.py": MIXER, "shade/mixers.toml": CARDS}
    site.install("shade", "[sca_mixers]\nlabel = shade:mixers.toml\n", files)
    listed = {entry.name: entry for entry in mixers.list_entries()}
    assert "label" not in listed
    assert (listed["soft"].summary, listed["soft"].license, listed["soft"].parameters) == ("Soft.", "MIT", 12)
    assert mixers.get_card("soft").provides == ("boxes",)
    assert mixers.build("soft", None).depth == 5
    assert mixers.build("soft", None, depth=6).depth == 6
    assert mixers.load_entry("soft").options == {"depth": 5}
    assert mixers.build("hard", None).depth == 1


def test_the_built_in_keeps_its_name_and_the_plugin_is_reached_in_full(site):
    site.install("shade", "[sca_mixers]\nquery = shade:Mean\n", {"shade.py": MIXER})
    assert {"query", "shade:query"} <= set(mixers.list_names())
    assert mixers.get_card("query").factory == "sca.mixers.query:QueryMixer"
    assert mixers.get_card("segment-caption-anything:query") == mixers.get_card("query")
    assert mixers.get("shade:query").__module__ == "shade"
    assert mixers.load_entry("shade:query").name == "shade:query"


def test_two_plugins_with_one_name_are_told_apart(site):
    for name in ("shade", "light-source"):
        module = name.partition("-")[0]
        site.install(name, f"[sca_mixers]\nmean = {module}:Mean\n", {f"{module}.py": MIXER})
    with pytest.raises(RegistryError, match="2 mixers are named 'mean'") as caught:
        mixers.get("mean")
    assert "'shade:mean'" in str(caught.value)
    assert "'light-source:mean'" in str(caught.value)
    assert "mean" not in mixers
    assert mixers.get("shade:mean").__module__ == "shade"
    assert mixers.get("Light_Source:mean").__module__ == "light"


def test_a_plugin_s_full_name_works_when_nobody_else_has_the_name(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    assert "shade:mean" in mixers
    assert mixers.get("shade:mean") is mixers.get("mean")


def test_code_that_registers_what_its_entry_point_names_is_one_part(site, code):
    decorated = "from sca_registry import mixers\n\n@mixers.register('mean')\nclass Mean: pass\n"
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": decorated})
    assert mixers.get("mean").__module__ == "shade"
    assert mixers.list_names().count("mean") == 1
    assert mixers.get("mean") is mixers.get("shade:mean")


BROKEN = {
    "an import error": ("b = b:X", "import nowhere_at_all"),
    "an exit": ("b = b:X", "raise SystemExit(3)"),
    "a bug": ("b = b:X", "1 / 0"),
    "a syntax error": ("b = b:X", "def"),
    "a panic": ("b = b:X", "class Panic(BaseException): pass\nraise Panic"),
    "no such attribute": ("b = b:X", ""),
    "no such module": ("b = nowhere_at_all:X", ""),
    "no factory": ("b = b:X", "X = 3"),
    "no attribute": ("b = b", ""),
    "no sense": ("b = %%%", ""),
    "no card file": ("b = b:absent.toml", ""),
    "no package": ("b = nowhere_at_all:absent.toml", ""),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_harms_only_its_own_name_and_its_reason_is_shown(how, site):
    entry_point, module = BROKEN[how]
    site.install("hostile", f"[sca_mixers]\n{entry_point}\n", {"b.py": module})
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    with pytest.raises(RegistryError, match=r"mixer 'b' of hostile 1\.0 is broken: .*pip install -U hostile"):
        mixers.get("b")
    assert "b" in mixers
    entry = mixers.load_entry("b")
    assert entry.state == "broken"
    assert entry.reason
    with pytest.raises(RegistryError, match="Did you mean 'query'"):
        mixers.get("qurey")
    assert mixers.get("mean").__name__ == "Mean"


def test_registry_points_to_the_doctor_for_a_broken_built_in_part(monkeypatch):
    import importlib

    import_module = importlib.import_module

    def fail(name):
        if name == "sca.mixers.query":
            raise RuntimeError("operator torchvision::nms does not exist")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RegistryError) as caught:
        mixers.get("query")
    assert str(caught.value).startswith("mixer 'query' is broken: RuntimeError: operator torchvision::nms")
    assert str(caught.value).endswith(". Run `sca doctor` to find the cause.")
    assert "pip install" not in str(caught.value)
    assert mixers.load_entry("query").state == "broken"


def test_an_interrupt_is_never_taken_for_a_broken_plugin(site):
    site.install("slow", "[sca_mixers]\nslow = slow:X\n", {"slow.py": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        mixers.get("slow")
    with pytest.raises(KeyboardInterrupt):
        mixers.load_entry("slow")


@pytest.mark.parametrize(
    ("cards", "reason"),
    [
        ("[[[", "not a card file"),
        (f"x = {'1' * 5000}", "not a card file"),
        ("x = 1", "'x' has no factory"),
        ("[x]\nsummary = 'none'", "'x' has no factory"),
        ("[x]\nfactory = 'a b'", "not a factory"),
        ("[x]\nfactory = 'a:b'\nsummry = 'typo'", "Did you mean 'summary'"),
        ("[x]\nfactory = 'a:b'\nsummary = 3", "give a value of type str"),
    ],
)
def test_a_bad_card_says_what_is_wrong_with_it(cards, reason, site, states):
    site.install(
        "shade", "[sca_mixers]\nx = shade:mixers.toml\n", {"shade/__init__.py": "", "shade/mixers.toml": cards}
    )
    state, told = states(mixers)["x"]
    assert state == "broken"
    assert reason in told
    assert "query" in mixers


def test_one_bad_card_does_not_spoil_the_file(site, states):
    files = {"shade/__init__.py": "", "shade/parts.py": MIXER, "shade/mixers.toml": CARDS.replace('"MIT"', "3")}
    site.install("shade", "[sca_mixers]\nx = shade:mixers.toml\n", files)
    assert states(mixers)["soft"][0] == "broken"
    assert mixers.get("hard").__name__ == "Mean"


@pytest.mark.parametrize("name", ["", "été", "a b", "a:b"])
def test_an_impossible_name_is_listed_as_broken_and_is_no_name(name, site, states):
    site.install("shade", f"[sca_mixers]\n{name} = shade:Mean\nmean = shade:Mean\n", {"shade.py": MIXER})
    assert states(mixers)[name][0] == "broken"
    assert "cannot be a name" in states(mixers)[name][1]
    assert name not in mixers.list_names()
    assert name not in mixers
    assert f"shade:{name}" not in mixers
    assert "mean" in mixers


def test_a_name_offered_twice_by_one_distribution_is_broken(site, states):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\nmean = shade:Other\n", {"shade.py": MIXER})
    assert states(mixers)["mean"] == ("broken", "the distribution defines this name twice")


def test_a_plugin_for_other_contracts_is_broken_and_says_so(site, states):
    site.install("old", "[sca_api]\nversion = v0\n[sca_mixers]\nold = old:Mean\n", {"old.py": MIXER})
    site.install("new", "[sca_api]\nversion = v1\n[sca_mixers]\nnew = new:Mean\n", {"new.py": MIXER})
    with pytest.raises(RegistryError, match="contracts v0 required, but segment-caption-anything provides v1"):
        mixers.get("old")
    assert states(mixers)["old"][0] == "broken"
    site.install("newer", "[sca_api]\nversion = v99\n[sca_mixers]\nnewer = newer:Mean\n", {"newer.py": MIXER})
    with pytest.raises(RegistryError, match=r"; upgrade it: pip install -U segment-caption-anything\.$"):
        mixers.get("newer")
    site.install("odd", "[sca_api]\nversion = 1\n[sca_mixers]\nodd = odd:Mean\n", {"odd.py": MIXER})
    with pytest.raises(RegistryError, match="; write the version as v1"):
        mixers.get("odd")
    assert mixers.get("new").__name__ == "Mean"


@pytest.mark.parametrize("metadata", ["", "Name: \n", "\0\0"])
def test_damaged_metadata_does_not_stop_a_listing(metadata, site):
    info = site.folder / "damaged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_bytes(b"[sca_mixers]\nx = \xff\n")
    refresh_plugins()
    assert "query" in mixers.list_names()


def test_of_two_copies_of_a_distribution_the_one_that_python_imports_counts(site, tmp_path, monkeypatch):
    site.install("shade", "[sca_mixers]\nolder = shade:Mean\n", {"shade.py": MIXER})
    first = tmp_path / "first"
    first.mkdir()
    monkeypatch.syspath_prepend(first)
    type(site)(first).install("shade", "[sca_mixers]\nnewer = shade:Mean\n", {"shade.py": MIXER}, version="2.0")
    assert "newer" in mixers
    assert "older" not in mixers
