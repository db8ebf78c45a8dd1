"""Pages about runs: scores with their intervals, how they are spread, and the regions behind them; one file each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sca_registry.contracts import MetricOutput

from sca.evaluation.comparison import RunComparison, RegionChange, find_scored_records, choose_score, collect_region_outputs, label_reports, get_region_scores
from sca.evaluation.evaluate import EvaluationReport
from sca.io import masks
from sca.output.outline import outline
from sca.output.page import SHARP, data_uri, render

SHOWN = 8  # regions of each kind
COLUMNS = 6  # regions of the figure
BINS = 20
AROUND = 0.6  # of a region's longer side is shown around it
SIDE = 320  # of a region's picture, in pixels


class RegionView(NamedTuple):
    """A region with its surroundings, as the macro `region` draws it; coordinates in pixels of the image."""

    label: str
    picture: str  # data URI of the surroundings
    is_sharp: bool  # whether the picture is shown without smoothing
    frame: tuple[int, int, int, int]  # left, top, width and height of the surroundings
    box: Sequence[float]  # x1, y1, x2, y2
    contours: list[tuple[str, str]]  # "mask" or "true", and path data


class Card(NamedTuple):
    """A region with what was said of it."""

    view: RegionView | None
    answers: list[tuple[str, str]]  # label and caption
    true: str
    facts: str


class Histogram(NamedTuple):
    """Scores of regions; the heights of the bars are shares of the tallest."""

    title: str
    heights: list[float]
    low: float
    high: float
    regions: int


def report_page(reports: Sequence[EvaluationReport], by: str | None = None, seed: int = 0) -> str:
    """A page about one run, or several on the same regions side by side.

    by: the score that tells best from worst (default: the most telling that there is). seed: of regions at random.

    ValueError if there is no score `by`.
    """
    reports = label_reports(reports)
    single = [collect_region_outputs(report) for report in reports]
    by = choose_score(by, [name for name in single[0] if all(name in each for each in single)])
    headings, rows = _scores(reports)
    pairs = list(zip(reports, single, strict=True))
    return render(
        "report.html",
        "sca.evaluation",
        title=" and ".join(report.title for report in reports),
        headings=headings,
        rows=rows,
        remarks=_remarks(reports),
        histograms=list(_histograms(pairs)),
        figure=_figure(reports, by, seed) if by else None,
        rankings=[_ranking(*each, by, seed) for each in pairs] if by else [],
    )


def comparison_page(comparison: RunComparison) -> str:
    """A page about two runs: the differences, and the regions whose answers changed most."""
    first, second = comparison.first, comparison.second
    rows = [
        [
            each.name,
            *map(_number, (each.first, each.second)),
            f"{each.difference:+.3f}",
            _between(each.low, each.high, "+.3f"),
        ]
        for each in comparison.differences
    ]
    gains = [each for each in comparison.changes if each.change > 0][:SHOWN]
    losses = [each for each in reversed(comparison.changes) if each.change < 0][:SHOWN]
    pictures = _Pictures(first)
    return render(
        "comparison.html",
        "sca.evaluation",
        title=f"{first.title} → {second.title}",
        remarks=comparison.remarks,
        headings=["score", first.name, second.name, "difference", "95 % interval"],
        rows=rows,
        by=comparison.sorted_by,
        groups=[
            (heading, [_changed_card(pictures, comparison, each) for each in judged])
            for heading, judged in (("Gained most", gains), ("Lost most", losses))
            if judged
        ],
    )


def _scores(reports: Sequence[EvaluationReport]) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of the table of scores."""
    names = dict.fromkeys(each.name for report in reports for each in report.scoring.scores if each.control is None)
    columns = [(report, None) for report in reports]
    columns += [(r, c) for r in reports for c in dict.fromkeys(s.control for s in r.scoring.scores if s.control)]
    found = [{each.name: each for each in r.scoring.scores if each.control == c} for r, c in columns]
    rows = []
    for name in names:
        cells = [name]
        for scores in found:
            each = scores.get(name)
            cells.append("" if each is None else f"{_number(each.value)} {_between(each.low, each.high)}".rstrip())
        rows.append(cells)
    return ["score", *(f"{report.name}{f', {control}' if control else ''}" for report, control in columns)], rows


def _remarks(reports: Sequence[EvaluationReport]) -> list[str]:
    lines = [f"{remark}" for report in reports for remark in (*report.remarks, *report.notes)]
    return list(dict.fromkeys([*lines, *reports[0].scoring.summarize_skipped_metrics()]))


def _histograms(pairs: Sequence[tuple[EvaluationReport, Mapping[str, MetricOutput]]]) -> Iterable[Histogram]:
    for name in pairs[0][1]:
        for report, known in pairs:
            values = np.array(list(get_region_scores(known[name], name).values())) if name in known else np.empty(0)
            if len(np.unique(values)) > 2:  # a share of rights and wrongs has no more to show than its mean
                counts, edges = np.histogram(values, BINS)
                heights = (counts / counts.max()).tolist()
                yield Histogram(f"{name}, {report.name}", heights, edges[0], edges[-1], len(values))


def _figure(reports: Sequence[EvaluationReport], by: str, seed: int) -> dict[str, Any]:
    """One region a column, one model a row, what is true last."""
    told = [find_scored_records(report, by) for report in reports]
    common = [key for key in told[0] if all(key in each for each in told)]
    chosen = random.Random(seed).sample(common, min(COLUMNS, len(common)))
    pictures = _Pictures(reports[0])
    rows = [
        (report.name, [(pictures.view(mine[key], ("mask",)), mine[key]["caption"]) for key in chosen])
        for report, mine in zip(reports, told, strict=True)
    ]
    rows.append(("true", [(pictures.view(told[0][key], ("true",)), _true(told[0][key])) for key in chosen]))
    return {"rows": rows, "problem": pictures.problem}


def _ranking(report: EvaluationReport, known: Mapping[str, MetricOutput], by: str, seed: int) -> dict[str, Any]:
    """The best, the worst and some other regions of a run."""
    values, told = get_region_scores(known[by], by), find_scored_records(report, by)
    ranked = sorted(values, key=lambda key: values[key])
    drawn = random.Random(seed).sample(ranked, min(SHOWN, len(ranked)))
    pictures = _Pictures(report)
    groups = []
    for heading, keys in (("best", ranked[::-1][:SHOWN]), ("worst", ranked[:SHOWN]), ("at random", drawn)):
        groups.append((heading, [_card(pictures, told[key], f"{by} {values[key]:.3f}") for key in keys]))
    return {"title": f"{report.title}, by {by}", "groups": groups, "problem": pictures.problem}


def _card(pictures: _Pictures, record: Mapping[str, Any], value: str) -> Card:
    return Card(pictures.view(record), [("", record["caption"])], _true(record), f"{value}, {_place(record)}")


def _changed_card(pictures: _Pictures, comparison: RunComparison, judged: RegionChange) -> Card:
    reports, records = (comparison.first, comparison.second), (judged.first, judged.second)
    said = [
        (f"{report.name}, {value:.3f}", record["caption"])
        for report, record, value in zip(reports, records, judged.values, strict=True)
    ]
    return Card(pictures.view(judged.first), said, _true(judged.first), _place(judged.first))


class _Pictures:
    """What is seen of regions; where a picture cannot be had, words alone."""

    def __init__(self, report: EvaluationReport):
        self.images: Callable[[Any], Image.Image] | None = report.load_image
        self.problem = "" if report.load_image else "the predictions do not say where the pictures are"

    def view(self, record: Mapping[str, Any], contours: Sequence[str] = ("mask", "true")) -> RegionView | None:
        """The surroundings of a region: its true box, and contours: of the predicted "mask", of the "true" one."""
        image, box = self._open(record), record["truth"]["box"]
        if image is None or box is None:
            return None
        x1, y1, x2, y2 = box
        reach = AROUND * max(x2 - x1, y2 - y1)
        left, top = max(0, int(x1 - reach)), max(0, int(y1 - reach))
        right, bottom = min(image.width, round(x2 + reach) + 1), min(image.height, round(y2 + reach) + 1)
        frame = left, top, right - left, bottom - top
        codes = {"mask": record["mask"], "true": record["truth"]["mask"]}
        drawn = [
            (kind, path)
            for kind, code in codes.items()
            if kind in contours and code and (path := outline(masks.decode(code)))
        ]
        picture = data_uri(image.crop((left, top, right, bottom)), SIDE)
        return RegionView(_place(record), picture, max(frame[2:]) <= SHARP, frame, box, drawn)

    def _open(self, record: Mapping[str, Any]) -> Image.Image | None:
        if self.images is None or self.problem:
            return None
        try:
            return self.images(record)
        except (ValueError, OSError, KeyError) as error:
            self.problem = str(error)
            return None


def _true(record: Mapping[str, Any]) -> str:
    truth = record["truth"]
    return " / ".join(truth["phrases"]) if record["task"] == "caption" else truth["name"] or ""


def _place(record: Mapping[str, Any]) -> str:
    return f"region {record['region_id']} of image {record['image_id']}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else "–" if value != value else f"{value:.3f}"


def _between(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"
