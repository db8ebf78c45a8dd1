"""Rasterize shapes with the converters of Label Studio and LabelMe; requires their packages.

    python labeling_tool_geometry.py FILE

FILE: {"labelme": {"size": [width, height], "shapes": [...], "groups": [[...], ...]}, "label-studio": [task, ...],
"masks": [RLE, ...]}. Prints {"labelme": [RLE of each shape, drawn alone], "groups": [RLE of each group],
"label-studio": COCO annotations of the polygons, "corners": of each rectangle, "brushes": Label Studio's code of each
mask}.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from label_studio_sdk.converter import Converter
from label_studio_sdk.converter.brush import mask2rle
from label_studio_sdk.converter.utils import convert_annotation_to_yolo_obb
from labelme import utils
from labelme._label_file import _load_shape_json_obj
from pycocotools import mask as coco

LABELING_CONFIG = """<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="box" toName="image"><Label value="cat"/></RectangleLabels>
  <PolygonLabels name="polygon" toName="image"><Label value="cat"/></PolygonLabels>
</View>"""

content = json.loads(Path(sys.argv[1]).read_text())


def encode_rle(mask):
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def draw_instances(shapes):
    """Return the (height, width) mask of each instance as drawn by LabelMe."""
    width, height = content["labelme"]["size"]
    loaded_shapes = [_load_shape_json_obj(shape) for shape in shapes]
    _, instances = utils.shapes_to_label((height, width, 3), loaded_shapes, {shape["label"]: 1 for shape in shapes})
    return instances


labelme_masks = [encode_rle(draw_instances([shape]) > 0) for shape in content["labelme"]["shapes"]]
group_masks = [encode_rle(draw_instances(shapes) > 0) for shapes in content["labelme"]["groups"]]

with tempfile.TemporaryDirectory() as folder:
    tasks_file = Path(folder, "tasks.json")
    tasks_file.write_text(json.dumps(content["label-studio"]))
    converter = Converter(LABELING_CONFIG, folder, download_resources=False)
    converter.convert_to_coco(str(tasks_file), str(Path(folder, "out")), is_dir=False)
    annotations = json.loads(Path(folder, "out", "result.json").read_text())["annotations"]

results = [result for task in content["label-studio"] for result in task["annotations"][0]["result"]]
rectangle_values = [
    {**result["value"], **{key: result[key] for key in ("original_width", "original_height")}}
    for result in results
    if result["type"] == "rectanglelabels"
]
rectangle_corners = [convert_annotation_to_yolo_obb(each, normalize=False) for each in rectangle_values]
brush_codes = [mask2rle(coco.decode(code) * np.uint8(255)) for code in content["masks"]]
output = {
    "labelme": labelme_masks,
    "groups": group_masks,
    "label-studio": annotations,
    "corners": rectangle_corners,
    "brushes": brush_codes,
}
print(json.dumps(output))
