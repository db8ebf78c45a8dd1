"""One client that sends the largest requests does not cost the others their answers."""

import pytest

from heavy_client import describe_measurements, measure_impact
from serving_throughput import ServerProcess


@pytest.mark.all
def test_other_clients_are_answered_beside_a_heavy_one():
    with ServerProcess("sca-tiny", "cpu") as server:
        found = measure_impact(server, num_clients=16, seconds=66, pause=60)
    print(*describe_measurements(found), sep="\n")
    assert found["beside"]["failed"] == 0
    assert found["ratio"] < 10
    assert found["memory"]["highest"] < found["memory"]["before"] + 1.5 * 2**30
    assert found["memory"]["after"] < found["memory"]["before"] + 300 * 2**20
    refused = {"413", "422", "429", "503", "504", "sent", "200", "TimeoutError"}
    assert all(set(each) <= refused for each in found["heavy"].values())
