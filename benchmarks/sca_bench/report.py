"""The report of a sweep: one page, offline; Markdown; CSV. The same rows give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sca.io.text import escape_markdown, format_csv
from sca.output.colours import COLOURS
from sca.output.page import render
from sca_bench.states import ROW_STATES
from sca_bench.summary import CombinationSummary, find_varying_settings, find_shared_parts, find_pareto_front, summarize_rows, choose_quality_score
from sca_bench.timing import STAGES

WIDTH, HEIGHT, MARGIN = 560, 320, 48  # of a picture, pixels
FIGURES = (
    *(
        "seeds",
        "parameters, M",
        "trained, M",
        "GFLOP encode",
        "GFLOP the rest",
        "score",
        "95 % interval",
    ),
    *("over seeds", "first caption, ms", "regions/s", "step, ms", "memory, GiB"),
)


class Chart(NamedTuple):
    """Lines and dots between two axes, in pixels; places are those of combinations in the table as it first stands."""

    title: str
    across: tuple[str, str, str]  # the axis at the bottom: text at its ends, and what it shows
    up: tuple[str, str, str]
    lines: list[tuple[str, list[tuple[float, float]]]]  # CSS classes, and points
    dots: list[tuple[int, float, float]]
    labels: list[tuple[int, float, float]]


class Bars(NamedTuple):
    """Seconds by stage, of each combination that was timed."""

    rows: list[tuple[int, Mapping[str, float]]]
    stages: tuple[str, ...]
    longest: float  # seconds of all stages together


def page(rows: Sequence[Mapping[str, Any]], title: str, score: str | None = None) -> str:
    """One HTML file. score: what counts as quality (default: the most telling that there is)."""
    score = score or choose_quality_score(rows)
    found = summarize_rows(rows, score)
    words, figures = _columns(found, score)
    said = f"quality: {score}" if score else "without scores"
    charts = (_pareto(found, score), _memory(found, score), _curves(found))
    return render(
        "sweep.html",
        "sca_bench",
        title=title,
        facts=f"{_where(rows)}; {said}",
        headings=[*words, *figures],
        text_columns=len(words),
        rows=list(zip(*words.values(), *figures.values(), strict=True)),
        pale=_below_best(found),
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
        charts=[chart for chart in charts if chart],
        bars=_bars(found),
        unfinished=[(row["label"], row["state"], row["reason"]) for row in _ended(rows)],
        commands=[(line.label, line.command) for line in found],
    )


def markdown(rows: Sequence[Mapping[str, Any]], score: str | None = None) -> str:
    """A table, and below it what was not made."""
    score = score or choose_quality_score(rows)
    words, figures = _columns(summarize_rows(rows, score), score)
    told = [_row([*words, *figures]), f"|{' --- |' * len(words)}{' ---: |' * len(figures)}"]
    told += [_row(cells) for cells in zip(*words.values(), *figures.values(), strict=True)]
    others = [
        f"- {escape_markdown(row['label'])}: {escape_markdown(row['state'])}. {escape_markdown(row['reason'])}"
        for row in _ended(rows)
    ]
    said = f"Score: {escape_markdown(score)}; " if score else ""
    told += [*_speeds(summarize_rows(rows, score)), "", f"{said}{escape_markdown(_where(rows))}."]
    return "\n".join([*told, *([""] if others else []), *others]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def _columns(found: Sequence[CombinationSummary], score: str | None) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the columns of text and of figures of a table, by their headings.

    Text is what combinations differ in, figures are `FIGURES` and every score but the one that counts as quality.
    """
    words = find_varying_settings([line.config for line in found]) or {"combination": [line.label for line in found]}
    figures = dict(zip(FIGURES, map(list, zip(*map(_cells, found), strict=True)), strict=True)) if found else {}
    names = dict.fromkeys(name for line in found for name in line.scores if name != score)
    figures |= {name: [_score(line.scores.get(name)) for line in found] for name in names}
    return words, figures or {name: [] for name in FIGURES}


def _score(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _speeds(found: Sequence[CombinationSummary]) -> list[str]:
    """The regions a second of each combination by how many there are, and what its stages take at the most."""
    timed = [line for line in found if line.regions_per_second]
    if not timed:
        return []
    counts = sorted({regions for line in timed for regions in line.regions_per_second})
    heads = [*(f"at {regions}" for regions in counts), *(f"{stage}, ms" for stage in STAGES)]
    told = ["", "Regions a second by regions an image, and the stages at the most of them:", ""]
    axes = find_varying_settings([line.config for line in timed]) or {"combination": [line.label for line in timed]}
    told += [_row([*axes, *heads]), f"|{' --- |' * len(axes)}{' ---: |' * len(heads)}"]
    for line, words in zip(timed, zip(*axes.values(), strict=True), strict=True):
        speeds = [_scaled(line.regions_per_second.get(regions), 1) for regions in counts]
        stages = [_scaled(line.stages[stage], 1e-3) for stage in STAGES]
        told.append(_row([*words, *speeds, *stages]))
    return told


def table(rows: Sequence[Mapping[str, Any]], score: str | None = None) -> str:
    """CSV: a line a row, with every score and every timing."""
    score = score or choose_quality_score(rows)
    names = sorted({each["name"] for row in rows for each in row.get("scores") or () if each["control"] is None})
    ordered = sorted(rows, key=lambda row: (row["label"], row["key"]))
    axes = find_varying_settings([row["config"] for row in ordered])
    columns = ["key", "label", *axes, "state", "reason", "seed", "parameters", "trainable", "memory", *names]
    columns += ["regions", *STAGES, "first_caption", "regions_per_second", "training_step"]
    written: list[list[Any]] = [columns]
    for row, *settings in zip(ordered, *axes.values(), strict=True):
        scores = {each["name"]: each["value"] for each in row.get("scores") or () if each["control"] is None}
        parameters, memory = row.get("parameters") or {}, row.get("memory") or {}
        common = [row["key"], row["label"], *settings, row["state"], row["reason"], row["config"]["seed"]]
        common += [parameters.get("whole"), parameters.get("trainable"), memory.get("planned")]
        common += [scores.get(name) for name in names]
        for point in row.get("curve") or [None]:
            step = (row.get("training_step") or {}).get("median")
            timings = [None] * (3 + len(STAGES))
            if point:
                timings = [point["regions"], *(point["stages"][stage]["median"] for stage in STAGES)]
                timings += [point["first_caption"]["median"], point["regions_per_second"]]
            written.append([*common, *timings, step])
    return format_csv(written)


def _cells(line: CombinationSummary) -> list[str]:
    flops = {key: value for key, value in (line.flops or {}).items() if key not in ("images", "regions", "words")}
    rest = sum(flops.values()) - flops.get("encode", 0)
    return [
        str(len(line.rows)),
        _scaled(line.parameters, 1e6),
        _scaled(line.trainable, 1e6),
        _scaled(flops.get("encode"), 1e9),
        _scaled(rest if flops else None, 1e9),
        "" if line.quality is None else f"{line.quality:.3f}",
        "" if line.low is None or line.high is None else f"{line.low:.3f} to {line.high:.3f}",
        f"{min(line.seed_scores):.3f} to {max(line.seed_scores):.3f}" if len(line.seed_scores) > 1 else "",
        _scaled(line.first_caption, 1e-3),
        _scaled(line.max_regions_per_second, 1),
        _scaled(line.training_step, 1e-3),
        _scaled(line.memory, 2**30),
    ]


def _below_best(found: Sequence[CombinationSummary]) -> set[int]:
    """Indices of what is clearly below the best, by intervals that do not meet."""
    best = next((line.low for line in found if line.low is not None), None)
    return {n for n, line in enumerate(found) if best is not None and line.high is not None and line.high < best}


def _pareto(found: Sequence[CombinationSummary], score: str | None) -> Chart | None:
    points = [(place, line.max_regions_per_second, line.quality) for place, line in enumerate(found)]
    known = [(n, math.log10(x), y) for n, x, y in points if x and y is not None]
    return _scatter(known, "regions a second (log)", str(score), "quality and speed", lambda x: f"{10**x:.3g}")


def _memory(found: Sequence[CombinationSummary], score: str | None) -> Chart | None:
    points = [(place, line.memory, line.quality) for place, line in enumerate(found)]
    known = [(n, -math.log10(x), y) for n, x, y in points if x and y is not None]
    return _scatter(
        known,
        "memory, GiB (log, less to the right)",
        str(score),
        "quality and memory",
        lambda x: f"{10**-x / 2**30:.3g}",
    )


def _scatter(
    points: Sequence[tuple[int, float, float]], across: str, up: str, title: str, shown: Callable[[float], str]
) -> Chart | None:
    if len(points) < 2:
        return None
    place_x, low_x, high_x = _scale([x for _, x, _ in points], MARGIN, WIDTH - 12)
    place_y, low_y, high_y = _scale([y for *_, y in points], HEIGHT - MARGIN, 12)
    dots = [(n, place_x(x), place_y(y)) for n, x, y in points]
    best = find_pareto_front([(x, y) for _, x, y in points])
    return Chart(
        f"{title}; dashed: no combination is better in both. Numbers are places in the table as it first stands.",
        (shown(low_x), shown(high_x), across),
        (f"{low_y:.3g}", f"{high_y:.3g}", up),
        [("front", [dots[n][1:] for n in sorted(best, key=lambda n: points[n][1])])],
        dots,
        [(n, x + 7, y + 4) for n, x, y in dots],
    )


def _curves(found: Sequence[CombinationSummary]) -> Chart | None:
    curves = [(place, line.regions_per_second) for place, line in enumerate(found) if len(line.regions_per_second) > 1]
    if not curves:
        return None
    every = [(math.log10(x), math.log10(y)) for _, curve in curves for x, y in curve.items()]
    place_x, low_x, high_x = _scale([x for x, _ in every], MARGIN, WIDTH - 24)
    place_y, low_y, high_y = _scale([y for _, y in every], HEIGHT - MARGIN, 12)
    drawn = [
        (place, [(place_x(math.log10(x)), place_y(math.log10(y))) for x, y in sorted(curve.items())])
        for place, curve in curves
    ]
    return Chart(
        "speed over regions of an image",
        (f"{10**low_x:.3g}", f"{10**high_x:.3g}", "regions of an image (log)"),
        (f"{10**low_y:.3g}", f"{10**high_y:.3g}", "regions/s (log)"),
        [(f"curve c{place % len(COLOURS)}", points) for place, points in drawn],
        [],
        [(place, points[-1][0] + 3, points[-1][1] + 4) for place, points in drawn],
    )


def _bars(found: Sequence[CombinationSummary]) -> Bars | None:
    timed = [(place, line.stages) for place, line in enumerate(found) if line.stages]
    return Bars(timed, STAGES, max(sum(stages.values()) for _, stages in timed)) if timed else None


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], float, float]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return (lambda value: start + (value - low) / span * (end - start)), low, high


def _ended(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    order = list(ROW_STATES)
    return sorted(
        (row for row in rows if row["state"] != "done"), key=lambda row: (order.index(row["state"]), row["label"])
    )


def _where(rows: Sequence[Mapping[str, Any]]) -> str:
    """The parts that all rows share, and the devices and versions that they were made on."""
    places = {
        ", ".join([each["device"], *(f"{name} {version}" for name, version in each["versions"].items())])
        for row in rows
        if (each := row.get("environment"))
    }
    shared = find_shared_parts([row["config"] for row in rows])
    parts = f"in every row: {', '.join(f'{name} {value}' for name, value in shared.items())}; " if shared else ""
    return parts + ("; ".join(sorted(places)) or "nothing was made")


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.3g}" if value / unit < 1000 else f"{value / unit:,.0f}"
