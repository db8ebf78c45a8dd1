"""Test whether weak supervision helps: `python benchmarks/studies/weak_supervision.py [--out FILE] [num_workers=2 ...]`

Tests the claim of SCA (arXiv 2312.00869) on generated data. A model that first learns class names of many scenes and
then captions of a few is compared with models that only learn the few captions: for the number of steps of its second
stage, and of both stages together. All are evaluated on the same unseen scenes. Prints a Markdown table and writes the
results as JSON. Differences have 95 % intervals over images, with means over seeds resampled together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sca.io.atomic import write_file
from weak_supervision_job import METHODS, METRICS, NUM_CAPTIONED_SCENES, NUM_NAMED_SCENES

SCORE_LABELS = {"cider-d": "CIDEr-D", "attributes/all": "all attributes", "mask-iou/mean": "mask IoU"}


def compute_differences(
    folders: Mapping[tuple[str, int], Path], other_method: str, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Compute how much the weakly supervised method scores above another.

    Args:
        folders: (method, seed) -> folder with `predictions.jsonl`.
        other_method: One of `METHODS`.
        seeds: Seeds that both methods have.

    Returns:
        For each score: the mean difference over seeds, the bounds of its 95 % interval, and the difference of each
        seed.
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
        differences_by_score[name] = [
            float(np.mean(values)),
            *compute_interval(np.mean(resampled_differences, axis=0)),
            *values,
        ]
    return differences_by_score


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/weak_supervision.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("options", nargs="*", help="Options of the local launcher, such as num_workers=2.")
    parser.add_argument("--first", type=int, default=250, help="Training steps on class names.")
    parser.add_argument("--second", type=int, default=150, help="Training steps on captions.")
    parser.add_argument("--few", type=int, default=NUM_CAPTIONED_SCENES, help="Scenes with captions.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs per method, each with its own seed.")
    parser.add_argument("--scenes", type=int, default=150, help="Unseen scenes to evaluate on.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    import sca_registry
    from sca_bench.worker import collect_environment
    from sca_registry.overrides import parse_assignments

    from sca.launchers.task import Task

    seeds = range(args.seeds)
    steps = {"first": args.first, "second": args.second, "scenes": args.scenes, "few": args.few}
    with TemporaryDirectory() as temporary_folder:
        folders = {
            (method, seed): Path(temporary_folder, f"{METHODS.index(method)}-{seed}")
            for method in METHODS
            for seed in seeds
        }
        tasks = []
        for (method, seed), folder in folders.items():
            folder.mkdir()
            config = {"way": method, "seed": seed, "device": "cpu", **steps}
            tasks.append(Task(folder.name, "weak_supervision_job:work", config, str(folder)))
        launcher = sca_registry.launchers.build("local", **parse_assignments(args.options))
        scores_by_run = {}
        for outcome in launcher.run_tasks(tasks):
            if outcome.result["state"] != "done":
                raise SystemExit(f"{outcome.task.key}: {outcome.result}")
            scores_by_run[outcome.task.config["way"], outcome.task.config["seed"]] = outcome.result["scores"]
        results = {
            **steps,
            "many": NUM_NAMED_SCENES,
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
    """Render a Markdown table of the mean scores by method, and the differences from the first method."""
    rows = [f"| | {' | '.join(SCORE_LABELS.values())} |", "| --- |" + " ---: |" * len(SCORE_LABELS)]
    for method, scores in results["scores"].items():
        rows.append(
            f"| {method} | {' | '.join(f'{np.mean([each[name] for each in scores]):.3f}' for name in SCORE_LABELS)} |"
        )
    for method, differences in results["differences"].items():
        cells = (
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            for mean, low, high, *_ in (differences[name] for name in SCORE_LABELS)
        )
        rows.append(f"| the first above: {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
