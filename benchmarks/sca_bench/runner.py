"""Runs a sweep: makes the rows that are missing, and loses none that is there."""

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
from sca_bench.store import Store
from sca_bench.sweep import Sweep
from sca_bench.validation import check_rows


@dataclass(frozen=True)
class Status:
    """How far a sweep is: how many rows there are in each state, and which are missing."""

    rows: int
    states: Mapping[str, int]
    missing: list[str]  # labels


def run(
    sweep: Sweep,
    folder: str | Path,
    launcher: str = "local",
    options: Mapping[str, Any] | None = None,
    timeout: float = 3600.0,
    retry: tuple[str, ...] = (),
    force: bool = False,
    report: Callable[[str], None] = print,
    seconds: float = math.inf,
    order: str = "cheapest",
) -> Status:
    """Makes what is missing of a sweep; rows appear in `folder/results.jsonl` as they are finished.

    launcher, options: where rows are made, a name of the registry. timeout: seconds that a row has. retry: states whose
    rows are made again. force: tries rows that are predicted not to fit into memory. report: is given a line for what
    happens. seconds: time budget of the run; no row is started after it, and a row that it cuts stays missing. order:
    of rows, as in `Sweep.rows`.

    ValueError for what is wrong with a row that is missing, before the first is made. LockedError if somebody else
    writes into the folder, OutputError if it cannot be written.
    """
    deadline = time.time() + seconds
    where = sca_registry.launchers.build(launcher, **(options or {}))
    store = Store(folder)
    with store.held() as repairs:
        for line in repairs:
            report(line)
        rows = {row.key: row for row in sweep.rows(order)}
        if retry:
            store.forget({row["key"] for row in store.rows() if row["state"] in retry and row["key"] in rows})
        there = {row["key"] for row in store.rows()}
        missing = [row for key, row in rows.items() if key not in there]
        if missing:
            check_rows(sweep, missing)
        tasks = [
            Task(
                key,
                "sca_bench.worker:work",
                {**row.config, **({"force": True} if force else {})},
                str(store.row_folder(key)),
                timeout,
                num_gpus=int(sweep.device != "cpu"),
                deadline=deadline,
            )
            for key, row in rows.items()
            if key not in there
        ]
        beyond: list[float] = []
        if there & rows.keys():
            report(f"{len(there & rows.keys())} of {len(rows)} rows are there already")
        for number, (task, made) in enumerate(where.map(tasks), 1):
            row = rows[task.key]
            store.add({"key": task.key, "label": row.label, "sweep": sweep.name, "config": dict(row.config), **made})
            more = f" ({made['reason']:.200})" if made["reason"] else f" in {made['seconds'].get('process', 0):.1f} s"
            report(f"{number} of {len(tasks)}: {row.label}: {made['state']}{more}")
            if "whole" in made["seconds"]:
                beyond.append(made["seconds"]["process"] - made["seconds"]["whole"])
        if beyond:
            report(f"a row took {median(beyond):.2f} s beyond its own work (the median of {len(beyond)})")
    return status(sweep, folder)


def status(sweep: Sweep, folder: str | Path) -> Status:
    """Of a sweep in a folder, at any instant."""
    found = {row["key"]: row["state"] for row in Store(folder).rows()}
    rows = sweep.rows()
    states = Counter(found[row.key] for row in rows if row.key in found)
    return Status(len(rows), dict(states), [row.label for row in rows if row.key not in found])
