"""COCO's panoptic annotations: things and stuff, every pixel once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sca.data.coco import Index, find
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import find_image
from sca.io.images import open_image
from sca.io.masks import encode
from sca.io.validation import read_field

LAYOUTS = (("annotations/panoptic_{split}2017.json", "{split}2017"), ("panoptic_{split}.json", "{split}"))
NOTHING = 0  # the number of pixels that belong to no segment
SUFFIXES = ("-merged", "-other", "-stuff")  # that tell classes of stuff from their like


class CocoPanoptic(TableDataset):
    """Dataset: `CocoPanoptic("val", root=FOLDER)`: masks, boxes and class names of things and stuff (arXiv 1801.00868).

    `root` holds `annotations/panoptic_val2017.json`, the folder of PNG files of the same name beside it, in which a
    pixel of segment i has red + 256 green + 256^2 blue = i, and `val2017/`. A region's id counts the segments of the
    file, since theirs are only unique within an image; its box is the tight one of its mask, and its attribute "kind"
    is "thing" or "stuff". Crowds and segments without a pixel are left out and counted, and so are pixels of a segment
    that the file does not know, 0 apart, which stands for nothing. The suffixes of stuff (`wall-other-merged`) are
    taken off its names. The rest is that of `TableDataset`.
    """

    reader = "coco-panoptic"

    def __init__(self, split: str, root: str | Path, max_bad: int = 100):
        self.annotations, pictures = find(LAYOUTS, split, root)
        self.segments = self.annotations.with_suffix("")
        if not self.segments.is_dir():
            raise InputError(f"there is no folder {self.segments} with the PNG files of {self.annotations.name}")
        super().__init__(split, pictures, [self.annotations, self.segments], max_bad)

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """The index, the number of an image, its annotation with its place, and how many segments came before."""
        found = Index.read(
            self.annotations, ("image_id",), reject=self._rejects() | {"annotations": self._reject_image}
        )
        found = found._replace(names={number: _plain(name) for number, name in found.names.items()})
        self.attributes = {"name": tuple(dict.fromkeys(filter(None, found.names.values())))}
        bar.reset(len(found.annotations))
        owners = found.annotations.owners("image_id", found.images, "the images", self._reject_image)
        count = 0
        for number, owner in enumerate(owners.tolist()):
            record, place = found.annotations[number]
            if owner >= 0:
                yield found, owner, record, place, count
            segments = record.get("segments_info")
            count += len(segments) if isinstance(segments, list) else 0
        for number in np.setdiff1d(np.arange(len(found.images)), owners).tolist():
            self._skip("image without annotation", found.images.place(number))

    def _record(self, entry: Any) -> dict[str, Any] | None:
        found, number, record, place, count = entry
        image = self._image(*found.image(number))
        numbers = self._numbers(read_field(record, "file_name", str, place), image)
        if numbers is None:
            return None
        known = {NOTHING}
        for n, segment in enumerate(read_field(record, "segments_info", list, place)):
            at = f"{place}: segments_info[{n}]"
            with self._rejecting():
                identity = read_field(segment, "id", int, at)
                at = f"{at} (id {identity})"
                if identity in known:
                    raise InputError(f"{at}: this id was given before")
                known.add(identity)
                name = found.name(segment, at)
                if segment.get("iscrowd"):
                    self._skip("crowd", at)
                else:
                    kind = "thing" if segment["category_id"] in found.things else "stuff"
                    self._segment(image, count + n + 1, numbers == identity, at, name, kind)
        for identity in np.setdiff1d(numbers, list(known)).tolist():
            self._skip("pixels of no segment", f"{place}: {identity}")
        return image

    def _numbers(self, name: str, image: dict[str, Any]) -> np.ndarray | None:
        """The segment of each pixel, (height, width); None, and counted, if that cannot be read."""
        path = self.segments.absolute() / name
        try:
            colours = np.asarray(open_image(find_image(name, [self.segments])), dtype=np.int64)
        except InputError as error:
            return self._skip_image("segments unreadable", str(path), str(error), stop=False)
        if colours.shape[:2] != (image["height"], image["width"]):
            size = f"{colours.shape[1]} x {colours.shape[0]}"
            return self._skip_image("segments of another size", str(path), f"{name} ({size})", stop=False)
        return colours @ np.array([1, 256, 65536])

    def _segment(
        self, image: dict[str, Any], identity: int, mask: np.ndarray, place: str, name: str, kind: str
    ) -> None:
        if not mask.any():
            return self._skip("segment without a pixel", place)
        self._keep(image, identity, None, place, mask=encode(mask), name=name, attributes={"kind": kind})


def _plain(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name
