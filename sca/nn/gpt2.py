"""GPT-2 (Radford et al. 2019) for embedding inputs, without transformers; the parameters have transformers' names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_STD = 0.02


class KeyValueCache:
    """Keys and values of earlier positions, by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Return the number of positions."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append_layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, heads, L, d) of a layer, and return all of them."""
        if layer in self.layers:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (keys, values), strict=True))
        self.layers[layer] = keys, values
        return keys, values

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep some rows of the batch."""
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


class Conv1D(nn.Module):
    """Linear layer with a transposed weight, as in GPT-2's code: (..., in) -> (..., out).

    Args:
        input_size: Input width.
        output_size: Output width.
        std: Standard deviation of the initial weight.
    """

    def __init__(self, input_size: int, output_size: int, std: float = INITIAL_STD):
        super().__init__()
        self.input_size, self.output_size = input_size, output_size  # peft reads these names
        self.weight: nn.Parameter = nn.Parameter(torch.empty(input_size, output_size))
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(output_size))
        nn.init.normal_(self.weight, std=std)

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layer."""
        return torch.addmm(self.bias, values.flatten(0, -2), self.weight).unflatten(0, values.shape[:-1])


class Gpt2Attention(nn.Module):
    """Causal self-attention: (N, L, E) -> (N, L, E).

    Args:
        hidden_size: Width E.
        num_heads: Attention heads.
        dropout: Dropout probability of attention weights and outputs.
        residual_std: Standard deviation of the initial weight of the output projection.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, residual_std: float):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size ({hidden_size}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.c_attn: Conv1D = Conv1D(hidden_size, 3 * hidden_size)
        self.c_proj: Conv1D = Conv1D(hidden_size, hidden_size, residual_std)
        self.attn_dropout: nn.Dropout = nn.Dropout(dropout)
        self.resid_dropout: nn.Dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int) -> Tensor:
        """Attend to earlier positions, those in the cache included; None as mask is causal."""
        query, key, value = (
            each.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for each in self.c_attn(states).chunk(3, dim=2)
        )
        if cache is not None:
            key, value = cache.append_layer(layer, key, value)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=mask is None and query.shape[2] > 1,
        )
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).flatten(2)))


class Gpt2Mlp(nn.Module):
    """MLP: (..., E) -> (..., E).

    Args:
        hidden_size: Width E; that of the hidden layer is four times as large.
        dropout: Dropout probability of the output.
        residual_std: Standard deviation of the initial weight of the output projection.
    """

    def __init__(self, hidden_size: int, dropout: float, residual_std: float):
        super().__init__()
        self.c_fc: Conv1D = Conv1D(hidden_size, 4 * hidden_size)
        self.c_proj: Conv1D = Conv1D(4 * hidden_size, hidden_size, residual_std)
        self.dropout: nn.Dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Apply the MLP."""
        return self.dropout(self.c_proj(_approximate_gelu(self.c_fc(states))))


class Gpt2Block(nn.Module):
    """Pre-norm transformer block; the arguments are those of its layers."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, residual_std: float):
        super().__init__()
        self.ln_1: nn.LayerNorm = nn.LayerNorm(hidden_size)
        self.attn: Gpt2Attention = Gpt2Attention(hidden_size, num_heads, dropout, residual_std)
        self.ln_2: nn.LayerNorm = nn.LayerNorm(hidden_size)
        self.mlp: Gpt2Mlp = Gpt2Mlp(hidden_size, dropout, residual_std)

    def forward(self, states: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int) -> Tensor:
        """Apply the block; the arguments are those of `Gpt2Attention.forward`."""
        states = self.attn(self.ln_1(states), mask, cache, layer) + states
        return states + self.mlp(self.ln_2(states))


class Gpt2Body(nn.Module):
    """GPT-2 without its output projection: embeddings (N, L, E) -> hidden states (N, L, E).

    Args:
        vocab_size: Tokens V.
        max_positions: Maximum number of positions.
        hidden_size: Width E.
        depth: Layers.
        num_heads: Attention heads.
        dropout: Dropout probability of embeddings, attention and residuals.
    """

    def __init__(
        self, vocab_size: int, max_positions: int, hidden_size: int, depth: int, num_heads: int, dropout: float
    ):
        super().__init__()
        residual_std = INITIAL_STD / math.sqrt(2 * depth)
        self.wte: nn.Embedding = nn.Embedding(vocab_size, hidden_size)
        self.wpe: nn.Embedding = nn.Embedding(max_positions, hidden_size)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=INITIAL_STD)
        self.drop: nn.Dropout = nn.Dropout(dropout)
        self.h: nn.ModuleList = nn.ModuleList(
            Gpt2Block(hidden_size, num_heads, dropout, residual_std) for _ in range(depth)
        )
        self.ln_f: nn.LayerNorm = nn.LayerNorm(hidden_size)

    def forward(
        self, embeddings: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Compute the hidden states.

        Args:
            embeddings: (N, L, E) embeddings; with a filled cache, L is 1.
            attention_mask: (N, L) 1 for tokens, 0 for padding on the right; None without padding.
            cache: Cache of earlier positions, which is extended.

        Returns:
            Hidden states (N, L, E).
        """
        start, length = 0 if cache is None else len(cache), embeddings.shape[1]
        positions = torch.arange(start, start + length, device=embeddings.device)
        mask: Tensor | None = None
        if attention_mask is not None:
            mask = (positions[:, None] >= positions) & attention_mask.bool()[:, None, None]  # (N, 1, L, L)
        states = self.drop(embeddings + self.wpe(positions))
        for layer, block in enumerate(self.h):
            states = block(states, mask, cache, layer)
        return self.ln_f(states)


class Gpt2(nn.Module):
    """GPT-2 with an output projection that shares the token embeddings; the arguments are those of `Gpt2Body`."""

    def __init__(
        self, vocab_size: int, max_positions: int, hidden_size: int, depth: int, num_heads: int, dropout: float = 0.0
    ):
        super().__init__()
        self.transformer: Gpt2Body = Gpt2Body(vocab_size, max_positions, hidden_size, depth, num_heads, dropout)
        self.lm_head: nn.Linear = nn.Linear(hidden_size, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight


def _approximate_gelu(values: Tensor) -> Tensor:
    """Compute GPT-2's GELU; `F.gelu(approximate="tanh")` rounds differently."""
    return 0.5 * values * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * torch.pow(values, 3.0))))
