"""Names are read without importing anything, and a wrong one is answered with what there is."""

import subprocess
import sys

import pytest
from sca_registry import REGISTRIES, RegistryError, encoders, get_registry, language_models, metrics, mixers, segmenters
from sources import MIXER


def imported_after(code: str, path: str = "") -> set[str]:
    """The modules that a fresh interpreter has after running `code`."""
    script = f"import sys; sys.path.insert(0, {path!r})\n{code}\nprint(*sys.modules, sep='\\n')"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


@pytest.mark.slow
def test_importing_the_registry_imports_nothing_heavy():
    heavy = {"torch", "numpy", "PIL", "tomllib", "difflib", "sca"}
    assert not heavy & imported_after("import sca_registry")


@pytest.mark.slow
def test_listing_imports_no_torch_no_plugin_and_no_factory(site):
    files = {"shade/__init__.py": "", "shade/parts.py": MIXER}
    site.install("shade", "[sca_mixers]\nmean = shade.parts:Mean\n", files)
    listing = (
        "import sca_registry\nfor r in sca_registry.REGISTRIES.values(): r.list_names(); r.list_entries(); 'x' in r"
    )
    modules = imported_after(listing + "\nassert 'mean' in sca_registry.mixers.list_names()", str(site.folder))
    assert not {"torch", "shade", "sca", "sca.encoders"} & modules


@pytest.mark.slow
def test_a_look_up_imports_its_own_module_and_no_other_plugin(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    site.install("other", "[sca_mixers]\nelse = other:Mean\n", {"other.py": MIXER})
    modules = imported_after("import sca_registry; sca_registry.mixers.get('mean')", str(site.folder))
    assert "shade" in modules
    assert not {"other", "torch"} & modules


def test_the_first_names_are_there():
    assert "tiny-vit" in encoders
    assert {"sam", "box"} <= set(segmenters.list_names())
    assert "query" in mixers
    assert "tiny-gpt2" in language_models.list_names()


def test_every_kind_is_reached_by_its_singular_and_plural_and_with_hyphens():
    for plural, reg in REGISTRIES.items():
        assert get_registry(plural) is get_registry(reg.kind.singular) is reg
    assert get_registry("language-model") is get_registry("language-models") is language_models


def test_a_wrong_kind_is_answered_with_the_kinds():
    with pytest.raises(RegistryError, match=r"'mixrs'.*Did you mean 'mixers'\?.*encoders, segmenters"):
        get_registry("mixrs")


def test_a_typo_is_answered_with_the_name_meant_the_names_there_are_and_how_to_add_one():
    with pytest.raises(RegistryError) as caught:
        mixers.get("qurey")
    told = str(caught.value)
    assert told.startswith("no mixers named 'qurey'. Did you mean 'query'? Choose from: ")
    assert told.endswith(" Plugins add names with entry points in the group 'sca_mixers'.")


@pytest.mark.parametrize("typo", ["Query", "QUERY", "query_"])
def test_case_and_underscores_do_not_hide_the_name_meant(typo):
    with pytest.raises(RegistryError, match="Did you mean 'query'"):
        mixers.get(typo)


def test_asking_whether_a_strange_thing_is_a_name_is_no_error():
    assert "" not in mixers
    assert ":" not in mixers
    assert 3 not in mixers
    assert "nobody:query" not in mixers


def test_code_registers_a_function_and_a_class(code):
    @metrics.register("length")
    def length():
        """How long."""

    @metrics.register("breadth")
    class Breadth:
        pass

    assert metrics.get("length") is length
    assert metrics.get("breadth") is Breadth
    assert {"length", "breadth"} <= set(metrics.list_names())
    assert metrics.load_entry("length").summary == "How long."


def test_a_second_registration_is_refused_naming_both_places(code):
    @metrics.register("twice")
    def first():
        pass

    with pytest.raises(
        RegistryError, match=r"'twice'.*first \(.*test_names\.py:\d+\).*second \(.*test_names\.py:\d+\)"
    ):

        @metrics.register("twice")
        def second():
            pass

    assert metrics.get("twice") is first


def test_two_factories_made_by_one_function_are_two(code):
    def make():
        @metrics.register("made")
        def factory():
            pass

    make()
    with pytest.raises(RegistryError, match="already registered"):
        make()


def test_a_built_in_name_cannot_be_registered_over(code):
    with pytest.raises(RegistryError, match=r"'query' is already registered by .*sca\.mixers\.query:QueryMixer"):
        mixers("query")(lambda segmenter: None)


def test_a_module_that_runs_again_may_register_its_own_again(site, code):
    site.write("mine.py", "import sca_registry\n@sca_registry.metrics.register('mine')\nclass Mine: pass\n")
    import importlib

    import mine

    before = mine.Mine
    importlib.reload(mine)
    assert metrics.get("mine") is mine.Mine is not before


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a:b", "été", "a/b", "-a", None, len])
def test_what_cannot_be_a_name_cannot_be_registered(name, code):
    with pytest.raises(RegistryError, match="cannot be a name"):
        metrics(name)


def test_what_cannot_be_called_cannot_be_registered(code):
    with pytest.raises(RegistryError, match="'three'"):
        metrics("three")(3)
