"""Validate a prediction with label-studio-sdk, and print its errors, texts and masks; requires the package.

    python label_studio_validation.py FILE

FILE: JSON with `config`, the labeling interface, and `prediction`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface
from label_studio_sdk.label_interface.objects import PredictionValue

content = json.loads(Path(sys.argv[1]).read_text())
prediction = content["prediction"]
errors = LabelInterface(content["config"]).validate_prediction(prediction, return_errors=True)
PredictionValue.model_validate(prediction)
texts, packed_masks = [], []
for result in prediction["result"]:
    if result["type"] == "textarea":
        texts.append(result["value"]["text"])
    else:
        pixels = np.asarray(decode_rle(result["value"]["rle"]))
        mask = pixels.reshape(result["original_height"], result["original_width"], 4)[..., 3] > 0
        packed_masks.append(np.packbits(mask).tobytes().hex())
print(json.dumps({"errors": errors, "texts": texts, "masks": packed_masks}))
