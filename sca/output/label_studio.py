"""Label Studio tasks with predictions, in one JSON list to import.

https://labelstud.io/guide/predictions. A region is a brush where it has a mask and a rectangle otherwise, with its
caption as a text area of the same id; `CONFIG` is the labelling interface that shows them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Caption

from sca import masks
from sca.io.atomic import AtomicFile
from sca.io.paths import add_image_prefix
from sca.output.jsonl import record

LABEL = "region"
CONFIG = f"""<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="mask" toName="image"><Label value="{LABEL}"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="{LABEL}"/></RectangleLabels>
  <TextArea name="caption" toName="image" perRegion="true" editable="true"/>
</View>
"""
SIZES = (3, 4, 8, 16)  # bits of a run's length; each run says which of them it has


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
        if not finished and (self._file.replaces or not self._images):
            self._file.drop()
            return
        try:
            self._file.write("\n]\n")
        except BaseException:
            self._file.drop()
            raise
        self._file.keep()


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
    else:
        x1, y1, x2, y2 = plain["box"] or _around(plain["prompt"])
        value = {
            "x": 100 * x1 / width,
            "y": 100 * y1 / height,
            "width": 100 * (x2 - x1) / width,
            "height": 100 * (y2 - y1) / height,
            "rotation": 0,
        }
        named = {**value, "rectanglelabels": [LABEL]}
        shape = {**head, "type": "rectanglelabels", "from_name": "box", "value": named, **score}
    words = {**head, "type": "textarea", "from_name": "caption", "value": {"text": [plain["caption"]]}}
    return [shape, words]


def _around(prompt: dict[str, Any]) -> tuple[float, float, float, float]:
    """The pixel of the first point."""
    x, y, _ = prompt["points"][0] if prompt.get("points") else (0, 0, 1)
    return x, y, x + 1, y + 1


def pack(mask: np.ndarray) -> list[int]:
    """(height, width) bool -> the bytes of Label Studio's own run-length code: thi.ng/rle-pack of an RGBA picture.

    The count of values (32 bits), the bits of a value less one (5), the four sizes less one (4 bits each); then runs: a
    bit whether the value repeats, two for which of the sizes its length has, the length less one, the value.
    """
    flat = np.repeat(mask.ravel(), 4)
    ends = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate(([0], ends))
    lengths = np.diff(np.concatenate((starts, [len(flat)])))
    bits = [f"{len(flat):032b}{7:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    most = 1 << SIZES[-1]
    for length, inside in zip(lengths.tolist(), flat[starts].tolist(), strict=True):
        value = "11111111" if inside else "00000000"
        while length:
            run = min(length, most)
            which = next(place for place, size in enumerate(SIZES) if run <= 1 << size)
            bits.append(f"1{which:02b}{run - 1:0{SIZES[which]}b}{value}")
            length -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def unpack(code: Sequence[int], width: int, height: int) -> np.ndarray:
    """The mask (height, width) bool of `pack`'s bytes. ValueError if they are none of a picture of that size."""
    text = "".join(f"{byte:08b}" for byte in code)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        if place > len(text):
            raise ValueError("the run-length code is cut short")
        return int(text[place - count : place], 2)

    count, word = take(32), take(5) + 1
    if count != 4 * width * height:
        raise ValueError(
            f"the run-length code has {count} values, and a picture of {width} x {height} {4 * width * height}"
        )
    sizes = [take(4) + 1 for _ in range(4)]
    flat = np.zeros(count, np.uint8)
    done = 0
    while done < count:
        repeats, length = take(1), take(sizes[take(2)]) + 1
        if repeats:
            flat[done : done + length] = take(word) > 0
        else:
            for each in range(done, min(done + length, count)):
                flat[each] = take(word) > 0
        done += length
    return flat.reshape(height, width, 4)[..., 3].astype(bool)
