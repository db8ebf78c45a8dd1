"""Run the missing rows of a sweep without losing finished ones."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import sca_registry

from sca.launchers.task import Task
from sca_bench.halving import HalvingResult, halve_combinations, make_rung_row
from sca_bench.row import SweepRow
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep
from sca_bench.validation import check_rows


class IncompleteRungError(ValueError):
    """Rows of a rung have no result yet: the time budget is used up, or their processes were killed."""


@dataclass(frozen=True)
class SweepStatus:
    """Progress of a sweep: rows in total and per state, and the labels of missing rows."""

    num_rows: int
    state_counts: Mapping[str, int]
    missing: list[str]  # labels


@dataclass(frozen=True)
class RunSettings:
    """How rows are run, which does not change their results.

    Attributes:
        launcher: Registered launcher that runs the rows.
        launcher_options: Options of the launcher.
        timeout: Time limit in seconds per row.
        force: Run rows that are predicted to run out of memory.
        report: Called with one line per event.
        time_budget: Seconds after which no row starts; rows that are stopped stay missing.
    """

    launcher: str = "local"
    launcher_options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 3600.0
    force: bool = False
    report: Callable[[str], None] = print
    time_budget: float = math.inf


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    settings: RunSettings | None = None,
    retry_states: tuple[str, ...] = (),
    order: str = "cheapest",
) -> SweepStatus:
    """Run the missing rows of a sweep and append each to `folder/results.jsonl` when it finishes.

    Args:
        sweep: The sweep.
        folder: Results folder.
        settings: How rows are run.
        retry_states: States whose rows run again.
        order: Order of the rows, see `Sweep.list_rows`.

    Returns:
        The numbers of rows by state.

    Raises:
        ValueError: A missing row is invalid; raised before the first row runs.
        LockedError: Another process writes to the folder.
        OutputError: The folder cannot be written.
    """
    with _open_runner(sweep, folder, settings or RunSettings(), retry_states) as runner:
        rows = sweep.list_rows(order)
        runner.check_missing(rows)
        runner.run_missing(rows)
    return read_sweep_status(sweep, folder)


def run_halving(
    sweep: Sweep,
    folder: str | Path,
    settings: RunSettings | None = None,
    retry_states: tuple[str, ...] = (),
    score_name: str | None = None,
) -> HalvingResult:
    """Find the best combination of a sweep by successive halving; run it again to continue after an interruption.

    Args:
        sweep: The sweep, with training and evaluation.
        folder: Results folder.
        settings: How rows are run.
        retry_states: States whose rows run again.
        score_name: Score that ranks the combinations. Defaults to the most informative one.

    Returns:
        The recommendation, and what it does not rule out.

    Raises:
        ValueError: A row is invalid, raised before the first row runs; or no row has a score.
        IncompleteRungError: Rows have no result yet.
        LockedError: Another process writes to the folder.
        OutputError: The folder cannot be written.
    """
    settings = settings or RunSettings()
    with _open_runner(sweep, folder, settings, retry_states) as runner:
        rows = sweep.list_rows("listed")
        for row in rows:
            make_rung_row(row, 0)
        runner.check_missing(rows)
        return halve_combinations(rows, runner.run_all, score_name, settings.report)


@contextmanager
def _open_runner(
    sweep: Sweep, folder: str | Path, settings: RunSettings, retry_states: tuple[str, ...]
) -> Iterator[_RowRunner]:
    """Lock the results folder, and remove the rows that run again."""
    deadline = time.time() + settings.time_budget
    built_launcher = sca_registry.launchers.build(settings.launcher, **settings.launcher_options)
    store = ResultStore(folder)
    with store.lock() as repairs:
        for line in repairs:
            settings.report(line)
        if retry_states:
            rows = (row for row in store.read_rows() if row["sweep"] == sweep.name)
            store.remove_rows({row["key"] for row in rows if row["state"] in retry_states})
        store.write_sweep(sweep)
        yield _RowRunner(sweep, store, built_launcher, settings, deadline)


class _RowRunner:
    """Runs the rows of a sweep that its results folder does not contain."""

    def __init__(self, sweep: Sweep, store: ResultStore, launcher: Any, settings: RunSettings, deadline: float):
        self.sweep, self.store, self.launcher = sweep, store, launcher
        self.settings, self.deadline = settings, deadline

    def check_missing(self, rows: Sequence[SweepRow]) -> None:
        """Check the rows that have no result; raise ValueError for an invalid one."""
        finished_keys = self._read_finished_keys()
        if missing := [row for row in rows if row.key not in finished_keys]:
            check_rows(missing)

    def run_missing(self, rows: Sequence[SweepRow]) -> None:
        """Run the rows that have no result, and append each when it finishes."""
        report = self.settings.report
        rows_by_key = {row.key: row for row in rows}
        finished_keys = self._read_finished_keys() & rows_by_key.keys()
        if finished_keys:
            report(f"{len(finished_keys)} of {len(rows_by_key)} rows are finished already")
        tasks = [self._make_task(row) for key, row in rows_by_key.items() if key not in finished_keys]
        overhead_seconds: list[float] = []
        for number, (task, result) in enumerate(self.launcher.run_tasks(tasks), 1):
            row = rows_by_key[task.key]
            self.store.append(
                {"key": task.key, "label": row.label, "sweep": self.sweep.name, "config": dict(row.config), **result}
            )
            suffix = (
                f" ({result['reason']:.200})"
                if result["reason"]
                else f" in {result['seconds'].get('process', 0):.1f} s"
            )
            report(f"{number} of {len(tasks)}: {row.label}: {result['state']}{suffix}")
            if "total" in result["seconds"]:
                overhead_seconds.append(result["seconds"]["process"] - result["seconds"]["total"])
        if overhead_seconds:
            report(
                f"process overhead: {median(overhead_seconds):.2f} s per row (median of {len(overhead_seconds)} rows)"
            )

    def run_all(self, rows: Sequence[SweepRow]) -> list[Mapping[str, Any]]:
        """Run the rows that have no result, and return all; raise IncompleteRungError if some are still missing."""
        self.run_missing(rows)
        rows_by_key = {row["key"]: row for row in self.store.read_rows()}
        num_missing = sum(row.key not in rows_by_key for row in rows)
        if num_missing:
            raise IncompleteRungError(
                f"{num_missing} of {len(rows)} rows of this rung have no result yet; run the same command again to "
                "continue"
            )
        return [rows_by_key[row.key] for row in rows]

    def _read_finished_keys(self) -> set[str]:
        return {row["key"] for row in self.store.read_rows()}

    def _make_task(self, row: SweepRow) -> Task:
        config = {**row.config, "results_folder": str(self.store.folder.resolve())}
        if self.settings.force:
            config["force"] = True
        return Task(
            row.key,
            "sca_bench.worker:run_row",
            config,
            str(self.store.make_row_folder(row.key)),
            self.settings.timeout,
            num_gpus=int(self.sweep.device != "cpu"),
            deadline=self.deadline,
        )


def read_sweep_status(sweep: Sweep, folder: str | Path) -> SweepStatus:
    """Return the progress of a sweep in a results folder; works during a run."""
    states_by_key = {row["key"]: row["state"] for row in ResultStore(folder).read_rows()}
    rows = sweep.list_rows()
    state_counts = Counter(states_by_key[row.key] for row in rows if row.key in states_by_key)
    return SweepStatus(len(rows), dict(state_counts), [row.label for row in rows if row.key not in states_by_key])
