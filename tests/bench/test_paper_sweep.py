"""The sweep `paper`: every combination runs, at the smallest number of steps and images."""

from pathlib import Path

import pytest
from sca_bench.runner import RunSettings, run_sweep
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"steps": 1, "warmup_steps": 0, "num_images": 4}


def shrink_table(table):
    """Replace sizes in nested tables by the smallest ones."""
    if isinstance(table, list):
        return [shrink_table(each) for each in table]
    if not isinstance(table, dict):
        return table
    return {key: SMALLEST[key] if key in SMALLEST else shrink_table(value) for key, value in table.items()}


@pytest.mark.all
@pytest.mark.skipif(not (ROOT / "benchmarks/pretrained").is_dir(), reason="not a checkout")
def test_every_combination_of_the_paper_sweep_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = shrink_table(dict(Sweep.read("paper").table)) | {"seeds": [0]}
    table["studies"]["weak-supervision"]["axes"] = {"train.data.scenes.num_images": [4]}
    sweep = Sweep.from_dict(table, "paper")
    run_sweep(sweep, tmp_path, RunSettings(launcher_options={"num_workers": 2}, report=lambda line: None))
    rows = ResultStore(tmp_path).read_rows()
    assert len(rows) == len(sweep.list_rows())
    assert {row["label"]: row["reason"] for row in rows if row["state"] != "done"} == {}
