"""Replay successive halving on a trained grid: `python benchmarks/studies/halving_replay.py RESULTS`

First train the grid, from the root of the repository:

    sca bench run benchmarks/studies/halving_grid.toml num_workers=2 --out RESULTS

Every combination is trained once per seed and evaluated at each rung. For each seed, `sca bench run --halving` is then
replayed on these results: which combination it recommends, and which fraction of the time it needs. The recommendation
is good if it is the best combination of the seed, or if the paired interval of its difference to the best one contains
0 and is narrower than a third of the difference between the best and the median combination.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from sca_bench.effects import compute_paired_interval
from sca_bench.halving import NUM_RUNGS, halve_combinations, list_candidates, make_rung_row
from sca_bench.image_scores import stack_image_scores
from sca_bench.row import SweepRow
from sca_bench.store import ResultStore
from sca_bench.summary import get_cost, get_score
from sca_bench.sweep import Sweep, read_sweep_text

from sca.io.atomic import write_file
from sca.io.errors import InputError
from sca.io.score_format import format_interval, format_score

GRID = Path(__file__).with_name("halving_grid.toml")
RUNG_AXIS = "train.stop_step"
SCORE = "cider-d"
MAX_TIME_FRACTION = 0.4


def read_grid() -> Sweep:
    """Return the grid without the axis of the rungs."""
    text, name = read_sweep_text(str(GRID))
    table = copy.deepcopy(dict(Sweep.parse(text, name).table))
    del table["axes"][RUNG_AXIS]
    return Sweep.from_dict(table, name)


def replay_grid(folder: Path) -> list[dict[str, Any]]:
    """Replay halving for each seed of the grid.

    Args:
        folder: Results folder of the grid.

    Returns:
        The results of `replay_halving` by seed.

    Raises:
        InputError: The grid is unfinished.
    """
    results_by_key = {row["key"]: row for row in ResultStore(folder).read_rows() if row["state"] == "done"}
    rows = read_grid().list_rows("listed")
    rung_keys = [make_rung_row(row, num_halvings).key for row in rows for num_halvings in range(NUM_RUNGS)]
    if num_missing := sum(key not in results_by_key for key in rung_keys):
        raise InputError(f"{folder} lacks {num_missing} of {len(rung_keys)} finished rows; run the grid again")
    seeds = dict.fromkeys(row.config["seed"] for row in rows)
    return [replay_halving([row for row in rows if row.config["seed"] == seed], results_by_key) for seed in seeds]


def replay_halving(rows: Sequence[SweepRow], results_by_key: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Replay halving on the rows of one seed.

    Args:
        rows: Rows of the seed, without a `stop_step`.
        results_by_key: Results of all rungs by row key.

    Returns:
        The recommendation, the best combination, their difference, and the time of both.
    """
    candidates = list_candidates(rows)
    final_results = {each.label: results_by_key[make_rung_row(each.rows[0], 0).key] for each in candidates}
    scores = {label: get_score(result, SCORE) for label, result in final_results.items()}
    known_scores = {label: score for label, score in scores.items() if score is not None}
    ranked = sorted(known_scores, key=known_scores.__getitem__, reverse=True)
    best, median = ranked[0], ranked[len(ranked) // 2]
    result = halve_combinations(rows, lambda each: [results_by_key[row.key] for row in each], SCORE)
    recommended = result.best.label
    full_seconds = sum(get_cost(each) or 0.0 for each in final_results.values())
    gap = known_scores[best] - known_scores[median]
    interval = _compare(final_results[recommended], final_results[best])
    is_good = recommended == best or (interval[0] <= 0 <= interval[1] and interval[1] - interval[0] < gap / 3)
    return {
        "seed": rows[0].config["seed"],
        "best": best,
        "best_score": known_scores[best],
        "median_score": known_scores[median],
        "best_minus_median": _compare(final_results[best], final_results[median]),
        "recommended": recommended,
        "recommended_score": known_scores[recommended],
        "recommended_minus_best": None if recommended == best else interval,
        "not_ruled_out": [each.label for each in result.not_ruled_out],
        "is_good": is_good,
        "seconds": result.seconds,
        "full_seconds": full_seconds,
        "time_fraction": result.seconds / full_seconds,
    }


def _compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float]:
    sums = stack_image_scores([first, second], SCORE)
    assert sums is not None  # all rows are evaluated on the same images
    interval = compute_paired_interval(sums[:1], sums[1:])
    assert interval is not None
    return interval


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table with one line per seed, and the number of good recommendations."""
    lines = [
        "| seed | best | minus median (95% CI) | recommended | minus best (95% CI) | time (%) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    replays = results["seeds"]
    for each in replays:
        to_best = each["recommended_minus_best"]
        cells = (
            each["seed"],
            format_score(each["best_score"]),
            format_interval(*each["best_minus_median"], signed=True),
            format_score(each["recommended_score"]),
            "the same" if to_best is None else format_interval(*to_best, signed=True),
            f"{100 * each['time_fraction']:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    num_good = sum(each["is_good"] and each["time_fraction"] <= MAX_TIME_FRACTION for each in replays)
    mean_time = mean(each["time_fraction"] for each in replays)
    return "\n".join(
        [
            *lines,
            "",
            f"Good recommendations in at most {MAX_TIME_FRACTION:.0%} of the time: {num_good} of {len(replays)}; mean "
            f"time {mean_time:.1%}.",
        ]
    )


def main() -> None:
    """Replay all seeds, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of the grid")
    parser.add_argument("--out", type=Path, help="JSON file; default: RESULTS/replay.json")
    arguments = parser.parse_args()
    try:
        results = {"score": SCORE, "seeds": replay_grid(arguments.results)}
    except InputError as error:
        parser.error(str(error))
    print(render_results(results))
    out = arguments.out or arguments.results / "replay.json"
    write_file(out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
