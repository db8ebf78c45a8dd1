"""Tiny configurations of transformers' architectures: other sizes, same settings.

Settings that affect the computation (layer types, scales, caps, activations, `is_decoder`) are unchanged, so that a
tiny model with random weights behaves like the large one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

TINY_VOCAB_SIZE, TINY_MAX_POSITIONS, TINY_MAX_LAYERS = 97, 64, 8
TINY_NUM_HEADS, TINY_HEAD_DIM = 4, 16
TINY_HIDDEN_SIZE = TINY_NUM_HEADS * TINY_HEAD_DIM
SIZE_LIMITS = (  # maximum value of a field: that of the first pattern that matches the full name
    (r"(task_)?type_vocab_size", TINY_VOCAB_SIZE),
    (r"(\w+_)?vocab_size(_\w+)?", TINY_VOCAB_SIZE),
    (r"(original_)?max_position_embeddings|max_(source|target)_positions|model_max_length", TINY_MAX_POSITIONS),
    (r"n_positions|n_ctx|max_seq_len|context_length", TINY_MAX_POSITIONS),
    (r"qk_(rope|nope)_head_dim", TINY_HEAD_DIM // 2),
    (r"(\w+_)?(head_dim|headdim|d_head|attention_head_size|rotary_dim)|dim_head|kv_channels", TINY_HEAD_DIM),
    (r"(\w+_)?(kv|key_value)_heads|num_query_groups|kv_n_heads", TINY_NUM_HEADS // 2),
    (r"(mamba_n|mamba_num|n_mamba)_heads", 2 * TINY_HIDDEN_SIZE // TINY_HEAD_DIM),
    (r"(\w+_)?(n|num)_(\w+_)?heads?|(\w+_)?attention_heads", TINY_NUM_HEADS),
    (r"(decoder|encoder)_layers|num(_\w+)?_layers|n_layers?|num_layers_per_stack|num_blocks", 2),
    (r"hidden_size_per_layer_input|router_hidden_size", 8),
    (r"mamba_d_ssm", 2 * TINY_HIDDEN_SIZE),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_chunk_size|chunk_size|block_size|index_block_size", 8),
    (r"mamba_dt_rank|time_step_rank|(\w+_)?(rank|lowrank)|d_rel", 8),
    (r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size)(_mlp)?|dim_ff|dff|d_inner", 48),
    (
        r"(\w+_)?hidden_size|n_embd|d_model|dim_model_base|emb(edding)?_dim|lru_width|word_embed_proj_dim",
        TINY_HIDDEN_SIZE,
    ),
    (r"(\w+_)?embedding_size|(\w+_)?embed_dim", TINY_HIDDEN_SIZE),
    (r"n(um)?_group|num_expert_group|topk_group", 1),
    (r"(moe_)?num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k", 2),
    (r"(n|num|moe_num)_(routed_|local_)?experts|zero_expert_num", 4),
    (r"_?sliding_window(_size)?|attention_window_size|window_size|local_attention(_window_len)?", 4),
    (r"attention_chunk_size|keep_window_size|rel_extent|(local|lsh)_attn_chunk_length", 4),
    (r"expansion_ratio", 2),
)
DEPTH_FIELD = re.compile(r"num_hidden_layers|n_layers?|num_layers|decoder_layers")
PER_LAYER_FIELD = re.compile(
    r"(\w+_)?(layer_types|layers_block_type|block_types|indexer_types|layer_rope_theta|no_rope_layers)|\w+_per_layer"
    r"|\w+_pattern|intermediate_size|attention_layers"
)
LAYER_INDICES_FIELD = re.compile(r"mlp_only_layers|full_attn_idxs|moe_layers|hybrid_layer_ids|ple_layer_ids")


def make_tiny_config(config: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
    """Return a configuration of the same architecture with tiny sizes.

    Args:
        config: Configuration; it is not changed.
        **fields: Fields of the tiny configuration to override.

    Returns:
        The tiny configuration.

    Raises:
        Exception: The architecture does not support the sizes.
    """
    return type(config).from_dict(_shrink_fields(config) | fields)


def _shrink_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = config.to_dict()
    depth = next((value for name, value in fields.items() if DEPTH_FIELD.fullmatch(name) and isinstance(value, int)), 0)
    per_layer = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and 0 < depth == len(value) and PER_LAYER_FIELD.fullmatch(name)
    }
    layers = _choose_layers([*per_layer.values(), getattr(config, "layer_types", None) or []], depth)
    shrunk: dict[str, Any] = {}
    for name, value in fields.items():
        sub_config = config.__dict__.get(name)
        if isinstance(sub_config, PreTrainedConfig):
            shrunk[name] = _shrink_fields(sub_config)
        elif name in per_layer:
            shrunk[name] = [_shrink_value(name, value[layer]) for layer in layers]
        elif isinstance(value, list | tuple) and LAYER_INDICES_FIELD.fullmatch(name):
            shrunk[name] = [index for index, layer in enumerate(layers) if layer in value]
        elif DEPTH_FIELD.fullmatch(name) and isinstance(value, int):
            shrunk[name] = len(layers)
        elif name.endswith(("_token_id", "_token_index")):
            shrunk[name] = _shrink_ids(value)
        elif name != "per_layer_config":  # indexed by layers, most of which are removed
            shrunk[name] = _shrink_value(name, value)
    return shrunk | _derive_related_sizes(fields, shrunk)


def _derive_related_sizes(fields: dict[str, Any], shrunk: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that are derived from others, as in the large configuration."""
    sizes: dict[str, Any] = {}
    heads_field = next((name for name in ("num_attention_heads", "n_head", "n_heads") if name in fields), "")
    for name in fields.keys() & {"num_key_value_heads", "num_kv_heads", "kv_n_heads"}:
        if heads_field and fields[name] == fields[heads_field]:
            sizes[name] = shrunk[heads_field]
    if "qk_rope_head_dim" in fields and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        sizes["head_dim"] = shrunk["qk_rope_head_dim"]
    if "mamba_d_ssm" in fields and shrunk["mamba_d_ssm"]:
        sizes["mamba_d_head"] = shrunk["mamba_d_ssm"] // shrunk["mamba_n_heads"]
    if fields.keys() >= {"expand", "num_heads", "head_dim", "hidden_size"}:
        sizes["num_heads"] = shrunk["expand"] * shrunk["hidden_size"] // shrunk["head_dim"]
    return sizes


def _choose_layers(layer_properties: Sequence[Sequence[Any]], depth: int) -> list[int]:
    """Choose the first layers up to one of each kind, at least two, or else the first layer of each kind."""
    # lists of another length than the depth do not describe layers
    properties = [each for each in layer_properties if len(each) == depth]
    first_layers: dict[str, int] = {}
    for layer in range(depth):
        first_layers.setdefault(repr([each[layer] for each in properties]), layer)
    last_layer = max(first_layers.values(), default=0)
    if last_layer < TINY_MAX_LAYERS:
        return list(range(min(depth, max(2, last_layer + 1))))
    return list(first_layers.values())[:TINY_MAX_LAYERS]


def _shrink_value(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    limit = next((size for pattern, size in SIZE_LIMITS if re.fullmatch(pattern, name)), value)
    return min(value, limit)


def _shrink_ids(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shrink_ids(each) for each in value]
    return value if value is None or value < TINY_VOCAB_SIZE else value % (TINY_VOCAB_SIZE - 8) + 8
