"""COCO JSON, written and read: instances with captions, in one file that `pycocotools.coco.COCO` loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.annotations import coco
from sca.io.annotations.annotation import SkipCounter
from sca.io.atomic import AtomicFile
from sca.io.errors import InputError, Reject
from sca.io.image_names import measure_named_image
from sca.io.images import show
from sca.io.validation import is_int64, read_field, read_id, read_name, require_size
from sca.output.captioned import Captioned, Size
from sca.output.files import close_document
from sca.output.jsonl import record
from sca.output.records import to_caption

CATEGORY = {"id": 1, "name": "region", "supercategory": ""}


class Coco:
    """Annotations go to disk as they come; the file has its name when it is closed.

    Images and annotations are numbered from 1. An annotation has what COCO's instances and captions have, and `score`
    and `region` (the prompt's place in the request). `bbox` is x, y, width, height. A region without a mask has its box
    as a polygon, as pycocotools does for results that are boxes, and `isbox` 1, so that it is no mask when it is read
    again; one with neither has an empty `bbox` and no polygon.
    """

    def __init__(self, path: Path, model: str | None = None):
        self._file = AtomicFile(path)
        self._images: list[dict[str, Any]] = []
        self._annotations = 0
        info = {"description": "captions of regions", "model": model}
        self._file.write(f'{{"info": {json.dumps(info)},\n"annotations": [')

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        number = len(self._images) + 1
        lines = [
            json.dumps(_annotation(place, number, path, image, caption), allow_nan=False)
            for place, caption in enumerate(captions, self._annotations + 1)
        ]
        if lines:
            self._file.write((",\n" if self._annotations else "\n") + ",\n".join(lines))
        self._annotations += len(lines)
        self._images.append({"id": number, "file_name": path, "width": image.width, "height": image.height})

    def close(self, finished: bool = True) -> None:
        """Keep the images that are done. A run that did not finish leaves an older file unchanged."""
        end = f'],\n"images": {json.dumps(self._images)},\n"categories": {json.dumps([CATEGORY])}}}\n'
        close_document(self._file, end, bool(self._images), finished)


def _annotation(number: int, image_number: int, path: str, image: Image.Image, caption: Caption) -> dict[str, Any]:
    plain = record(path, image, caption)
    mask, box = plain["mask"], plain["box"]
    if box is None and mask:
        box = masks.box_of(mask)
    x1, y1, x2, y2 = box or (0.0, 0.0, 0.0, 0.0)
    return {
        "id": number,
        "image_id": image_number,
        "category_id": CATEGORY["id"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": masks.area(mask) if mask else (x2 - x1) * (y2 - y1),
        "segmentation": mask or ([[x1, y1, x2, y1, x2, y2, x1, y2]] if box else []),
        "iscrowd": 0,
        "isbox": int(bool(box and not mask)),
        "caption": plain["caption"],
        "score": plain["score"],
        "region": plain["region"],
    }


def read_coco(
    content: Mapping[str, Any], path: Path, skip: SkipCounter, roots: Sequence[Path], reject: Reject
) -> Iterator[Captioned]:
    """Read the images of a COCO file, also where several records name one file."""
    told: dict[Any, list[tuple[str, Any]]] = {}
    info = content.get("info")
    model = info.get("model") if isinstance(info, dict) else None
    names = coco.name_categories(content)
    for number, each in enumerate(read_field(content, "annotations", list, show(path))):
        where = f"{show(path)}, annotations[{number}]"
        try:
            told.setdefault(read_id(each, "image_id", where), []).append((where, each))
        except InputError as error:
            reject(error)
    for number, image in enumerate(read_field(content, "images", list, show(path))):
        where, records = f"{show(path)}, images[{number}]", list[tuple[str, Any]]()
        try:
            records = told.pop(read_id(image, "id", where), [])
            file_name = read_name(image, "file_name", where)
            measured = None if {"width", "height"} <= image.keys() else measure_named_image(file_name, roots)
            size = Size(*measured) if measured else Size(*require_size(image, where))
        except InputError as error:
            reject(error)
            for place, _ in records:
                skip("region of an image that cannot be used", place)
            continue
        captions = []
        for place, each in records:
            try:
                annotation = coco.read_annotation(each, place, size, names.get(str(each.get("category_id"))), skip)
                region = each["region"] if is_int64(each.get("region")) else len(captions)
                captions += [caption] if (caption := to_caption(annotation, size, region, skip)) else []
            except InputError as error:
                reject(error)
        yield Captioned(file_name, size, captions, model)
    for place, _ in (each for records in told.values() for each in records):
        reject(InputError(f"{place}, 'image_id': no image has this id; add the image or remove the annotation"))
