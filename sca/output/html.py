"""A page of pictures that shows the mask and caption of the region pointed at. One file, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.atomic import AtomicFile
from sca.output.colours import COLOURS
from sca.output.outline import outline
from sca.output.page import FOOT, SHARP, data_uri, head, text

_COLOURS = "\n".join(f".c{place} {{ --colour: rgb{colour} }}" for place, colour in enumerate(COLOURS))
_STYLE = f"""
:root {{ color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; background: Canvas; color: CanvasText }}
body {{ max-width: 90rem; margin: 0 auto; padding: 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; overflow-wrap: anywhere }}
.picture {{ margin: 0 0 2.5rem }}
.columns {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }}
.stage {{ position: relative; flex: 2 1 24rem; min-width: 0 }}
svg {{ display: block; width: 100%; max-height: 85vh; border-radius: 6px }}
.sharp image {{ image-rendering: pixelated }}
.mask, .box {{ fill: transparent; fill-rule: evenodd; stroke: transparent; stroke-width: 2;
  vector-effect: non-scaling-stroke; pointer-events: all }}
.mask + .box {{ pointer-events: none }}
.point {{ visibility: hidden; stroke: white; stroke-width: 2; vector-effect: non-scaling-stroke; pointer-events: none }}
.inside {{ fill: rgb(0, 170, 60) }} .outside {{ fill: rgb(220, 30, 40) }}
.region {{ cursor: pointer }}
.region:hover .mask, .on .mask {{ fill: var(--colour); fill-opacity: .5; stroke: var(--colour) }}
.region:hover .box, .on .box {{ stroke: var(--colour) }}
.region:hover .point, .on .point {{ visibility: visible }}
.tip {{ position: absolute; margin: 0; padding: .3rem .6rem; max-width: min(24rem, 80%); border-radius: 6px;
  background: Canvas; color: CanvasText; border: 2px solid var(--colour); pointer-events: none;
  overflow-wrap: anywhere }}
.tip[hidden] {{ display: none }}
ol {{ flex: 1 1 16rem; margin: 0; padding: 0; list-style: none; max-height: 85vh; overflow: auto }}
li {{ padding: .3rem .6rem; border-left: 6px solid var(--colour); margin: 0 0 .35rem; cursor: pointer;
  overflow-wrap: anywhere }}
li.on, li:focus {{ background: color-mix(in srgb, var(--colour) 22%, Canvas); outline-offset: -2px }}
small {{ opacity: .75; white-space: nowrap }}
{_COLOURS}
"""
_SCRIPT = """
for (const picture of document.querySelectorAll(".picture")) {
  const tip = picture.querySelector(".tip"), stage = picture.querySelector(".stage");
  const parts = [...picture.querySelectorAll("[data-region]")];
  const numberAt = (event) => event.target.closest("[data-region]")?.dataset.region ?? null;
  let pinned = null;
  const show = (number) => {
    for (const part of parts) part.classList.toggle("on", part.dataset.region === number);
    const shape = parts.find((part) => part.tagName === "g" && part.dataset.region === number);
    const item = parts.find((part) => part.tagName === "LI" && part.dataset.region === number);
    tip.hidden = !item;
    if (!item) return;
    tip.textContent = item.querySelector("span").textContent;
    tip.style.setProperty("--colour", getComputedStyle(item).getPropertyValue("--colour"));
    const box = shape.getBoundingClientRect(), frame = stage.getBoundingClientRect();
    const within = (value, room) => Math.max(0, Math.min(value, room)) + "px";
    const above = box.top - frame.top - tip.offsetHeight - 4;
    tip.style.left = within(box.left - frame.left, frame.width - tip.offsetWidth);
    tip.style.top = within(above < 0 ? box.bottom - frame.top + 4 : above, frame.height - tip.offsetHeight);
  };
  picture.addEventListener("pointerover", (event) => show(numberAt(event) ?? pinned));
  picture.addEventListener("pointerleave", () => show(pinned));
  picture.addEventListener("focusin", (event) => show(numberAt(event) ?? pinned));
  picture.addEventListener("focusout", () => show(pinned));
  picture.addEventListener("click", (event) => {
    const number = numberAt(event);
    pinned = number === pinned ? null : number;
    show(pinned);
  });
  picture.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " " && event.key !== "Escape") return;
    if (event.key === " ") event.preventDefault();
    pinned = event.key === "Escape" ? null : numberAt(event);
    show(pinned);
  });
}
"""


_HEAD = head("Captions of regions", _STYLE, _SCRIPT)
_FOOT = f"<script>{_SCRIPT}</script>\n{FOOT}"


class Html:
    """One page for all images, written as they come; the file has its name when it is closed."""

    def __init__(self, path: Path, model: str | None = None):
        self._file = AtomicFile(path)
        self._images = 0
        self._file.write(f"{_HEAD}<h1>{text(model or 'Captions of regions')}</h1>\n")

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        self._file.write(_picture(path, image, captions))
        self._images += 1

    def close(self, finished: bool = True) -> None:
        """Keep the images that are done. A run that did not finish leaves an older file unchanged."""
        if not finished and (self._file.replaces or not self._images):
            self._file.drop()
            return
        try:
            self._file.write(_FOOT)
        except BaseException:
            self._file.drop()
            raise
        self._file.keep()


def _picture(path: str, image: Image.Image, captions: Sequence[Caption]) -> str:
    name = text(path)
    sized = [_shape(number, caption, max(image.size)) for number, caption in enumerate(captions)]
    shapes = [shape for _, shape in sorted(sized, key=lambda pair: -pair[0])]  # small ones on top, within reach
    items = "".join(_item(number, caption) for number, caption in enumerate(captions))
    sharp = " sharp" if max(image.size) <= SHARP else ""
    return (
        f'<section class="picture"><h2>{name}</h2>\n<div class="columns"><div class="stage{sharp}">'
        f'<svg viewBox="0 0 {image.width} {image.height}" role="img" aria-label="{name}">'
        f'<image width="{image.width}" height="{image.height}" preserveAspectRatio="none" href="{data_uri(image)}"/>\n'
        f'{"".join(shapes)}</svg><p class="tip" aria-live="polite" hidden></p></div>\n'
        f"<ol>\n{items}</ol></div></section>\n"
    )


def _shape(number: int, caption: Caption, side: int) -> tuple[float, str]:
    """The area of a region and what is shown of it, in pixels of the image."""
    parts = []
    area = 0.0
    if caption.mask and (path := outline(masks.decode(caption.mask))):
        area = masks.area(caption.mask)
        parts.append(f'<path class="mask" d="{path}"/>')
    if caption.box is not None:
        x1, y1, x2, y2 = (float(value) for value in caption.box)
        area = area or (x2 - x1) * (y2 - y1)
        parts.append(f'<rect class="box" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>')
    for x, y, label in caption.prompt.points:
        kind = "inside" if label else "outside"
        parts.append(f'<circle class="point {kind}" cx="{x + 0.5:g}" cy="{y + 0.5:g}" r="{max(side / 120, 0.5):g}"/>')
    return area, f'<g class="region {_colour(number)}" data-region="{number}">{"".join(parts)}</g>\n'


def _item(number: int, caption: Caption) -> str:
    facts = [] if math.isnan(caption.score) else [f"score {caption.score:.2f}"]
    facts += [] if caption.iou is None else [f"IoU {caption.iou:.2f}"]
    return (
        f'<li class="{_colour(number)}" data-region="{number}" tabindex="0"><span>{text(caption.text)}</span> '
        f"<small>{' · '.join((f'region {int(caption.region)}', *facts))}</small></li>\n"
    )


def _colour(number: int) -> str:
    return f"c{number % len(COLOURS)}"
