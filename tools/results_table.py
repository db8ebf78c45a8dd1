"""Write the scores of the bundled models: `python tools/results_table.py [docs/evaluation.md] [benchmarks/results]`.

Reads every JSON file of the folder in alphabetical order. A file contains the output of `sca evaluate ... --json`, or a
list of such reports:

    {"model": "sca-tiny", "dataset": "scenes", "split": "test", "prompt_type": "box", "num_images": 500,
     "num_regions": 1700, "scores": {"attributes/all": 0.9, "mask-iou/mean": 0.8, ...},
     "controls": {"wrong-region": {...}}, ...}

Each report is a row, and so is each of its controls. A column appears if a report has its score. The text between the
two markers is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markers import write_between
from sca.io.json import read_json
from sca.io.score_format import UNDEFINED_SCORE, format_score
from sca.io.text import escape_markdown

START, END = "<!-- results -->", "<!-- /results -->"
COLUMN_TITLES = {
    "attributes/all": "all four attributes correct",
    "relations/correct": "relations correct",
    "positions/correct": "positions correct",
    "positions/stated": "captions that state one",
    "class/accuracy": "class accuracy by region",
    "class/area-accuracy": "class accuracy by area",
    "mask-iou/mean": "mask IoU",
    "region-sensitivity/caption": "captions follow the prompt",
    "region-sensitivity/recognition": "classes follow the prompt",
}
REQUIRED_FIELDS = {"model", "dataset", "split", "prompt_type", "num_images", "num_regions", "scores"}


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the reports of all JSON files.

    Raises:
        ValueError: A file contains anything else.
    """
    reports = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        for report in content if isinstance(content, list) else [content]:
            if not isinstance(report, dict) or not report.keys() >= REQUIRED_FIELDS:
                raise ValueError(f"{path} is neither the output of `sca evaluate --json` nor a list of such reports")
            reports.append(report)
    return reports


def render_results_table(reports: Iterable[Mapping[str, Any]]) -> str:
    """Render a Markdown table of scores in percent, with a dash for missing scores."""
    reports = list(reports)
    score_names = [name for name in COLUMN_TITLES if any(report["scores"].get(name) is not None for report in reports)]
    rows = [["model", "images", "prompt", "regions", *(COLUMN_TITLES[name] for name in score_names)]]
    rows.append(["---"] * 3 + ["---:"] * (1 + len(score_names)))
    for report in reports:
        images = f"{report['num_images']} of {report['dataset']} {report['split']}"
        for control, scores in {"": report["scores"], **report.get("controls", {})}.items():
            prompt = f"{report['prompt_type']}, {control}" if control else report["prompt_type"]
            cells = [_format_cell(scores.get(name)) for name in score_names]
            rows.append([report["model"], images, prompt, str(report["num_regions"]), *cells])
    return "\n".join(f"| {' | '.join(map(escape_markdown, row))} |" for row in rows)


def _format_cell(value: float | None) -> str:
    return UNDEFINED_SCORE if value is None else f"{format_score(value)}%"


def write_results_table(page: Path, folder: Path) -> None:
    """Write the table of the folder's reports between the markers.

    Raises:
        ValueError: No report exists, or a marker is missing.
    """
    reports = read_reports(folder)
    if not reports:
        raise ValueError(
            f"no report in {folder}: write one with sca evaluate MODEL DATASET --json > {folder}/NAME.json"
        )
    write_between(page, START, END, render_results_table(reports))


def main(page: str = "docs/evaluation.md", folder: str = "benchmarks/results") -> None:
    try:
        write_results_table(Path(page), Path(folder))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
