"""Latency of other clients beside one client that sends the largest requests."""

import pytest

from heavy_client import describe_measurements, measure_impact
from serving_throughput import ServerProcess


@pytest.mark.all
def test_heavy_client_does_not_block_other_clients():
    with ServerProcess("sca-tiny", "cpu") as server:
        measurements = measure_impact(server, num_clients=16, seconds=66, pause=60)
    print(*describe_measurements(measurements), sep="\n")
    assert measurements["with_heavy_client"]["num_failed"] == 0
    assert measurements["p99_ratio"] < 10
    assert measurements["memory"]["peak"] < measurements["memory"]["before"] + 1.5 * 2**30
    assert measurements["memory"]["after"] < measurements["memory"]["before"] + 300 * 2**20
    allowed_statuses = {"413", "422", "429", "503", "504", "sent", "200", "TimeoutError"}
    assert all(set(each) <= allowed_statuses for each in measurements["heavy_client_statuses"].values())
