"""The hash of a captioner's weights, which identifies an evaluation run."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText

import sca
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions
from sca.io.errors import DifferentRunError

DATASET = {"name": "scenes", "num_images": 1}


@pytest.fixture
def captioner_sources(weights_folder, sam_folder, tmp_path):
    """Each kind of captioner with weights: its source, and the folder of weights that it reads."""
    sam_folder, blip_folder, florence_folder = (
        shutil.copytree(folder, tmp_path / name)
        for name, folder in (
            ("sam", sam_folder),
            ("blip", weights_folder("blip")),
            ("florence", weights_folder("florence2")),
        )
    )
    sam = f"encoder={{name=\"sam\",weights='{sam_folder}'}}"
    data = "dataset=scenes dataset_options={num_images=2}"
    return {
        "none": (f"none {sam}", sam_folder),
        "crop-captioner": (f"crop-captioner weights={blip_folder}", blip_folder),
        "encoder of crop-captioner": (f"crop-captioner {sam} weights={blip_folder}", sam_folder),
        "vlm": (f"vlm weights={florence_folder}", florence_folder),
        "nearest-neighbor": (f"nearest-neighbor {sam} {data}", sam_folder),
    }


def change_weights(folder, kind):
    """Change one parameter of the weights in a folder."""
    model_class = AutoModelForImageTextToText if kind in ("crop-captioner", "vlm") else AutoModel
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["none", "crop-captioner", "encoder of crop-captioner", "vlm", "nearest-neighbor"])
def test_weights_hash_changes_with_the_weights(kind, captioner_sources):
    source, folder = captioner_sources[kind]
    first = sca.load_captioner(source).weights_hash
    assert sca.load_captioner(source).weights_hash == first
    change_weights(folder, kind)
    assert sca.load_captioner(source).weights_hash != first


@pytest.mark.slow
def test_evaluate_rejects_folder_of_a_run_with_other_weights(captioner_sources, tmp_path):
    source, folder = captioner_sources["none"]
    options = {
        "prompting": PromptingOptions(tasks=("recognition",)),
        "metrics": ["mask-iou"],
        "folder": tmp_path / "run",
    }
    assert evaluate(source, DATASET, **options).run["weights_hash"] == sca.load_captioner(source).weights_hash
    evaluate(source, DATASET, **options)  # resumes
    change_weights(folder, "none")
    with pytest.raises(DifferentRunError, match="weights_hash"):
        evaluate(source, DATASET, **options)


def test_baseline_without_weights_is_identified_by_its_training_data(tmp_path):
    pytest.importorskip("datasets")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    line = {"image": "a.png", "box": [0, 0, 9, 9], "name": "dog", "width": 9, "height": 9}
    options = {"split": "", "dataset_options": {"file": str(tmp_path / "a.jsonl")}}
    hashes = []
    for name in ("dog", "cat"):
        (tmp_path / "a.jsonl").write_text(json.dumps({**line, "name": name}))
        captioner = sca.load_captioner({"name": "most-frequent", "dataset": "jsonl", **options})
        assert getattr(captioner, "weights_hash", None) is None
        hashes.append(captioner.metadata["dataset_hash"])
    assert hashes[0] != hashes[1]
