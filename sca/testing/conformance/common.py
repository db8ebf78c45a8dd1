"""Promises of every kind of part, and of whatever computes."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import torch
from sca_registry import registry
from sca_registry.contracts import KINDS
from sca_registry.plugins import BUILTIN
from torch import nn

from sca.testing.conformance.comparison import copies, different, listed, weighted_sum
from sca.testing.conformance.promises import DoesNotApply, promise
from sca.testing.conformance.settings import AT_IMPORT, settings
from sca.testing.conformance.trials import TENSORS, Trial


@promise(*KINDS)
def builds(trial: Trial) -> str | None:
    """The factory gives a part when it is called with the part upstream and its options."""
    return None if trial.part is not None else "None"


@promise(*KINDS)
def attributes(trial: Trial) -> str | None:
    """The part has what its protocol lists, of the types given there."""
    protocol = KINDS[trial.kind].protocol
    own = [name for name, value in vars(protocol).items() if getattr(value, "__module__", "") == protocol.__module__]
    methods = [name for name in own if inspect.isfunction(getattr(protocol, name))]
    missing = [name for name in (*protocol.__annotations__, *methods) if not hasattr(trial.part, name)]
    if missing:
        return f"a {type(trial.part).__name__} without {', '.join(missing)}"
    for name, written in protocol.__annotations__.items():
        value = getattr(trial.part, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if (written == "int" and not whole) or (written == "bool" and not isinstance(value, bool)):
            return f"{name} = {value!r}, and the protocol asks for {written}" + (" above 0" * (written == "int"))
    return None


@promise(*TENSORS)
@torch.no_grad()
def runs(trial: Trial) -> str | None:
    """A plain pass over the smallest inputs ends; where it does not, the promises below are not tried."""
    trial.outputs(trial.part, trial.inputs())
    return None


@promise(*TENSORS)
@torch.no_grad()
def eval_is_deterministic(trial: Trial) -> str | None:
    """In eval mode the same inputs give the same outputs to the last bit, whatever the random state."""
    once = trial.outputs(trial.part, trial.inputs())
    torch.manual_seed(99)
    return different(once, trial.outputs(trial.part, trial.inputs()), share=0.0)


@promise(*TENSORS)
@torch.no_grad()
def eval_changes_nothing(trial: Trial) -> str | None:
    """A pass in eval mode leaves the part's tensors, and the tensors it was given, as they were."""
    inputs, part = trial.inputs(), trial.part
    before = copies(part.state_dict()) if isinstance(part, nn.Module) else {}
    given = [leaf.clone() for leaf in trial.leaves(inputs)]
    trial.outputs(part, inputs)
    changed = [name for name, value in before.items() if not torch.equal(value, part.state_dict()[name])]
    if changed:
        return f"changed: {listed(changed)}"
    same = all(torch.equal(old, new) for old, new in zip(given, trial.leaves(inputs), strict=True))
    return None if same else "the tensors that were given are changed in place"


@promise(*TENSORS)
@torch.no_grad()
def alone_as_together(trial: Trial) -> str | None:
    """An image, a region or a text gives alone what it gives in a batch with others, which may be fewer or longer."""
    inputs = trial.inputs()
    together = trial.outputs(trial.part, inputs)
    for row in range(trial.rows(inputs)):
        alone = trial.outputs(trial.part, trial.take(inputs, [row]))
        difference = different({name: value[row : row + 1] for name, value in together.items()}, alone)
        if difference:
            return f"row {row} alone: {difference}"
    return None


@promise(*TENSORS)
@torch.no_grad()
def order_is_free(trial: Trial) -> str | None:
    """Rows in another order (regions: within their image) give the same outputs in that order."""
    inputs = trial.inputs()
    order = [2, 0, 1, 4, 3][: trial.rows(inputs)] if trial.rows(inputs) != 2 else [1, 0]
    together = trial.outputs(trial.part, inputs)
    expected = {name: value[order] for name, value in together.items()}
    return different(expected, trial.outputs(trial.part, trial.take(inputs, order)))


@promise(*TENSORS)
@torch.no_grad()
def dtype_is_kept(trial: Trial) -> str | None:
    """Moved to bfloat16 or float64, the part gives finite outputs of that type; float64 agrees with float32."""
    single = trial.outputs(trial.module(), trial.inputs())
    for dtype in (torch.bfloat16, torch.float64):
        outputs = trial.outputs(trial.module().to(dtype), trial.cast(trial.inputs(), dtype))
        for name, value in outputs.items():
            if not name.startswith("boxes") and value.dtype != dtype:  # boxes are coordinates: they stay exact
                return f"{name} is {value.dtype} in a part of {dtype}"
            if not value.isfinite().all():
                return f"{name} is not finite in {dtype}"
    inexact = {name: value for name, value in outputs.items() if not name.startswith("boxes")}
    return different({name: single[name].double() for name in inexact}, inexact, share=1e-2)


@promise(*TENSORS)
def gradients_reach_what_trains(trial: Trial) -> str | None:
    """Every parameter that requires a gradient gets one from some kind of input, finite and not zero everywhere."""
    part = trial.module().train()
    trained = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    if not trained:
        raise DoesNotApply("nothing trains")
    weighted_sum(trial.outputs(part, trial.inputs())).backward()
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        return f"no gradient reaches {listed(without)}"
    broken = [name for name, parameter in trained.items() if not parameter.grad.isfinite().all()]
    if broken:
        return f"gradients that are not finite: {listed(broken)}"
    return None if any(parameter.grad.any() for parameter in trained.values()) else "all gradients are zero"


@promise("segmenters", "mixers", "language_models")
def gradients_pass_upstream(trial: Trial) -> str | None:
    """Gradients go back through the part to what it was given, so that the parts upstream can train."""
    inputs = trial.inputs()
    leaves = [leaf.requires_grad_() for leaf in trial.leaves(inputs)]
    weighted_sum(trial.outputs(trial.part, inputs)).backward()
    return None if any(leaf.grad is not None and leaf.grad.any() for leaf in leaves) else "no gradient comes back"


@promise(*TENSORS)
@torch.no_grad()
def reloads_equal(trial: Trial) -> str | None:
    """Built anew with other random numbers and given the `state_dict`, the part gives equal outputs to the last bit."""
    first, second = trial.module(seed=0), trial.module(seed=1)
    second.load_state_dict(copies(first.state_dict()), strict=True)
    return different(trial.outputs(first, trial.inputs()), trial.outputs(second, trial.inputs()), share=0.0)


@promise(*TENSORS, written="sca.composition.compose")
def builds_on_meta(trial: Trial) -> str | None:
    """Under `torch.device("meta")` the same tensors are made and nothing is allocated."""
    real = {name: value.shape for name, value in trial.module().state_dict().items()}
    with torch.device("meta"):
        drawn = trial.module().state_dict()
    allocated = [name for name, value in drawn.items() if not value.is_meta]
    if allocated:
        return f"allocated: {listed(allocated)}"
    shapes = {name: value.shape for name, value in drawn.items()}
    return None if shapes == real else f"other tensors than usual: {listed(sorted(set(shapes) ^ set(real)))}"


HEAVY = (  # packages that no part needs unless it is used
    *("cv2", "datasets", "gradio", "jax", "matplotlib", "mmcv", "mmdet", "mmengine", "open_clip", "pandas", "ray"),
    *("scipy", "sklearn", "tensorflow", "timm", "wandb"),
)
IMPORT = """
import json, sys
import sca.language_models.hf, sca_registry
from sca.testing.conformance.settings import FILTERS, RANDOM, settings
parts = sca_registry.registry(sys.argv[1])
known, before = set(sys.modules), settings()
factory = parts.get(sys.argv[2])
imported, after = {name.partition(".")[0] for name in sys.modules if name not in known}, settings()
print(json.dumps([sorted(imported), sorted(
    name for name in before if before[name] != after[name] and name not in (FILTERS, RANDOM)
)]))
"""


@promise(*KINDS, written="plugins/README.md")
def import_is_light(trial: Trial) -> str | None:
    """Its module imports no large optional package, which a person may not have, prints nothing and changes no setting
    of the process: that is done where it is used, or not at all.
    """
    if trial.name is None:
        raise DoesNotApply("a factory without a name")
    if registry(trial.kind).describe(trial.name).distribution == BUILTIN:
        raise DoesNotApply("it comes with this package, whose parts are tried together")
    command = [sys.executable, "-c", IMPORT, trial.kind, trial.name]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return f"importing it ended with status {done.returncode}"
    imported, changed = json.loads(lines[-1])
    heavy = sorted({*HEAVY} & {*imported})
    if heavy:
        return f"it imports {listed(heavy)}"
    if len(lines) > 1:
        return f"it prints {lines[0]!r}"
    return f"it changes {listed(changed)}" if changed else None


@promise(*KINDS, written="plugins/README.md")
def the_process_is_left_alone(trial: Trial) -> str | None:
    """Building and using the part changes no setting of the process: of torch, logging, warnings, environment."""
    usual = settings()
    part = trial.build()
    if trial.kind in TENSORS:
        trial.outputs(part, trial.inputs())
    after = settings()
    changed = {name for name, value in usual.items() if after[name] != value}
    changed |= {name for name, value in trial.before.items() if after[name] != value and name not in AT_IMPORT}
    return f"it changes {listed(sorted(changed))}" if changed else None


@promise(*TENSORS)
@torch.no_grad()
def options_are_honoured(trial: Trial) -> str | None:
    """An option that is a whole number changes the part's tensors, or what it gives, when it is another number."""
    options = trial.numbers()
    if not options:
        raise DoesNotApply("no option is a whole number")
    usual = trial.build()
    known = _shapes(usual), trial.outputs(usual, trial.inputs())
    for name, value in options.items():
        for other in (2 * value, value // 2, value + 1):
            varied = trial.varied({name: other})
            try:
                part = varied.build()
                found = _shapes(part), varied.outputs(part, varied.inputs())
            except (ValueError, RuntimeError, AssertionError):  # not every number is good
                continue
            if found[0] == known[0] and different(known[1], found[1], share=0.0) is None:
                return f"{name}={other} gives the same part as {name}={value}"
            break
    return None


def _shapes(part: Any) -> dict[str, torch.Size] | None:
    return {name: value.shape for name, value in part.state_dict().items()} if isinstance(part, nn.Module) else None
