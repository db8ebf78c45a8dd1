"""Measure startup time and memory of many regions: `python benchmarks/studies/startup_time.py [--out FILE]`

import       `import sca`
cold start   `sca caption` on a generated scene in its own process, next to a process that imports torch and
             transformers and captions the same scene
memory       peak of a process that captions 256 regions of an image with SAM ViT-B + query + GPT-2, including the
             (random) weights
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sca.io.atomic import write_file

NUM_REPEATS = 5
BOX_ARGUMENTS = [f"{x},{y},{x + 60},{y + 60}" for x in (10, 60) for y in (10, 60)]
MEMORY_PROGRAM = """
import resource, torch, sca
from PIL import Image
from sca_registry.contracts import Prompt
model = sca.compose("sam-vit-b", "query", "gpt2", weights=False)
predictor = sca.Predictor(model)
predictor.set_image(Image.new("RGB", (1024, 1024), "gray"))
model.language_model._resolve_special_tokens = lambda: (0, [])
predictor.engine._decode_texts = lambda sequences: ["" for _ in sequences]
boxes = [(x * 50.0, y * 50.0, x * 50.0 + 99, y * 50.0 + 99) for x in range(16) for y in range(16)]
predictor.predict([Prompt(box=box) for box in boxes])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
IMPORT_PROGRAM = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"
CAPTION_PROGRAM = """
import time
import sca
import torch, transformers, transformers.models.gpt2.modeling_gpt2
from sca_registry.contracts import Prompt
image = sca.open_image({image!r})
start = time.perf_counter()
predictor = sca.Predictor(sca.load("sca-tiny"))
predictor.set_image(image)
predictor.predict([Prompt(box=tuple(map(float, box.split(",")))) for box in {boxes!r}])
print(time.perf_counter() - start)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the measurements.")
    args = parser.parse_args(arguments)
    measurements: dict[str, Any] = {"import_sca_seconds": _run_for_minimum(IMPORT_PROGRAM.format("sca"))}
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder, "scene.png"))
        _save_scene(image)
        command = [sys.executable, "-m", "sca", "caption", image, "--out", folder, "--quiet"]
        command += [argument for box in BOX_ARGUMENTS for argument in ("--box", box)]
        caption_seconds = median(_time_command(command) for _ in range(NUM_REPEATS))
        import_command = [sys.executable, "-c", "import torch, transformers, transformers.models.gpt2.modeling_gpt2"]
        import_seconds = median(_time_command(import_command) for _ in range(NUM_REPEATS))
        compute_seconds = _run_for_minimum(CAPTION_PROGRAM.format(image=image, boxes=BOX_ARGUMENTS))
    measurements |= {
        "sca_caption_seconds": caption_seconds,
        "import_torch_and_transformers_seconds": import_seconds,
        "load_and_caption_seconds": compute_seconds,
        "overhead": caption_seconds / (import_seconds + compute_seconds),
    }
    measurements["peak_memory_256_regions"] = float(_run_for_number([sys.executable, "-c", MEMORY_PROGRAM]))
    for name, value in measurements.items():
        print(f"{name}: {value:.3f}" if value < 1e6 else f"{name}: {value / 2**30:.2f} GiB")
    if args.out:
        from sca_bench.worker import collect_environment

        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps({**measurements, "environment": collect_environment("cpu")}, indent=1))


def _save_scene(path: str) -> None:
    code = f"from sca.data.scenes import Scenes; Scenes('test', num_images=1)[0].image.save({path!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def _time_command(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _run_for_minimum(code: str) -> float:
    """Return the minimum of the values that a program prints."""
    return min(float(_run_for_number([sys.executable, "-c", code])) for _ in range(NUM_REPEATS))


def _run_for_number(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
