"""`sca bench` from a sweep to its report."""

import json
import shutil
from pathlib import Path

import pytest

from sca.nn.int8_linear import has_fast_int8

ROOT = Path(__file__).parents[2]
SWEEP_TOML = """
[model]
segmenter = "box"
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
[model.encoder]
name = "tiny-vit"
image_size = 64
hidden_size = 32
depth = 1
output_channels = 32
stem_channels = [8, 16]
[axes]
mixer = ["roi-pool", "mask-tokens"]
[evaluate]
dataset = { name = "scenes", num_images = 2, image_size = 64 }
metrics = ["class"]
[benchmark]
regions_per_image = [1, 2]
max_new_tokens = 2
num_repeats = 5
"""


@pytest.fixture
def sweep_file(working_folder):
    (working_folder / "mine.toml").write_text(SWEEP_TOML)
    return "mine.toml"


@pytest.mark.slow
def test_bench_runs_reports_repeats_and_compares_a_sweep(run_sca, sweep_file, working_folder):
    assert run_sca("bench", "status", sweep_file).out.startswith("2 rows: none finished; 2 missing")
    result = run_sca("bench", "run", sweep_file, "num_workers=1")
    assert result.status == 0, result.err
    assert result.out.strip() == "2 rows: 1 done, 1 incompatible; 0 missing"
    assert len(result.err) == 3
    assert run_sca("bench", "run", sweep_file, "num_workers=1").err == ["sca: 2 of 2 rows are finished already"]
    assert run_sca("bench", "report", "runs/bench/mine").status == 0
    for suffix in ("html", "md", "csv"):
        assert "mask-tokens" in (working_folder / f"runs/bench/mine/report.{suffix}").read_text()
    (working_folder / "runs/bench/mine/report.html").unlink()
    assert run_sca("bench", "report", "runs/bench/mine").status == 0
    quiet_result = run_sca("bench", "run", sweep_file, "num_workers=1", "--out", "again", "--quiet")
    assert quiet_result.err == []
    diff_output = run_sca("bench", "diff", "runs/bench/mine", "again").out
    assert diff_output.startswith("2 rows in both, 0 only in the first, 0 only in the second")
    assert "timings: " in diff_output


def test_bench_report_replaces_only_tables_of_a_report(run_sca, get_sca_error, working_folder):
    folder = working_folder / "results"
    shutil.copytree(ROOT / "benchmarks/results/mixers", folder)
    assert {path.name for path in folder.iterdir()} >= {"results.jsonl", "report.md"}
    assert run_sca("bench", "report", "results").status == 0
    (folder / "report.html").unlink()
    assert run_sca("bench", "report", "results").status == 0
    (folder / "report.csv").write_text("my,own\n1,2\n")
    assert "report.csv exists and was not written by `sca bench report`; choose a different --out" in get_sca_error(
        2, "bench", "report", "results"
    )
    assert (folder / "report.csv").read_text() == "my,own\n1,2\n"


@pytest.mark.slow
def test_bench_row_reproduces_scores_of_a_sweep_row(run_sca, sweep_file, working_folder):
    assert run_sca("bench", "run", sweep_file, "num_workers=1", "--quiet").status == 0
    rows = [json.loads(line) for line in (working_folder / "runs/bench/mine/results.jsonl").read_text().splitlines()]
    finished_row = next(each for each in rows if each["state"] == "done")
    rerun_row = json.loads(run_sca("bench", "row", json.dumps(finished_row["config"])).out)
    compared_fields = ("name", "value", "ci_low", "ci_high", "num_samples", "protocol_id")
    assert [[each[key] for key in compared_fields] for each in rerun_row["scores"]] == [
        [each[key] for key in compared_fields] for each in finished_row["scores"]
    ]


@pytest.mark.slow
def test_bench_row_evaluates_a_captioner(run_sca):
    config = {
        "captioner": {"name": "most-frequent", "dataset": "scenes"},
        "evaluate": {"dataset": {"name": "scenes", "num_images": 2}, "metrics": ["class"]},
        **{"seed": 0, "num_threads": 1, "device": "cpu"},
    }
    result = run_sca("bench", "row", json.dumps(config))
    assert (result.status, json.loads(result.out)["state"]) == (0, "done")


def test_bench_report_lacks_studies_of_a_sweep_with_a_missing_plugin(run_sca, working_folder):
    folder = working_folder / "results"
    shutil.copytree(ROOT / "benchmarks/results/mixers", folder)
    table = {
        "model": {"encoder": "tiny-vit", "mixer": "mixer-of-a-plugin", "language_model": "tiny-gpt2"},
        "studies": {"one": {}},
    }
    (folder / "sweep.json").write_text(json.dumps({"name": "mine", "table": table, "device": "cpu"}))
    result = run_sca("bench", "report", "results")
    assert result.status == 0
    assert "the report has no studies, because the sweep cannot be read: no mixers named" in result.err[0]


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (("run", "smok"), "Did you mean 'smoke'?"),
        (("run", "smoke", "worker=2"), "Did you mean 'num_workers'?"),
        (("run", "smoke", "--launcher", "locl"), "Did you mean 'local'?"),
        (("run", "smoke", "--retry-state", "broken"), "unknown state 'broken'"),
        (("run", "smoke", "--device", "gpu"), "device 'gpu' is not available"),
        (("report", "nowhere"), "no results in nowhere; run sca bench run SWEEP --out nowhere"),
        (("row", "{"), "the configuration is not valid JSON"),
        (("row", "{}"), "the configuration has no 'model'"),
        (("run", "smoke", "--halving", "--order", "listed"), "--order has no effect with --halving; omit it"),
        (("run", "smoke", "--score", "cider-d"), "--score requires --halving"),
    ],
    ids=str,
)
def test_bench_reports_invalid_arguments_in_one_line(get_sca_error, arguments, expected_message):
    assert expected_message in get_sca_error(2, "bench", *arguments)


def test_bench_run_throughput_on_cpu_selects_cpu_sweep(run_sca, working_folder, monkeypatch):
    from sca_bench import runner

    recorded_calls = []

    def record_call(sweep, folder, settings, *rest):
        recorded_calls.append((sweep.name, str(folder), settings.launcher_options))
        return runner.SweepStatus(0, {}, [])

    monkeypatch.setattr(runner, "run_sweep", record_call)
    result = run_sca("bench", "run", "throughput", "device=cpu", "num_workers=1")
    assert recorded_calls == [("throughput-cpu", "runs/bench/throughput-cpu", {"num_workers": 1})]
    assert "sca bench speedup" in result.err[0]


@pytest.mark.slow
def test_bench_speedup_prints_ratios_and_rejects_unknown_part(run_sca, get_sca_error):
    result = run_sca("bench", "speedup", "tiny", "--num-repeats", 1)
    assert result.status == 0, result.err
    assert "same captions: True" in result.out
    assert "unknown part 'tinny'" in get_sca_error(2, "bench", "speedup", "tinny")


@pytest.mark.slow
@pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no AVX-512 VNNI instructions")
def test_bench_precision_compares_with_float32(run_sca, tmp_path):
    out = tmp_path / "new" / "precision.json"
    arguments = ["bench", "precision", "sca-tiny", "scenes", "--precision", "int8", "--precision", "float32"]
    run_sca(*arguments, "--min-width", 1, "--num-images", 2, "--metrics", "mask-iou,class", "--out", out)
    content = json.loads(out.read_text())
    int8, float32 = content["rows"]
    assert int8["applied"] == "int8 (18 linear layers), float32"
    assert 0.9 < int8["mask_iou_mean"] < 1
    assert float32["mask_iou_mean"] == float32["mask_iou_percentile"] == float32["share_equal_captions"] == 1
    assert all(each["difference"] == 0 for each in float32["score_differences"])
    assert {"mask-iou/mean", "class/accuracy"} <= {each["name"] for each in int8["score_differences"]}
    assert content["environment"]["versions"]["torch"]
