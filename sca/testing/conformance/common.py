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
from sca.testing.conformance.harnesses import TENSOR_KINDS, PartHarness
from sca.testing.conformance.process_state import CHANGED_BY_IMPORTS, capture_process_state


@register_check(*COMPONENT_KINDS)
def builds(harness: PartHarness) -> str | None:
    """The factory returns a component when called with the upstream component and its options."""
    return None if harness.part is not None else "None"


@register_check(*COMPONENT_KINDS)
def attributes(harness: PartHarness) -> str | None:
    """The component has the attributes and methods of its protocol, with the declared types."""
    protocol = COMPONENT_KINDS[harness.kind].protocol
    member_names = [
        name for name, value in vars(protocol).items() if getattr(value, "__module__", "") == protocol.__module__
    ]
    methods = [name for name in member_names if inspect.isfunction(getattr(protocol, name))]
    missing = [name for name in (*protocol.__annotations__, *methods) if not hasattr(harness.part, name)]
    if missing:
        return f"a {type(harness.part).__name__} without {', '.join(missing)}"
    for name, annotation in protocol.__annotations__.items():
        value = getattr(harness.part, name)
        is_positive_integer = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if (annotation == "int" and not is_positive_integer) or (annotation == "bool" and not isinstance(value, bool)):
            return f"{name} = {value!r}, and the protocol asks for {annotation}" + (" above 0" * (annotation == "int"))
    return None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def runs(harness: PartHarness) -> str | None:
    """A forward pass on small inputs succeeds; otherwise the remaining checks are skipped."""
    harness.compute_outputs(harness.part, harness.make_inputs())
    return None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def eval_is_deterministic(harness: PartHarness) -> str | None:
    """In eval mode equal inputs produce bitwise equal outputs for any random state."""
    first_outputs = harness.compute_outputs(harness.part, harness.make_inputs())
    torch.manual_seed(99)
    return describe_difference(
        first_outputs, harness.compute_outputs(harness.part, harness.make_inputs()), tolerance=0.0
    )


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def eval_changes_nothing(harness: PartHarness) -> str | None:
    """A forward pass in eval mode changes neither the state of the component nor its input tensors."""
    inputs, part = harness.make_inputs(), harness.part
    initial_state = clone_tensors(part.state_dict()) if isinstance(part, nn.Module) else {}
    initial_inputs = [leaf.clone() for leaf in harness.list_upstream_tensors(inputs)]
    harness.compute_outputs(part, inputs)
    changed = [name for name, value in initial_state.items() if not torch.equal(value, part.state_dict()[name])]
    if changed:
        return f"changed: {format_names(changed)}"
    are_inputs_unchanged = all(
        torch.equal(old, new) for old, new in zip(initial_inputs, harness.list_upstream_tensors(inputs), strict=True)
    )
    return None if are_inputs_unchanged else "the tensors that were given are changed in place"


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def alone_as_together(harness: PartHarness) -> str | None:
    """The output of an image, a region or a text is the same alone as in a batch, even with other padding."""
    inputs = harness.make_inputs()
    batch_outputs = harness.compute_outputs(harness.part, inputs)
    for row in range(harness.count_rows(inputs)):
        row_outputs = harness.compute_outputs(harness.part, harness.select_rows(inputs, [row]))
        difference = describe_difference(
            {name: value[row : row + 1] for name, value in batch_outputs.items()}, row_outputs
        )
        if difference:
            return f"row {row} alone: {difference}"
    return None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def order_is_free(harness: PartHarness) -> str | None:
    """Permuted rows (regions: within their image) produce outputs permuted in the same way."""
    inputs = harness.make_inputs()
    order = [2, 0, 1, 4, 3][: harness.count_rows(inputs)] if harness.count_rows(inputs) != 2 else [1, 0]
    batch_outputs = harness.compute_outputs(harness.part, inputs)
    expected = {name: value[order] for name, value in batch_outputs.items()}
    return describe_difference(expected, harness.compute_outputs(harness.part, harness.select_rows(inputs, order)))


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def dtype_is_kept(harness: PartHarness) -> str | None:
    """In bfloat16 and float64 the outputs are finite and keep that dtype; float64 agrees with float32."""
    float32_outputs = harness.compute_outputs(harness.build_module(), harness.make_inputs())
    for dtype in (torch.bfloat16, torch.float64):
        outputs = harness.compute_outputs(
            harness.build_module().to(dtype), harness.cast_inputs(harness.make_inputs(), dtype)
        )
        for name, value in outputs.items():
            if not name.startswith("boxes") and value.dtype != dtype:  # boxes are coordinates and stay exact
                return f"{name} is {value.dtype} in a part of {dtype}"
            if not value.isfinite().all():
                return f"{name} is not finite in {dtype}"
    compared_outputs = {name: value for name, value in outputs.items() if not name.startswith("boxes")}
    return describe_difference(
        {name: float32_outputs[name].double() for name in compared_outputs}, compared_outputs, tolerance=1e-2
    )


@register_check(*TENSOR_KINDS)
def gradients_reach_what_trains(harness: PartHarness) -> str | None:
    """Every trainable parameter receives a finite gradient, and not all gradients are zero."""
    part = harness.build_module().train()
    trainable = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise DoesNotApply("nothing trains")
    compute_weighted_sum(harness.compute_outputs(part, harness.make_inputs())).backward()
    missing_gradients = [name for name, parameter in trainable.items() if parameter.grad is None]
    if missing_gradients:
        return f"no gradient reaches {format_names(missing_gradients)}"
    non_finite_gradients = [name for name, parameter in trainable.items() if not parameter.grad.isfinite().all()]
    if non_finite_gradients:
        return f"gradients that are not finite: {format_names(non_finite_gradients)}"
    return None if any(parameter.grad.any() for parameter in trainable.values()) else "all gradients are zero"


@register_check("segmenters", "mixers", "language_models")
def gradients_pass_upstream(harness: PartHarness) -> str | None:
    """Gradients flow through the component to its inputs, so that upstream components can be trained."""
    inputs = harness.make_inputs()
    input_tensors = [leaf.requires_grad_() for leaf in harness.list_upstream_tensors(inputs)]
    compute_weighted_sum(harness.compute_outputs(harness.part, inputs)).backward()
    return (
        None if any(leaf.grad is not None and leaf.grad.any() for leaf in input_tensors) else "no gradient comes back"
    )


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def reloads_equal(harness: PartHarness) -> str | None:
    """An instance with another seed produces bitwise equal outputs after loading the `state_dict`."""
    first, second = harness.build_module(seed=0), harness.build_module(seed=1)
    second.load_state_dict(clone_tensors(first.state_dict()), strict=True)
    return describe_difference(
        harness.compute_outputs(first, harness.make_inputs()),
        harness.compute_outputs(second, harness.make_inputs()),
        tolerance=0.0,
    )


@register_check(*TENSOR_KINDS, source="sca.builder.compose")
def builds_on_meta(harness: PartHarness) -> str | None:
    """Under `torch.device("meta")` the component has the same tensors and allocates no memory."""
    expected_shapes = {name: value.shape for name, value in harness.build_module().state_dict().items()}
    with torch.device("meta"):
        meta_tensors = harness.build_module().state_dict()
    allocated = [name for name, value in meta_tensors.items() if not value.is_meta]
    if allocated:
        return f"allocated: {format_names(allocated)}"
    shapes = {name: value.shape for name, value in meta_tensors.items()}
    return (
        None
        if shapes == expected_shapes
        else f"other tensors than usual: {format_names(sorted(set(shapes) ^ set(expected_shapes)))}"
    )


OPTIONAL_PACKAGES = (  # imported only where they are used
    *("cv2", "datasets", "gradio", "jax", "matplotlib", "mmcv", "mmdet", "mmengine", "open_clip", "pandas", "ray"),
    *("scipy", "sklearn", "tensorflow", "timm", "wandb"),
)
IMPORT_SCRIPT = """
import json, sys
import sca.language_models.hf, sca_registry
from sca.testing.conformance.process_state import RANDOM_STATE, WARNING_FILTERS, capture_process_state
parts = sca_registry.get_registry(sys.argv[1])
known, before = set(sys.modules), capture_process_state()
factory = parts.get(sys.argv[2])
imported = {name.partition(".")[0] for name in sys.modules if name not in known}
after = capture_process_state()
print(json.dumps([sorted(imported), sorted(
    name for name in before if before[name] != after[name] and name not in (WARNING_FILTERS, RANDOM_STATE)
)]))
"""


@register_check(*COMPONENT_KINDS, source="docs/plugins.md")
def import_is_light(harness: PartHarness) -> str | None:
    """Importing the module imports no large optional package, prints nothing and changes no process setting.

    Optional packages are imported where they are used.
    """
    if harness.name is None:
        raise DoesNotApply("a factory without a name")
    if get_registry(harness.kind).load_entry(harness.name).distribution == BUILTIN_DISTRIBUTION:
        raise DoesNotApply("it comes with this package, whose parts are tried together")
    command = [sys.executable, "-c", IMPORT_SCRIPT, harness.kind, harness.name]
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        return f"importing it ended with status {process.returncode}"
    imported, changed = json.loads(lines[-1])
    optional_packages = sorted({*OPTIONAL_PACKAGES} & {*imported})
    if optional_packages:
        return f"it imports {format_names(optional_packages)}"
    if len(lines) > 1:
        return f"it prints {lines[0]!r}"
    return f"it changes {format_names(changed)}" if changed else None


@register_check(*COMPONENT_KINDS, source="docs/plugins.md")
def the_process_is_left_alone(harness: PartHarness) -> str | None:
    """Building and running the component changes no process setting of torch, logging, warnings or environment."""
    state_before = capture_process_state()
    part = harness.build()
    if harness.kind in TENSOR_KINDS:
        harness.compute_outputs(part, harness.make_inputs())
    state_after = capture_process_state()
    changed = {name for name, value in state_before.items() if state_after[name] != value}
    changed |= {
        name
        for name, value in harness.initial_state.items()
        if state_after[name] != value and name not in CHANGED_BY_IMPORTS
    }
    return f"it changes {format_names(sorted(changed))}" if changed else None


@register_check(*TENSOR_KINDS)
@torch.no_grad()
def options_are_honored(harness: PartHarness) -> str | None:
    """Changing an integer option changes the tensors of the component or its outputs."""
    options = harness.collect_integer_options()
    if not options:
        raise DoesNotApply("no option is a whole number")
    default_part = harness.build()
    default_result = _collect_shapes(default_part), harness.compute_outputs(default_part, harness.make_inputs())
    for name, value in options.items():
        for new_value in (2 * value, value // 2, value + 1):
            varied_harness = harness.with_options({name: new_value})
            try:
                part = varied_harness.build()
                varied_result = (
                    _collect_shapes(part),
                    varied_harness.compute_outputs(part, varied_harness.make_inputs()),
                )
            except (ValueError, RuntimeError, AssertionError):  # an invalid value
                continue
            if (
                varied_result[0] == default_result[0]
                and describe_difference(default_result[1], varied_result[1], tolerance=0.0) is None
            ):
                return f"{name}={new_value} gives the same part as {name}={value}"
            break
    return None


def _collect_shapes(part: Any) -> dict[str, torch.Size] | None:
    return {name: value.shape for name, value in part.state_dict().items()} if isinstance(part, nn.Module) else None
