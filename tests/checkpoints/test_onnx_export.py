"""The layout onnx: what it rejects, its own check, and 200 scenes in an environment without torch."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sca_registry.contracts import TASKS, Prompt
from tool_environment import create_tool_environment

import sca
from sca.checkpoints.onnx_export import write_onnx_graphs
from sca.data.scenes import Scenes
from sca.inference.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
PIP_OPTIONS = ("-c", ROOT / "constraints.txt")
LAYOUT = ("--layout", "onnx")
NUM_SCENES = 200
CAPTION_SCENES = """
import importlib.util, json, sys
import numpy as np
from PIL import Image
assert importlib.util.find_spec("torch") is None
sys.path.insert(0, sys.argv[1])
from onnx_captions import OnnxCaptioner
captioner = OnnxCaptioner(sys.argv[2])
for line in open(sys.argv[3]):
    scene = json.loads(line)
    ids, scores, masks, ious = captioner.caption(Image.open(scene["file"]), scene["boxes"])
    values = {"ids": [each.tolist() for each in ids], "scores": scores.tolist(), "ious": ious.tolist()}
    print(json.dumps({**values, "masks": [np.packbits(mask).tolist() for mask in masks]}))
"""


def test_onnx_export_names_a_missing_package_and_writes_nothing(build_small_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"requires onnxruntime; run pip install 'segment-caption-anything\[onnx\]'"):
        write_onnx_graphs(build_small_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_half_precision(model):
    model.bfloat16()


def remove_tokenizer(model):
    model.language_model.tokenizer = None


def replace_tasks(model):
    model.spec = replace(model.spec, tasks=dict.fromkeys(TASKS, "describe it"), task_tokens=0)


def remove_greedy_loop(model):
    model.language_model = model.language_model.to_transformers()
    model.language_model.structure = replace(model.language_model.structure, has_greedy_loop=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (make_half_precision, r"parameters of torch\.bfloat16; load the model with precision=float32"),
        (remove_tokenizer, "'tiny-gpt2' without a fast tokenizer"),
        (replace_tasks, "tasks with a prompt"),
        (remove_greedy_loop, "'tiny-gpt2', whose cache is not made of keys and values"),
    ],
)
def test_onnx_export_rejects_unsupported_models(change, message, build_small_model, tmp_path):
    model = build_small_model()
    change(model)
    with pytest.raises(ValueError, match=f"the layout onnx does not support .*{message}"):
        write_onnx_graphs(model, tmp_path / "out")


@pytest.mark.slow
def test_onnx_export_names_the_graph_that_cannot_be_traced(build_small_model, tmp_path, monkeypatch):
    for package in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))  # not used before the trace
    model = build_small_model()
    encode = model.encoder.forward
    monkeypatch.setattr(
        model.encoder, "forward", lambda pixel_values: encode(pixel_values * (1 if pixel_values.mean() > 0 else 2))
    )
    with pytest.raises(ValueError, match=r"does not support this model: encoder cannot be traced \("):
        write_onnx_graphs(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def exporting_python(tmp_path_factory):
    """Interpreter with the packages of this environment and those of the extra onnx."""
    site_packages = sysconfig.get_path("purelib")
    return create_tool_environment(
        tmp_path_factory.mktemp("exporting"),
        *("onnxscript", "onnxruntime"),
        pip_options=PIP_OPTIONS,
        path_file=f"import site; site.addsitedir({site_packages!r})\n",
    )


def run_python(interpreter, *arguments):
    return subprocess.run([interpreter, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.all
def test_onnx_graphs_run_without_torch_and_caption_scenes_with_equal_ids(exporting_python, tmp_path, tmp_path_factory):
    exported = run_python(exporting_python, "-m", "sca", "export", "sca-tiny", tmp_path / "out", *LAYOUT)
    assert exported.returncode == 0, exported.stderr
    scenes = [*Scenes("test", num_images=NUM_SCENES, image_size=160)]
    lines = []
    for scene in scenes:
        scene.image.save(tmp_path / f"{scene.image_id}.png")
        boxes = [region.box for region in scene.regions]
        lines.append(json.dumps({"file": str(tmp_path / f"{scene.image_id}.png"), "boxes": boxes}))
    (tmp_path / "scenes.jsonl").write_text("\n".join(lines))
    interpreter = create_tool_environment(
        tmp_path_factory.mktemp("without-torch"),
        *("onnxruntime", "numpy", "pillow", "tokenizers"),
        pip_options=PIP_OPTIONS,
    )
    captioned = run_python(
        interpreter, "-c", CAPTION_SCENES, ROOT / "examples", tmp_path / "out", tmp_path / "scenes.jsonl"
    )
    assert captioned.returncode == 0, captioned.stderr
    engine = Engine(sca.load("sca-tiny"))
    for scene, line in zip(scenes, captioned.stdout.splitlines(), strict=True):
        actual = json.loads(line)
        encoded, prompts = engine.encode([scene.image]), [Prompt(box=region.box) for region in scene.regions]
        assert actual["ids"] == generate_ids(engine, encoded, prompts)
        captions = engine.caption_batch(encoded, [prompts])[0]
        assert actual["scores"] == pytest.approx([caption.score for caption in captions], abs=1e-4)
        assert actual["ious"] == pytest.approx([caption.predicted_iou for caption in captions], abs=1e-4)
        for mask, caption in zip(actual["masks"], captions, strict=True):
            pixels = np.unpackbits(np.uint8(mask), count=caption.array.size).reshape(caption.array.shape)
            assert (pixels != caption.array).mean() < 1e-3  # logits near zero


def generate_ids(engine, encoded, prompts):
    """Return the token ids of each caption, EOS included."""
    ((_, batch),) = engine.processor.group_prompts([prompts], encoded.frames)
    generated = engine.model.generate(encoded.features, batch, torch.ones(len(batch), dtype=torch.long))
    (eos_token_id,) = engine.model.language_model.eos_token_ids
    rows = generated.sequences[:, 0].tolist()
    return [row[: row.index(eos_token_id) + 1 if eos_token_id in row else None] for row in rows]


@pytest.mark.all
def test_onnx_export_rejects_a_graph_that_differs_from_torch(exporting_python, build_small_model, tmp_path):
    sca.save(build_small_model(), tmp_path / "model")
    program = "import sys, sca, sca.checkpoints.onnx_export as export; export.TOLERANCE = 0; "
    program += "export.write_onnx_graphs(sca.load(sys.argv[1]), export.Path(sys.argv[2]))"
    process = run_python(exporting_python, "-c", program, tmp_path / "model", tmp_path / "out")
    assert "the output 'features' of encoder differs by" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.all
@pytest.mark.parametrize(
    "fields",
    [
        {"mixer": {"name": "resampler", "num_heads": 2, "depth": 1, "mlp_dim": 32}, "geometry": "token", "lora": 2},
        {"mixer": {"name": "roi-pool"}},  # the number of its bilinear samples depends on the boxes
    ],
)
def test_onnx_export_supports_other_components(fields, exporting_python, build_small_model, tmp_path):
    sca.save(build_small_model(**fields), tmp_path / "model")
    exported = run_python(exporting_python, "-m", "sca", "export", tmp_path / "model", tmp_path / "out", *LAYOUT)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "out" / "step.onnx").exists()
