"""Models in layouts that other programs read: that of the published system, and the language model alone."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sca_registry import registry
from sca_registry.spec import ModelSpec, Part
from torch import Tensor

from sca.checkpoints.published import ENDS, FIXED, MIXERS, PLACES
from sca.checkpoints.state import stored
from sca.composition import build
from sca.io.atomic import new_folder
from sca.io.errors import InputError
from sca.io.hub import quiet
from sca.io.weight_files import SAFE, some
from sca.model import SegmentCaptioner

USES = {"segmenter": ("drawn",), "language_model": ("dtype", "eos", "tokenizer", "checkpointing")}


def write_published(model: SegmentCaptioner, folder: Path) -> Path:
    """A folder in the published layout, with the tensors of the model bit by bit; it must not be there, or be empty.

    Raises InputError for a model that this layout has no place for, and for a folder that cannot be written.
    """
    problem = _unpublishable(model)
    if problem:
        raise InputError(f"the published layout has no place for {problem}")
    tensors: dict[str, Tensor] = {}
    written = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in written:  # of tied tensors one is enough
            written.add(tensor.data_ptr())
            tensors[_theirs(name)] = (tensor.flatten(0, 1) if name == "task_tokens" else tensor).contiguous()
    causal = model.language_model.model
    with new_folder(folder) as draft:
        save_file(tensors, draft / SAFE, metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(_config(model), indent=2) + "\n", "utf-8")
        ends = {key: getattr(causal.generation_config, key) for key in ENDS}
        (draft / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", "utf-8")
        if model.language_model.tokenizer is not None:
            model.language_model.tokenizer.save(str(draft))
    return folder


def write_language_model(model: SegmentCaptioner, folder: Path) -> Path:
    """The language model by itself, with its LoRA merged into the weights, as transformers saves one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    causal = copy.deepcopy(model.language_model.model)
    adapted = [(name, module) for name, module in causal.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(causal.get_submodule(parent), last, module.get_base_layer())
    with new_folder(folder) as draft, quiet():
        causal.save_pretrained(draft)
        if model.language_model.tokenizer is not None:
            model.language_model.tokenizer.save(str(draft))
    return folder


def with_sources(model: SegmentCaptioner, **parts: Part) -> SegmentCaptioner:
    """The same model with parts that have a source of their own, which a checkpoint then refers to by name: `encoder`
    (SAM's heads come with it) and `language_model`.

    Raises InputError if the source's weights are not those of the model, naming the first that differ.
    """
    changes = {kind: Part(part.name, _kept(model.spec, kind) | dict(part.options)) for kind, part in parts.items()}
    if "encoder" in parts:
        changes["segmenter"] = Part("sam", _kept(model.spec, "segmenter"))
    other = build(replace(model.spec, **changes))
    mine, theirs = model.state_dict(), other.state_dict()
    sourced = theirs.keys() - stored(other)
    differing = sorted(name for name in sourced if name not in mine or not torch.equal(mine[name], theirs[name]))
    if differing:
        raise InputError(
            f"the weights of {' and '.join(part.name for part in parts.values())} are others than the model's: "
            f"{some(differing)}"
        )
    other.load_state_dict(mine)
    other.language_model.tokenizer = other.language_model.tokenizer or model.language_model.tokenizer
    return other.eval()


def _kept(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """The options of a part that say how it is used rather than what it is made of."""
    part = getattr(spec, kind)
    return {name: part.options[name] for name in USES.get(kind, ()) if part is not None and name in part.options}


def _unpublishable(model: SegmentCaptioner) -> str | None:
    spec = model.spec
    if spec.mixer.name not in MIXERS.values():
        return f"the mixer {spec.mixer.name!r}: it knows {' and '.join(MIXERS.values())}"
    if spec.projection != {"kind": "linear", "norm": "none"}:
        return f"a projection {dict(spec.projection)}: it knows linear, without a norm"
    if spec.lora:
        return "LoRA: write the language model by itself (layout lm), which merges it"
    foreign = [name for name in model.state_dict() if _theirs(name) == name and name != "task_tokens"]
    if foreign:
        return f"tensors such as {foreign[0]}: it knows SAM, the mixer and the language model"
    if model.segmenter.drawn:
        return "prompts that are drawn into the image (segmenter.drawn)"
    sam, layer = model.segmenter.decoder.config, model.mixer.transformer.layers[0]
    shared = {"heads": (layer.self_attn.num_attention_heads, sam.num_attention_heads)}
    shared["mlp"] = (layer.mlp.lin1.out_features, sam.mlp_dim)
    for figure, (mine, theirs) in shared.items():
        if mine != theirs:
            return f"a mixer with {figure}={mine} beside a segmenter with {figure}={theirs}: it has one figure for both"
    return None


def _config(model: SegmentCaptioner) -> dict[str, Any]:
    decoder, prompts = model.segmenter.decoder.config, model.segmenter.prompt_encoder
    size, grid, mixer = model.segmenter.size, model.segmenter.grid, model.mixer
    return {
        "architectures": [next(name for name, ours in MIXERS.items() if ours == model.spec.mixer.name)],
        "model_type": "sca",
        "num_task_tokens": model.task_tokens.shape[1],
        "use_decoder_only_language_model": True,
        "vl_projector_type": "linear",
        "vl_projector_norm_type": "none",
        "vision_config": model.encoder.vision.config.to_dict(),
        "prompt_encoder_config": {
            "hidden_size": model.segmenter.channels,
            "image_size": size,
            "patch_size": size // grid,
            "image_embedding_size": grid,
            "mask_input_channels": prompts.mask_embed.conv2.out_channels,
            "num_point_embeddings": len(prompts.point_embed),
        },
        "mask_caption_decoder_config": FIXED
        | {
            "hidden_size": decoder.hidden_size,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "mlp_dim": decoder.mlp_dim,
            "iou_head_depth": decoder.iou_head_depth,
            "iou_head_hidden_dim": decoder.iou_head_hidden_dim,
            "additional_num_hidden_layers": len(mixer.transformer.layers),
            "num_caption_tokens": mixer.num_queries,
        },
        "text_config": {"_name_or_path": _source(model), **model.language_model.model.config.to_dict()},
    }


def _source(model: SegmentCaptioner) -> str:
    return model.spec.language_model.options.get("weights") or registry("language_model").card(
        model.spec.language_model.name
    ).options.get("weights", "")


def _theirs(name: str) -> str:
    places = sorted(PLACES, key=lambda place: -len(place[1]))  # the most particular first
    return next((theirs + name.removeprefix(ours) for theirs, ours in places if name.startswith(ours)), name)
