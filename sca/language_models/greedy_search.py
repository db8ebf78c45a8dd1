"""Greedy search for many regions: the results of transformers' `generate` without the overhead of other searches.

All prefixes have the same length, so that nothing is padded. Finished captions leave the batch and the KV cache. Of
the logits of a step, only the log-probability of the selected token is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED_SETTINGS = {  # generation settings that greedy search ignores, or that the caller sets
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("temperature", "top_p", "top_k", "do_sample", "num_beams", "transformers_version", "use_cache", "cache_config"),
    *("output_attentions", "output_hidden_states", "return_dict_in_generate", "output_scores"),
}


def has_plain_greedy_settings(model: PreTrainedModel) -> bool:
    """Return whether the generation config of a model changes nothing in greedy search, as a penalty would."""
    settings = {name for name, value in model.generation_config.to_diff_dict().items() if value is not None}
    return not {name for name in settings if not name.startswith("_")} - IGNORED_SETTINGS


class Cache(Protocol):
    """KV cache."""

    def batch_select_indices(self, indices: Tensor, /) -> None:
        """Keep some rows of the batch."""


CacheType = TypeVar("CacheType", bound=Cache)


@torch.no_grad()
def generate_greedy(
    compute_states: Callable[[Tensor, CacheType], Tensor],
    embed_tokens: Callable[[Tensor], Tensor],
    compute_logits: Callable[[Tensor], Tensor],
    cache: CacheType,
    prefix: Tensor,
    max_steps: int,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Generate captions by greedy search.

    Args:
        compute_states: Function from embeddings (N, L, E) and a cache, which it extends, to hidden states (N, L, E).
        embed_tokens: Function from token ids (N, L) to embeddings (N, L, E).
        compute_logits: Function from hidden states (..., E) to logits (..., V).
        cache: Empty cache.
        prefix: (N, K, E) prefixes.
        max_steps: Maximum number of tokens per caption.
        pad_token_id: Id that fills sequences after EOS.
        eos_token_ids: EOS ids.

    Returns:
        Token ids (N, T) with T at most `max_steps`, and the mean log-probability (N,) of the tokens, EOS included.
    """
    batch_size, device = len(prefix), prefix.device
    ids = torch.full((batch_size, max_steps), pad_token_id, dtype=torch.long, device=device)
    log_likelihood, lengths = torch.zeros(batch_size, device=device), torch.zeros(batch_size, device=device)
    eos_tensor = torch.tensor(eos_token_ids, dtype=torch.long, device=device)
    active_rows, inputs = torch.arange(batch_size, device=device), prefix
    for step in range(max_steps):
        states = compute_states(inputs, cache)[:, -1]
        logits = compute_logits(states).float()
        best, tokens = logits.max(dim=1)
        ids[active_rows, step] = tokens
        log_likelihood[active_rows] -= logits.sub_(best[:, None]).exp_().sum(dim=1).log_()  # of the best token
        lengths[active_rows] += 1
        if step + 1 == max_steps:
            break
        # the only synchronization with an accelerator in a step
        unfinished = (~torch.isin(tokens, eos_tensor)).nonzero().squeeze(1)
        if not len(unfinished):
            break
        if len(unfinished) < len(active_rows):
            active_rows, tokens = active_rows[unfinished], tokens[unfinished]
            cache.batch_select_indices(unfinished)
        inputs = embed_tokens(tokens[:, None])
    return ids[:, : step + 1], log_likelihood / lengths
