"""Run where Label Studio's and LabelMe's packages and shapely are: what they read, beside captions.jsonl.

    python own_readers.py FOLDER PICTURES CONFIG

FOLDER: captions.jsonl and the same in each tool's format. PICTURES: where the records' paths start. CONFIG: Label
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
seen = {"label-studio": 0, "labelme": 0, "geojson": 0}


def mask_of(record):
    return coco.decode(record["mask"]).astype(bool)


interface = LabelInterface(sys.argv[3])
for task in json.loads((folder / "label-studio.json").read_text("utf-8")):
    (prediction,) = task["predictions"]
    assert interface.validate_prediction(prediction), prediction
    PredictionValue.model_validate({**prediction, "score": 0.0})
    shapes = [result for result in prediction["result"] if result["type"] != "textarea"]
    words = [result["value"]["text"] for result in prediction["result"] if result["type"] == "textarea"]
    for told, text, record in zip(shapes, words, records.get(task["data"]["image"], []), strict=True):
        assert text == [record["caption"]]
        if told["type"] == "brushlabels":
            flat = np.asarray(decode_rle(told["value"]["rle"]))
            pixels = flat.reshape(told["original_height"], told["original_width"], 4)
            assert (pixels == 255 * mask_of(record)[..., None]).all()
        seen["label-studio"] += 1

for path in sorted((folder / "labelme").glob("*.json")):
    file = LabelFile(str(path))
    picture = utils.img_data_to_arr(file.image_data)
    name = os.path.relpath(folder / "labelme" / file.image_path)
    for told, record in zip(file.shapes, records.get(name, []), strict=True):
        assert told["description"] == record["caption"]
        assert told["other_data"]["score"] == record["score"]
        classes, _ = utils.shapes_to_label(picture.shape, [told], {told["label"]: 1})
        if told["shape_type"] == "mask":
            assert (classes.astype(bool) == mask_of(record)).all()
        seen["labelme"] += 1

for feature in json.loads((folder / "captions.geojson").read_text("utf-8"))["features"]:
    record = records[feature["properties"]["image"]][feature["properties"]["region_id"]]
    drawn = shape(feature["geometry"])
    assert drawn.is_valid, record
    if record["mask"]:
        assert drawn.area == mask_of(record).sum()
        assert list(drawn.bounds) == record["box"]
    seen["geojson"] += 1

print(json.dumps(seen))
