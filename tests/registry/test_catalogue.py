"""Registries derive from those of catalogue, whose methods work as documented there."""

import catalogue
import pytest
from plugin_sources import MIXER_SOURCE
from sca_registry import REGISTRIES, RegistryError, metrics, mixers


def test_registries_are_catalogue_registries():
    assert all(isinstance(each, catalogue.Registry) for each in REGISTRIES.values())
    assert mixers.namespace == ("sca", "mixers")
    assert mixers.entry_point_namespace == "sca_mixers"
    assert issubclass(RegistryError, catalogue.RegistryError)


def test_register_works_as_a_decorator_and_with_a_function(isolated_registry):
    @metrics.register("length")
    def measure_length(): ...

    def measure_breadth(): ...

    assert metrics.register("breadth", func=measure_breadth) is measure_breadth
    assert metrics("depth", measure_breadth) is measure_breadth  # catalogue's short form
    assert metrics.get("length") is measure_length
    assert {"length", "breadth", "depth"} <= set(metrics.get_all())
    assert catalogue.check_exists("sca", "metrics", "length")
    with pytest.raises(RegistryError, match="already registered"):
        metrics.register("class", func=measure_breadth)


def test_get_all_omits_broken_components_and_find_gives_the_reason(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    plugin_site.install_distribution(
        "rotten", "[sca_mixers]\nbad = rotten:Bad\n", {"rotten.py": "raise OSError('no disk')"}
    )
    components = mixers.get_all()
    assert {"mean", "query"} <= set(components)
    assert "bad" not in components
    assert "bad" in mixers
    info = mixers.find("bad")
    assert (info["module"], info["file"], info["state"]) == ("rotten", None, "broken")
    assert "no disk" in info["reason"]


def test_find_returns_module_file_and_version_of_a_factory(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    info = mixers.find("mean")
    assert info["module"] == "shade"
    assert info["file"] == str(plugin_site.folder / "shade.py")
    assert info["line_no"] >= 1
    assert (info["distribution"], info["version"]) == ("shade", "1.0")
    builtin_info = mixers.find("query")
    assert builtin_info["docstring"]
    assert builtin_info["file"].endswith("query.py")
    with pytest.raises(RegistryError, match="no mixers named 'nothing'"):
        mixers.find("nothing")


def test_get_entry_points_returns_only_working_plugins(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    plugin_site.install_distribution(
        "rotten", "[sca_mixers]\nbad = rotten:Bad\n", {"rotten.py": "raise OSError('no disk')"}
    )
    assert set(mixers.get_entry_points()) == {"mean"}
    assert mixers.get_entry_point("mean") is mixers.get("mean")
    assert mixers.get_entry_point("bad", "default") == "default"
    assert mixers.get_entry_point("query") is None  # built in
    assert mixers.get_entry_point("nothing", 3) == 3
