"""Tiny models of transformers, and prompts for them. Random weights are large enough for masks to differ."""

import inspect
import textwrap

import torch
from sca_registry.contracts import PromptBatch
from transformers import CONFIG_MAPPING, AutoModelForMaskGeneration
from transformers.models.sam_hq import modeling_sam_hq

PROMPT_KINDS = ["box", "points", "box and points", "mask", "box and mask"]
IMAGE_INDEX = torch.tensor([0, 0, 0, 1])
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
SIZES = [[32, 32], [16, 16], [8, 8]]
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 12,
    "embed_dim_per_stage": [12, 24, 48, 96],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "blocks_per_stage": [1, 1, 2, 1],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
    "image_size": [128, 128],
    "window_positional_embedding_background_size": [2, 2],
}
REPVIT = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "num_classes": 2,
    "model_args": {
        "in_chans": 3,
        "features_only": True,
        "out_indices": [0, 1, 2, 3],
        "embed_dim": [8, 16, 24, 32],
        "depth": [1, 1, 1, 1],
    },
}
SAM3_VIT = {
    "model_type": "sam3_vit_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
    "window_size": 4,
    "global_attn_indexes": [1],
    "pretrain_image_size": 56,
}
SAM2_CONFIGS = {
    "sam2": {
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": HIERA,
            "backbone_channel_list": [96, 48, 24, 12],
            "backbone_feature_sizes": SIZES,
            "fpn_hidden_size": 32,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "patch_size": 16},
        "mask_decoder_config": DECODER,
    },
    "edgetam": {
        "vision_config": {
            "model_type": "edgetam_vision_model",
            "backbone_config": REPVIT,
            "backbone_channel_list": [32, 24, 16, 8],
            "backbone_feature_sizes": SIZES,
            "fpn_hidden_size": 32,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "patch_size": 16},
        "mask_decoder_config": DECODER,
    },
    "sam3_tracker": {
        "vision_config": {
            "model_type": "sam3_vision_model",
            "backbone_config": SAM3_VIT,
            "backbone_feature_sizes": SIZES,
            "fpn_hidden_size": 32,
            "scale_factors": [4.0, 2.0, 1.0],
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 112, "patch_size": 14},
        "mask_decoder_config": DECODER,
    },
}

SAM_HQ_CONFIG = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1, 3],
        "mlp_dim": 64,
        "output_channels": 32,
        "num_pos_feats": 16,
        "initializer_range": 0.02,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "patch_size": 16},
    "mask_decoder_config": {**DECODER, "vit_dim": 32},
}

SAM_CONFIG = {**SAM_HQ_CONFIG, "mask_decoder_config": DECODER}


def build_tiny_model(model_type, config, seed=0):
    """Return a model for mask generation whose decoder is not near zero."""
    torch.manual_seed(seed)
    model = AutoModelForMaskGeneration.from_config(CONFIG_MAPPING[model_type](**config)).eval()
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.normal_(0, 0.2)
        if hasattr(model, "no_memory_embedding"):
            model.no_memory_embedding.normal_()
    return model


def make_prompts(kind, side):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(4, 2, 2, dtype=torch.float64, generator=generator) * side / 2
    boxes = torch.cat((corners[:, 0], corners[:, 1] + side / 2), dim=1)
    points = torch.rand(4, 3, 2, dtype=torch.float64, generator=generator) * side
    labels = torch.tensor([[1, 0, 1]]).expand(4, -1)
    masks = 5 * torch.randn(4, 1, 32, 32, dtype=torch.float64, generator=generator)
    fields = {
        "box": {"boxes": boxes},
        "points": {"points": points, "labels": labels},
        "box and points": {"boxes": boxes, "points": points, "labels": labels},
        "mask": {"masks": masks},
        "box and mask": {"boxes": boxes, "masks": masks},
    }
    return PromptBatch(IMAGE_INDEX, **fields[kind])


# transformers 5.23 discards the grid that HQ-SAM's two-way transformer returns.
WRONG_LINE = "point_embedding, iou_token_out = self.transformer("
CORRECTED_LINE = "point_embedding, image_embeddings = self.transformer("


def correct_sam_hq_decoder(monkeypatch):
    """Correct one line of transformers' HQ-SAM, to the code of its authors."""
    source = textwrap.dedent(inspect.getsource(modeling_sam_hq.SamHQMaskDecoder.forward))
    assert WRONG_LINE in source
    namespace = dict(vars(modeling_sam_hq))
    exec(source.replace(WRONG_LINE, CORRECTED_LINE), namespace)
    monkeypatch.setattr(modeling_sam_hq.SamHQMaskDecoder, "forward", namespace["forward"])
