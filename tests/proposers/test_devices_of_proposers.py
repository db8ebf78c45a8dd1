"""Proposers on an accelerator, which is simulated by `simulated_cuda`."""

import numpy as np
import pytest
from simulated_cuda import simulated_cuda


@pytest.mark.parametrize("name", ["detr", "rt-detr", "d-fine", "owlv2", "grounding-dino", "florence-2", "sam3"])
def test_proposer_on_an_accelerator_returns_the_same_proposals(name, build_tiny, colored_image):
    expected = build_tiny(name)(colored_image, "a")
    with simulated_cuda():
        proposer = build_tiny(name, device="cuda")
        assert proposer.model.device.type == "cuda"
        proposals = proposer(colored_image, "a")
    assert proposals.names == expected.names
    assert np.allclose(proposals.scores, expected.scores, atol=1e-5)
    for prompt, other in zip(proposals.prompts, expected.prompts, strict=True):
        assert prompt.box is None or np.allclose(prompt.box, other.box, atol=1e-3)
        assert prompt.mask is None or (prompt.mask != other.mask).mean() < 0.01
