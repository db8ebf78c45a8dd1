"""Small folders in the layouts of the publishers of judged benchmarks, and a small judge."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sca.io.masks import encode_rle
from sca.language_models.tiny_gpt2 import TinyGpt2

SIZE = (48, 32)  # width, height


def write_judge(folder: Path):
    """Save a language model with random weights, large enough that it prefers some letters."""
    torch.manual_seed(0)
    language_model = TinyGpt2(hidden_size=32, depth=2, max_positions=1024)
    with torch.no_grad():
        for parameter in language_model.parameters():
            parameter.mul_(3)
    language_model.to_transformers().model.save_pretrained(folder)
    language_model.tokenizer.save(str(folder))
    return folder


def make_mask(x1, y1, x2, y2):
    mask = np.zeros(SIZE[::-1], bool)
    mask[y1:y2, x1:x2] = True
    return encode_rle(mask)


def make_questions(name):
    """Return a positive and a negative question in the publishers' form."""
    return [
        {
            "question": "Which of these statements fits the description?",
            "choices": [[f"The {name} is red.", 1], [f"The {name} is not mentioned.", 0], ["It is not red.", -1]],
            "type": "positive",
        },
        {
            "question": "Which of these statements fits the description?",
            "choices": [["Wheels are mentioned.", -1], ["Wheels are not mentioned.", 1]],
            "type": "negative",
            "subtype": "negative part",
        },
    ]


def write_dlc_bench(root: Path, num_images=2):
    """Write annotations in COCO's format: one region per image, with polygons and RLE in turn."""
    write_images(root / "images", num_images)
    images = [{"id": 10 + n, "file_name": f"{n}.png", "width": SIZE[0], "height": SIZE[1]} for n in range(num_images)]
    segmentations = [make_mask(4, 4, 20, 16), [[4, 4, 20, 4, 20, 16, 4, 16]]]
    annotations = [
        {"id": 2391781 + n, "image_id": 10 + n, "category_id": 1, "iscrowd": 0, "segmentation": segmentations[n % 2]}
        for n in range(num_images)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}
    keys = [str(annotation["id"]) for annotation in annotations]
    return write_benchmark(root, content, keys)


def write_paradlc_bench(root: Path, num_images=2):
    """Write a list of images with two regions each."""
    write_images(root / "images", num_images)
    content = [
        {
            "image_id": str(1592437 + n),
            "file_name": f"{n}.png",
            "width": SIZE[0],
            "height": SIZE[1],
            "annotations": [
                {"index": index, "category_name": "car", "bbox": list(box), "mask_rle": make_mask(*box)}
                for index, box in ((0, (4, 4, 20, 16)), (10, (24, 8, 40, 28)))
            ],
        }
        for n in range(num_images)
    ]
    keys = [f"{image['image_id']}_{each['index']}" for image in content for each in image["annotations"]]
    return write_benchmark(root, content, keys)


def write_gar_bench(root: Path):
    """Write two questions of GAR-Bench about one and two masks, and a request of each kind for a caption."""
    write_images(root / "images", 2)
    masks = [make_mask(4, 4, 20, 16), make_mask(24, 8, 40, 28)]
    questions = [
        {
            "image": "images/0.png",
            "mask_rles": masks[:1],
            "question": "What color is <Prompt0>?",
            "choices": ["A. red", "B. blue"],
            "answer": "A",
            "type": "color",
        },
        {
            "image": "images/1.png",
            "mask_rles": masks,
            "question": "What is the relation of <Prompt1> and <Prompt0>?",
            "choices": ["A. <Prompt1> is right of <Prompt0>", "B. <Prompt0> is inside <Prompt1>"],
            "answer": "A",
            "type": "relation",
        },
    ]
    simple = {
        "image": "images/0.png",
        "mask_rles": masks,
        "question": "What is the relation of <Prompt0> and <Prompt1>?",
        "answer": "left of",
    }
    names = {"subject_name": "car", "predicate_name": "in front of", "object_name": "house"}
    detailed = {"image": "images/1.png", "mask_rles": masks, **names}
    for part, records in (("VQA", questions), ("Caption-Simple", [simple]), ("Caption-Detailed", [detailed])):
        (root / f"GAR-Bench-{part}.json").write_text(json.dumps(records, indent=4))
    return root


def write_benchmark(root, content, keys):
    for file, value in (
        ("annotations.json", content),
        ("qa.json", {key: make_questions("car") for key in keys}),
        ("class_names.json", dict.fromkeys(keys, "car")),
    ):
        (root / file).write_text(json.dumps(value, indent=4))
    return root


def write_images(folder, number):
    folder.mkdir(parents=True)
    for n in range(number):
        image = Image.new("RGB", SIZE, (40 * n, 90, 160))
        image.paste((200, 30, 30), (4, 4, 20, 16))
        image.save(folder / f"{n}.png")
