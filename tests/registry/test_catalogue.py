"""Registries are those of catalogue: its methods work as anyone who knows it expects."""

import catalogue
import pytest
from sca_registry import REGISTRIES, RegistryError, metrics, mixers
from sources import MIXER


def test_registries_are_registries_of_catalogue():
    assert all(isinstance(each, catalogue.Registry) for each in REGISTRIES.values())
    assert mixers.namespace == ("sca", "mixers")
    assert mixers.entry_point_namespace == "sca_mixers"
    assert issubclass(RegistryError, catalogue.RegistryError)


def test_register_is_a_decorator_or_takes_the_function(code):
    @metrics.register("length")
    def length(): ...

    def breadth(): ...

    assert metrics.register("breadth", func=breadth) is breadth
    assert metrics("depth", breadth) is breadth  # catalogue's short form
    assert metrics.get("length") is length
    assert {"length", "breadth", "depth"} <= set(metrics.get_all())
    assert catalogue.check_exists("sca", "metrics", "length")
    with pytest.raises(RegistryError, match="already registered"):
        metrics.register("class", func=breadth)


def test_get_all_leaves_out_what_is_broken_and_find_says_why(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    site.install("rotten", "[sca_mixers]\nbad = rotten:Bad\n", {"rotten.py": "raise OSError('no disk')"})
    everything = mixers.get_all()
    assert {"mean", "query"} <= set(everything)
    assert "bad" not in everything
    assert "bad" in mixers
    found = mixers.find("bad")
    assert (found["module"], found["file"], found["state"]) == ("rotten", None, "broken")
    assert "no disk" in found["reason"]


def test_find_names_the_place_of_a_factory(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    found = mixers.find("mean")
    assert found["module"] == "shade"
    assert found["file"] == str(site.folder / "shade.py")
    assert found["line_no"] >= 1
    assert (found["distribution"], found["version"]) == ("shade", "1.0")
    built_in = mixers.find("query")
    assert built_in["docstring"]
    assert built_in["file"].endswith("query.py")
    with pytest.raises(RegistryError, match="no mixers named 'nothing'"):
        mixers.find("nothing")


def test_entry_points_are_those_of_plugins_that_work(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    site.install("rotten", "[sca_mixers]\nbad = rotten:Bad\n", {"rotten.py": "raise OSError('no disk')"})
    assert set(mixers.get_entry_points()) == {"mean"}
    assert mixers.get_entry_point("mean") is mixers.get("mean")
    assert mixers.get_entry_point("bad", "default") == "default"
    assert mixers.get_entry_point("query") is None  # built in
    assert mixers.get_entry_point("nothing", 3) == 3
