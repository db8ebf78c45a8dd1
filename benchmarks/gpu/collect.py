"""Add rows of GPU runs to the repository and write them into the tables: `python benchmarks/gpu/collect.py [PATH...]`

A path is a folder that run.sh wrote, or a *.jsonl file of such rows. benchmarks/results/gpu/rows.jsonl keeps one row
for each measurement and device; a new row replaces an older one unless only the older was measured. Without a path,
only the tables are written again.
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
from sca.io.text import escape_markdown

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))  # programs that are not installed
START, END = "<!-- gpu -->", "<!-- /gpu -->"
GIB = 2**30
REQUIRED = ("key", "part", "label", "config", "state", "reason", "environment")
Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="Folder that run.sh wrote, or *.jsonl file."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu", help="Folder of kept rows.")
    parser.add_argument("--guide", type=Path, default=ROOT / "benchmarks/README.md", help="Page for all tables.")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="Page for the headline.")
    given = parser.parse_args(arguments)
    kept = given.results / "rows.jsonl"
    try:
        rows = merge(read_rows(kept) if kept.is_file() else [], *(read_rows(file) for file in find_files(given.paths)))
        pages = {given.guide: tables(rows), given.readme: headline(rows)}
        given.results.mkdir(parents=True, exist_ok=True)
        if rows:
            write_file(kept, encode_lines(rows))
        from markers import write_between

        for page, content in pages.items():
            write_between(page, START, END, content)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} rows in {kept}; wrote {given.guide} and {given.readme}")


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the *.jsonl files that paths name.

    Raises:
        ValueError: A path that contains none.
    """
    files = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} contains no *.jsonl file; name a folder that run.sh wrote")
        files += found
    return files


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, without a last line that was cut off when its run was killed.

    Raises:
        ValueError: A line that is not a row.
    """
    whole = path.read_text("utf-8").rpartition("\n")[0]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not _is_row(row):
            raise ValueError(
                f"{path}, line {number} is not a row of run.sh; a row has {', '.join(REQUIRED)} with a device"
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or any(key not in row for key in REQUIRED):
        return False
    environment = row["environment"]
    return isinstance(row["config"], dict) and isinstance(environment, dict) and bool(environment.get("device"))


def merge(*groups: Iterable[Row]) -> list[Row]:
    """Return one row for each measurement and device: the newest that was measured, else the newest."""
    rows: dict[tuple[str, str], Row] = {}
    for row in (row for group in groups for row in group):
        name = row["environment"]["device"], row["key"]
        if row["state"] == "done" or name not in rows or rows[name]["state"] != "done":
            rows[name] = row
    return list(rows.values())


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> str:
    """Return every table in Markdown, device by device."""
    if not rows:
        return "No GPU run is recorded yet."
    return "\n\n".join(_device(device, [row for row in rows if _device_of(row) == device]) for device in _devices(rows))


def headline(rows: Sequence[Row]) -> str:
    """Return the sentence of the README; empty without a GPU run."""
    sentences = []
    for row in rows:
        for each in row.get("ratios", ()):
            if row["part"] == "published" and each["what"] == "captions, encoding included":
                sentences.append(
                    f"On one {_device_of(row)}, {row['label'].removeprefix('captions: ')} with random weights captions "
                    f"{each['ours']:,.0f} regions/s, encoding included; the published procedure in the same process "
                    f"{each['published']:,.0f} ({each['ours'] / each['published']:.1f}x). All rows: "
                    "[benchmarks](benchmarks/README.md#on-a-gpu)."
                )
    return "\n\n".join(sentences)


def _device_of(row: Row) -> str:
    return row["environment"]["device"]


def _devices(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(map(_device_of, rows)))


def _device(device: str, rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["state"] == "done"]
    parts = [f"### {device}", _versions(measured or rows)]
    for title, heads, cells in TABLES:
        body = [line for row in measured for line in cells(row)]
        if body:
            parts.append(f"{title}\n\n{_table(heads, body)}")
    failed = [row for row in rows if row["state"] != "done"]
    if failed:
        lines = [
            f"- {row['part']}, {escape_markdown(row['label'])}: {row['state']}. {_short(row['reason'])}"
            for row in failed
        ]
        parts.append("\n".join(["Not measured:", "", *lines]))
    return "\n\n".join(parts)


def _versions(rows: Sequence[Row]) -> str:
    """Return versions and commits, which may differ from run to run."""
    found = [row["environment"] for row in rows]
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in each.get("versions", {}).items()) for each in found
    )
    commits = dict.fromkeys(_short_commit(each["commit"]) for each in found if each.get("commit"))
    listed = "; ".join(each for each in versions if each)
    return f"{listed}{'; commit ' if commits else ''}{', '.join(commits)}."


def _short_commit(commit: str) -> str:
    """Return ten digits of a commit with what follows it, such as "with changes"."""
    number, space, rest = commit.partition(" ")
    return f"{number[:10]}{space}{rest}"


def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(heads) - 1)
    lines = (f"| {' | '.join(map(escape_markdown, line))} |" for line in body)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *lines])


def _short(reason: str) -> str:
    return escape_markdown(reason if len(reason) <= 200 else f"{reason[:200]} ...")


def _golden(row: Row) -> list[list[str]]:
    return [
        [f"{name}, {row['config']['dtype']}{_tf32(row)}", f"{max(_differences(each)):.1e}", f"{each['ids']:.1%}"]
        for name, each in row.get("golden", {}).items()
    ]


def _differences(golden: Mapping[str, float]) -> list[float]:
    return [value for name, value in golden.items() if name != "ids"]


def _tf32(row: Row) -> str:
    return " with TF32 convolutions" if row["config"].get("tf32") else ""


def _scenes(row: Row) -> list[list[str]]:
    found = row.get("scenes")
    if not found:
        return []
    figures = [f"{found['captions']:.1%}", f"{found['mean_iou']:.4f}", f"{found['least_iou']:.4f}"]
    return [[f"{found['regions']} regions, {row['config']['dtype']}{_tf32(row)}", *figures]]


def _ratios(row: Row) -> list[list[str]]:
    return [
        [
            f"{each['what']} ({each['note']})",
            each["unit"],
            *(f"{each[name]:,.4g}" for name in ("ours", "published")),
            f"{each['ours'] / each['published']:.2f}",
        ]
        for each in row.get("ratios", ())
    ]


def _throughput(row: Row) -> list[list[str]]:
    if row["part"] != "throughput":
        return []
    name = row["label"].rpartition(", ")[0]
    lines = []
    for point in row["curve"]:
        stages = [f"{1e3 * point['stages'][stage]['median']:,.1f}" for stage in STAGES]
        speed = f"{point['regions_per_second']:,.0f}"
        lines.append([name, f"{point['regions']}", speed, *stages, _gib(point.get("peak"))])
    return lines


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"


def _plans(row: Row) -> list[list[str]]:
    if "plan" not in row:
        return []
    planned, measured = row["plan"]["memory"]
    return [[row["label"], _gib(planned), _gib(measured), f"{planned / measured:.3f}"]]


def _steps(row: Row) -> list[list[str]]:
    if "training_step" not in row:
        return []
    whole, cached = row["training_step"], row.get("training_step_cached")
    figures = [f"{1e3 * whole['median']:,.1f}", f"{1e3 * cached['median']:,.1f}" if cached else ""]
    return [
        [row["label"], f"{row['parameters']['trainable'] / 1e6:.1f}", *figures, _gib(row["memory"].get("training"))]
    ]


def _decoding(row: Row) -> list[list[str]]:
    found = row.get("decoding")
    if not found:
        return []
    figures = [f"{1e3 * found['seconds']['median']:,.1f}", f"{found['tokens_per_second']:,.0f}"]
    return [[row["label"], *figures, f"{found['prepared']:.1f}", f"{found['ids']:.1%}"]]


def _scores(row: Row) -> list[list[str]]:
    if "scores" not in row:
        return []
    figures = {each["name"]: each["value"] for each in row["scores"] if each["control"] is None}
    shown = [
        f"{figures[name]:.3f}" if figures.get(name) is not None else "" for name in ("attributes/all", "mask-iou/mean")
    ]
    return [[row["label"], f"{row['config']['train']['steps']}", f"{row['seconds']['train']:,.0f}", *shown]]


TABLES: Sequence[tuple[str, Sequence[str], Callable[[Row], list[list[str]]]]] = (
    (
        "Golden checkpoints of the published implementation:",
        ("checkpoint", "largest difference", "identical captions"),
        _golden,
    ),
    (
        "Captions and masks of sca-tiny compared with float32 on the CPU:",
        ("data", "identical captions", "mean mask IoU", "least mask IoU"),
        _scenes,
    ),
    (
        "Compared with the published procedure in the same process:",
        ("quantity", "unit", "ours", "published", "ratio"),
        _ratios,
    ),
    (
        "Throughput, random weights; stages in ms for all regions of the batch:",
        ("combination", "regions", "captions/s", *STAGES, "peak GiB"),
        _throughput,
    ),
    ("Memory that `sca plan` predicts:", ("model", "planned GiB", "measured GiB", "ratio"), _plans),
    (
        "A training step:",
        ("combination", "trainable, M", "step, ms", "with cached features, ms", "peak GiB"),
        _steps,
    ),
    (
        "Decoding with GPT-2 large:",
        ("method", "ms", "tokens/s", "preparation, s", "identical ids"),
        _decoding,
    ),
    ("Training sca-tiny:", ("recipe", "steps", "seconds", "attributes", "mask IoU"), _scores),
)


if __name__ == "__main__":
    main()
