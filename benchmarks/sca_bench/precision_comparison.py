"""Measure what a precision changes: masks, captions, scores and time per image: `sca bench precision MODEL DATASET`.

The regions of a dataset are predicted with the model in float32 and in each precision. The predictions are compared
region by region, and their scores with paired bootstrap intervals over images. The time is measured on images that both
models caption in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sca_registry
from pycocotools import mask as mask_api
from sca_registry.contracts import Prompt

import sca
from sca.evaluation.comparison import RunComparison, compare_runs
from sca.evaluation.records import Record
from sca.inference.engine import Engine
from sca.precision import MIN_INT8_WIDTH, set_precision

if TYPE_CHECKING:
    from sca_registry.spec import ComponentSpec

    from sca.io.terminal import Table

BASELINE = "float32"
MASK_PERCENTILE = 1  # of the mask IoUs, for the regions that change most
NUM_TIMED_IMAGES, NUM_TIMED_ROUNDS = 8, 3


@dataclass(frozen=True)
class PrecisionRow:
    """A precision next to float32.

    Attributes:
        precision: Name of the precision.
        applied: Precision of the layers, see `sca.precision.describe_precision`.
        num_predictions: Compared predictions: a caption or a class name of a region.
        mask_iou_mean: Mean IoU of the predicted masks with those of float32; None for a model without masks.
        mask_iou_percentile: Percentile `MASK_PERCENTILE` of these IoUs.
        share_equal_captions: Fraction of the predictions with the same text.
        seconds_per_image: CPU seconds per image of the precision, and of float32.
        score_differences: Scores of both with the interval of the difference, see `ScoreDifference`.
        scores_outside: Names of the scores outside the 95% confidence interval of the same score in float32.
    """

    precision: str
    applied: str
    num_predictions: int
    mask_iou_mean: float | None
    mask_iou_percentile: float | None
    share_equal_captions: float
    seconds_per_image: tuple[float, float]
    score_differences: tuple[Mapping[str, Any], ...]
    scores_outside: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Time per image of float32, divided by that of the precision."""
        seconds, baseline_seconds = self.seconds_per_image
        return baseline_seconds / seconds


def compare_precisions(
    model: str,
    dataset: ComponentSpec,
    split: str,
    precisions: Sequence[str],
    folder: Path,
    num_images: int | None = None,
    min_width: int = MIN_INT8_WIDTH,
    metrics: Sequence[str] | None = None,
) -> Iterator[PrecisionRow]:
    """Compare precisions with float32.

    Args:
        model: Model name, folder or Hub id.
        dataset: Dataset.
        split: Split of the dataset.
        precisions: Precisions.
        folder: Folder for the predictions.
        num_images: Maximum number of images.
        min_width: Minimum number of inputs and of outputs of an int8 layer.
        metrics: Metrics; None for all that the data supports.

    Yields:
        A row per precision.
    """
    baseline = Engine(sca.load(model, precision=BASELINE))
    samples = sca_registry.datasets.build(dataset.name, split, **dataset.options)

    def predict(engine: Engine, name: str) -> Path:
        sca.evaluate(engine, dataset, split, metrics=metrics, max_images=num_images, folder=folder / name)
        return folder / name

    baseline_folder = predict(baseline, BASELINE)
    for precision in precisions:
        converted = sca.load(model)
        set_precision(converted, precision, min_width)
        engine = Engine(converted)
        comparison = compare_runs(baseline_folder, predict(engine, precision), metrics)
        timed_samples = list(islice(map(samples.__getitem__, range(len(samples))), NUM_TIMED_IMAGES))
        seconds, baseline_seconds = time_alternately([engine, baseline], timed_samples)
        yield _make_row(precision, engine, comparison, (seconds, baseline_seconds))


def _make_row(
    precision: str, engine: Engine, comparison: RunComparison, seconds_per_image: tuple[float, float]
) -> PrecisionRow:
    pairs = list(zip(comparison.first.records, comparison.second.records, strict=True))
    ious = compute_mask_ious(pairs)
    assert engine.precision is not None  # of an engine with a model
    return PrecisionRow(
        precision=precision,
        applied=engine.precision,
        num_predictions=len(pairs),
        mask_iou_mean=float(ious.mean()) if len(ious) else None,
        mask_iou_percentile=float(np.percentile(ious, MASK_PERCENTILE)) if len(ious) else None,
        share_equal_captions=float(np.mean([first["caption"] == second["caption"] for first, second in pairs])),
        seconds_per_image=seconds_per_image,
        score_differences=tuple(
            {key: None if value != value else value for key, value in asdict(each).items()}
            for each in comparison.differences
        ),
        scores_outside=tuple(list_scores_outside(comparison)),
    )


def list_scores_outside(comparison: RunComparison) -> list[str]:
    """Return the names of the scores of the second run outside the 95% confidence interval of the first run's score."""
    intervals = {
        each.name: (each.ci_low, each.ci_high)
        for each in comparison.first.scoring.scores
        if each.control is None and each.ci_low is not None and each.ci_high is not None
    }
    return [
        each.name
        for each in comparison.differences
        if each.name in intervals and not intervals[each.name][0] <= each.second <= intervals[each.name][1]
    ]


def compute_mask_ious(pairs: Sequence[tuple[Record, Record]]) -> np.ndarray:
    """Compute the IoU of the predicted masks of each pair of records that have them: 1 for two empty masks."""
    ious = []
    for masks in ([first["mask"], second["mask"]] for first, second in pairs):
        if None not in masks:
            first, second = masks
            is_empty = not mask_api.area(masks).any()
            ious.append(1.0 if is_empty else float(mask_api.iou([first], [second], [0])[0, 0]))
    return np.array(ious)


def time_alternately(engines: Sequence[Engine], samples: Sequence[Any]) -> tuple[float, ...]:
    """Measure the CPU seconds per image of captioning boxes.

    Args:
        engines: Engines, which caption each image in turn.
        samples: Samples of a dataset.

    Returns:
        Mean over images of the minimum of `NUM_TIMED_ROUNDS` rounds, for each engine.
    """
    seconds = np.full((NUM_TIMED_ROUNDS, len(engines), len(samples)), np.inf)
    for round_seconds in seconds:
        for index, sample in enumerate(samples):
            prompts = [Prompt(box=region.box) for region in sample.regions]
            for engine_index, engine in enumerate(engines):
                start = time.process_time()
                engine.caption(sample.image, prompts)
                round_seconds[engine_index, index] = time.process_time() - start
    return tuple(seconds.min(axis=0).mean(axis=1).tolist())


def build_table(model: str, dataset: str, rows: Sequence[PrecisionRow]) -> Table:
    """Build a terminal table with a line per precision."""
    from sca.io.terminal import Table

    numeric_columns = ("mask IoU", "1st percentile", "equal captions", "ms per image", "speedup")
    notes = [
        "mask IoU, captions and CPU time are compared with float32",
        "scores outside: those outside the 95% confidence interval of the score in float32",
    ]
    table = Table(("precision", *numeric_columns, "scores outside"), f"{model} on {dataset}", numeric_columns, notes)
    for row in rows:
        ious = ["" if iou is None else f"{iou:.4f}" for iou in (row.mask_iou_mean, row.mask_iou_percentile)]
        time_cells = f"{1000 * row.seconds_per_image[0]:.1f}", f"{row.speedup:.2f}x"
        table.add_row(
            row.applied, *ious, f"{row.share_equal_captions:.1%}", *time_cells, ", ".join(row.scores_outside) or "none"
        )
    return table
