"""Label Studio tasks with predictions, in one JSON list to import.

https://labelstud.io/guide/predictions. A region is a brush where it has a mask, else a rectangle where it has a
box, else a keypoint; its caption is a text area of the same id. `CONFIG` is the labeling interface that shows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.annotations import label_studio
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.brush import pack
from sca.io.atomic import AtomicFile
from sca.io.errors import Reject
from sca.io.image_names import add_image_prefix, measure_named_image
from sca.io.images import show
from sca.output.captioned import Captioned, Size
from sca.output.files import close_document
from sca.output.jsonl import record
from sca.output.records import to_captions

LABEL = "region"
CONFIG = f"""<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="mask" toName="image"><Label value="{LABEL}"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="{LABEL}"/></RectangleLabels>
  <KeyPointLabels name="point" toName="image"><Label value="{LABEL}"/></KeyPointLabels>
  <TextArea name="caption" toName="image" perRegion="true" editable="true"/>
</View>
"""
POINT_WIDTH = 1  # of a keypoint as it is drawn, in per cent of the image


class LabelStudio:
    """A task an image. Sizes are per cent of the image; a region with neither mask nor box has its first point.

    image_prefix: where Label Studio finds the images, see `add_image_prefix`.
    """

    def __init__(self, path: Path, model: str | None = None, image_prefix: str = ""):
        self._image_prefix = image_prefix
        self._file = AtomicFile(path)
        self._model, self._images = model, 0
        self._file.write("[")

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        results = [piece for place, caption in enumerate(captions) for piece in _results(place, path, image, caption)]
        data = {"image": add_image_prefix(path, self._image_prefix), "width": image.width, "height": image.height}
        task = {"data": data, "predictions": [{"model_version": self._model or "", "result": results}]}
        self._file.write((",\n" if self._images else "\n") + json.dumps(task, allow_nan=False))
        self._images += 1

    def close(self, finished: bool = True) -> None:
        """Keep the images that are done. A run that did not finish leaves an older file unchanged."""
        close_document(self._file, "\n]\n", bool(self._images), finished)


def _results(place: int, path: str, image: Image.Image, caption: Caption) -> list[dict[str, Any]]:
    plain = record(path, image, caption)
    width, height = image.size
    head = {
        "id": f"region-{place}",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
    }
    score = {} if plain["score"] is None else {"score": plain["score"]}
    if plain["mask"]:
        value = {"format": "rle", "rle": pack(masks.decode(plain["mask"])), "brushlabels": [LABEL]}
        shape = {**head, "type": "brushlabels", "from_name": "mask", "value": value, **score}
    elif plain["box"]:
        x1, y1, x2, y2 = plain["box"]
        value = {
            "x": 100 * x1 / width,
            "y": 100 * y1 / height,
            "width": 100 * (x2 - x1) / width,
            "height": 100 * (y2 - y1) / height,
            "rotation": 0,
            "rectanglelabels": [LABEL],
        }
        shape = {**head, "type": "rectanglelabels", "from_name": "box", "value": value, **score}
    else:
        x, y, _ = plain["prompt"]["points"][0] if plain["prompt"].get("points") else (0, 0, 1)
        value = {"x": 100 * x / width, "y": 100 * y / height, "width": POINT_WIDTH, "keypointlabels": [LABEL]}
        shape = {**head, "type": "keypointlabels", "from_name": "point", "value": value, **score}
    words = {**head, "type": "textarea", "from_name": "caption", "value": {"text": [plain["caption"]]}}
    return [shape, words]


def read_label_studio(
    content: Any, path: Path, skip: SkipCounter, roots: Sequence[Path], reject: Reject
) -> Iterator[Captioned]:
    """Read the images of Label Studio tasks; an image without a known size is counted."""
    measure = partial(measure_named_image, roots=roots)
    for image in label_studio.read_tasks(content, show(path), skip, measure, reject):
        size = image.size or measure(image.name)
        if size is None:
            skip("image without regions, whose size is unknown", f"{image.place}, {show(image.name)}")
            continue
        yield Captioned(image.name, Size(*size), to_captions(image.annotations, Size(*size), skip, reject), image.model)
