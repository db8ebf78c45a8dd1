"""The GPU run: complete jobs, time limits, collected rows and tables."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from sca_bench.decoding import measure_method
from sca_bench.parity import compare_golden_folders, compare_scenes
from sca_registry import get_registry

from markers import read_between, replace_between
from sca.launchers.local import LocalLauncher
from sca.launchers.task import Task, TaskOutcome

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/data/golden"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / f"benchmarks/gpu/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


run_script, collect_script = load_script("run"), load_script("collect")


def make_gpu_row(**fields):
    row = {
        "key": "k1",
        "part": "parity",
        "label": "100 scenes, bfloat16",
        "config": {"dtype": "bfloat16"},
        "state": "done",
        "reason": "",
        "seconds": {"total": 1.0},
        "environment": {
            "device": "NVIDIA H100 80GB HBM3",
            "versions": {"torch": "2.11.0"},
            "commit": "0123456789abcdef",
        },
    }
    return {**row, **fields}


def make_timing(seconds):
    return {"median": seconds, "min": seconds, "max": seconds, "num_repeats": 3}


SCENE_COMPARISON = {
    "num_regions": 350,
    "identical_captions": 0.97,
    "min_iou": 0.95,
    "mean_iou": 0.998,
    "is_finite": True,
}
THROUGHPUT = [
    {
        "batch_size": 1,
        "regions_per_image": regions,
        "stages": {name: make_timing(0.01) for name in ("encode", "segment", "mix", "prefill", "decode")},
        "regions_per_second": 1280.0,
        "peak_memory": memory * 2**30,
    }
    for regions, memory in ((1, 3), (64, 5))
]
PUBLISHED_RATIO = {
    "quantity": "captions, including encoding",
    "unit": "regions/s",
    "ours": 2000.0,
    "reference": 100.0,
    "note": "16 x 64",
}
GPU_ROWS = [
    make_gpu_row(scenes=SCENE_COMPARISON),
    make_gpu_row(
        key="k2",
        part="published",
        label="captions: sam-vit-b+query+gpt2-large, bfloat16",
        config={},
        ratios=[PUBLISHED_RATIO],
    ),
    make_gpu_row(
        key="k3",
        part="throughput",
        label="sam-vit-h+query+gpt2, 1/64 regions",
        config={},
        throughput=THROUGHPUT,
        memory={"captioning": 5 * 2**30},
    ),
    make_gpu_row(
        key="k4",
        part="plan",
        label="sam-vit-b+query+gpt2, captioning",
        config={},
        plan={"memory": [2 * 2**30, 2**30]},
    ),
    make_gpu_row(
        key="k5",
        part="decoding",
        label="64 rows, cuda graph",
        state="crashed",
        reason="<b>ended</b> by SIGSEGV",
        config={},
    ),
]


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_measurements_are_distinct_and_cover_every_part_in_order(device):
    measurements = list(run_script.iter_measurements(device, GOLDEN))
    assert len({each.key for each in measurements}) == len(measurements)
    parts = list(dict.fromkeys(each.part for each in measurements))
    assert parts == ["parity", "published", "throughput", "plan", "training step", "decoding", "sca-tiny"]


def test_gpu_measurements_include_every_promised_combination():
    configs = [each.config for each in run_script.iter_measurements("cuda", GOLDEN) if each.part == "throughput"]
    configs_of_64_regions = [config for config in configs if config["benchmark"]["regions_per_image"] == [64]]
    names = {
        tuple(config["model"][kind]["name"] for kind in ("encoder", "mixer", "language_model"))
        for config in configs_of_64_regions
    }
    assert len(names) == 20
    assert ("sam-vit-h", "resampler", "mistral-7b") in names
    assert {tuple(config["benchmark"]["regions_per_image"]) for config in configs} == {(64,), (1, 8, 256)}
    for kind in ("encoder", "mixer", "language_model"):
        assert all(config["model"][kind]["name"] in get_registry(kind) for config in configs)


def test_read_final_keys_returns_settled_rows_of_the_same_device(tmp_path):
    rows = [
        make_gpu_row(key="a"),
        make_gpu_row(key="b", state="failed"),
        make_gpu_row(key="c", state="out-of-memory"),
        make_gpu_row(key="d", environment={"device": "another"}),
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + '{"key": "cut')
    assert run_script.read_final_keys(tmp_path, "NVIDIA H100 80GB HBM3") == {"a", "c"}
    assert run_script.read_final_keys(tmp_path / "nothing", "NVIDIA H100 80GB HBM3") == set()


def test_local_launcher_starts_no_task_after_its_deadline(tmp_path):
    task = Task("late", "time:sleep", {"device": "cpu"}, str(tmp_path / "late"), deadline=time.time() - 1)
    assert list(LocalLauncher(num_workers=1).run_tasks([task])) == []
    assert not (tmp_path / "late").exists()


@pytest.mark.slow
def test_local_launcher_ends_a_task_at_its_deadline_without_an_outcome(tmp_path, monkeypatch):
    (tmp_path / "slow_job.py").write_text("import time\ndef run_job(config, folder):\n    time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    forkserver._forkserver._stop()  # an existing server does not have the path
    tasks = [
        Task(name, "slow_job:run_job", {"device": "cpu"}, str(tmp_path / name), deadline=time.time() + 3)
        for name in "ab"
    ]
    try:
        assert list(LocalLauncher(num_workers=1).run_tasks(tasks)) == []
    finally:
        forkserver._forkserver._stop()


@pytest.mark.parametrize("method", ["fixed cache", pytest.param("torch.compile", marks=pytest.mark.all)])
def test_decoding_methods_return_the_same_ids(method):
    from sca.language_models.tiny_gpt2 import TinyGpt2

    torch.manual_seed(0)
    language_model = TinyGpt2(hidden_size=32, depth=2, num_heads=2, max_positions=64).eval().to_transformers()
    measurement = measure_method(language_model, torch.randn(3, 5, 32), 6, method, 1)
    assert measurement["identical_ids"] == 1.0
    assert measurement["tokens_per_second"] > 0


@pytest.mark.slow
def test_golden_comparison_finds_no_difference_in_float32():
    differences_by_checkpoint = compare_golden_folders(GOLDEN, "cpu", torch.float32)
    assert set(differences_by_checkpoint) == {"sca-tiny-query-gpt2", "sca-tiny-query-llama", "sca-tiny-split-gpt2"}
    for differences in differences_by_checkpoint.values():
        assert differences.pop("identical_captions") == 1.0
        assert max(differences.values()) < 1e-4


def test_golden_comparison_rejects_folder_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"contains no \*/golden\.safetensors"):
        compare_golden_folders(tmp_path, "cpu", torch.float32)


@pytest.mark.slow
def test_scene_comparison_finds_rounding_only_in_bfloat16():
    exact = compare_scenes(2, "cpu", torch.float32)
    assert (exact["identical_captions"], exact["min_iou"]) == (1.0, 1.0)
    rounded = compare_scenes(2, "cpu", torch.bfloat16)
    assert rounded["is_finite"]
    assert 0.9 < rounded["mean_iou"] < 1.0


# --- rows and tables --------------------------------------------------------------------------------------------------


@pytest.fixture
def page_folder(tmp_path):
    for name in ("guide.md", "readme.md"):
        (tmp_path / name).write_text(f"before\n{collect_script.START}\nold\n{collect_script.END}\nafter\n")
    return tmp_path


def run_collect(folder, *paths):
    options = ["--results", folder / "results", "--guide", folder / "guide.md", "--readme", folder / "readme.md"]
    collect_script.main([str(each) for each in (*paths, *options)])
    return (folder / "guide.md").read_text(), (folder / "readme.md").read_text()


def test_collect_writes_gpu_rows_into_the_tables(page_folder):
    (page_folder / "made.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in GPU_ROWS))
    guide, readme = run_collect(page_folder, page_folder / "made.jsonl")
    for line in (
        "### NVIDIA H100 80GB HBM3",
        "torch 2.11.0; commit 0123456789.",
        "| 350 regions, bfloat16 | 97.0% | 0.9980 | 0.9500 |",
        "| sam-vit-h+query+gpt2 | 1 | 1,280 | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 3.00 |",
        "| sam-vit-h+query+gpt2 | 64 | 1,280 | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 5.00 |",
        "| sam-vit-b+query+gpt2, captioning | 2.00 | 1.00 | 2.000 |",
        "- decoding, 64 rows, cuda graph: crashed. &lt;b&gt;ended&lt;/b&gt; by SIGSEGV",
    ):
        assert line in guide
    assert "captions 2,000 regions/s, including encoding" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    regenerated = run_collect(page_folder)  # from the committed rows
    assert regenerated == (guide, readme)


def test_collect_keeps_a_measured_row_over_a_later_failure(page_folder):
    (page_folder / "made.jsonl").write_text(f"{json.dumps(make_gpu_row(scenes=SCENE_COMPARISON))}\n")
    run_collect(page_folder, page_folder / "made.jsonl")
    (page_folder / "made.jsonl").write_text(f"{json.dumps(make_gpu_row(state='failed', reason='no'))}\n")
    guide, _ = run_collect(page_folder, page_folder / "made.jsonl")
    assert "97.0%" in guide
    assert "Not measured" not in guide


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{\n", "line 1 is not JSON"),
        ('{"key": 1}\n', "line 1 is not a row of run.sh"),
        (f"{json.dumps(make_gpu_row(environment=[]))}\n", "line 1 is not a row of run.sh"),
        (f"{json.dumps(make_gpu_row(config=None))}\n", "line 1 is not a row of run.sh"),
    ],
)
def test_collect_reports_line_that_is_not_a_row(page_folder, content, problem):
    (page_folder / "made.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=f"error: .*made.jsonl, {problem}"):
        run_collect(page_folder, page_folder / "made.jsonl")
    assert not (page_folder / "results").exists()


def test_collect_shortens_commit_and_keeps_its_suffix():
    assert collect_script._shorten_commit(f"{'0123456789' * 4} with changes") == "0123456789 with changes"


def test_add_killed_outcomes_adds_missing_tasks_before_the_deadline():
    tasks = [Task(key, "time:sleep", {"device": "cpu"}, key) for key in ("a", "b")]
    finished = TaskOutcome(tasks[0], {"state": "done"})
    (first, killed) = run_script.add_killed_outcomes([finished], tasks, time.time() + 60)
    assert (first, killed.task, killed.result["state"]) == (finished, tasks[1], "killed")
    assert list(run_script.add_killed_outcomes([finished], tasks, time.time() - 1)) == [finished]


def test_committed_gpu_tables_match_committed_rows():
    rows_path = ROOT / "benchmarks/results/gpu/rows.jsonl"
    rows = collect_script.read_rows(rows_path) if rows_path.is_file() else []
    for page, content in (
        ("docs/benchmarks.md", collect_script.render_tables(rows)),
        ("README.md", collect_script.render_headline(rows)),
    ):
        text = (ROOT / page).read_text("utf-8")
        assert read_between(text, collect_script.START, collect_script.END) == content, (
            "run: python benchmarks/gpu/collect.py"
        )


def test_replace_between_reports_missing_markers():
    with pytest.raises(ValueError, match=r"has no <a> with <b> behind it"):
        replace_between("text <b> <a>", "<a>", "<b>", "new")


# --- complete run -----------------------------------------------------------------------------------------------------


@pytest.mark.all
def test_gpu_run_on_cpu_records_failures_and_skips_known_rows(tmp_path, page_folder):
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    environment = {**os.environ, "PYTHON": sys.executable, "INPUTS": str(inputs), "OUT": str(out)}
    environment["PYTHON_VERSION"] = ".".join(map(str, sys.version_info[:2]))

    def run_command(*command):
        completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    assert "wheels" in run_command("bash", "benchmarks/gpu/prepare.sh")
    command = ["bash", "benchmarks/gpu/run.sh", "--device", "cpu", "--time-budget", "240", "--inputs", str(inputs)]
    empty_folder = tmp_path / "nowhere"
    empty_folder.mkdir()
    output = run_command(*command, "--golden", str(empty_folder))
    rows = collect_script.read_rows(out / "rows.jsonl")
    assert len(list(out.iterdir())) <= 8
    assert [row["label"] for row in rows if row["state"] != "done"] == ["golden checkpoints, float32"]
    assert f"{len(rows)} rows measured, 1 of them failed; 0 left for another run" in output
    assert {row["part"] for row in rows} == {each.part for each in run_script.iter_measurements("cpu", GOLDEN)}
    (inputs / "rows/earlier.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    environment["OUT"] = str(tmp_path / "again")
    output = run_command(*command)
    assert f"{len(rows) - 1} known, 1 to measure" in output
    assert "1 rows measured, 0 of them failed" in output
    guide, _ = run_collect(page_folder, out, tmp_path / "again")
    assert "Throughput, random weights" in guide
