"""What all layouts of `export` are written with: ids that occur once, pictures, and records in COCO's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as rle
from sca_registry.contracts import Region, Sample

from sca.io.errors import InputError

UNNAMED_CATEGORY = "region"  # the category of regions that have no name


class UniqueIds:
    """Which images and regions one set of files has, and in which split."""

    def __init__(self) -> None:
        self.split_by_image_id: dict[int, str] = {}
        self.split_by_region_id: dict[int, str] = {}

    def add_sample(self, sample: Sample, split: str) -> None:
        register_id("image", sample.image_id, split, self.split_by_image_id)
        for region in sample.regions:
            register_id("region", region.id, split, self.split_by_region_id)


def register_id(record_type: str, record_id: int, split: str, split_by_id: dict[int, str]) -> None:
    if record_id in split_by_id:
        raise InputError(
            f"{record_type} id {record_id} of split {split!r} was there before, in split {split_by_id[record_id]!r}"
        )
    split_by_id[record_id] = split


def save_image(sample: Sample, path: Path, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    sample.image.convert("RGB").save(path, **options)


def get_region_texts(region: Region) -> tuple[str, ...]:
    """What is said of a region, for layouts that have no classes: its name where there is no phrase."""
    return region.phrases or tuple(filter(None, (region.name,)))


def make_image_record(sample: Sample, file_name: str) -> dict[str, Any]:
    width, height = sample.image.size
    return {"id": sample.image_id, "file_name": file_name, "width": width, "height": height}


def make_annotation_record(region: Region, image_id: int, categories: dict[str, int]) -> dict[str, Any]:
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


def write_instances(path: Path, images: list, annotations: list, categories: Mapping[str, int]) -> None:
    category_records = [{"id": number, "name": name, "supercategory": name} for name, number in categories.items()]
    write_json(
        path, {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": category_records}
    )


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
