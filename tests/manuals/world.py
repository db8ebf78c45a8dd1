"""A folder in which what the manuals say can be done at once: pictures, data sets and a hub, all of them small."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import sca_registry
import torch
from hub import Hub
from PIL import Image
from sca_registry.spec import ModelSpec

import sca
from sca.builder import build
from sca.checkpoints.export import write_language_model, write_published_checkpoint
from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.testing.tiny import get_tiny_options

ROOT = Path(__file__).resolve().parent.parent.parent
FEW = "train.steps=2 train.batch_size=2 train.num_processes=1 train.num_workers=0 train.save_steps=2"
SMALLER = (  # what is said, and how it is done here: in seconds, on a CPU
    (r"^sca train (?!own-data)[^#]*", rf"\g<0> {FEW}"),
    (r"^(sca train own-data [^#]*?)(train\.steps=\d+)?([^#]*)$", rf"\1\3 {FEW}"),
    (r"-m sca train \S+", rf"\g<0> {FEW}"),
    (r"(^sca train (?:pretrain-|finetune-|vg-)\S*.*|-m sca train vg-\S+.*)", r"\1 validate.limit=1"),
    (r"--multi_gpu --num_processes 16 --num_machines 2", "--cpu --num_processes 1"),
    (r"^(sca evaluate .*)--limit \d+", r"\1--limit 2"),
    (r"^sca evaluate (?!.*--limit).*", r"\g<0> --limit 2"),
    (r"--device cuda", "--device cpu"),
    (r"^curl ", "curl --fail "),
)
ELSEWHERE = (  # lines that are not run, and why
    (r"^make ", "the Makefile's targets are what runs the tests"),
    (r"^pip install -c constraints.txt ", "tests/test_package.py installs the package; the extras are looked up below"),
    (r"^sca doctor --fix", "it would change the environment of the tests; tests/test_repair.py repairs a folder"),
    (r"--use_fsdp", "accelerate's own FSDP wants a GPU; tests/training shards with gloo"),
    (r"^sca bench run throughput ", "hours on a CPU; tests/bench runs small ones"),
    (r"mmdet|rtmdet", "needs MMDetection's weights; tests/contract tries its plugin with small ones"),
)
RECIPE = """
[model]
encoder = {name = "tiny-vit", image_size = 64}
mixer = {name = "query", depth = 1}
language_model = "tiny-gpt2"

[data.scenes]
name = "scenes"
image_size = 64
num_images = 8
"""
SWEEP = """
summary = "one row"
seeds = [0]

[model]
encoder = {name = "tiny-vit", image_size = 64}
mixer = "masked-pool"
language_model = "tiny-gpt2"
task_tokens = 2

[measure]
regions = [1]
words = 2
repeats = 2
"""


def done_here(block):
    """The lines of a block that are run."""
    return [line for line in block.splitlines() if not any(re.search(each, line) for each, _ in ELSEWHERE)]


class World:
    """`run(block)` does the lines of a shell block as a person would, in the folder and one after the other."""

    def __init__(self, folder, hub):
        self.folder, self.address = folder, hub
        self.site = folder / "site-packages"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.site),
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "hub-cache"),
            "HF_ENDPOINT": hub,
            "HF_HUB_DISABLE_XET": "1",
            "SCA_CACHE": str(folder / "cache"),
        }
        self.started = []

    def run(self, block):
        block = re.sub(r"\s*\\\n\s*", " ", block)
        lines = done_here(block)
        if any(line.startswith(("sca demo", "sca serve")) for line in lines):
            (line,) = lines
            return self.start(line)
        script = "\n".join(map(self.smaller, lines))
        done = subprocess.run(
            ["bash", "-ec", script], capture_output=True, text=True, cwd=self.folder, env=self.environment
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def smaller(self, line):
        for said, done in SMALLER:
            line = re.sub(said, done, line)
        install = f"pip install --quiet --no-deps --no-build-isolation --target {self.site} ."
        line = re.sub(r"^pip install (-e )?\.", install, line)
        return line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}") if "127.0.0.1:8000" in line else line

    def start(self, line):
        """A server, which answers when this returns."""
        command = f"{line} --port 0".split()
        server = subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, text=True)
        self.started.append(server)
        said = []
        for told in server.stderr:
            said.append(told)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", told):
                self.port = int(found[1])
                page = f"{found[0]}/health" if command[1] == "serve" else found[0]
                with urllib.request.urlopen(page, timeout=60) as answer:
                    return answer.read().decode()
        raise AssertionError("".join(said))

    def end(self):
        for server in self.started:
            server.terminate()
            server.wait(30)
            server.stderr.close()


def furnish(folder, sam, hub):
    """What the manuals take for granted; `hub` gets what they load by name. sam: a folder with a tiny SAM."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    scenes = {split: Scenes(split, num_images=6, image_size=96) for split in ("train", "val", "test")}
    layouts = {
        "street": "coco",
        "VG": "vg",
        "data/visual-genome": "vg",
        "data/objects365": "objects365",
        "data/coco": "coco-panoptic",
        "refer/refcocog": "refcoco",
    }
    for place, layout in layouts.items():
        export_dataset(scenes, folder / place, layout)
    for split in scenes:  # COCO's instances lie beside the panoptic annotations, and have the same pictures
        content = json.loads((folder / "street" / f"{split}.json").read_text())
        for image in content["images"]:
            image["file_name"] = Path(image["file_name"]).with_suffix(".jpg").name
        (folder / f"data/coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
    (folder / "refer/refcocog/refs(unc).p").rename(folder / "refer/refcocog/refs(google).p")
    (folder / "refer/refcocog/images").rename(folder / "train2014")
    shutil.copytree(folder / "street/val", folder / "photos")
    shutil.copytree(folder / "photos", folder / "more")
    (picture, *_) = sorted((folder / "photos").iterdir())
    Image.open(picture).convert("RGB").save(folder / "more/one.jpg")
    Image.open(folder / "examples/scene.png").convert("RGB").save(folder / "photo.jpg")
    shutil.copy(folder / "street/val.json", folder / "boxes.json")
    with tarfile.open(folder / "set-0.tar", "w") as archive:
        archive.add(picture, "0.png")
    (folder / "my-recipe.toml").write_text(RECIPE)
    (folder / "my-sweep.toml").write_text(SWEEP)
    stock(hub, sam, folder / "hub")


def stock(hub, sam, folder):
    """The hub's models by the ids of published ones, at sizes that fit into a thimble."""
    torch.manual_seed(0)
    shipped = sca.load("sca-tiny")
    words = write_language_model(shipped, folder / "words")
    parts = {"encoder": {"name": "sam", "weights": str(sam)}, "language_model": {"name": "hf", "weights": str(words)}}
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48}
    published = build(ModelSpec.from_dict({**parts, "mixer": mixer, "task_tokens": 2}))
    hub.models["xk-huang/segment-caption-anything-gpt2_large-vg"] = write_published_checkpoint(
        published, folder / "published"
    )
    hub.models["openai-community/gpt2-large"] = words
    for size in ("base", "large", "huge"):
        hub.models[f"facebook/sam-vit-{size}"] = sam
    for name, kind in (("blip-base", "blip-base"), ("florence-2-base", "vlm")):
        reader = sca_registry.captioners.build(kind, **get_tiny_options("captioner", kind)).image_text_model
        reader.model.save_pretrained(folder / name)
        reader.processor.save_pretrained(folder / name)
        hub.models[sca_registry.captioners.get_card(name).options["weights"]] = folder / name


@contextmanager
def opened(folder, sam):
    """A world with its hub, for as long as that is served."""
    hub = Hub()
    furnish(folder, sam, hub)
    with hub.serving() as address:
        world = World(folder, address)
        try:
            yield world
        finally:
            world.end()
