"""Pages about runs: scores with their intervals, how they are spread, and the regions behind them; one file each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Scores

from sca.evaluation.comparison import Comparison, Judged, answers, chosen, judgements, label_reports, single_scores
from sca.evaluation.evaluate import Report
from sca.io import masks
from sca.output.outline import outline
from sca.output.page import FOOT, SHARP, data_uri, head, text

SHOWN = 8  # regions of each kind
COLUMNS = 6  # regions of the figure
BINS = 20
AROUND = 0.6  # of a region's longer side is shown around it
SIDE = 320  # of a region's picture, in pixels

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; background: Canvas; color: CanvasText }
body { max-width: 90rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem }
table { border-collapse: collapse }
th, td { padding: .2rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, Canvas) }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem }
.card { margin: 0; overflow-wrap: anywhere } .card p { margin: .25rem 0 }
.figure td { width: 12rem; overflow-wrap: anywhere }
svg.region { display: block; width: 100%; max-height: 16rem; border-radius: 6px }
svg.sharp image { image-rendering: pixelated }
.mask, .true, .box { stroke-width: 2; vector-effect: non-scaling-stroke }
.mask { fill: rgb(29, 120, 216); fill-opacity: .18; fill-rule: evenodd; stroke: rgb(29, 120, 216) }
.true { fill: none; stroke: rgb(46, 160, 67) }
.box { fill: none; stroke: rgb(230, 57, 70) }
.bar { fill: rgb(29, 120, 216) } .axis { stroke: currentColor } svg text { fill: currentColor; font-size: 11px }
.histograms { display: flex; flex-wrap: wrap; gap: 1.5rem } .histograms figure { margin: 0 }
small { opacity: .75 }
"""


def report_page(reports: Sequence[Report], by: str | None = None, seed: int = 0) -> str:
    """A page about one run, or several on the same regions side by side.

    by: the score that tells best from worst (default: the most telling that there is). seed: of regions at random.

    ValueError if there is no score `by`.
    """
    reports = label_reports(reports)
    single = [judgements(report) for report in reports]
    by = chosen(by, [name for name in single[0] if all(name in each for each in single)])
    title = " and ".join(report.title for report in reports)
    parts = [
        head(title, _STYLE),
        f"<h1>{text(title)}</h1>\n",
        _scores(reports),
        _remarks(reports),
        _spread(reports, single),
    ]
    if by:
        parts += [
            _figure(reports, by, seed),
            *(_regions(*each, by, seed) for each in zip(reports, single, strict=True)),
        ]
    return "".join([*parts, FOOT])


def comparison_page(comparison: Comparison) -> str:
    """A page about two runs: the differences, and the regions whose answers changed most."""
    title = f"{comparison.first.title} → {comparison.second.title}"
    rows = [
        [
            each.name,
            *map(_number, (each.first, each.second)),
            f"{each.difference:+.3f}",
            _between(each.low, each.high, "+.3f"),
        ]
        for each in comparison.differences
    ]
    said = "".join(f"<p>{text(remark)}</p>\n" for remark in comparison.remarks)
    table = _table(["score", comparison.first.name, comparison.second.name, "difference", "95 % interval"], rows)
    parts = [head(title, _STYLE), f"<h1>{text(title)}</h1>\n", said, table]
    gains = [each for each in comparison.judged if each.change > 0][:SHOWN]
    losses = [each for each in reversed(comparison.judged) if each.change < 0][:SHOWN]
    for heading, judged in (("Gained most", gains), ("Lost most", losses)):
        cards = "".join(_changed(comparison, each) for each in judged)
        if cards:
            parts.append(f'<h2>{heading} in {text(str(comparison.by))}</h2>\n<div class="cards">{cards}</div>\n')
    return "".join([*parts, FOOT])


def _scores(reports: Sequence[Report]) -> str:
    names = dict.fromkeys(each.name for report in reports for each in report.scored.scores if each.control is None)
    columns = [(report, None) for report in reports]
    columns += [(r, c) for r in reports for c in dict.fromkeys(s.control for s in r.scored.scores if s.control)]
    found = [{each.name: each for each in r.scored.scores if each.control == c} for r, c in columns]
    rows = []
    for name in names:
        cells = [name]
        for scores in found:
            each = scores.get(name)
            cells.append("" if each is None else f"{_number(each.value)} {_between(each.low, each.high)}".rstrip())
        rows.append(cells)
    headings = [f"{report.name}{f', {control}' if control else ''}" for report, control in columns]
    said = "<h2>Scores</h2>\n<p><small>in brackets: the 95 % interval over the choice of images</small></p>\n"
    return said + _table(["score", *headings], rows)


def _remarks(reports: Sequence[Report]) -> str:
    lines = [f"{remark}" for report in reports for remark in (*report.remarks, *report.notes)]
    lines += reports[0].scored.summarize_left_out()
    return "".join(f"<p><small>{text(line)}</small></p>\n" for line in dict.fromkeys(lines))


def _spread(reports: Sequence[Report], single: Sequence[Mapping[str, Scores]]) -> str:
    figures = []
    for name in single[0]:
        for report, known in zip(reports, single, strict=True):
            values = np.array(list(single_scores(known[name], name).values())) if name in known else np.empty(0)
            if len(np.unique(values)) > 2:  # a share of rights and wrongs has no more to show than its mean
                figures.append(_histogram(f"{name}, {report.name}", values))
    shown = f'<div class="histograms">{"".join(figures)}</div>\n'
    return f"<h2>How scores are spread over regions</h2>\n{shown}" if figures else ""


def _histogram(title: str, values: np.ndarray) -> str:
    counts, edges = np.histogram(values, BINS)
    width, height, foot = 240, 100, 16
    step = width / BINS
    bars = "".join(
        f'<rect class="bar" x="{place * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"/>'
        for place, tall in enumerate(counts / counts.max() * height)
    )
    ends = f'<text x="0" y="{height + foot - 3}">{edges[0]:.2g}</text>'
    ends += f'<text x="{width}" y="{height + foot - 3}" text-anchor="end">{edges[-1]:.2g}</text>'
    axis = f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
    svg = (
        f'<svg width="{width}" height="{height + foot}" role="img" aria-label="{text(title)}">{bars}{axis}{ends}</svg>'
    )
    return f"<figure>{svg}<figcaption><small>{text(title)}, {len(values)} regions</small></figcaption></figure>\n"


def _figure(reports: Sequence[Report], by: str, seed: int) -> str:
    """One region a column, one model a row, what is true last."""
    told = [answers(report, by) for report in reports]
    common = [key for key in told[0] if all(key in each for each in told)]
    chosen = random.Random(seed).sample(common, min(COLUMNS, len(common)))
    picture = _Pictures(reports[0])
    rows = []
    for report, mine in zip(reports, told, strict=True):
        cells = "".join(
            f"<td>{picture.shown(mine[key], ('mask',))}<p>{text(mine[key]['caption'])}</p></td>" for key in chosen
        )
        rows.append(f"<tr><th>{text(report.name)}</th>{cells}</tr>\n")
    cells = "".join(
        f"<td>{picture.shown(told[0][key], ('true',))}<p>{text(' / '.join(_true(told[0][key])))}</p></td>"
        for key in chosen
    )
    rows.append(f"<tr><th>true</th>{cells}</tr>\n")
    table = f'<div class="wide"><table class="figure">{"".join(rows)}</table></div>\n'
    return f"<h2>Regions side by side</h2>\n{picture.apology()}{table}"


def _regions(report: Report, known: Mapping[str, Scores], by: str, seed: int) -> str:
    values, told = single_scores(known[by], by), answers(report, by)
    ranked = sorted(values, key=lambda key: values[key])
    drawn = random.Random(seed).sample(ranked, min(SHOWN, len(ranked)))
    picture = _Pictures(report)
    parts = [f"<h2>{text(report.title)}, by {text(by)}</h2>\n{picture.apology()}"]
    for heading, keys in (("best", ranked[::-1][:SHOWN]), ("worst", ranked[:SHOWN]), ("at random", drawn)):
        cards = "".join(_card(picture, told[key], f"{by} {values[key]:.3f}") for key in keys)
        parts.append(f'<h3>{heading}</h3>\n<div class="cards">{cards}</div>\n')
    return "".join(parts)


def _card(picture: _Pictures, record: Mapping[str, Any], value: str) -> str:
    return (
        f'<figure class="card">{picture.shown(record)}<p>{text(record["caption"])}</p>'
        f"<p><small>true: {text(' / '.join(_true(record)))}<br>{text(value)}, {_place(record)}</small></p></figure>\n"
    )


def _changed(comparison: Comparison, judged: Judged) -> str:
    record = judged.first
    before, after = judged.values
    shown = _Pictures(comparison.first).shown(record)
    names = [text(report.name) for report in (comparison.first, comparison.second)]
    return (
        f'<figure class="card">{shown}<p><small>{names[0]}, {before:.3f}:</small> {text(record["caption"])}</p>'
        f"<p><small>{names[1]}, {after:.3f}:</small> {text(judged.second['caption'])}</p>"
        f"<p><small>true: {text(' / '.join(_true(record)))}<br>{_place(record)}</small></p></figure>\n"
    )


class _Pictures:
    """What is seen of regions; where a picture cannot be had, words alone."""

    def __init__(self, report: Report):
        self.images: Callable[[Any], Image.Image] | None = report.images
        self.problem = "" if report.images else "the predictions do not say where the pictures are"
        if self.images and report.records:
            self._try(report.records[0])

    def apology(self) -> str:
        return f"<p><small>without pictures: {text(self.problem)}</small></p>\n" if self.problem else ""

    def shown(self, record: Mapping[str, Any], contours: Sequence[str] = ("mask", "true")) -> str:
        """The surroundings of a region: its true box, and contours: of the predicted "mask", of the "true" one."""
        image, box = self._try(record), record["truth"]["box"]
        if image is None or box is None:
            return ""
        x1, y1, x2, y2 = box
        reach = AROUND * max(x2 - x1, y2 - y1)
        left, top = max(0, int(x1 - reach)), max(0, int(y1 - reach))
        right, bottom = min(image.width, round(x2 + reach) + 1), min(image.height, round(y2 + reach) + 1)
        width, height = right - left, bottom - top
        parts = [
            f'<image x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none" '
            f'href="{data_uri(image.crop((left, top, right, bottom)), SIDE)}"/>'
        ]
        for kind, code in (("mask", record["mask"]), ("true", record["truth"]["mask"])):
            if kind in contours and code and (path := outline(masks.decode(code))):
                parts.append(f'<path class="{kind}" d="{path}"/>')
        parts.append(f'<rect class="box" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>')
        sharp = " sharp" if max(width, height) <= SHARP else ""
        label = text(f"region {record['region_id']} of image {record['image_id']}")
        frame = f'viewBox="{left} {top} {width} {height}" role="img" aria-label="{label}"'
        return f'<svg class="region{sharp}" {frame}>{"".join(parts)}</svg>'

    def _try(self, record: Mapping[str, Any]) -> Image.Image | None:
        if self.images is None or self.problem:
            return None
        try:
            return self.images(record)
        except (ValueError, OSError, KeyError) as error:
            self.problem = str(error)
            return None


def _true(record: Mapping[str, Any]) -> list[str]:
    truth = record["truth"]
    return truth["phrases"] if record["task"] == "caption" else [truth["name"] or ""]


def _place(record: Mapping[str, Any]) -> str:
    return text(f"region {record['region_id']} of image {record['image_id']}")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th{' class=number' if place else ''}>{text(each)}</th>" for place, each in enumerate(headings))
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if place else ''}>{text(c)}</td>" for place, c in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>\n'


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else "–" if value != value else f"{value:.3f}"


def _between(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"
