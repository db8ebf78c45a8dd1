"""Measure zoom: `python benchmarks/studies/zoom.py MODEL --num-tuning-images N --out FILE`

Predicts each small region of a dataset from the image and from a crop, and records which predictions are correct. The
data are mosaics of synthetic scenes, whose captions must state the color and the shape, or the validation photographs
of a folder in COCO format, with class names. The regions of the first images are predicted from crops of every
magnification: each choice of the options of zoom selects one of these predictions, so that choices can be compared. The
regions of the other images are predicted with the options of the model.

An interrupted run resumes from its output file. A complete run measures the cost and prints Markdown tables.
Differences have 95% confidence intervals over images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sca_registry.contracts import Prompt, Region
from sca_registry.spec import ZoomOptions

from sca.evaluation.bootstrap import bootstrap_scores, compute_interval, has_enough_images, make_mean_statistics
from sca.io.atomic import write_file
from sca.io.score_format import format_interval, format_score

MOSAIC_SIDES = {2: 16, 3: 10, 4: 8}  # scenes per side of a mosaic -> number of mosaics
MAX_CELLS = 32.0  # area of the largest region to measure in crops of every magnification
MAX_LEVEL = 4  # magnification 4; each level magnifies by the square root of 2
MIN_CONTEXT = 1.5  # of the closest crop of a region
SMALL_CELLS = 4.0  # area of the largest small region
FRAMES_PER_BLOCK = 10  # neighboring photographs, which are frames of a video, in one block of the bootstrap
COST_STEP = 4  # the cost is measured on each such image
ALTERNATIVES = {  # choices of each option to compare
    "max_cells": (2.0, 4.0, 8.0, 16.0, 32.0),
    "context": (1.5, 2.0, 3.0, 4.0),
    "max_upscale": (0.75, 1.0, 1.5, 2.0, 3.0),
}
CELL_BOUNDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, float("inf"))


class StudyImage(NamedTuple):
    """An image with regions in its pixels."""

    name: str
    image: Image.Image
    regions: list[Region]


def build_mosaics() -> Iterator[StudyImage]:
    """Yield mosaics of square synthetic scenes, none of which was used for training."""
    import sca_registry

    num_scenes = sum(side**2 * count for side, count in MOSAIC_SIDES.items())
    scenes = iter(sca_registry.datasets.build("scenes", "test", num_images=num_scenes))
    for side, count in MOSAIC_SIDES.items():
        for index in range(count):
            tiles = [next(scenes) for _ in range(side**2)]
            tile_size = tiles[0].image.width
            mosaic, regions = Image.new("RGB", (side * tile_size, side * tile_size)), []
            for tile_index, tile in enumerate(tiles):
                x, y = tile_index % side * tile_size, tile_index // side * tile_size
                mosaic.paste(tile.image, (x, y))
                for region in tile.regions:
                    x1, y1, x2, y2 = region.box
                    box = (x1 + x, y1 + y, x2 + x, y2 + y)
                    regions.append(Region(len(regions), box, None, region.name, region.phrases, region.attributes))
            yield StudyImage(f"mosaic-{side}-{index}", mosaic, regions)


def read_photographs(folder: Path) -> Iterator[StudyImage]:
    """Yield the validation photographs of a folder in COCO format."""
    import sca_registry

    dataset = sca_registry.datasets.build("coco", "val", root=str(folder))
    for index in range(len(dataset)):
        sample = dataset[index]
        yield StudyImage(f"photograph-{index}", sample.image, list(sample.regions))


def is_correct(text: str, region: Region, task: str) -> bool:
    """Return whether a class name is that of a region, or a caption states its color and shape."""
    from sca.data.scenes import parse_statement

    if task == "recognition":
        return text.strip() == region.name
    statement = parse_statement(text)
    return statement is not None and all(
        getattr(statement, name) == region.attributes[name] for name in ("color", "shape")
    )


def measure_image(engine: Any, study_image: StudyImage, task: str, has_all_levels: bool) -> list[dict[str, Any]]:
    """Predict the regions of an image without and with zoom.

    Args:
        engine: Engine of the model.
        study_image: Image.
        task: "caption" or "recognition".
        has_all_levels: Predict the regions from crops of every magnification instead of the options of the model.

    Returns:
        For each region: `image`, `class`, `cells` (area in cells of the feature grid), `longest` (longer side in pixels
        of the model input), and `correct` by level of magnification, starting with the image itself; None for levels
        without a prediction. For each region with a crop: `scores`, those of the captions from the image and from the
        crop that the options of the model choose.
    """
    from sca.inference.zoom import caption_regions

    encoded = engine.encode([study_image.image])
    (frame,), input_size = encoded.frames, engine.processor.image_format.size
    scale_x, scale_y = frame.scale
    stride = input_size / engine.processor.grid_size
    rows = []
    for region in study_image.regions:
        width, height = (region.box[2] - region.box[0]) * scale_x, (region.box[3] - region.box[1]) * scale_y
        cells = round(width * height / stride**2, 3)
        values = {"class": region.name, "cells": cells, "longest": round(max(width, height), 2)}
        rows.append({"image": study_image.name, **values, "correct": [None] * (MAX_LEVEL + 1)})
    model_zoom = replace(engine.zoom, keep_best_caption=False)
    choices: list[ZoomOptions | None] = [None, model_zoom]
    if has_all_levels:
        upscales = [2 ** (level / 2) * max(frame.scale) for level in range(1, MAX_LEVEL + 1)]
        choices[1:] = [ZoomOptions(MAX_CELLS, MIN_CONTEXT, upscale) for upscale in upscales]
    scores = [[0.0] * (MAX_LEVEL + 1) for _ in rows]  # by level
    for zoom in choices:
        levels = [
            _find_level(region.box, row["cells"], frame, input_size, zoom)
            for region, row in zip(study_image.regions, rows, strict=True)
        ]
        missing = [
            index
            for index, level in enumerate(levels)
            if (zoom is None or level) and rows[index]["correct"][level] is None
        ]
        prompts = [Prompt(box=study_image.regions[index].box) for index in missing]
        if prompts:
            (captions,) = caption_regions(engine, encoded, [prompts], task, zoom, return_masks=False)
            for index, caption in zip(missing, captions, strict=True):
                is_right = is_correct(caption.text, study_image.regions[index], task)
                rows[index]["correct"][levels[index]] = int(is_right)
                scores[index][levels[index]] = round(caption.score, 5)
    for region, row, region_scores in zip(study_image.regions, rows, scores, strict=True):
        if level := _find_level(region.box, row["cells"], frame, input_size, model_zoom):
            row["scores"] = [region_scores[0], region_scores[level]]
    return rows


def _find_level(box: Any, cells: float, frame: Any, input_size: int, zoom: ZoomOptions | None) -> int:
    """Return the level of magnification of the crop of a region; 0 without a crop."""
    from sca.inference.zoom import choose_window

    if zoom is None or zoom.max_cells is None or cells > zoom.max_cells:
        return 0
    window = choose_window(box, frame, input_size, zoom)
    if window is None:
        return 0
    x1, y1, x2, y2 = window
    longer_side = max((x2 - x1) * frame.scale[0], (y2 - y1) * frame.scale[1])
    return round(2 * np.log2(max(frame.content_size) / longer_side))


def select_level(row: Mapping[str, Any], zoom: ZoomOptions, scale: float, input_size: int) -> int:
    """Return the level of the crop that zoom chooses for a region, as `sca.inference.zoom.choose_window` does.

    Args:
        row: Region, as returned by `measure_image`.
        zoom: Options.
        scale: Pixels of the model input per pixel of the image.
        input_size: Side of the model input.

    Returns:
        The level; 0 for a region that is predicted from the image.
    """
    if zoom.max_cells is None or row["cells"] > zoom.max_cells:
        return 0
    magnification = min(zoom.max_upscale / scale, input_size / max(zoom.context * row["longest"], 1))
    level = min(max(int(np.floor(2 * np.log2(magnification) + 1e-6)), 0), MAX_LEVEL)
    return next(each for each in range(level, -1, -1) if row["correct"][each] is not None)


class Outcomes(NamedTuple):
    """Regions with their correctness without and with zoom."""

    image_index: np.ndarray  # (R,)
    cells: np.ndarray  # (R,) area in cells of the feature grid
    classes: np.ndarray  # (R,) class names
    plain: np.ndarray  # (R,) 1 for a correct prediction without zoom
    zoomed: np.ndarray  # (R,) 1 for a correct prediction with zoom

    def select_rows(self, mask: np.ndarray) -> Outcomes:
        """Return the regions where `mask` is true."""
        return Outcomes(*(values[mask] for values in self))

    def summarize(self, images_per_block: int = 1) -> dict[str, Any]:
        """Return the number of regions, both accuracies, their difference and its interval over blocks of images."""
        difference = self.zoomed - self.plain
        statistics = make_mean_statistics(difference.astype(float))
        blocks = self.image_index // images_per_block
        interval = compute_interval(bootstrap_scores(statistics, blocks)) if has_enough_images(blocks) else None
        accuracies = {"plain": float(self.plain.mean()), "zoomed": float(self.zoomed.mean())}
        return {"regions": len(difference), **accuracies, "difference": float(difference.mean()), "interval": interval}


def compute_outcomes(results: Mapping[str, Any], zoom: ZoomOptions, images: slice = slice(None)) -> Outcomes:
    """Return the outcomes of the regions of some images with options of zoom.

    Args:
        results: Contents of a results file.
        zoom: Options.
        images: Indices of the images.

    Returns:
        The outcomes.
    """
    rows = []
    for index, image in list(enumerate(results["images"]))[images]:
        for row in image["regions"]:
            level = select_level(row, zoom, image["scale"], results["input_size"])
            if zoom.keep_best_caption and level and row["scores"][0] > row["scores"][1]:
                level = 0
            rows.append((index, row["cells"], row["class"], row["correct"][0], row["correct"][level]))
    return Outcomes(*map(np.array, zip(*rows, strict=True)))


def measure_cost(engine: Any, images: Sequence[StudyImage], task: str, zoom: ZoomOptions) -> dict[str, Any]:
    """Measure the CPU time per region without and with zoom, and the crops per image."""
    from sca.inference.zoom import caption_regions, encode_image_crops

    num_regions, num_crops, seconds = sum(len(each.regions) for each in images), 0, {"plain": 0.0, "zoomed": 0.0}
    for study_image in images:
        prompts = [Prompt(box=region.box) for region in study_image.regions]
        for name, options in (("plain", None), ("zoomed", zoom)):
            start = time.process_time()
            encoded = engine.encode([study_image.image])

            def encode_crops(crops: Any, encoded: Any = encoded) -> Any:
                nonlocal num_crops
                num_crops += len(crops)
                return encode_image_crops(engine, encoded.images, crops)

            caption_regions(engine, encoded, [prompts], task, options, encode_crops)
            seconds[name] += time.process_time() - start
    milliseconds = {name: 1000 * value / num_regions for name, value in seconds.items()}
    return {"images": len(images), "regions": num_regions, "crops": num_crops, "cpu_ms_per_region": milliseconds}


def render_curve(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of the accuracy by the area of the region, times 100."""
    outcomes = compute_outcomes(results, ZoomOptions(**results["zoom"]))
    lines = ["| cells | regions | off (%) | zoom (%) | difference (95% CI) |", "| --- | ---: | ---: | ---: | ---: |"]
    for low, high in pairwise(CELL_BOUNDS):
        is_selected = (outcomes.cells > low) & (outcomes.cells <= high)
        label = f"{low:g} to {high:g}" if np.isfinite(high) else f"over {low:g}"
        if is_selected.any():
            lines.append(_format_row(label, outcomes.select_rows(is_selected)))
    held_out = compute_outcomes(results, ZoomOptions(**results["zoom"]), slice(results["num_tuning_images"], None))
    for suffix, each in (("", outcomes), (", held-out images", held_out)):
        lines.append(_format_row(f"at most {SMALL_CELLS:g}{suffix}", each.select_rows(each.cells <= SMALL_CELLS)))
        lines.append(_format_row(f"all{suffix}", each))
    return "\n".join(lines)


def render_classes(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of the accuracy of small regions by class, times 100."""
    outcomes = compute_outcomes(results, ZoomOptions(**results["zoom"]))
    small = outcomes.select_rows(outcomes.cells <= SMALL_CELLS)
    lines = ["| class | regions | off (%) | zoom (%) | difference (95% CI) |", "| --- | ---: | ---: | ---: | ---: |"]
    return "\n".join(
        [*lines, *(_format_row(name, small.select_rows(small.classes == name)) for name in np.unique(small.classes))]
    )


def render_blocks(results: Mapping[str, Any]) -> str:
    """Render one line with the differences and their intervals over blocks of neighboring photographs."""
    outcomes = compute_outcomes(results, ZoomOptions(**results["zoom"]))
    small = outcomes.select_rows(outcomes.cells <= SMALL_CELLS)
    parts = []
    for label, each in ((f"at most {SMALL_CELLS:g} cells", small), ("all regions", outcomes)):
        summary = each.summarize(FRAMES_PER_BLOCK)
        interval = format_interval(*summary["interval"], True)
        parts.append(f"{label} {format_score(summary['difference'], True)} ({interval})")
    return f"Differences with intervals over blocks of {FRAMES_PER_BLOCK} neighboring frames: {', '.join(parts)}"


def render_choices(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of the gain with other options, on the images that selected the options."""
    chosen = ZoomOptions(**results["zoom"])
    plain = replace(chosen, keep_best_caption=False)
    choices = [replace(chosen, keep_best_caption=True), plain]
    for name, values in ALTERNATIVES.items():
        choices += [replace(plain, **{name: value}) for value in values if value != getattr(plain, name)]
    lines = [
        "| max_cells | context | max_upscale | keep_best_caption | at most 4 cells | all |",
        "| ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for zoom in choices:
        outcomes = compute_outcomes(results, zoom, slice(results["num_tuning_images"]))
        small = outcomes.select_rows(outcomes.cells <= SMALL_CELLS)
        gains = [format_score(each.summarize()["difference"], True) for each in (small, outcomes)]
        options = (
            f"{zoom.max_cells:g} | {zoom.context:g} | {zoom.max_upscale:g} | {str(zoom.keep_best_caption).lower()}"
        )
        lines.append(f"| {options} | {' | '.join(gains)} |")
    return "\n".join(lines)


def render_cost(results: Mapping[str, Any]) -> str:
    """Render one line about the cost of zoom."""
    cost = results["cost"]
    plain, zoomed = (cost["cpu_ms_per_region"][name] for name in ("plain", "zoomed"))
    crops = cost["crops"] / cost["images"]
    regions = cost["regions"] / cost["images"]
    return (
        f"{results['model']}: {regions:.1f} regions and {crops:.1f} crops per image; {plain:.1f} ms of CPU time per "
        f"region without zoom, {zoomed:.1f} ms with zoom ({zoomed / plain:.1f} x)"
    )


def _format_row(label: str, outcomes: Outcomes) -> str:
    summary = outcomes.summarize()
    scores = f"{format_score(summary['plain'])} | {format_score(summary['zoomed'])}"
    interval = f" ({format_interval(*summary['interval'], True)})" if summary["interval"] else ""
    return f"| {label} | {summary['regions']} | {scores} | {format_score(summary['difference'], True)}{interval} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/studies/zoom.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="Model with a checkpoint.")
    parser.add_argument("--photographs", type=Path, help="Folder in COCO format; else mosaics of synthetic scenes.")
    parser.add_argument(
        "--num-tuning-images", type=int, required=True, help="First images, which compare options of zoom."
    )
    parser.add_argument("--max-seconds", type=float, default=500.0, help="Time after which the run stops.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    import torch
    from sca_bench.worker import collect_environment

    from sca.inference.factory import load_captioner

    torch.set_num_threads(1)
    engine: Any = load_captioner(args.model)
    start, task = time.monotonic(), "recognition" if args.photographs else "caption"
    images = list(read_photographs(args.photographs) if args.photographs else build_mosaics())
    settings = {
        "model": args.model,
        "weights_hash": engine.weights_hash,
        "data": "photographs" if args.photographs else "mosaics",
        "num_tuning_images": args.num_tuning_images,
        "input_size": engine.processor.image_format.size,
        "zoom": asdict(engine.zoom),
    }
    results = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"images": []}
    check_same_settings(args.out, results, settings)
    results |= settings
    results["environment"] = collect_environment("cpu")
    measured = {each["name"]: each for each in results["images"]}
    for index, study_image in enumerate(images):
        if study_image.name in measured:
            continue
        if time.monotonic() - start > args.max_seconds:
            raise SystemExit(f"{len(measured)} of {len(images)} images measured; run the command again")
        scale = max(engine.processor.compute_frame(*study_image.image.size).scale)
        regions = measure_image(engine, study_image, task, index < args.num_tuning_images)
        measured[study_image.name] = {"name": study_image.name, "scale": scale, "regions": regions}
        results["images"] = [measured[each.name] for each in images if each.name in measured]
        write_results(args.out, results)
    results["cost"] = measure_cost(engine, images[::COST_STEP], task, engine.zoom)
    write_results(args.out, results)
    tables = [render_curve(results), render_choices(results), render_cost(results)]
    tables += [render_blocks(results), render_classes(results)] if args.photographs else []
    print("\n\n".join(tables))


def check_same_settings(path: Path, results: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Exit with a message if the results in a file were measured with other settings."""
    for name, value in settings.items():
        if results["images"] and results.get(name) != value:
            raise SystemExit(
                f"{path} was measured with {name}={results.get(name)!r}, not {value!r}; choose another --out, or "
                "delete the file"
            )


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results with one line per image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in results.items() if key != "images"}
    images = ",\n".join(json.dumps(each) for each in results["images"])
    write_file(path, f'{json.dumps(fields)[:-1]}, "images": [\n{images}\n]}}\n')


if __name__ == "__main__":
    main()
