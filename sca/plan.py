"""What a combination would cost, before anything is fetched or computed.

The model is built without weights and run on tensors that have shapes and no content, so parameters are exact, and the
operations and the memory are those of the real code: torch's counter adds up the former, and every tensor that is made
is followed until it is let go for the latter. What a kernel allocates for itself is not seen.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sca_registry import get_registry
from sca_registry.contracts import Batch, PromptBatch, Targets
from sca_registry.spec import ModelSpec
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sca.builder import build, resolve_parts
from sca.checkpoints.state import list_stored_tensors
from sca.inference.engine import REGION_BATCH_SIZE
from sca.model import MAX_SEQUENCES_PER_CALL, SegmentCaptioner
from sca.nn.two_way import TwoWayTransformer
from sca.plan_cache import GIB, MAX_PLANNED_REGIONS, Plan, resolve_gpu_memory
from sca.stage_costs import CONSTANT_TYPES, CallCost, MemoryTracker, StageMeter

USABLE_MEMORY_FRACTION = (
    0.92  # the share of a GPU's memory that is planned with: contexts, workspaces and fragments need the rest
)
LAYER_INDEX_ATTRIBUTE = "layer_idx"  # transformers' name for the index of a layer in a cache


def plan_model(
    spec: ModelSpec,
    images: int = 1,
    regions: int = 32,
    words: int = 20,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
    gpu: str | float | None = None,
    on_gpu: bool = False,
) -> Plan:
    """What a spec costs for B images with N regions each and captions of L words, greedy.

    dtype: of the weights; in training, of what autocast computes in. gpu: one of `GPU_MEMORY_GIB`, or GiB. on_gpu:
    computed as on a GPU, also where none is named. Raises RegistryError like `sca.build`, and for an unknown GPU.
    """
    for label, count in (("images", images), ("regions", regions), ("words", words)):
        if count < 1:
            raise ValueError(f"{count} {label}: give 1 or more")
    memory_budget = None if gpu is None else int(resolve_gpu_memory(gpu) * GIB * USABLE_MEMORY_FRACTION)
    model = build(spec, "meta")
    groups = {name: sum(p.numel() for p in parameters) for name, parameters in model.group_parameters().items()}
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _set_checkpoint_sources(model, spec)
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    tensor_sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    stored_names = list_stored_tensors(model)
    if on_gpu or gpu is not None:  # where all regions of a chunk go through all layers together
        for module in _find_two_way_transformers(model):
            module.max_elements_per_chunk = 2**62
    meter = _CostMeter(model if train else model.to(dtype).requires_grad_(False), dtype)
    measure = meter.measure_training_step if train else meter.measure_inference
    try:
        flops, memory = measure(images, regions, words)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"a part of this model decides by what its tensors hold ({error}): only a run shows what it costs"
        ) from error
    max_regions = (
        None
        if memory_budget is None
        else _find_max_regions(lambda count: max(measure(images, count, words)[1].values()), memory_budget)
    )
    return Plan(
        model="+".join(part.name for part in (spec.encoder, spec.mixer, spec.language_model)),
        images=images,
        regions=regions,
        words=words,
        dtype=str(dtype).removeprefix("torch."),
        train=train,
        parameters=groups,
        trainable=num_trainable,
        weights=weight_bytes,
        checkpoint=sum(size for name, size in tensor_sizes.items() if name in stored_names),
        flops=flops,
        memory=memory,
        gpu=None if gpu is None else str(gpu),
        room=memory_budget,
        most_regions=max_regions,
    )


def _set_checkpoint_sources(model: SegmentCaptioner, spec: ModelSpec) -> None:
    """Built without weights, parts do not say where those are that they would have: this says it for them."""
    resolved_parts = resolve_parts(spec, model.encoder)
    for kind in ("encoder", "language_model", "segmenter"):
        part, component = resolved_parts[kind], getattr(model, kind)
        options = {**get_registry(kind).get_card(part.name).options, **part.options}
        if hasattr(component, "checkpoint") and options.get("pretrained", True):
            # the encoder's weights contain those of its default segmenter
            is_bundled = kind == "segmenter" and part.name == model.encoder.default_segmenter
            source = getattr(component, "source", None) or options.get("weights")
            component.checkpoint = source or (model.encoder.checkpoint if is_bundled else None)


def _find_two_way_transformers(model: SegmentCaptioner) -> list[TwoWayTransformer]:
    return [module for module in model.modules() if isinstance(module, TwoWayTransformer)]


def _list_layers(part: nn.Module) -> list[nn.Module]:
    """The members of stacks, of which many are alike, but for those whose `forward` is not that of their class."""
    stacks = [module for module in part.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [layer for stack in stacks for layer in stack if "forward" not in vars(layer)]


def _compute_layer_signature(layer: nn.Module) -> tuple:
    """Return what the cost of a layer depends on, apart from its input; layers that differ in content only have one."""
    signature = []
    for name, module in layer.named_modules():
        attributes = {
            key: value
            if isinstance(value, CONSTANT_TYPES)
            else id(value)  # an object that both share, such as a config
            for key, value in vars(module).items()
            if key != LAYER_INDEX_ATTRIBUTE and (isinstance(value, CONSTANT_TYPES) or not key.startswith("_"))
        }
        tensors = {**module._parameters, **module._buffers}
        shapes = [(key, None if each is None else (each.shape, each.dtype)) for key, each in tensors.items()]
        signature.append((name, type(module), tuple(sorted(attributes.items(), key=str)), tuple(shapes)))
    return tuple(signature)


def _find_layer_index(layer: nn.Module) -> int | None:
    return next(
        (vars(module)[LAYER_INDEX_ATTRIBUTE] for module in layer.modules() if LAYER_INDEX_ATTRIBUTE in vars(module)),
        None,
    )


class _CostMeter:
    """Runs a model without content, stage by stage."""

    def __init__(self, model: SegmentCaptioner, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self.layers = _list_layers(model.encoder) + _list_layers(model.language_model)
        self.cached_costs: dict[Any, CallCost] = {}
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    @torch.no_grad()
    def measure_inference(self, images: int, regions: int, num_tokens: int) -> tuple[dict[str, int], dict[str, int]]:
        """What `Predictor` does: images encoded at once, regions in chunks, `MAX_SEQUENCES_PER_CALL` texts per call."""
        model, image_size = self.model.eval(), self.model.encoder.image_format.size
        prompts = _make_prompts(images, regions, image_size)
        first_chunk, *later_chunks = prompts.iter_chunks(REGION_BATCH_SIZE)
        full_chunks = [chunk for chunk in later_chunks if len(chunk) == REGION_BATCH_SIZE]  # one of them stands for all
        chunk_counts = [(first_chunk, 1), *((chunk, len(full_chunks)) for chunk in full_chunks[:1])]
        chunk_counts += [(chunk, 1) for chunk in later_chunks if len(chunk) < REGION_BATCH_SIZE]
        with self.fake_mode, MemoryTracker() as tracker:
            self._replace_weights()
            stages = StageMeter(tracker, self.cached_costs)
            for module in _find_two_way_transformers(model):
                module._forward_chunk = stages.count_once(partial(TwoWayTransformer._forward_chunk, module), id(module))
            for layer in self.layers:
                run = partial(type(layer).forward, layer)
                layer.forward = stages.count_once(run, _compute_layer_signature(layer), _find_layer_index(layer))
            with stages("encode"):
                features = model.encode(torch.empty(images, 3, image_size, image_size, dtype=self.dtype))
            prefixes, prepared = [], None
            for chunk, times in chunk_counts:
                prefixes += [torch.empty_like(prefixes[0]) for _ in range(times - 1)]  # those that are not run
                with stages("segment", times):
                    segmenter_output = model.segment(features, chunk)
                with stages("mix", times):
                    prepared = model.prepare_mixer(segmenter_output) if prepared is None else prepared
                    prefixes.append(
                        model.build_prefix(model.mix(segmenter_output, prepared), torch.zeros_like(chunk.image_index))
                    )
                del segmenter_output
            prefix = torch.cat(prefixes)
            del prefixes, prepared
            first_rows = prefix[:MAX_SEQUENCES_PER_CALL]
            self._measure_captioning(first_rows, num_tokens, stages)
            for stage in stages.flops.keys() & {"prefill", "decode"}:  # the other pieces cost the same a row
                stages.flops[stage] = stages.flops[stage] * len(prefix) // len(first_rows)
        return stages.flops, stages.memory

    def _measure_captioning(self, prefix: Tensor, num_tokens: int, stages: StageMeter) -> None:
        """Greedy words with a cache; a model without one of keys and values does the same work without."""
        language_model = self.model.language_model
        rows, length = prefix.shape[:2]
        if not getattr(language_model, "has_greedy_loop", False):
            with stages("prefill"):
                language_model.lm_head(language_model.hidden_states(prefix, prefix.new_ones(rows, length))[:, -1])
            with stages("decode"):
                padded_prefix = torch.cat((prefix, prefix.new_zeros(rows, num_tokens - 1, prefix.shape[2])), dim=1)
                language_model.lm_head(
                    language_model.hidden_states(padded_prefix, padded_prefix.new_ones(padded_prefix.shape[:2]))
                )
            return

        causal_model = language_model.model
        logits_options = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(type(causal_model).forward).parameters
            else {}
        )

        def run_model(cache: Any = None, positions: int = length, **inputs: Tensor) -> Any:
            mask = torch.ones(rows, positions, dtype=torch.long)
            return causal_model(**inputs, **logits_options, attention_mask=mask, past_key_values=cache, use_cache=True)

        embeddings = prefix.to(causal_model.dtype)
        with stages("prefill"):
            prefill_output = run_model(inputs_embeds=embeddings)
        if num_tokens == 1:
            return
        token = torch.zeros(rows, 1, dtype=torch.long)
        with stages.count_flops() as first_step_flops:
            run_model(prefill_output.past_key_values, length + 1, input_ids=token)
        longest_inputs = torch.cat((embeddings, embeddings.new_zeros(rows, num_tokens - 2, embeddings.shape[2])), dim=1)
        del prefill_output
        with stages.count_flops():
            cache = run_model(inputs_embeds=longest_inputs, positions=length + num_tokens - 2).past_key_values
        with stages("decode"):  # the last step, whose cache is the longest; the others cost between this and the first
            run_model(cache, length + num_tokens - 1, input_ids=token)
        stages.flops["decode"] = (stages.flops["decode"] + first_step_flops[0]) * (num_tokens - 1) // 2

    def measure_training_step(
        self, images: int, regions: int, num_tokens: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """A step of training with one text a region: forward, backward, and what AdamW keeps."""
        model, image_size = self.model.train(), self.model.encoder.image_format.size
        rows = images * regions
        prompts, has_mask = _make_prompts(images, regions, image_size), torch.ones(rows, dtype=torch.bool)
        attention_mask = torch.ones(rows, num_tokens, dtype=torch.long)
        with self.fake_mode, MemoryTracker() as tracker:
            self._replace_weights()
            stages = StageMeter(tracker, {})
            optimizer_state = [torch.empty(2, *p.shape) for p in model.parameters() if p.requires_grad]
            mask_size = 4 * image_size // model.encoder.stride
            batch = Batch(
                prompts=prompts,
                task_ids=torch.zeros(rows, dtype=torch.long),
                pixel_values=torch.empty(images, 3, image_size, image_size),
                input_ids=torch.zeros(rows, num_tokens, dtype=torch.long),
                attention_mask=attention_mask,
            )
            if hasattr(model.segmenter, "loss"):
                valid_pixels = torch.ones(rows, mask_size, mask_size, dtype=torch.bool)
                batch.targets = Targets(torch.rand(rows, mask_size, mask_size), valid_pixels, has_mask)
            autocast = torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)
            with stages("forward"), autocast:
                loss = model(batch).loss
            with stages("backward"):
                loss.backward()
            del optimizer_state
        return stages.flops, stages.memory

    def _replace_weights(self) -> None:
        """Replaces every tensor of the model by one without content that counts as memory; what is shared stays so."""
        empty_tensors: dict[int, Tensor] = {}
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in empty_tensors:
                            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                            is_parameter = isinstance(tensor, nn.Parameter)
                            empty_tensors[id(tensor)] = (
                                nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                            )
                        tensors[name] = empty_tensors[id(tensor)]


def _make_prompts(images: int, regions: int, image_size: int) -> PromptBatch:
    """Boxes of a third of an image's side. They have content, as what is asked for always does."""
    image_index = torch.arange(images).repeat_interleave(regions)
    return PromptBatch(
        image_index, boxes=torch.tensor([[0.0, 0.0, image_size / 3, image_size / 3]]).repeat(len(image_index), 1)
    )


def _find_max_regions(measure_memory: Callable[[int], int], memory_budget: int) -> int | None:
    """Find how many regions per image fit into memory; None if `MAX_PLANNED_REGIONS` fit, 0 if none does.

    The result fits; the largest count that fits is at most 2 %, or 1, higher. Memory grows with regions in pieces that
    are straight, so that a guess between two counts that are near each other is mostly a good one.
    """
    low, high = (
        (1, measure_memory(1)),
        (MAX_PLANNED_REGIONS, measure_memory(MAX_PLANNED_REGIONS)),
    )  # counts and what they need
    if high[1] <= memory_budget:
        return None
    if low[1] > memory_budget:
        return 0
    while (gap := high[0] - low[0]) > 1 + low[0] // 50:
        if high[0] > 2 * low[0]:
            guess = math.isqrt(low[0] * high[0])
        else:
            fraction = (memory_budget - low[1]) / max(high[1] - low[1], 1)
            guess = low[0] + round(min(max(fraction, 1 / 16), 15 / 16) * gap)
        guess = min(max(guess, low[0] + 1), high[0] - 1)
        candidate = (guess, measure_memory(guess))
        low, high = (candidate, high) if candidate[1] <= memory_budget else (low, candidate)
    return low[0]
