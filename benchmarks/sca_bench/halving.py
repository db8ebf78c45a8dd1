"""Successive halving: train all combinations for a few steps, drop the worse ones, and continue with the rest.

Jamieson and Talwalkar, "Non-stochastic best arm identification" (arXiv 1502.07943). A combination is dropped if it is
not in the best third of a rung, or, from the second rung on, if the paired interval of its difference to the best one
is below 0. The interval is over images, so that it does not cover how the order changes with further training; in the
first rung, it would drop slow starters. A combination that is left alone is trained to the end at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
from sca_registry import RegistryError

from sca.io.score_format import format_interval, format_score
from sca.io.text import format_count
from sca_bench.effects import compute_paired_interval
from sca_bench.image_scores import stack_image_scores
from sca_bench.row import SweepRow
from sca_bench.summary import choose_quality_score, find_varying_settings, get_own_seconds, get_score, list_scores
from sca_bench.timing import STAGES

NUM_RUNGS = 4  # the last one is the end of the training, and each earlier one is at half of the steps
MIN_STEPS = 2 ** (NUM_RUNGS - 1)
KEPT_FRACTION = 1 / 3
FIRST_INTERVAL_RUNG = 1  # index of the first rung that drops combinations by their interval

Rows = Sequence[Mapping[str, Any]]  # of one combination, one per seed
RunRows = Callable[[list[SweepRow]], list[Mapping[str, Any]]]  # returns the finished rows in the order of the arguments


@dataclass(frozen=True)
class Candidate:
    """A combination and its results at the last rung that it reached.

    Attributes:
        label: The settings in which it differs from the others.
        rows: Its rows of the sweep, one per seed.
        step: Training step of the results.
        results: Rows of the results file in the order of `rows`, including failed ones.
        score: Mean score over seeds; None if a row failed.
        interval: 95% interval of the difference to the best combination of the same rung, at most 0 if it is worse;
            None for the best one, and without scores of single images.
    """

    label: str
    rows: Sequence[SweepRow]
    step: int = 0
    results: Rows = ()
    score: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def is_worse(self) -> bool:
        """Whether the combination failed, or its interval is below 0."""
        return self.score is None or (self.interval is not None and self.interval[1] < 0)

    @property
    def plan_text(self) -> str:
        """Estimated FLOPs and memory of a row, after a separator; "" for rows with `plan = false`."""
        plan = next((row for row in self.results if row.get("flops") and row.get("memory")), None)
        if plan is None:
            return ""
        gflops = sum(plan["flops"].get(stage, 0.0) for stage in STAGES) / plan["flops"]["batch_size"] / 1e9
        megabytes = plan["memory"]["estimated"] / 1e6
        regions = format_count(plan["flops"]["regions_per_image"], "region")
        return f"; estimated {gflops:.2f} GFLOPs per image with {regions}, {megabytes:.0f} MB peak memory"

    @property
    def seconds(self) -> float:
        """Time of the processes of its rows at this rung, which continue the training of the previous rung."""
        return sum(get_own_seconds(row) or 0.0 for row in self.results)


@dataclass(frozen=True)
class HalvingResult:
    """Result of successive halving.

    Attributes:
        best: The recommended combination.
        not_ruled_out: Other combinations that are not worse than the best of their last rung, best first: the interval
            of their difference contains 0, or is unknown.
        ruled_out: Combinations whose interval is below 0.
        dropped_early: Combinations that were dropped by their rank in the rungs before `FIRST_INTERVAL_RUNG`, where the
            interval is no evidence.
        failed: Combinations without a score.
        score_name: Score that ranked them.
        seconds: Time of all rows.
    """

    best: Candidate
    not_ruled_out: Sequence[Candidate]
    ruled_out: Sequence[Candidate]
    dropped_early: Sequence[Candidate]
    failed: Sequence[Candidate]
    score_name: str
    seconds: float

    def format_lines(self) -> list[str]:
        """Return the recommendation as lines to print, with scores times 100."""
        first_row = self.best.rows[0]
        lines = [
            f"recommended: {self.best.label}: {self.score_name} {format_score(self.best.score)}{self.best.plan_text}"
        ]
        for each in self.not_ruled_out:
            lines.append(
                f"not ruled out: {each.label}: {self.score_name} {format_score(each.score)} after "
                f"{format_count(each.step, 'step')}, {_format_difference(each)}{each.plan_text}"
            )
        counts = [f"ruled out: {format_count(len(self.ruled_out), 'combination')}"]
        counts += [f"dropped after the first rung: {len(self.dropped_early)}"] if self.dropped_early else []
        counts += [f"failed: {len(self.failed)}"] if self.failed else []
        return [
            *lines,
            f"{'; '.join(counts)}; {self.seconds / 60:.1f} minutes in total",
            f"reproduce the recommendation (seed {first_row.config['seed']}): {first_row.command}",
        ]


def halve_combinations(
    rows: Sequence[SweepRow],
    run_rows: RunRows,
    score_name: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> HalvingResult:
    """Find the best combination of a sweep without training all of them to the end.

    Args:
        rows: Rows of the sweep, with training and evaluation.
        run_rows: Runs rows that stop at a step, or replays them.
        score_name: Score that ranks the combinations. Defaults to the most informative one of the first rung.
        report: Called with one line per rung.

    Returns:
        The recommendation.

    Raises:
        RegistryError: A row is not trained in one stage of enough steps, is not evaluated, or has a `stop_step`.
        ValueError: No combination of a rung has the score.
    """
    survivors = list_candidates(rows)
    eliminated: list[Candidate] = []
    dropped_early: list[Candidate] = []
    seconds = 0.0
    for rung in range(NUM_RUNGS):
        is_last = rung == NUM_RUNGS - 1
        survivors = _run_rung(survivors, NUM_RUNGS - 1 - rung, run_rows)
        seconds += sum(each.seconds for each in survivors)
        score_name = score_name or choose_quality_score([row for each in survivors for row in each.results])
        ranked = _rank_candidates(survivors, score_name)
        # Few combinations are not decided by the first rungs alone.
        num_kept = len(ranked) if is_last else max(NUM_RUNGS - 1 - rung, round(len(ranked) * KEPT_FRACTION))
        survivors = [each for each in ranked[:num_kept] if each.score is not None]
        if rung >= FIRST_INTERVAL_RUNG:
            survivors = [each for each in survivors if not each.is_worse]
        dropped = [each for each in ranked if each not in survivors]
        if rung < FIRST_INTERVAL_RUNG:
            dropped_early += [each for each in dropped if each.score is not None]
            dropped = [each for each in dropped if each.score is None]
        eliminated = [*dropped, *eliminated]
        report(
            f"rung {rung + 1} of {NUM_RUNGS}, {format_count(ranked[0].step, 'step')}: {len(survivors)} of "
            f"{format_count(len(ranked), 'combination')} left; best: {ranked[0].label}: {score_name} "
            f"{format_score(ranked[0].score)}"
        )
        if len(survivors) == 1 and not is_last:
            survivors = _run_rung(survivors, 0, run_rows)
            seconds += survivors[0].seconds
            survivors = _rank_candidates(survivors, score_name)
            break
    best, *others = survivors
    assert score_name is not None
    not_ruled_out = [*others, *(each for each in eliminated if not each.is_worse)]
    failed = [each for each in eliminated if each.score is None]
    ruled_out = [each for each in eliminated if each.is_worse and each.score is not None]
    return HalvingResult(best, not_ruled_out, ruled_out, dropped_early, failed, score_name, seconds)


def list_candidates(rows: Sequence[SweepRow]) -> list[Candidate]:
    """Return one candidate per combination, with its rows for all seeds, in the order of its first row."""
    groups: dict[str, list[SweepRow]] = {}
    for row in rows:
        groups.setdefault(row.combination_key, []).append(row)
    candidates = list(groups.values())
    settings = find_varying_settings([group[0].config for group in candidates])
    labels = [
        ", ".join(f"{name} {values[index]}" for name, values in settings.items() if values[index])
        for index in range(len(candidates))
    ]
    return [Candidate(label or group[0].label, group) for label, group in zip(labels, candidates, strict=True)]


def make_rung_row(row: SweepRow, num_halvings: int) -> SweepRow:
    """Return a row that stops at a fraction of its training steps.

    Args:
        row: Row of a sweep.
        num_halvings: How many times the number of steps is halved.

    Returns:
        The row.

    Raises:
        RegistryError: The row has not exactly one training stage of enough steps, no evaluation, or a `stop_step`.
    """
    recipes = row.make_recipes()
    if len(recipes) != 1 or "evaluate" not in row.config:
        raise RegistryError("--halving requires rows with one training stage and [evaluate]; change the sweep")
    if row.stop_step is not None:
        raise RegistryError("--halving sets train.stop_step; remove it from the sweep")
    steps = recipes[0].train.steps
    if steps < MIN_STEPS:
        raise RegistryError(f"train.steps is {steps}; --halving requires at least {MIN_STEPS}, for {NUM_RUNGS} rungs")
    config = copy.deepcopy(dict(row.config))
    config["train"]["stop_step"] = steps >> num_halvings
    return SweepRow(config)


def _run_rung(candidates: Sequence[Candidate], num_halvings: int, run_rows: RunRows) -> list[Candidate]:
    """Run all candidates to the step of a rung."""
    rung_rows = [[make_rung_row(row, num_halvings) for row in each.rows] for each in candidates]
    results = iter(run_rows([row for rows in rung_rows for row in rows]))
    return [
        replace(candidate, step=rows[0].config["train"]["stop_step"], results=[next(results) for _ in rows])
        for candidate, rows in zip(candidates, rung_rows, strict=True)
    ]


def _rank_candidates(candidates: Sequence[Candidate], score_name: str | None) -> list[Candidate]:
    """Return the candidates with their scores and their intervals to the best one, best first."""
    scored = [replace(each, score=_average_score(each.results, score_name), interval=None) for each in candidates]
    scored.sort(key=lambda each: -math.inf if each.score is None else each.score, reverse=True)
    best, *others = scored
    if best.score is None:
        raise ValueError(_explain_missing_score(candidates, score_name))
    return [
        best,
        *(replace(each, interval=_compare_results(each.results, best.results, score_name)) for each in others),
    ]


def _explain_missing_score(candidates: Sequence[Candidate], score_name: str | None) -> str:
    rung = f"of this rung ({format_count(candidates[0].step, 'step')})"
    results = [row for each in candidates for row in each.results]
    available = list_scores(results)
    if available and score_name not in available:
        return f"no combination {rung} has the score {score_name!r}; choose from {', '.join(available)}"
    return f"every combination {rung} failed; `sca bench report` shows why"


def _format_difference(candidate: Candidate) -> str:
    if candidate.interval is None:
        return "no interval of the difference to the best"
    return f"difference to the best {format_interval(*candidate.interval, signed=True)}"


def _average_score(results: Rows, score_name: str | None) -> float | None:
    """Return the mean score over seeds; None if a row has none."""
    values = [value for row in results if (value := get_score(row, score_name)) is not None]
    return mean(values) if values and len(values) == len(results) else None


def _compare_results(results: Rows, best: Rows, score_name: str | None) -> tuple[float, float] | None:
    """Return the paired interval of the difference to the best candidate; None without scores of the same images."""
    if score_name is None or len(results) != len(best):
        return None
    sums = stack_image_scores([*results, *best], score_name)
    return None if sums is None else compute_paired_interval(*np.split(sums, 2))
