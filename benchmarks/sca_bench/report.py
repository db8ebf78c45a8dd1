"""The report of a sweep: one page, offline; Markdown; CSV. The same rows give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sca.io.text import escape_markdown, format_csv
from sca.output.colours import COLOURS
from sca.output.page import FOOT, head, text
from sca_bench.states import STATES
from sca_bench.summary import Line, find_axes, find_shared_parts, front, lines, telling
from sca_bench.timing import STAGES

WIDTH, HEIGHT, MARGIN = 560, 320, 48  # of a picture, pixels
FIGURES = (
    *(
        "seeds",
        "parameters, M",
        "trained, M",
        "GFLOP encode",
        "GFLOP the rest",
        "score",
        "95 % interval",
    ),
    *("over seeds", "first caption, ms", "regions/s", "step, ms", "memory, GiB"),
)

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; background: Canvas; color: CanvasText }
body { max-width: 100rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse }
th, td { padding: .2rem .6rem; text-align: right; font-variant-numeric: tabular-nums; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, Canvas) }
th { cursor: pointer } th.words, td.words { text-align: left; overflow-wrap: anywhere; min-width: 8rem }
.wide { overflow-x: auto } .below { opacity: .6 }
.pictures { display: flex; flex-wrap: wrap; gap: 2rem } figure { margin: 0 }
svg text { fill: currentColor; font-size: 11px } .axis, .grid { stroke: currentColor } .grid { opacity: .15 }
.front { fill: none; stroke: currentColor; stroke-dasharray: 4 3 } .curve { fill: none; stroke-width: 1.5 }
code { overflow-wrap: anywhere; font-size: .8rem } details { margin: .2rem 0 }
""" + "\n".join(
    f".c{n} {{ fill: rgb{c}; }} .curve.c{n} {{ fill: none; stroke: rgb{c} }}" for n, c in enumerate(COLOURS)
)
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const place = event.target.cellIndex;
    if (place === undefined) return;
    const sign = table.dataset.by === String(place) ? -1 : 1;
    table.dataset.by = sign === 1 ? place : "";
    const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
    const order = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(String(b)) : b - a);
    body.append(...[...body.rows].sort((a, b) => sign * order(value(a), value(b))));
  });
}
"""


def page(rows: Sequence[Mapping[str, Any]], title: str, score: str | None = None) -> str:
    """One HTML file. score: what counts as quality (default: the most telling that there is)."""
    score = score or telling(rows)
    found = lines(rows, score)
    said = f"quality: {score}" if score else "without scores"
    parts = [head(title, _STYLE, _SCRIPT), f"<h1>{text(title)}</h1>\n<p>{text(_where(rows))}; {text(said)}</p>\n"]
    parts += [_table(found, score), '<div class="pictures">']
    parts += [_pareto(found, score), _memory(found, score), _curves(found), _bars(found), "</div>\n", _others(rows)]
    parts += [_commands(found), f"<script>{_SCRIPT}</script>\n", FOOT]
    return "".join(parts)


def markdown(rows: Sequence[Mapping[str, Any]], score: str | None = None) -> str:
    """A table, and below it what was not made."""
    score = score or telling(rows)
    words, figures = _columns(lines(rows, score), score)
    told = [_row([*words, *figures]), f"|{' --- |' * len(words)}{' ---: |' * len(figures)}"]
    told += [_row(cells) for cells in zip(*words.values(), *figures.values(), strict=True)]
    others = [
        f"- {escape_markdown(row['label'])}: {escape_markdown(row['state'])}. {escape_markdown(row['reason'])}"
        for row in _ended(rows)
    ]
    said = f"Score: {escape_markdown(score)}; " if score else ""
    told += [*_speeds(lines(rows, score)), "", f"{said}{escape_markdown(_where(rows))}."]
    return "\n".join([*told, *([""] if others else []), *others]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def _columns(found: Sequence[Line], score: str | None) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the columns of text and of figures of a table, by their headings.

    Text is what combinations differ in, figures are `FIGURES` and every score but the one that counts as quality.
    """
    words = find_axes([line.config for line in found]) or {"combination": [line.label for line in found]}
    figures = dict(zip(FIGURES, map(list, zip(*map(_cells, found), strict=True)), strict=True)) if found else {}
    names = dict.fromkeys(name for line in found for name in line.scores if name != score)
    figures |= {name: [_score(line.scores.get(name)) for line in found] for name in names}
    return words, figures or {name: [] for name in FIGURES}


def _score(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _speeds(found: Sequence[Line]) -> list[str]:
    """The regions a second of each combination by how many there are, and what its stages take at the most."""
    timed = [line for line in found if line.curve]
    if not timed:
        return []
    counts = sorted({regions for line in timed for regions in line.curve})
    heads = [*(f"at {regions}" for regions in counts), *(f"{stage}, ms" for stage in STAGES)]
    told = ["", "Regions a second by regions an image, and the stages at the most of them:", ""]
    axes = find_axes([line.config for line in timed]) or {"combination": [line.label for line in timed]}
    told += [_row([*axes, *heads]), f"|{' --- |' * len(axes)}{' ---: |' * len(heads)}"]
    for line, words in zip(timed, zip(*axes.values(), strict=True), strict=True):
        speeds = [_scaled(line.curve.get(regions), 1) for regions in counts]
        stages = [_scaled(line.stages[stage], 1e-3) for stage in STAGES]
        told.append(_row([*words, *speeds, *stages]))
    return told


def table(rows: Sequence[Mapping[str, Any]], score: str | None = None) -> str:
    """CSV: a line a row, with every score and every timing."""
    score = score or telling(rows)
    names = sorted({each["name"] for row in rows for each in row.get("scores") or () if each["control"] is None})
    ordered = sorted(rows, key=lambda row: (row["label"], row["key"]))
    axes = find_axes([row["config"] for row in ordered])
    columns = ["key", "label", *axes, "state", "reason", "seed", "parameters", "trainable", "memory", *names]
    columns += ["regions", *STAGES, "first_caption", "regions_per_second", "training_step"]
    written: list[list[Any]] = [columns]
    for row, *settings in zip(ordered, *axes.values(), strict=True):
        scores = {each["name"]: each["value"] for each in row.get("scores") or () if each["control"] is None}
        parameters, memory = row.get("parameters") or {}, row.get("memory") or {}
        common = [row["key"], row["label"], *settings, row["state"], row["reason"], row["config"]["seed"]]
        common += [parameters.get("whole"), parameters.get("trainable"), memory.get("planned")]
        common += [scores.get(name) for name in names]
        for point in row.get("curve") or [None]:
            step = (row.get("training_step") or {}).get("median")
            timings = [None] * (3 + len(STAGES))
            if point:
                timings = [point["regions"], *(point["stages"][stage]["median"] for stage in STAGES)]
                timings += [point["first_caption"]["median"], point["regions_per_second"]]
            written.append([*common, *timings, step])
    return format_csv(written)


def _cells(line: Line) -> list[str]:
    flops = {key: value for key, value in (line.flops or {}).items() if key not in ("images", "regions", "words")}
    rest = sum(flops.values()) - flops.get("encode", 0)
    return [
        str(len(line.rows)),
        _scaled(line.parameters, 1e6),
        _scaled(line.trainable, 1e6),
        _scaled(flops.get("encode"), 1e9),
        _scaled(rest if flops else None, 1e9),
        "" if line.quality is None else f"{line.quality:.3f}",
        "" if line.low is None or line.high is None else f"{line.low:.3f} to {line.high:.3f}",
        f"{min(line.seeds):.3f} to {max(line.seeds):.3f}" if len(line.seeds) > 1 else "",
        _scaled(line.first_caption, 1e-3),
        _scaled(line.fastest, 1),
        _scaled(line.training_step, 1e-3),
        _scaled(line.memory, 2**30),
    ]


def _table(found: Sequence[Line], score: str | None) -> str:
    """Sorted by a click; what is clearly below the best, by intervals that do not meet, is pale."""
    words, figures = _columns(found, score)
    top = "".join(f'<th class="words">{text(each)}</th>' for each in words)
    top += "".join(f"<th>{text(each)}</th>" for each in figures)
    best = next((line for line in found if line.low is not None), None)
    body = []
    for line, *row in zip(found, *words.values(), *figures.values(), strict=True):
        below = best is not None and best.low is not None and line.high is not None and line.high < best.low
        cells = "".join(f'<td class="words">{text(cell)}</td>' for cell in row[: len(words)])
        cells += "".join(
            f'<td data-value="{text(cell.partition(" to ")[0]) or -1}">{text(cell)}</td>' for cell in row[len(words) :]
        )
        body.append(f'<tr class="below">{cells}</tr>\n' if below else f"<tr>{cells}</tr>\n")
    note = "<p><small>pale: its interval lies below that of the best. A click on a heading sorts.</small></p>\n"
    rows = f"<thead><tr>{top}</tr></thead>\n<tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table class="sortable">{rows}</table></div>\n{note}'


def _pareto(found: Sequence[Line], score: str | None) -> str:
    points = [(place, line.fastest, line.quality) for place, line in enumerate(found)]
    known = [(n, math.log10(x), y) for n, x, y in points if x and y is not None]
    return _scatter(known, "regions a second (log)", str(score), "quality and speed", lambda x: f"{10**x:.3g}")


def _memory(found: Sequence[Line], score: str | None) -> str:
    points = [(place, line.memory, line.quality) for place, line in enumerate(found)]
    known = [(n, -math.log10(x), y) for n, x, y in points if x and y is not None]
    return _scatter(
        known,
        "memory, GiB (log, less to the right)",
        str(score),
        "quality and memory",
        lambda x: f"{10**-x / 2**30:.3g}",
    )


def _scatter(points: Sequence[tuple[int, float, float]], across: str, up: str, title: str, shown: Any) -> str:
    if len(points) < 2:
        return ""
    place_x, low_x, high_x = _scale([x for _, x, _ in points], MARGIN, WIDTH - 12)
    place_y, low_y, high_y = _scale([y for *_, y in points], HEIGHT - MARGIN, 12)
    marks = "".join(
        f'<circle class="c{n % len(COLOURS)}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="5"/>'
        f'<text x="{place_x(x) + 7:.1f}" y="{place_y(y) + 4:.1f}">{n + 1}</text>'
        for n, x, y in points
    )
    best = front([(x, y) for _, x, y in points])
    path = " ".join(
        f"{place_x(points[n][1]):.1f},{place_y(points[n][2]):.1f}" for n in sorted(best, key=lambda n: points[n][1])
    )
    return _picture(
        f'<polyline class="front" points="{path}"/>{marks}',
        (shown(low_x), shown(high_x), across),
        (f"{low_y:.3g}", f"{high_y:.3g}", up),
        f"{title}; dashed: no combination is better in both. Numbers are places in the table as it first stands.",
    )


def _curves(found: Sequence[Line]) -> str:
    curves = [(place, line.curve) for place, line in enumerate(found) if len(line.curve) > 1]
    if not curves:
        return ""
    every = [(math.log10(x), math.log10(y)) for _, curve in curves for x, y in curve.items()]
    place_x, low_x, high_x = _scale([x for x, _ in every], MARGIN, WIDTH - 24)
    place_y, low_y, high_y = _scale([y for _, y in every], HEIGHT - MARGIN, 12)
    drawn = ""
    for place, curve in curves:
        at = [(place_x(math.log10(x)), place_y(math.log10(y))) for x, y in sorted(curve.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn += f'<polyline class="curve c{place % len(COLOURS)}" points="{path}"/>'
        drawn += f'<text x="{at[-1][0] + 3:.1f}" y="{at[-1][1] + 4:.1f}">{place + 1}</text>'
    ends = (f"{10**low_x:.3g}", f"{10**high_x:.3g}", "regions of an image (log)")
    return _picture(
        drawn, ends, (f"{10**low_y:.3g}", f"{10**high_y:.3g}", "regions/s (log)"), "speed over regions of an image"
    )


def _bars(found: Sequence[Line]) -> str:
    timed = [(place, line) for place, line in enumerate(found) if line.stages]
    if not timed:
        return ""
    longest = max(sum(line.stages.values()) for _, line in timed)
    step, left = 18, 30
    bars = []
    for row, (place, line) in enumerate(timed):
        x = float(left)
        bars.append(f'<text x="0" y="{row * step + 12}">{place + 1}</text>')
        for number, stage in enumerate(STAGES):
            wide = line.stages[stage] / longest * (WIDTH - left)
            told = f"<title>{stage} {line.stages[stage] * 1e3:.3g} ms</title>"
            size = f'x="{x:.1f}" y="{row * step}" width="{wide:.1f}" height="{step - 4}"'
            bars.append(f'<rect class="c{number}" {size}>{told}</rect>')
            x += wide
    legend = "".join(
        f'<rect class="c{n}" x="{left + n * 90}" y="{len(timed) * step + 6}" width="10" height="10"/>'
        f'<text x="{left + n * 90 + 14}" y="{len(timed) * step + 15}">{stage}</text>'
        for n, stage in enumerate(STAGES)
    )
    size = f'width="{WIDTH}" height="{len(timed) * step + 24}"'
    svg = f'<svg {size} role="img" aria-label="stages">{"".join(bars)}{legend}</svg>'
    most = f"{longest * 1e3:.3g} ms"
    said = f"where the time goes at the most regions; the longest is {most}"
    return f"<figure>{svg}<figcaption>{said}</figcaption></figure>\n"


def _picture(drawn: str, across: tuple[str, str, str], up: tuple[str, str, str], title: str) -> str:
    bottom, right = HEIGHT - MARGIN + 8, WIDTH - 12
    axes = f'<line class="axis" x1="{MARGIN}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    axes += f'<line class="axis" x1="{MARGIN - 8}" x2="{MARGIN - 8}" y1="12" y2="{bottom}"/>'
    words = f'<text x="{MARGIN}" y="{bottom + 14}">{text(across[0])}</text>'
    words += f'<text x="{right}" y="{bottom + 14}" text-anchor="end">{text(across[1])}</text>'
    words += f'<text x="{(MARGIN + right) / 2}" y="{bottom + 30}" text-anchor="middle">{text(across[2])}</text>'
    words += f'<text x="0" y="{HEIGHT - MARGIN}">{text(up[0])}</text><text x="0" y="18">{text(up[1])}</text>'
    words += f'<text x="{MARGIN}" y="10">{text(up[2])}</text>'
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{text(title)}">{axes}{words}{drawn}</svg>'
    return f"<figure>{svg}<figcaption>{text(title)}</figcaption></figure>\n"


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Any, float, float]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return (lambda value: start + (value - low) / span * (end - start)), low, high


def _others(rows: Sequence[Mapping[str, Any]]) -> str:
    ended = _ended(rows)
    if not ended:
        return ""
    body = "".join(
        f'<tr><td>{text(row["label"])}</td><td class="words">{text(row["state"])}</td>'
        f'<td class="words">{text(row["reason"])}</td></tr>\n'
        for row in ended
    )
    return f'<h2>Not made</h2>\n<div class="wide"><table>{body}</table></div>\n'


def _ended(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    order = list(STATES)
    return sorted(
        (row for row in rows if row["state"] != "done"), key=lambda row: (order.index(row["state"]), row["label"])
    )


def _commands(found: Sequence[Line]) -> str:
    told = "".join(
        f"<details><summary>{text(line.label)}</summary><code>{text(line.command)}</code></details>\n" for line in found
    )
    return f"<h2>To make a row again</h2>\n{told}"


def _where(rows: Sequence[Mapping[str, Any]]) -> str:
    """The parts that all rows share, and the devices and versions that they were made on."""
    places = {
        ", ".join([each["device"], *(f"{name} {version}" for name, version in each["versions"].items())])
        for row in rows
        if (each := row.get("environment"))
    }
    shared = find_shared_parts([row["config"] for row in rows])
    parts = f"in every row: {', '.join(f'{name} {value}' for name, value in shared.items())}; " if shared else ""
    return parts + ("; ".join(sorted(places)) or "nothing was made")


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.3g}" if value / unit < 1000 else f"{value / unit:,.0f}"
