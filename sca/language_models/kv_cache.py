"""KV cache whose steps copy only their own keys and values.

Each step of transformers' `DynamicCache` copies the keys and values of all positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_POSITIONS = 32  # additional positions of a buffer that grows


class BufferedLayer(DynamicLayer):
    """Layer of a KV cache with buffers that are larger than its sequences.

    `keys` and `values` are views of the buffers: (N, heads, L, head size). Of the methods that change the batch, only
    `batch_select_indices` is supported.

    Args:
        max_length: Maximum length of the sequences.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, heads, L, head size); return those of all positions."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = key_states[:, :, :0], value_states[:, :, :0]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            capacity, (keys, values) = max(end, min(end + SPARE_POSITIONS, self.max_length)), self._buffers
            self._buffers = _grow_buffer(keys, start, capacity), _grow_buffer(values, start, capacity)
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences with the given indices."""
        if self._buffers is not None:
            length = self.get_seq_length()
            keys, values = self._buffers
            self._buffers = keys[indices], values[indices]
            self.keys, self.values = self._buffers[0][:, :, :length], self._buffers[1][:, :, :length]


def make_buffered_cache(config: PreTrainedConfig, max_length: int) -> DynamicCache:
    """Return an empty cache for sequences of at most `max_length`; layers with a window are those of transformers."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _grow_buffer(buffer: Tensor, length: int, new_length: int) -> Tensor:
    """Return a buffer of `new_length` positions that begins with the first `length` positions of a buffer."""
    batch_size, num_heads, _, head_size = buffer.shape
    new_buffer = torch.empty((batch_size, num_heads, new_length, head_size), dtype=buffer.dtype, device=buffer.device)
    new_buffer[:, :, :length] = buffer[:, :, :length]
    return new_buffer
