"""Shared helpers of the export formats: unique ids, image files, and records in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as rle
from sca_registry.contracts import Region, Sample

from sca.io.errors import InputError

UNNAMED_CATEGORY = "region"  # category of regions without a name


class UniqueIds:
    """Ids of the images and regions in one set of files, with their splits."""

    def __init__(self) -> None:
        self.split_by_image_id: dict[int, str] = {}
        self.split_by_region_id: dict[int, str] = {}

    def add_sample(self, sample: Sample, split: str) -> None:
        """Register the ids of a sample. Raises InputError for a repeated id."""
        register_id("image", sample.image_id, split, self.split_by_image_id)
        for region in sample.regions:
            register_id("region", region.id, split, self.split_by_region_id)


def register_id(record_type: str, record_id: int, split: str, split_by_id: dict[int, str]) -> None:
    """Register an id. Raises InputError if it is repeated."""
    if record_id in split_by_id:
        first_split = split_by_id[record_id]
        occurrence = f"twice in split {split!r}" if first_split == split else f"in splits {first_split!r} and {split!r}"
        raise InputError(f"{record_type} id {record_id} occurs {occurrence}; ids must be unique")
    split_by_id[record_id] = split


def save_image(sample: Sample, path: Path, **options: Any) -> None:
    """Save the image of a sample in RGB; `options` are those of `PIL.Image.Image.save`."""
    path.parent.mkdir(exist_ok=True)
    sample.image.convert("RGB").save(path, **options)


def get_region_texts(region: Region) -> tuple[str, ...]:
    """Return the phrases of a region, or its name without phrases, for formats without class names."""
    return region.phrases or tuple(filter(None, (region.name,)))


def make_image_record(sample: Sample, file_name: str) -> dict[str, Any]:
    """Return the COCO record of an image."""
    width, height = sample.image.size
    return {"id": sample.image_id, "file_name": file_name, "width": width, "height": height}


def make_annotation_record(region: Region, image_id: int, categories: dict[str, int]) -> dict[str, Any]:
    """Return the COCO annotation of a region.

    Args:
        region: Region.
        image_id: Id of its image.
        categories: Category ids by name, to which new names are added.

    Returns:
        The annotation, with box and mask in image pixels.
    """
    x1, y1, x2, y2 = region.box
    return {
        "id": region.id,
        "image_id": image_id,
        "category_id": categories.setdefault(region.name or UNNAMED_CATEGORY, len(categories) + 1),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(rle.area(region.mask)) if region.mask else (x2 - x1) * (y2 - y1),
        "segmentation": region.mask or [],
        "iscrowd": 0,
    }


def write_instances(
    path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Mapping[str, int]
) -> None:
    """Write a COCO instances file."""
    category_records = [{"id": number, "name": name, "supercategory": name} for name, number in categories.items()]
    write_json(
        path, {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": category_records}
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in UTF-8."""
    path.write_text(json.dumps(content), encoding="utf-8")
