"""Compare a device and data type with float32 on a CPU: recorded outputs, and captions of generated scenes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from sca_registry.contracts import TASKS, Batch, Prompt, PromptBatch
from torch import Tensor

import sca
from sca.checkpoints.layout import PUBLISHED_LAYOUT, read_layout
from sca.inference.processor import Processor
from sca.language_models.causal import CausalLanguageModel
from sca.model import SegmentCaptioner
from sca.nn.masks import select_best_masks
from sca_bench.worker import run_measurement

RECORDED_NUM_BEAMS, RECORDED_MAX_NEW_TOKENS = (1, 3), 8  # settings of the recorded captions
SCENES_PER_BATCH = 10


def run_job(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Measure parity as a launcher job.

    Args:
        config: `device`, `dtype`, `tf32` (whether float32 convolutions may use TF32), and either `golden_folder`, a
            folder of recorded checkpoints, or `num_scenes`, the number of scenes to generate.
        folder: Unused.

    Returns:
        The measurements, JSON-serializable.
    """

    def measure_parity(row: dict[str, Any]) -> None:
        torch.backends.cudnn.allow_tf32 = config.get("tf32", False)
        device, dtype = config["device"], getattr(torch, config["dtype"])
        if "golden_folder" in config:
            row["golden"] = compare_golden_folders(Path(config["golden_folder"]), device, dtype)
        else:
            row["scenes"] = compare_scenes(config["num_scenes"], device, dtype)

    return run_measurement(measure_parity, config["device"])


def compare_golden_folders(folder: Path, device: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Compare every recorded checkpoint in a folder, see `compare_golden`.

    Args:
        folder: Folder of recorded checkpoints.
        device: Device of the model.
        dtype: Data type of the model.

    Returns:
        Differences by checkpoint and output.

    Raises:
        ValueError: The folder contains no recorded checkpoint.
    """
    golden_folders = sorted(path.parent for path in folder.glob("*/golden.safetensors"))
    folders = [each for each in golden_folders if read_layout(each) == PUBLISHED_LAYOUT]
    if not folders:
        raise ValueError(f"{folder} contains no */golden.safetensors; run this from a checkout of the repository")
    return {each.name: compare_golden(each, device, dtype) for each in folders}


@torch.no_grad()
def compare_golden(folder: Path, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Compare a checkpoint's outputs with those that the original SCA code recorded in float32 on a CPU.

    Args:
        folder: Folder of a recorded checkpoint.
        device: Device of the model.
        dtype: Data type of the model.

    Returns:
        The maximum absolute difference of each output, and `identical_captions`, the fraction of captions with
        identical token ids.
    """
    model = sca.load(folder).to(device=device, dtype=dtype)
    # recorded checkpoints have a language model of transformers
    eos_token_id = cast("CausalLanguageModel", model.language_model).model.config.eos_token_id
    recorded = {name: value.to(device) for name, value in load_file(folder / "golden.safetensors").items()}
    inputs = {
        name: value.flatten(0, 1) for name, value in recorded.items() if name.startswith(("input_", "attention_"))
    }
    num_images, num_regions = recorded["input_boxes"].shape[:2]
    image_index = torch.arange(num_images, device=device).repeat_interleave(num_regions)
    prompts_by_type = {
        "box": PromptBatch(image_index, boxes=inputs["input_boxes"]),
        "point": PromptBatch(image_index, points=inputs["input_points"], labels=inputs["input_point_labels"]),
    }
    pixels = recorded["pixel_values"].to(dtype)
    is_recorded_token = inputs["attention_mask"].bool()
    differences: dict[str, list[float]] = {}

    def record_difference(name: str, actual: Tensor, recorded_ids: Tensor) -> None:
        differences.setdefault(name, []).append(float((actual.float() - recorded_ids).abs().max()))

    features, is_same = model.encode(pixels), []
    record_difference("features", features, recorded["image_embeddings"])
    for prompt_type, prompts in prompts_by_type.items():
        for task_id, task in enumerate(TASKS):
            task_ids = torch.full_like(image_index, task_id)
            batch = Batch(
                prompts, task_ids, pixels, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
            output, name = model(batch), f"{prompt_type}.{task}"
            record_difference("scores", output.regions.iou_scores, recorded[f"{name}.iou_scores"].flatten(0, 1))
            record_difference("masks", output.regions.masks, recorded[f"{name}.pred_masks"].flatten(0, 1))
            record_difference("queries", output.queries, recorded[f"{name}.query_outputs"])
            record_difference("logits", output.logits, recorded[f"{name}.logits"][:, :-1][is_recorded_token])
            record_difference("loss", output.loss, recorded[f"{name}.loss"])
            for num_beams in RECORDED_NUM_BEAMS:
                ids = model.generate(
                    features, prompts, task_ids, num_beams=num_beams, max_new_tokens=RECORDED_MAX_NEW_TOKENS
                ).sequences[:, 0]
                # without the placeholder token
                recorded_ids = recorded[f"{name}.generated.beams{num_beams}"].flatten(0, 2)[:, 1:]
                is_same += compare_captions(ids, recorded_ids, eos_token_id)
    return {name: max(values) for name, values in differences.items()} | {
        "identical_captions": sum(is_same) / len(is_same)
    }


def compare_captions(first_ids: Tensor, second_ids: Tensor, eos_token_id: int) -> list[bool]:
    """Return for each row of token ids whether both are identical up to and including the end token."""
    rows = zip(first_ids.tolist(), second_ids.tolist(), strict=True)
    return [_truncate_after_eos(one, eos_token_id) == _truncate_after_eos(other, eos_token_id) for one, other in rows]


def _truncate_after_eos(ids: Sequence[int], eos_token_id: int) -> Sequence[int]:
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids


def compare_scenes(num_scenes: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare sca-tiny on a device and in a data type with float32 on the CPU, on `num_scenes` generated scenes.

    Args:
        num_scenes: Number of generated scenes.
        device: Device of the model.
        dtype: Data type of the model.

    Returns:
        `num_regions`; `identical_captions`, the fraction of captions with identical token ids; the minimum and mean IoU
        of the selected masks on the segmenter's grid; and whether every value was finite.
    """
    from sca.data.scenes import Scenes

    scenes = Scenes("test", num_images=num_scenes)
    reference_model = sca.load("sca-tiny")
    tested_model = sca.load("sca-tiny").to(device=device, dtype=dtype)
    tokenizer = reference_model.language_model.tokenizer
    assert tokenizer is not None  # of sca-tiny
    eos_token_id = tokenizer.eos_token_id
    is_same: list[bool] = []
    ious: list[float] = []
    is_finite = True
    for pixels, prompts in _iter_scene_batches(scenes, Processor.from_encoder(reference_model.encoder)):
        masks, ids = _predict_masks_and_ids(reference_model, pixels, prompts)
        tested_masks, tested_ids = _predict_masks_and_ids(tested_model, pixels.to(device, dtype), prompts.to(device))
        tested_masks, tested_ids = tested_masks.cpu(), tested_ids.cpu()
        width = max(ids.shape[1], tested_ids.shape[1])
        is_same += compare_captions(
            _pad_ids(ids, width, eos_token_id), _pad_ids(tested_ids, width, eos_token_id), eos_token_id
        )
        is_finite &= bool(tested_masks.isfinite().all())
        intersection, union = (masks > 0) & (tested_masks > 0), (masks > 0) | (tested_masks > 0)
        ious += ((intersection.sum((1, 2)) + 1e-9) / (union.sum((1, 2)) + 1e-9)).tolist()
    return {
        "num_regions": len(is_same),
        "identical_captions": sum(is_same) / len(is_same),
        "min_iou": min(ious),
        "mean_iou": sum(ious) / len(ious),
        "is_finite": is_finite,
    }


def _iter_scene_batches(scenes: Any, processor: Processor) -> Iterator[tuple[Tensor, PromptBatch]]:
    """Yield the pixels and box prompts of a few scenes at a time."""
    for start in range(0, len(scenes), SCENES_PER_BATCH):
        samples = [scenes[index] for index in range(start, min(start + SCENES_PER_BATCH, len(scenes)))]
        images = [sample.image for sample in samples]
        requests = [[Prompt(box=tuple(region.box)) for region in sample.regions] for sample in samples]
        ((_, prompts),) = processor.group_prompts(requests, [processor.compute_frame(*image.size) for image in images])
        yield processor.preprocess_images(images), prompts


@torch.inference_mode()
def _predict_masks_and_ids(model: SegmentCaptioner, pixels: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """Return the mask logits (N, 4h, 4w) of the selected masks, and token ids (N, L)."""
    regions = model.segment(model.encode(pixels), prompts)
    task_ids = torch.full_like(prompts.image_index, TASKS.index("caption"))
    prefix = model.build_prefix(model.mix(regions), task_ids)
    ids = model.language_model.generate(prefix, **model.spec.generation).sequences[:, 0]
    assert regions.masks is not None  # of SAM's segmenter
    assert regions.iou_scores is not None
    return select_best_masks(regions.masks, regions.iou_scores).float(), ids


def _pad_ids(ids: Tensor, length: int, pad_token_id: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad_token_id)
