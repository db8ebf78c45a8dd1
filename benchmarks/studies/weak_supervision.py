"""Test whether weak supervision helps: `python benchmarks/studies/weak_supervision.py [--out FILE] [num_workers=2 ...]`

Tests the claim of SCA (arXiv 2312.00869) on generated data. A model that first learns class names of many scenes and
then captions of a few is compared with models that only learn the few captions: for the number of steps of its second
stage, and of both stages together. All are evaluated on the same unseen scenes. Prints a Markdown table and writes the
results as JSON. Differences have 95% confidence intervals over images; the mean over seeds is resampled.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from score_table import compute_differences, render_table
from study_results import write_results
from weak_supervision_job import METHODS, METRICS, NUM_CAPTIONED_SCENES, NUM_NAMED_SCENES

SCORE_LABELS = {"cider-d": "CIDEr-D", "attributes/all": "all four attributes correct", "mask-iou/mean": "mask IoU"}


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

    from sca.evaluation.evaluate import score_file
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
        reports = {
            method: [score_file(folders[method, seed] / "predictions.jsonl", METRICS) for seed in seeds]
            for method in METHODS
        }
        results = {
            **settings,
            "num_named_scenes": NUM_NAMED_SCENES,
            "scores": {
                method: [{name: scores_by_run[method, seed][name] for name in SCORE_LABELS} for seed in seeds]
                for method in METHODS
            },
            "differences": {
                method: compute_differences(reports[METHODS[0]], reports[method], SCORE_LABELS)
                for method in METHODS[1:]
            },
            "environment": collect_environment("cpu"),
        }
    print(render_results(results))
    write_results(results, args.out)


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of mean scores by method, times 100, and differences of the first method."""
    scores = {
        method: {name: mean(each[name] for each in each_seed) for name in SCORE_LABELS}
        for method, each_seed in results["scores"].items()
    }
    differences = {f"difference to {method}": each for method, each in results["differences"].items()}
    return render_table(SCORE_LABELS, scores, differences)


if __name__ == "__main__":
    main()
