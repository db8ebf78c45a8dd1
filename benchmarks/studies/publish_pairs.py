"""Publish the trained models of `pairs.toml`: `python benchmarks/studies/publish_pairs.py RESULTS`

First train them, from the root of the repository:

    sca bench run benchmarks/studies/pairs.toml --out RESULTS

The rows are timed: nothing else should run. With `num_workers=2`, the trainings run in parallel. Then delete
`results.jsonl` and `rows` in RESULTS, and run the command above again: it reuses the trained models.

Prints a table of quality, speed and memory, and writes the models of the two Pareto fronts (quality and speed, quality
and memory) as portable checkpoints with model cards to `benchmarks/pairs`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sca_bench.row_training import MODEL_NAME, MODELS_FOLDER
from sca_bench.store import ResultStore
from sca_bench.summary import CombinationSummary, find_pareto_front
from sca_bench.sweep import VARIANT_AXIS, Combination, Sweep, read_sweep_text

from sca.checkpoints.load import load
from sca.checkpoints.portable import write_portable_checkpoint
from sca.io.errors import InputError
from sca.io.score_format import format_interval, format_score

PAIRS = Path(__file__).with_name("pairs.toml")
OUT = Path("benchmarks/pairs")
QUALITY_SCORE, ATTRIBUTE_SCORE = "cider-d", "attributes/all"


def summarize_pairs(results: Path) -> dict[str, tuple[Combination, CombinationSummary]]:
    """Return the combination and the results of each variant; raise InputError for unfinished results."""
    text, name = read_sweep_text(str(PAIRS))
    sweep = Sweep.parse(text, name)
    rows_by_key = {row["key"]: row for row in ResultStore(results).read_rows() if row["state"] == "done"}
    (study,) = sweep.studies
    combinations = {each.settings[VARIANT_AXIS]: each for each in sweep.list_combinations(study)}
    if missing := [variant for variant, each in combinations.items() if each.row.key not in rows_by_key]:
        raise InputError(f"{results} lacks the finished rows {', '.join(missing)}; run the sweep again")
    return {
        variant: (each, CombinationSummary.from_rows([rows_by_key[each.row.key]], QUALITY_SCORE))
        for variant, each in combinations.items()
    }


def find_published(summaries: Mapping[str, CombinationSummary]) -> dict[str, str]:
    """Return the pairs on a Pareto front: name -> what no other pair exceeds together with the quality."""
    names = list(summaries)
    quality = [summaries[name].quality or 0.0 for name in names]
    speed = [summaries[name].max_regions_per_second or 0.0 for name in names]
    memory = [-(summaries[name].memory or 0) for name in names]
    fronts = {"speed": set(find_pareto_front(list(zip(quality, speed, strict=True))))}
    fronts["memory"] = set(find_pareto_front(list(zip(quality, memory, strict=True))))
    reasons = {
        name: ", ".join(label for label, front in fronts.items() if index in front) for index, name in enumerate(names)
    }
    return {name: reason for name, reason in reasons.items() if reason}


def format_table(summaries: Mapping[str, CombinationSummary], published: Mapping[str, str]) -> str:
    """Return a Markdown table, best quality first."""
    lines = [
        "| pair | CIDEr-D (95% CI) | all attributes | parameters (M) | regions/s | peak memory (MB) | Pareto front |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, summary in sorted(summaries.items(), key=lambda item: -(item[1].quality or 0.0)):
        quality = f"{format_score(summary.quality)} ({format_interval(summary.ci_low, summary.ci_high)})"
        label = f"[{name}](../benchmarks/pairs/{name}/README.md)" if name in published else name
        cells = (
            label,
            quality,
            format_score(summary.scores[ATTRIBUTE_SCORE]),
            f"{(summary.parameters or 0) / 1e6:.2f}",
            f"{summary.max_regions_per_second or 0:.0f}",
            f"{(summary.memory or 0) / 1e6:.0f}",
            published.get(name, ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def publish_pair(name: str, combination: Combination, summary: CombinationSummary, results: Path) -> None:
    """Write a portable checkpoint and its model card."""
    key = combination.row.make_stage_keys()[-1]
    folder = OUT / name
    model = load(results / MODELS_FOLDER / key / MODEL_NAME, allow_external=True)
    shutil.rmtree(folder, ignore_errors=True)
    write_portable_checkpoint(model, folder)
    (folder / "README.md").write_text(format_card(name, combination.row.config, summary), "utf-8")


def format_card(name: str, config: Mapping[str, Any], summary: CombinationSummary) -> str:
    """Return the model card."""
    scenes, training = config["train"]["data"]["scenes"], config["train"]
    return f"""# {name}

Captions of drawn shapes: a pretrained tiny encoder and language model, both frozen, with a trained mixer. For
experiments and tests; not for photographs.

```sh
sca caption examples/scene.png --box 370,434,448,512 --model benchmarks/pairs/{name}
```

- Trained for {training["steps"]} steps of {training["batch_size"]} images on {scenes["num_images"]} synthetic scenes.
- CIDEr-D (x 100) on 500 scenes of the split test: {format_score(summary.quality)}; captions with all four attributes
  correct: {format_score(summary.scores[ATTRIBUTE_SCORE])}%.
- License: Apache-2.0. The frozen parts were trained on synthetic scenes and on photographs of CamVid; see the model
  cards in the subfolders.

`spec.json` contains the components and their options. `benchmarks/studies/publish_pairs.py` describes how to reproduce
the checkpoint.
"""


def main() -> None:
    """Print the table and write the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of pairs.toml")
    arguments = parser.parse_args()
    try:
        pairs = summarize_pairs(arguments.results)
    except InputError as error:
        parser.error(str(error))
    summaries = {name: summary for name, (_, summary) in pairs.items()}
    published = find_published(summaries)
    print(format_table(summaries, published))
    for name in published:
        publish_pair(name, *pairs[name], arguments.results)
    print(json.dumps({"published": list(published)}))


if __name__ == "__main__":
    main()
