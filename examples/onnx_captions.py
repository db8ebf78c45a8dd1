"""Caption boxes with a folder of `sca export`: `python onnx_captions.py FOLDER IMAGE X1,Y1,X2,Y2 ...`."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


class OnnxCaptioner:
    def __init__(self, folder):
        self.settings = json.loads(Path(folder, "preprocessing.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.graphs = {file.stem: onnxruntime.InferenceSession(file) for file in Path(folder).glob("*.onnx")}

    def run(self, name, *inputs):
        names = (each.name for each in self.graphs[name].get_inputs())
        return self.graphs[name].run(None, dict(zip(names, inputs, strict=True)))

    def caption(self, image, boxes, task="caption"):  # token ids, scores, masks and predicted IoU
        expected, image = self.settings["image"], ImageOps.exif_transpose(image)
        size, is_padded = expected["size"], expected["resize_mode"] == "pad"
        scale = size / max(image.size)
        width, height = (max(1, int(side * scale + 0.5)) if is_padded else size for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling[expected["resample"].upper()])
        pixels = (np.float32(resized) / 255 - np.float32(expected["mean"])) / np.float32(expected["std"])
        pixel_values = np.pad(pixels.transpose(2, 0, 1)[None], ((0, 0), (0, 0), (0, size - height), (0, size - width)))
        sizes, task_id = np.float32([image.size, (width, height)]), np.array([self.settings["tasks"].index(task)])
        inputs = *self.run("encoder", pixel_values), np.float32(boxes), *sizes, task_id
        prefix, masks, ious = self.run("regions_from_boxes", *inputs)
        logits = masks[range(len(masks)), ious.argmax(1)]  # of the best masks
        for content, side in ((height, image.height), (width, image.width)):  # upscale rows, then columns
            cropped = resize(logits, size)[:, :content] if is_padded else logits
            logits = resize(cropped, side).transpose(0, 2, 1)
        return *self.generate(prefix), logits > 0, ious.max(1).clip(0, 1)

    def generate(self, prefix):  # greedy search until all captions end
        ids, log_probs, cache = np.zeros((len(prefix), 0), np.int64), np.zeros((len(prefix), 0)), []
        while True:
            logits, *cache = self.run("step", ids[:, -1:], *cache) if cache else self.run("prefill", prefix)
            ids = np.c_[ids, logits.argmax(1)]
            log_probs = np.c_[log_probs, -np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))]
            is_end = np.isin(ids, self.settings["eos_token_ids"])
            if is_end.any(1).all() or ids.shape[1] == self.settings["max_new_tokens"]:
                is_used = is_end.cumsum(1) - is_end == 0  # tokens up to the first end token
                return map(np.extract, is_used, ids), np.exp(log_probs.mean(1, where=is_used))


def resize(values, length):  # bilinear interpolation of the rows of (N, rows, columns)
    positions = ((np.arange(length) + 0.5) * values.shape[1] / length - 0.5).clip(0, values.shape[1] - 1)
    return (1 - abs(positions[:, None] - np.arange(values.shape[1]))).clip(0) @ values


if __name__ == "__main__":
    (_, folder, file, *boxes), captioner = sys.argv, OnnxCaptioner(sys.argv[1])
    for ids, *values in zip(*captioner.caption(Image.open(file), [box.split(",") for box in boxes]), strict=True):
        print(captioner.tokenizer.decode(ids).strip(), "| score {0:.2f}, IoU {2:.2f}".format(*values))
