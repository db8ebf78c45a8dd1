"""The mixer `hello` keeps the promises of mixers."""

from sca_hello import HelloMixer

pytest_plugins = ["sca.testing.pytest"]  # the fixture `conformance`


def test_hello_keeps_its_promises(conformance):
    conformance("mixer", HelloMixer)
