"""Compare what Label Studio, LabelMe and shapely read with captions.jsonl; requires their packages.

    python labeling_tool_readers.py FOLDER IMAGES CONFIG

FOLDER: captions.jsonl and the same in each tool's format. IMAGES: root of the records' paths. CONFIG: Label
Studio's labeling interface.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface
from label_studio_sdk.label_interface.objects import PredictionValue
from labelme import LabelFile, utils
from pycocotools import mask as coco
from shapely.geometry import shape

folder = Path(sys.argv[1]).absolute()
os.chdir(sys.argv[2])
records = {}
for line in (folder / "captions.jsonl").read_text("utf-8").splitlines():
    record = json.loads(line)
    records.setdefault(record["image"], []).append(record)
read_counts = {"label-studio": 0, "labelme": 0, "geojson": 0}


def decode_record_mask(record):
    return coco.decode(record["mask"]).astype(bool)


interface = LabelInterface(sys.argv[3])
for task in json.loads((folder / "label-studio.json").read_text("utf-8")):
    (prediction,) = task["predictions"]
    assert interface.validate_prediction(prediction), prediction
    PredictionValue.model_validate({**prediction, "score": 0.0})
    shapes = [result for result in prediction["result"] if result["type"] != "textarea"]
    texts = [result["value"]["text"] for result in prediction["result"] if result["type"] == "textarea"]
    for tool_shape, text, record in zip(shapes, texts, records.get(task["data"]["image"], []), strict=True):
        assert text == [record["caption"]]
        if tool_shape["type"] == "brushlabels":
            flat = np.asarray(decode_rle(tool_shape["value"]["rle"]))
            pixels = flat.reshape(tool_shape["original_height"], tool_shape["original_width"], 4)
            assert (pixels == 255 * decode_record_mask(record)[..., None]).all()
        read_counts["label-studio"] += 1

for path in sorted((folder / "labelme").glob("*.json")):
    label_file = LabelFile(str(path))
    image = utils.img_data_to_arr(label_file.image_data)
    name = os.path.relpath(folder / "labelme" / label_file.image_path)
    for tool_shape, record in zip(label_file.shapes, records.get(name, []), strict=True):
        assert tool_shape["description"] == record["caption"]
        assert tool_shape["other_data"]["score"] == record["score"]
        classes, _ = utils.shapes_to_label(image.shape, [tool_shape], {tool_shape["label"]: 1})
        if tool_shape["shape_type"] == "mask":
            assert (classes.astype(bool) == decode_record_mask(record)).all()
        read_counts["labelme"] += 1

for feature in json.loads((folder / "captions.geojson").read_text("utf-8"))["features"]:
    record = records[feature["properties"]["image"]][feature["properties"]["region_id"]]
    geometry = shape(feature["geometry"])
    assert geometry.is_valid, record
    if record["mask"]:
        assert geometry.area == decode_record_mask(record).sum()
        assert list(geometry.bounds) == record["box"]
    read_counts["geojson"] += 1

print(json.dumps(read_counts))
