"""Names are listed without imports, and errors about an unknown name list the available ones."""

import subprocess
import sys

import pytest
from plugin_sources import MIXER_SOURCE
from sca_registry import REGISTRIES, RegistryError, encoders, get_registry, language_models, metrics, mixers, segmenters


def list_imported_modules(statement: str, plugin_folder: str = "") -> set[str]:
    """Return the modules that a new interpreter has imported after running `code`."""
    script = f"import sys; sys.path.insert(0, {plugin_folder!r})\n{statement}\nprint(*sys.modules, sep='\\n')"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


@pytest.mark.slow
def test_registry_import_loads_no_heavy_modules():
    heavy_modules = {"torch", "numpy", "PIL", "tomllib", "difflib", "sca"}
    assert not heavy_modules & list_imported_modules("import sca_registry")


@pytest.mark.slow
def test_registry_listing_imports_no_torch_plugin_or_factory(plugin_site):
    files = {"shade/__init__.py": "", "shade/parts.py": MIXER_SOURCE}
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade.parts:Mean\n", files)
    script = (
        "import sca_registry\nfor r in sca_registry.REGISTRIES.values(): r.list_names(); r.list_entries(); 'x' in r"
    )
    modules = list_imported_modules(
        script + "\nassert 'mean' in sca_registry.mixers.list_names()", str(plugin_site.folder)
    )
    assert not {"torch", "shade", "sca", "sca.encoders"} & modules


@pytest.mark.slow
def test_registry_get_imports_only_the_module_of_the_component(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    plugin_site.install_distribution("other", "[sca_mixers]\nelse = other:Mean\n", {"other.py": MIXER_SOURCE})
    modules = list_imported_modules("import sca_registry; sca_registry.mixers.get('mean')", str(plugin_site.folder))
    assert "shade" in modules
    assert not {"other", "torch"} & modules


def test_registries_contain_the_builtin_components():
    assert "tiny-vit" in encoders
    assert {"sam", "box"} <= set(segmenters.list_names())
    assert "query" in mixers
    assert "tiny-gpt2" in language_models.list_names()


def test_get_registry_accepts_singular_plural_and_hyphenated_kinds():
    for plural, registry in REGISTRIES.items():
        assert get_registry(plural) is get_registry(registry.kind.singular) is registry
    assert get_registry("language-model") is get_registry("language-models") is language_models


def test_get_registry_lists_the_kinds_for_an_unknown_kind():
    with pytest.raises(RegistryError, match=r"'mixrs'.*Did you mean 'mixers'\?.*encoders, segmenters"):
        get_registry("mixrs")


def test_registry_get_suggests_a_name_and_the_entry_point_group_for_a_typo():
    with pytest.raises(RegistryError) as caught:
        mixers.get("qurey")
    message = str(caught.value)
    assert message.startswith("no mixers named 'qurey'. Did you mean 'query'? Choose from: ")
    assert message.endswith(" Plugins add names with entry points in the group 'sca_mixers'.")


@pytest.mark.parametrize("typo", ["Query", "QUERY", "query_"])
def test_registry_get_suggests_a_name_despite_case_and_underscores(typo):
    with pytest.raises(RegistryError, match="Did you mean 'query'"):
        mixers.get(typo)


def test_registry_contains_returns_false_for_invalid_names():
    assert "" not in mixers
    assert ":" not in mixers
    assert 3 not in mixers
    assert "nobody:query" not in mixers


def test_register_accepts_a_function_and_a_class(isolated_registry):
    @metrics.register("length")
    def measure_length():
        """How long."""

    @metrics.register("breadth")
    class Breadth:
        pass

    assert metrics.get("length") is measure_length
    assert metrics.get("breadth") is Breadth
    assert {"length", "breadth"} <= set(metrics.list_names())
    assert metrics.load_entry("length").summary == "How long."


def test_register_rejects_a_second_registration_and_names_both_locations(isolated_registry):
    @metrics.register("twice")
    def register_first():
        pass

    with pytest.raises(
        RegistryError,
        match=r"'twice'.*register_first \(.*test_lookup\.py:\d+\).*register_second \(.*test_lookup\.py:\d+\)",
    ):

        @metrics.register("twice")
        def register_second():
            pass

    assert metrics.get("twice") is register_first


def test_register_rejects_a_second_factory_defined_by_the_same_function(isolated_registry):
    def define_factory():
        @metrics.register("made")
        def make_metric():
            pass

    define_factory()
    with pytest.raises(RegistryError, match="already registered"):
        define_factory()


def test_register_rejects_a_builtin_name(isolated_registry):
    with pytest.raises(RegistryError, match=r"'query' is already registered by .*sca\.mixers\.query:QueryMixer"):
        mixers("query")(lambda segmenter: None)


def test_register_accepts_a_reloaded_module(plugin_site, isolated_registry):
    plugin_site.write("mine.py", "import sca_registry\n@sca_registry.metrics.register('mine')\nclass Mine: pass\n")
    import importlib

    import mine

    original_class = mine.Mine
    importlib.reload(mine)
    assert metrics.get("mine") is mine.Mine is not original_class


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a:b", "été", "a/b", "-a", None, len])
def test_register_rejects_invalid_names(name, isolated_registry):
    with pytest.raises(RegistryError, match="cannot be a name"):
        metrics(name)


def test_register_without_a_name_shows_how_to_write_it(isolated_registry):
    message = r'encoders\.register has no name for .*Mine; write `@encoders\.register\("name"\)`$'
    with pytest.raises(RegistryError, match=message):

        @encoders.register
        class Mine:
            pass

    with pytest.raises(RegistryError, match=r"mixers\.register has no name for .*make_mine; write `@mixers\.reg"):

        @mixers
        def make_mine():
            pass


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50.a1_in1k"])
def test_unknown_encoder_that_timm_has_points_to_the_timm_encoder(name, monkeypatch):
    pytest.importorskip("timm", reason="the extra timm is not installed")
    message = f"no encoders named {name!r}; it is a model of timm: use 'timm' with the option model={name!r}"
    with pytest.raises(RegistryError) as caught:
        encoders.get(name)
    assert str(caught.value) == message
    with pytest.raises(RegistryError, match=r"no mixers named .* Choose from"):
        mixers.get(name)
    monkeypatch.setitem(sys.modules, "timm", None)  # not installed
    with pytest.raises(RegistryError, match=r"no encoders named .* Choose from"):
        encoders.get(name)


@pytest.mark.slow
def test_unknown_encoder_with_a_hyphen_does_not_import_timm():
    program = "import sca_registry\ntry:\n    sca_registry.encoders.get('tiny-vti')\nexcept ValueError:\n    pass"
    assert not {"timm", "torch"} & list_imported_modules(program)


def test_register_rejects_objects_that_are_not_callable(isolated_registry):
    with pytest.raises(RegistryError, match="'three'"):
        metrics("three")(3)
