"""What all layouts of `export` are written with: ids that occur once, pictures, and records in COCO's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as rle
from sca_registry.contracts import Region, Sample

from sca.io.errors import InputError

UNNAMED = "region"  # the category of regions that have no name


class Ids:
    """Which images and regions one set of files has, and in which split."""

    def __init__(self) -> None:
        self.images: dict[int, str] = {}
        self.regions: dict[int, str] = {}

    def image(self, sample: Sample, split: str) -> None:
        once("image", sample.image_id, split, self.images)
        for region in sample.regions:
            once("region", region.id, split, self.regions)


def once(kind: str, identity: int, split: str, seen: dict[int, str]) -> None:
    if identity in seen:
        raise InputError(f"{kind} id {identity} of split {split!r} was there before, in split {seen[identity]!r}")
    seen[identity] = split


def save(sample: Sample, path: Path, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    sample.image.convert("RGB").save(path, **options)


def words(region: Region) -> tuple[str, ...]:
    """What is said of a region, for layouts that have no classes: its name where there is no phrase."""
    return region.phrases or tuple(filter(None, (region.name,)))


def image_record(sample: Sample, file_name: str) -> dict[str, Any]:
    width, height = sample.image.size
    return {"id": sample.image_id, "file_name": file_name, "width": width, "height": height}


def annotation_record(region: Region, image_id: int, categories: dict[str, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = region.box
    return {
        "id": region.id,
        "image_id": image_id,
        "category_id": categories.setdefault(region.name or UNNAMED, len(categories) + 1),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(rle.area(region.mask)) if region.mask else (x2 - x1) * (y2 - y1),
        "segmentation": region.mask or [],
        "iscrowd": 0,
    }


def write_instances(path: Path, images: list, annotations: list, categories: Mapping[str, int]) -> None:
    named = [{"id": number, "name": name, "supercategory": name} for name, number in categories.items()]
    write_json(path, {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": named})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
