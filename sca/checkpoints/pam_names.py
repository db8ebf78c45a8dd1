"""Tensor names of Perceive Anything (PAM, arXiv 2506.05302), and those of the same tensors here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SAM_PREFIX = "model.vision_tower.sam2_model_predictor."  # Meta's names of SAM 2.1 follow it
HEAD_NAME = "lm_head.weight"
# point embeddings: four tensors in PAM, stacked in one here
POINT_EMBEDDINGS = tuple(f"{SAM_PREFIX}sam_prompt_encoder.point_embeddings.{index}.weight" for index in range(4))
STACKED_POINT_EMBEDDINGS = "segmenter.prompt_encoder.point_embed.weight"
POSITION_MATRIX = f"{SAM_PREFIX}sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
POSITION_MATRIX_COPIES = (
    "segmenter.prompt_encoder.shared_embedding.positional_embedding",
    "segmenter.grid_embedding.positional_embedding",
)
VIDEO_PREFIXES = (  # tensors that are used for videos only
    "model.frame_newline",
    "model.vision_resampler.proj.",
    f"{SAM_PREFIX}maskmem_",
    f"{SAM_PREFIX}mask_downsample.",
    f"{SAM_PREFIX}memory_attention.",
    f"{SAM_PREFIX}memory_encoder.",
    f"{SAM_PREFIX}no_mem_pos_enc",
    f"{SAM_PREFIX}no_obj_",
    f"{SAM_PREFIX}obj_ptr_",
)
_PERCEPTRONS = (  # layers of a perceptron, named by SAM 2 and by transformers
    *(("layers.0.", "proj_in."), ("layers.1.", "layers.0."), ("layers.2.", "proj_out.")),
)
_TWO_WAY_NAMES = (  # in a two-way transformer of SAM 2
    *(
        (f"layers.{{}}.{name}.out_proj.", f"layers.{{}}.{name}.o_proj.")
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    ),
    ("final_attn_token_to_image.out_proj.", "final_attn_token_to_image.o_proj."),
    ("norm_final_attn.", "layer_norm_final_attn."),
    ("layers.{}.norm{}.", "layers.{}.layer_norm{}."),
    ("layers.{}.mlp.layers.0.", "layers.{}.mlp.proj_in."),
    ("layers.{}.mlp.layers.1.", "layers.{}.mlp.proj_out."),
    ("", ""),
)
_MASK_EMBEDDING_NAMES = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
_UPSCALING_NAMES = {0: "upscale_conv1", 1: "upscale_layer_norm", 3: "upscale_conv2"}
_SAM_NAMES = (  # prefixes of Meta's SAM 2, and of the native names; {} is a number
    ("image_encoder.trunk.patch_embed.proj.", "encoder.vision.backbone.patch_embed.projection."),
    ("image_encoder.trunk.blocks.{}.norm{}.", "encoder.vision.backbone.blocks.{}.layer_norm{}."),
    ("image_encoder.trunk.blocks.{}.mlp.layers.0.", "encoder.vision.backbone.blocks.{}.mlp.proj_in."),
    ("image_encoder.trunk.blocks.{}.mlp.layers.1.", "encoder.vision.backbone.blocks.{}.mlp.proj_out."),
    ("image_encoder.trunk.", "encoder.vision.backbone."),
    ("image_encoder.neck.convs.{}.conv.", "encoder.vision.neck.convs.{}."),
    ("no_mem_embed", "encoder.no_memory_embedding"),
    ("sam_mask_decoder.conv_s1.", "encoder.high_res_projections.0."),
    ("sam_mask_decoder.conv_s0.", "encoder.high_res_projections.1."),
    *(
        (f"sam_mask_decoder.transformer.{published}", f"segmenter.decoder.transformer.{native}")
        for published, native in _TWO_WAY_NAMES
    ),
    *(
        (f"sam_mask_decoder.output_upscaling.{index}.", f"segmenter.decoder.{name}.")
        for index, name in _UPSCALING_NAMES.items()
    ),
    *(
        (f"sam_mask_decoder.{head}.{published}", f"segmenter.decoder.{head}.{native}")
        for head in ("output_hypernetworks_mlps.{}", "iou_prediction_head", "pred_obj_score_head")
        for published, native in _PERCEPTRONS
    ),
    ("sam_mask_decoder.", "segmenter.decoder."),
    *(
        (f"sam_prompt_encoder.mask_downscaling.{index}.", f"segmenter.prompt_encoder.mask_embed.{name}.")
        for index, name in _MASK_EMBEDDING_NAMES.items()
    ),
    ("sam_prompt_encoder.", "segmenter.prompt_encoder."),
)
_NAMES = (  # the first prefix that fits is replaced
    *((f"{SAM_PREFIX}{published}", native) for published, native in _SAM_NAMES),
    ("model.vision_resampler.sem_tokens.", "mixer.tokens."),
    ("model.vision_resampler.pe_layer.positional_encoding_gaussian_matrix", "mixer.frequencies"),
    ("model.vision_resampler.norm_final_attn.", "mixer.transformer.layer_norm_final_attn."),
    ("model.vision_resampler.layers.{}.norm{}.", "mixer.transformer.layers.{}.layer_norm{}."),
    ("model.vision_resampler.layers.{}.mlp.layers.0.", "mixer.transformer.layers.{}.mlp.lin1."),
    ("model.vision_resampler.layers.{}.mlp.layers.1.", "mixer.transformer.layers.{}.mlp.lin2."),
    ("model.vision_resampler.", "mixer.transformer."),
    ("model.mm_projector_img.", "mixer.image_projector."),
    ("model.mm_projector_semT.", "mixer.query_projector."),
    ("model.image_newline", "mixer.image_newline"),
    ("model.semT_newline", "mixer.query_newline"),
    ("model.", "language_model.model.model."),
    (HEAD_NAME, f"language_model.model.{HEAD_NAME}"),
)


def convert_to_native_name(name: str) -> str:
    """Return the native name of a tensor of PAM; unchanged if it has none."""
    return _replace_prefix(name, _NAMES)


def convert_to_pam_name(name: str) -> str:
    """Return PAM's name of a native tensor; unchanged if it has none."""
    return _replace_prefix(name, [(native, published) for published, native in _NAMES])


def is_video_tensor(name: str) -> bool:
    """Return whether a tensor of PAM is used for videos only, and ignored here."""
    return name.startswith(VIDEO_PREFIXES)


def _replace_prefix(name: str, pairs: Iterable[Sequence[str]]) -> str:
    for prefix, replacement in pairs:
        match = re.match(re.escape(prefix).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return replacement.format(*match.groups()) + name[match.end() :]
    return name
