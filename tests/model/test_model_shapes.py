"""Components with wrong output shapes: the error names the component and the conformance command."""

import pytest
import torch
from sca_registry import RegistryError
from sca_registry.contracts import PromptBatch


@pytest.fixture
def model_inputs():
    return torch.zeros(1, 3, 64, 64), PromptBatch(torch.tensor([0]), boxes=torch.tensor([[8.0, 8, 40, 40]]))


@pytest.mark.parametrize(("kind", "name"), [("encoder", "tiny-vit"), ("mixer", "query")])
def test_model_error_names_the_component_with_a_wrong_output_shape(build_small_model, model_inputs, kind, name):
    model = build_small_model()
    part, (pixels, prompts) = getattr(model, kind), model_inputs
    forward = part.forward
    part.forward = lambda *args: forward(*args)[..., :-1]
    with pytest.raises(RegistryError, match=rf"{kind} '{name}' returns shape .* expected .*`sca check {kind} {name}`"):
        model.generate(model.encode(pixels), prompts, torch.tensor([1]))
    part.forward = lambda *args: [forward(*args)]
    with pytest.raises(
        RegistryError, match=rf"{kind} '{name}' returns a list, expected shape .*; run `sca check {kind} {name}`"
    ):
        model.generate(model.encode(pixels), prompts, torch.tensor([1]))
