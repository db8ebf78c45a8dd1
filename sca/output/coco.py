"""Write and read COCO JSON: instances with captions in one file that `pycocotools.coco.COCO` loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.annotations import coco
from sca.io.annotations.annotation import SkipCounter
from sca.io.atomic import AtomicFile
from sca.io.errors import InputError, RejectCallback
from sca.io.image_names import read_named_image_size
from sca.io.images import format_path
from sca.io.validation import is_int64, read_field, read_id, read_image_name, require_recorded_size
from sca.output.captioned_image import CaptionedImage, ImageOrSize, ImageSize
from sca.output.image_files import close_document
from sca.output.jsonl import caption_to_record
from sca.output.omitted_regions import OmittedRegions
from sca.output.records import REGION_LABEL, annotation_to_caption


class CocoWriter:
    """Writer of a COCO file. Annotations are written as they arrive; the file is renamed to its final name on close.

    Images and annotations are numbered from 1. An annotation has the fields of COCO's instances and captions, `score`
    and `region_id` (the index of the prompt in the request). `bbox` is x, y, width, height. The first category is
    "region"; each further name is a category.

    A region without a mask has its box as a polygon, as in pycocotools results that are boxes. Its `isbox` is 1, so
    that readers do not treat it as a mask. A region with neither is omitted with a warning.
    """

    def __init__(self, path: Path, model: str | None = None):
        self._file = AtomicFile(path)
        self._omitted = OmittedRegions("COCO annotations", "a mask or a box")
        self._images: list[dict[str, Any]] = []
        self._num_annotations = 0
        self._category_ids = {REGION_LABEL: 1}
        info = {"description": "captions of regions", "model": model}
        self._file.write(f'{{"info": {json.dumps(info)},\n"annotations": [')

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        image_id = len(self._images) + 1
        located = [caption for caption in captions if caption.mask or caption.box]
        self._omitted.add(path, len(captions) - len(located))
        lines = []
        for annotation_id, caption in enumerate(located, self._num_annotations + 1):
            category_id = self._category_ids.setdefault(caption.name or REGION_LABEL, len(self._category_ids) + 1)
            ids = {"id": annotation_id, "image_id": image_id, "category_id": category_id}
            lines.append(json.dumps({**ids, **_make_annotation(path, image, caption)}, allow_nan=False))
        if lines:
            self._file.write((",\n" if self._num_annotations else "\n") + ",\n".join(lines))
        self._num_annotations += len(lines)
        self._images.append({"id": image_id, "file_name": path, "width": image.width, "height": image.height})

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        self._omitted.log_total()
        categories = [{"id": number, "name": name, "supercategory": ""} for name, number in self._category_ids.items()]
        end = f'],\n"images": {json.dumps(self._images)},\n"categories": {json.dumps(categories)}}}\n'
        close_document(self._file, end, bool(self._images), finished)


def _make_annotation(path: str, image: ImageOrSize, caption: Caption) -> dict[str, Any]:
    caption_record = caption_to_record(path, image, caption)
    mask, box = caption_record["mask"], caption_record["box"]
    if box is None and mask:
        box = masks.mask_to_box(mask)
    x1, y1, x2, y2 = box or (0.0, 0.0, 0.0, 0.0)  # of an empty mask
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": masks.compute_mask_area(mask) if mask else (x2 - x1) * (y2 - y1),
        "segmentation": mask or [[x1, y1, x2, y1, x2, y2, x1, y2]],
        "iscrowd": 0,
        "isbox": int(not mask),
        "caption": caption_record["caption"],
        "score": caption_record["score"],
        "region_id": caption_record["region_id"],
        **{key: caption_record[key] for key in ("proposal_score",) if key in caption_record},
    }


def read_coco(
    content: Mapping[str, Any], path: Path, skip: SkipCounter, roots: Sequence[Path], reject: RejectCallback
) -> Iterator[CaptionedImage]:
    """Read the images of a COCO file; several records may name one file."""
    records_by_image_id: dict[Any, list[tuple[str, Any]]] = {}
    info = content.get("info")
    model = info.get("model") if isinstance(info, dict) else None
    category_names = coco.map_category_names(content)
    for index, each in enumerate(read_field(content, "annotations", list, format_path(path))):
        location = f"{format_path(path)}, annotations[{index}]"
        try:
            records_by_image_id.setdefault(read_id(each, "image_id", location), []).append((location, each))
        except InputError as error:
            reject(error)
    for index, image in enumerate(read_field(content, "images", list, format_path(path))):
        location, records = f"{format_path(path)}, images[{index}]", list[tuple[str, Any]]()
        try:
            records = records_by_image_id.pop(read_id(image, "id", location), [])
            file_name = read_image_name(image, "file_name", location)
            measured_size = None if {"width", "height"} <= image.keys() else read_named_image_size(file_name, roots)
            size = ImageSize(*measured_size) if measured_size else ImageSize(*require_recorded_size(image, location))
        except InputError as error:
            reject(error)
            for record_location, _ in records:
                skip("region of an image that cannot be used", record_location)
            continue
        captions: list[Caption] = []
        for record_location, each in records:
            try:
                annotation = coco.read_annotation(
                    each, record_location, size, category_names.get(str(each.get("category_id"))), skip
                )
                region_id = each["region_id"] if is_int64(each.get("region_id")) else len(captions)
                captions += [caption] if (caption := annotation_to_caption(annotation, size, region_id, skip)) else []
            except InputError as error:
                reject(error)
        yield CaptionedImage(file_name, size, captions, model)
    for record_location, _ in (each for records in records_by_image_id.values() for each in records):
        reject(
            InputError(f"{record_location}, 'image_id': no image has this id; add the image or remove the annotation")
        )
