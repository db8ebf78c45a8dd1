"""What cards and the zoo say of sizes is what building gives."""

import pytest
import sca_registry
from sca_registry import zoo

import sca

COUNTED = [
    (kind, name)
    for kind in ("encoders", "language_models")
    for name in sca_registry.registry(kind).names()
    if sca_registry.registry(kind).card(name).parameters
]


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("kind", "name"), COUNTED)
def test_a_card_counts_the_parameters_of_its_part(kind, name):
    registry = sca_registry.registry(kind)
    assert parameters(registry.build(name)) == registry.card(name).parameters


@pytest.mark.parametrize("name", zoo.names())
def test_the_zoo_counts_the_parameters_of_its_models(name):
    assert parameters(sca.load(name)) == zoo.get(name).parameters
