"""Viewer: an HTML page to browse the regions of many images, or to compare two sets of captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from sca_registry.contracts import Caption

from sca.io.atomic import AtomicFile
from sca.output.captioned_image import ImageOrSize
from sca.output.html_page import MAX_PIXELATED_SIDE, encode_data_uri, render_template, replace_unprintable
from sca.output.image_files import close_document


class HtmlWriter:
    """Writer of the viewer, image by image; the file is renamed to its final name on close.

    Args:
        path: Output file.
        title: Title of the page.
        has_other_captions: Whether each image has a second list of captions.
    """

    def __init__(self, path: Path, title: str | None = None, has_other_captions: bool = False):
        html = render_template(
            "viewer.html", title=title or "Captions of regions", has_other_captions=has_other_captions
        )
        start, _, self._end = html.partition("<!-- images -->\n")
        self._file = AtomicFile(path)
        self._num_images = 0
        self._file.write(start)

    def add(
        self,
        path: str,
        image: ImageOrSize,
        captions: Sequence[Caption],
        other_captions: Sequence[Caption] | None = None,
    ) -> None:
        """Write an image.

        Args:
            path: Name of the image.
            image: Image, or any object with its width and height if it cannot be shown.
            captions: Captions of its regions.
            other_captions: Captions to compare with; captions of one region have the same index in both lists.
        """
        regions = {"regions": [_caption_to_dict(caption) for caption in captions]}
        if other_captions is not None:
            regions["other_regions"] = [_caption_to_dict(caption) for caption in other_captions]
        has_pixels = isinstance(image, Image.Image)
        section_html = render_template(
            "image.html",
            name=path,
            width=image.width,
            height=image.height,
            image_uri=encode_data_uri(image) if isinstance(image, Image.Image) else None,
            is_pixelated=has_pixels and max(image.size) <= MAX_PIXELATED_SIDE,
            regions=regions,
        )
        self._file.write(section_html)
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Finish the page with the completed images. An unfinished run leaves an older file unchanged."""
        close_document(self._file, self._end, bool(self._num_images), finished)

    def discard(self) -> None:
        """Remove the temporary file; an older file stays unchanged."""
        self._file.discard()


def _caption_to_dict(caption: Caption) -> dict[str, Any]:
    """Convert a caption to JSON values for the page; coordinates in image pixels."""
    return {
        "region_id": int(caption.region_id),
        "caption": replace_unprintable(caption.text),
        "score": _round_or_none(caption.score),
        "predicted_iou": _round_or_none(caption.predicted_iou),
        **({} if caption.confidence is None else {"confidence": _round_or_none(caption.confidence)}),
        "box": None if caption.box is None else [round(float(value), 2) for value in caption.box],
        "mask": caption.mask["counts"] if caption.mask else None,
        "points": [[float(x), float(y), int(label)] for x, y, label in caption.prompt.points],
        "is_box_prompt": caption.prompt.box is not None,
        **({"name": replace_unprintable(caption.name)} if caption.name is not None else {}),
    }


def _round_or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)
