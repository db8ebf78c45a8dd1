"""COCO panoptic: masks of things and stuff, which assign each pixel to one segment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sca.data.coco import CocoIndex, find_coco_files
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import resolve_image_path
from sca.io.images import open_image
from sca.io.masks import encode_rle
from sca.io.validation import read_field

LAYOUTS = (("annotations/panoptic_{split}2017.json", "{split}2017"), ("panoptic_{split}.json", "{split}"))
VOID_SEGMENT_ID = 0  # id of unlabeled pixels
STUFF_SUFFIXES = ("-merged", "-other", "-stuff")


class CocoPanoptic(TableDataset):
    """COCO panoptic (arXiv 1801.00868): masks, boxes and class names of things and stuff.

    A pixel of segment i has red + 256 green + 256^2 blue = i. A region's id counts the segments of the file, because
    segment ids are unique only within an image. Its box is the tight box of its mask, and its attribute "kind" is
    "thing" or "stuff". The suffixes of stuff names (`wall-other-merged`) are removed.

    Crowd segments, segments without pixels, and pixels of segments that the file does not list are skipped and counted.
    Segment 0 is unlabeled and not counted. See `TableDataset`.

    Args:
        split: Name of the split, such as "val".
        root: Folder with `annotations/panoptic_val2017.json`, the PNG files in `annotations/panoptic_val2017/`, and the
            images in `val2017/`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "coco-panoptic"

    def __init__(self, split: str, root: str | Path, max_bad_records: int = 100):
        annotation_file, image_folder = find_coco_files(LAYOUTS, split, root)
        self.annotations: Path = annotation_file
        self.segments: Path = self.annotations.with_suffix("")
        if not self.segments.is_dir():
            raise InputError(f"no folder {self.segments} with the PNG files of {self.annotations.name}")
        super().__init__(split, image_folder, [self.annotations, self.segments], max_bad_records)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the file index, an image index, its annotation and location, and the number of segments before it."""
        coco_index = CocoIndex.read(
            self.annotations, ("image_id",), reject=self._get_reject_callbacks() | {"annotations": self._reject_image}
        )
        coco_index = coco_index._replace(
            category_names={number: _strip_stuff_suffixes(name) for number, name in coco_index.category_names.items()}
        )
        class_names = tuple(dict.fromkeys(filter(None, coco_index.category_names.values())))
        self.attribute_values: dict[str, tuple[str, ...]] = {"name": class_names}
        bar.reset(len(coco_index.annotations))
        image_indices = coco_index.annotations.resolve_references(
            "image_id", coco_index.images, "the images", self._reject_image
        )
        segments_before = 0
        for number, image_index in enumerate(image_indices.tolist()):
            record, location = coco_index.annotations[number]
            if image_index >= 0:
                yield coco_index, image_index, record, location, segments_before
            segments = record.get("segments_info")
            segments_before += len(segments) if isinstance(segments, list) else 0
        for number in np.setdiff1d(np.arange(len(coco_index.images)), image_indices).tolist():
            self._skip("image without annotation", coco_index.images.describe_location(number))

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        coco_index, image_index, record, location, segments_before = entry
        row = self._create_row(*coco_index.read_image_record(image_index))
        segment_ids = self._read_segment_ids(read_field(record, "file_name", str, location), row)
        if segment_ids is None:
            return None
        known_ids = {VOID_SEGMENT_ID}
        for n, segment in enumerate(read_field(record, "segments_info", list, location)):
            segment_location = f"{location}: segments_info[{n}]"
            with self._catch_record_errors():
                segment_id = read_field(segment, "id", int, segment_location)
                segment_location = f"{segment_location} (id {segment_id})"
                if segment_id in known_ids:
                    raise InputError(f"{segment_location}: duplicate id")
                known_ids.add(segment_id)
                name = coco_index.get_category_name(segment, segment_location)
                if segment.get("iscrowd"):
                    self._skip("crowd", segment_location)
                else:
                    kind = "thing" if segment["category_id"] in coco_index.thing_category_ids else "stuff"
                    self._add_segment(
                        row, segments_before + n + 1, segment_ids == segment_id, segment_location, name, kind
                    )
        for segment_id in np.setdiff1d(segment_ids, list(known_ids)).tolist():
            self._skip("pixels without a segment", f"{location}: {segment_id}")
        return row

    def _read_segment_ids(self, name: str, row: dict[str, Any]) -> np.ndarray | None:
        """Read the (height, width) segment ids; None, and counted, if the PNG file is unusable."""
        path = self.segments.absolute() / name
        try:
            colors = np.asarray(open_image(resolve_image_path(name, [self.segments])), dtype=np.int64)
        except InputError as error:
            self._skip_image("segments unreadable", str(path), str(error), stop=False)
            return None
        if colors.shape[:2] != (row["height"], row["width"]):
            size = f"{colors.shape[1]} x {colors.shape[0]}"
            self._skip_image("segments of a different size", str(path), f"{name} ({size})", stop=False)
            return None
        return colors @ np.array([1, 256, 65536])

    def _add_segment(
        self, row: dict[str, Any], region_id: int, mask: np.ndarray, location: str, name: str, kind: str
    ) -> None:
        if not mask.any():
            return self._skip("segment without a pixel", location)
        self._add_region(row, region_id, None, location, mask=encode_rle(mask), name=name, attributes={"kind": kind})


def _strip_stuff_suffixes(name: str) -> str:
    for suffix in STUFF_SUFFIXES:
        name = name.removesuffix(suffix)
    for suffix in STUFF_SUFFIXES:
        name = name.removesuffix(suffix)
    return name
