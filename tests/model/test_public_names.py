"""Public names of `sca`: each resolves to its object in any import order."""

import types

import sca
import sca.checkpoints.load
import sca.checkpoints.native
import sca.inference.predictor


def test_public_names_are_not_shadowed_by_modules():
    public_objects = {name: getattr(sca, name) for name in sca.__all__ for _ in range(2)}
    assert not [name for name, value in public_objects.items() if isinstance(value, types.ModuleType)]
    assert sca.build(sca.ModelSpec.parse("tiny-vit+query+tiny-gpt2"), device="meta").task_tokens.is_meta
