"""Run one row of a sweep in its own process: check, plan, build, train, evaluate and time.

Workers are forked from a process that has imported this module, so slow imports happen once.
"""

from __future__ import annotations

import os
import platform
import re
import resource
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
from typing import Any, NamedTuple

import torch
from sca_registry import RegistryError, get_registry
from sca_registry.compatibility import check_compatible
from sca_registry.contracts import Captioner
from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.plugins import BUILTIN_DISTRIBUTION
from sca_registry.spec import ModelSpec

from sca.builder import build
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions
from sca.inference.factory import load_captioner
from sca.io.errors import NonFiniteWeightsError
from sca.model import SegmentCaptioner
from sca.nn.quantized_layers import count_parameters
from sca.plan import plan_model
from sca_bench.image_scores import collect_image_scores
from sca_bench.row import SweepRow
from sca_bench.row_training import MODEL_NAME, load_trained_model, train_stages
from sca_bench.sections import PROMPTING_KEYS
from sca_bench.timing import measure_stages, measure_training_step

MAX_TRAINING_REGIONS = 16  # maximum number of regions per image in a training step
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "out of memory", "cannot allocate memory", "std::bad_alloc")


class RunOptions(NamedTuple):
    """How a row is run, which does not change its results.

    `folder` contains the files of the row, `results_folder` those that rows share. `force` runs a row that is predicted
    to exceed memory.
    """

    folder: Path
    results_folder: Path
    force: bool


def run_row(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Run a row as a launcher job; any failure becomes its state and reason.

    Args:
        config: Configuration of a `sca_bench.row.SweepRow`, `force` to run it even if it is predicted to exceed memory,
            and `results_folder`, where rows share features and trained models.
        folder: Folder for the files of the row. Output is printed to the caller's standard output.

    Returns:
        The row, JSON-serializable.
    """
    config = dict(config)
    force = config.pop("force", False)
    results_folder = Path(config.pop("results_folder", folder))
    print(f"$ {SweepRow(config).command}", file=sys.stderr, flush=True)
    run_options = RunOptions(Path(folder), results_folder, force)
    return run_measurement(lambda row: _make_row(row, SweepRow(config), run_options), config["device"])


def run_measurement(measure: Callable[[dict[str, Any]], None], device: str) -> dict[str, Any]:
    """Run a measurement and return it as a row, even if it fails.

    Args:
        measure: Receives the row and adds its results.
        device: A torch device.

    Returns:
        The row with `state`, `reason`, `seconds`, `memory` and `environment`.

    Raises:
        KeyboardInterrupt: The only exception that does not become a state.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"state": "done", "reason": "", "seconds": {}}
    try:
        measure(row)
    except BaseException as error:
        row["state"], row["reason"] = _classify_error(error), f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            raise
    row["seconds"]["total"] = time.perf_counter() - start
    row["memory"] = _measure_memory(device) | row.get("memory", {})
    row["environment"] = collect_environment(device)
    return row


def _make_row(row: dict[str, Any], sweep_row: SweepRow, run_options: RunOptions) -> None:
    config = sweep_row.config
    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    spec = sweep_row.spec
    if spec is None:
        captioner = load_captioner(config["captioner"], device=config["device"])
        with _StageTimer(row, "evaluate"):
            _add_scores(row, captioner, config)
        for name in ("metadata", "usage"):  # the server of a captioner is not part of the sweep
            if value := getattr(captioner, name, None):
                row[name] = value
        return
    try:
        check_compatible(spec)
    except RegistryError as error:
        row["state"], row["reason"] = _find_broken_state(spec) or "incompatible", str(error)
        return
    benchmark_options, train_options = config.get("benchmark"), config.get("train")
    if benchmark_options is None or benchmark_options.get("plan", True):
        with _StageTimer(row, "plan"):
            _add_plan(row, spec, config)
    memory = row.get("memory", {})
    if memory.get("available") is not None and memory["estimated"] > memory["available"] and not run_options.force:
        row["state"] = "skipped"
        row["reason"] = (
            f"estimated memory of {memory['estimated'] / 2**30:.1f} GiB exceeds the available "
            f"{memory['available'] / 2**30:.1f} GiB; run it anyway with --force"
        )
        return
    torch.manual_seed(config["seed"])
    with _StageTimer(row, "build" if train_options is None else "train"):
        if train_options is None:
            model = build(spec, config["device"], weights=False)
        else:
            model = _train_model(row, sweep_row, run_options).to(config["device"])
    groups = {name: count_parameters(parameters) for name, parameters in model.group_parameters().items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row.setdefault("parameters", {**groups, "total": sum(groups.values()), "trainable": trainable})
    if config.get("evaluate"):
        with _StageTimer(row, "evaluate"):
            _add_scores(row, model, config)
    if benchmark_options:
        with _StageTimer(row, "benchmark"):
            _add_measurements(row, model, benchmark_options)


def _find_broken_state(spec: ModelSpec) -> str | None:
    """Return the state of a row with a component that fails in every combination, else None."""
    for kind in MODEL_COMPONENTS:
        if (component := getattr(spec, kind)) is not None:
            entry = get_registry(kind).load_entry(component.name)
            if entry.state == "broken":
                return "import-error" if re.search(r"(Import|ModuleNotFound)Error", entry.reason) else "failed"
    return None


def _add_plan(row: dict[str, Any], spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Add the parameters, FLOPs by stage, and estimated and available memory."""
    benchmark_options = config.get("benchmark") or {}
    num_regions = max(benchmark_options.get("regions_per_image", [1]))
    max_new_tokens = benchmark_options.get("max_new_tokens", 16)
    precision = benchmark_options.get("dtype", "float32")
    num_images = benchmark_options.get("batch_size", 1)
    captioning_plan = plan_model(spec, num_images, num_regions, max_new_tokens, precision=precision)
    peak = captioning_plan.peak_memory
    if benchmark_options.get("training_step"):
        peak = max(
            peak,
            plan_model(
                spec, num_images, min(MAX_TRAINING_REGIONS, num_regions), max_new_tokens, training=True
            ).peak_memory,
        )
    num_parameters = sum(captioning_plan.parameters.values())
    row["parameters"] = {
        **captioning_plan.parameters,
        "total": num_parameters,
        "trainable": captioning_plan.trainable_parameters,
    }
    row["flops"] = {
        **captioning_plan.flops,
        "batch_size": num_images,
        "regions_per_image": num_regions,
        "max_new_tokens": max_new_tokens,
    }
    row["memory"] = {"estimated": peak, "available": _get_total_memory(config["device"])}


def _train_model(row: dict[str, Any], sweep_row: SweepRow, run_options: RunOptions) -> SegmentCaptioner:
    work_folder = run_options.folder / "training"
    shutil.rmtree(work_folder, ignore_errors=True)
    stages = train_stages(sweep_row, work_folder, run_options.results_folder)
    model = load_trained_model(stages)
    steps = [recipe.train.steps for recipe in sweep_row.make_recipes()]
    row["losses"] = [
        [sum(steps[:number]) + step, loss] for number, stage in enumerate(stages) for step, loss in stage.losses
    ]
    row["seconds"]["reused_training"] = sum(max(0.0, stage.seconds - stage.own_seconds) for stage in stages)
    if sweep_row.keeps_models:
        row["model"] = str((stages[-1].folder / MODEL_NAME).relative_to(run_options.results_folder))
    shutil.rmtree(work_folder, ignore_errors=True)
    return model


def _add_scores(row: dict[str, Any], model: SegmentCaptioner | Captioner, config: Mapping[str, Any]) -> None:
    evaluate_options = config["evaluate"]
    prompting_options = {key: evaluate_options[key] for key in PROMPTING_KEYS if key in evaluate_options}
    report = evaluate(
        model,
        evaluate_options["dataset"],
        evaluate_options.get("split", "val"),
        prompting=PromptingOptions(**prompting_options, seed=config["seed"]),
        metrics=evaluate_options.get("metrics"),
        batch_size=evaluate_options.get("batch_size", 8),
        max_images=evaluate_options.get("max_images"),
    )
    assert report is not None  # None in other processes than the main one; a row has one process
    row["scores"] = [each.to_dict() for each in report.scoring.scores]
    row["image_scores"] = collect_image_scores(report)


def _add_measurements(row: dict[str, Any], model: Any, benchmark_options: Mapping[str, Any]) -> None:
    num_images, max_new_tokens, repeats = (
        benchmark_options.get("batch_size", 1),
        benchmark_options.get("max_new_tokens", 16),
        benchmark_options.get("num_repeats", 5),
    )
    region_counts, memory = benchmark_options.get("regions_per_image", [1]), row.setdefault("memory", {})
    device = model.task_tokens.device
    if benchmark_options.get("training_step"):  # float32 weights as in training, with autocast for lower precisions
        step_sizes = (num_images, min(MAX_TRAINING_REGIONS, max(region_counts)), max_new_tokens, repeats)
        with (
            _record_peak_memory(memory, "training", device),
            torch.autocast(device.type, **_get_autocast_options(benchmark_options)),
        ):
            row["training_step"] = measure_training_step(model, *step_sizes)
        if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
            with torch.autocast(device.type, **_get_autocast_options(benchmark_options)):
                row["training_step_cached"] = measure_training_step(model, *step_sizes, use_cached_features=True)
        model.zero_grad(set_to_none=True)
    model = model.to(getattr(torch, benchmark_options.get("dtype", "float32")))
    row["throughput"] = []
    for num_regions in region_counts:
        peak: dict[str, int] = {}
        with _record_peak_memory(peak, "peak_memory", device):
            point = measure_stages(model, num_images, num_regions, max_new_tokens, repeats)
        row["throughput"].append(point | peak)
    peaks = [point["peak_memory"] for point in row["throughput"] if "peak_memory" in point]
    if peaks:
        memory["captioning"] = max(peaks)


def _get_autocast_options(benchmark_options: Mapping[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, benchmark_options.get("dtype", "float32"))
    return {"dtype": torch.bfloat16 if dtype == torch.float32 else dtype, "enabled": dtype != torch.float32}


@contextmanager
def _record_peak_memory(memory: dict[str, int], name: str, device: torch.device) -> Iterator[None]:
    """Record under `name` the peak bytes that torch allocates on a GPU inside the context."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield
    memory[name] = torch.cuda.max_memory_allocated(device)


class _StageTimer:
    def __init__(self, row: dict[str, Any], stage: str):
        self.row, self.stage = row, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.row["seconds"][self.stage] = time.perf_counter() - self.start


def _classify_error(error: BaseException) -> str:
    if isinstance(error, RegistryError) and error.__cause__ is not None:  # raised by a component's factory
        return _classify_error(error.__cause__)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out-of-memory"
    if isinstance(error, RuntimeError) and any(message in str(error).lower() for message in OUT_OF_MEMORY_MESSAGES):
        return "out-of-memory"
    if isinstance(error, NonFiniteWeightsError):
        return "non-finite"
    return "import-error" if isinstance(error, ImportError) else "failed"


def _measure_memory(device: str) -> dict[str, int]:
    """Return the peak bytes of the process, and those that torch reserved on the device."""
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak_bytes = {"host": host_bytes}
    if device.startswith("cuda") and torch.cuda.is_available():
        peak_bytes["device"] = torch.cuda.max_memory_reserved(device)
    return peak_bytes


def _get_total_memory(device: str) -> int | None:
    """Return the bytes of memory available to a row."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


@cache
def collect_environment(device: str) -> dict[str, Any]:
    """Return the device, package versions and commit."""
    device_name = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        device_name = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version()}
    for package in (BUILTIN_DISTRIBUTION, "torch", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": device_name, "versions": versions, "commit": _read_commit()}


def _read_commit() -> str | None:
    """Return the commit of the checkout that contains this file, if any."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
