import torch
from transformers import DynamicCache, GPT2Config, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from sca.language_models.kv_cache import SPARE_POSITIONS, make_buffered_cache

CONFIG = GPT2Config(n_layer=2, n_head=3, n_embd=12)


def test_buffered_cache_equals_dynamic_cache():
    expected, actual = DynamicCache(config=CONFIG), make_buffered_cache(CONFIG, 1000)
    num_sequences = 5
    for step, length in enumerate((7, *[1] * (SPARE_POSITIONS + 3), 2)):
        for layer in range(2):
            keys, values = torch.randn(2, num_sequences, 3, length, 4)
            for output, reference in zip(
                actual.update(keys, values, layer), expected.update(keys, values, layer), strict=True
            ):
                torch.testing.assert_close(output, reference, rtol=0, atol=0)
        assert actual.get_seq_length() == expected.get_seq_length()
        if step in (2, SPARE_POSITIONS):
            kept = torch.tensor([0, 2, 3, 4] if step == 2 else [1, 3])
            num_sequences = len(kept)
            for cache in (expected, actual):
                cache.batch_select_indices(kept)


def test_buffered_cache_copies_only_new_positions():
    cache = make_buffered_cache(CONFIG, 9)
    addresses = []
    for length in (7, 1, 1):
        keys, values = cache.update(*torch.randn(2, 1, 3, length, 4), 0)
        addresses.append((keys.data_ptr(), values.data_ptr()))
    assert len(set(addresses)) == 1
    assert keys.untyped_storage().nbytes() == 4 * 3 * 9 * 4  # no positions beyond the maximum


def test_buffered_cache_keeps_layers_with_a_window():
    cache = make_buffered_cache(MistralConfig(num_hidden_layers=2, sliding_window=4), 9)
    assert all(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)
