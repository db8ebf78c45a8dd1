"""A checkpoint is data: of hundreds of hostile ones, none runs code, fetches anything or leaves its folder."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import hostile
import pytest
import torch

import sca
from sca.checkpoints.export import write_published_checkpoint
from sca.checkpoints.native import save

pytestmark = pytest.mark.slow

HOWS = ["load", "load", "caption", "export", "load", "import", "plan", "show", "push"]
HOWS += ["demo"] if importlib.util.find_spec("gradio") else []


@pytest.fixture(scope="session")
def bases(sam_folder, lm_folder, tmp_path_factory):
    """A model of each layout: one of our own, one with a language model in its folder, a published one."""
    place = tmp_path_factory.mktemp("bases")
    shutil.copytree(lm_folder("gpt2"), place / "lm")
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48}
    torch.manual_seed(0)
    tiny = {
        "name": "tiny-vit",
        "image_size": 64,
        "hidden_size": 32,
        "depth": 1,
        "output_channels": 32,
        "stem_channels": [8, 16],
    }
    segmenter = {"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 64}
    own = sca.compose(
        tiny, mixer, {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2}, segmenter=segmenter
    )
    save(own, place / "own")
    inner = sca.compose(tiny, mixer, {"name": "hf", "weights": str(place / "lm")}, segmenter=segmenter)
    save(inner, place / "inner")
    shutil.copytree(place / "lm", place / "inner" / "lm")
    spec = json.loads((place / "inner" / "spec.json").read_text())
    spec["language_model"]["weights"] = "lm"
    (place / "inner" / "spec.json").write_text(json.dumps(spec))
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 800, "n_positions": 64}
    published = sca.compose({"name": "sam", "weights": str(sam_folder)}, mixer, {"name": "hf", "config": config})
    published.language_model.tokenizer = own.language_model.tokenizer
    write_published_checkpoint(published, place / "published")
    return [place / "own", place / "inner", place / "published"]


def test_a_checkpoint_with_its_language_model_in_its_folder_can_be_moved(bases, tmp_path):
    folder = shutil.copytree(bases[1], tmp_path / "moved")
    assert sca.load(folder).language_model.model.config.model_type == "gpt2"


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.all)])
def test_hostile_checkpoints_end_in_one_line_and_touch_nothing(bases, tmp_path, count):
    outside, where = tmp_path / "outside", tmp_path / "models"
    outside.mkdir()
    (outside / "secret").write_text("{}")
    (outside / "stranger.py").write_text(hostile.CODE.format(marker=str(where / hostile.MARKER)))
    cache = tmp_path / "cache"
    (tmp_path / "out").mkdir()
    from PIL import Image

    Image.new("RGB", (64, 64), "blue").save(tmp_path / "out" / "a.png")
    told = {}
    for number in range(count):
        told[f"model-{number}"] = hostile.make(bases[number % 3], where, number, outside)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SCA_", "PYTHON"))},
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(cache / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "SCA_CACHE": str(cache / "sca"),
        "TMPDIR": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, hostile.__file__, str(where), ",".join(HOWS), str(cache)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60 + 20 * count
    )
    answers = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("##")]
    assert len(answers) == count, done.stderr[-2000:]
    wrong = [
        (told[each["model"]], each)
        for each in answers
        if each["seen"] or "Traceback" in each["said"] or len(each["said"].strip().splitlines()) > 1
    ]
    assert not wrong, "\n".join(f"{what}\n    {answer}" for what, answer in wrong)
    assert not (where / hostile.MARKER).exists()
    assert sum(each["said"] == "used" for each in answers) < count * 0.7  # they are hostile indeed
