"""`sca bench speedup pam`: the captions equal those of a region at a time, in at most a quarter of its time."""

import pytest
from sca_bench.published_comparison import compare_pam
from sca_bench.published_procedure import MEDIUM_PAM_MODEL, ComparisonSettings

from sca.testing.tiny import get_tiny_options

LANGUAGE_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.mark.slow
def test_captions_of_32_regions_equal_those_of_a_region_at_a_time_in_less_time():
    model = {
        **MEDIUM_PAM_MODEL,
        "encoder": {"name": "sam2", "resample": "bicubic", **get_tiny_options("encoder", "sam2")},
        "mixer": {"name": "semantic-perceiver", "num_queries": 5, "mlp_dim": 64},
        "language_model": {"name": "hf", "config": LANGUAGE_CONFIG},
    }
    settings = ComparisonSettings(regions_per_image=32, num_repeats=3, pam_model=model)
    ((quantity, unit, rate, published_rate, note),) = compare_pam(settings)
    assert (quantity, unit) == ("PAM, captions, including encoding", "regions/s")
    assert "identical: 100.0%" in note
    assert rate >= 4 * published_rate
