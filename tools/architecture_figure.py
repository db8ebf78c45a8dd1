"""Draw the architecture figure of the README and the site: `python tools/architecture_figure.py`.

Writes docs/images/architecture.svg. Colors follow the color scheme of the reader (light or dark).
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from sca.io.atomic import write_file

PATH = Path(__file__).resolve().parent.parent / "docs" / "images" / "architecture.svg"
WIDTH, HEIGHT = 964, 372
BOX_TOP, BOX_HEIGHT = 138, 88
MIDDLE = BOX_TOP + BOX_HEIGHT // 2
BOTTOM = BOX_TOP + BOX_HEIGHT
COMPONENTS = (  # title, subtitle, left edge, width, style
    ("Encoder", "SAM, CLIP, DINOv2, ...", 176, 148, "frozen"),
    ("Segmenter", "SAM, SAM 2, ...", 384, 124, "frozen"),
    ("Mixer", "query, resampler, ...", 568, 144, "trained"),
    ("Language model", "GPT-2, Mistral, ...", 772, 156, "frozen"),
)
STAR = ((0, -28), (7, -9), (27, -9), (11, 4), (17, 23), (0, 11), (-17, 23), (-11, 4), (-27, -9), (-7, -9))
LIGHT = {
    "page": "#ffffff",
    "border": "#d1d9e0",
    "text": "#1f2328",
    "muted": "#59636e",
    "frozen": "#eef1f5",
    "frozen-edge": "#818b98",
    "trained": "#fff1c7",
    "trained-edge": "#bf8700",
    "region": "#0969da",
    "region-fill": "#b6d8fb",
}
DARK = {
    "page": "#0d1117",
    "border": "#3d444d",
    "text": "#f0f6fc",
    "muted": "#9198a1",
    "frozen": "#212830",
    "frozen-edge": "#767e87",
    "trained": "#45330b",
    "trained-edge": "#d29922",
    "region": "#58a6ff",
    "region-fill": "#1b4b80",
}
STYLE = """
text {{ font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; text-anchor: middle; fill: {text}; }}
.title {{ font-size: 16px; font-weight: 600; }}
.label {{ font-size: 13px; }}
.note {{ font-size: 12px; fill: {muted}; }}
.left {{ text-anchor: start; }}
.page {{ fill: {page}; stroke: {border}; }}
.frozen {{ fill: {frozen}; stroke: {frozen-edge}; stroke-width: 1.5; }}
.trained {{ fill: {trained}; stroke: {trained-edge}; stroke-width: 1.5; }}
.image {{ fill: {frozen}; stroke: {border}; }}
.ground {{ fill: {border}; }}
.region {{ fill: {region-fill}; stroke: {region}; stroke-width: 1.5; }}
.prompt {{ fill: none; stroke: {region}; stroke-width: 1.5; stroke-dasharray: 4 3; }}
.arrow {{ fill: none; stroke: {muted}; stroke-width: 1.5; }}
.head {{ fill: {muted}; }}
"""


def render_figure() -> str:
    """Render the figure as SVG."""
    elements = [
        draw_rect("page", 0.5, 0.5, WIDTH - 1, HEIGHT - 1, radius=10),
        *draw_image(36, MIDDLE - 48, "prompt"),
        draw_text("label", 84, MIDDLE + 66, "image"),
    ]
    for title, subtitle, left, width, style in COMPONENTS:
        elements += [
            draw_rect(style, left, BOX_TOP, width, BOX_HEIGHT),
            draw_text("title", left + width / 2, MIDDLE - 4, title),
            draw_text("note", left + width / 2, MIDDLE + 18, subtitle),
        ]
    for start, end, label in ((132, 176, ""), (324, 384, "features"), (508, 568, "tokens"), (712, 772, "queries")):
        elements += [draw_arrow(start, MIDDLE, end, MIDDLE), draw_text("note", (start + end) / 2, MIDDLE - 10, label)]
    elements += [
        draw_text("label", 446, 76, "box, points or mask"),
        draw_arrow(446, 88, 446, BOX_TOP),
        draw_rect("trained", 796, 56, 108, 32),
        draw_text("label", 850, 77, "task tokens"),
        draw_arrow(850, 88, 850, BOX_TOP),
        draw_arrow(446, BOTTOM, 446, BOTTOM + 30),
        *draw_image(398, BOTTOM + 30, "region"),
        draw_text("label", 520, BOTTOM + 82, "mask"),
        draw_arrow(850, BOTTOM, 850, BOTTOM + 30),
        draw_rect("image", 772, BOTTOM + 30, 156, 44),
        draw_text("label", 850, BOTTOM + 57, "“a striped cyan star”"),
        draw_text("label", 850, BOTTOM + 94, "caption"),
        draw_rect("frozen", 36, 34, 18, 18, radius=4),
        draw_text("label left", 62, 48, "pretrained, frozen by default"),
        draw_rect("trained", 36, 62, 18, 18, radius=4),
        draw_text("label left", 62, 76, "trained"),
    ]
    description = (
        "An encoder, a segmenter, a mixer and a language model turn an image and prompts into masks and captions."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            f' role="img" aria-label="{description}">',
            f"<style>{STYLE.format_map(LIGHT)}@media (prefers-color-scheme: dark) {{{STYLE.format_map(DARK)}}}</style>",
            *elements,
            "</svg>\n",
        ]
    )


def draw_rect(style: str, x: float, y: float, width: float, height: float, radius: float = 8) -> str:
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def draw_text(style: str, x: float, y: float, content: str) -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(content)}</text>'


def draw_arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw a horizontal or vertical arrow that ends 3 pixels before (x2, y2)."""
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    tip_x, tip_y = x2 - 3 * dx, y2 - 3 * dy
    base_x, base_y = tip_x - 9 * dx, tip_y - 9 * dy
    head = " ".join(
        f"{x:g},{y:g}"
        for x, y in (
            (tip_x, tip_y),
            (base_x + 4.5 * dy, base_y + 4.5 * dx),
            (base_x - 4.5 * dy, base_y - 4.5 * dx),
        )
    )
    return f'<path class="arrow" d="M{x1:g} {y1:g}L{base_x:g} {base_y:g}"/><polygon class="head" points="{head}"/>'


def draw_image(x: float, y: float, content: str) -> list[str]:
    """Draw an image of 96 x 96 pixels with a star, as a box prompt or as a mask."""
    star = " ".join(f"{x + 48 + dx:g},{y + 46 + dy:g}" for dx, dy in STAR)
    shape = f'<polygon class="{"region" if content == "region" else "ground"}" points="{star}"/>'
    prompt = [draw_rect("prompt", x + 17, y + 14, 62, 60, radius=0)] if content == "prompt" else []
    return [draw_rect("image", x, y, 96, 96), shape, *prompt]


if __name__ == "__main__":
    write_file(PATH, render_figure())
