"""Conformance checks of all kinds of components, and of all kinds that compute tensors."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import torch
from sca_registry import get_registry
from sca_registry.contracts import COMPONENT_KINDS
from sca_registry.plugins import BUILTIN_DISTRIBUTION
from torch import nn

from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.comparison import clone_tensors, compute_weighted_sum, describe_difference, format_names
from sca.testing.conformance.harnesses import TENSOR_KINDS, ComponentHarness, TensorHarness
from sca.testing.conformance.process_state import CHANGED_BY_IMPORTS, capture_process_state


@register_check(*COMPONENT_KINDS)
def factory_returns_component(harness: ComponentHarness) -> str | None:
    """The factory returns a component when called with the upstream component and its options."""
    return None if harness.component is not None else "the factory returned None"


@register_check(*COMPONENT_KINDS)
def attributes_match_protocol(harness: ComponentHarness) -> str | None:
    """The component has the attributes and methods of its protocol, with the declared types."""
    protocol = COMPONENT_KINDS[harness.kind].protocol
    member_names = [
        name for name, value in vars(protocol).items() if getattr(value, "__module__", "") == protocol.__module__
    ]
    methods = [name for name in member_names if inspect.isfunction(getattr(protocol, name))]
    missing = [name for name in (*protocol.__annotations__, *methods) if not hasattr(harness.component, name)]
    if missing:
        return f"{type(harness.component).__name__} lacks {', '.join(missing)}"
    for name, annotation in protocol.__annotations__.items():
        value = getattr(harness.component, name)
        is_positive_integer = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if (annotation == "int" and not is_positive_integer) or (annotation == "bool" and not isinstance(value, bool)):
            return f"{name} is {value!r}, not {'a positive int' if annotation == 'int' else 'a bool'}"
    return None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def forward_succeeds(harness: TensorHarness) -> str | None:
    """A forward pass on small inputs succeeds; otherwise, the remaining checks are skipped."""
    harness.compute_outputs(harness.component, harness.make_inputs())
    return None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def eval_is_deterministic(harness: TensorHarness) -> str | None:
    """In eval mode equal inputs produce bitwise equal outputs for any random state."""
    first_outputs = harness.compute_outputs(harness.component, harness.make_inputs())
    torch.manual_seed(99)
    return describe_difference(
        first_outputs, harness.compute_outputs(harness.component, harness.make_inputs()), tolerance=0.0
    )


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def forward_has_no_side_effects(harness: TensorHarness) -> str | None:
    """A forward pass in eval mode changes neither the state of the component nor its input tensors."""
    inputs, component = harness.make_inputs(), harness.component
    initial_state = clone_tensors(component.state_dict()) if isinstance(component, nn.Module) else {}
    initial_inputs = [leaf.clone() for leaf in harness.list_upstream_tensors(inputs)]
    harness.compute_outputs(component, inputs)
    changed = [name for name, value in initial_state.items() if not torch.equal(value, component.state_dict()[name])]
    if changed:
        return f"changed state: {format_names(changed)}"
    are_inputs_unchanged = all(
        torch.equal(old, new) for old, new in zip(initial_inputs, harness.list_upstream_tensors(inputs), strict=True)
    )
    return None if are_inputs_unchanged else "input tensors are changed in place"


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def batch_invariance(harness: TensorHarness) -> str | None:
    """The output of an image, a region or a text is the same alone as in a batch, even with other padding."""
    inputs = harness.make_inputs()
    batch_outputs = harness.compute_outputs(harness.component, inputs)
    for row in range(harness.count_rows(inputs)):
        row_outputs = harness.compute_outputs(harness.component, harness.select_rows(inputs, [row]))
        difference = describe_difference(
            {name: value[row : row + 1] for name, value in batch_outputs.items()}, row_outputs
        )
        if difference:
            return f"row {row} in a batch of its own: {difference}"
    return None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def permutation_equivariance(harness: TensorHarness) -> str | None:
    """Permuted rows (regions: within their image) produce outputs permuted in the same way."""
    inputs = harness.make_inputs()
    order = [2, 0, 1, 4, 3][: harness.count_rows(inputs)] if harness.count_rows(inputs) != 2 else [1, 0]
    batch_outputs = harness.compute_outputs(harness.component, inputs)
    expected = {name: value[order] for name, value in batch_outputs.items()}
    return describe_difference(expected, harness.compute_outputs(harness.component, harness.select_rows(inputs, order)))


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def outputs_keep_dtype(harness: TensorHarness) -> str | None:
    """In bfloat16 and float64 the outputs are finite and keep that dtype; float64 agrees with float32."""
    float32_outputs = harness.compute_outputs(harness.build_module(), harness.make_inputs())
    for dtype in (torch.bfloat16, torch.float64):
        outputs = harness.compute_outputs(
            harness.build_module().to(dtype), harness.cast_inputs(harness.make_inputs(), dtype)
        )
        for name, value in outputs.items():
            if not name.startswith("boxes") and value.dtype != dtype:  # boxes are coordinates and stay exact
                return f"{name} is {value.dtype} for a component of {dtype}"
            if not value.isfinite().all():
                return f"{name} has NaN or infinite values in {dtype}"
    compared_outputs = {name: value for name, value in outputs.items() if not name.startswith("boxes")}
    return describe_difference(
        {name: float32_outputs[name].double() for name in compared_outputs}, compared_outputs, tolerance=1e-2
    )


@register_check(*TENSOR_KINDS)
def trainable_parameters_receive_gradients(harness: TensorHarness) -> str | None:
    """Every trainable parameter receives a finite gradient, and not all gradients are zero."""
    component = harness.build_module().train()
    trainable = {name: parameter for name, parameter in component.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise DoesNotApply("the component has no trainable parameters")
    compute_weighted_sum(harness.compute_outputs(component, harness.make_inputs())).backward()
    gradients = {name: parameter.grad for name, parameter in trainable.items() if parameter.grad is not None}
    missing_gradients = [name for name in trainable if name not in gradients]
    if missing_gradients:
        return f"parameters without a gradient: {format_names(missing_gradients)}"
    non_finite_gradients = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if non_finite_gradients:
        return f"NaN or infinite gradients: {format_names(non_finite_gradients)}"
    return None if any(gradient.any() for gradient in gradients.values()) else "all gradients are zero"


@register_check("segmenters", "mixers", "language_models")
def gradients_flow_to_inputs(harness: TensorHarness) -> str | None:
    """Gradients flow through the component to its inputs, so that upstream components can be trained."""
    inputs = harness.make_inputs()
    input_tensors = [leaf.requires_grad_() for leaf in harness.list_upstream_tensors(inputs)]
    compute_weighted_sum(harness.compute_outputs(harness.component, inputs)).backward()
    return (
        None
        if any(leaf.grad is not None and leaf.grad.any() for leaf in input_tensors)
        else "no gradient reaches the inputs"
    )


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def state_dict_round_trip(harness: TensorHarness) -> str | None:
    """An instance with another seed produces bitwise equal outputs after loading the `state_dict`."""
    first, second = harness.build_module(seed=0), harness.build_module(seed=1)
    second.load_state_dict(clone_tensors(first.state_dict()), strict=True)
    return describe_difference(
        harness.compute_outputs(first, harness.make_inputs()),
        harness.compute_outputs(second, harness.make_inputs()),
        tolerance=0.0,
    )


@register_check(*TENSOR_KINDS, source="sca.builder.compose")
def supports_meta_device(harness: TensorHarness) -> str | None:
    """Under `torch.device("meta")` the component has the same tensors and allocates no memory."""
    expected_shapes = {name: value.shape for name, value in harness.build_module().state_dict().items()}
    with torch.device("meta"):
        meta_tensors = harness.build_module().state_dict()
    allocated = [name for name, value in meta_tensors.items() if not value.is_meta]
    if allocated:
        return f"tensors that are not on the meta device: {format_names(allocated)}"
    shapes = {name: value.shape for name, value in meta_tensors.items()}
    names = shapes.keys() | expected_shapes.keys()
    differing_names = sorted(name for name in names if shapes.get(name) != expected_shapes.get(name))
    return f"tensors that differ on the meta device: {format_names(differing_names)}" if differing_names else None


OPTIONAL_PACKAGES = (  # imported only where they are used
    *("cv2", "datasets", "gradio", "jax", "matplotlib", "mmcv", "mmdet", "mmengine", "open_clip", "pandas", "ray"),
    *("scipy", "sklearn", "tensorflow", "timm", "wandb"),
)
IMPORT_SCRIPT = """
import json, sys
import sca.language_models.hf, sca_registry
from sca.testing.conformance.process_state import RANDOM_STATE, WARNING_FILTERS, capture_process_state
registry = sca_registry.get_registry(sys.argv[1])
known, before = set(sys.modules), capture_process_state()
factory = registry.get(sys.argv[2])
imported = {name.partition(".")[0] for name in sys.modules if name not in known}
after = capture_process_state()
print(json.dumps([sorted(imported), sorted(
    name for name in before if before[name] != after[name] and name not in (WARNING_FILTERS, RANDOM_STATE)
)]))
"""


@register_check(*COMPONENT_KINDS, source="docs/plugins.md")
def import_has_no_side_effects(harness: ComponentHarness) -> str | None:
    """Importing the module imports no large optional package, prints nothing and changes no process setting.

    Optional packages are imported where they are used.
    """
    if harness.name is None:
        raise DoesNotApply("the component is not registered by name")
    if get_registry(harness.kind).load_entry(harness.name).distribution == BUILTIN_DISTRIBUTION:
        raise DoesNotApply("built-in components are tested together")
    command = [sys.executable, "-c", IMPORT_SCRIPT, harness.kind, harness.name]
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        return f"the import exited with status {process.returncode}"
    imported, changed = json.loads(lines[-1])
    optional_packages = sorted({*OPTIONAL_PACKAGES} & {*imported})
    if optional_packages:
        return f"the import loads optional packages: {format_names(optional_packages)}"
    if len(lines) > 1:
        return f"the import prints {lines[0]!r}"
    return f"the import changes {format_names(changed)}" if changed else None


@register_check(*COMPONENT_KINDS, source="docs/plugins.md")
def process_state_is_unchanged(harness: ComponentHarness) -> str | None:
    """Building and running the component changes no process setting of torch, logging, warnings or environment."""
    state_before = capture_process_state()
    component = harness.build()
    if isinstance(harness, TensorHarness):
        harness.compute_outputs(component, harness.make_inputs())
    state_after = capture_process_state()
    changed = {name for name, value in state_before.items() if state_after[name] != value}
    changed |= {
        name
        for name, value in harness.initial_state.items()
        if state_after[name] != value and name not in CHANGED_BY_IMPORTS
    }
    return f"changed settings: {format_names(sorted(changed))}" if changed else None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def options_take_effect(harness: TensorHarness) -> str | None:
    """Changing an integer option changes the tensors of the component or its outputs."""
    options = harness.collect_integer_options()
    if not options:
        raise DoesNotApply("the component has no integer options")
    default_component = harness.build()
    default_result = (
        _collect_shapes(default_component),
        harness.compute_outputs(default_component, harness.make_inputs()),
    )
    for name, value in options.items():
        for new_value in (2 * value, value // 2, value + 1):
            varied_harness = harness.with_options({name: new_value})
            try:
                component = varied_harness.build()
                varied_result = (
                    _collect_shapes(component),
                    varied_harness.compute_outputs(component, varied_harness.make_inputs()),
                )
            except (ValueError, RuntimeError, AssertionError):  # an invalid value
                continue
            if (
                varied_result[0] == default_result[0]
                and describe_difference(default_result[1], varied_result[1], tolerance=0.0) is None
            ):
                return f"{name}={new_value} has the same tensors and outputs as {name}={value}"
            break
    return None


def _collect_shapes(component: Any) -> dict[str, torch.Size] | None:
    return (
        {name: value.shape for name, value in component.state_dict().items()}
        if isinstance(component, nn.Module)
        else None
    )
