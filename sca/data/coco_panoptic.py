"""COCO's panoptic annotations: things and stuff, every pixel once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sca.data.coco import category, described, found, read_categories
from sca.data.fields import field, identified, items, table
from sca.data.table import TableDataset
from sca.masks import box_of, encode

LAYOUTS = (("annotations/panoptic_{split}2017.json", "{split}2017"), ("panoptic_{split}.json", "{split}"))
SUFFIXES = ("-merged", "-other", "-stuff")  # that tell classes of stuff from their like


class CocoPanoptic(TableDataset):
    """Dataset: `CocoPanoptic("val", root=FOLDER)`: masks, boxes and class names of things and stuff (arXiv 1801.00868).

    `root` holds `annotations/panoptic_val2017.json`, the folder of PNG files of the same name beside it, in which a
    pixel of segment i has red + 256 green + 256^2 blue = i, and `val2017/`. A region's id counts the segments of the
    file, since theirs are only unique within an image; its box is the tight one of its mask. Crowds and segments
    without a pixel are left out and counted. The suffixes of stuff (`wall-other-merged`) are taken off its names. The
    rest is that of `TableDataset`.
    """

    reader = "coco-panoptic"

    def __init__(self, split: str, root: str | Path, max_bad: int = 100):
        self.annotations, pictures = found(LAYOUTS, split, root)
        self.segments = self.annotations.with_suffix("")
        if not self.segments.is_dir():
            raise ValueError(f"there is no folder {self.segments} with the PNG files of {self.annotations.name}")
        super().__init__(split, pictures, [self.annotations], max_bad)

    def _records(self) -> Iterator[dict[str, Any]]:
        names = {number: _plain(name) for number, name in read_categories(self.annotations).items()}
        self.attributes = {"name": tuple(dict.fromkeys(names.values()))}
        listing = identified((record for record, _ in items(self.annotations, "images")), f"{self.annotations}: images")
        images = {record["id"]: described(record, place) for record, place in listing}
        count = 0
        for record, place in items(self.annotations, "annotations"):
            image_id = field(record, "image_id", int, place)
            if image_id not in images:
                raise ValueError(f"{place}: image_id {image_id} is not among the images, or was there before")
            image = self._image(*images.pop(image_id))
            numbers = self._numbers(field(record, "file_name", str, place), image)
            for n, segment in enumerate(field(record, "segments_info", list, place)):
                at = f"{place}: segments_info[{n}]"
                name = category(table(segment, at), names, at)
                count += 1
                if segment.get("iscrowd"):
                    self._skip("crowd", at)
                elif numbers is not None:
                    self._segment(image, count, numbers == field(segment, "id", int, at), at, name)
            yield image
        for _, name, *_ in images.values():
            self._skip("image without annotation", name)

    def _numbers(self, name: str, image: dict[str, Any]) -> np.ndarray | None:
        """The segment of each pixel, (height, width); None, and counted, if that cannot be read."""
        try:
            with Image.open(self.segments / name) as opened:
                colours = np.asarray(opened.convert("RGB"), dtype=np.int64)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return self._skip_image("segments unreadable", image["file"], f"{name} ({error})", stop=False)
        if colours.shape[:2] != (image["height"], image["width"]):
            size = f"{colours.shape[1]} x {colours.shape[0]}"
            return self._skip_image("segments of another size", image["file"], f"{name} ({size})", stop=False)
        return colours @ np.array([1, 256, 65536])

    def _segment(self, image: dict[str, Any], identity: int, mask: np.ndarray, place: str, name: str) -> None:
        if not mask.any():
            return self._skip("segment without a pixel", place)
        code = encode(mask)
        self._keep(image, identity, box_of(code), place, mask=("mask", code), name=name)


def _plain(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name
