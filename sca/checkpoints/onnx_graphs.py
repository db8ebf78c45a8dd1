"""The modules that `sca export --layout onnx` traces: the encoder, the regions and the two passes of language models.

Each module has tensors as inputs and outputs, and returns what the model computes for one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from sca_registry.contracts import PromptBatch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sca.checkpoints.export import merge_lora
from sca.language_models.causal import CausalLanguageModel
from sca.language_models.tiny_gpt2 import convert_tiny_gpt2
from sca.model import SegmentCaptioner

REGIONS, POINTS, PAST = "regions", "points", "past_positions"  # names of dynamic dimensions
BOXES_GRAPH, POINTS_GRAPH = "regions_from_boxes", "regions_from_points"
CAPTION_TASK = torch.tensor([1])
TRACED_REGIONS, CHECKED_REGIONS = 3, 2  # different ones, because their number is dynamic


class Graph(NamedTuple):
    """Module to export.

    Attributes:
        name: Name of the file without suffix.
        module: Module with the inputs as positional arguments.
        dynamic_axes: Names of the dynamic dimensions of each input, by its name; the inputs are in this order.
        output_names: Names of the outputs.
        sample_inputs: Function from a number of regions to random inputs.
    """

    name: str
    module: nn.Module
    dynamic_axes: Mapping[str, Mapping[int, str]]
    output_names: tuple[str, ...]
    sample_inputs: Callable[[int], tuple[Tensor, ...]]


class EncoderGraph(nn.Module):
    """Encoder: normalized RGB images (1, 3, S, S) -> features (1, C, h, w).

    Args:
        model: Model.
    """

    def __init__(self, model: SegmentCaptioner):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode an image."""
        is_bgr = self.model.encoder.image_format.channel_order == "bgr"
        return self.model.encode(pixel_values.flip(1) if is_bgr else pixel_values)


class RegionsGraph(nn.Module):
    """Segmenter, mixer and projection: features and prompts -> masks, predicted IoU and prefixes.

    Args:
        model: Model.
    """

    def __init__(self, model: SegmentCaptioner):
        super().__init__()
        self.model = model

    def embed_regions(
        self, features: Tensor, prompts: PromptBatch, image_size: Tensor, content_size: Tensor, task_id: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the prefixes (N, K, E) of regions, and the masks and predicted IoU of a segmenter that predicts them.

        Args:
            features: (1, C, h, w) features of the image.
            prompts: N prompts in pixels of the model input.
            image_size: (2,) width and height of the image.
            content_size: (2,) width and height of the resized image in the model input.
            task_id: (1,) index of the task.

        Returns:
            Prefixes (N, K, E), mask logits (N, M, 4h, 4w) and predicted IoU (N, M).
        """
        num_regions = len(prompts)
        image_box = torch.cat((torch.zeros(2), content_size.float()))
        prompts.image_boxes = image_box.expand(num_regions, 4)
        prompts.aspect_ratios = (image_size[:1] / image_size[1:]).expand(num_regions)
        regions = self.model.segment(features, prompts)
        geometry = self.model.compute_geometry(regions, prompts)
        prefix = self.model.build_prefix(self.model.mix(regions), task_id.expand(num_regions), geometry)
        if regions.masks is None or regions.iou_scores is None:
            return (prefix,)
        return prefix, regions.masks, regions.iou_scores


class BoxRegionsGraph(RegionsGraph):
    """Regions of box prompts."""

    def forward(
        self, features: Tensor, boxes: Tensor, image_size: Tensor, content_size: Tensor, task_id: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the outputs of `embed_regions` for boxes (N, 4) x1 y1 x2 y2 in pixels of the image."""
        scale = content_size / image_size
        prompts = PromptBatch(torch.zeros(len(boxes), dtype=torch.long), boxes=boxes * torch.cat((scale, scale)))
        return self.embed_regions(features, prompts, image_size, content_size, task_id)


class PointRegionsGraph(RegionsGraph):
    """Regions of point prompts."""

    def forward(
        self,
        features: Tensor,
        points: Tensor,
        labels: Tensor,
        image_size: Tensor,
        content_size: Tensor,
        task_id: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the outputs of `embed_regions` for points (N, P, 2) in pixels of the image and their labels (N, P)."""
        image_index = torch.zeros(len(points), dtype=torch.long)
        prompts = PromptBatch(image_index, points=points * (content_size / image_size), labels=labels)
        return self.embed_regions(features, prompts, image_size, content_size, task_id)


class LanguageModelGraph(nn.Module):
    """Base class of the passes of a language model, which return logits and the KV cache.

    Args:
        language_model: Language model.
        model: Its model of transformers, with LoRA merged.
    """

    def __init__(self, language_model: CausalLanguageModel, model: PreTrainedModel):
        super().__init__()
        self.embed = model.get_input_embeddings()
        self.body = model.get_submodule(language_model.structure.body_name)
        self.head = language_model.structure.build_head(model)

    def run(self, embeddings: Tensor, cache: DynamicCache) -> tuple[Tensor, ...]:
        """Extend a cache by embeddings (N, L, E), and return the last logits (N, V) and the tensors of the cache."""
        states = self.body(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        logits = self.head(inputs_embeds=states, use_cache=False).logits[:, 0]
        layers = cast("Any", cache.layers)
        return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


class PrefillGraph(LanguageModelGraph):
    """First pass: prefixes (N, K, E) -> logits of the first token (N, V), and keys and values of each layer."""

    def forward(self, prefix: Tensor) -> tuple[Tensor, ...]:
        """Process prefixes."""
        return self.run(prefix, DynamicCache())


class StepGraph(LanguageModelGraph):
    """Later passes: token ids (N, 1), keys and values -> logits of the next token, and longer keys and values."""

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Process one token of each region."""
        pairs = [*zip(past[::2], past[1::2], strict=True)]
        return self.run(self.embed(input_ids), DynamicCache(pairs))


def build_graphs(model: SegmentCaptioner) -> list[Graph]:
    """Build the modules to export.

    Args:
        model: Model in eval mode.

    Returns:
        Encoder, regions from boxes, regions from points, prefill and step.
    """
    language_model = cast("CausalLanguageModel", convert_tiny_gpt2(model.language_model))
    causal_model = merge_lora(language_model.model).eval()
    prefill = PrefillGraph(language_model, causal_model)
    step = StepGraph(language_model, causal_model)
    image_size = model.encoder.image_format.size
    sizes = torch.tensor([2.0 * image_size, image_size]), torch.tensor([image_size, image_size / 2.0])

    def sample_image(num_regions: int) -> tuple[Tensor, ...]:
        return (torch.randn(1, 3, image_size, image_size),)

    def sample_boxes(num_regions: int) -> tuple[Tensor, ...]:
        corners = torch.rand(num_regions, 2, 2).sort(dim=1).values * sizes[0]
        return model.encode(*sample_image(1)), corners.flatten(1), *sizes, CAPTION_TASK

    def sample_points(num_regions: int) -> tuple[Tensor, ...]:
        points = torch.rand(num_regions, num_regions + 1, 2) * sizes[0]
        labels = torch.randint(2, (num_regions, num_regions + 1))
        return model.encode(*sample_image(1)), points, labels, *sizes, CAPTION_TASK

    def sample_prefix(num_regions: int) -> tuple[Tensor, ...]:
        return (BoxRegionsGraph(model)(*sample_boxes(num_regions))[0],)

    def sample_cache(num_regions: int) -> tuple[Tensor, ...]:
        logits, *cache = prefill(*sample_prefix(num_regions))
        for _ in range(TRACED_REGIONS - num_regions):  # the length of the cache is dynamic, too
            logits, *cache = step(logits.argmax(1, keepdim=True), cache)
        return logits.argmax(1, keepdim=True), *cache

    num_tensors = len(prefill(*sample_prefix(1))) - 1
    tensor_names = [f"{index}.{kind}" for index in range(num_tensors // 2) for kind in ("key", "value")]
    cache_outputs = ("logits", *(f"present.{name}" for name in tensor_names))
    past_axes = {f"past_key_values.{name}": {0: REGIONS, 2: PAST} for name in tensor_names}
    image_axes: dict[str, Mapping[int, str]] = {"image_size": {}, "content_size": {}, "task_id": {}}
    has_masks = len(BoxRegionsGraph(model)(*sample_boxes(1))) > 1
    region_outputs = ("prefix", "masks", "iou_scores") if has_masks else ("prefix",)
    return [
        Graph("encoder", EncoderGraph(model), {"pixel_values": {}}, ("features",), sample_image),
        Graph(
            BOXES_GRAPH,
            BoxRegionsGraph(model),
            {"features": {}, "boxes": {0: REGIONS}, **image_axes},
            region_outputs,
            sample_boxes,
        ),
        Graph(
            POINTS_GRAPH,
            PointRegionsGraph(model),
            {"features": {}, "points": {0: REGIONS, 1: POINTS}, "labels": {0: REGIONS, 1: POINTS}, **image_axes},
            region_outputs,
            sample_points,
        ),
        Graph("prefill", prefill, {"prefix": {0: REGIONS}}, cache_outputs, sample_prefix),
        Graph("step", step, {"input_ids": {0: REGIONS}, **past_axes}, cache_outputs, sample_cache),
    ]
