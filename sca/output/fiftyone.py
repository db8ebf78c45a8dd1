"""Write a dataset for FiftyOne, in the layout that its `FiftyOneDataset` type imports.

Layout: https://docs.voxel51.com/user_guide/import_datasets.html, as read by `LegacyFiftyOneDatasetImporter` in
https://github.com/voxel51/fiftyone/blob/develop/fiftyone/utils/data/importers.py. It depends on no version of
FiftyOne's database.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.atomic import AtomicFile, create_writable_folder
from sca.io.image_names import is_url
from sca.io.paths import make_relative_path
from sca.io.text import replace_surrogates
from sca.output.captioned_image import ImageOrSize
from sca.output.image_files import close_document
from sca.output.jsonl import caption_to_record
from sca.output.omitted_regions import OmittedRegions, find_first_point
from sca.output.records import REGION_LABEL

EXTRA_FIELDS = ("region_id", "predicted_iou", "proposal_score")  # fields of JSON Lines that labels also have


class FiftyOneWriter:
    """Writer of `samples.json` and `metadata.json` in `folder`. Images are not copied: paths are relative to `folder`.

    The field `regions` contains a detection per region with a mask or a box. Its label is its name, or "region", its
    confidence is the score of the caption, and its attribute `caption` is the text. A mask is exact to the pixel; its
    detection has the box of the mask. A region with neither is a keypoint in the field `points`, with the same
    attributes; without a point it is omitted with a warning.
    """

    def __init__(self, folder: Path, model: str | None = None):
        create_writable_folder(folder)
        self._folder, self._num_images = folder, 0
        self._omitted = OmittedRegions("FiftyOne labels")
        self._samples = AtomicFile(folder / "samples.json")
        self._metadata = AtomicFile(folder / "metadata.json")
        self._samples.write('{"samples": [')
        self._metadata.write(json.dumps({"media_type": "image", "info": {"model": model}}))

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        records = [caption_to_record(path, image, caption) for caption in captions]
        labels = [label for record in records if (label := _make_label(record))]
        self._omitted.add(path, len(records) - len(labels))
        size_fields = {"width": image.width, "height": image.height}
        sample = {
            "filepath": path if is_url(path) else make_relative_path(path, self._folder),
            "tags": [],
            "metadata": {"_cls": "ImageMetadata", **size_fields},
            "regions": {"_cls": "Detections", "detections": [each for each in labels if "bounding_box" in each]},
            "points": {"_cls": "Keypoints", "keypoints": [each for each in labels if "points" in each]},
        }
        self._samples.write((",\n" if self._num_images else "\n") + json.dumps(sample, allow_nan=False))
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Finish the files with the completed images. An unfinished run leaves older files unchanged."""
        self._omitted.log_total()
        try:
            close_document(self._samples, "\n]}\n", bool(self._num_images), finished)
        except BaseException:
            self._metadata.discard()
            raise
        close_document(self._metadata, "\n", bool(self._num_images), finished)


def _make_label(caption_record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the detection or the keypoint of a region; None without a mask, a box or a point."""
    width, height = caption_record["width"], caption_record["height"]
    common_fields = {
        "label": replace_surrogates(caption_record.get("name") or REGION_LABEL),
        "caption": replace_surrogates(caption_record["caption"]),
        **{key: caption_record[key] for key in EXTRA_FIELDS if caption_record.get(key) is not None},
    }
    mask = caption_record["mask"] and masks.decode_rle(caption_record["mask"])
    box = caption_record["box"]
    if mask is not None and (mask_box := masks.mask_to_box(mask)):
        box = mask_box
        x1, y1, x2, y2 = (int(value) for value in box)
        common_fields["mask"] = _encode_array(mask[y1:y2, x1:x2])
    if box:
        x1, y1, x2, y2 = box
        bounding_box = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        score = {} if caption_record["score"] is None else {"confidence": caption_record["score"]}
        return {"_cls": "Detection", "bounding_box": bounding_box, **common_fields, **score}
    point = find_first_point(caption_record)
    if point is None:
        return None
    x, y = point
    score = {} if caption_record["score"] is None else {"confidence": [caption_record["score"]]}
    return {"_cls": "Keypoint", "points": [[x / width, y / height]], **common_fields, **score}


def _encode_array(array: np.ndarray) -> dict[str, Any]:
    """Return an array as FiftyOne stores it in JSON: a compressed NumPy file in base64."""
    content = io.BytesIO()
    np.save(content, array)
    return {"$binary": {"base64": base64.b64encode(zlib.compress(content.getvalue())).decode(), "subType": "00"}}
