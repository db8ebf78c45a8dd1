"""Does weak supervision help? `python benchmarks/studies/weak_supervision.py [--out FILE] [workers=2 ...]`

The claim of SCA (arXiv 2312.00869) on generated data: a model that first learns class names of many scenes and then
captions of few is compared with one that learns the few captions alone, for as many steps as the former's second stage
and for as many as both of its stages. All are asked about the same unseen scenes. Prints a Markdown table and writes
the figures as JSON; differences have 95 % intervals over images, means over seeds resampled together.
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
from two_stages import FEW, MANY, METRICS, WAYS

SHOWN = {"cider-d": "CIDEr-D", "attributes/all": "all attributes", "mask-iou/mean": "mask IoU"}


def differences(folders: Mapping[tuple[str, int], Path], other: str, seeds: Sequence[int]) -> dict[str, list[float]]:
    """What the first way scores above another, mean over seeds, with the interval."""
    from sca.evaluation.comparison import sums_of
    from sca.evaluation.evaluate import score_file
    from sca.evaluation.intervals import interval, resample

    found = {}
    reports = {key: score_file(folder / "predictions.jsonl", METRICS) for key, folder in folders.items()}
    for name in SHOWN:
        values = [reports[WAYS[0], seed].scores[name] - reports[other, seed].scores[name] for seed in seeds]
        drawn = [
            resample(*sums_of(reports[WAYS[0], seed])[name]) - resample(*sums_of(reports[other, seed])[name])
            for seed in seeds
        ]
        found[name] = [float(np.mean(values)), *interval(np.mean(drawn, axis=0)), *values]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/weak_supervision.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("options", nargs="*", help="of the local launcher: workers=2")
    parser.add_argument("--first", type=int, default=250, help="steps of names")
    parser.add_argument("--second", type=int, default=150, help="steps of captions")
    parser.add_argument("--few", type=int, default=FEW, help="scenes with captions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=150, help="unseen scenes to be asked about")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args(arguments)

    import sca_registry
    from sca_bench.worker import environment
    from sca_registry.overrides import read_assignments

    from sca.launchers.task import Task

    seeds = range(given.seeds)
    steps = {"first": given.first, "second": given.second, "scenes": given.scenes, "few": given.few}
    with TemporaryDirectory() as place:
        folders = {(way, seed): Path(place, f"{WAYS.index(way)}-{seed}") for way in WAYS for seed in seeds}
        tasks = []
        for (way, seed), folder in folders.items():
            folder.mkdir()
            config = {"way": way, "seed": seed, "device": "cpu", **steps}
            tasks.append(Task(folder.name, "two_stages:work", config, str(folder)))
        launcher = sca_registry.launchers.build("local", **read_assignments(given.options))
        made = {}
        for outcome in launcher.map(tasks):
            if outcome.made["state"] != "done":
                raise SystemExit(f"{outcome.task.key}: {outcome.made}")
            made[outcome.task.config["way"], outcome.task.config["seed"]] = outcome.made["scores"]
        results = {
            **steps,
            "many": MANY,
            "scores": {way: [{name: made[way, seed][name] for name in SHOWN} for seed in seeds] for way in WAYS},
            "differences": {way: differences(folders, way, seeds) for way in WAYS[1:]},
            "environment": environment("cpu"),
        }
    print(table(results))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(given.out, json.dumps(results, indent=1))


def table(results: Mapping[str, Any]) -> str:
    """Markdown: the mean of each score by way, and what the first way has above the others."""
    rows = [f"| | {' | '.join(SHOWN.values())} |", "| --- |" + " ---: |" * len(SHOWN)]
    for way, scores in results["scores"].items():
        rows.append(f"| {way} | {' | '.join(f'{np.mean([each[name] for each in scores]):.3f}' for name in SHOWN)} |")
    for way, found in results["differences"].items():
        told = (f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high, *_ in (found[name] for name in SHOWN))
        rows.append(f"| the first above: {way} | {' | '.join(told)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
