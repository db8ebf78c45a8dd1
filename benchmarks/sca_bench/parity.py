"""How close a device and a data type come to float32 on a CPU: recorded outputs, and captions of drawn scenes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sca_registry.contracts import TASKS, Batch, Prompt, PromptBatch
from torch import Tensor

import sca
from sca.inference.processor import Processor
from sca.model import SegmentCaptioner
from sca.nn.masks import select_best_masks
from sca_bench.worker import record

BEAMS, NEW_TOKENS = (1, 3), 8  # of the recorded captions
SCENES_AT_ONCE = 10


def work(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Measure as a job of a launcher.

    Args:
        config: `device`, `dtype`, `tf32` (whether convolutions in float32 may use it), and either `golden`, a folder of
            recorded checkpoints, or `scenes`, how many to draw.
        folder: Not used.
    """

    def measure(row: dict[str, Any]) -> None:
        torch.backends.cudnn.allow_tf32 = config.get("tf32", False)
        device, dtype = config["device"], getattr(torch, config["dtype"])
        if "golden" in config:
            row["golden"] = compare_golden_folders(Path(config["golden"]), device, dtype)
        else:
            row["scenes"] = compare_scenes(config["scenes"], device, dtype)

    return record(measure, config["device"])


def compare_golden_folders(folder: Path, device: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Compare every recorded checkpoint in a folder; see `compare_golden`.

    Raises:
        ValueError: The folder contains no recorded checkpoint.
    """
    folders = sorted(path.parent for path in folder.glob("*/golden.safetensors"))
    if not folders:
        raise ValueError(f"{folder} contains no */golden.safetensors; run this from a checkout of the repository")
    return {each.name: compare_golden(each, device, dtype) for each in folders}


@torch.no_grad()
def compare_golden(folder: Path, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Compare a checkpoint's outputs with those that the published implementation recorded in float32 on a CPU.

    Returns:
        The largest absolute difference of each output, and as `ids` the share of captions with identical token ids.
    """
    model = sca.load(folder).to(device=device, dtype=dtype)
    recorded = {name: value.to(device) for name, value in load_file(folder / "golden.safetensors").items()}
    flat = {name: value.flatten(0, 1) for name, value in recorded.items() if name.startswith(("input_", "attention_"))}
    images, regions = recorded["input_boxes"].shape[:2]
    owner = torch.arange(images, device=device).repeat_interleave(regions)
    asked = {
        "box": PromptBatch(owner, boxes=flat["input_boxes"]),
        "point": PromptBatch(owner, points=flat["input_points"], labels=flat["input_point_labels"]),
    }
    pixels = recorded["pixel_values"].to(dtype)
    found: dict[str, list[float]] = {}

    def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
        found.setdefault(name, []).append(float((ours.float() - theirs).abs().max()))

    features, same = model.encode(pixels), []
    compare("features", features, recorded["image_embeddings"])
    for kind, prompts in asked.items():
        for number, task in enumerate(TASKS):
            tasks = torch.full_like(owner, number)
            batch = Batch(prompts, tasks, pixels, input_ids=flat["input_ids"], attention_mask=flat["attention_mask"])
            output, name = model(batch), f"{kind}.{task}"
            compare("scores", output.regions.scores, recorded[f"{name}.iou_scores"].flatten(0, 1))
            compare("masks", output.regions.masks, recorded[f"{name}.pred_masks"].flatten(0, 1))
            compare("queries", output.queries, recorded[f"{name}.query_outputs"])
            compare("logits", output.logits, recorded[f"{name}.logits"][:, :-1][batch.attention_mask.bool()])
            compare("loss", output.loss, recorded[f"{name}.loss"])
            for beams in BEAMS:
                ids = model.generate(features, prompts, tasks, beams=beams, max_new_tokens=NEW_TOKENS).sequences[:, 0]
                theirs = recorded[f"{name}.generated.beams{beams}"].flatten(0, 2)[:, 1:]  # without the placeholder
                same += equal_captions(ids, theirs, model.language_model.model.config.eos_token_id)
    return {name: max(values) for name, values in found.items()} | {"ids": sum(same) / len(same)}


def equal_captions(ours: Tensor, theirs: Tensor, end: int) -> list[bool]:
    """Return for each row of token ids whether both are the same up to and with the end token."""
    rows = zip(ours.tolist(), theirs.tolist(), strict=True)
    return [_until(one, end) == _until(other, end) for one, other in rows]


def _until(ids: Sequence[int], end: int) -> Sequence[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def compare_scenes(count: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare sca-tiny on a device and in a data type with itself in float32 on the CPU, on `count` drawn scenes.

    Returns:
        regions; `captions`, the share with identical token ids; the least and the mean IoU of the chosen masks on the
        segmenter's grid; and whether every value was finite.
    """
    from sca.data.scenes import Scenes

    scenes = Scenes("test", count=count)
    reference = sca.load("sca-tiny")
    other = sca.load("sca-tiny").to(device=device, dtype=dtype)
    end = reference.language_model.tokenizer.eos_token_id
    same: list[bool] = []
    ious: list[float] = []
    finite = True
    for pixels, prompts in _read(scenes, Processor.from_encoder(reference.encoder)):
        masks, ids = _predict(reference, pixels, prompts)
        found, theirs = _predict(other, pixels.to(device, dtype), prompts.to(device))
        found, theirs = found.cpu(), theirs.cpu()
        width = max(ids.shape[1], theirs.shape[1])
        same += equal_captions(_widen(ids, width, end), _widen(theirs, width, end), end)
        finite &= bool(found.isfinite().all())
        inside, outside = (masks > 0) & (found > 0), (masks > 0) | (found > 0)
        ious += ((inside.sum((1, 2)) + 1e-9) / (outside.sum((1, 2)) + 1e-9)).tolist()
    return {
        "regions": len(same),
        "captions": sum(same) / len(same),
        "least_iou": min(ious),
        "mean_iou": sum(ious) / len(ious),
        "finite": finite,
    }


def _read(scenes: Any, processor: Processor) -> Iterator[tuple[Tensor, PromptBatch]]:
    """Yield pixels and box prompts of a few scenes at a time."""
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        samples = [scenes[number] for number in range(start, min(start + SCENES_AT_ONCE, len(scenes)))]
        images = [sample.image for sample in samples]
        requests = [[Prompt(box=tuple(region.box)) for region in sample.regions] for sample in samples]
        ((_, prompts),) = processor.group_prompts(requests, [processor.compute_frame(*image.size) for image in images])
        yield processor.preprocess_images(images), prompts


@torch.inference_mode()
def _predict(model: SegmentCaptioner, pixels: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """Return the chosen masks (N, 4h, 4w) as logits, and token ids (N, L)."""
    regions = model.segment(model.encode(pixels), prompts)
    tasks = torch.full_like(prompts.image_index, TASKS.index("caption"))
    prefix = model.build_prefix(model.mix(regions), tasks)
    ids = model.language_model.generate(prefix, **model.spec.generation).sequences[:, 0]
    return select_best_masks(regions.masks, regions.iou_scores).float(), ids


def _widen(ids: Tensor, width: int, end: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=end)
