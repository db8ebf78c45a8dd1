"""The jobs of a GPU run on a simulated CUDA device, where mixing devices or types fails as it does on a GPU."""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from simulated_cuda import simulated_cuda

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/data/golden"
RUN_SCRIPT_SPEC = importlib.util.spec_from_file_location("gpu_run_jobs", ROOT / "benchmarks/gpu/run.py")
PARTS = (
    "throughput",
    "decoding",
    *(pytest.param(part, marks=pytest.mark.all) for part in ("published", "training step")),
)


@pytest.fixture(scope="module")
def measurements():
    run = importlib.util.module_from_spec(RUN_SCRIPT_SPEC)
    sys.modules[RUN_SCRIPT_SPEC.name] = run
    RUN_SCRIPT_SPEC.loader.exec_module(run)
    return list(run.iter_measurements("cpu", GOLDEN))


@pytest.fixture
def cuda(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "simulated")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**34, 2**34))
    with simulated_cuda():
        yield


@pytest.mark.parametrize("part", PARTS)
def test_jobs_of_a_part_run_on_cuda(part, measurements, cuda, tmp_path):
    measurements_of_part = [
        measurement
        for measurement in measurements
        if measurement.part == part and not measurement.label.startswith("tiny:")
    ]
    assert measurements_of_part
    for measurement in measurements_of_part:
        module, _, name = measurement.job.partition(":")
        config = {**measurement.config, "device": "cuda"}
        if part == "published":
            config |= {"batch_size": 1, "regions_per_image": 2, "published_regions": 2}
        row = getattr(import_module(module), name)(config, str(tmp_path))
        assert row["state"] == "done", (measurement.label, row["reason"], row.get("traceback"))
