"""Hostile checkpoints: none runs code, opens a connection or accesses files outside its folder."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import hostile_checkpoints
import pytest
import torch

import sca
from sca.checkpoints.export import write_published_checkpoint
from sca.checkpoints.native import save

pytestmark = pytest.mark.slow

COMMANDS = ["load", "load", "caption", "export", "load", "import", "plan", "show", "push"]
COMMANDS += ["demo"] if importlib.util.find_spec("gradio") else []


@pytest.fixture(scope="session")
def base_checkpoints(sam_folder, save_language_model, tmp_path_factory):
    """A checkpoint of each layout: native, native with a language model in its folder, and published."""
    bases_folder = tmp_path_factory.mktemp("bases")
    shutil.copytree(save_language_model("gpt2"), bases_folder / "lm")
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48}
    torch.manual_seed(0)
    tiny_encoder = {
        "name": "tiny-vit",
        "image_size": 64,
        "hidden_size": 32,
        "depth": 1,
        "output_channels": 32,
        "stem_channels": [8, 16],
    }
    segmenter = {"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 64}
    native_model = sca.compose(
        tiny_encoder, mixer, {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2}, segmenter=segmenter
    )
    save(native_model, bases_folder / "own")
    model_with_inner_folder = sca.compose(
        tiny_encoder, mixer, {"name": "hf", "weights": str(bases_folder / "lm")}, segmenter=segmenter
    )
    save(model_with_inner_folder, bases_folder / "inner")
    shutil.copytree(bases_folder / "lm", bases_folder / "inner" / "lm")
    spec = json.loads((bases_folder / "inner" / "spec.json").read_text())
    spec["language_model"]["weights"] = "lm"
    (bases_folder / "inner" / "spec.json").write_text(json.dumps(spec))
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 950, "n_positions": 64}
    published = sca.compose({"name": "sam", "weights": str(sam_folder)}, mixer, {"name": "hf", "config": config})
    published.language_model.tokenizer = native_model.language_model.tokenizer
    write_published_checkpoint(published, bases_folder / "published")
    return [bases_folder / "own", bases_folder / "inner", bases_folder / "published"]


def test_checkpoint_that_contains_its_language_model_can_be_moved(base_checkpoints, tmp_path):
    folder = shutil.copytree(base_checkpoints[1], tmp_path / "moved")
    assert sca.load(folder).language_model.model.config.model_type == "gpt2"


@pytest.mark.parametrize("num_checkpoints", [15, pytest.param(200, marks=pytest.mark.all)])
def test_hostile_checkpoints_run_no_code_and_fail_in_one_line(base_checkpoints, tmp_path, num_checkpoints):
    outside_folder, models_folder = tmp_path / "outside", tmp_path / "models"
    outside_folder.mkdir()
    (outside_folder / "secret").write_text("{}")
    (outside_folder / "attacker.py").write_text(
        hostile_checkpoints.HOSTILE_CODE.format(marker=str(models_folder / hostile_checkpoints.MARKER_FILE))
    )
    cache_folder = tmp_path / "cache"
    (tmp_path / "out").mkdir()
    from PIL import Image

    Image.new("RGB", (64, 64), "blue").save(tmp_path / "out" / "a.png")
    descriptions = {}
    for index in range(num_checkpoints):
        descriptions[f"model-{index}"] = hostile_checkpoints.write_hostile_checkpoint(
            base_checkpoints[index % 3], models_folder, index, outside_folder
        )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SCA_", "PYTHON"))},
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(cache_folder / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "SCA_CACHE": str(cache_folder / "sca"),
        "TMPDIR": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, hostile_checkpoints.__file__, str(models_folder), ",".join(COMMANDS), str(cache_folder)]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60 + 20 * num_checkpoints
    )
    outcomes = [json.loads(line[2:]) for line in result.stdout.splitlines() if line.startswith("##")]
    assert len(outcomes) == num_checkpoints, result.stderr[-2000:]
    failures = [
        (descriptions[each["model"]], each)
        for each in outcomes
        if each["events"] or "Traceback" in each["message"] or len(each["message"].strip().splitlines()) > 1
    ]
    assert not failures, "\n".join(f"{description}\n    {outcome}" for description, outcome in failures)
    assert not (models_folder / hostile_checkpoints.MARKER_FILE).exists()
    assert sum(each["message"] == "completed" for each in outcomes) < num_checkpoints * 0.7  # most are rejected
