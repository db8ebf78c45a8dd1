"""A page to browse the regions of many images, or to compare two files of them: `sca view`.

One file, offline. Pictures are in it, made smaller; masks are decoded by the page when they come into sight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from sca_registry.contracts import Caption

from sca.io.atomic import AtomicFile
from sca.io.errors import InputError
from sca.io.images import show
from sca.io.paths import ImageFiles, find_image
from sca.output.colours import COLOURS
from sca.output.page import data_uri, head, text
from sca.output.read import Captioned, merge_images

SIDE = 640  # pixels of the longest side of a picture in the page
BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; background: Canvas; color: CanvasText }
body { max-width: 90rem; margin: 0 auto; padding: 0 1rem 1rem }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 1rem; align-items: center;
  padding: .6rem 0; background: Canvas }
input[type="search"] { font: inherit; padding: .2rem .5rem; min-width: 12rem }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; overflow-wrap: anywhere }
section { min-height: 12rem; margin: 0 0 2rem }
.content { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
.stage { position: relative; flex: 0 1 40rem; min-width: 0 }
.stage img { display: block; width: 40rem; max-width: 100%; max-height: 80vh; object-fit: fill; border-radius: 6px;
  background: color-mix(in srgb, CanvasText 12%, Canvas) }
.stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none }
ol { flex: 1 1 18rem; margin: 0; padding: 0; list-style: none; max-height: 80vh; overflow: auto }
li { padding: .25rem .6rem; margin: 0 0 .3rem; border-left: 6px solid var(--colour); overflow-wrap: anywhere }
li:hover, li:focus, li.on { background: color-mix(in srgb, var(--colour) 22%, Canvas); outline-offset: -2px }
li span { display: block } .other { border-top: 1px dashed color-mix(in srgb, CanvasText 35%, Canvas) }
.none { opacity: .5 } small { opacity: .75; white-space: nowrap }
"""


def write_view(
    path: Path,
    captioned: Iterable[Captioned],
    other: Iterable[Captioned] | None = None,
    images: Sequence[Path] = (Path(),),
    names: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    """Writes the page, and gives the number of regions and a line for each picture that could not be opened.

    other: what is to be compared, of the same images; regions are paired by their order. images: folders that
    images may be named in. names: what the files are called.
    """
    script = files("sca.output").joinpath("view.js").read_text("utf-8")
    first = merge_images(captioned, images)
    second = None if other is None else merge_images(other, images)
    file, problems, regions = AtomicFile(path), [], 0
    try:
        title = " and ".join(names) or "Regions"
        file.write(head(title, _STYLE, script))
        file.write(_controls(title, second is not None))
        file.write(f'<script type="application/json" id="data">{{"colours": {json.dumps(COLOURS)}, "images": [')
        for number, each in enumerate(_together(first, second, images)):
            one, two = each
            regions += len(one.captions) + (len(two.captions) if two else 0)
            file.write((",\n" if number else "\n") + _escaped(_image(one, two, images, second is not None, problems)))
        file.write(f"]}}</script>\n<script>{script}</script>\n</body>\n</html>\n")
    except BaseException:
        file.drop()
        raise
    file.keep()
    return regions, problems


def _together(
    first: dict[str, Captioned], second: dict[str, Captioned] | None, images: Sequence[Path]
) -> Iterator[tuple[Captioned, Captioned | None]]:
    """The images of the first file, each with that of the second that is the same image file; then the others."""
    files = ImageFiles(partial(find_image, roots=images))
    second = second and {files.unify(name): each for name, each in second.items()}
    for name, each in first.items():
        pair = second.pop(files.unify(name), None) if second else None
        if pair is not None and pair.size != each.size:
            sizes = [f"{size.width} x {size.height}" for size in (each.size, pair.size)]
            raise InputError(f"{show(each.image)} is {sizes[0]} in one file and {sizes[1]} in the other")
        yield each, pair
    for left in (second or {}).values():
        yield left._replace(captions=[]), left


def _image(
    one: Captioned, two: Captioned | None, images: Sequence[Path], compares: bool, problems: list[str]
) -> dict[str, Any]:
    source = BLANK
    try:
        source = data_uri(one.open(images), SIDE)
    except InputError as error:
        problems.append(str(error))
    plain = {
        "name": one.image,
        "width": one.size.width,
        "height": one.size.height,
        "source": source,
        "regions": [_region(each) for each in one.captions],
    }
    if compares:
        plain["other"] = [_region(each) for each in two.captions] if two else []
    return plain


def _region(caption: Caption) -> list[Any]:
    """[caption, score, IoU, box, run lengths]: what the page knows of a region."""
    score = None if math.isnan(caption.score) else round(caption.score, 4)
    box = None if caption.box is None else [round(value, 2) for value in caption.box]
    iou = None if caption.iou is None or math.isnan(caption.iou) else round(caption.iou, 4)
    return [caption.text, score, iou, box, caption.mask["counts"] if caption.mask else None]


def _controls(title: str, compares: bool) -> str:
    differ = '<label><input id="differ" type="checkbox"> only captions that differ</label>' if compares else ""
    return (
        f"<h1>{text(title)}</h1>\n<form>"
        '<label>Search <input id="words" type="search" placeholder="words of captions"></label>'
        '<label>Least score <input id="score" type="range" min="0" max="1" step="0.01" value="0"></label>'
        f'{differ}<output id="count"></output></form>\n<main></main>\n'
    )


def _escaped(value: Any) -> str:
    """JSON within a script element."""
    return json.dumps(value).replace("<", "\\u003c")
