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
from sca_registry import registry
from sca_registry.contracts import Batch, PromptBatch, Targets
from sca_registry.spec import ModelSpec
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sca.checkpoints.state import stored
from sca.composition import build, parts
from sca.inference.engine import REGIONS
from sca.model import ROWS, SegmentCaptioner
from sca.nn.two_way import TwoWayTransformer
from sca.plan_cache import GIB, LIMIT, Plan, memory_of
from sca.stage_costs import CONSTANTS, Known, Live, Stages

SPARE = 0.92  # the share of a GPU's memory that is planned with: contexts, workspaces and fragments need the rest
LAYER_INDEX = "layer_idx"  # transformers' name for the index of a layer in a cache


def plan(
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

    dtype: of the weights; in training, of what autocast computes in. gpu: one of `GPUS`, or GiB. on_gpu: computed as on
    a GPU, also where none is named. Raises RegistryError like `sca.build`, and for an unknown GPU.
    """
    for what, number in (("images", images), ("regions", regions), ("words", words)):
        if number < 1:
            raise ValueError(f"{number} {what}: give 1 or more")
    room = None if gpu is None else int(memory_of(gpu) * GIB * SPARE)
    model = build(spec, "meta")
    groups = {name: sum(p.numel() for p in parameters) for name, parameters in model.groups().items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _refer_to_sources(model, spec)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    names = stored(model)
    if on_gpu or gpu is not None:  # where all regions of a chunk go through all layers together
        for module in _two_way(model):
            module.together = 2**62
    cost = _Cost(model if train else model.to(dtype).requires_grad_(False), dtype)
    measure = cost.step if train else cost.answer
    try:
        flops, memory = measure(images, regions, words)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"a part of this model decides by what its tensors hold ({error}): only a run shows what it costs"
        ) from error
    most = None if room is None else _most(lambda number: max(measure(images, number, words)[1].values()), room)
    return Plan(
        model="+".join(part.name for part in (spec.encoder, spec.mixer, spec.language_model)),
        images=images,
        regions=regions,
        words=words,
        dtype=str(dtype).removeprefix("torch."),
        train=train,
        parameters=groups,
        trainable=trained,
        weights=weights,
        checkpoint=sum(size for name, size in sizes.items() if name in names),
        flops=flops,
        memory=memory,
        gpu=None if gpu is None else str(gpu),
        room=room,
        most_regions=most,
    )


def _refer_to_sources(model: SegmentCaptioner, spec: ModelSpec) -> None:
    """Built without weights, parts do not say where those are that they would have: this says it for them."""
    chosen = parts(spec, model.encoder)
    for kind in ("encoder", "language_model", "segmenter"):
        part, built = chosen[kind], getattr(model, kind)
        options = {**registry(kind).card(part.name).options, **part.options}
        if hasattr(built, "checkpoint") and options.get("pretrained", True):
            brought = kind == "segmenter" and part.name == model.encoder.default_segmenter  # with the encoder's weights
            source = getattr(built, "source", None) or options.get("weights")
            built.checkpoint = source or (model.encoder.checkpoint if brought else None)


def _two_way(model: SegmentCaptioner) -> list[TwoWayTransformer]:
    return [module for module in model.modules() if isinstance(module, TwoWayTransformer)]


def _layers(part: nn.Module) -> list[nn.Module]:
    """The members of stacks, of which many are alike, but for those whose `forward` is not that of their class."""
    stacks = [module for module in part.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [layer for stack in stacks for layer in stack if "forward" not in vars(layer)]


def _layer_signature(layer: nn.Module) -> tuple:
    """Return what the cost of a layer depends on, apart from its input; layers that differ in content only have one."""
    signature = []
    for name, module in layer.named_modules():
        attributes = {
            key: value if isinstance(value, CONSTANTS) else id(value)  # an object that both share, such as a config
            for key, value in vars(module).items()
            if key != LAYER_INDEX and (isinstance(value, CONSTANTS) or not key.startswith("_"))
        }
        tensors = {**module._parameters, **module._buffers}
        shapes = [(key, None if each is None else (each.shape, each.dtype)) for key, each in tensors.items()]
        signature.append((name, type(module), tuple(sorted(attributes.items(), key=str)), tuple(shapes)))
    return tuple(signature)


def _layer_index(layer: nn.Module) -> int | None:
    return next((vars(module)[LAYER_INDEX] for module in layer.modules() if LAYER_INDEX in vars(module)), None)


class _Cost:
    """Runs a model without content, stage by stage."""

    def __init__(self, model: SegmentCaptioner, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self.layers = _layers(model.encoder) + _layers(model.language_model)
        self.known: dict[Any, Known] = {}
        self.drawn = FakeTensorMode(allow_non_fake_inputs=True)

    @torch.no_grad()
    def answer(self, images: int, regions: int, words: int) -> tuple[dict[str, int], dict[str, int]]:
        """What `Predictor` does: images encoded at once, regions in chunks, and texts `ROWS` at a time."""
        model, size = self.model.eval(), self.model.encoder.image_format.size
        asked = _asked(images, regions, size)
        first, *others = asked.chunks(REGIONS)
        alike = [chunk for chunk in others if len(chunk) == REGIONS]  # one of them stands for all
        runs = [(first, 1), *((chunk, len(alike)) for chunk in alike[:1])]
        runs += [(chunk, 1) for chunk in others if len(chunk) < REGIONS]
        with self.drawn, Live() as live:
            self._weights()
            stages = Stages(live, self.known)
            for module in _two_way(model):
                module._through = stages.count_once(partial(TwoWayTransformer._through, module), id(module))
            for layer in self.layers:
                run = partial(type(layer).forward, layer)
                layer.forward = stages.count_once(run, _layer_signature(layer), _layer_index(layer))
            with stages("encode"):
                features = model.encode(torch.empty(images, 3, size, size, dtype=self.dtype))
            prefixes, prepared = [], None
            for chunk, times in runs:
                prefixes += [torch.empty_like(prefixes[0]) for _ in range(times - 1)]  # those that are not run
                with stages("segment", times):
                    found = model.segment(features, chunk)
                with stages("mix", times):
                    prepared = model.prepare(found) if prepared is None else prepared
                    prefixes.append(model.prefix(model.mix(found, prepared), torch.zeros_like(chunk.image_index)))
                del found
            prefix = torch.cat(prefixes)
            del prefixes, prepared
            piece = prefix[:ROWS]
            self._caption(piece, words, stages)
            for stage in stages.flops.keys() & {"prefill", "decode"}:  # the other pieces cost the same a row
                stages.flops[stage] = stages.flops[stage] * len(prefix) // len(piece)
        return stages.flops, stages.memory

    def _caption(self, prefix: Tensor, words: int, stages: Stages) -> None:
        """Greedy words with a cache; a model without one of keys and values does the same work without."""
        language_model = self.model.language_model
        rows, length = prefix.shape[:2]
        if not getattr(language_model, "has_greedy_loop", False):
            with stages("prefill"):
                language_model.lm_head(language_model.hidden_states(prefix, prefix.new_ones(rows, length))[:, -1])
            with stages("decode"):
                longer = torch.cat((prefix, prefix.new_zeros(rows, words - 1, prefix.shape[2])), dim=1)
                language_model.lm_head(language_model.hidden_states(longer, longer.new_ones(longer.shape[:2])))
            return

        inner = language_model.model
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(inner).forward).parameters else {}

        def run(cache: Any = None, positions: int = length, **inputs: Tensor) -> Any:
            mask = torch.ones(rows, positions, dtype=torch.long)
            return inner(**inputs, **last, attention_mask=mask, past_key_values=cache, use_cache=True)

        embeddings = prefix.to(inner.dtype)
        with stages("prefill"):
            first = run(inputs_embeds=embeddings)
        if words == 1:
            return
        word = torch.zeros(rows, 1, dtype=torch.long)
        with stages.aside() as early:
            run(first.past_key_values, length + 1, input_ids=word)
        seen = torch.cat((embeddings, embeddings.new_zeros(rows, words - 2, embeddings.shape[2])), dim=1)
        del first
        with stages.aside():
            cache = run(inputs_embeds=seen, positions=length + words - 2).past_key_values
        with stages("decode"):  # the last step, whose cache is the longest; the others cost between this and the first
            run(cache, length + words - 1, input_ids=word)
        stages.flops["decode"] = (stages.flops["decode"] + early[0]) * (words - 1) // 2

    def step(self, images: int, regions: int, words: int) -> tuple[dict[str, int], dict[str, int]]:
        """A step of training with one text a region: forward, backward, and what AdamW keeps."""
        model, size = self.model.train(), self.model.encoder.image_format.size
        rows = images * regions
        asked, marked = _asked(images, regions, size), torch.ones(rows, dtype=torch.bool)
        every_word = torch.ones(rows, words, dtype=torch.long)
        with self.drawn, Live() as live:
            self._weights()
            stages = Stages(live, {})
            kept = [torch.empty(2, *p.shape) for p in model.parameters() if p.requires_grad]
            side = 4 * size // model.encoder.stride
            batch = Batch(
                prompts=asked,
                task_ids=torch.zeros(rows, dtype=torch.long),
                pixel_values=torch.empty(images, 3, size, size),
                input_ids=torch.zeros(rows, words, dtype=torch.long),
                attention_mask=every_word,
            )
            if hasattr(model.segmenter, "loss"):
                seen = torch.ones(rows, side, side, dtype=torch.bool)
                batch.targets = Targets(torch.rand(rows, side, side), seen, marked)
            computed = torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)
            with stages("forward"), computed:
                loss = model(batch).loss
            with stages("backward"):
                loss.backward()
            del kept
        return stages.flops, stages.memory

    def _weights(self) -> None:
        """Replaces every tensor of the model by one without content that counts as memory; what is shared stays so."""
        made: dict[int, Tensor] = {}
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                            kind = isinstance(tensor, nn.Parameter)
                            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if kind else empty
                        tensors[name] = made[id(tensor)]


def _asked(images: int, regions: int, size: int) -> PromptBatch:
    """Boxes of a third of an image's side. They have content, as what is asked for always does."""
    owner = torch.arange(images).repeat_interleave(regions)
    return PromptBatch(owner, boxes=torch.tensor([[0.0, 0.0, size / 3, size / 3]]).repeat(len(owner), 1))


def _most(memory: Callable[[int], int], room: int) -> int | None:
    """Find how many regions per image fit into memory; None if `LIMIT` fit, 0 if none does.

    The result fits; the largest count that fits is at most 2 %, or 1, higher. Memory grows with regions in pieces that
    are straight, so that a guess between two counts that are near each other is mostly a good one.
    """
    low, high = (1, memory(1)), (LIMIT, memory(LIMIT))  # counts and what they need
    if high[1] <= room:
        return None
    if low[1] > room:
        return 0
    while (gap := high[0] - low[0]) > 1 + low[0] // 50:
        if high[0] > 2 * low[0]:
            guess = math.isqrt(low[0] * high[0])
        else:
            share = (room - low[1]) / max(high[1] - low[1], 1)
            guess = low[0] + round(min(max(share, 1 / 16), 15 / 16) * gap)
        guess = min(max(guess, low[0] + 1), high[0] - 1)
        found = (guess, memory(guess))
        low, high = (found, high) if found[1] <= room else (low, found)
    return low[0]
