"""One row of a sweep: checked, planned, built, trained a little, evaluated and timed, in a process of its own.

Imported by the process that workers are forked from, so that what takes seconds to import is there already.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from sca_registry import RegistryError, registry
from sca_registry.compatibility import check_compatible
from sca_registry.plugins import BUILTIN
from sca_registry.spec import ModelSpec

import sca.evaluation.evaluate
import sca.training.train  # noqa: F401 (and transformers with it)
from sca.composition import build
from sca.plan import plan_model
from sca_bench.sweep import PARTS, Row
from sca_bench.timing import stages, training_step

TRAINED = 16  # regions of an image in a step of training, at most
NO_ROOM = ("can't allocate memory", "out of memory", "cannot allocate memory", "std::bad_alloc")


def work(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Makes a row; whatever goes wrong is typed and told.

    config: of a `sca_bench.sweep.Row`, and `force` for one that is tried though memory is predicted not to suffice.
    folder: for what the row leaves behind. What is printed goes to the caller's standard output.
    """
    config = dict(config)
    force = config.pop("force", False)
    print(f"$ {command(config)}", file=sys.stderr, flush=True)
    return record(lambda row: _make(row, config, Path(folder), force), config["device"])


def record(measure: Callable[[dict[str, Any]], None], device: str) -> dict[str, Any]:
    """Run a measurement and return it as a row, also when it fails.

    Args:
        measure: Receives the row and adds what it measures.
        device: Where it computes.

    Returns:
        The row with `state`, `reason`, `seconds`, `memory` and `environment`.

    Raises:
        KeyboardInterrupt: The only exception that is not turned into a state.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"state": "done", "reason": "", "seconds": {}}
    try:
        measure(row)
    except BaseException as error:
        row["state"], row["reason"] = _typed(error), f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            raise
    row["seconds"]["whole"] = time.perf_counter() - start
    row["memory"] = _memory(device) | row.get("memory", {})
    row["environment"] = environment(device)
    return row


def _make(row: dict[str, Any], config: Mapping[str, Any], folder: Path, force: bool) -> None:
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    spec = ModelSpec.from_dict(config["model"])
    try:
        check_compatible(spec)
    except RegistryError as error:
        row["state"], row["reason"] = _broken(spec) or "impossible", str(error)
        return
    measure, training = config.get("measure"), config.get("train")
    if measure is None or measure.get("plan", True):
        with _timed(row, "plan"):
            _plan(row, spec, config)
    memory = row.get("memory", {})
    if memory.get("room") is not None and memory["planned"] > memory["room"] and not force:
        row["state"] = "skipped"
        row["reason"] = (
            f"planned to take {memory['planned'] / 2**30:.1f} GiB of the "
            f"{memory['room'] / 2**30:.1f} GiB there are; --force tries it"
        )
        return
    torch.manual_seed(config["seed"])
    with _timed(row, "build" if training is None else "train"):
        if training is None:
            model = build(spec, config["device"], weights=False)
        else:
            model = _train(row, config, folder).to(config["device"])
    groups = {name: sum(p.numel() for p in parameters) for name, parameters in model.group_parameters().items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row.setdefault("parameters", {**groups, "whole": sum(groups.values()), "trainable": trainable})
    if evaluation := config.get("evaluate"):
        with _timed(row, "evaluate"):
            row["scores"] = _evaluate(model, evaluation, config)
    if measure:
        with _timed(row, "measure"):
            _measure(row, model, measure)


def _broken(spec: ModelSpec) -> str | None:
    """The state of a row one of whose parts does not work, whatever it is combined with."""
    for kind in PARTS:
        if (part := getattr(spec, kind)) is not None:
            entry = registry(kind).describe(part.name)
            if entry.state == "broken":
                return "import-error" if re.search(r"(Import|ModuleNotFound)Error", entry.reason) else "failed"
    return None


def _plan(row: dict[str, Any], spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Parameters, operations by stage, and whether there is room."""
    measure = config.get("measure") or {}
    regions, words = max(measure.get("regions", [1])), measure.get("words", 16)
    dtype = getattr(torch, measure.get("dtype", "float32"))
    images = measure.get("images", 1)
    planned = plan_model(spec, images, regions, words, dtype=dtype)
    peak = planned.peak
    if measure.get("training"):
        peak = max(peak, plan_model(spec, images, min(TRAINED, regions), words, train=True).peak)
    whole = sum(planned.parameters.values())
    row["parameters"] = {**planned.parameters, "whole": whole, "trainable": planned.trainable}
    row["flops"] = {**planned.flops, "images": images, "regions": regions, "words": words}
    row["memory"] = {"planned": peak, "room": _room(config["device"])}


def _train(row: dict[str, Any], config: Mapping[str, Any], folder: Path):
    from sca.training.train import train

    recipe = Row(config).recipe
    assert recipe is not None
    left = folder / "training"
    shutil.rmtree(left, ignore_errors=True)
    model = train(recipe, left, resume=False)
    states = sorted(left.glob("checkpoint-*/trainer_state.json"))
    history = json.loads(states[-1].read_text("utf-8"))["log_history"] if states else []
    row["losses"] = [[each["step"], each["loss"]] for each in history if "loss" in each]
    shutil.rmtree(left, ignore_errors=True)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} is not finite after training")
    return model


def _evaluate(model: Any, asked: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    from sca.evaluation.evaluate import evaluate
    from sca.evaluation.predictions import Questions

    given = {key: asked[key] for key in ("prompt", "tasks", "generation") if key in asked}
    report = evaluate(
        model,
        asked["dataset"],
        asked.get("split", "val"),
        questions=Questions(**given, seed=config["seed"]),
        metrics=asked.get("metrics"),
        batch=asked.get("batch", 8),
        limit=asked.get("limit"),
    )
    return [each.to_dict() for each in report.scored.scores]


def _measure(row: dict[str, Any], model: Any, asked: Mapping[str, Any]) -> None:
    images, words, repeats = asked.get("images", 1), asked.get("words", 16), asked.get("repeats", 5)
    counts, memory = asked.get("regions", [1]), row.setdefault("memory", {})
    device = model.task_tokens.device
    if asked.get("training"):  # in float32, as models train, with autocast where the sweep computes in less
        size = (images, min(TRAINED, max(counts)), words, repeats)
        with _peak(memory, "training", device), torch.autocast(device.type, **_autocast(asked)):
            row["training_step"] = training_step(model, *size)
        if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
            with torch.autocast(device.type, **_autocast(asked)):
                row["training_step_cached"] = training_step(model, *size, cached=True)
        model.zero_grad(set_to_none=True)
    model = model.to(getattr(torch, asked.get("dtype", "float32")))
    row["curve"] = []
    for regions in counts:
        peak: dict[str, int] = {}
        with _peak(peak, "peak", device):
            point = stages(model, images, regions, words, repeats)
        row["curve"].append(point | peak)
    peaks = [point["peak"] for point in row["curve"] if "peak" in point]
    if peaks:
        memory["answering"] = max(peaks)


def _autocast(asked: Mapping[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, asked.get("dtype", "float32"))
    return {"dtype": torch.bfloat16 if dtype == torch.float32 else dtype, "enabled": dtype != torch.float32}


@contextmanager
def _peak(memory: dict[str, int], name: str, device: torch.device) -> Iterator[None]:
    """Record under `name` the most bytes that torch allocates on a GPU meanwhile."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield
    memory[name] = torch.cuda.max_memory_allocated(device)


class _timed:
    def __init__(self, row: dict[str, Any], stage: str):
        self.row, self.stage = row, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.row["seconds"][self.stage] = time.perf_counter() - self.start


def _typed(error: BaseException) -> str:
    if isinstance(error, RegistryError) and error.__cause__ is not None:  # what a part's factory raised
        return _typed(error.__cause__)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out-of-memory"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_ROOM):
        return "out-of-memory"
    if isinstance(error, FloatingPointError):
        return "not-finite"
    return "import-error" if isinstance(error, ImportError) else "failed"


def _memory(device: str) -> dict[str, int]:
    """Bytes at most: of the process, and of what torch has had of the device."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"host": host}
    if device.startswith("cuda") and torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_reserved(device)
    return found


def _room(device: str) -> int | None:
    """Bytes that a row may take."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


@cache
def environment(device: str) -> dict[str, Any]:
    """What was computed on, and with which versions."""
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version()}
    for package in (BUILTIN, "torch", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": name, "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Of the checkout that this file is in, if it is in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def command(config: Mapping[str, Any]) -> str:
    """What makes this row again, by itself."""
    return f"sca bench row {shlex.quote(json.dumps(config))}"
