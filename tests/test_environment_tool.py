"""The versions that tools/environment.py installs: those of constraints.txt, or the lower bounds in pyproject.toml."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DIRECT_REQUIREMENTS = [
    *PYPROJECT["project"]["dependencies"],
    *(requirement for extra in PYPROJECT["project"]["optional-dependencies"].values() for requirement in extra),
]


@pytest.fixture(scope="module")
def environment_module():
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("requirement", DIRECT_REQUIREMENTS)
def test_pin_lowest_pins_each_direct_requirement_to_its_lower_bound(environment_module, requirement):
    declared, pinned = Requirement(requirement), Requirement(environment_module.pin_lowest(requirement))
    (pin,) = pinned.specifier
    assert (pinned.name, pinned.extras, pin.operator) == (declared.name, declared.extras, "==")
    assert f">={pin.version}" in map(str, declared.specifier)


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", "numpy==2.0", "numpy>2"])
def test_pin_lowest_rejects_a_requirement_without_a_lower_bound(environment_module, requirement):
    with pytest.raises(SystemExit, match="has no lower bound; write it as name>=version"):
        environment_module.pin_lowest(requirement)


def test_lowest_versions_pin_every_requirement_in_pyproject_once(environment_module):
    pins = [Requirement(pin) for pin in environment_module.get_lowest_versions(["test"])]
    expected_names = {
        Requirement(requirement).name for requirement in [*DIRECT_REQUIREMENTS, *PYPROJECT["dependency-groups"]["test"]]
    }
    assert {pin.name for pin in pins} == expected_names
    assert len({str(pin) for pin in pins}) == len(expected_names), "two extras give one package different lower bounds"


def test_tested_versions_install_package_extras_from_checkout(environment_module):
    arguments = environment_module.get_tested_versions(["dev", "ray"])
    assert arguments[:2] == ["-c", "constraints.txt"]
    assert "pytest>=9" in arguments  # of a group that dev includes
    assert arguments[arguments.index(".[ray]") - 1] == "-e"
    assert not any(PYPROJECT["project"]["name"] in argument for argument in arguments)
