"""Writing in COCO's form and its relatives'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Sample

from sca.data.export_records import (
    UNNAMED,
    Ids,
    annotation_record,
    image_record,
    save,
    words,
    write_instances,
    write_json,
)
from sca.io.masks import area, decode

Splits = Mapping[str, Iterator[Sample]]


def coco(splits: Splits, folder: Path) -> None:
    _write(splits, folder, "{split}.json", "{split}", told=True)


def objects365(splits: Splits, folder: Path) -> None:
    _write(splits, folder, "annotations/zhiyuan_objv2_{split}.json", "{split}/patch0", "images/v2/patch0/")


def v3det(splits: Splits, folder: Path) -> None:
    _write(splits, folder, "annotations/v3det_2023_v1_{split}.json", "images/{split}", "images/{split}/")


def _write(splits: Splits, folder: Path, annotations: str, pictures: str, prefix: str = "", told: bool = False) -> None:
    """`annotations` and `pictures` are where they lie, `prefix` what file names begin with; if `told`, captions and
    attributes are written.
    """
    categories: dict[str, int] = {}
    contents = {}
    for split, samples in splits.items():
        seen = Ids()
        images, regions = [], []
        place = folder / pictures.replace("{split}", split)
        place.mkdir(parents=True)
        for sample in samples:
            seen.image(sample, split)
            file_name = f"{sample.image_id:012d}.png"
            save(sample, place / file_name)
            images.append(image_record(sample, prefix.replace("{split}", split) + file_name))
            for region in sample.regions:
                extras: dict[str, Any] = {}
                if told:
                    extras = {"caption": list(region.phrases), "attributes": region.attributes}
                extras = {key: value for key, value in extras.items() if value}
                regions.append(annotation_record(region, sample.image_id, categories) | extras)
        contents[split] = images, regions
    for split, (images, regions) in contents.items():
        file = folder / annotations.replace("{split}", split)
        file.parent.mkdir(exist_ok=True)
        write_instances(file, images, regions, categories)


def grit(splits: Splits, folder: Path) -> None:
    number = 0
    for split, samples in splits.items():
        seen = Ids()
        images, regions = [], []
        for sample in samples:
            seen.image(sample, split)
            file_name = f"{sample.image_id}.jpg"
            save(sample, folder / "VG_100K" / file_name, quality=95)
            images.append(image_record(sample, file_name))
            for region in sample.regions:
                for phrase in words(region):
                    number += 1
                    record = annotation_record(region, sample.image_id, {}) | {"id": number, "segmentation": []}
                    regions.append(record | {"caption": phrase.lower()})
        write_instances(folder / f"{split}.json", images, regions, {"object": 1})


def captions(splits: Splits, folder: Path) -> None:
    number = 0
    (folder / "annotations").mkdir()
    for split, samples in splits.items():
        seen = Ids()
        images, told = [], []
        for sample in samples:
            seen.image(sample, split)
            file_name = f"{sample.image_id:012d}.jpg"
            save(sample, folder / f"{split}2017" / file_name, quality=95)
            images.append(image_record(sample, file_name))
            for phrase in (phrase for region in sample.regions for phrase in words(region)):
                number += 1
                told.append({"id": number, "image_id": sample.image_id, "caption": phrase})
        (folder / f"{split}2017").mkdir(exist_ok=True)
        write_json(folder / f"annotations/captions_{split}2017.json", {"images": images, "annotations": told})


def panoptic(splits: Splits, folder: Path) -> None:
    categories: dict[str, int] = {}
    contents = {}
    for split, samples in splits.items():
        seen = Ids()
        images, annotations = [], []
        segments = folder / f"annotations/panoptic_{split}2017"
        segments.mkdir(parents=True)
        for sample in samples:
            seen.image(sample, split)
            name = f"{sample.image_id:012d}"
            save(sample, folder / f"{split}2017" / f"{name}.jpg", quality=95)
            images.append(image_record(sample, f"{name}.jpg"))
            annotations.append(_segments(sample, segments / f"{name}.png", categories))
        (folder / f"{split}2017").mkdir(exist_ok=True)
        contents[split] = images, annotations
    for split, (images, annotations) in contents.items():
        write_instances(folder / f"annotations/panoptic_{split}2017.json", images, annotations, categories)


def _segments(sample: Sample, path: Path, categories: dict[str, int]) -> dict[str, Any]:
    """Writes the PNG of an image, larger regions below smaller ones, and gives its annotation."""
    width, height = sample.image.size
    numbers, info = np.zeros((height, width), dtype=np.int64), []
    masks = sorted((region for region in sample.regions if region.mask), key=lambda region: -area(region.mask))
    for number, region in enumerate(masks, start=1):
        numbers[decode(region.mask)] = number
        category = categories.setdefault(region.name or UNNAMED, len(categories) + 1)
        info.append({"id": number, "category_id": category, "iscrowd": 0})
    colours = np.stack((numbers % 256, numbers // 256 % 256, numbers // 65536), axis=2).astype(np.uint8)
    Image.fromarray(colours).save(path)
    return {"image_id": sample.image_id, "file_name": path.name, "segments_info": info}
