"""Test whether weak supervision helps: `python benchmarks/studies/weak_supervision.py [--out FILE] [num_workers=2 ...]`

Tests the claim of SCA (arXiv 2312.00869) on generated data. A model that first learns class names of many scenes and
then captions of a few is compared with models that only learn the few captions: for the number of steps of its second
stage, and of both stages together. All are evaluated on the same unseen scenes. Prints a Markdown table and writes the
results as JSON. Differences have 95% confidence intervals over images; the mean over seeds is resampled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sca.io.atomic import write_file
from sca.io.score_format import format_interval, format_score
from weak_supervision_job import METHODS, METRICS, NUM_CAPTIONED_SCENES, NUM_NAMED_SCENES

SCORE_LABELS = {"cider-d": "CIDEr-D", "attributes/all": "all four attributes correct", "mask-iou/mean": "mask IoU"}


def compute_differences(
    folders: Mapping[tuple[str, int], Path], other_method: str, seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Compute how much the weakly supervised method scores above another.

    Args:
        folders: (method, seed) -> folder with `predictions.jsonl`.
        other_method: One of `METHODS`.
        seeds: Seeds that both methods have.

    Returns:
        For each score: `mean`, the mean difference over seeds; `ci_low` and `ci_high`, the bounds of its 95% interval;
        and `per_seed`, the difference of each seed.
    """
    from sca.evaluation.bootstrap import bootstrap_scores, compute_interval
    from sca.evaluation.comparison import collect_bootstrap_inputs
    from sca.evaluation.evaluate import score_file

    differences_by_score = {}
    reports = {key: score_file(folder / "predictions.jsonl", METRICS) for key, folder in folders.items()}
    for name in SCORE_LABELS:
        values = [reports[METHODS[0], seed].scores[name] - reports[other_method, seed].scores[name] for seed in seeds]
        resampled_differences = [
            bootstrap_scores(*collect_bootstrap_inputs(reports[METHODS[0], seed])[name])
            - bootstrap_scores(*collect_bootstrap_inputs(reports[other_method, seed])[name])
            for seed in seeds
        ]
        low, high = compute_interval(np.mean(resampled_differences, axis=0))
        differences_by_score[name] = {
            "mean": float(np.mean(values)),
            "ci_low": low,
            "ci_high": high,
            "per_seed": values,
        }
    return differences_by_score


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/weak_supervision.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("options", nargs="*", help="Launcher options, such as num_workers=2.")
    parser.add_argument("--name-steps", type=int, default=250, help="Steps on class names.")
    parser.add_argument("--caption-steps", type=int, default=150, help="Steps on captions.")
    parser.add_argument(
        "--num-captioned-scenes", type=int, default=NUM_CAPTIONED_SCENES, help="Training scenes with captions."
    )
    parser.add_argument("--num-seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--num-eval-scenes", type=int, default=150, help="Scenes for evaluation.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    import sca_registry
    from sca_bench.worker import collect_environment
    from sca_registry.overrides import parse_assignments

    from sca.launchers.task import Task

    seeds = range(args.num_seeds)
    settings = {
        "name_steps": args.name_steps,
        "caption_steps": args.caption_steps,
        "num_captioned_scenes": args.num_captioned_scenes,
        "num_eval_scenes": args.num_eval_scenes,
    }
    with TemporaryDirectory() as temporary_folder:
        folders = {
            (method, seed): Path(temporary_folder, f"{METHODS.index(method)}-{seed}")
            for method in METHODS
            for seed in seeds
        }
        tasks = []
        for (method, seed), folder in folders.items():
            folder.mkdir()
            config = {"method": method, "seed": seed, "device": "cpu", **settings}
            tasks.append(Task(folder.name, "weak_supervision_job:run_job", config, str(folder)))
        launcher = sca_registry.launchers.build("local", **parse_assignments(args.options))
        scores_by_run = {}
        for outcome in launcher.run_tasks(tasks):
            if outcome.result["state"] != "done":
                raise SystemExit(f"{outcome.task.key}: {outcome.result}")
            scores_by_run[outcome.task.config["method"], outcome.task.config["seed"]] = outcome.result["scores"]
        results = {
            **settings,
            "num_named_scenes": NUM_NAMED_SCENES,
            "scores": {
                method: [{name: scores_by_run[method, seed][name] for name in SCORE_LABELS} for seed in seeds]
                for method in METHODS
            },
            "differences": {method: compute_differences(folders, method, seeds) for method in METHODS[1:]},
            "environment": collect_environment("cpu"),
        }
    print(render_results(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps(results, indent=1))


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of mean scores by method, times 100, and differences of the first method."""
    rows = [f"| | {' | '.join(SCORE_LABELS.values())} |", "| --- |" + " ---: |" * len(SCORE_LABELS)]
    for method, scores in results["scores"].items():
        rows.append(
            f"| {method} | {' | '.join(format_score(mean(each[name] for each in scores)) for name in SCORE_LABELS)} |"
        )
    for method, differences in results["differences"].items():
        cells = (
            f"{format_score(each['mean'], True)} ({format_interval(each['ci_low'], each['ci_high'], True)})"
            for each in (differences[name] for name in SCORE_LABELS)
        )
        rows.append(f"| difference to {method} (95% CI) | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
