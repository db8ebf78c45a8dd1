"""A folder in which the blocks of a page run within seconds: images, datasets and a Hub, all of them small."""

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
from fake_hub import Hub
from judged_benchmarks import write_dlc_bench, write_judge, write_paradlc_bench
from pages import ROOT
from PIL import Image
from sca_registry.spec import ModelSpec
from tiny_segmenters import SAM2_CONFIGS, build_tiny_model

import sca
from sca.builder import build
from sca.checkpoints.export import write_language_model, write_published_checkpoint
from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.testing.tiny import get_tiny_options

SHORT_TRAINING = "train.steps=2 train.batch_size=2 train.num_processes=1 train.num_workers=0 train.save_steps=2"
REPLACEMENTS = (  # line of a page -> line that runs within seconds on a CPU
    (r"^sca train (?!own-data)[^#]*", rf"\g<0> {SHORT_TRAINING}"),
    (r"^(sca train own-data [^#]*?)(train\.steps=\d+)?([^#]*)$", rf"\1\3 {SHORT_TRAINING}"),
    (r"-m sca train \S+", rf"\g<0> {SHORT_TRAINING}"),
    (r"(^sca train (?:pretrain-|finetune-|vg-)\S*.*|-m sca train vg-\S+.*)", r"\1 validate.max_images=1"),
    (r"--multi_gpu --num_processes 16 --num_machines 2", "--cpu --num_processes 1"),
    (r"^(sca evaluate .*)--max-images \d+", r"\1--max-images 2"),
    (r"^sca evaluate (?!.*--max-images).*", r"\g<0> --max-images 2"),
    (r"--device cuda", "--device cpu"),
    (r"^curl ", "curl --fail "),
)
SKIPPED_LINES = (  # pattern, reason
    (r"^make ", "the targets run the tests"),
    (
        r"^pip install -c constraints.txt ",
        "tests/test_package.py installs the package; test_manuals.py checks extras",
    ),
    (
        r"^sca doctor --fix",
        "it would change the environment; tests/test_torchvision_fix.py repairs a folder",
    ),
    (r"--use_fsdp", "FSDP of accelerate requires a GPU; tests/training shards with gloo"),
    (r"^sca bench run throughput ", "takes hours on a CPU; tests/bench runs small sweeps"),
    (r"lmms.eval", "requires lmms-eval; tests/evaluation/test_lmms_eval_samples.py runs it"),
    (
        r"onnx_captions|--layout onnx|\[onnx\]|onnxruntime",
        "requires the extra onnx; tests/checkpoints/test_onnx_export.py runs the example",
    ),
    (r"^python benchmarks/", "studies take minutes; tests/bench runs smaller ones"),
    (r"runs/(own|sca-tiny)/model|runs/mine/model portable", "requires a model that a reader has trained"),
    (r"^sca caption IMAGE .*--question", "requires a model for questions; tests/cli/test_cli_questions.py trains one"),
    (r"openai url=", "requires a server; tests/captioners/test_chat_gateway.py starts one"),
    (r"model=pam-", "requires a checkpoint of PAM; tests/training/test_pam_finetuning.py has a tiny one"),
    (
        r"^sca train .*quantization=",
        "requires the extra quantization; tests/model/test_quantized_models.py trains",
    ),
    (r"mmdet|rtmdet", "requires weights of MMDetection; the tests of the plugin use small ones"),
)
RECIPE_TOML = """
[model]
encoder = {name = "tiny-vit", image_size = 64}
mixer = {name = "query", depth = 1}
language_model = "tiny-gpt2"

[data.scenes]
name = "scenes"
image_size = 64
num_images = 8
"""
SWEEP_TOML = """
summary = "one row"
seeds = [0]

[model]
encoder = {name = "tiny-vit", image_size = 64}
mixer = "masked-pool"
language_model = "tiny-gpt2"
task_tokens = 2

[train]
recipe = "sca-tiny"
steps = 8
batch_size = 1
warmup_steps = 1

[evaluate]
dataset = { name = "scenes", num_images = 5, image_size = 64 }
metrics = ["cider-d"]

[benchmark]
regions_per_image = [1]
max_new_tokens = 2
num_repeats = 2
"""


def list_runnable_lines(block):
    """Return the lines of a block that are run."""
    return [line for line in block.splitlines() if not any(re.search(pattern, line) for pattern, _ in SKIPPED_LINES)]


class DocumentEnvironment:
    """Working folder of a reader. `run` runs the lines of a shell block in it, one block after the other."""

    def __init__(self, folder, hub_address):
        self.folder = folder
        self.site_packages = folder / "site-packages"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.site_packages),
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "hub-cache"),
            "HF_ENDPOINT": hub_address,
            "HF_HUB_DISABLE_XET": "1",
            "SCA_CACHE": str(folder / "cache"),
        }
        self.servers = []

    def run(self, block):
        lines = list_runnable_lines(re.sub(r"\s*\\\n\s*", " ", block))
        if any(line.startswith(("sca demo", "sca serve")) for line in lines):
            (line,) = lines
            return self.start_server(line)
        script = "\n".join(map(self.shorten_line, lines))
        process = subprocess.run(
            ["bash", "-ec", script], capture_output=True, text=True, cwd=self.folder, env=self.environment
        )
        assert process.returncode == 0, f"{script}\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}"
        return process.stdout

    def shorten_line(self, line):
        """Return a line that does the same within seconds, with the port of the running server."""
        for pattern, replacement in REPLACEMENTS:
            line = re.sub(pattern, replacement, line)
        install = f"pip install --quiet --no-deps --no-build-isolation --target {self.site_packages} ."
        line = re.sub(r"^pip install (-e )?\.", install, line)
        return line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}") if "127.0.0.1:8000" in line else line

    def start_server(self, line):
        """Start a server, wait until it responds, and return the response."""
        command = f"{line} --port 0".split()
        server = subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, text=True)
        self.servers.append(server)
        log = []
        for log_line in server.stderr:
            log.append(log_line)
            if match := re.search(r"http://127\.0\.0\.1:(\d+)", log_line):
                self.port = int(match[1])
                page = f"{match[0]}/health" if command[1] == "serve" else match[0]
                with urllib.request.urlopen(page, timeout=60) as response:
                    return response.read().decode()
        raise AssertionError("".join(log))

    def close(self):
        for server in self.servers:
            server.terminate()
            server.wait(30)
            server.stderr.close()


def create_files(folder, sam_folder, hub):
    """Create the files that the pages assume, and fill the Hub with the weights that they load by name."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks/pairs").symlink_to(ROOT / "benchmarks/pairs")
    scenes = {split: Scenes(split, num_images=6, image_size=96) for split in ("train", "val", "test")}
    layouts = {
        "street": "coco",
        "VG": "vg",
        "data/visual-genome": "vg",
        "data/objects365": "objects365",
        "data/coco": "coco-panoptic",
        "refer/refcocog": "refcocog",
    }
    for name, layout in layouts.items():
        export_dataset(scenes, folder / name, layout)
    for split in scenes:  # COCO has instances next to the panoptic annotations, of the same images
        content = json.loads((folder / "street" / f"{split}.json").read_text())
        for image in content["images"]:
            image["file_name"] = Path(image["file_name"]).with_suffix(".jpg").name
        (folder / f"data/coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
    (folder / "refer/refcocog/images").rename(folder / "train2014")
    shutil.copytree(folder / "street/val", folder / "photos")
    shutil.copytree(folder / "photos", folder / "more")
    first_image, *_ = sorted((folder / "photos").iterdir())
    Image.open(first_image).convert("RGB").save(folder / "more/one.jpg")
    Image.open(folder / "examples/scene.png").convert("RGB").save(folder / "photo.jpg")
    shutil.copy(folder / "street/val.json", folder / "boxes.json")
    with tarfile.open(folder / "set-0.tar", "w") as archive:
        archive.add(first_image, "0.png")
    (folder / "my-recipe.toml").write_text(RECIPE_TOML)
    (folder / "my-sweep.toml").write_text(SWEEP_TOML)
    write_dlc_bench(folder / "DLC-Bench")
    write_paradlc_bench(folder / "ParaDLC-Bench")
    fill_hub(hub, sam_folder, folder / "hub")


def fill_hub(hub, sam_folder, folder):
    """Add tiny models to the Hub under the names of published ones."""
    torch.manual_seed(0)
    language_model = write_language_model(sca.load("sca-tiny"), folder / "language-model")
    published = build(
        ModelSpec.from_dict(
            {
                "encoder": {"name": "sam", "weights": str(sam_folder)},
                "language_model": {"name": "hf", "weights": str(language_model)},
                "mixer": {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
                "task_tokens": 2,
            }
        )
    )
    hub.models["xk-huang/segment-caption-anything-gpt2_large-vg"] = write_published_checkpoint(
        published, folder / "published"
    )
    hub.models["openai-community/gpt2-large"] = language_model
    (folder / "judge").mkdir()
    hub.models[sca_registry.language_models.get_card("phi-4-mini").options["weights"]] = write_judge(folder / "judge")
    for size in ("base", "large", "huge"):
        hub.models[f"facebook/sam-vit-{size}"] = sam_folder
    build_tiny_model("sam2", SAM2_CONFIGS["sam2"]).save_pretrained(folder / "sam2")
    hub.models["facebook/sam2.1-hiera-tiny"] = folder / "sam2"
    for name, factory in (("blip-base", "blip-base"), ("florence-2-base", "vlm")):
        captioner = sca_registry.captioners.build(factory, **get_tiny_options("captioner", factory)).image_text_model
        captioner.model.save_pretrained(folder / name)
        captioner.processor.save_pretrained(folder / name)
        hub.models[sca_registry.captioners.get_card(name).options["weights"]] = folder / name
    for name in ("grounding-dino-tiny", "d-fine"):
        proposer = sca_registry.proposers.build(name, **get_tiny_options("proposer", name))
        proposer.model.save_pretrained(folder / name)
        proposer.processor.save_pretrained(folder / name)
        hub.models[sca_registry.proposers.get_card(name).options["weights"]] = folder / name


@contextmanager
def open_world(folder, sam_folder):
    """Create a world and serve its Hub; a context manager. sam_folder: weights of a tiny SAM."""
    hub = Hub()
    create_files(folder, sam_folder, hub)
    with hub.run_server() as address:
        world = DocumentEnvironment(folder, address)
        try:
            yield world
        finally:
            world.close()
