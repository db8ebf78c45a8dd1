"""Print the regions that datumaro or FiftyOne reads from a folder of `sca convert`, as JSON; requires their packages.

    python dataset_tool_readers.py cvat|yolo|fiftyone|fiftyone-yolo FOLDER

Each region has `image`, `label`, `caption`, `box` (x1, y1, x2, y2 in pixels; None for a mask of datumaro), and `mask`,
the shape of the mask and its packed bits.
"""

import json
import os
import sys

import numpy as np


def read_with_datumaro(path, name):
    import datumaro

    dataset = datumaro.Dataset.import_from(path, name)
    labels = dataset.categories()[datumaro.AnnotationType.label]
    for item in dataset:
        for annotation in item.annotations:
            is_mask = annotation.type == datumaro.AnnotationType.mask
            x, y, width, height = (0, 0, 0, 0) if is_mask else annotation.get_bbox()
            yield {
                "image": item.id,
                "label": labels[annotation.label].name,
                "caption": annotation.attributes.get("caption"),
                "box": None if is_mask else [x, y, x + width, y + height],
                "mask": pack_mask(annotation.image) if is_mask else None,
            }


def read_with_fiftyone(folder):
    from fiftyone.utils.data import FiftyOneDatasetImporter
    from fiftyone.utils.data.importers import _handle_legacy_formats

    with _handle_legacy_formats(FiftyOneDatasetImporter(folder)) as importer:  # as `Dataset.from_dir` opens it
        for sample in importer:
            size = sample.metadata.width, sample.metadata.height
            for detection in sample.regions.detections:
                box = scale_box(detection.bounding_box, size)
                mask = None
                if detection.mask is not None:  # as FiftyOne renders it: in the pixels of the rounded box
                    mask = np.zeros(size[::-1], bool)
                    x1, y1, x2, y2 = (round(value) for value in box)
                    mask[y1:y2, x1:x2] = detection.mask
                yield {
                    "image": os.path.splitext(os.path.basename(sample.filepath))[0],
                    "label": detection.label,
                    "caption": detection.caption,
                    "box": box,
                    "mask": pack_mask(mask),
                }


def read_yolo_with_fiftyone(folder):
    from fiftyone.utils.yolo import YOLOv5DatasetImporter
    from PIL import Image

    with YOLOv5DatasetImporter(folder, yaml_path="data.yaml", split="train") as importer:
        for path, _, detections in importer:
            for detection in detections.detections:
                yield {
                    "image": os.path.splitext(os.path.basename(path))[0],
                    "label": detection.label,
                    "caption": None,
                    "box": scale_box(detection.bounding_box, Image.open(path).size),
                    "mask": None,
                }


def scale_box(relative_box, size):
    x, y, width, height = np.multiply(relative_box, [*size, *size]).tolist()
    return [x, y, x + width, y + height]


def pack_mask(mask):
    return None if mask is None else [list(mask.shape), np.packbits(np.asarray(mask, bool)).tobytes().hex()]


READERS = {
    "cvat": lambda folder: read_with_datumaro(f"{folder}/cvat.xml", "cvat"),
    "yolo": lambda folder: read_with_datumaro(f"{folder}/yolo", "yolo"),
    "fiftyone": lambda folder: read_with_fiftyone(f"{folder}/fiftyone"),
    "fiftyone-yolo": lambda folder: read_yolo_with_fiftyone(f"{folder}/yolo"),
}

print(json.dumps(list(READERS[sys.argv[1]](sys.argv[2]))))
