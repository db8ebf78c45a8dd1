"""Write and read Label Studio tasks with predictions, in one JSON list to import.

Format: https://labelstud.io/guide/predictions. A region with a mask is a brush, else one with a box is a rectangle,
else it is a keypoint. Its label is its name, or "region". Its caption is a text area with the same id.
`LABELING_CONFIG` is the labeling interface that shows them; names require further labels in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.annotations import label_studio
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.brush_rle import encode_brush_rle
from sca.io.atomic import AtomicFile
from sca.io.errors import RejectCallback
from sca.io.image_names import add_image_prefix, read_named_image_size
from sca.io.images import format_path
from sca.output.captioned_image import CaptionedImage, ImageOrSize, ImageSize
from sca.output.image_files import close_document
from sca.output.jsonl import caption_to_record
from sca.output.records import REGION_LABEL, annotations_to_captions

LABELING_CONFIG = f"""<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="mask" toName="image"><Label value="{REGION_LABEL}"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="{REGION_LABEL}"/></RectangleLabels>
  <KeyPointLabels name="point" toName="image"><Label value="{REGION_LABEL}"/></KeyPointLabels>
  <TextArea name="caption" toName="image" perRegion="true" editable="true"/>
</View>
"""
KEYPOINT_WIDTH_PERCENT = 1  # drawn width of a keypoint, as a percentage of the image


class LabelStudioWriter:
    """Writer of one task per image.

    Coordinates are percentages of the image. A region with neither mask nor box is its first point.

    Args:
        path: Output file.
        model: Name of the model to record.
        image_prefix: URL prefix of the images, see `add_image_prefix`.
    """

    def __init__(self, path: Path, model: str | None = None, image_prefix: str = ""):
        self._image_prefix = image_prefix
        self._file = AtomicFile(path)
        self._model, self._num_images = model, 0
        self._file.write("[")

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        results = [
            result for index, caption in enumerate(captions) for result in _make_results(index, path, image, caption)
        ]
        data = {"image": add_image_prefix(path, self._image_prefix), "width": image.width, "height": image.height}
        task = {"data": data, "predictions": [{"model_version": self._model or "", "result": results}]}
        self._file.write((",\n" if self._num_images else "\n") + json.dumps(task, allow_nan=False))
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        close_document(self._file, "\n]\n", bool(self._num_images), finished)


def _make_results(index: int, path: str, image: ImageOrSize, caption: Caption) -> list[dict[str, Any]]:
    caption_record = caption_to_record(path, image, caption)
    width, height = image.size
    common_fields = {
        "id": f"region-{index}",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
    }
    score = {} if caption_record["score"] is None else {"score": caption_record["score"]}
    labels = [caption_record.get("name", REGION_LABEL)]
    value: dict[str, Any]
    if caption_record["mask"]:
        value = {
            "format": "rle",
            "rle": encode_brush_rle(masks.decode_rle(caption_record["mask"])),
            "brushlabels": labels,
        }
        shape_result = {**common_fields, "type": "brushlabels", "from_name": "mask", "value": value, **score}
    elif caption_record["box"]:
        x1, y1, x2, y2 = caption_record["box"]
        value = {
            "x": 100 * x1 / width,
            "y": 100 * y1 / height,
            "width": 100 * (x2 - x1) / width,
            "height": 100 * (y2 - y1) / height,
            "rotation": 0,
            "rectanglelabels": labels,
        }
        shape_result = {**common_fields, "type": "rectanglelabels", "from_name": "box", "value": value, **score}
    else:
        x, y, _ = caption_record["prompt"]["points"][0] if caption_record["prompt"].get("points") else (0, 0, 1)
        value = {
            "x": 100 * x / width,
            "y": 100 * y / height,
            "width": KEYPOINT_WIDTH_PERCENT,
            "keypointlabels": labels,
        }
        shape_result = {**common_fields, "type": "keypointlabels", "from_name": "point", "value": value, **score}
    text_result = {
        **common_fields,
        "type": "textarea",
        "from_name": "caption",
        "value": {"text": [caption_record["caption"]]},
    }
    return [shape_result, text_result]


def read_label_studio(
    content: Any, path: Path, skip: SkipCounter, roots: Sequence[Path], reject: RejectCallback
) -> Iterator[CaptionedImage]:
    """Read the images of Label Studio tasks; images of unknown size are counted as skipped."""
    measure_size = partial(read_named_image_size, roots=roots)
    for image in label_studio.read_tasks(content, format_path(path), skip, measure_size, reject):
        size = image.size or measure_size(image.name)
        if size is None:
            skip("image without regions, whose size is unknown", f"{image.location}, {format_path(image.name)}")
            continue
        yield CaptionedImage(
            image.name,
            ImageSize(*size),
            annotations_to_captions(image.annotations, ImageSize(*size), skip, reject),
            image.model,
        )
