"""Compare the region formats of a VLM: `python benchmarks/studies/region_formats.py CAPTIONER [--out FILE]`

Captions the same regions once per format: crops without and with context, the full image with a drawn box or outline,
the coordinates of the box in the notation of the model, and an alpha channel. CAPTIONER is a vision-language model by
name, `vlm` with `weights=`, or `openai`. A format that the captioner does not support is listed with the reason.

Prints a Markdown table. Each difference from crops without context has a paired 95% confidence interval over images.
Seconds per region include scoring.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sca_registry import RegistryError
from sca_registry.spec import ComponentSpec

from sca.io.errors import InputError
from sca.io.score_format import format_score
from score_table import format_difference
from study_results import write_results

REFERENCE = "crop"
REGION_FORMATS: dict[str, dict[str, Any]] = {  # options of the captioner
    REFERENCE: {"region_format": "crop", "context": 1.0},
    "crop, context 1.5": {"region_format": "crop", "context": 1.5},
    "crop, context 2": {"region_format": "crop", "context": 2.0},
    "box": {"region_format": "box"},
    "outline": {"region_format": "outline"},
    "coordinates": {"region_format": "coordinates"},
    "alpha": {"region_format": "alpha"},
}


def measure_region_formats(
    captioner: ComponentSpec,
    dataset: ComponentSpec,
    split: str,
    metrics: Sequence[str],
    max_images: int,
    generation: Mapping[str, Any],
    device: str,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Caption the regions of a dataset in every region format, and compare each format with crops.

    Args:
        captioner: Captioner; its option `coordinate_format`, if any, is that of the coordinates.
        dataset: Dataset.
        split: Split of the dataset.
        metrics: Metrics of captions.
        max_images: Maximum number of images.
        generation: Generation options.
        device: Device of the model.
        folder: Folder for the predictions.

    Returns:
        By region format: `options`, `scores`, the `differences` from crops by score with `mean`, `ci_low` and
        `ci_high`, `regions` and `seconds_per_region`; or `reason` if the model does not support it.
    """
    import sca
    from sca.evaluation.comparison import compare_runs
    from sca.evaluation.predictions import PromptingOptions

    prompting = PromptingOptions(tasks=("caption",), generation=generation)
    table = captioner.to_dict()
    coordinate_options = {key: table.pop(key) for key in ["coordinate_format"] if key in table}
    results: dict[str, dict[str, Any]] = {}
    for name, options in REGION_FORMATS.items():
        format_options = {**options, **(coordinate_options if name == "coordinates" else {})}
        try:
            model = sca.load_captioner({**table, **format_options}, device)
        except RegistryError as error:
            if name == REFERENCE:
                raise
            results[name] = {"reason": str(error)}
            continue
        start = time.perf_counter()
        report = sca.evaluate(
            model,
            dataset,
            split,
            prompting=prompting,
            metrics=metrics,
            max_images=max_images,
            folder=folder / name,
        )
        assert report is not None  # one process
        num_regions = len(report.records)
        seconds = (time.perf_counter() - start) / num_regions
        scores = {score: value for score, value in report.scores.items() if isinstance(value, float)}
        comparison = compare_runs(folder / REFERENCE, folder / name, metrics)
        differences = {
            each.name: {"mean": each.difference, "ci_low": each.ci_low, "ci_high": each.ci_high}
            for each in comparison.differences
        }
        results[name] = {
            "options": format_options,
            "scores": scores,
            "differences": differences,
            "regions": num_regions,
            "seconds_per_region": round(seconds, 4),
        }
        del model  # free its memory before the next one is loaded
    return results


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of the scores, times 100, and of the differences from crops."""
    score_names = list(results["region_formats"][REFERENCE]["scores"])
    cells = [f"{name} | difference from crops (95% CI)" for name in score_names]
    lines = [
        f"| region format | {' | '.join(cells)} | seconds per region |",
        "| --- |" + " ---: |" * (2 * len(score_names) + 1),
    ]
    for name, each in results["region_formats"].items():
        if "reason" in each:
            continue
        columns = []
        for score_name in score_names:
            difference = "" if name == REFERENCE else format_difference(each["differences"][score_name])
            columns += [format_score(each["scores"][score_name]), difference]
        lines.append(f"| {name} | {' | '.join(columns)} | {each['seconds_per_region']:.3f} |")
    notes = [f"{name}: {each['reason']}" for name, each in results["region_formats"].items() if "reason" in each]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/region_formats.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("captioner", help="Vision-language model, such as qwen3-vl-4b or 'vlm weights=FOLDER'.")
    parser.add_argument("--dataset", default="scenes", help="Dataset with its options: 'NAME [key=value]...'.")
    parser.add_argument("--split", default="test", help="Split of the dataset.")
    parser.add_argument("--metrics", default="cider-d", help="Metrics, separated by commas.")
    parser.add_argument("--max-images", type=int, default=100, help="Maximum number of images.")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="Maximum tokens per caption.")
    parser.add_argument("--device", default="cpu", help="Device of the model.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    from sca_bench.worker import collect_environment

    try:
        with TemporaryDirectory() as folder:
            region_formats = measure_region_formats(
                ComponentSpec.parse(args.captioner, "a captioner", "captioners"),
                ComponentSpec.parse(args.dataset, "a dataset", "datasets"),
                args.split,
                args.metrics.split(","),
                args.max_images,
                {"max_new_tokens": args.max_new_tokens},
                args.device,
                Path(folder),
            )
    except (RegistryError, InputError) as error:
        raise SystemExit(f"error: {error}") from error
    results = {
        "captioner": args.captioner,
        "dataset": args.dataset,
        "split": args.split,
        "max_images": args.max_images,
        "max_new_tokens": args.max_new_tokens,
        "region_formats": region_formats,
        "environment": collect_environment(args.device),
    }
    print(render_results(results))
    write_results(results, args.out)


if __name__ == "__main__":
    main()
