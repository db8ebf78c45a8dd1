"""Greedy words for many regions at once: what transformers' `generate` writes, without what it does for other searches.

All rows begin with as many positions, so that nothing is padded; a caption that has ended leaves the batch and its
cache, and of the logits of a step only what its word scores is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

NEUTRAL = {  # settings of generation that greedy search does not look at, or that are given by the caller
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("temperature", "top_p", "top_k", "do_sample", "num_beams", "transformers_version", "use_cache", "cache_config"),
    *("output_attentions", "output_hidden_states", "return_dict_in_generate", "output_scores"),
}


def plain(model: PreTrainedModel) -> bool:
    """Whether a model's own settings for greedy search are no more than the likeliest word after the other: they ask
    for nothing besides, such as a penalty for repetition.
    """
    asked = {name for name, value in model.generation_config.to_diff_dict().items() if value is not None}
    return not {name for name in asked if not name.startswith("_")} - NEUTRAL


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    body: nn.Module,
    head: Callable[[Tensor], Tensor],
    prefix: Tensor,
    steps: int,
    pad: int,
    ends: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(N, K, E) -> ids (N, T), `pad` after the end, and their mean log-probability (N,), the end counted; T is at most
    `steps`. body: what turns embeddings into states. head: states (..., E) -> logits (..., V).
    """
    rows, device = len(prefix), prefix.device
    ids = torch.full((rows, steps), pad, dtype=torch.long, device=device)
    total, lengths = torch.zeros(rows, device=device), torch.zeros(rows, device=device)
    ending = torch.tensor(ends, dtype=torch.long, device=device)
    alive, cache = torch.arange(rows, device=device), DynamicCache(config=model.config)
    embed, inputs = model.get_input_embeddings(), prefix
    for step in range(steps):
        states = body(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        logits = head(states).float()
        best, words = logits.max(dim=1)
        ids[alive, step] = words
        total[alive] += best - logits.logsumexp(dim=1)
        lengths[alive] += 1
        if step + 1 == steps:
            break
        going = (~torch.isin(words, ending)).nonzero().squeeze(1)  # the one thing in a step that the host waits for
        if not len(going):
            break
        if len(going) < len(alive):
            alive, words = alive[going], words[going]
            cache.batch_select_indices(going)
        inputs = embed(words[:, None])
    return ids[:, : step + 1], total / lengths
