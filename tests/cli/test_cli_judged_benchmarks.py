"""Protocols of judged benchmarks: `sca evaluate` on small folders in the publishers' layouts."""

import json

import pytest
from judged_benchmarks import write_dlc_bench, write_judge, write_paradlc_bench

from sca.evaluation import judges

pytest.importorskip("datasets", reason="requires the extra data")


@pytest.fixture(scope="module")
def judge_option(tmp_path_factory):
    return f"judge.model=hf weights={write_judge(tmp_path_factory.mktemp('judge'))}"


@pytest.mark.slow
def test_dlc_bench_judges_captions_of_masks(run_sca, working_folder, judge_option):
    root = write_dlc_bench(working_folder / "dlc")
    command = ("evaluate", "sca-tiny", "dlc-bench", f"root={root}", judge_option)
    result = run_sca(*command, "--out", "out")
    assert "GAR-8B, judged by Llama 3.1 8B (published)" in result.out
    scores = json.loads((working_folder / "out/dlc-bench/scores.json").read_text())
    assert (scores["prompt_type"], scores["num_regions"]) == ("mask", 2)
    assert scores["scores"]["judge/questions"] == 6
    assert 0 < scores["prediction_seconds"] < scores["seconds"]
    rescored = run_sca("score", "out/dlc-bench", "--metrics", "judge", judge_option, "--json")
    assert json.loads(rescored.out)["scores"] == scores["scores"]
    resumed = json.loads(run_sca(*command, "--out", "out", "--json").out)
    assert resumed[0]["prediction_seconds"] is None


@pytest.mark.slow
def test_paradlc_bench_judges_all_regions_of_an_image_and_prints_the_time(
    run_sca, working_folder, judge_option, monkeypatch
):
    root = write_paradlc_bench(working_folder / "paradlc")
    loaded_judges = []
    monkeypatch.setattr(judges, "hash_tensors", lambda tensors: loaded_judges.append(tensors) or "0" * 64)
    result = run_sca("evaluate", "sca-tiny", "paradlc-bench", f"root={root}", judge_option)
    assert "2 images, 4 regions" in result.out
    assert "4 predictions in" in result.out
    assert "PerceptionDLM-8B, judged by GPT-5.2 (published)" in result.out
    assert len(loaded_judges) == 1


def test_judged_benchmark_requires_a_judge_before_predicting(get_sca_error, working_folder):
    root = write_dlc_bench(working_folder / "dlc")
    error = get_sca_error(2, "evaluate", "sca-tiny", "dlc-bench", f"root={root}")
    assert error.startswith("metric 'judge' cannot be built: needs a judge; set judge.model=NAME with")
