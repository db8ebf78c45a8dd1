"""Writers of COCO's format and of formats derived from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Sample

from sca.data.export_records import (
    UNNAMED_CATEGORY,
    UniqueIds,
    get_region_texts,
    make_annotation_record,
    make_image_record,
    save_image,
    write_instances,
    write_json,
)
from sca.io.masks import compute_mask_area, decode_rle

Splits = Mapping[str, Iterator[Sample]]


def write_coco(splits: Splits, folder: Path) -> None:
    """Write COCO instances with captions and attributes."""
    _write_coco_layout(splits, folder, "{split}.json", "{split}", include_captions=True)


def write_objects365(splits: Splits, folder: Path) -> None:
    """Write the layout of Objects365 v2."""
    _write_coco_layout(splits, folder, "annotations/zhiyuan_objv2_{split}.json", "{split}/patch0", "images/v2/patch0/")


def write_v3det(splits: Splits, folder: Path) -> None:
    """Write the layout of V3Det."""
    _write_coco_layout(splits, folder, "annotations/v3det_2023_v1_{split}.json", "images/{split}", "images/{split}/")


def _write_coco_layout(
    splits: Splits,
    folder: Path,
    annotation_pattern: str,
    image_folder_pattern: str,
    file_name_prefix: str = "",
    include_captions: bool = False,
) -> None:
    """Write instances and images to path patterns in `folder` that contain `{split}`."""
    categories: dict[str, int] = {}
    contents = {}
    for split, samples in splits.items():
        unique_ids = UniqueIds()
        images, regions = [], []
        image_folder = folder / image_folder_pattern.replace("{split}", split)
        image_folder.mkdir(parents=True)
        for sample in samples:
            unique_ids.add_sample(sample, split)
            file_name = f"{sample.image_id:012d}.png"
            save_image(sample, image_folder / file_name)
            images.append(make_image_record(sample, file_name_prefix.replace("{split}", split) + file_name))
            for region in sample.regions:
                extras: dict[str, Any] = {}
                if include_captions:
                    extras = {"caption": list(region.phrases), "attributes": region.attributes}
                extras = {key: value for key, value in extras.items() if value}
                regions.append(make_annotation_record(region, sample.image_id, categories) | extras)
        contents[split] = images, regions
    for split, (images, regions) in contents.items():
        file = folder / annotation_pattern.replace("{split}", split)
        file.parent.mkdir(exist_ok=True)
        write_instances(file, images, regions, categories)


def write_grit(splits: Splits, folder: Path) -> None:
    """Write the layout of GRiT's Visual Genome, one region per phrase."""
    annotation_id = 0
    for split, samples in splits.items():
        unique_ids = UniqueIds()
        images, regions = [], []
        for sample in samples:
            unique_ids.add_sample(sample, split)
            file_name = f"{sample.image_id}.jpg"
            save_image(sample, folder / "VG_100K" / file_name, quality=95)
            images.append(make_image_record(sample, file_name))
            for region in sample.regions:
                for phrase in get_region_texts(region):
                    annotation_id += 1
                    record = make_annotation_record(region, sample.image_id, {}) | {
                        "id": annotation_id,
                        "segmentation": [],
                    }
                    regions.append(record | {"caption": phrase.lower()})
        write_instances(folder / f"{split}.json", images, regions, {"object": 1})


def write_coco_captions(splits: Splits, folder: Path) -> None:
    """Write COCO Captions with the phrases of all regions of each image."""
    caption_id = 0
    (folder / "annotations").mkdir()
    for split, samples in splits.items():
        unique_ids = UniqueIds()
        images, caption_records = [], []
        for sample in samples:
            unique_ids.add_sample(sample, split)
            file_name = f"{sample.image_id:012d}.jpg"
            save_image(sample, folder / f"{split}2017" / file_name, quality=95)
            images.append(make_image_record(sample, file_name))
            for phrase in (phrase for region in sample.regions for phrase in get_region_texts(region)):
                caption_id += 1
                caption_records.append({"id": caption_id, "image_id": sample.image_id, "caption": phrase})
        (folder / f"{split}2017").mkdir(exist_ok=True)
        write_json(
            folder / f"annotations/captions_{split}2017.json", {"images": images, "annotations": caption_records}
        )


def write_coco_panoptic(splits: Splits, folder: Path) -> None:
    """Write COCO panoptic JSON and PNG files."""
    categories: dict[str, int] = {}
    contents = {}
    for split, samples in splits.items():
        unique_ids = UniqueIds()
        images, annotations = [], []
        segments = folder / f"annotations/panoptic_{split}2017"
        segments.mkdir(parents=True)
        for sample in samples:
            unique_ids.add_sample(sample, split)
            name = f"{sample.image_id:012d}"
            save_image(sample, folder / f"{split}2017" / f"{name}.jpg", quality=95)
            images.append(make_image_record(sample, f"{name}.jpg"))
            annotations.append(_write_segments(sample, segments / f"{name}.png", categories))
        (folder / f"{split}2017").mkdir(exist_ok=True)
        contents[split] = images, annotations
    for split, (images, annotations) in contents.items():
        write_instances(folder / f"annotations/panoptic_{split}2017.json", images, annotations, categories)


def _write_segments(sample: Sample, path: Path, categories: dict[str, int]) -> dict[str, Any]:
    """Write the PNG file of an image, smaller regions over larger ones, and return its annotation."""
    width, height = sample.image.size
    segment_ids, segments_info = np.zeros((height, width), dtype=np.int64), []
    masked_regions = sorted(
        ((region, region.mask) for region in sample.regions if region.mask),
        key=lambda pair: -compute_mask_area(pair[1]),
    )
    for number, (region, mask) in enumerate(masked_regions, start=1):
        segment_ids[decode_rle(mask)] = number
        category = categories.setdefault(region.name or UNNAMED_CATEGORY, len(categories) + 1)
        segments_info.append({"id": number, "category_id": category, "iscrowd": 0})
    colors = np.stack((segment_ids % 256, segment_ids // 256 % 256, segment_ids // 65536), axis=2).astype(np.uint8)
    Image.fromarray(colors).save(path)
    return {"image_id": sample.image_id, "file_name": path.name, "segments_info": segments_info}
