"""The mixer `hello` keeps the promises of mixers."""

from sca_hello import HelloMixer

from sca.conformance import check


def test_hello_keeps_its_promises():
    assert not [str(finding) for finding in check("mixer", HelloMixer) if not finding.passed]
