"""Find the first tensor that differs between two implementations of one model.

Both models run on the same input with hooks on all modules. Modules are matched by their parameters, which are random
and therefore unique, so that names and nesting may differ. A module that is not called as a whole by both is replaced
by its submodules.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sca.testing.parity.comparison import (
    TOLERANCE,
    DifferenceLocation,
    Outputs,
    compute_list_difference,
    compute_row_differences,
)

COMPONENT_DEPTH = 2  # of modules that the forward of an encoder or segmenter calls; that of the encoder is 1
NO_MODULE = "no module, because none has these weights"


@dataclass(eq=False)
class ModuleCall:
    """Call of a module.

    Attributes:
        name: Name of the module; "" for the model itself.
        class_name: Class of the module.
        fingerprint: Hash of its parameters and buffers; "" without any.
        parent: Call that the call is part of; None for the root.
        inputs: Tensors among its arguments.
        outputs: Tensors that it returns.
        children: Calls of modules in its forward, in order.
    """

    name: str
    class_name: str
    fingerprint: str = ""
    parent: ModuleCall | None = None
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    children: list[ModuleCall] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} ({self.class_name})" if self.name else self.class_name

    @property
    def depth(self) -> int:
        """Number of calls around the call, the root included."""
        return 0 if self.parent is None else 1 + self.parent.depth

    def iter_descendants(self) -> Iterator[ModuleCall]:
        """Yield all calls inside the call, in order."""
        for child in self.children:
            yield child
            yield from child.iter_descendants()


@dataclass(frozen=True)
class MatchedCall:
    """Call of a module of the reference, and the call of the same module of the component.

    Attributes:
        expected: Call in the reference.
        actual: Call in the component; None if the component does not have the parameters of the module.
        input_difference: Relative difference of the inputs.
        output_difference: Relative difference of the outputs.
    """

    expected: ModuleCall
    actual: ModuleCall | None
    input_difference: float
    output_difference: float


class DifferenceLocator:
    """Finds the first tensor that differs between a reference and a component with the same parameters.

    Args:
        reference: Model of another library.
        component: Component.
    """

    def __init__(self, reference: nn.Module, component: nn.Module):
        self.reference, self.component = reference, component

    @cached_property
    def _fingerprints(self) -> dict[nn.Module, str]:
        return _compute_fingerprints(self.reference) | _compute_fingerprints(self.component)

    def find_difference(
        self, run_reference: Callable[[], Outputs], run_component: Callable[[], Outputs]
    ) -> DifferenceLocation | None:
        """Find the first tensor that differs.

        Args:
            run_reference: Function that runs the reference on one region, image or text and returns its outputs.
            run_component: Function that runs the component on the same input.

        Returns:
            The tensor with the modules that compute it; None if all outputs are equal.
        """
        expected_outputs, expected = record_calls(self.reference, self._fingerprints, run_reference)
        actual_outputs, actual = record_calls(self.component, self._fingerprints, run_component)
        differences = {
            name: float(compute_row_differences(value, actual_outputs[name]).max())
            for name, value in expected_outputs.items()
        }
        name = next((name for name, difference in differences.items() if not difference <= TOLERANCE), None)
        if name is None:
            return None
        location = _search_calls(expected.children, _ComponentCalls(self.component, self._fingerprints, actual))
        return location or DifferenceLocation(
            name,
            differences[name],
            _find_output_maker(expected, expected_outputs[name]),
            _find_output_maker(actual, actual_outputs[name]),
        )


class _ComponentCalls:
    """Calls in a component, by the modules of the reference.

    Args:
        component: Component.
        fingerprints: Hash of the parameters of each module.
        root: Recorded calls of the component.
    """

    def __init__(self, component: nn.Module, fingerprints: Mapping[nn.Module, str], root: ModuleCall):
        self._modules = {(fingerprints[module], type(module).__name__) for module in component.modules()}
        self._fingerprints = {fingerprint for fingerprint, _ in self._modules}
        self._calls: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in root.iter_descendants():
            self._calls[call.fingerprint].append(call)

    def has_weights(self, call: ModuleCall) -> bool:
        """Return whether a module has the parameters of the called one, and was called or not."""
        return call.fingerprint in self._fingerprints

    def find_calls(self, call: ModuleCall) -> list[ModuleCall]:
        """Return the calls of the same module, in order: of the same class, if the component has such a module.

        Modules with the same parameters may be different, such as the token embeddings and the output projection.
        """
        calls = self._calls.get(call.fingerprint, []) if call.fingerprint else []
        if (call.fingerprint, call.class_name) in self._modules:
            return [each for each in calls if each.class_name == call.class_name]
        return calls


def record_calls(
    model: nn.Module, fingerprints: Mapping[nn.Module, str], run: Callable[[], Outputs]
) -> tuple[Outputs, ModuleCall]:
    """Record the calls of all modules of a model.

    Args:
        model: Model.
        fingerprints: Hash of the parameters of each module.
        run: Function that runs it.

    Returns:
        The outputs of `run`, and a root whose children are the outermost calls.
    """
    root = ModuleCall("", type(model).__name__)
    open_calls, handles = [root], []

    def make_hooks(name: str, module: nn.Module) -> tuple[Any, Any]:
        def start_call(_: nn.Module, arguments: tuple, keywords: dict) -> None:
            inputs = list(_iter_tensors((arguments, keywords)))
            call = ModuleCall(name, type(module).__name__, fingerprints[module], open_calls[-1], inputs)
            open_calls[-1].children.append(call)
            open_calls.append(call)

        def end_call(_: nn.Module, arguments: tuple, output: Any) -> None:
            open_calls.pop().outputs.extend(_iter_tensors(output))

        return start_call, end_call

    for name, module in model.named_modules():
        start_call, end_call = make_hooks(name, module)
        handles.append(module.register_forward_pre_hook(start_call, with_kwargs=True))
        handles.append(module.register_forward_hook(end_call))
    try:
        return run(), root
    finally:
        for handle in handles:
            handle.remove()


def _iter_tensors(value: Any) -> Iterator[Tensor]:
    """Yield copies of the tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value.detach().clone()  # later operations may work in place
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _iter_tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _iter_tensors(each)
    elif is_dataclass(value):
        yield from _iter_tensors(vars(value))


def _compute_fingerprints(model: nn.Module) -> dict[nn.Module, str]:
    """Return a hash of the values of all floating-point parameters and buffers of each module, in any order."""
    digests: dict[int, bytes] = {}

    def compute_digest(tensor: Tensor) -> bytes:
        if id(tensor) not in digests:
            content = tensor.detach().cpu().double().contiguous().numpy().tobytes()
            digests[id(tensor)] = hashlib.sha256(content).digest()
        return digests[id(tensor)]

    fingerprints = {}
    for module in model.modules():
        tensors = [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]
        content = b"".join(sorted({compute_digest(each) for each in tensors}))
        fingerprints[module] = hashlib.sha256(content).hexdigest() if content else ""
    return fingerprints


def _search_calls(
    calls: Sequence[ModuleCall], component_calls: _ComponentCalls, is_inside_match: bool = False
) -> DifferenceLocation | None:
    """Find the first tensor that differs in calls of the reference.

    A module with equal inputs and different outputs is at fault, or one inside it. Otherwise, the first module with
    different inputs follows the fault, which may be a module whose parameters the component does not have. In the
    forward of an inner module, the inputs of some modules differ for another reason: fused code calls a projection with
    other inputs. The module after it then has equal outputs.
    """
    uncertain_location: DifferenceLocation | None = None
    without_weights: list[ModuleCall] = []
    matches = list(_iter_matches(calls, component_calls))
    for match, next_match in itertools.zip_longest(matches, matches[1:]):
        if match.actual is None:
            without_weights.append(match.expected)
        elif match.output_difference <= TOLERANCE:
            continue
        elif match.input_difference <= TOLERANCE:
            inner = _search_calls(match.expected.children, component_calls, is_inside_match=True)
            return inner or _make_output_location(match)
        elif uncertain_location is None:
            is_followed_by_equal = next_match is not None and next_match.output_difference <= TOLERANCE
            if not (is_followed_by_equal and (is_inside_match or match.actual.depth > COMPONENT_DEPTH)):
                uncertain_location = _make_weights_location(without_weights) or _make_input_location(match)
    return uncertain_location or _make_weights_location(without_weights)


def _iter_matches(calls: Sequence[ModuleCall], component_calls: _ComponentCalls) -> Iterator[MatchedCall]:
    """Yield the calls of modules that the component also calls, or whose parameters it does not have.

    Other calls are replaced by those inside them.
    """
    for call in calls:
        candidates = [_match_calls(call, each) for each in component_calls.find_calls(call)] if call.outputs else []
        if candidates:
            # of several calls, one with equal outputs, or else with equal inputs, and the innermost of nested modules
            yield min(
                reversed(candidates),
                key=lambda match: (match.output_difference > TOLERANCE, match.input_difference > TOLERANCE),
            )
        elif call.children:
            yield from _iter_matches(call.children, component_calls)
        elif call.fingerprint and not component_calls.has_weights(call):
            yield MatchedCall(call, None, math.inf, math.inf)


def _match_calls(expected: ModuleCall, actual: ModuleCall) -> MatchedCall:
    differences = [
        # embeddings may replace token ids, and integers other numbers
        compute_list_difference([each for each in expected_tensors if each.is_floating_point()], actual_tensors)
        for expected_tensors, actual_tensors in ((expected.inputs, actual.inputs), (expected.outputs, actual.outputs))
    ]
    return MatchedCall(expected, actual, *differences)


def _make_output_location(match: MatchedCall) -> DifferenceLocation:
    tensor = f"output of {match.expected.name or match.expected.class_name}"
    return DifferenceLocation(tensor, match.output_difference, str(match.expected), str(match.actual))


def _make_input_location(match: MatchedCall) -> DifferenceLocation:
    assert match.actual is not None  # otherwise, it has no inputs to compare
    module = f"{_find_maker(match.actual)}, before {match.actual.name}"
    tensor = f"input of {match.expected.name}"
    return DifferenceLocation(tensor, match.input_difference, str(_find_maker(match.expected)), module)


def _make_weights_location(calls: Sequence[ModuleCall]) -> DifferenceLocation | None:
    """Return the location of the first of some modules whose parameters the component does not have."""
    return DifferenceLocation(f"output of {calls[0].name}", math.inf, str(calls[0]), NO_MODULE) if calls else None


def _find_maker(call: ModuleCall) -> ModuleCall:
    """Return the innermost call around a call that does not pass on its own inputs to it."""
    maker = call.parent or call
    while maker.parent and all(any(_is_same(each, other) for other in maker.inputs) for each in call.inputs):
        maker = maker.parent
    return maker


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _find_output_maker(root: ModuleCall, output: Tensor) -> str:
    """Return the last module called, if it returns the output in any layout, or else the class of the model."""
    if root.children and any(_has_same_values(each, output) for each in root.children[-1].outputs):
        return str(root.children[-1])
    return root.class_name


def _has_same_values(first: Tensor, second: Tensor) -> bool:
    return first.numel() == second.numel() and torch.equal(
        first.flatten().sort().values, second.flatten().sort().values
    )
