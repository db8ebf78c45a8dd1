"""Rows on a Ray cluster of two nodes are the rows of this machine."""

import pytest
from sca_bench.sweep import Sweep

from sca.launchers.local import Local
from sca.launchers.task import Task

pytestmark = pytest.mark.all
ray = pytest.importorskip("ray", reason="the extra ray is not installed")
JOB = "sca_bench.worker:work"
BASE = {
    "encoder": {
        "name": "tiny-vit",
        "image_size": 64,
        "hidden_size": 32,
        "depth": 1,
        "output_channels": 32,
        "stem_channels": [8, 16],
    },
    "segmenter": "box",
    "language_model": {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 40},
    "task_tokens": 2,
}


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


def test_two_nodes_make_the_rows_that_one_machine_makes(cluster, tmp_path):
    from sca.launchers.ray import Ray

    mixers = ["roi-pool", "mask-tokens", {"name": "query", "depth": 1, "num_heads": 2, "mlp_dim": 64}]
    sweep = Sweep("three", BASE, {"mixer": mixers}, measure={"regions": [1], "words": 2})
    found = {}
    for name, launcher in (("local", Local(num_workers=1)), ("ray", Ray(address=cluster.address))):
        tasks = [Task(row.key, JOB, row.config, str(tmp_path / name / row.key)) for row in sweep.list_rows()]
        kept = ("state", "reason", "parameters", "flops")
        found[name] = {task.key: {key: row.get(key) for key in kept} for task, row in launcher.run_tasks(tasks)}
        assert all((tmp_path / name / task.key / "log.txt").is_file() for task in tasks)
    assert found["local"] == found["ray"]
    assert sorted(row["state"] for row in found["ray"].values()) == ["done", "done", "impossible"]


def test_a_row_takes_a_core_or_more():
    from sca.launchers.ray import Ray

    with pytest.raises(ValueError, match="cores is 0"):
        Ray(cores=0)
