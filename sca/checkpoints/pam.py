"""Checkpoints in the layout of Perceive Anything (PAM, arXiv 2506.05302; github.com/Perceive-Anything/PAM).

A folder contains `config.json` with model_type "llava_qwen" and a SAM 2 vision tower, and the tensors of the language
model, the perceiver and, possibly, SAM 2.1. The configuration has neither the sizes of the perceiver nor those of SAM:
they follow from the tensors. What tensors do not contain is that of the published models, unless the folder has a
`sizes.json` with these fields:

    image_size                            side of the model input
    hiera.num_heads                       attention heads of the first stage of the image encoder
    hiera.global_att_blocks               blocks with global attention
    hiera.window_spec                     window size of each stage
    sam_decoder.heads, perceiver.heads    attention heads of the two-way transformers

Its other fields repeat sizes of the tensors, and are compared with them, see `sca.checkpoints.pam_sizes`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from sca_registry import get_registry
from sca_registry.spec import ModelSpec
from torch import Tensor
from transformers.initialization import no_init_weights

from sca.builder import build
from sca.checkpoints.layout import CONFIG_FILE, SIZES_FILE
from sca.checkpoints.pam_names import (
    HEAD_NAME,
    POINT_EMBEDDINGS,
    POSITION_MATRIX,
    POSITION_MATRIX_COPIES,
    SAM_PREFIX,
    STACKED_POINT_EMBEDDINGS,
    convert_to_native_name,
    convert_to_pam_name,
    is_video_tensor,
)
from sca.checkpoints.pam_sizes import IMAGE_SIZE, Sizes, check_sizes_fit_tensors, read_sizes
from sca.checkpoints.published import read_checkpoint_tensors, read_language_model_config
from sca.checkpoints.tensors import BuildSizeLimit, assign_tensors
from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, confine_spec
from sca.io.errors import InputError
from sca.io.json import read_json
from sca.io.weight_files import (
    TensorInfo,
    find_weight_files,
    format_first_names,
    has_tokenizer,
    read_tensor_infos,
    require_weight_files,
)
from sca.language_models.causal import TextTokenizer
from sca.language_models.hf import load_tokenizer
from sca.language_models.pam_prompts import PROMPT_TEMPLATE, TASK_PROMPTS, TURN_END, TURN_START
from sca.model import SegmentCaptioner

MAX_NEW_TOKENS = 512
NUM_HEADS, PATCH_SIZE = 8, 16
TOWER_PATTERN = re.compile(r"sam2(\.1)?[_-]hiera[_-](tiny|small|base[_-]plus|large)")
FIXED_CONFIG = {"mm_projector_type": "mlp2x_gelu", "use_mm_proj": True, "mm_use_im_start_end": False}
LANGUAGE_MODEL_TYPE, BACKBONE_TYPE = "qwen2", "sam2_hiera_det_model"
PUBLISHED_TOWER = "sam2.1-hiera-large"
SPECIAL_TOKENS = (TURN_START, TURN_END)
MODEL_FIELDS: Mapping[str, Any] = {  # fields of the spec that all PAM models share
    "segmenter": {"name": "sam2", "single_mask": True},
    "projection": "none",
    "task_tokens": 0,
    "tasks": TASK_PROMPTS,
    "prompt_template": PROMPT_TEMPLATE,
}

TensorInfos = Mapping[str, TensorInfo]


def load_pam_checkpoint(folder: Path, trust: Trust = NO_TRUST) -> SegmentCaptioner:
    """Load the model of a folder in PAM's layout, in eval mode.

    Tensors that are used for videos only are ignored. The language model has the dtype of the file.

    Args:
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        The model, in eval mode on the CPU.

    Raises:
        InputError: The folder cannot be read, tensors are missing, unexpected or of the wrong shape, the tokenizer
            lacks a special token, or the checkpoint needs a permission that `trust` does not include.
    """
    spec = read_pam_spec(folder, trust)
    with no_init_weights(), BuildSizeLimit(find_weight_files(folder) or [], spec):
        model = build(spec)
    published = {name: tensor for name, tensor in read_checkpoint_tensors(folder).items() if not is_video_tensor(name)}
    _tie_head(published, spec, folder)
    expected = set(model.state_dict()) - {"task_tokens"}  # empty
    if model.encoder.checkpoint:
        expected = {name for name in expected if not name.startswith(("encoder.", "segmenter."))}
    _check_names(published, expected, folder)
    assign_tensors(model, _convert_tensors(published), expected, folder, CONFIG_FILE, _format_pam_name)
    model.language_model.tokenizer = _load_pam_tokenizer(folder)
    return model.eval()


def read_pam_spec(folder: Path, trust: Trust = NO_TRUST) -> ModelSpec:
    """Read the spec of a folder in PAM's layout, confined to what the caller allows.

    Args:
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        The spec of the model.

    Raises:
        InputError: The configuration or the weights cannot be read, or need a permission that `trust` does not include.
    """
    config = read_json(folder / CONFIG_FILE)
    tower = _find_tower(config, folder)
    infos: dict[str, TensorInfo] = {}
    for file in require_weight_files(folder, folder):
        infos |= read_tensor_infos(file)
    sizes = read_sizes(folder)
    try:
        has_sam = any(name.startswith(f"{SAM_PREFIX}image_encoder.") for name in infos)
        encoder = {"name": "sam2", "config": _build_sam_config(infos, sizes, folder)} if has_sam else {"name": tower}
        embeddings = _get_info(infos, "model.embed_tokens.weight", folder)
        spec = _build_spec(
            encoder,
            _build_mixer_table(infos, sizes, folder),
            read_language_model_config({**_select_language_fields(config), "vocab_size": embeddings.shape[0]}, folder),
            embeddings.dtype,
        )
        return confine_spec(spec, folder, trust)
    except TrustError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    except InputError:
        raise
    except Exception as error:  # transformers raises various errors for unexpected values
        raise InputError(f"{folder} is not a PAM checkpoint ({error!r}); copy or download it again") from error


def build_published_pam_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Build the spec of a published PAM model, without its files.

    Args:
        config: Configuration of the language model.

    Returns:
        The spec of the model, with the published sizes of SAM 2.1 and the perceiver.
    """
    language_config = {**config, "model_type": LANGUAGE_MODEL_TYPE}
    return _build_spec({"name": PUBLISHED_TOWER}, {"name": "semantic-perceiver"}, language_config, "bfloat16")


def _build_spec(
    encoder: Mapping[str, Any], mixer: Mapping[str, Any], language_config: Mapping[str, Any], dtype: str
) -> ModelSpec:
    return ModelSpec.from_dict(
        {
            **MODEL_FIELDS,
            "encoder": {**encoder, "resample": "bicubic"},
            "mixer": mixer,
            "language_model": {"name": "hf", "config": language_config, "dtype": dtype},
            "questions": True,
            "generation": {"max_new_tokens": MAX_NEW_TOKENS},
        }
    )


def _select_language_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model; transformers ignores those of the original code.

    The original code sets `rope_scaling` to None.
    """
    fields = {
        name: value
        for name, value in config.items()
        if value is not None and not name.startswith("mm_") and name != "rope_scaling"
    }
    return {**fields, "model_type": LANGUAGE_MODEL_TYPE}


def _build_mixer_table(infos: TensorInfos, sizes: Sizes, folder: Path) -> dict[str, Any]:
    prefix = "model.vision_resampler."
    num_queries, width = _get_info(infos, f"{prefix}sem_tokens.weight", folder).shape
    depth = _count_layers(infos, f"{prefix}layers.")
    mlp_dim = _get_info(infos, f"{prefix}layers.0.mlp.layers.0.weight", folder).shape[0]
    tensor_sizes = {"width": width, "queries": num_queries, "depth": depth, "mlp": mlp_dim}
    check_sizes_fit_tensors(sizes, {"perceiver": tensor_sizes}, folder)
    return {
        "name": "semantic-perceiver",
        "num_queries": num_queries,
        "depth": depth,
        "num_heads": _get_size(sizes, "perceiver", "heads", NUM_HEADS),
        "mlp_dim": mlp_dim,
    }


def _find_tower(config: Any, folder: Path) -> str:
    """Return the registered encoder of the SAM 2 that a configuration names."""
    tower = str(config.get("mm_vision_tower"))
    if "sam2" not in tower.lower():
        raise InputError(
            f"{folder} is a LLaVA checkpoint without SAM 2 (its mm_vision_tower is {tower!r:.80}); use a checkpoint of "
            "PAM, such as pam-1.5b"
        )
    for field, value in FIXED_CONFIG.items():
        if config.get(field, value) != value:
            raise InputError(f"{folder}: {field} is {config[field]!r:.80}, but only {value!r} is supported")
    match = TOWER_PATTERN.search(tower.lower())
    if match is None:
        raise InputError(f"{folder}: mm_vision_tower is {tower!r:.80}; expected a name such as sam2.1_hiera_large")
    return match[0].replace("_", "-")


def _get_info(infos: TensorInfos, name: str, folder: Path) -> TensorInfo:
    if name not in infos:
        raise InputError(f"{folder} has no tensor {name}; copy or download the checkpoint again")
    return infos[name]


def _get_size(sizes: Sizes, table: str, field: str, default: Any) -> Any:
    return sizes.get(table, {}).get(field, default)


def _count_layers(infos: TensorInfos, prefix: str) -> int:
    """Return the number of layers whose tensors have the names PREFIX0., PREFIX1. and so on."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in infos if name.startswith(prefix)})


def _build_sam_config(infos: TensorInfos, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return the fields of transformers' `Sam2Config` that differ from its defaults."""

    def get_shape(name: str) -> tuple[int, ...]:
        return _get_info(infos, f"{SAM_PREFIX}{name}", folder).shape

    trunk, decoder = "image_encoder.trunk.", "sam_mask_decoder."
    block_widths = [
        get_shape(f"{trunk}blocks.{index}.attn.qkv.weight")[0] // 3
        for index in range(_count_layers(infos, f"{SAM_PREFIX}{trunk}blocks."))
    ]
    stages = [(width, len(list(blocks))) for width, blocks in groupby(block_widths)]
    widths, depths = [width for width, _ in stages], [depth for _, depth in stages]
    background_size = list(get_shape(f"{trunk}pos_embed")[2:])
    decoder_sizes = {
        "width": get_shape(f"{decoder}mask_tokens.weight")[1],
        "depth": _count_layers(infos, f"{SAM_PREFIX}{decoder}transformer.layers."),
        "mlp": get_shape(f"{decoder}transformer.layers.0.mlp.layers.0.weight")[0],
        "iou_depth": _count_layers(infos, f"{SAM_PREFIX}{decoder}iou_prediction_head.layers."),
        "iou_width": get_shape(f"{decoder}iou_prediction_head.layers.0.weight")[0],
        "mask_channels": get_shape("sam_prompt_encoder.mask_downscaling.3.weight")[0],
    }
    neck_sizes: dict[str, Any] = {
        "d_model": get_shape("image_encoder.neck.convs.0.conv.weight")[0],
        "backbone_channel_list": widths[::-1],
    }
    hiera_sizes: dict[str, Any] = {
        "embed_dim": widths[0],
        "stages": depths,
        "window_pos_embed_bkg_spatial_size": background_size,
    }
    tensor_sizes = {"hiera": hiera_sizes, "neck": neck_sizes, "sam_decoder": decoder_sizes}
    check_sizes_fit_tensors(sizes, tensor_sizes, folder)
    backbone = {
        "model_type": BACKBONE_TYPE,
        "hidden_size": widths[0],
        "embed_dim_per_stage": widths,
        "blocks_per_stage": depths,
        "window_positional_embedding_background_size": background_size,
        **_find_attention_fields(widths, depths, sizes, folder),
    }
    image_size = sizes.get("image_size", IMAGE_SIZE)
    vision_config: dict[str, Any] = {
        "model_type": "sam2_vision_model",
        "fpn_hidden_size": neck_sizes["d_model"],
        "backbone_channel_list": neck_sizes["backbone_channel_list"],
        "backbone_config": backbone,
    }
    if image_size != IMAGE_SIZE:
        backbone["image_size"] = [image_size, image_size]
        vision_config["backbone_feature_sizes"] = [[image_size // stride] * 2 for stride in (4, 8, PATCH_SIZE)]
    return {
        "vision_config": vision_config,
        "prompt_encoder_config": {
            "hidden_size": get_shape("sam_prompt_encoder.no_mask_embed.weight")[1],
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
            "mask_input_channels": decoder_sizes["mask_channels"],
        },
        "mask_decoder_config": {
            "hidden_size": decoder_sizes["width"],
            "mlp_dim": decoder_sizes["mlp"],
            "num_hidden_layers": decoder_sizes["depth"],
            "num_attention_heads": _get_size(sizes, "sam_decoder", "heads", NUM_HEADS),
            "iou_head_depth": decoder_sizes["iou_depth"],
            "iou_head_hidden_dim": decoder_sizes["iou_width"],
        },
    }


def _find_attention_fields(widths: list[int], depths: list[int], sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return the heads and windows of the image encoder, of `sizes` or of the published encoder of the same size."""
    published = find_published_towers().values()
    fields: Mapping[str, Any] = next(
        (each for each in published if (each["embed_dim_per_stage"], each["blocks_per_stage"]) == (widths, depths)), {}
    )
    num_heads = _get_size(sizes, "hiera", "num_heads", fields.get("num_attention_heads"))
    windows = _get_size(sizes, "hiera", "window_spec", fields.get("window_size_per_stage"))
    global_blocks = _get_size(sizes, "hiera", "global_att_blocks", fields.get("global_attention_blocks"))
    if num_heads is None or windows is None or global_blocks is None:
        raise InputError(
            f"{folder} has an image encoder of {sum(depths)} blocks of the width {widths[0]}, which is not a published "
            f"SAM 2.1; add a {SIZES_FILE} with hiera.num_heads, hiera.window_spec and hiera.global_att_blocks"
        )
    return {
        "num_attention_heads": num_heads,
        "num_attention_heads_per_stage": [num_heads * 2**stage for stage in range(len(widths))],
        "window_size_per_stage": list(windows),
        "global_attention_blocks": list(global_blocks),
    }


def find_published_towers() -> dict[str, Mapping[str, Any]]:
    """Return the configuration of the backbone of each published SAM 2.1 encoder by its registered name."""
    encoders = get_registry("encoder")
    names = [name for name in encoders.list_names() if name.startswith("sam2.1-")]
    return {name: encoders.get_card(name).config["vision_config"]["backbone_config"] for name in names}


def _tie_head(tensors: dict[str, Tensor], spec: ModelSpec, folder: Path) -> None:
    """Complete a language model whose output layer shares the embeddings; raise InputError if they differ."""
    config = spec.language_model.options["config"]
    if not config.get("tie_word_embeddings", False):
        return
    embeddings = tensors["model.embed_tokens.weight"]
    if not torch.equal(tensors.setdefault(HEAD_NAME, embeddings), embeddings):
        raise InputError(
            f"{folder} has tied embeddings, but {HEAD_NAME} differs from them; copy or download the checkpoint again"
        )


def _check_names(published: Mapping[str, Tensor], expected: set[str], folder: Path) -> None:
    """Raise InputError unless the tensors have PAM's names of the expected native tensors."""
    expected_names = {name for native_name in expected for name in _list_pam_names(native_name)}
    missing, unexpected = sorted(expected_names - published.keys()), sorted(published.keys() - expected_names)
    if missing or unexpected:
        raise InputError(
            f"{folder} does not fit its {CONFIG_FILE}: missing {format_first_names(missing)}; "
            f"unexpected {format_first_names(unexpected)}"
        )


def _list_pam_names(native_name: str) -> tuple[str, ...]:
    """Return PAM's names of a native tensor; some are stacked or copied here."""
    if native_name == STACKED_POINT_EMBEDDINGS:
        return POINT_EMBEDDINGS
    return (POSITION_MATRIX,) if native_name in POSITION_MATRIX_COPIES else (convert_to_pam_name(native_name),)


def _format_pam_name(native_name: str) -> str:
    return _list_pam_names(native_name)[0]


def _convert_tensors(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by native name; SAM 2 may be missing."""
    tensors = {
        convert_to_native_name(name): tensor
        for name, tensor in published.items()
        if name != POSITION_MATRIX and name not in POINT_EMBEDDINGS
    }
    if POSITION_MATRIX in published:
        tensors |= dict.fromkeys(POSITION_MATRIX_COPIES, published[POSITION_MATRIX])
        tensors[STACKED_POINT_EMBEDDINGS] = torch.cat([published[name] for name in POINT_EMBEDDINGS])
    return tensors


def _load_pam_tokenizer(folder: Path) -> TextTokenizer | None:
    """Load the tokenizer of a folder; raise InputError if it lacks a special token of the prompts."""
    if not has_tokenizer(folder):
        warnings.warn(
            f"{folder} has no tokenizer, so captions are lists of token ids without text; add tokenizer.json",
            stacklevel=3,
        )
        return None
    with warnings.catch_warnings():  # transformers reads the fields of `config.json` that PAM's code needs
        warnings.simplefilter("ignore", FutureWarning)
        tokenizer = load_tokenizer(folder)
    assert tokenizer is not None  # see `has_tokenizer`
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.tokenizer.get_vocab()]
    if missing:
        raise InputError(
            f"the tokenizer in {folder} lacks the special tokens {format_first_names(missing)}; copy the tokenizer "
            "files of the checkpoint again"
        )
    return TextTokenizer(tokenizer.tokenizer, TURN_END)
