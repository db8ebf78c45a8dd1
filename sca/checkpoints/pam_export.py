"""Export to the layout of Perceive Anything (PAM), see `sca.checkpoints.pam`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from sca.checkpoints.export import merge_lora
from sca.checkpoints.layout import CONFIG_FILE, SIZES_FILE
from sca.checkpoints.pam import (
    BACKBONE_TYPE,
    FIXED_CONFIG,
    LANGUAGE_MODEL_TYPE,
    NUM_HEADS,
    PUBLISHED_TOWER,
    find_published_towers,
)
from sca.checkpoints.pam_names import (
    POINT_EMBEDDINGS,
    POSITION_MATRIX,
    POSITION_MATRIX_COPIES,
    STACKED_POINT_EMBEDDINGS,
    convert_to_pam_name,
)
from sca.checkpoints.pam_sizes import IMAGE_SIZE
from sca.encoders.sam2 import Sam2Encoder
from sca.io.atomic import write_folder
from sca.io.errors import InputError
from sca.io.weight_files import SAFETENSORS_FILE
from sca.language_models.causal import SPECIAL_TOKEN_FIELDS
from sca.language_models.pam_prompts import PROMPT_TEMPLATE, TASK_PROMPTS
from sca.mixers.semantic_perceiver import SemanticPerceiverMixer
from sca.model import SegmentCaptioner
from sca.precision import check_has_full_weights
from sca.segmenters.sam2 import Sam2Segmenter

if TYPE_CHECKING:
    from sca.language_models.causal import CausalLanguageModel, TextTokenizer

LANGUAGE_MODEL_PREFIX = "language_model.model."
LANGUAGE_FIELDS = (  # of a configuration of Qwen2, in the versions of transformers that PAM's code requires
    *("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "initializer_range", "rms_norm_eps", "use_cache"),
    *("attention_dropout", "tie_word_embeddings", "max_window_layers", *SPECIAL_TOKEN_FIELDS),
)
PAM_CONFIG = {  # fields of all published configurations
    **FIXED_CONFIG,
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava_qwen",
    "mm_use_im_patch_token": False,
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 12288,
    "faster_token_stride": 10,
    "add_time_instruction": False,
    "force_sample": False,
    "use_pos_skipping": False,
    "pos_skipping_range": 4096,
    "rope_scaling": None,
    "use_sliding_window": False,
}


def write_pam_checkpoint(model: SegmentCaptioner, folder: Path) -> Path:
    """Write a model to a folder in PAM's layout, with bit-identical tensors, except that LoRA is merged.

    Tensors that PAM uses for videos only are not written. The dtype of a tensor is that of the language model if the
    conversion is exact, else its own.

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
    problem = _find_unsupported(model)
    if problem:
        raise InputError(f"the layout of PAM does not support {problem}")
    causal_model = cast("CausalLanguageModel", model.language_model).model
    state = model.state_dict()
    if model.spec.lora:
        causal_model = merge_lora(causal_model)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(LANGUAGE_MODEL_PREFIX)}
        state |= {f"{LANGUAGE_MODEL_PREFIX}{name}": tensor for name, tensor in causal_model.state_dict().items()}
    config = _build_config(model)
    sizes = _collect_sizes(model)
    with write_folder(folder) as draft:
        save_file(_collect_tensors(state, causal_model.dtype), draft / SAFETENSORS_FILE, metadata={"format": "pt"})
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        special_tokens = {name: getattr(causal_model.generation_config, name) for name in SPECIAL_TOKEN_FIELDS}
        (draft / "generation_config.json").write_text(json.dumps(special_tokens, indent=2) + "\n", "utf-8")
        if sizes is not None:
            (draft / SIZES_FILE).write_text(json.dumps(sizes, indent=2) + "\n", "utf-8")
        if model.language_model.tokenizer is not None:
            cast("TextTokenizer", model.language_model.tokenizer).save(str(draft))
    return folder


def _find_unsupported(model: SegmentCaptioner) -> str | None:
    spec, encoder, segmenter = model.spec, model.encoder, model.segmenter
    if not isinstance(model.mixer, SemanticPerceiverMixer):
        return f"the mixer {spec.mixer.name!r}; supported is semantic-perceiver"
    if spec.projection != {"type": "none", "norm": "none"}:
        return f"the projection {dict(spec.projection)}; supported is none"
    if not isinstance(encoder, Sam2Encoder) or not isinstance(segmenter, Sam2Segmenter) or not encoder.high_res_shapes:
        return f"the encoder {spec.encoder.name!r} and its segmenter; supported are those of SAM 2"
    if encoder.vision.config.backbone_config.model_type != BACKBONE_TYPE:
        return f"the encoder {spec.encoder.name!r}; supported are those of SAM 2"
    if encoder.image_format.resample != "bicubic":
        return f"the interpolation {encoder.image_format.resample!r} (encoder.resample); supported is bicubic"
    if not segmenter.single_mask or segmenter.box_masks:
        return "several masks per region or box masks; set segmenter.single_mask=true and segmenter.box_masks=false"
    config: Any = getattr(getattr(model.language_model, "model", None), "config", None)
    if getattr(config, "model_type", None) != LANGUAGE_MODEL_TYPE:
        return f"the language model {spec.language_model.name!r}; supported is {LANGUAGE_MODEL_TYPE}"
    if (rope_type := config.rope_parameters.get("rope_type", "default")) != "default":
        return f"the rope scaling {rope_type!r} of the language model; supported is none"
    if any(each != "full_attention" for each in config.layer_types):
        return "sliding windows of the language model; supported is full attention"
    if spec.geometry or spec.task_tokens:
        return "geometry and learned task tokens; supported are tasks with prompts"
    if spec.tasks != TASK_PROMPTS or spec.prompt_template != PROMPT_TEMPLATE:
        return "other tasks, prompts or prompt templates than those of PAM; set these fields of the spec to PAM's"
    tensors = model.state_dict()
    if not torch.equal(*(tensors[name] for name in POSITION_MATRIX_COPIES)):
        return "a segmenter with other positions for prompts than for the grid"
    known_names = {"task_tokens", *POSITION_MATRIX_COPIES}
    names = [name for name in tensors if convert_to_pam_name(name) == name and name not in known_names]
    return f"the tensor {names[0]}; supported are those of SAM 2, the mixer and the language model" if names else None


def _collect_tensors(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors by PAM's name; tied tensors are written once per name, as in the published files."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == STACKED_POINT_EMBEDDINGS:
            tensors |= zip(POINT_EMBEDDINGS, tensor.split(1), strict=True)
        elif name in POSITION_MATRIX_COPIES:
            tensors[POSITION_MATRIX] = tensor
        elif name != "task_tokens":
            tensors[convert_to_pam_name(name)] = tensor
    return {name: _convert_dtype(tensor, dtype).contiguous().clone() for name, tensor in tensors.items()}


def _convert_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to(dtype)
    return converted if torch.equal(converted.to(tensor.dtype), tensor) else tensor


def _build_config(model: SegmentCaptioner) -> dict[str, Any]:
    causal_config: Any = cast("CausalLanguageModel", model.language_model).model.config
    fields = {name: getattr(causal_config, name, None) for name in LANGUAGE_FIELDS}
    return {
        **fields,
        **PAM_CONFIG,
        "rope_theta": causal_config.rope_parameters["rope_theta"],
        "sliding_window": causal_config.max_position_embeddings,
        "torch_dtype": str(causal_config.dtype).removeprefix("torch."),
        "mm_vision_tower": f"meta/{(_find_tower(model) or PUBLISHED_TOWER).replace('-', '_')}",
        "mm_hidden_size": model.segmenter.channels,
    }


def _find_tower(model: SegmentCaptioner) -> str | None:
    """Return the published SAM 2.1 encoder of the same size, heads and windows."""
    backbone = cast("Sam2Encoder", model.encoder).vision.config.backbone_config
    return next(
        (
            name
            for name, fields in find_published_towers().items()
            if all(getattr(backbone, field) == value for field, value in fields.items() if field != "model_type")
        ),
        None,
    )


def _collect_sizes(model: SegmentCaptioner) -> dict[str, Any] | None:
    """Return the content of `sizes.json`; None for a model of a published size."""
    encoder, segmenter = cast("Sam2Encoder", model.encoder), cast("Sam2Segmenter", model.segmenter)
    backbone = encoder.vision.config.backbone_config
    layers: Any = cast("SemanticPerceiverMixer", model.mixer).transformer.layers
    sizes = {
        "image_size": encoder.image_format.size,
        "hiera": {
            "num_heads": backbone.num_attention_heads_per_stage[0],
            "global_att_blocks": list(backbone.global_attention_blocks),
            "window_spec": list(backbone.window_size_per_stage),
        },
        "sam_decoder": {"heads": segmenter.decoder.config.num_attention_heads},
        "perceiver": {"heads": layers[0].self_attn.num_attention_heads},
    }
    is_published = _find_tower(model) is not None and sizes["image_size"] == IMAGE_SIZE
    has_published_heads = sizes["sam_decoder"] == sizes["perceiver"] == {"heads": NUM_HEADS}
    return None if is_published and has_published_heads else sizes
