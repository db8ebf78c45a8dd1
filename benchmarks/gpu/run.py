"""Measure what is missing on a GPU within a time budget, most valuable first; `run.sh` installs and starts this.

Every measurement is a job in a process of its own, started by the local launcher, so one that fails, crashes or runs
out of memory becomes a row with its reason and the next one starts. On a CPU the same jobs run at tiny sizes.
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

from sca_bench.decoding import WAYS
from sca_bench.memory import REAL
from sca_bench.sweep import PARTS, Row, Sweep

from sca.launchers.child import LOG_FILE
from sca.launchers.local import Local
from sca.launchers.task import TaskOutcome, Task
from sca.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path("tests/data/golden")  # of the repository, from which jobs are started
SETTLED = ("done", "impossible", "skipped", "out-of-memory")  # states that another run would find again
MARGIN = 8.0  # seconds kept for ending
LONGEST = 150.0  # seconds that one measurement may take
NEW_TOKENS = 20
TINY_VIT = {"name": "tiny-vit", "size": 64, "width": 32, "depth": 1, "channels": 32, "stem": [8, 16]}
TINY_SAM = {"name": "sam", "pretrained": False, "config": {"hidden_size": 32, "num_hidden_layers": 1}}
TINY_LM = {"name": "tiny-gpt2", "width": 32, "depth": 2, "heads": 2, "positions": 64}
TINY_MIXERS = [{"name": name, "queries": 2, "depth": 1, "heads": 2} for name in ("query", "resampler")]


@dataclass(frozen=True)
class Measurement:
    """One row to be made: the part it belongs to, a label for people, the job and its configuration."""

    part: str
    label: str
    job: str
    config: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that differ where the job or its configuration does."""
        text = json.dumps([self.job, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="Device: cuda, or cpu for tiny sizes.")
    parser.add_argument("--seconds", type=float, default=450.0, help="Time budget in seconds.")
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time from which the budget counts.")
    parser.add_argument("--inputs", type=Path, default=ROOT / ".gpu", help="Folder that prepare.sh filled.")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="Folder of golden checkpoints.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu"), help="Folder for rows.")
    parser.add_argument("--only", nargs="*", default=(), metavar="PART", help="Run these parts only.")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = describe_device(given.device)
    (given.out / "device.txt").write_text(device_report(given.device), "utf-8")
    known = read_settled(given.inputs / "rows", device) | read_settled(given.out, device)
    listed = [each for each in measurements(given.device, given.golden) if each.part in given.only or not given.only]
    wanted = [each for each in listed if each.key not in known]
    print(f"{len(listed)} rows on {device}: {len(listed) - len(wanted)} known, {len(wanted)} to measure", flush=True)
    deadline = given.started + given.seconds - MARGIN
    made = measure(wanted, deadline, given.out, read_commit(given.inputs))
    failed = sum(row["state"] not in SETTLED for row in made)
    print(f"{len(made)} rows measured, {failed} of them failed; {len(wanted) - len(made)} left for another run")


def measure(wanted: list[Measurement], deadline: float, out: Path, commit: str | None) -> list[dict[str, Any]]:
    """Make rows until the deadline (Unix time) and append each to `out/rows.jsonl` as soon as it is made."""
    made = []
    by_key = {each.key: each for each in wanted}
    with tempfile.TemporaryDirectory(prefix="sca-gpu-") as scratch, open(out / "rows.jsonl", "ab", buffering=0) as file:
        tasks = [
            Task(each.key, each.job, each.config, f"{scratch}/{each.key}", LONGEST, deadline=deadline)
            for each in wanted
        ]
        for task, result in add_killed(Local(workers=1).map(tasks), tasks, deadline):
            each = by_key[task.key]
            row = {"key": each.key, "part": each.part, "label": each.label, "job": each.job, "config": each.config}
            row |= result
            row.setdefault("environment", {"device": describe_device(task.config["device"])})
            if commit:
                row["environment"]["commit"] = commit
            file.write(f"{json.dumps(row)}\n".encode())
            os.fsync(file.fileno())
            append_log(out / "log.txt", each, Path(task.folder, LOG_FILE))
            made.append(row)
            reason = f" ({row['reason'][:200]})" if row["reason"] else ""
            took = row["seconds"].get("process", 0.0)
            print(f"{each.part}: {each.label}: {row['state']}{reason}, {took:.1f} s", flush=True)
    return made


def add_killed(outcomes: Iterable[TaskOutcome], tasks: Iterable[Task], deadline: float) -> Iterator[TaskOutcome]:
    """Yield outcomes, then a `killed` one for each task without an outcome, unless the deadline cut it."""
    left = {task.key: task for task in tasks}
    for outcome in outcomes:
        del left[outcome.task.key]
        yield outcome
    if time.time() < deadline:
        reason = "its process was killed from outside, as the kernel does when memory runs out"
        for task in left.values():
            yield TaskOutcome(task, {"state": "killed", "reason": reason, "seconds": {}})


# --- what is measured -------------------------------------------------------------------------------------------------


def measurements(device: str, golden: Path) -> Iterator[Measurement]:
    """Yield everything to measure, most valuable first. On a CPU models are tiny."""
    tiny = device == "cpu"
    yield from parity(device, golden, scenes=2 if tiny else 100)
    yield from published(device, tiny)
    sweep = throughput(device, tiny)
    most, others = ([2], [1, 4]) if tiny else ([64], [1, 8, 256])
    yield from combinations(replace(sweep, measure={**sweep.measure, "regions": most}))
    yield from plans(device, tiny)
    yield from training_steps(sweep, tiny)
    yield from decoding(device, tiny)
    yield from combinations(replace(sweep, measure={**sweep.measure, "regions": others}))
    yield training(device, tiny)


def parity(device: str, golden: Path, scenes: int) -> Iterator[Measurement]:
    """Yield comparisons with float32 on the CPU: recorded checkpoints and captions of drawn scenes."""
    for dtype, tf32 in (("float32", False), ("float32", True), ("bfloat16", False)):
        if tf32 and device == "cpu":
            continue
        kind = f"{dtype}{' with TF32 convolutions' if tf32 else ''}"
        config = {"device": device, "dtype": dtype, "tf32": tf32}
        job = "sca_bench.parity:work"
        if dtype == "float32":
            yield Measurement("parity", f"golden checkpoints, {kind}", job, {**config, "golden": str(golden)})
        yield Measurement("parity", f"{scenes} scenes, {kind}", job, {**config, "scenes": scenes})


def published(device: str, tiny: bool) -> Iterator[Measurement]:
    """Yield captions and training beside the published procedure, in one process."""
    sizes = {"images": 16, "regions": 64, "beside": 64, "repeats": 3}
    if tiny:
        sizes = {"images": 2, "regions": 9, "beside": 9, "repeats": 1}
    names = (TINY_VIT, TINY_LM) if tiny else ("sam-vit-b", "gpt2-large")
    config = {"encoder": names[0], "language_model": names[1], "device": device, "dtype": "bfloat16", **sizes}
    label = "tiny" if tiny else "sam-vit-b+query+gpt2-large, bfloat16"
    for part in ("captions", "resampler", "tiny") if tiny else ("captions", "training", "resampler", "tiny"):
        yield Measurement(
            "published", f"{part}: {label}", "sca_bench.against_published:work", {**config, "parts": [part]}
        )


def throughput(device: str, tiny: bool) -> Sweep:
    """Return the sweep `throughput` without LoRA and training, in order of value; with tiny parts on a CPU."""
    sweep = Sweep.read("throughput", device)
    measured = {**sweep.measure, "training": False, "plan": False, "repeats": 3}
    axes = {**sweep.axes, "lora": [0]}
    if tiny:
        axes |= {"encoder": [TINY_VIT], "mixer": TINY_MIXERS, "language_model": [TINY_LM]}
        measured |= {"words": 4, "repeats": 1}
    return replace(sweep, axes=axes, measure=measured)


def combinations(sweep: Sweep) -> Iterator[Measurement]:
    """Yield stage times, memory and captions per second of every combination."""
    for row in sweep.rows("listed"):
        yield of_sweep("throughput", row)


def training_steps(sweep: Sweep, tiny: bool) -> Iterator[Measurement]:
    """Yield a training step with and without LoRA, each with and without cached features."""
    axes = {**sweep.axes, "lora": [0, 2 if tiny else 16]}
    if not tiny:
        axes |= {"encoder": ["sam-vit-b"], "mixer": ["query"], "language_model": ["gpt2-large"]}
    measured = {**sweep.measure, "training": True, "regions": [2 if tiny else 16]}
    for row in replace(sweep, axes=axes, measure=measured).rows("listed"):
        yield of_sweep("training step", row)


def plans(device: str, tiny: bool) -> Iterator[Measurement]:
    """Yield predicted and measured memory, in use and in training."""
    models = ("tiny-vit+query+tiny-gpt2",) if tiny else REAL
    sizes = {"images": 1, "regions": 2 if tiny else 64, "words": 4 if tiny else NEW_TOKENS}
    for train in (False, True):
        for model in models:
            config = {"model": model, **sizes, "train": train, "device": device, "dtype": "bfloat16"}
            label = f"{model}, {'training' if train else 'captioning'}"
            yield Measurement("plan", label, "sca_bench.memory:work", config)


def decoding(device: str, tiny: bool) -> Iterator[Measurement]:
    """Yield the decoding of captions with and without CUDA graphs and torch.compile."""
    part = {**TINY_LM} if tiny else "gpt2-large"
    for rows in (4,) if tiny else (64, 512):
        for way in WAYS:
            if way == "torch.compile" and rows == 512:
                continue  # compilation takes a minute a shape
            if way in ("cuda graph", "torch.compile") and device == "cpu":
                continue  # there are no graphs, and compilation takes longer than everything else
            config = {"language_model": part, "way": way, "rows": rows, "prefix": 14, "steps": NEW_TOKENS}
            config |= {"repeats": 1 if tiny else 5, "device": device, "dtype": "bfloat16"}
            yield Measurement("decoding", f"{rows} rows, {way}", "sca_bench.decoding:work", config)


def training(device: str, tiny: bool) -> Measurement:
    """Return the recipe `sca-tiny` in bfloat16, with its scores."""
    recipe = Recipe.read("sca-tiny")
    model = (
        replace(
            recipe.model, encoder=replace(recipe.model.encoder, options={**recipe.model.encoder.options, "size": 64})
        )
        if tiny
        else recipe.model
    )
    options = {"recipe": "sca-tiny", "steps": 2, "images": 2, "workers": 0}
    if not tiny:
        options |= {"steps": 800, "images": 64, "workers": 12, "precision": "bfloat16"}
    evaluation = {
        "dataset": {"name": "scenes", "count": 2 if tiny else 300},
        "split": "test",
        "prompt": "box",
        "metrics": ["attributes", "mask-iou"],
    }
    config = {
        "model": model.to_dict(),
        "seed": 0,
        "threads": 0,
        "device": device,
        "train": options,
        "evaluate": evaluation,
    }
    return Measurement("sca-tiny", "recipe sca-tiny in bfloat16", "sca_bench.worker:work", config)


def of_sweep(part: str, row: Row) -> Measurement:
    """Return a sweep's row as a measurement."""
    model = row.config["model"]
    label = "+".join(model[kind]["name"] for kind in PARTS if model.get(kind))
    label += f", LoRA {model['lora']['rank']}" if model.get("lora") else ""
    counts = "/".join(map(str, row.config["measure"]["regions"]))
    return Measurement(part, f"{label}, {counts} regions", "sca_bench.worker:work", row.config)


# --- what is known ----------------------------------------------------------------------------------------------------


def read_settled(folder: Path, device: str) -> set[str]:
    """Return the keys of rows in a folder's *.jsonl files that this device need not measure again."""
    keys = set()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a line that was cut off when the run before was killed
                continue
            if row["state"] in SETTLED and row["environment"]["device"] == device:
                keys.add(row["key"])
    return keys


def read_commit(inputs: Path) -> str | None:
    """Return the commit that prepare.sh recorded, since a copy of the working tree has no history."""
    path = inputs / "commit"
    return path.read_text("utf-8").strip() if path.is_file() else None


def describe_device(device: str) -> str:
    """Return the name of the device, as rows have it."""
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )


def device_report(device: str) -> str:
    """Return versions, and what nvidia-smi prints, for the record."""
    from sca_bench.worker import environment

    report = json.dumps(environment(device), indent=1)
    if device.startswith("cuda") and shutil.which("nvidia-smi"):
        report += "\n" + subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    return f"{report}\n"


def append_log(path: Path, each: Measurement, log: Path) -> None:
    """Append the end of what a job printed."""
    text = log.read_text("utf-8", "replace")[-6000:] if log.is_file() else ""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"--- {each.part}: {each.label}\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
