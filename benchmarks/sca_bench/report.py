"""Render the report of a sweep as a self-contained HTML page, Markdown or CSV. Output is deterministic."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sca.io.score_format import PRINT_FACTOR, format_interval, format_score
from sca.io.text import escape_markdown, format_count, format_csv
from sca.output.colors import REGION_COLORS
from sca.output.html_page import render_template
from sca_bench.effects import Effect
from sca_bench.store import ROW_STATES
from sca_bench.study_report import (
    EFFECT_COLUMNS,
    TEXT_COLUMNS_OF_EFFECTS,
    StudyReport,
    build_setting_columns,
    build_study_reports,
    format_effect,
)
from sca_bench.summary import (
    CombinationSummary,
    choose_quality_score,
    find_pareto_front,
    find_shared_components,
    find_varying_settings,
    summarize_rows,
)
from sca_bench.sweep import Sweep
from sca_bench.timing import STAGES

CHART_WIDTH, CHART_HEIGHT, CHART_MARGIN = 560, 320, 48  # pixels
MAX_HEADING_CHARACTERS = 100_000
NUMERIC_COLUMNS = (
    *("seeds", "params (M)", "trainable (M)", "encoder GFLOPs", "other GFLOPs", "score", "95% CI", "std over seeds"),
    *("time to first token (ms)", "regions/s", "training step (ms)", "memory (GiB)", "cost (min)"),
)


class Chart(NamedTuple):
    """Lines and dots between two axes, in pixels. Indices refer to combinations in the initial order of the table."""

    title: str
    x_axis: tuple[str, str, str]  # text at the low end and at the high end, and label
    y_axis: tuple[str, str, str]
    lines: list[tuple[str, list[tuple[float, float]]]]  # CSS classes and points
    dots: list[tuple[int, float, float]]
    labels: list[tuple[int, float, float]]


class StageBars(NamedTuple):
    """Seconds by stage of each timed combination."""

    rows: list[tuple[int, Mapping[str, float]]]
    stages: tuple[str, ...]
    longest: float  # greatest total over the stages in seconds


def render_sweep_page(
    rows: Sequence[Mapping[str, Any]], title: str, score_name: str | None = None, sweep: Sweep | None = None
) -> str:
    """Render a self-contained HTML page, with scores times 100.

    Args:
        rows: Rows of the results file.
        title: Title of the page.
        score_name: Score that measures quality. Defaults to the most informative one available.
        sweep: Sweep of the rows, for the tables of its studies and comparisons.

    Returns:
        The HTML.
    """
    score_name = score_name or choose_quality_score(rows)
    summaries = summarize_rows(rows, score_name)
    text_columns = build_setting_columns(summaries, sweep)
    numeric_columns = _build_numeric_columns(summaries, score_name)
    quality_note = f"score: {score_name}, times 100" if score_name else "no scores"
    charts = (
        _build_speed_chart(summaries, score_name),
        _build_memory_chart(summaries, score_name),
        _build_throughput_chart(summaries),
    )
    return render_template(
        "sweep.html",
        "sca_bench",
        title=title,
        summary=f"{_describe_environments(rows)}; {quality_note}",
        headings=[*text_columns, *numeric_columns],
        text_columns=len(text_columns),
        rows=list(zip(*text_columns.values(), *numeric_columns.values(), strict=True)),
        dimmed=_find_below_best(summaries),
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        margin=CHART_MARGIN,
        charts=[chart for chart in charts if chart],
        bars=_build_stage_bars(summaries),
        effect_headings=EFFECT_COLUMNS,
        num_effect_text_columns=len(TEXT_COLUMNS_OF_EFFECTS),
        studies=[_build_study_section(each, score_name) for each in _list_study_reports(sweep, rows, score_name)],
        unfinished=[(row["label"], row["state"], row["reason"]) for row in _list_unfinished_rows(rows)],
        commands=[(summary.label, summary.command) for summary in summaries],
    )


def render_markdown(
    rows: Sequence[Mapping[str, Any]], score_name: str | None = None, sweep: Sweep | None = None
) -> str:
    """Render Markdown tables with scores times 100, followed by the rows that did not finish.

    A sweep with studies has one table of all expected effects, and one table of combinations per study. Another sweep
    has one table of combinations.

    Args:
        rows: Rows of the results file.
        score_name: Score that measures quality. Defaults to the most informative one available.
        sweep: Sweep of the rows, for the tables of its studies and comparisons.

    Returns:
        The Markdown.
    """
    score_name = score_name or choose_quality_score(rows)
    study_reports = _list_study_reports(sweep, rows, score_name)
    if any(each.title for each in study_reports):
        effects = [effect for each in study_reports for effect in each.effects]
        markdown_lines = [*_render_effects(effects), *_render_studies(study_reports, score_name)]
    else:
        summaries = summarize_rows(rows, score_name)
        text_columns = build_setting_columns(summaries, sweep)
        markdown_lines = _render_table(text_columns, _build_numeric_columns(summaries, score_name))
        for each in study_reports:
            markdown_lines += [*([""] if each.effects else []), *_render_effects(each.effects)]
            markdown_lines += [line for note in each.notes for line in ("", escape_markdown(note))]
    unfinished = [
        f"- {escape_markdown(row['label'])}: {escape_markdown(row['state'])}. {escape_markdown(row['reason'])}"
        for row in _list_unfinished_rows(rows)
    ]
    score_note = f"Score: {escape_markdown(score_name)}; scores times 100; " if score_name else ""
    markdown_lines += [
        *_render_speed_table(summarize_rows(rows, score_name), sweep),
        "",
        f"{score_note}{escape_markdown(_describe_environments(rows))}.",
    ]
    return "\n".join([*markdown_lines, *([""] if unfinished else []), *unfinished]) + "\n"


def _list_study_reports(
    sweep: Sweep | None, rows: Sequence[Mapping[str, Any]], score_name: str | None
) -> list[StudyReport]:
    return [] if sweep is None else build_study_reports(sweep, rows, score_name)


def _render_effects(effects: Sequence[Effect]) -> list[str]:
    if not effects:
        return []
    num_text = len(TEXT_COLUMNS_OF_EFFECTS)
    rule = f"|{' --- |' * num_text}{' ---: |' * (len(EFFECT_COLUMNS) - num_text)}"
    return [_render_table_row(EFFECT_COLUMNS), rule, *(_render_table_row(format_effect(each)) for each in effects)]


def _render_studies(study_reports: Sequence[StudyReport], score_name: str | None) -> list[str]:
    markdown_lines = []
    for each in study_reports:
        markdown_lines += ["", f"## {escape_markdown(each.title)}", "", escape_markdown(each.summary), ""]
        markdown_lines += _render_table(each.settings, _build_numeric_columns(each.summaries, score_name))
        markdown_lines += [line for note in each.notes for line in ("", escape_markdown(note))]
    return markdown_lines


def _build_study_section(study_report: StudyReport, score_name: str | None) -> dict[str, Any]:
    """Return the values of a study that the page shows."""
    numeric_columns = _build_numeric_columns(study_report.summaries, score_name)
    return {
        "title": study_report.title,
        "summary": study_report.summary,
        "headings": [*study_report.settings, *numeric_columns],
        "text_columns": len(study_report.settings),
        "rows": list(zip(*study_report.settings.values(), *numeric_columns.values(), strict=True)),
        "effects": [format_effect(each) for each in study_report.effects],
        "notes": study_report.notes,
    }


def _render_table(text_columns: Mapping[str, list[str]], numeric_columns: Mapping[str, list[str]]) -> list[str]:
    return [
        _render_table_row([*text_columns, *numeric_columns]),
        f"|{' --- |' * len(text_columns)}{' ---: |' * len(numeric_columns)}",
        *(_render_table_row(cells) for cells in zip(*text_columns.values(), *numeric_columns.values(), strict=True)),
    ]


def is_table_of_report(file: Path) -> bool:
    """Return whether a Markdown or CSV file starts with the headings of a report."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        headings = re.split(r" \| |\",\"", lines.readline(MAX_HEADING_CHARACTERS).strip('| "\n'))
    return any(
        {*columns} <= {*headings} for columns in (NUMERIC_COLUMNS, EFFECT_COLUMNS, (*STAGES, "key", "training_step"))
    )


def _render_table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def _build_numeric_columns(summaries: Sequence[CombinationSummary], score_name: str | None) -> dict[str, list[str]]:
    """Return the numeric columns of a table by heading: `NUMERIC_COLUMNS` and every other score."""
    if not summaries:
        return {name: [] for name in NUMERIC_COLUMNS}
    numeric_columns = dict(
        zip(NUMERIC_COLUMNS, map(list, zip(*map(_format_numeric_cells, summaries), strict=True)), strict=True)
    )
    names = dict.fromkeys(name for summary in summaries for name in summary.scores if name != score_name)
    return numeric_columns | {name: [format_score(summary.scores.get(name)) for summary in summaries] for name in names}


def _render_speed_table(summaries: Sequence[CombinationSummary], sweep: Sweep | None) -> list[str]:
    """Render regions per second by number of regions, and the stage times at the largest number."""
    timed_summaries = [summary for summary in summaries if summary.regions_per_second]
    if not timed_summaries:
        return []
    region_counts = sorted({num_regions for summary in timed_summaries for num_regions in summary.regions_per_second})
    headings = [*(format_count(count, "region") for count in region_counts), *(f"{stage} (ms)" for stage in STAGES)]
    markdown_lines = [
        "",
        "Regions per second by regions per image, and time per stage at the largest number of regions:",
        "",
    ]
    axes = build_setting_columns(timed_summaries, sweep)
    markdown_lines += [_render_table_row([*axes, *headings]), f"|{' --- |' * len(axes)}{' ---: |' * len(headings)}"]
    for summary, axis_values in zip(timed_summaries, zip(*axes.values(), strict=True), strict=True):
        speeds = [_format_in_unit(summary.regions_per_second.get(num_regions), 1) for num_regions in region_counts]
        stages = [_format_in_unit(summary.stages[stage], 1e-3) for stage in STAGES]
        markdown_lines.append(_render_table_row([*axis_values, *speeds, *stages]))
    return markdown_lines


def render_csv(rows: Sequence[Mapping[str, Any]], score_name: str | None = None) -> str:
    """Render CSV with one line per row, including every timing and raw score.

    Args:
        rows: Rows of the results file.
        score_name: Score that measures quality. Defaults to the most informative one available.

    Returns:
        The CSV.
    """
    score_name = score_name or choose_quality_score(rows)
    score_names = sorted({each["name"] for row in rows for each in row.get("scores") or () if each["control"] is None})
    sorted_rows = sorted(rows, key=lambda row: (row["label"], row["key"]))
    axes = find_varying_settings([row["config"] for row in sorted_rows])
    columns = ["key", "label", *axes, "state", "reason", "seed", "parameters", "trainable_parameters"]
    columns += ["estimated_memory", *score_names, "regions_per_image", *STAGES, "time_to_first_token"]
    columns += ["regions_per_second", "training_step"]
    csv_rows: list[list[Any]] = [columns]
    for row, *axis_values in zip(sorted_rows, *axes.values(), strict=True):
        scores = {each["name"]: each["value"] for each in row.get("scores") or () if each["control"] is None}
        parameters, memory = row.get("parameters") or {}, row.get("memory") or {}
        row_values = [row["key"], row["label"], *axis_values, row["state"], row["reason"], row["config"]["seed"]]
        row_values += [parameters.get("total"), parameters.get("trainable"), memory.get("estimated")]
        row_values += [scores.get(name) for name in score_names]
        for point in row.get("throughput") or [None]:
            step_seconds = (row.get("training_step") or {}).get("median")
            timings = [None] * (3 + len(STAGES))
            if point:
                timings = [point["regions_per_image"], *(point["stages"][stage]["median"] for stage in STAGES)]
                timings += [point["time_to_first_token"]["median"], point["regions_per_second"]]
            csv_rows.append([*row_values, *timings, step_seconds])
    return format_csv(csv_rows)


def _format_numeric_cells(summary: CombinationSummary) -> list[str]:
    flops = {key: value for key, value in (summary.flops or {}).items() if key in STAGES}
    other_flops = sum(flops.values()) - flops.get("encode", 0)
    return [
        str(len(summary.rows)),
        _format_in_unit(summary.parameters, 1e6),
        _format_in_unit(summary.trainable_parameters, 1e6),
        _format_in_unit(flops.get("encode"), 1e9),
        _format_in_unit(other_flops if flops else None, 1e9),
        format_score(summary.quality),
        format_interval(summary.ci_low, summary.ci_high),
        format_score(summary.seed_std),
        _format_in_unit(summary.time_to_first_token, 1e-3),
        _format_in_unit(summary.max_regions_per_second, 1),
        _format_in_unit(summary.training_step, 1e-3),
        _format_in_unit(summary.memory, 2**30),
        _format_in_unit(summary.cost, 60),
    ]


def _find_below_best(summaries: Sequence[CombinationSummary]) -> set[int]:
    """Return the indices of combinations whose interval is entirely below that of the best."""
    best_low = next((summary.ci_low for summary in summaries if summary.ci_low is not None), None)
    return {
        index
        for index, summary in enumerate(summaries)
        if best_low is not None and summary.ci_high is not None and summary.ci_high < best_low
    }


def _build_speed_chart(summaries: Sequence[CombinationSummary], score_name: str | None) -> Chart | None:
    points = [(index, summary.max_regions_per_second, summary.quality) for index, summary in enumerate(summaries)]
    plotted = [(n, math.log10(x), y) for n, x, y in points if x and y is not None]
    return _build_scatter_chart(
        plotted, "regions/s (log)", str(score_name), "Quality and speed", lambda x: f"{10**x:.3g}"
    )


def _build_memory_chart(summaries: Sequence[CombinationSummary], score_name: str | None) -> Chart | None:
    points = [(index, summary.memory, summary.quality) for index, summary in enumerate(summaries)]
    plotted = [(n, -math.log10(x), y) for n, x, y in points if x and y is not None]
    return _build_scatter_chart(
        plotted,
        "memory, GiB (log, decreasing)",
        str(score_name),
        "Quality and memory",
        lambda x: f"{10**-x / 2**30:.3g}",
    )


def _build_scatter_chart(
    points: Sequence[tuple[int, float, float]], x_label: str, y_label: str, title: str, format_x: Callable[[float], str]
) -> Chart | None:
    if len(points) < 2:
        return None
    scale_x, low_x, high_x = _make_axis_scale([x for _, x, _ in points], CHART_MARGIN, CHART_WIDTH - 12)
    scale_y, low_y, high_y = _make_axis_scale([y for *_, y in points], CHART_HEIGHT - CHART_MARGIN, 12)
    dots = [(n, scale_x(x), scale_y(y)) for n, x, y in points]
    front_indices = find_pareto_front([(x, y) for _, x, y in points])
    return Chart(
        f"{title}; dashed: Pareto front. Numbers: rows of the table in its initial order.",
        (format_x(low_x), format_x(high_x), x_label),
        (f"{PRINT_FACTOR * low_y:.3g}", f"{PRINT_FACTOR * high_y:.3g}", y_label),
        [("pareto-front", [dots[n][1:] for n in sorted(front_indices, key=lambda n: points[n][1])])],
        dots,
        [(n, x + 7, y + 4) for n, x, y in dots],
    )


def _build_throughput_chart(summaries: Sequence[CombinationSummary]) -> Chart | None:
    curves = [
        (index, summary.regions_per_second)
        for index, summary in enumerate(summaries)
        if len(summary.regions_per_second) > 1
    ]
    if not curves:
        return None
    log_points = [(math.log10(x), math.log10(y)) for _, curve in curves for x, y in curve.items()]
    scale_x, low_x, high_x = _make_axis_scale([x for x, _ in log_points], CHART_MARGIN, CHART_WIDTH - 24)
    scale_y, low_y, high_y = _make_axis_scale([y for _, y in log_points], CHART_HEIGHT - CHART_MARGIN, 12)
    polylines = [
        (index, [(scale_x(math.log10(x)), scale_y(math.log10(y))) for x, y in sorted(curve.items())])
        for index, curve in curves
    ]
    return Chart(
        "Throughput by regions per image",
        (f"{10**low_x:.3g}", f"{10**high_x:.3g}", "regions per image (log)"),
        (f"{10**low_y:.3g}", f"{10**high_y:.3g}", "regions/s (log)"),
        [(f"curve color-{index % len(REGION_COLORS)}", points) for index, points in polylines],
        [],
        [(index, points[-1][0] + 3, points[-1][1] + 4) for index, points in polylines],
    )


def _build_stage_bars(summaries: Sequence[CombinationSummary]) -> StageBars | None:
    stage_rows = [(index, summary.stages) for index, summary in enumerate(summaries) if summary.stages]
    return StageBars(stage_rows, STAGES, max(sum(stages.values()) for _, stages in stage_rows)) if stage_rows else None


def _make_axis_scale(
    values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], float, float]:
    low, high = min(values), max(values)
    value_range = (high - low) or 1.0
    return (lambda value: start + (value - low) / value_range * (end - start)), low, high


def _list_unfinished_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    state_order = list(ROW_STATES)
    return sorted(
        (row for row in rows if row["state"] != "done"), key=lambda row: (state_order.index(row["state"]), row["label"])
    )


def _describe_environments(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the components that all rows share, and their devices and versions."""
    environments = {
        ", ".join([each["device"], *(f"{name} {version}" for name, version in each["versions"].items())])
        for row in rows
        if (each := row.get("environment"))
    }
    shared_components = find_shared_components([row["config"] for row in rows])
    shared_text = (
        f"all rows: {', '.join(f'{name} {value}' for name, value in shared_components.items())}; "
        if shared_components
        else ""
    )
    return shared_text + ("; ".join(sorted(environments)) or "no finished rows")


def _format_in_unit(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.3g}" if value / unit < 1000 else f"{value / unit:,.0f}"
