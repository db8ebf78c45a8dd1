"""Tables that were made of committed results are those that the results give."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from sca_bench import report
from sca_bench.store import ResultStore

import weak_supervision

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
SWEEPS = ["encoders", "mixers", "throughput-cpu"]


def read(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def published_lines():
    for row in read("against-published/results.json")["rows"]:
        ours, other = row["ours"], row["published"]
        yield f"| {row['what']} | {row['unit']} | {ours:.4g} | {other:.4g} | {ours / other:.2f} | {row['note']} |"


def floor_lines():
    for row in read("roofline/results.json")["rows"]:
        cells = [f"{value:.3g}" for value in (row["published"], row["ours"], *row["floors"])]
        yield f"| {row['stage']} | {' | '.join(cells)} | {row['ours'] / max(row['floors']):.1f} |"


def plan_lines():
    for row in read("plan/cpu.json")["rows"]:
        memory, flops = (row[of][0] / row[of][1] for of in ("memory", "flops"))
        yield f"| {row['model']} | {'training' if row['train'] else 'captioning'} | {memory:.3f} | {flops:.3f} |"


def weak_supervision_lines():
    yield from weak_supervision.render_results(read("weak-supervision/results.json")).splitlines()


@pytest.mark.parametrize("lines", [published_lines, floor_lines, plan_lines, weak_supervision_lines])
def test_page_of_benchmarks_shows_the_committed_results(lines):
    shown = PAGE.splitlines()
    expected = list(lines())
    assert expected
    assert [line for line in expected if line not in shown] == []


@pytest.mark.parametrize("sweep", SWEEPS)
def test_committed_report_is_what_its_rows_give(sweep):
    rows = ResultStore(RESULTS / sweep).read_rows()
    stale = (RESULTS / sweep / "report.md").read_bytes() != report.render_markdown(rows).encode()
    assert not stale, f"run: sca bench report benchmarks/results/{sweep}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_committed_results_are_rows_and_markdown():
    listed = subprocess.run(["git", "ls-files", RESULTS], cwd=RESULTS, capture_output=True, text=True).stdout.split()
    assert "shipped.json" in listed
    assert {Path(name).suffix for name in listed} <= {".json", ".jsonl", ".md"}


@pytest.mark.parametrize("sweep", ["encoders", "mixers"])
def test_page_of_benchmarks_shows_the_scores_of_a_sweep(sweep):
    heads, _, *rows = report.render_markdown(ResultStore(RESULTS / sweep).read_rows()).partition("\n\n")[0].splitlines()
    pattern = r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$"
    shown = [tuple(map(float, found)) for found in re.findall(pattern, PAGE, re.MULTILINE)]
    for row in rows:
        cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
        scores = (100 * float(score) for score in (cells["score"], *cells["over seeds"].split(" to ")))
        assert pytest.approx((float(cells["parameters, M"]), *scores), abs=0.051) in shown
