"""Rows computed on a Ray cluster of two nodes equal local rows."""

import pytest
from sca_bench.runner import RunSettings, run_halving
from sca_bench.store import ResultStore
from sca_bench.summary import get_score
from sca_bench.sweep import Sweep

from sca.launchers.local import LocalLauncher
from sca.launchers.task import Task

pytestmark = pytest.mark.all
ray = pytest.importorskip("ray", reason="the extra ray is not installed")
JOB = "sca_bench.worker:run_row"
BASE_MODEL = {
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
def ray_cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ray_launcher_on_two_nodes_returns_the_rows_of_the_local_launcher(ray_cluster, tmp_path):
    from sca.launchers.ray import RayLauncher

    mixers = ["roi-pool", "mask-tokens", {"name": "query", "depth": 1, "num_heads": 2, "mlp_dim": 64}]
    benchmark = {"regions_per_image": [1], "max_new_tokens": 2}
    sweep = Sweep.from_dict({"model": BASE_MODEL, "axes": {"mixer": mixers}, "benchmark": benchmark}, "three")
    rows_by_launcher = {}
    for name, launcher in (("local", LocalLauncher(num_workers=1)), ("ray", RayLauncher(address=ray_cluster.address))):
        tasks = [Task(row.key, JOB, row.config, str(tmp_path / name / row.key)) for row in sweep.list_rows()]
        fields = ("state", "reason", "parameters", "flops")
        rows_by_launcher[name] = {
            task.key: {key: row.get(key) for key in fields} for task, row in launcher.run_tasks(tasks)
        }
        assert all((tmp_path / name / task.key / "log.txt").is_file() for task in tasks)
    assert rows_by_launcher["local"] == rows_by_launcher["ray"]
    assert sorted(row["state"] for row in rows_by_launcher["ray"].values()) == ["done", "done", "incompatible"]


def test_halving_on_two_nodes_recommends_as_on_one_machine(ray_cluster, tmp_path):
    table = {
        "model": {**BASE_MODEL, "trainable": ["mixer", "projection", "task_tokens", "language_model"]},
        "axes": {"mixer": ["masked-pool", "mask-tokens", {"name": "query", "depth": 1, "num_heads": 2, "mlp_dim": 64}]},
        "train": {
            "steps": 8,
            "batch_size": 2,
            "warmup_steps": 1,
            "loss": {"caption": 1.0},
            "data": {"scenes": {"name": "scenes", "num_images": 4, "image_size": 64}},
            "cache_features": True,
        },
        "evaluate": {"dataset": {"name": "scenes", "num_images": 6, "image_size": 64}, "metrics": ["cider-d"]},
    }
    table["model"]["segmenter"] = {"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 64}
    sweep = Sweep.from_dict(table, "three")
    launchers = {"local": {"num_workers": 2}, "ray": {"address": ray_cluster.address}}
    recommended, scores = {}, {}
    for name, options in launchers.items():
        settings = RunSettings(launcher=name, launcher_options=options, report=lambda line: None)
        result = run_halving(sweep, tmp_path / name, settings, score_name="cider-d")
        rows = ResultStore(tmp_path / name).read_rows()
        assert {row["state"] for row in rows} == {"done"}, [row["reason"] for row in rows]
        recommended[name] = (result.best.rows[0].config["model"], result.best.step)
        scores[name] = {row["key"]: get_score(row, "cider-d") for row in rows}
    assert recommended["ray"] == recommended["local"]
    assert scores["ray"] == scores["local"]
    assert len(scores["ray"]) > 4


def test_ray_launcher_rejects_zero_cpus():
    from sca.launchers.ray import RayLauncher

    with pytest.raises(ValueError, match="num_cpus is 0"):
        RayLauncher(num_cpus=0)
