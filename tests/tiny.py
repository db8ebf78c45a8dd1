"""Real architectures at sizes that fit into a thimble."""

VISION = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_dim": 48,
        "image_size": 64,
        "output_channels": 32,
        "num_pos_feats": 16,
        "global_attn_indexes": [1],
        "window_size": 3,
    }
}
SAM = {
    **VISION,
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 4, "mlp_dim": 48, "iou_head_hidden_dim": 32},
}
FAMILIES = {  # language models: what each has besides, or calls otherwise
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {"num_key_value_heads": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "mistral": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
OTHERS = {  # families that do more to their logits
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
}
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(family):
    """The configuration of a language model."""
    return {**({} if family == "gpt2" else SHAPE), **_ENDS, **(FAMILIES | OTHERS)[family], "model_type": family}


_ENDS = {key: value for key, value in SHAPE.items() if key.endswith("_id") or key == "vocab_size"}
