"""Export to layouts that other programs read: the original SCA layout, and that of transformers for language models."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from sca_registry import get_registry
from sca_registry.spec import ComponentSpec, ModelSpec
from torch import Tensor

from sca.builder import build
from sca.checkpoints.published import FIXED_CONFIG, MIXER_BY_ARCHITECTURE, NAME_PREFIXES, TRAINED_OPTIONS
from sca.checkpoints.tensors import list_stored_tensors
from sca.io.atomic import write_folder
from sca.io.errors import InputError
from sca.io.hub import silence_transformers
from sca.io.weight_files import SAFETENSORS_FILE, format_first_names
from sca.language_models.causal import SPECIAL_TOKEN_FIELDS
from sca.language_models.tiny_gpt2 import convert_tiny_gpt2
from sca.model import SegmentCaptioner
from sca.precision import check_has_full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sca.encoders.sam import SamEncoder
    from sca.language_models.causal import CausalLanguageModel, TextTokenizer
    from sca.language_models.plain_tokenizer import PlainTokenizer
    from sca.mixers.query import QueryMixer
    from sca.nn.two_way_transformer import TwoWayTransformer
    from sca.segmenters.sam import SamSegmenter

USAGE_OPTIONS = {
    "segmenter": ("box_masks",),
    "language_model": ("dtype", "eos_token", "tokenizer", "gradient_checkpointing"),
}


def write_published_checkpoint(model: SegmentCaptioner, folder: Path) -> Path:
    """Write a model to a folder in the original SCA layout, with bit-identical tensors.

    Args:
        model: Model to export.
        folder: New or empty folder.

    Returns:
        The folder.

    Raises:
        InputError: The layout does not support the model.
        OutputError: The folder cannot be written.
        ValueError: The model has int8 layers or quantized weights.
    """
    check_has_full_weights(model)
    problem = _find_unpublishable(model)
    if problem:
        raise InputError(f"the original SCA layout does not support {problem}")
    tensors: dict[str, Tensor] = {}
    written_pointers = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in written_pointers:  # tied tensors are written once
            written_pointers.add(tensor.data_ptr())
            tensors[_to_published_name(name)] = (tensor.flatten(0, 1) if name == "task_tokens" else tensor).contiguous()
    causal_model = _get_causal_model(model)
    with write_folder(folder) as draft:
        save_file(tensors, draft / SAFETENSORS_FILE, metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(_build_published_config(model), indent=2) + "\n", "utf-8")
        special_tokens: dict[str, Any] = {
            key: getattr(causal_model.generation_config, key) for key in SPECIAL_TOKEN_FIELDS
        }
        (draft / "generation_config.json").write_text(json.dumps(special_tokens, indent=2) + "\n", "utf-8")
        _save_tokenizer(model, draft)
    return folder


def write_language_model(model: SegmentCaptioner, folder: Path) -> Path:
    """Write the language model alone in the format of transformers, with LoRA merged into its weights.

    Args:
        model: Model to export.
        folder: New or empty folder.

    Returns:
        The folder.

    Raises:
        OutputError: The folder cannot be written.
        ValueError: The model has int8 layers or quantized weights.
    """
    check_has_full_weights(model)
    causal_model = merge_lora(_get_causal_model(model))
    with write_folder(folder) as draft, silence_transformers():
        causal_model.save_pretrained(draft)
        _save_tokenizer(model, draft)
    return folder


def merge_lora(causal_model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a language model with LoRA merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged_model = copy.deepcopy(causal_model)
    lora_layers = [
        (name, module) for name, module in merged_model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    for name, module in lora_layers:
        module.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(merged_model.get_submodule(parent), attribute, module.get_base_layer())
    return merged_model


def _get_causal_model(model: SegmentCaptioner) -> PreTrainedModel:
    return cast("CausalLanguageModel", convert_tiny_gpt2(model.language_model)).model


def _get_mixer_transformer(model: SegmentCaptioner) -> TwoWayTransformer:
    return cast("QueryMixer", model.mixer).transformer  # all mixers of the original SCA layout have one


def _save_tokenizer(model: SegmentCaptioner, folder: Path) -> None:
    if model.language_model.tokenizer is not None:
        cast("TextTokenizer | PlainTokenizer", model.language_model.tokenizer).save(str(folder))


def attach_sources(model: SegmentCaptioner, **components: ComponentSpec) -> SegmentCaptioner:
    """Return the same model with components whose pretrained weights a checkpoint refers to instead of storing them.

    Args:
        model: Model.
        **components: `encoder`, which also replaces the segmenter by SAM's, and `language_model`.

    Returns:
        The model in eval mode.

    Raises:
        InputError: The pretrained weights differ from those of the model.
    """
    changed_components: dict[str, Any] = {
        kind: ComponentSpec(component.name, _select_usage_options(model.spec, kind) | dict(component.options))
        for kind, component in components.items()
    }
    if "encoder" in components:
        changed_components["segmenter"] = ComponentSpec("sam", _select_usage_options(model.spec, "segmenter"))
    sourced_model = build(replace(model.spec, **changed_components))
    tensors, source_tensors = model.state_dict(), sourced_model.state_dict()
    sourced_names = source_tensors.keys() - list_stored_tensors(sourced_model)
    differing_names = sorted(
        name for name in sourced_names if name not in tensors or not torch.equal(tensors[name], source_tensors[name])
    )
    if differing_names:
        raise InputError(
            f"the weights of {' and '.join(each.name for each in components.values())} differ from those of the model: "
            f"{format_first_names(differing_names)}"
        )
    sourced_model.load_state_dict(tensors)
    sourced_model.language_model.tokenizer = sourced_model.language_model.tokenizer or model.language_model.tokenizer
    return sourced_model.eval()


def _select_usage_options(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """Select the options of a component that affect its usage but not its weights."""
    component = getattr(spec, kind)
    return {
        name: component.options[name]
        for name in USAGE_OPTIONS.get(kind, ())
        if component is not None and name in component.options
    }


def _find_unpublishable(model: SegmentCaptioner) -> str | None:
    spec = model.spec
    if spec.mixer.name not in MIXER_BY_ARCHITECTURE.values():
        return f"the mixer {spec.mixer.name!r}; supported are {' and '.join(MIXER_BY_ARCHITECTURE.values())}"
    if spec.projection != {"type": "linear", "norm": "none"}:
        return f"the projection {dict(spec.projection)}; supported is linear without a norm"
    if spec.lora:
        return "LoRA; export the language model with the layout lm, which merges it"
    if spec.geometry:
        return f"geometry ({spec.geometry})"
    unknown_names = [name for name in model.state_dict() if _to_published_name(name) == name and name != "task_tokens"]
    if unknown_names:
        return f"the tensor {unknown_names[0]}; supported are those of SAM, the mixer and the language model"
    segmenter = cast("SamSegmenter", model.segmenter)
    if segmenter.box_masks:
        return "box masks (segmenter.box_masks)"
    decoder_config: Any = segmenter.decoder.config
    layer: Any = _get_mixer_transformer(model).layers[0]
    shared_sizes = {"num_heads": (layer.self_attn.num_attention_heads, decoder_config.num_attention_heads)}
    shared_sizes["mlp_dim"] = (layer.mlp.lin1.out_features, decoder_config.mlp_dim)
    for field, (mixer_size, segmenter_size) in shared_sizes.items():
        if mixer_size != segmenter_size:
            sizes = f"a mixer with {field}={mixer_size} and a segmenter with {field}={segmenter_size}"
            return f"{sizes}; it has one value for both"
    return None


def _build_published_config(model: SegmentCaptioner) -> dict[str, Any]:
    segmenter = cast("SamSegmenter", model.segmenter)
    decoder_config: Any = segmenter.decoder.config
    image_size, grid_size = segmenter.image_size, segmenter.grid_size
    return {
        "architectures": [
            next(name for name, mixer_name in MIXER_BY_ARCHITECTURE.items() if mixer_name == model.spec.mixer.name)
        ],
        "model_type": "sca",
        "num_task_tokens": model.task_tokens.shape[1],
        "use_decoder_only_language_model": True,
        "vl_projector_type": "linear",
        "vl_projector_norm_type": "none",
        **{name: True for name in TRAINED_OPTIONS if getattr(model.spec, name)},
        "vision_config": cast("SamEncoder", model.encoder).vision.config.to_dict(),
        "prompt_encoder_config": {
            "hidden_size": model.segmenter.channels,
            "image_size": image_size,
            "patch_size": image_size // grid_size,
            "image_embedding_size": grid_size,
            "mask_input_channels": segmenter.prompt_encoder.mask_embed.conv2.out_channels,
            "num_point_embeddings": len(segmenter.prompt_encoder.point_embed),
        },
        "mask_caption_decoder_config": FIXED_CONFIG
        | {
            "hidden_size": decoder_config.hidden_size,
            "num_hidden_layers": decoder_config.num_hidden_layers,
            "num_attention_heads": decoder_config.num_attention_heads,
            "mlp_dim": decoder_config.mlp_dim,
            "iou_head_depth": decoder_config.iou_head_depth,
            "iou_head_hidden_dim": decoder_config.iou_head_hidden_dim,
            "additional_num_hidden_layers": len(_get_mixer_transformer(model).layers),
            "num_caption_tokens": model.mixer.num_queries,
        },
        "text_config": {
            "_name_or_path": _get_language_model_source(model),
            **_get_causal_model(model).config.to_dict(),
        },
    }


def _get_language_model_source(model: SegmentCaptioner) -> str:
    return model.spec.language_model.options.get("weights") or get_registry("language_model").get_card(
        model.spec.language_model.name
    ).options.get("weights", "")


def _to_published_name(name: str) -> str:
    prefixes = sorted(NAME_PREFIXES, key=lambda pair: -len(pair[1]))  # longest, and so most specific, first
    return next(
        (published + name.removeprefix(native) for published, native in prefixes if name.startswith(native)), name
    )
