"""HTML reports of runs: scores with confidence intervals, histograms and example regions.

Each report is one self-contained file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sca_registry.contracts import MetricOutput

from sca.evaluation.comparison import (
    RegionChange,
    RunComparison,
    choose_score,
    collect_region_outputs,
    find_scored_records,
    get_region_scores,
    label_reports,
)
from sca.evaluation.evaluate import EvaluationReport
from sca.io import masks
from sca.io.score_format import PRINT_FACTOR, format_interval, format_score
from sca.output.contours import mask_to_svg_path
from sca.output.html_page import MAX_PIXELATED_SIDE, encode_data_uri, render_template

REGIONS_PER_GROUP = 8  # regions per group
FIGURE_COLUMNS = 6  # regions in the figure
HISTOGRAM_BINS = 20
CROP_MARGIN = 0.6  # context around a region, as a fraction of its longer side
MAX_CROP_SIDE = 320  # pixels


class RegionCrop(NamedTuple):
    """A region and its surroundings for the template macro `render_region`, in image pixels."""

    label: str
    image_uri: str  # data URI of the crop
    is_pixelated: bool  # whether the crop is displayed without smoothing
    view_box: tuple[int, int, int, int]  # left, top, width and height of the crop
    box: Sequence[float]  # x1, y1, x2, y2
    contours: list[tuple[str, str]]  # CSS class ("mask" or "ground-truth") and SVG path data


class RegionCard(NamedTuple):
    """A region with its captions and ground truth."""

    crop: RegionCrop | None
    captions: list[tuple[str, str]]  # label and caption
    ground_truth: str
    details: str


class ScoreHistogram(NamedTuple):
    """Histogram of region scores times 100; bar heights are relative to the tallest bar."""

    title: str
    heights: list[float]
    low: float
    high: float
    num_regions: int


def render_report(reports: Sequence[EvaluationReport], sort_by: str | None = None, seed: int = 0) -> str:
    """Render an HTML report of one run, or of several runs on the same regions side by side.

    Args:
        reports: One or more runs.
        sort_by: Score that ranks the regions. Defaults to the most informative one available.
        seed: Random seed for the sampled regions.

    Returns:
        The HTML page.

    Raises:
        ValueError: The score `sort_by` does not exist.
    """
    reports = label_reports(reports)
    region_outputs = [collect_region_outputs(report) for report in reports]
    sort_by = choose_score(
        sort_by, [name for name in region_outputs[0] if all(name in each for each in region_outputs)]
    )
    headings, rows = _build_score_table(reports)
    report_outputs = list(zip(reports, region_outputs, strict=True))
    return render_template(
        "report.html",
        "sca.evaluation",
        title=" and ".join(report.title for report in reports),
        headings=headings,
        rows=rows,
        remarks=_collect_remarks(reports),
        histograms=list(_iter_histograms(report_outputs)),
        figure=_build_figure(reports, sort_by, seed) if sort_by else None,
        rankings=[_build_ranking(*each, sort_by, seed) for each in report_outputs] if sort_by else [],
    )


def render_comparison(comparison: RunComparison) -> str:
    """Render an HTML page of the score differences of two runs and the regions whose captions changed most."""
    first, second = comparison.first, comparison.second
    rows = [
        [
            each.name,
            *map(format_score, (each.first, each.second)),
            format_score(each.difference, signed=True),
            format_interval(each.ci_low, each.ci_high, signed=True),
        ]
        for each in comparison.differences
    ]
    gains = [each for each in comparison.changes if each.change > 0][:REGIONS_PER_GROUP]
    losses = [each for each in reversed(comparison.changes) if each.change < 0][:REGIONS_PER_GROUP]
    cropper = _RegionCropper(first)
    return render_template(
        "comparison.html",
        "sca.evaluation",
        title=f"{first.title} → {second.title}",
        remarks=comparison.notes,
        headings=["score", first.name, second.name, "difference", "95% CI"],
        rows=rows,
        score_name=comparison.sorted_by,
        groups=[
            (heading, [_make_change_card(cropper, comparison, each) for each in region_changes])
            for heading, region_changes in (("Gained most", gains), ("Lost most", losses))
            if region_changes
        ],
        problem=cropper.problem,
    )


def _build_score_table(reports: Sequence[EvaluationReport]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the score table."""
    score_names = dict.fromkeys(
        each.name for report in reports for each in report.scoring.scores if each.control is None
    )
    columns: list[tuple[EvaluationReport, str | None]] = [(report, None) for report in reports]
    columns += [(r, c) for r in reports for c in dict.fromkeys(s.control for s in r.scoring.scores if s.control)]
    scores_by_column = [{each.name: each for each in r.scoring.scores if each.control == c} for r, c in columns]
    rows = []
    for name in score_names:
        cells = [name]
        for scores in scores_by_column:
            each = scores.get(name)
            cells.append(
                ""
                if each is None
                else f"{format_score(each.value)}{_format_bracketed_interval(each.ci_low, each.ci_high)}"
            )
        rows.append(cells)
    return ["score", *(f"{report.name}{f', {control}' if control else ''}" for report, control in columns)], rows


def _collect_remarks(reports: Sequence[EvaluationReport]) -> list[str]:
    lines = [f"{remark}" for report in reports for remark in (*report.warnings, *report.notes)]
    return list(dict.fromkeys([*lines, *reports[0].scoring.summarize_skipped_metrics()]))


def _iter_histograms(
    report_outputs: Sequence[tuple[EvaluationReport, Mapping[str, MetricOutput]]],
) -> Iterable[ScoreHistogram]:
    for name in report_outputs[0][1]:
        for report, outputs in report_outputs:
            values = np.array(list(get_region_scores(outputs[name], name).values())) if name in outputs else np.empty(0)
            if len(np.unique(values)) > 2:  # the mean fully describes a binary score
                counts, edges = np.histogram(values, HISTOGRAM_BINS)
                heights = (counts / counts.max()).tolist()
                low, high = PRINT_FACTOR * edges[0], PRINT_FACTOR * edges[-1]
                yield ScoreHistogram(f"{name}, {report.name}", heights, low, high, len(values))


def _build_figure(reports: Sequence[EvaluationReport], score_name: str, seed: int) -> dict[str, Any]:
    """Build a grid with one column per region, one row per model, and the ground truth in the last row."""
    records_by_report = [find_scored_records(report, score_name) for report in reports]
    common_keys = [key for key in records_by_report[0] if all(key in each for each in records_by_report)]
    sampled_keys = random.Random(seed).sample(common_keys, min(FIGURE_COLUMNS, len(common_keys)))
    cropper = _RegionCropper(reports[0])
    rows = [
        (report.name, [(cropper.make_crop(records[key], ("mask",)), records[key]["caption"]) for key in sampled_keys])
        for report, records in zip(reports, records_by_report, strict=True)
    ]
    rows.append(
        (
            "ground truth",
            [
                (
                    cropper.make_crop(records_by_report[0][key], ("ground-truth",)),
                    _format_ground_truth(records_by_report[0][key]),
                )
                for key in sampled_keys
            ],
        )
    )
    return {"rows": rows, "problem": cropper.problem}


def _build_ranking(
    report: EvaluationReport, outputs: Mapping[str, MetricOutput], score_name: str, seed: int
) -> dict[str, Any]:
    """Collect the best, the worst and random regions of a run."""
    region_scores, records = get_region_scores(outputs[score_name], score_name), find_scored_records(report, score_name)
    ranked_keys = sorted(region_scores, key=lambda key: region_scores[key])
    sampled_keys = random.Random(seed).sample(ranked_keys, min(REGIONS_PER_GROUP, len(ranked_keys)))
    cropper = _RegionCropper(report)
    groups = []
    for heading, keys in (
        ("Best", ranked_keys[::-1][:REGIONS_PER_GROUP]),
        ("Worst", ranked_keys[:REGIONS_PER_GROUP]),
        ("Random", sampled_keys),
    ):
        groups.append(
            (
                heading,
                [_make_card(cropper, records[key], f"{score_name} {format_score(region_scores[key])}") for key in keys],
            )
        )
    return {"title": f"{report.title}, by {score_name}", "groups": groups, "problem": cropper.problem}


def _make_card(cropper: _RegionCropper, record: Mapping[str, Any], score_text: str) -> RegionCard:
    return RegionCard(
        cropper.make_crop(record),
        [("", record["caption"])],
        _format_ground_truth(record),
        f"{score_text}, {_format_region_id(record)}",
    )


def _make_change_card(cropper: _RegionCropper, comparison: RunComparison, change: RegionChange) -> RegionCard:
    reports, records = (comparison.first, comparison.second), (change.first, change.second)
    captions = [
        (f"{report.name}, {format_score(value)}", record["caption"])
        for report, record, value in zip(reports, records, change.values, strict=True)
    ]
    return RegionCard(
        cropper.make_crop(change.first), captions, _format_ground_truth(change.first), _format_region_id(change.first)
    )


class _RegionCropper:
    """Crops regions from their images; `problem` is the first reason why an image is missing."""

    def __init__(self, report: EvaluationReport):
        self.load_image: Callable[[Any], Image.Image] | None = report.load_image
        self.problem = "" if report.load_image else "the predictions do not contain the location of the images"

    def make_crop(
        self, record: Mapping[str, Any], contour_classes: Sequence[str] = ("mask", "ground-truth")
    ) -> RegionCrop | None:
        """Crop a region with its ground-truth box and the contours of its predicted and ground-truth masks.

        Args:
            record: Prediction record.
            contour_classes: Contours to draw: "mask" for the predicted mask, "ground-truth".

        Returns:
            The crop; None without an image or a ground-truth box.
        """
        image, box = self._open_image(record), record["truth"]["box"]
        if image is None or box is None:
            return None
        x1, y1, x2, y2 = box
        margin = CROP_MARGIN * max(x2 - x1, y2 - y1)
        left, top = max(0, int(x1 - margin)), max(0, int(y1 - margin))
        right, bottom = min(image.width, round(x2 + margin) + 1), min(image.height, round(y2 + margin) + 1)
        view_box = left, top, right - left, bottom - top
        rles = {"mask": record["mask"], "ground-truth": record["truth"]["mask"]}
        contour_paths = [
            (contour_class, path)
            for contour_class, rle in rles.items()
            if contour_class in contour_classes and rle and (path := mask_to_svg_path(masks.decode_rle(rle)))
        ]
        image_uri = encode_data_uri(image.crop((left, top, right, bottom)), MAX_CROP_SIDE)
        return RegionCrop(
            _format_region_id(record), image_uri, max(view_box[2:]) <= MAX_PIXELATED_SIDE, view_box, box, contour_paths
        )

    def _open_image(self, record: Mapping[str, Any]) -> Image.Image | None:
        if self.load_image is None:
            return None
        try:
            return self.load_image(record)
        except (ValueError, OSError, KeyError) as error:
            self.problem = self.problem or str(error)
            return None


def _format_ground_truth(record: Mapping[str, Any]) -> str:
    truth = record["truth"]
    return " / ".join(truth["phrases"]) if record["task"] == "caption" else truth["name"] or ""


def _format_region_id(record: Mapping[str, Any]) -> str:
    return f"region {record['region_id']} of image {record['image_id']}"


def _format_bracketed_interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({format_interval(low, high)})"
