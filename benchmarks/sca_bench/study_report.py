"""Tables of the studies of a sweep: combinations, expected effects beside the measured ones, and what matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sca.io.score_format import PRINT_FACTOR, format_interval, format_score
from sca.io.text import format_count
from sca_bench.effects import Effect, count_images_needed, explain_variance, measure_effects
from sca_bench.summary import CombinationSummary, find_varying_settings, format_setting, summarize_rows
from sca_bench.sweep import Study, Sweep

TEXT_COLUMNS_OF_EFFECTS = ("claim", "source", "settings", "score")
EFFECT_COLUMNS = (*TEXT_COLUMNS_OF_EFFECTS, "better", "worse", "difference", "95% CI", "by seed", "verdict")
DETECTED_DIFFERENCES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class StudyReport:
    """Tables of one study as text.

    Attributes:
        title: Heading; empty for a sweep without studies.
        summary: One line.
        summaries: Summaries of its finished combinations, best first.
        settings: Axis -> formatted value of each summary.
        effects: Measured effects.
        notes: Lines about the variance that each axis explains and the images that differences need.
    """

    title: str
    summary: str
    summaries: Sequence[CombinationSummary]
    settings: Mapping[str, list[str]]
    effects: Sequence[Effect]
    notes: Sequence[str] = field(default_factory=list)


def build_study_reports(sweep: Sweep, rows: Sequence[Mapping[str, Any]], score_name: str | None) -> list[StudyReport]:
    """Build the tables of every study.

    Args:
        sweep: Sweep of the rows.
        rows: Rows of the results file.
        score_name: Score that measures quality.

    Returns:
        One report per study that has a finished row.
    """
    reports = []
    for study in sweep.studies:
        settings_by_key = {each.row.key: each.settings for each in sweep.list_combinations(study)}
        summaries = summarize_rows([row for row in rows if row["key"] in settings_by_key], score_name)
        if not summaries:
            continue
        settings = [settings_by_key[summary.rows[0]["key"]] for summary in summaries]
        effects = measure_effects(sweep, study, rows, score_name)
        columns = {axis: [format_setting(each[axis]) for each in settings] for axis in study.settings}
        notes = _describe_study(sweep, study, rows, score_name, effects)
        reports.append(StudyReport(study.name, study.summary, summaries, columns, effects, notes))
    return reports


def build_setting_columns(summaries: Sequence[CombinationSummary], sweep: Sweep | None) -> dict[str, list[str]]:
    """Return the columns that distinguish the combinations of a sweep.

    Args:
        summaries: Summaries of the combinations.
        sweep: Their sweep; None if it is unknown.

    Returns:
        Heading -> one cell per combination: the axes; "study" and "settings" if the sweep has studies; and all settings
        that differ if the sweep is unknown, or has changed since.
    """
    cells = [] if sweep is None else _list_settings(summaries, sweep)
    if sweep is None or not cells or any(cell is None for cell in cells):
        return find_varying_settings([each.config for each in summaries]) or {
            "combination": [each.label for each in summaries]
        }
    known_cells = [cell for cell in cells if cell is not None]
    if any(study.name for study in sweep.studies):
        return {
            "study": [name for name, _ in known_cells],
            "settings": [_format_settings(settings) for _, settings in known_cells],
        }
    axes = sweep.studies[0].settings
    return {axis: [format_setting(settings[axis]) for _, settings in known_cells] for axis in axes} or {
        "combination": [each.label for each in summaries]
    }


def _list_settings(summaries: Sequence[CombinationSummary], sweep: Sweep) -> list[tuple[str, Mapping[str, Any]] | None]:
    """Return the first study of each combination and its settings there; None for those that are not in the sweep."""
    settings_by_key: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for study in sweep.studies:
        for each in sweep.list_combinations(study):
            settings_by_key.setdefault(each.row.key, (study.name, each.settings))
    return [settings_by_key.get(summary.rows[0]["key"]) for summary in summaries]


def _format_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {format_setting(value)}" for axis, value in settings.items())


def format_effect(effect: Effect) -> list[str]:
    """Return the cells of an effect under `EFFECT_COLUMNS`."""
    return [
        effect.comparison.claim,
        effect.comparison.source,
        _format_settings(effect.settings),
        effect.score,
        *(format_score(value) for value in effect.values),
        format_score(effect.difference, signed=True),
        format_interval(effect.ci_low, effect.ci_high, signed=True),
        " ".join(format_score(value, signed=True) for value in effect.seed_differences),
        effect.verdict,
    ]


def _describe_study(
    sweep: Sweep, study: Study, rows: Sequence[Mapping[str, Any]], score_name: str | None, effects: Sequence[Effect]
) -> list[str]:
    notes = []
    fractions = explain_variance(sweep, study, rows, score_name)
    if fractions:
        parts = ", ".join(f"{axis} {fraction:.0%}" for axis, fraction in fractions.items())
        notes.append(f"Variance of {score_name} that each axis explains alone: {parts}.")
    effects_of_score = [effect for effect in effects if effect.score == score_name]
    counts = {each: count_images_needed(effects_of_score, each) for each in DETECTED_DIFFERENCES}
    if all(count is not None for count in counts.values()):
        parts = ", ".join(
            f"{format_count(round(PRINT_FACTOR * each), 'point')}: {count:,}" for each, count in counts.items()
        )
        notes.append(
            f"Images in which a paired test finds a difference of {score_name} with a power of 80%, for the median "
            f"comparison and without the variation between seeds: {parts}."
        )
    return notes
