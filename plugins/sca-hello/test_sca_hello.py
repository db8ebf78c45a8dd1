"""Conformance test of the mixer `hello`."""

from sca_hello import HelloMixer

pytest_plugins = ["sca.testing.pytest"]  # provides the fixture `conformance`


def test_hello_keeps_its_promises(conformance):
    conformance("mixer", HelloMixer)
