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
from sca.io.errors import InputError, RejectCallback
from sca.io.image_names import add_image_prefix, read_named_image_size
from sca.io.images import format_path
from sca.output.captioned_image import CaptionedImage, ImageOrSize, ImageSize
from sca.output.image_files import close_document
from sca.output.jsonl import caption_to_record
from sca.output.labeling_interface import Control, LabelingInterface
from sca.output.omitted_regions import OmittedRegions, find_first_point
from sca.output.records import REGION_LABEL, annotations_to_captions

LABELING_CONFIG = f"""<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="mask" toName="image"><Label value="{REGION_LABEL}"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="{REGION_LABEL}"/></RectangleLabels>
  <KeyPointLabels name="point" toName="image"><Label value="{REGION_LABEL}"/></KeyPointLabels>
  <TextArea name="caption" toName="image" perRegion="true" editable="true"/>
</View>
"""
ANY_LABELS = LabelingInterface(  # the controls of LABELING_CONFIG, with further labels
    mask=Control("mask"), box=Control("box"), point=Control("point"), caption="caption"
)
KEYPOINT_WIDTH_PERCENT = 1  # drawn width of a keypoint, as a percentage of the image


class LabelStudioWriter:
    """Writer of one task per image.

    Coordinates are percentages of the image. A region with neither mask nor box is its first point; without a point it
    is omitted with a warning.

    Args:
        path: Output file.
        model: Name of the model to record.
        image_prefix: URL prefix of the images, see `add_image_prefix`.
    """

    def __init__(self, path: Path, model: str | None = None, image_prefix: str = ""):
        self._image_prefix = image_prefix
        self._file = AtomicFile(path)
        self._omitted = OmittedRegions("Label Studio predictions")
        self._model, self._num_images = model, 0
        self._file.write("[")

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        results_by_region = [
            make_results(caption_to_record(path, image, caption), f"region-{index}", ANY_LABELS)
            for index, caption in enumerate(captions)
        ]
        self._omitted.add(path, results_by_region.count([]))
        results = [result for region_results in results_by_region for result in region_results]
        data = {"image": add_image_prefix(path, self._image_prefix), "width": image.width, "height": image.height}
        task = {"data": data, "predictions": [{"model_version": self._model or "", "result": results}]}
        self._file.write((",\n" if self._num_images else "\n") + json.dumps(task, allow_nan=False))
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        self._omitted.log_total()
        close_document(self._file, "\n]\n", bool(self._num_images), finished)


def make_results(
    caption_record: dict[str, Any], region_id: str, interface: LabelingInterface, labels: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the results of a region: its shape, and its caption as a text area or as metadata of the shape.

    Args:
        caption_record: Record of the region, see `sca.output.jsonl.caption_to_record`.
        region_id: Id of the region, unique in its prediction.
        interface: Controls of the project.
        labels: Preferred labels. The others are the name of the region, and "region".

    Returns:
        The results; none for a region without a mask, a box or a point.

    Raises:
        InputError: No control can show the region.
    """
    common_fields = {
        "id": region_id,
        "to_name": interface.image,
        "original_width": caption_record["width"],
        "original_height": caption_record["height"],
        "image_rotation": 0,
    }
    shape = _make_shape(caption_record, interface)
    if shape is None:
        return []
    shape_type, control, value = shape
    value[shape_type] = control.choose_labels(labels, (caption_record.get("name"), REGION_LABEL))
    score = {} if caption_record["score"] is None else {"score": caption_record["score"]}
    texts = [caption_record["caption"]]
    shape_result = {**common_fields, "type": shape_type, "from_name": control.name, "value": value, **score}
    if interface.caption is None:
        return [{**shape_result, "meta": {"text": texts}}]
    text_result = {**common_fields, "type": "textarea", "from_name": interface.caption, "value": {"text": texts}}
    return [shape_result, text_result]


def _make_shape(
    caption_record: dict[str, Any], interface: LabelingInterface
) -> tuple[str, Control, dict[str, Any]] | None:
    """Return the type of a shape, its control, and its value without a label; None without coordinates."""
    width, height = caption_record["width"], caption_record["height"]
    mask, box = caption_record["mask"], caption_record["box"]
    if mask and interface.mask:
        return "brushlabels", interface.mask, {"format": "rle", "rle": encode_brush_rle(masks.decode_rle(mask))}
    if box and interface.box:
        x1, y1, x2, y2 = box
        value = {"x": 100 * x1 / width, "y": 100 * y1 / height}
        value |= {"width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height, "rotation": 0}
        return "rectanglelabels", interface.box, value
    point = find_first_point(caption_record)
    if not (mask or box or point):
        return None
    if point is None or interface.point is None:
        missing = "mask" if box else "box"
        required = "RectangleLabels" if box else "KeyPointLabels" if point else "BrushLabels"
        raise InputError(f"a region has no {missing}; add {required} to the labeling configuration")
    x, y = point
    value = {"x": 100 * x / width, "y": 100 * y / height, "width": KEYPOINT_WIDTH_PERCENT}
    return "keypointlabels", interface.point, value


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
