"""Committed tables equal those rendered from the committed results."""

import json
import re
import subprocess
from pathlib import Path

import calibration
import pytest
import zoom
from PIL import Image
from sca_bench import report
from sca_bench.store import ResultStore
from sca_bench.summary import get_own_seconds, summarize_rows

import find
import halving_replay
import pretraining_probe
import publish_pairs
import referring_expressions
import sca
import weak_supervision
from sca.checkpoints.load import read_local_spec
from sca.io.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
SWEEPS = ["encoders", "mixers", "pairs", "paper", "throughput-cpu"]
EFFECT_COLUMNS_OF_PAGE = ("claim", "source", "settings", "better", "worse", "difference", "95% CI", "verdict")


def read_results(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def iter_precision_lines():
    for model, dataset in (("sca-tiny", "scenes test, 60 images"), ("sca-street", "coco val, 30 images")):
        (row,) = read_results(f"precision/{model}.json")["rows"]
        mean, percentile = f"{row['mask_iou_mean']:.4f}", f"{row['mask_iou_percentile']:.4f}"
        outside = ", ".join(row["scores_outside"]) or "none"
        yield f"| {model} | {dataset} | {mean} | {percentile} | {row['share_equal_captions']:.1%} | {outside} |"


def iter_published_lines():
    files = [path.name for path in sorted((RESULTS / "published-comparison").glob("*.json"))]
    for row in [row for file in files for row in read_results(f"published-comparison/{file}")["rows"]]:
        ours, published = row["ours"], row["reference"]
        numbers = f"{ours:.4g} | {published:.4g} | {ours / published:.2f}"
        yield f"| {row['quantity']} | {row['unit']} | {numbers} | {row['note']} |"


def iter_roofline_lines():
    for row in read_results("roofline/results.json")["rows"]:
        cells = [f"{value:.3g}" for value in (row["published"], row["ours"], *row["lower_bounds"])]
        yield f"| {row['stage']} | {' | '.join(cells)} | {row['ours'] / max(row['lower_bounds']):.1f} |"


def iter_plan_lines():
    for row in [row for name in ("cpu", "pam-1.5b") for row in read_results(f"plan/{name}.json")["rows"]]:
        memory, flops = (row[quantity][0] / row[quantity][1] for quantity in ("memory", "flops"))
        yield f"| {row['model']} | {'training' if row['training'] else 'captioning'} | {memory:.3f} | {flops:.3f} |"


def iter_weak_supervision_lines():
    yield from weak_supervision.render_results(read_results("weak-supervision/results.json")).splitlines()


def iter_referring_lines():
    results = read_results("referring/results.json")
    yield from referring_expressions.render_results(results).splitlines()
    yield from referring_expressions.render_comprehension(results).splitlines()


def iter_paper_lines():
    store = ResultStore(RESULTS / "paper")
    table = report.render_markdown(store.read_rows(), sweep=store.read_sweep()).partition("\n\n")[0]
    header, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        yield f"| {' | '.join(cells[name] for name in EFFECT_COLUMNS_OF_PAGE)} |".replace("|  |", "| |")


def iter_halving_lines():
    yield from filter(None, halving_replay.render_results(read_results("halving/replay.json")).splitlines())


def iter_calibration_lines():
    yield from filter(None, calibration.render_results(read_results("calibration/results.json")).splitlines())


def iter_find_lines():
    results = read_results("find/results.json")
    yield from filter(None, find.iter_result_lines(results))
    used = results["true_boxes"][find.USED_METHOD]
    yield f"- With the default threshold of 0.6, {used['accepted']:.1%} of the matching texts are accepted and"
    yield f"  {used['rejected']:.1%} of the others rejected."


def iter_pretraining_lines():
    yield from filter(None, pretraining_probe.render_results(read_results("pretraining/results.json")).splitlines())


@pytest.mark.parametrize(
    "iter_lines",
    [
        iter_published_lines,
        iter_precision_lines,
        iter_roofline_lines,
        iter_plan_lines,
        iter_weak_supervision_lines,
        iter_referring_lines,
        iter_paper_lines,
        iter_halving_lines,
        iter_calibration_lines,
        iter_find_lines,
        iter_pretraining_lines,
    ],
)
def test_benchmark_readme_shows_committed_results(iter_lines):
    readme_lines = README.splitlines()
    expected = list(iter_lines())
    assert expected
    assert [line for line in expected if line not in readme_lines] == []


@pytest.mark.parametrize("sweep", SWEEPS)
def test_committed_report_matches_its_rows(sweep):
    store = ResultStore(RESULTS / sweep)
    rendered = report.render_markdown(store.read_rows(), sweep=store.read_sweep())
    is_stale = (RESULTS / sweep / "report.md").read_bytes() != rendered.encode()
    assert not is_stale, f"run: sca bench report benchmarks/results/{sweep}"


def test_table_of_trained_pairs_matches_its_rows(monkeypatch):
    monkeypatch.chdir(ROOT)  # the sweep refers to pretrained parts
    summaries = {name: summary for name, (_, summary) in publish_pairs.summarize_pairs(RESULTS / "pairs").items()}
    published = publish_pairs.find_published(summaries)
    assert publish_pairs.format_table(summaries, published) in README
    assert {path.name for path in (ROOT / "benchmarks" / "pairs").iterdir()} == set(published)


def test_unfinished_results_of_pairs_are_reported(tmp_path):
    with pytest.raises(InputError, match=r"lacks the finished rows masks-query, .*; run the sweep again"):
        publish_pairs.summarize_pairs(tmp_path)


def test_trained_pairs_caption_a_scene():
    image = Image.open(ROOT / "examples" / "scene.png")
    for folder in sorted((ROOT / "benchmarks" / "pairs").glob("masks-*")):
        predictor = sca.Predictor(sca.load(folder))
        predictor.set_image(image)
        red, orange = predictor.predict(boxes=[[370, 434, 448, 512], [15, 270, 99, 354]])
        assert "small striped red" in red.text
        assert "small striped orange" in orange.text


@pytest.mark.slow
def test_committed_replay_of_halving_matches_its_rows():
    replayed = halving_replay.replay_grid(RESULTS / "halving")
    committed = read_results("halving/replay.json")["seeds"]
    for seed, committed_seed in zip(replayed, committed, strict=True):
        for name, value in seed.items():
            is_numeric = isinstance(value, float | tuple)
            assert value == (pytest.approx(committed_seed[name]) if is_numeric else committed_seed[name]), name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_committed_results_contain_only_rows_and_markdown():
    committed_files = subprocess.run(
        ["git", "ls-files", RESULTS], cwd=RESULTS, capture_output=True, text=True
    ).stdout.split()
    assert "shipped.json" in committed_files
    assert {Path(name).suffix for name in committed_files} <= {".json", ".jsonl", ".md"}


@pytest.mark.parametrize("sweep", ["encoders", "mixers"])
def test_benchmark_readme_shows_scores_of_sweep(sweep):
    header, _, *rows = (
        report.render_markdown(ResultStore(RESULTS / sweep).read_rows()).partition("\n\n")[0].splitlines()
    )
    pattern = r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| ([\d.]+) \|$"
    readme_scores = [tuple(map(float, match)) for match in re.findall(pattern, README, re.MULTILINE)]
    for row in rows:
        cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
        values = cells["params (M)"], cells["score"], *cells["95% CI"].split(" to "), cells["std over seeds"]
        assert pytest.approx(tuple(map(float, values)), abs=0.0051) in readme_scores


def test_benchmark_page_shows_the_committed_tables_of_zoom():
    for name in ("sca-tiny", "sca-street"):
        results = read_results(f"zoom/{name}.json")
        tables = [zoom.render_curve(results), zoom.render_choices(results), zoom.render_cost(results)]
        tables += [zoom.render_blocks(results), zoom.render_classes(results)] if name == "sca-street" else []
        assert [line for table in tables for line in table.splitlines() if line not in README.splitlines()] == []


@pytest.mark.parametrize("name", ["sca-tiny", "sca-street"])
def test_committed_results_of_zoom_use_the_options_of_the_model(name):
    assert read_results(f"zoom/{name}.json")["zoom"] == vars(read_local_spec(name).zoom_options)


def test_committed_results_of_zoom_meet_their_targets():
    outcomes = {}
    for name in ("sca-tiny", "sca-street"):
        results = read_results(f"zoom/{name}.json")
        outcomes[name] = zoom.compute_outcomes(results, zoom.ZoomOptions(**results["zoom"]))
    small = {name: each.select_rows(each.cells <= zoom.SMALL_CELLS).summarize() for name, each in outcomes.items()}
    assert small["sca-tiny"]["difference"] >= 0.4
    assert small["sca-street"]["interval"][0] > 0
    assert outcomes["sca-street"].summarize(zoom.FRAMES_PER_BLOCK)["interval"][0] >= 0


def test_committed_results_of_find_meet_their_targets():
    results = read_results("find/results.json")
    true_boxes, found_boxes = (results[kind][find.USED_METHOD] for kind in ("true_boxes", "found_boxes"))
    assert true_boxes["top1"] >= 0.98
    assert found_boxes["top1"] >= 0.95
    assert min(true_boxes["auc"], found_boxes["auc"]) >= 0.95
    assert results["speed"]["num_images"] >= 200
    assert results["speed"]["caption_seconds"] >= 5 * results["speed"]["search_seconds"]


def test_committed_replay_of_halving_meets_its_targets():
    seeds = read_results("halving/replay.json")["seeds"]
    num_good = sum(each["is_good"] and each["time_fraction"] <= halving_replay.MAX_TIME_FRACTION for each in seeds)
    assert num_good >= 0.9 * len(seeds) >= 9
    assert min(each["best_minus_median"][0] for each in seeds) > 0


def test_committed_rows_of_the_paper_sweep_have_three_seeds_and_intervals():
    rows = ResultStore(RESULTS / "paper").read_rows()
    for summary in summarize_rows(rows, "cider-d"):
        assert len(summary.seed_scores) >= 3
        assert summary.ci_low < summary.quality < summary.ci_high
    hours_on_two_cores = sum(get_own_seconds(row) for row in rows) / 3600 / 2
    assert hours_on_two_cores < 8


def test_committed_calibrations_meet_their_targets():
    results = read_results("calibration/results.json")
    errors = {
        (report["model"], each["task"], each["prompt_type"]): each["ece"]
        for report in results["calibrations"]
        for each in report["results"]
    }
    assert errors["sca-street", "recognition", "box"] <= 0.05
    assert errors["sca-street", "recognition", "mask-point"] <= 0.08
    later_errors = {(each["model"], each["prompt_type"]): each["ece"]["platt, first half"] for each in results["maps"]}
    assert max(later_errors["sca-street", prompt_type] for prompt_type in ("box", "mask-point")) <= 0.08
    flagged = {(each["model"], each["images"]): each["flagged_fraction"] for each in results["ood"]}
    assert flagged["sca-street", "street photographs, held out"] <= 0.05
    assert flagged["sca-street", "photographs of other subjects"] >= 0.9
    assert flagged["sca-tiny", "photographs"] >= 0.9
    assert max(flagged["sca-tiny", f"scenes of {size} pixels"] for size in calibration.SCENE_SIZES) <= 0.05


def test_bundled_calibrations_are_those_of_the_committed_results():
    import sca

    for calibrated in read_results("calibration/results.json")["calibrations"]:
        stored = sca.load(calibrated["model"]).uncertainty.calibrations
        measured = {
            (each["task"], each["prompt_kind"]): each["calibration"]["slope"]
            for each in calibrated["results"]
            if not each["reason"]
        }
        assert {key: each.slope for key, each in stored.items()} == pytest.approx(measured, rel=1e-3)
