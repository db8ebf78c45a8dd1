"""Measure startup time and memory of many regions: `python benchmarks/studies/startup_time.py [--out FILE]`

import       `import sca`
cold start   CPU seconds of `sca caption` on a generated scene and of `sca list`, each in its own process with one
             thread, next to a process that imports torch; with --baseline, alternating with another checkout
--memory     peak of a process that captions 256 regions of an image with SAM ViT-B + query + GPT-2, including the
             (random) weights
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sca.io.atomic import write_file

NUM_REPEATS = 3
BOX_ARGUMENTS = [f"{x},{y},{x + 60},{y + 60}" for x in (10, 60) for y in (10, 60)]
MEMORY_PROGRAM = """
import resource, torch, sca
from PIL import Image
from sca_registry.contracts import Prompt
from sca.language_models.tiny_gpt2 import TinyGpt2
model = sca.compose("sam-vit-b", "query", "gpt2", weights=False)
predictor = sca.Predictor(model)
predictor.set_image(Image.new("RGB", (1024, 1024), "gray"))
model.language_model._resolve_special_tokens = lambda: (0, [])
model.language_model.tokenizer = TinyGpt2().tokenizer
boxes = [(x * 50.0, y * 50.0, x * 50.0 + 99, y * 50.0 + 99) for x in range(16) for y in range(16)]
predictor.predict([Prompt(box=box) for box in boxes])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
IMPORT_PROGRAM = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="Another checkout with its own .venv, to compare with.")
    parser.add_argument("--memory", action="store_true", help="Measure memory instead of startup.")
    parser.add_argument("--out", type=Path, help="JSON file for the measurements.")
    args = parser.parse_args(arguments)
    measurements = _measure_memory() if args.memory else _measure_startup(args.baseline)
    for name, value in measurements.items():
        print(f"{name}: {value:.3f}" if value < 1e6 else f"{name}: {value / 2**30:.2f} GiB")
    if args.out:
        from sca_bench.worker import collect_environment

        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps({**measurements, "environment": collect_environment("cpu")}, indent=1))


def _measure_memory() -> dict[str, float]:
    return {"peak_memory_256_regions": float(_run_for_number([sys.executable, "-c", MEMORY_PROGRAM]))}


def _measure_startup(baseline: Path | None) -> dict[str, float]:
    measurements = {"import_sca_seconds": _run_for_minimum(IMPORT_PROGRAM.format("sca"))}
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder, "scene.png"))
        _save_scene(image)
        caption_arguments = ["-m", "sca", "caption", image, "--out", folder, "--overwrite", "--quiet"]
        caption_arguments += [argument for box in BOX_ARGUMENTS for argument in ("--box", box)]
        commands = {
            "sca_caption": caption_arguments,
            "sca_list": ["-m", "sca", "list"],
            "import_torch": ["-c", "import torch"],
        }
        for name, command in commands.items():
            measurements |= _compare_commands(name, command, baseline)
    return measurements


def _save_scene(path: str) -> None:
    code = f"from sca.data.scenes import Scenes; Scenes('test', num_images=1)[0].image.save({path!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def _compare_commands(name: str, arguments: list[str], baseline: Path | None) -> dict[str, float]:
    """Return the minimum CPU seconds of a command, here and in another checkout, and their ratio."""
    pythons = {f"{name}_seconds": sys.executable}
    if baseline is not None:
        pythons[f"{name}_baseline_seconds"] = str(baseline.absolute() / ".venv/bin/python")
    rounds = [
        {label: _measure_cpu_seconds([python, *arguments]) for label, python in pythons.items()}
        for _ in range(NUM_REPEATS)
    ]
    seconds = {label: min(each[label] for each in rounds) for label in pythons}
    if baseline is None:
        return seconds
    return seconds | {f"{name}_ratio": seconds[f"{name}_seconds"] / seconds[f"{name}_baseline_seconds"]}


def _measure_cpu_seconds(command: list[str]) -> float:
    """Return the CPU seconds of a process with one thread; they depend less on other processes than its duration."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # elsewhere than in a checkout, whose packages `python -m` would import
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=tempfile.gettempdir())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run_for_minimum(code: str) -> float:
    """Return the minimum of the values that a program prints."""
    return min(float(_run_for_number([sys.executable, "-c", code])) for _ in range(NUM_REPEATS))


def _run_for_number(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
