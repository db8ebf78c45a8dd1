"""Tiny configurations of published architectures."""

from sca.testing.tiny import get_tiny_options

TINY_SAM_CONFIG = get_tiny_options("encoder", "sam")["config"]
TINY_VIT_OPTIONS = {  # all options of the encoder tiny-vit
    "image_size": 64,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "output_channels": 32,
    "stem_channels": [8, 16],
    "stem_blocks": 0,
    "resize_mode": "pad",
}
TRAINING_FACTS = {  # record of a training in a folder of pretrained weights
    "objective": "masks",
    "source": "a paper",
    "kind": "encoder",
    "component": "tiny-vit",
    "segmenter": "sam",
    "steps": 1,
    "batch_size": 1,
    "seed": 0,
    "cpu_seconds": 1.0,
    "data": {"scenes": "split train"},
}
BUILT_IN_BY_FAMILY = {  # family of language models -> a built-in one
    "gpt2": "gpt2",
    "llama": "smollm2-135m",
    "phi": "phi-2",
    "mistral": "mistral-7b",
    "stablelm": "stablelm-3b",
    "qwen3": "qwen3-0.6b",
}
TINY_CONFIG_FIELDS = {
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
OTHER_LOADABLE_FAMILIES = {
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}  # families that `hf` loads
SCALED_LOGITS_FAMILIES = {  # families that scale or cap their logits
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
}
LANGUAGE_MODEL_FAMILIES = (*BUILT_IN_BY_FAMILY, *OTHER_LOADABLE_FAMILIES)


def make_tiny_config(family):
    """Return a tiny configuration of a language model."""
    if family in BUILT_IN_BY_FAMILY:
        return dict(get_tiny_options("language_model", BUILT_IN_BY_FAMILY[family])["config"])
    return {**TINY_CONFIG_FIELDS, **(OTHER_LOADABLE_FAMILIES | SCALED_LOGITS_FAMILIES)[family], "model_type": family}
