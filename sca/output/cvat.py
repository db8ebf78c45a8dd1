"""Write "CVAT for images 1.1" XML: https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.atomic import AtomicFile
from sca.output.captioned_image import ImageOrSize
from sca.output.image_files import close_document
from sca.output.jsonl import caption_to_record
from sca.output.omitted_regions import OmittedRegions, find_first_point
from sca.output.records import REGION_LABEL

INVALID_XML_CHARACTER = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ATTRIBUTES = ("caption", "score")  # text attributes of every label


class CvatWriter:
    r"""Writer of one XML file with the shapes of all images.

    A region with a mask is a mask, exact to the pixel; else a box, else its first point; without any of them it is
    omitted with a warning. Its label is its name, or "region". Its caption and score are the text attributes `caption`
    and `score`. Characters that XML cannot contain are replaced by escapes such as `\x1b`.

    The images are kept in a temporary file until `close`, because readers require the labels before them.
    """

    def __init__(self, path: Path, model: str | None = None):
        self._path, self._model = path, model
        self._images = AtomicFile(path)
        self._num_images = 0
        self._omitted = OmittedRegions("CVAT annotations")
        self._labels: dict[str, None] = {REGION_LABEL: None}  # in order of their first use

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        records = [caption_to_record(path, image, caption) for caption in captions]
        shapes = [shape for record in records if (shape := _format_shape(record))]
        self._omitted.add(path, len(records) - len(shapes))
        attributes = {"id": self._num_images, "name": path, "width": image.width, "height": image.height}
        self._images.write("\n".join([f"  <image{_format_attributes(attributes)}>", *shapes, "  </image>", ""]))
        self._labels |= {caption.name or REGION_LABEL: None for caption in captions}
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        self._omitted.log_total()
        try:
            document = AtomicFile(self._path)
            try:
                document.write(self._format_header())
                self._images.copy_to(document)
            except BaseException:
                document.discard()
                raise
            close_document(document, "</annotations>\n", bool(self._num_images), finished)
        finally:
            self._images.discard()

    def _format_header(self) -> str:
        attributes = "".join(
            f"<attribute><name>{name}</name><mutable>False</mutable><input_type>text</input_type>"
            "<default_value></default_value><values></values></attribute>"
            for name in ATTRIBUTES
        )
        labels = "".join(
            f"        <label><name>{_escape_text(name)}</name><attributes>{attributes}</attributes></label>\n"
            for name in self._labels
        )
        return (
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>\n'
            f"      <name>{_escape_text(self._model or 'captions')}</name>\n      <size>{self._num_images}</size>\n"
            f"      <mode>annotation</mode>\n      <labels>\n{labels}      </labels>\n    </task>\n  </meta>\n"
        )


def _format_shape(caption_record: dict[str, Any]) -> str | None:
    """Return the element of a region; None without a mask, a box or a point."""
    shape = _make_geometry(caption_record)
    if shape is None:
        return None
    tag, geometry = shape
    attributes = {"label": caption_record.get("name") or REGION_LABEL, "source": "auto", "occluded": 0, **geometry}
    children = "".join(
        f"      <attribute name={quoteattr(name)}>{_escape_text(str(caption_record[name]))}</attribute>\n"
        for name in ATTRIBUTES
        if caption_record[name] is not None
    )
    return f"    <{tag}{_format_attributes({**attributes, 'z_order': 0})}>\n{children}    </{tag}>"


def _make_geometry(caption_record: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the tag of a shape and its coordinates in pixels; None without a mask, a box or a point."""
    if caption_record["mask"] and (box := masks.mask_to_box(caption_record["mask"])):
        x1, y1, x2, y2 = (int(value) for value in box)
        mask_crop = masks.decode_rle(caption_record["mask"])[y1:y2, x1:x2]
        run_lengths = ", ".join(map(str, _count_runs(mask_crop)))
        return "mask", {"rle": run_lengths, "left": x1, "top": y1, "width": x2 - x1, "height": y2 - y1}
    if caption_record["box"]:
        return "box", dict(zip(("xtl", "ytl", "xbr", "ybr"), caption_record["box"], strict=True))
    if point := find_first_point(caption_record):
        x, y = point
        return "points", {"points": f"{x},{y}"}
    return None


def _count_runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of the runs of a (height, width) mask, row by row; the first run is of background pixels."""
    pixels = mask.ravel()
    starts = np.flatnonzero(np.diff(pixels)) + 1
    lengths = np.diff(np.concatenate([[0], starts, [len(pixels)]])).tolist()
    return [0, *lengths] if pixels[0] else lengths


def _format_attributes(attributes: dict[str, Any]) -> str:
    return "".join(f" {name}={quoteattr(_escape_invalid(str(value)))}" for name, value in attributes.items())


def _escape_text(text: str) -> str:
    return escape(_escape_invalid(text), {"\r": "&#13;"})


def _escape_invalid(text: str) -> str:
    return INVALID_XML_CHARACTER.sub(lambda match: repr(match[0])[1:-1], text)
