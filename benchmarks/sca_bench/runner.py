"""Run the missing rows of a sweep without losing finished ones."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import sca_registry

from sca.launchers.task import Task
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep
from sca_bench.validation import check_rows


@dataclass(frozen=True)
class SweepStatus:
    """Progress of a sweep: rows in total and per state, and the labels of missing rows."""

    num_rows: int
    state_counts: Mapping[str, int]
    missing: list[str]  # labels


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    launcher: str = "local",
    launcher_options: Mapping[str, Any] | None = None,
    timeout: float = 3600.0,
    retry_states: tuple[str, ...] = (),
    force: bool = False,
    report: Callable[[str], None] = print,
    time_budget: float = math.inf,
    order: str = "cheapest",
) -> SweepStatus:
    """Run the missing rows of a sweep and append each to `folder/results.jsonl` when it finishes.

    Args:
        sweep: The sweep.
        folder: Results folder.
        launcher: Registered launcher that runs the rows.
        launcher_options: Options of the launcher.
        timeout: Time limit in seconds per row.
        retry_states: States whose rows run again.
        force: Run rows that are predicted to run out of memory.
        report: Called with one line per event.
        time_budget: Seconds after which no row starts; rows that are stopped stay missing.
        order: Order of the rows, see `Sweep.list_rows`.

    Returns:
        The numbers of rows by state.

    Raises:
        ValueError: A missing row is invalid; raised before the first row runs.
        LockedError: Another process writes to the folder.
        OutputError: The folder cannot be written.
    """
    deadline = time.time() + time_budget
    built_launcher = sca_registry.launchers.build(launcher, **(launcher_options or {}))
    store = ResultStore(folder)
    with store.lock() as repairs:
        for line in repairs:
            report(line)
        rows = {row.key: row for row in sweep.list_rows(order)}
        if retry_states:
            store.remove_rows(
                {row["key"] for row in store.read_rows() if row["state"] in retry_states and row["key"] in rows}
            )
        finished_keys = {row["key"] for row in store.read_rows()}
        missing = [row for key, row in rows.items() if key not in finished_keys]
        store.write_sweep(sweep)
        if missing:
            check_rows(missing)
        tasks = [
            Task(
                key,
                "sca_bench.worker:run_row",
                {
                    **row.config,
                    "results_folder": str(store.folder),
                    **({"force": True} if force else {}),
                },
                str(store.make_row_folder(key)),
                timeout,
                num_gpus=int(sweep.device != "cpu"),
                deadline=deadline,
            )
            for key, row in rows.items()
            if key not in finished_keys
        ]
        overhead_seconds: list[float] = []
        if finished_keys & rows.keys():
            report(f"{len(finished_keys & rows.keys())} of {len(rows)} rows are finished already")
        for number, (task, result) in enumerate(built_launcher.run_tasks(tasks), 1):
            row = rows[task.key]
            store.append(
                {"key": task.key, "label": row.label, "sweep": sweep.name, "config": dict(row.config), **result}
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
    return read_sweep_status(sweep, folder)


def read_sweep_status(sweep: Sweep, folder: str | Path) -> SweepStatus:
    """Return the progress of a sweep in a results folder; works during a run."""
    states_by_key = {row["key"]: row["state"] for row in ResultStore(folder).read_rows()}
    rows = sweep.list_rows()
    state_counts = Counter(states_by_key[row.key] for row in rows if row.key in states_by_key)
    return SweepStatus(len(rows), dict(state_counts), [row.label for row in rows if row.key not in states_by_key])
