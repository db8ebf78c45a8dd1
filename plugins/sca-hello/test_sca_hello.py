"""Conformance test of the mixer `hello`."""

from sca_hello import HelloMixer

pytest_plugins = ["sca.testing.pytest"]  # provides the fixture `conformance`


def test_hello_mixer_passes_conformance(conformance):
    conformance("mixer", HelloMixer)
