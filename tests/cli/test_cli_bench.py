"""`sca bench` from a sweep to its report."""

import json

import pytest

SWEEP = """
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
[measure]
regions = [1, 2]
words = 2
repeats = 5
"""


@pytest.fixture
def sweep(here):
    (here / "mine.toml").write_text(SWEEP)
    return "mine.toml"


@pytest.mark.slow
def test_a_sweep_is_run_looked_at_reported_and_repeated(shell, sweep, here):
    assert shell("bench", "status", sweep).out.startswith("2 rows: none made; 2 missing")
    made = shell("bench", "run", sweep, "num_workers=1")
    assert made.status == 0, made.err
    assert made.out.strip() == "2 rows: 1 done, 1 impossible; 0 missing"
    assert len(made.err) == 3
    assert shell("bench", "run", sweep, "num_workers=1").err == ["sca: 2 of 2 rows are there already"]
    assert shell("bench", "report", "runs/bench/mine").status == 0
    for suffix in ("html", "md", "csv"):
        assert "mask-tokens" in (here / f"runs/bench/mine/report.{suffix}").read_text()
    again = shell("bench", "run", sweep, "num_workers=1", "--out", "again", "--quiet")
    assert again.err == []
    told = shell("bench", "diff", "runs/bench/mine", "again").out
    assert told.startswith("2 rows in both, 0 only in the first, 0 only in the second")
    assert "timings: " in told


@pytest.mark.slow
def test_one_row_is_made_by_the_command_that_is_given_with_it(shell, sweep, here):
    assert shell("bench", "run", sweep, "num_workers=1", "--quiet").status == 0
    rows = [json.loads(line) for line in (here / "runs/bench/mine/results.jsonl").read_text().splitlines()]
    row = next(each for each in rows if each["state"] == "done")
    made = json.loads(shell("bench", "row", json.dumps(row["config"])).out)
    kept = ("name", "value", "low", "high", "n", "protocol")
    assert [[each[key] for key in kept] for each in made["scores"]] == [
        [each[key] for key in kept] for each in row["scores"]
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "smok"), "Did you mean 'smoke'?"),
        (("run", "smoke", "worker=2"), "Did you mean 'num_workers'?"),
        (("run", "smoke", "--launcher", "locl"), "Did you mean 'local'?"),
        (("run", "smoke", "--retry-state", "broken"), "no state 'broken'"),
        (("run", "smoke", "--device", "gpu"), "device 'gpu' is not available"),
        (("report", "nowhere"), "no results in nowhere: sca bench run SWEEP --out nowhere makes some"),
        (("row", "{"), "the configuration is not valid JSON"),
        (("row", "{}"), "a row has no 'model'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(refused, arguments, said):
    assert said in refused(2, "bench", *arguments)


def test_throughput_on_a_cpu_is_the_sweep_for_one(shell, here, monkeypatch):
    from sca_bench import runner

    made = []

    def run(sweep, folder, launcher, options, *rest, **more):
        made.append((sweep.name, str(folder), options))
        return runner.SweepStatus(0, {}, [])

    monkeypatch.setattr(runner, "run_sweep", run)
    result = shell("bench", "run", "throughput", "device=cpu", "num_workers=1")
    assert made == [("throughput-cpu", "runs/bench/throughput-cpu", {"num_workers": 1})]
    assert "sca bench published" in result.err[0]


@pytest.mark.slow
def test_the_ratios_to_the_published_procedure_are_printed(shell, refused):
    result = shell("bench", "published", "tiny", "--num-repeats", 1)
    assert result.status == 0, result.err
    assert "same captions: True" in result.out
    assert "no part 'tinny'" in refused(2, "bench", "published", "tinny")
