"""Writes any dataset in the layout of a public one, for tools that read COCO, Visual Genome or RefCOCO.

The package's own loaders read the same layouts, so an exported dataset is also how those are tried from end to end.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pycocotools import mask as rle
from sca_registry.contracts import Dataset, Region, Sample

UNNAMED = "region"  # the category of regions that have no name


def export(dataset: Dataset | Mapping[str, Dataset], folder: str | Path, format: str, limit: int | None = None) -> Path:
    """Writes `dataset`, or several as {split: dataset}, to `folder` and gives its path.

    A dataset by itself is written as the split that it says it is, else as "train". `limit` keeps the first so many
    samples of each split. `format` is one of:

    - `coco`: `{split}.json` (instances; segmentation as RLE, "caption" with the phrases, "attributes" with the exact
      facts) and `{split}/*.png`. Read back by `Coco(split, root=folder)`.
    - `vg`: `image_data.json`, `region_descriptions.json` (one region a phrase, numbered afresh; pixels are whole
      numbers), `densecap_splits.json` and `VG_100K/*.jpg`. Has no masks or classes: a region without phrases is
      described by its name. Read back by `VisualGenome(split, root=folder)`.
    - `refcoco`: `instances.json`, `refs(unc).p` (one ref a region that has phrases) and `images/*.png`. Read back by
      `RefCoco(split, root=folder)`.

    The folder appears whole or not at all. A folder with something in it is refused with a ValueError, and so are ids
    that occur twice in one file.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are: {', '.join(FORMATS)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; name a new one, or clear it first")
    splits = dataset if isinstance(dataset, Mapping) else {getattr(dataset, "split", "train"): dataset}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        FORMATS[format]({split: islice(_samples(part), limit) for split, part in splits.items()}, partial)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _samples(dataset: Dataset) -> Iterator[Sample]:
    """In order; a dataset that can be iterated knows best which samples to pass over."""
    return iter(dataset) if hasattr(dataset, "__iter__") else map(dataset.__getitem__, range(len(dataset)))


def _coco(splits: Mapping[str, Iterator[Sample]], folder: Path) -> None:
    categories: dict[str, int] = {}
    contents = {}
    for split, samples in splits.items():
        seen = _Ids()
        images, annotations = [], []
        for sample in samples:
            seen.image(sample, split)
            file_name = f"{sample.image_id:012d}.png"
            _save(sample, folder / split / file_name)
            images.append(_image(sample, file_name))
            for region in sample.regions:
                extras = {"caption": list(region.phrases), "attributes": region.attributes}
                extras = {key: value for key, value in extras.items() if value}
                annotations.append(_annotation(region, sample.image_id, categories) | extras)
        contents[split] = images, annotations
    for split, (images, annotations) in contents.items():
        (folder / split).mkdir(exist_ok=True)
        _instances(folder / f"{split}.json", images, annotations, categories)


def _vg(splits: Mapping[str, Iterator[Sample]], folder: Path) -> None:
    seen = _Ids()
    listed: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    images, descriptions = [], []
    number = 0
    for split, samples in splits.items():
        places = listed.setdefault(split, [])
        for sample in samples:
            seen.image(sample, split)
            file_name = f"VG_100K/{sample.image_id}.jpg"
            _save(sample, folder / file_name, quality=95)
            width, height = sample.image.size
            places.append(sample.image_id)
            images.append(
                {
                    "image_id": sample.image_id,
                    "url": file_name,
                    "width": width,
                    "height": height,
                    "coco_id": None,
                    "flickr_id": None,
                }
            )
            regions = []
            for region in sample.regions:
                x1, y1, x2, y2 = (round(value) for value in region.box)
                for phrase in region.phrases or filter(None, (region.name,)):
                    number += 1
                    regions.append(
                        {
                            "region_id": number,
                            "image_id": sample.image_id,
                            "phrase": phrase,
                            "x": x1,
                            "y": y1,
                            "width": max(x2 - x1, 1),
                            "height": max(y2 - y1, 1),
                        }
                    )
            descriptions.append({"id": sample.image_id, "regions": regions})
    _write(folder / "image_data.json", images)
    _write(folder / "region_descriptions.json", descriptions)
    _write(folder / "densecap_splits.json", listed)


def _refcoco(splits: Mapping[str, Iterator[Sample]], folder: Path) -> None:
    seen = _Ids()
    categories: dict[str, int] = {}
    images, annotations = [], []
    refs: list[dict[str, Any]] = []
    sentences = 0
    for split, samples in splits.items():
        for sample in samples:
            seen.image(sample, split)
            file_name = f"{sample.image_id:012d}.png"
            _save(sample, folder / "images" / file_name)
            images.append(_image(sample, file_name))
            for place, region in enumerate(sample.regions):
                annotations.append(_annotation(region, sample.image_id, categories))
                if not region.phrases:
                    continue
                numbers = range(sentences, sentences + len(region.phrases))
                sentences = numbers.stop
                refs.append(
                    {
                        "ref_id": len(refs),
                        "ann_id": region.id,
                        "image_id": sample.image_id,
                        "category_id": annotations[-1]["category_id"],
                        "split": split,
                        "file_name": f"{sample.image_id:012d}_{place}.png",
                        "sent_ids": list(numbers),
                        "sentences": [
                            _sentence(raw, sent_id) for raw, sent_id in zip(region.phrases, numbers, strict=True)
                        ],
                    }
                )
    _instances(folder / "instances.json", images, annotations, categories)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


FORMATS: dict[str, Callable[[Mapping[str, Iterator[Sample]], Path], None]] = {
    "coco": _coco,
    "vg": _vg,
    "refcoco": _refcoco,
}


class _Ids:
    """Which images and regions one set of files has, and in which split."""

    def __init__(self) -> None:
        self.images: dict[int, str] = {}
        self.regions: dict[int, str] = {}

    def image(self, sample: Sample, split: str) -> None:
        _once("image", sample.image_id, split, self.images)
        for region in sample.regions:
            _once("region", region.id, split, self.regions)


def _once(kind: str, identity: int, split: str, seen: dict[int, str]) -> None:
    if identity in seen:
        raise ValueError(f"{kind} id {identity} of split {split!r} was there before, in split {seen[identity]!r}")
    seen[identity] = split


def _save(sample: Sample, path: Path, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    sample.image.convert("RGB").save(path, **options)


def _image(sample: Sample, file_name: str) -> dict[str, Any]:
    width, height = sample.image.size
    return {"id": sample.image_id, "file_name": file_name, "width": width, "height": height}


def _annotation(region: Region, image_id: int, categories: dict[str, int]) -> dict[str, Any]:
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


def _sentence(raw: str, sent_id: int) -> dict[str, Any]:
    """A sentence as the RefCOCO authors keep it: as it was typed, and in lower case without punctuation."""
    tokens = re.sub(r"[^\w\s]", "", raw.lower()).split()
    return {"raw": raw, "sent": " ".join(tokens), "sent_id": sent_id, "tokens": tokens}


def _instances(path: Path, images: list, annotations: list, categories: Mapping[str, int]) -> None:
    named = [{"id": number, "name": name, "supercategory": name} for name, number in categories.items()]
    _write(path, {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": named})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
