"""Write a detection dataset in the layout of Ultralytics YOLO: https://docs.ultralytics.com/datasets/detect/."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.atomic import create_writable_folder, write_file
from sca.io.text import escape_terminal
from sca.output.captioned_image import ImageOrSize
from sca.output.image_files import FilePerImage
from sca.output.jsonl import caption_to_record
from sca.output.omitted_regions import OmittedRegions
from sca.output.records import REGION_LABEL

IMAGE_FOLDER, LABEL_FOLDER, DATA_FILE = "images", "labels", "data.yaml"


class YoloWriter:
    """Writer of `images/STEM.png` and `labels/STEM.txt` in `folder`, written immediately, and `data.yaml` at the end.

    A line of a label file is the class of a region and its box: center x, center y, width and height as fractions of
    the image. The class is the name of the region, or "region". Captions, scores and masks are not written, because
    the layout stores no texts, and its polygons cannot represent masks with holes or several parts. Regions with
    neither a mask nor a box are omitted with a warning. `data.yaml` uses all images for training and validation.
    """

    def __init__(self, folder: Path, model: str | None = None):
        self._folder = folder
        for name in (IMAGE_FOLDER, LABEL_FOLDER):
            create_writable_folder(folder / name)
        self._images = FilePerImage(folder / IMAGE_FOLDER, ".png")
        self._labels = FilePerImage(folder / LABEL_FOLDER, ".txt")
        self._class_ids: dict[str, int] = {}
        self._omitted = OmittedRegions("YOLO labels", "a box")
        self._num_images = 0

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        lines = [self._format_line(caption_to_record(path, image, caption)) for caption in captions]
        self._omitted.add(path, lines.count(""))
        content = io.BytesIO()
        cast("Image.Image", image).save(content, "PNG", compress_level=4)
        self._images.write(path, content.getvalue())
        self._labels.write(path, "".join(lines))
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Write the names of the classes and sync the file names; the other files are complete already."""
        self._omitted.log_total()
        if finished or self._num_images:
            names = "".join(
                f"  {number}: {json.dumps(escape_terminal(name), ensure_ascii=False)}\n"
                for name, number in self._class_ids.items()
            )
            splits = f"train: {IMAGE_FOLDER}\nval: {IMAGE_FOLDER}\n"
            write_file(self._folder / DATA_FILE, f"{splits}names:\n{names}" if names else f"{splits}names: {{}}\n")
        self._images.close()
        self._labels.close()

    def _format_line(self, caption_record: dict[str, Any]) -> str:
        """Return the line of a region; "" without a box."""
        box = caption_record["box"] or (caption_record["mask"] and masks.mask_to_box(caption_record["mask"]))
        if not box:
            return ""
        x1, y1, x2, y2 = box
        width, height = caption_record["width"], caption_record["height"]
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        name = caption_record.get("name") or REGION_LABEL
        class_id = self._class_ids.setdefault(name, len(self._class_ids))
        return f"{class_id} {' '.join(map(str, values))}\n"
