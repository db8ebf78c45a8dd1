"""LabelMe files, one an image: https://github.com/wkentaro/labelme."""

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
from sca.io.atomic import open_folder
from sca.io.errors import InputError, Reject
from sca.io.image_names import find_image, is_url
from sca.io.images import show
from sca.io.json import parse_json, read_regular_file
from sca.io.paths import relative_path, remove_parents
from sca.io.validation import read_name
from sca.output.captioned import Captioned, Size
from sca.output.files import FilePerImage
from sca.output.jsonl import record
from sca.output.records import to_captions

VERSION = "5.5.0"
LABEL = "region"


class LabelMe:
    """`STEM.json` in `folder` for each image, as soon as it is done. A region is a shape, described by its caption.

    A mask is a shape of the kind "mask", exact to the pixel; a box a "rectangle", and a point a "point". `score` and
    `iou` stand beside what LabelMe knows, which keeps them.
    """

    def __init__(self, folder: Path, model: str | None = None):
        open_folder(folder)
        self._folder, self._model, self._files = folder, model, FilePerImage(folder, ".json")

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        content = {
            "version": VERSION,
            "flags": {},
            "shapes": [_shape(path, image, caption) for caption in captions],
            "imagePath": path if is_url(path) else relative_path(path, self._folder),
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
            "model": self._model,
        }
        text = json.dumps(content, indent=2, allow_nan=False)
        self._files.write(path, text)

    def close(self, finished: bool = True) -> None:
        """Every file is complete already."""
        self._files.close()


def _shape(path: str, image: Image.Image, caption: Caption) -> dict[str, Any]:
    plain = record(path, image, caption)
    shape = {
        "label": LABEL,
        "description": plain["caption"],
        "group_id": None,
        "flags": {},
        "score": plain["score"],
        "iou": plain["iou"],
    }
    if plain["mask"] and (box := masks.box_of(plain["mask"])):
        x1, y1, x2, y2 = (int(value) for value in box)
        inside = masks.decode(plain["mask"])[y1:y2, x1:x2]
        points = [[x1, y1], [x2 - 1, y2 - 1]]  # LabelMe counts the last pixel in
        return {**shape, "shape_type": "mask", "points": points, "mask": _png(inside)}
    if plain["box"]:
        x1, y1, x2, y2 = plain["box"]
        return {**shape, "shape_type": "rectangle", "points": [[x1, y1], [x2, y2]], "mask": None}
    points = [[x, y] for x, y, _ in plain["prompt"].get("points", [[0, 0, 1]])][:1]
    return {**shape, "shape_type": "point", "points": points, "mask": None}


def _png(mask: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")


def read_labelme(paths: list[Path], folder: Path, skip: SkipCounter, reject: Reject) -> Iterator[Captioned]:
    """Read LabelMe files, one image each."""
    if not paths:
        raise InputError(f"no .json files in {show(folder)}; a folder is read as LabelMe files")
    for path in paths:
        try:
            image = _labelme_file(path, skip, reject)
        except InputError as error:
            reject(error)
        else:
            yield image


def _labelme_file(path: Path, skip: SkipCounter, reject: Reject) -> Captioned:
    where = show(path)
    content = parse_json(read_regular_file(path), where, surrogates=True)
    name = _image_beside(path, read_name(content, "imagePath", where))
    size = Size(*labelme.find_size(content, Path(name), where))
    regions = to_captions(labelme.read_shapes(content, size, where, skip, reject), size, skip, reject)
    embedded = partial(labelme.open_embedded, content, where) if content.get("imageData") else None
    return Captioned(name, size, regions, content.get("model"), embedded)


def _image_beside(path: Path, name: str) -> str:
    """The image that a file names relative to its own folder."""
    try:
        return str(remove_parents(find_image(name, [path.parent])))
    except InputError as error:
        raise InputError(f"{show(path)}, 'imagePath': {error}") from error
