"""Measure what is missing on a GPU within a time budget, most valuable first; `run.sh` installs and starts this.

Every measurement is a job in its own process, started by the local launcher. A job that fails, crashes or runs out of
memory becomes a row with its reason, and the next one starts. On a CPU the same jobs run at tiny sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sca_bench.decoding import DECODING_METHODS
from sca_bench.plan_accuracy import FULL_SIZE_MODELS
from sca_bench.row import SweepRow
from sca_bench.sweep import Sweep
from sca_registry.overrides import MODEL_COMPONENTS

from sca.launchers.local import LocalLauncher
from sca.launchers.task import Task, TaskOutcome
from sca.launchers.worker import LOG_FILE
from sca.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_FOLDER = Path("tests/data/golden")  # relative to the repository, where jobs start
FINAL_STATES = ("done", "incompatible", "skipped", "out-of-memory")  # states that another run would reproduce
SHUTDOWN_SECONDS = 8.0  # seconds reserved for shutdown
MEASUREMENT_TIMEOUT = 150.0  # maximum seconds per measurement
MAX_NEW_TOKENS = 20
TINY_VIT = {
    "name": "tiny-vit",
    "image_size": 64,
    "hidden_size": 32,
    "depth": 1,
    "output_channels": 32,
    "stem_channels": [8, 16],
}
TINY_SAM = {"name": "sam", "pretrained": False, "config": {"hidden_size": 32, "num_hidden_layers": 1}}
TINY_LM = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 2, "num_heads": 2, "max_positions": 64}
TINY_MIXERS = [{"name": name, "num_queries": 2, "depth": 1, "num_heads": 2} for name in ("query", "resampler")]


@dataclass(frozen=True)
class Measurement:
    """One row to measure: its part of the report, a label, the job and its configuration."""

    part: str
    label: str
    job: str
    config: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Hash of the job and its configuration as sixteen hexadecimal digits."""
        text = json.dumps([self.job, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="Device: cuda, or cpu for tiny sizes.")
    parser.add_argument("--time-budget", type=float, default=450.0, help="Time budget in seconds.")
    parser.add_argument("--start-time", type=float, default=time.time(), help="Unix time at which the budget starts.")
    parser.add_argument("--inputs", type=Path, default=ROOT / ".gpu", help="Folder that prepare.sh filled.")
    parser.add_argument("--golden", type=Path, default=GOLDEN_FOLDER, help="Folder of golden checkpoints.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu"), help="Folder for rows.")
    parser.add_argument("--only", nargs="*", default=(), metavar="PART", help="Run these parts only.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = describe_device(args.device)
    (args.out / "device.txt").write_text(describe_environment(args.device), "utf-8")
    final_keys = read_final_keys(args.inputs / "rows", device) | read_final_keys(args.out, device)
    all_measurements = [
        each for each in iter_measurements(args.device, args.golden) if each.part in args.only or not args.only
    ]
    missing = [each for each in all_measurements if each.key not in final_keys]
    print(
        f"{len(all_measurements)} rows on {device}: {len(all_measurements) - len(missing)} known, "
        f"{len(missing)} to measure",
        flush=True,
    )
    deadline = args.start_time + args.time_budget - SHUTDOWN_SECONDS
    rows = run_measurements(missing, deadline, args.out, read_commit(args.inputs))
    num_failed = sum(row["state"] not in FINAL_STATES for row in rows)
    print(f"{len(rows)} rows measured, {num_failed} of them failed; {len(missing) - len(rows)} left for another run")


def run_measurements(
    missing: list[Measurement], deadline: float, out: Path, commit: str | None
) -> list[dict[str, Any]]:
    """Run measurements until the deadline (Unix time) and append each row to `out/rows.jsonl` when it finishes."""
    rows = []
    by_key = {measurement.key: measurement for measurement in missing}
    with tempfile.TemporaryDirectory(prefix="sca-gpu-") as scratch, open(out / "rows.jsonl", "ab", buffering=0) as file:
        tasks = [
            Task(
                measurement.key,
                measurement.job,
                measurement.config,
                f"{scratch}/{measurement.key}",
                MEASUREMENT_TIMEOUT,
                deadline=deadline,
            )
            for measurement in missing
        ]
        for task, result in add_killed_outcomes(LocalLauncher(num_workers=1).run_tasks(tasks), tasks, deadline):
            measurement = by_key[task.key]
            row = {
                "key": measurement.key,
                "part": measurement.part,
                "label": measurement.label,
                "job": measurement.job,
                "config": measurement.config,
            }
            row |= result
            row.setdefault("environment", {"device": describe_device(task.config["device"])})
            if commit:
                row["environment"]["commit"] = commit
            file.write(f"{json.dumps(row)}\n".encode())
            os.fsync(file.fileno())
            append_log(out / "log.txt", measurement, Path(task.folder, LOG_FILE))
            rows.append(row)
            reason = f" ({row['reason'][:200]})" if row["reason"] else ""
            seconds = row["seconds"].get("process", 0.0)
            print(f"{measurement.part}: {measurement.label}: {row['state']}{reason}, {seconds:.1f} s", flush=True)
    return rows


def add_killed_outcomes(
    outcomes: Iterable[TaskOutcome], tasks: Iterable[Task], deadline: float
) -> Iterator[TaskOutcome]:
    """Yield outcomes, then a `killed` outcome for each task without one, unless the deadline stopped it."""
    pending = {task.key: task for task in tasks}
    for outcome in outcomes:
        del pending[outcome.task.key]
        yield outcome
    if time.time() < deadline:
        reason = "the process was killed from outside, for example by the out-of-memory killer"
        for task in pending.values():
            yield TaskOutcome(task, {"state": "killed", "reason": reason, "seconds": {}})


# --- measurements -----------------------------------------------------------------------------------------------------


def iter_measurements(device: str, golden: Path) -> Iterator[Measurement]:
    """Yield all measurements, most valuable first. Models are tiny on a CPU."""
    use_tiny_models = device == "cpu"
    yield from iter_parity_measurements(device, golden, num_scenes=2 if use_tiny_models else 100)
    yield from iter_published_comparisons(device, use_tiny_models)
    sweep = read_throughput_sweep(device, use_tiny_models)
    main_counts, other_counts = ([2], [1, 4]) if use_tiny_models else ([64], [1, 8, 256])
    yield from iter_throughput_measurements(
        change_sweep(sweep, benchmark={**sweep.table["benchmark"], "regions_per_image": main_counts})
    )
    yield from iter_plan_measurements(device, use_tiny_models)
    yield from iter_training_steps(sweep, use_tiny_models)
    yield from iter_decoding_measurements(device, use_tiny_models)
    yield from iter_throughput_measurements(
        change_sweep(sweep, benchmark={**sweep.table["benchmark"], "regions_per_image": other_counts})
    )
    yield make_training_measurement(device, use_tiny_models)


def iter_parity_measurements(device: str, golden: Path, num_scenes: int) -> Iterator[Measurement]:
    """Yield comparisons with float32 on the CPU: recorded checkpoints and captions of generated scenes."""
    for dtype, tf32 in (("float32", False), ("float32", True), ("bfloat16", False)):
        if tf32 and device == "cpu":
            continue
        precision = f"{dtype}{' with TF32 convolutions' if tf32 else ''}"
        config = {"device": device, "dtype": dtype, "tf32": tf32}
        job = "sca_bench.parity:run_job"
        if dtype == "float32":
            yield Measurement(
                "parity", f"golden checkpoints, {precision}", job, {**config, "golden_folder": str(golden)}
            )
        yield Measurement("parity", f"{num_scenes} scenes, {precision}", job, {**config, "num_scenes": num_scenes})


def iter_published_comparisons(device: str, use_tiny_models: bool) -> Iterator[Measurement]:
    """Yield captioning and training next to the reproduced original SCA implementation, in one process."""
    sizes = {"batch_size": 16, "regions_per_image": 64, "published_regions": 64, "num_repeats": 3}
    if use_tiny_models:
        sizes = {"batch_size": 2, "regions_per_image": 9, "published_regions": 9, "num_repeats": 1}
    parts = (TINY_VIT, TINY_LM) if use_tiny_models else ("sam-vit-b", "gpt2-large")
    config = {"encoder": parts[0], "language_model": parts[1], "device": device, "dtype": "bfloat16", **sizes}
    label = "tiny" if use_tiny_models else "sam-vit-b+query+gpt2-large, bfloat16"
    for part in ("captions", "mixers", "tiny") if use_tiny_models else ("captions", "training", "mixers", "tiny"):
        yield Measurement(
            "published", f"{part}: {label}", "sca_bench.published_comparison:run_job", {**config, "parts": [part]}
        )


def read_throughput_sweep(device: str, use_tiny_models: bool) -> Sweep:
    """Return the sweep `throughput` without LoRA and training, most valuable first; with tiny components on a CPU."""
    sweep = Sweep.read("throughput", device)
    benchmark = {**sweep.table["benchmark"], "training_step": False, "plan": False, "num_repeats": 3}
    axes = {**sweep.table["axes"], "lora": [0]}
    if use_tiny_models:
        axes |= {"encoder": [TINY_VIT], "mixer": TINY_MIXERS, "language_model": [TINY_LM]}
        benchmark |= {"max_new_tokens": 4, "num_repeats": 1}
    return change_sweep(sweep, axes=axes, benchmark=benchmark)


def change_sweep(sweep: Sweep, **tables: Mapping[str, Any]) -> Sweep:
    """Return a copy of a sweep with other tables."""
    return Sweep.from_dict({**sweep.table, **tables}, sweep.name, sweep.device)


def iter_throughput_measurements(sweep: Sweep) -> Iterator[Measurement]:
    """Yield stage times, memory and throughput of every combination."""
    for row in sweep.list_rows("listed"):
        yield convert_row_to_measurement("throughput", row)


def iter_training_steps(sweep: Sweep, use_tiny_models: bool) -> Iterator[Measurement]:
    """Yield a training step with and without LoRA, each with and without cached features."""
    axes = {**sweep.table["axes"], "lora": [0, 2 if use_tiny_models else 16]}
    if not use_tiny_models:
        axes |= {"encoder": ["sam-vit-b"], "mixer": ["query"], "language_model": ["gpt2-large"]}
    benchmark = {
        **sweep.table["benchmark"],
        "training_step": True,
        "regions_per_image": [2 if use_tiny_models else 16],
    }
    for row in change_sweep(sweep, axes=axes, benchmark=benchmark).list_rows("listed"):
        yield convert_row_to_measurement("training step", row)


def iter_plan_measurements(device: str, use_tiny_models: bool) -> Iterator[Measurement]:
    """Yield predicted and measured memory of captioning and training."""
    models = ("tiny-vit+query+tiny-gpt2",) if use_tiny_models else FULL_SIZE_MODELS
    sizes = {
        "batch_size": 1,
        "regions_per_image": 2 if use_tiny_models else 64,
        "max_new_tokens": 4 if use_tiny_models else MAX_NEW_TOKENS,
    }
    for training in (False, True):
        for model in models:
            config = {"model": model, **sizes, "training": training, "device": device, "dtype": "bfloat16"}
            label = f"{model}, {'training' if training else 'captioning'}"
            yield Measurement("plan", label, "sca_bench.plan_accuracy:run_job", config)


def iter_decoding_measurements(device: str, use_tiny_models: bool) -> Iterator[Measurement]:
    """Yield decoding with and without CUDA graphs and torch.compile."""
    language_model = {**TINY_LM} if use_tiny_models else "gpt2-large"
    for num_rows in (4,) if use_tiny_models else (64, 512):
        for method in DECODING_METHODS:
            if method == "torch.compile" and num_rows == 512:
                continue  # compilation takes a minute per shape
            if method in ("cuda graph", "torch.compile") and device == "cpu":
                continue  # a CPU has no graphs, and compilation would dominate
            config = {
                "language_model": language_model,
                "method": method,
                "batch_size": num_rows,
                "prefix_length": 14,
                "max_new_tokens": MAX_NEW_TOKENS,
            }
            config |= {"num_repeats": 1 if use_tiny_models else 5, "device": device, "dtype": "bfloat16"}
            yield Measurement("decoding", f"{num_rows} rows, {method}", "sca_bench.decoding:run_job", config)


def make_training_measurement(device: str, use_tiny_models: bool) -> Measurement:
    """Return a training run of the recipe `sca-tiny` in bfloat16, with its scores."""
    recipe = Recipe.read("sca-tiny")
    model = (
        replace(
            recipe.model,
            encoder=replace(recipe.model.encoder, options={**recipe.model.encoder.options, "image_size": 64}),
        )
        if use_tiny_models
        else recipe.model
    )
    train_options = {"recipe": "sca-tiny", "steps": 2, "batch_size": 2, "num_workers": 0}
    if not use_tiny_models:
        train_options |= {"steps": 800, "batch_size": 64, "num_workers": 12, "precision": "bfloat16"}
    evaluate_options = {
        "dataset": {"name": "scenes", "num_images": 2 if use_tiny_models else 300},
        "split": "test",
        "prompt_type": "box",
        "metrics": ["attributes", "mask-iou"],
    }
    config = {
        "model": model.to_dict(),
        "seed": 0,
        "num_threads": 0,
        "device": device,
        "train": train_options,
        "evaluate": evaluate_options,
    }
    return Measurement("sca-tiny", "recipe sca-tiny in bfloat16", "sca_bench.worker:run_row", config)


def convert_row_to_measurement(part: str, row: SweepRow) -> Measurement:
    """Return a row of a sweep as a measurement."""
    model = row.config["model"]
    label = "+".join(model[kind]["name"] for kind in MODEL_COMPONENTS if model.get(kind))
    label += f", LoRA {model['lora']['rank']}" if model.get("lora") else ""
    region_counts = "/".join(map(str, row.config["benchmark"]["regions_per_image"]))
    return Measurement(part, f"{label}, {region_counts} regions", "sca_bench.worker:run_row", row.config)


# --- earlier rows and environment -------------------------------------------------------------------------------------


def read_final_keys(folder: Path, device: str) -> set[str]:
    """Return the keys of rows in a folder's *.jsonl files that this device need not measure again."""
    keys = set()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a line truncated when an earlier run was killed
                continue
            if row["state"] in FINAL_STATES and row["environment"]["device"] == device:
                keys.add(row["key"])
    return keys


def read_commit(inputs: Path) -> str | None:
    """Return the commit that prepare.sh recorded; a copy of the working tree has no history."""
    path = inputs / "commit"
    return path.read_text("utf-8").strip() if path.is_file() else None


def describe_device(device: str) -> str:
    """Return the name of the device as in rows."""
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )


def describe_environment(device: str) -> str:
    """Return versions and the output of nvidia-smi."""
    from sca_bench.worker import collect_environment

    report = json.dumps(collect_environment(device), indent=1)
    if device.startswith("cuda") and shutil.which("nvidia-smi"):
        report += "\n" + subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    return f"{report}\n"


def append_log(path: Path, measurement: Measurement, job_log: Path) -> None:
    """Append the end of a job's output."""
    text = job_log.read_text("utf-8", "replace")[-6000:] if job_log.is_file() else ""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"--- {measurement.part}: {measurement.label}\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
