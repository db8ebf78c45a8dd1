"""Add rows of GPU runs to the repository and update the tables: `python benchmarks/gpu/collect.py [PATH...]`

A path is a folder written by run.sh, or a *.jsonl file of its rows. benchmarks/results/gpu/rows.jsonl contains one row
per measurement and device; a new row replaces an older one unless only the older one was measured. Without a path, only
the tables are updated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sca_bench.timing import STAGES

from sca.io.atomic import write_file
from sca.io.journal import encode_lines
from sca.io.score_format import format_score
from sca.io.text import escape_markdown

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))  # modules that are not installed
START, END = "<!-- gpu -->", "<!-- /gpu -->"
GIB = 2**30
REQUIRED_KEYS = ("key", "part", "label", "config", "state", "reason", "environment")
ResultRow = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="Folder that run.sh wrote, or *.jsonl file."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu", help="Folder of kept rows.")
    parser.add_argument("--guide", type=Path, default=ROOT / "docs/benchmarks.md", help="Page for all tables.")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="Page for the headline.")
    args = parser.parse_args(arguments)
    rows_path = args.results / "rows.jsonl"
    try:
        rows = merge_rows(
            read_rows(rows_path) if rows_path.is_file() else [],
            *(read_rows(file) for file in find_jsonl_files(args.paths)),
        )
        pages = {args.guide: render_tables(rows), args.readme: render_headline(rows)}
        args.results.mkdir(parents=True, exist_ok=True)
        if rows:
            write_file(rows_path, encode_lines(rows))
        from markers import write_between

        for page, content in pages.items():
            write_between(page, START, END, content)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} rows in {rows_path}; wrote {args.guide} and {args.readme}")


def find_jsonl_files(paths: Iterable[Path]) -> list[Path]:
    """Return the *.jsonl files of paths.

    Raises:
        ValueError: A path contains none.
    """
    files = []
    for path in paths:
        matches = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not matches:
            raise ValueError(f"{path} contains no *.jsonl file; name a folder that run.sh wrote")
        files += matches
    return files


def read_rows(path: Path) -> list[ResultRow]:
    """Return the rows of a file, without a truncated last line.

    Raises:
        ValueError: A line is not a row.
    """
    complete_text = path.read_text("utf-8").rpartition("\n")[0]
    rows = []
    for number, line in enumerate(complete_text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not _is_row(row):
            raise ValueError(
                f"{path}, line {number} is not a row of run.sh; a row has {', '.join(REQUIRED_KEYS)} with a device"
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or any(key not in row for key in REQUIRED_KEYS):
        return False
    environment = row["environment"]
    return isinstance(row["config"], dict) and isinstance(environment, dict) and bool(environment.get("device"))


def merge_rows(*groups: Iterable[ResultRow]) -> list[ResultRow]:
    """Return one row per measurement and device: the newest that was measured, else the newest."""
    rows: dict[tuple[str, str], ResultRow] = {}
    for row in (row for group in groups for row in group):
        row_key = row["environment"]["device"], row["key"]
        if row["state"] == "done" or row_key not in rows or rows[row_key]["state"] != "done":
            rows[row_key] = row
    return list(rows.values())


# --- tables -----------------------------------------------------------------------------------------------------------


def render_tables(rows: Sequence[ResultRow]) -> str:
    """Render all tables in Markdown, grouped by device."""
    if not rows:
        return "No GPU run is recorded yet."
    return "\n\n".join(
        _render_device(device, [row for row in rows if _get_device(row) == device]) for device in _list_devices(rows)
    )


def render_headline(rows: Sequence[ResultRow]) -> str:
    """Render the sentence for the README; empty without a GPU run."""
    sentences = []
    for row in rows:
        for each in row.get("ratios", ()):
            if row["part"] == "published" and each["quantity"] == "captions, including encoding":
                sentences.append(
                    f"On one {_get_device(row)}, {row['label'].removeprefix('captions: ')} with random weights "
                    f"captions {each['ours']:,.0f} regions/s, including encoding; our reproduction of the "
                    f"original SCA implementation in the same process {each['reference']:,.0f} "
                    f"({each['ours'] / each['reference']:.1f}x). All rows: "
                    "[benchmarks](docs/benchmarks.md#gpu)."
                )
    return "\n\n".join(sentences)


def _get_device(row: ResultRow) -> str:
    return row["environment"]["device"]


def _list_devices(rows: Iterable[ResultRow]) -> list[str]:
    return list(dict.fromkeys(map(_get_device, rows)))


def _render_device(device: str, rows: Sequence[ResultRow]) -> str:
    done_rows = [row for row in rows if row["state"] == "done"]
    parts = [f"### {device}", _render_versions(done_rows or rows)]
    for title, headings, make_cells in RESULT_TABLES:
        body_rows = [line for row in done_rows for line in make_cells(row)]
        if body_rows:
            parts.append(f"{title}\n\n{_render_table(headings, body_rows)}")
    failed_rows = [row for row in rows if row["state"] != "done"]
    if failed_rows:
        lines = [
            f"- {row['part']}, {escape_markdown(row['label'])}: {row['state']}. {_shorten_reason(row['reason'])}"
            for row in failed_rows
        ]
        parts.append("\n".join(["Not measured:", "", *lines]))
    return "\n\n".join(parts)


def _render_versions(rows: Sequence[ResultRow]) -> str:
    """Render versions and commits, which may differ between runs."""
    environments = [row["environment"] for row in rows]
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in each.get("versions", {}).items()) for each in environments
    )
    commits = dict.fromkeys(_shorten_commit(each["commit"]) for each in environments if each.get("commit"))
    version_text = "; ".join(each for each in versions if each)
    return f"{version_text}{'; commit ' if commits else ''}{', '.join(commits)}."


def _shorten_commit(commit: str) -> str:
    """Shorten a commit to ten digits, keeping any suffix such as "with changes"."""
    commit_hash, space, suffix = commit.partition(" ")
    return f"{commit_hash[:10]}{space}{suffix}"


def _render_table(headings: Sequence[str], body_rows: Iterable[Sequence[str]]) -> str:
    separator = "| --- |" + " ---: |" * (len(headings) - 1)
    lines = (f"| {' | '.join(map(escape_markdown, line))} |" for line in body_rows)
    return "\n".join([f"| {' | '.join(headings)} |", separator, *lines])


def _shorten_reason(reason: str) -> str:
    return escape_markdown(reason if len(reason) <= 200 else f"{reason[:200]} ...")


def _make_golden_cells(row: ResultRow) -> list[list[str]]:
    return [
        [
            f"{name}, {row['config']['dtype']}{_format_tf32(row)}",
            f"{max(_list_differences(each)):.1e}",
            f"{each['identical_captions']:.1%}",
        ]
        for name, each in row.get("golden", {}).items()
    ]


def _list_differences(golden: Mapping[str, float]) -> list[float]:
    return [value for name, value in golden.items() if name != "identical_captions"]


def _format_tf32(row: ResultRow) -> str:
    return " with TF32 convolutions" if row["config"].get("tf32") else ""


def _make_scene_cells(row: ResultRow) -> list[list[str]]:
    scenes = row.get("scenes")
    if not scenes:
        return []
    cells = [f"{scenes['identical_captions']:.1%}", f"{scenes['mean_iou']:.4f}", f"{scenes['min_iou']:.4f}"]
    return [[f"{scenes['num_regions']} regions, {row['config']['dtype']}{_format_tf32(row)}", *cells]]


def _make_ratio_cells(row: ResultRow) -> list[list[str]]:
    return [
        [
            f"{each['quantity']} ({each['note']})",
            each["unit"],
            *(f"{each[name]:,.4g}" for name in ("ours", "reference")),
            f"{each['ours'] / each['reference']:.2f}",
        ]
        for each in row.get("ratios", ())
    ]


def _make_throughput_cells(row: ResultRow) -> list[list[str]]:
    if row["part"] != "throughput":
        return []
    name = row["label"].rpartition(", ")[0]
    lines = []
    for point in row["throughput"]:
        stages = [f"{1e3 * point['stages'][stage]['median']:,.1f}" for stage in STAGES]
        speed = f"{point['regions_per_second']:,.0f}"
        lines.append([name, f"{point['regions_per_image']}", speed, *stages, _format_gib(point.get("peak_memory"))])
    return lines


def _format_gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _make_plan_cells(row: ResultRow) -> list[list[str]]:
    if "plan" not in row:
        return []
    estimated, measured = row["plan"]["memory"]
    return [[row["label"], _format_gib(estimated), _format_gib(measured), f"{estimated / measured:.3f}"]]


def _make_step_cells(row: ResultRow) -> list[list[str]]:
    if "training_step" not in row:
        return []
    training_step, cached_step = row["training_step"], row.get("training_step_cached")
    cells = [f"{1e3 * training_step['median']:,.1f}", f"{1e3 * cached_step['median']:,.1f}" if cached_step else ""]
    return [
        [
            row["label"],
            f"{row['parameters']['trainable'] / 1e6:.1f}",
            *cells,
            _format_gib(row["memory"].get("training")),
        ]
    ]


def _make_decoding_cells(row: ResultRow) -> list[list[str]]:
    decoding = row.get("decoding")
    if not decoding:
        return []
    cells = [f"{1e3 * decoding['seconds']['median']:,.1f}", f"{decoding['tokens_per_second']:,.0f}"]
    return [[row["label"], *cells, f"{decoding['preparation_seconds']:.1f}", f"{decoding['identical_ids']:.1%}"]]


def _make_score_cells(row: ResultRow) -> list[list[str]]:
    if "scores" not in row:
        return []
    values = {each["name"]: each["value"] for each in row["scores"] if each["control"] is None}
    cells = [format_score(values.get(name)) for name in ("attributes/all", "mask-iou/mean")]
    return [[row["label"], f"{row['config']['train']['steps']}", f"{row['seconds']['train']:,.0f}", *cells]]


RESULT_TABLES: Sequence[tuple[str, Sequence[str], Callable[[ResultRow], list[list[str]]]]] = (
    (
        "Golden checkpoints of the published implementation:",
        ("checkpoint", "max difference", "identical captions"),
        _make_golden_cells,
    ),
    (
        "Captions and masks of sca-tiny compared with float32 on the CPU:",
        ("data", "identical captions", "mean mask IoU", "min mask IoU"),
        _make_scene_cells,
    ),
    (
        "Compared with our reproduction of the original SCA implementation in the same process:",
        ("quantity", "unit", "ours", "reference", "ratio (x)"),
        _make_ratio_cells,
    ),
    (
        "Throughput, random weights; stages in ms for all regions of the batch:",
        ("combination", "regions per image", "regions/s", *STAGES, "peak memory (GiB)"),
        _make_throughput_cells,
    ),
    ("Peak memory estimated by `sca plan`:", ("model", "estimated (GiB)", "measured (GiB)", "ratio"), _make_plan_cells),
    (
        "Training step:",
        ("combination", "trainable (M)", "time (ms)", "time with cached features (ms)", "peak memory (GiB)"),
        _make_step_cells,
    ),
    (
        "Decoding with GPT-2 large:",
        ("method", "time (ms)", "tokens/s", "preparation (s)", "identical ids"),
        _make_decoding_cells,
    ),
    (
        "Training sca-tiny, with scores times 100:",
        ("recipe", "steps", "time (s)", "all four attributes correct", "mask IoU"),
        _make_score_cells,
    ),
)


if __name__ == "__main__":
    main()
