"""The mixer `hello` keeps the promises of mixers."""

from sca_hello import HelloMixer


def test_hello_keeps_its_promises(conformance):  # a fixture of segment-caption-anything
    conformance("mixer", HelloMixer)
