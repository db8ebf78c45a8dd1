"""Write and read LabelMe files, one per image: https://github.com/wkentaro/labelme."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.annotations import labelme
from sca.io.annotations.annotation import SkipCounter
from sca.io.atomic import create_writable_folder
from sca.io.errors import InputError, RejectCallback
from sca.io.image_names import is_url, resolve_image_path
from sca.io.images import format_path
from sca.io.json import parse_json, read_regular_file
from sca.io.paths import make_relative_path, remove_parents
from sca.io.validation import read_image_name
from sca.output.captioned_image import CaptionedImage, ImageOrSize, ImageSize
from sca.output.image_files import FilePerImage
from sca.output.jsonl import caption_to_record
from sca.output.omitted_regions import OmittedRegions, find_first_point
from sca.output.records import REGION_LABEL, annotations_to_captions

LABELME_VERSION = "5.5.0"


class LabelMeWriter:
    """Writer of one `STEM.json` per image in `folder`, written immediately.

    A region is a shape described by its caption and labeled with its name, if it has one. A mask is a "mask" shape,
    exact to the pixel, a box a "rectangle" and a point a "point"; a region without any of them is omitted with a
    warning. `score`, `predicted_iou` and `proposal_score` are additional fields, which LabelMe keeps.
    """

    def __init__(self, folder: Path, model: str | None = None):
        create_writable_folder(folder)
        self._folder, self._model, self._files = folder, model, FilePerImage(folder, ".json")
        self._omitted = OmittedRegions("LabelMe files")

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        shapes = [shape for caption in captions if (shape := _make_shape(path, image, caption))]
        self._omitted.add(path, len(captions) - len(shapes))
        content: dict[str, Any] = {
            "version": LABELME_VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": path if is_url(path) else make_relative_path(path, self._folder),
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
            "model": self._model,
        }
        text = json.dumps(content, indent=2, allow_nan=False)
        self._files.write(path, text)

    def close(self, finished: bool = True) -> None:
        """Sync the file names; every file is complete already."""
        self._omitted.log_total()
        self._files.close()


def _make_shape(path: str, image: ImageOrSize, caption: Caption) -> dict[str, Any] | None:
    """Return the shape of a region; None without a mask, a box or a point."""
    caption_record = caption_to_record(path, image, caption)
    common_fields = {
        "label": caption_record.get("name", REGION_LABEL),
        "description": caption_record["caption"],
        "group_id": None,
        "flags": {},
        "score": caption_record["score"],
        "predicted_iou": caption_record["predicted_iou"],
        **{key: caption_record[key] for key in ("proposal_score",) if key in caption_record},
    }
    if caption_record["mask"] and (box := masks.mask_to_box(caption_record["mask"])):
        x1, y1, x2, y2 = (int(value) for value in box)
        mask_crop = masks.decode_rle(caption_record["mask"])[y1:y2, x1:x2]
        points = [[x1, y1], [x2 - 1, y2 - 1]]  # LabelMe includes the last pixel
        return {**common_fields, "shape_type": "mask", "points": points, "mask": _encode_png(mask_crop)}
    if caption_record["box"]:
        x1, y1, x2, y2 = caption_record["box"]
        return {**common_fields, "shape_type": "rectangle", "points": [[x1, y1], [x2, y2]], "mask": None}
    if point := find_first_point(caption_record):
        return {**common_fields, "shape_type": "point", "points": [[*point]], "mask": None}
    return None


def _encode_png(mask: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")


def read_labelme(
    paths: list[Path], folder: Path, skip: SkipCounter, reject: RejectCallback
) -> Iterator[CaptionedImage]:
    """Read LabelMe files, one image each."""
    if not paths:
        raise InputError(f"no .json files in {format_path(folder)}; a folder is read as LabelMe files")
    for path in paths:
        try:
            image = _read_labelme_image(path, skip, reject)
        except InputError as error:
            reject(error)
        else:
            yield image


def _read_labelme_image(path: Path, skip: SkipCounter, reject: RejectCallback) -> CaptionedImage:
    location = format_path(path)
    content = parse_json(read_regular_file(path), location, allow_surrogates=True)
    name = _resolve_image_name(path, read_image_name(content, "imagePath", location))
    size = ImageSize(*labelme.find_image_size(content, Path(name), location))
    captions = annotations_to_captions(
        labelme.read_annotations(content, size, location, skip, reject), size, skip, reject
    )
    embedded = partial(labelme.open_embedded_image, content, location) if content.get("imageData") else None
    return CaptionedImage(name, size, captions, content.get("model"), embedded)


def _resolve_image_name(path: Path, name: str) -> str:
    """Resolve the image that a file names relative to its own folder."""
    try:
        return str(remove_parents(resolve_image_path(name, [path.parent])))
    except InputError as error:
        raise InputError(f"{format_path(path)}, 'imagePath': {error}") from error
