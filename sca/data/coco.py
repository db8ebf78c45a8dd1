"""Datasets in the layout of COCO instances: boxes, masks and class names, and captions where the annotations have them.

The JSON is checked record by record when it is read, so that a broken file is refused with its place and not met as a
strange loss later; damaged pictures are left out when they are found, counted in `skipped`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pycocotools import mask as rle
from sca_registry.contracts import Region, Sample

EXAMPLES = 5  # how many of each kind of skipped thing are remembered by name
BAD_IMAGES = ("image missing", "image unreadable", "image of another size")  # what counts towards `max_bad`


class Coco:
    """Dataset: `Coco("train", root=FOLDER)[i]` -> `Sample`, from COCO instances JSON and a folder of pictures.

    `root` holds either `train.json` and `train/`, or `annotations/instances_train2017.json` and `train2017/` (for the
    split "train"); `annotations` and `images` name a file and a folder outright, in place of those.

    Segmentations may be polygons, uncompressed or compressed RLE; every region's mask is compressed RLE, made when the
    sample is asked for. A region's name is its category's; its phrases are the annotation's "caption" (a string or a
    list of them), and its attributes the annotation's "attributes".

    Crowds are left out; boxes are clipped to the image, and left out if nothing remains; polygons of fewer than three
    points are dropped; images that have no region left, or whose file is missing, are left out. An unreadable picture,
    or one whose size (as its viewer sees it, EXIF rotation applied) is not the recorded one, is found only when it is
    asked for: iteration then passes over it and an index gives the next readable sample in its place. All are counted
    by reason in `skipped`, the first of each named in `examples`; more than `max_bad` bad images is a ValueError.
    So is a file that is missing or cut off, a record without a needed field, an id that is given twice or leads
    nowhere; the message names file, record and field.
    """

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        max_bad: int = 100,
    ):
        self.split, self.max_bad = split, max_bad
        self.annotations, self.images = _files(split, root, annotations, images)
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._bad: set[str] = set()  # file names, so that a picture met twice counts once
        self.attributes: dict[str, tuple[str, ...]] = {}  # what auxiliary losses may name: the classes
        self._records = self._read()  # one JSON text an image: small, and nothing to copy when workers fork

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.annotations}")
        for step in range(len(self)):
            sample = self._sample((index + step) % len(self))
            if sample is not None:
                return sample
        raise ValueError(f"no picture in {self.images} can be read; {self._account()}")

    def __iter__(self) -> Iterator[Sample]:
        """Every readable sample once."""
        samples = (self._sample(index) for index in range(len(self)))
        return (sample for sample in samples if sample is not None)

    def _sample(self, index: int) -> Sample | None:
        record = json.loads(self._records[index])
        name, size = record["file_name"], (record["width"], record["height"])
        try:
            with Image.open(self.images / name) as stored:
                image = ImageOps.exif_transpose(stored).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self._skip_image("image unreadable", name, f"{name} ({error})")
            return None
        if image.size != size:
            self._skip_image("image of another size", name, f"{name} ({image.size}, recorded as {size})")
            return None
        return Sample(image, record["id"], tuple(self._region(region, record) for region in record["regions"]))

    def _region(self, region: dict[str, Any], record: dict[str, Any]) -> Region:
        name, box = region["name"], tuple(region["box"])
        attributes = {key: tuple(v) if isinstance(v, list) else v for key, v in region["attributes"].items()}
        mask = _encoded(region["segmentation"], record["height"], record["width"])
        return Region(region["id"], box, mask, name, tuple(region["caption"]), attributes)

    def _read(self) -> list[bytes]:
        content = _load(self.annotations)
        where = str(self.annotations)
        categories = {
            _field(record, "id", int, place): _field(record, "name", str, place)
            for record, place in _listed(content, "categories", where)
        }
        images = {}
        self.attributes = {"name": tuple(dict.fromkeys(categories.values()))}
        for record, place in _listed(content, "images", where):
            kept = {"file_name": _field(record, "file_name", str, place)}
            kept |= {key: _field(record, key, int, place) for key in ("id", "width", "height")}
            if min(kept["width"], kept["height"]) < 1:
                raise ValueError(f"{place}: {kept['width']} x {kept['height']} is no size for an image")
            images[kept["id"]] = {**kept, "regions": []}
        for record, place in _listed(content, "annotations", where):
            image_id = _field(record, "image_id", int, place)
            if image_id not in images:
                raise ValueError(f"{place}: image_id {image_id} is not among the images")
            category = _field(record, "category_id", int, place)
            if category not in categories:
                raise ValueError(f"{place}: category_id {category} has no name among the categories")
            self._keep(record, categories[category], images[image_id], place)
        del content

        present = set(os.listdir(self.images))
        records = []
        for image in images.values():
            name = image["file_name"]
            if name not in present and not (self.images / name).is_file():
                self._skip_image("image missing", name, name, stop=False)
            elif not image["regions"]:
                self._skip("image without regions", name)
            else:
                records.append(json.dumps(image).encode())
        self._stop_if_too_many()
        return records

    def _keep(self, record: dict[str, Any], name: str, image: dict[str, Any], place: str) -> None:
        """Puts what is needed of one annotation into its image, or counts why it is left out."""
        if record.get("iscrowd"):
            return self._skip("crowd", place)
        bbox = _field(record, "bbox", list, place)
        if len(bbox) != 4 or not all(_is_number(value) for value in bbox):
            raise ValueError(f"{place}: bbox must be four numbers (x, y, width, height), not {bbox}")
        x, y, width, height = bbox
        width_limit, height_limit = image["width"], image["height"]
        given = (x, y, x + width, y + height)
        box = [min(max(float(v), 0.0), limit) for v, limit in zip(given, (width_limit, height_limit) * 2, strict=True)]
        if box[2] <= box[0] or box[3] <= box[1]:
            return self._skip("empty box", place)
        if tuple(box) != given:
            self._skip("box clipped", place)
        caption = record.get("caption") or []
        caption = [caption] if isinstance(caption, str) else caption
        if not isinstance(caption, list) or not all(isinstance(phrase, str) for phrase in caption):
            raise ValueError(f"{place}: caption must be a string or a list of strings, not {caption!r}")
        attributes = record.get("attributes") or {}
        if not isinstance(attributes, dict):
            raise ValueError(f"{place}: attributes must be a table of names and values, not {attributes!r}")
        image["regions"].append(
            {
                "id": record["id"],
                "box": box,
                "name": name,
                "segmentation": self._segmentation(record.get("segmentation"), image, place),
                "caption": [phrase.strip() for phrase in caption if phrase.strip()],
                "attributes": attributes,
            }
        )

    def _segmentation(self, given: Any, image: dict[str, Any], place: str) -> list | dict | None:
        """Checked, and as it was written; None if there is none."""
        if not given:
            return None
        if isinstance(given, list):
            for polygon in given:
                if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(_is_number, polygon)):
                    raise ValueError(f"{place}: segmentation must be lists of x, y, x, y, ... for its polygons")
            polygons = [polygon for polygon in given if len(polygon) >= 6]
            if len(polygons) < len(given):
                self._skip("polygon of fewer than three points", place)
            return polygons or None
        size = [image["height"], image["width"]]
        if not isinstance(given, dict) or not isinstance(given.get("counts"), str | list):
            raise ValueError(f"{place}: segmentation must be polygons, or RLE with size and counts")
        if given.get("size") != size:
            raise ValueError(
                f"{place}: segmentation has size {given.get('size')} in an image of {size} (height, width)"
            )
        counts = given["counts"]
        pixels = math.prod(size)
        if isinstance(counts, list) and not (all(type(n) is int and n >= 0 for n in counts) and sum(counts) == pixels):
            raise ValueError(f"{place}: segmentation counts do not add up to the {pixels} pixels of the image")
        return {"size": size, "counts": counts}

    def _skip(self, reason: str, what: str) -> None:
        self.skipped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(what)

    def _skip_image(self, reason: str, name: str, what: str, stop: bool = True) -> None:
        if name not in self._bad:
            self._bad.add(name)
            self._skip(reason, what)
            if stop:
                self._stop_if_too_many()

    def _stop_if_too_many(self) -> None:
        if len(self._bad) > self.max_bad:
            raise ValueError(
                f"{len(self._bad)} images of {self.annotations} cannot be used, more than max_bad={self.max_bad}; "
                f"{self._account()}. Are the pictures in {self.images} whole and the right ones?"
            )

    def _account(self) -> str:
        found = {reason: self.examples[reason] for reason in BAD_IMAGES if self.skipped[reason]}
        return "; ".join(f"{reason}: {self.skipped[reason]}, such as {', '.join(e)}" for reason, e in found.items())


def _files(
    split: str, root: str | Path | None, annotations: str | Path | None, images: str | Path | None
) -> tuple[Path, Path]:
    """The annotation file and the image folder, both there."""
    if root is not None:
        names = (split, split), (f"annotations/instances_{split}2017", f"{split}2017")
        layouts = [(annotations or f"{root}/{file}.json", images or f"{root}/{folder}") for file, folder in names]
    elif annotations is not None and images is not None:
        layouts = [(annotations, images)]
    else:
        raise ValueError("give root=FOLDER, or both annotations=FILE and images=FOLDER")
    paths = [(Path(file), Path(folder)) for file, folder in layouts]
    for file, folder in paths:
        if file.is_file() and folder.is_dir():
            return file, folder
    looked = " or ".join(f"{file} with {folder}{os.sep}" for file, folder in paths)
    missing = dict.fromkeys(str(path) for pair in paths for path in pair if not path.exists())
    raise ValueError(f"no COCO data for split {split!r}: looked for {looked}; not there: {', '.join(missing)}")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not whole JSON: {error.msg} at character {error.pos} of {len(error.doc)}; "
            "was it cut off while it was copied or downloaded?"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: COCO instances are an object with images, annotations and categories")
    return content


def _listed(content: dict[str, Any], key: str, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each record of one list, taken out of `content`, with the words that name it; ids are checked to be unique."""
    if not isinstance(content.get(key), list):
        raise ValueError(f"{where}: no list {key!r}; it has: {', '.join(content) or 'nothing'}")
    seen = set()
    for number, record in enumerate(content.pop(key)):
        place = f"{where}: {key}[{number}]"
        if not isinstance(record, dict):
            raise ValueError(f"{place} must be an object, not {record!r}")
        identity = _field(record, "id", int, place)
        place = f"{place} (id {identity})"
        if identity in seen:
            raise ValueError(f"{place}: this id was given before")
        seen.add(identity)
        yield record, place


def _field(record: dict[str, Any], key: str, kind: type, place: str) -> Any:
    if key not in record:
        raise ValueError(f"{place}: no {key!r}; it has: {', '.join(record) or 'nothing'}")
    value = record[key]
    if type(value) is not kind:
        wanted = {int: "a whole number", str: "a string", list: "a list"}[kind]
        raise ValueError(f"{place}: {key} must be {wanted}, not {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _encoded(segmentation: list | dict | None, height: int, width: int) -> dict[str, Any] | None:
    """Compressed RLE with its counts as a string."""
    if segmentation is None:
        return None
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return segmentation
    code = rle.frPyObjects(segmentation, height, width)
    code = rle.merge(code) if isinstance(code, list) else code
    return {"size": [height, width], "counts": code["counts"].decode()}
