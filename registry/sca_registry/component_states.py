"""States of components: ok, unchecked, broken, or missing an extra."""

from __future__ import annotations

from typing import NamedTuple

from sca_registry.plugins import Registration, is_extra_installed


class ComponentState(NamedTuple):
    """State of a component.

    Attributes:
        name: "ok", "unchecked" (a plugin that was not imported), "broken", or "needs extra: NAME".
        reason: Cause of the failure, or the command that installs the extra.
    """

    name: str
    reason: str = ""


def infer_state(registration: Registration) -> ComponentState:
    """Return the state of a component from its metadata, without importing it."""
    if registration.problem:
        return ComponentState("broken", registration.problem)
    extra_state = _make_needs_extra_state(registration)
    if extra_state and is_extra_installed(registration.origin.name, registration.card.extra) is False:
        return extra_state
    return ComponentState("ok" if registration.is_builtin or registration.registered_factory else "unchecked")


def classify_failure(registration: Registration, error: BaseException) -> ComponentState:
    """Return the state of a component whose import or construction raised an error.

    An import error means a missing extra if the card names an extra that is not known to be installed, and the missing
    module is outside the component's own package.
    """
    extra_state = _make_needs_extra_state(registration)
    package = registration.card.factory.partition(":")[0].partition(".")[0]
    is_other_module = isinstance(error, ImportError) and (error.name or "").partition(".")[0] != package
    if extra_state and is_other_module and not is_extra_installed(registration.origin.name, registration.card.extra):
        return extra_state
    return ComponentState("broken", _format_error(error))


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error means that the machine is out of memory: of Python, of CUDA, or of torch on the CPU."""
    return isinstance(error, MemoryError) or any(
        phrase in str(error).lower() for phrase in ("out of memory", "can't allocate memory")
    )


def _make_needs_extra_state(registration: Registration) -> ComponentState | None:
    if not registration.card.extra:
        return None
    return ComponentState(
        f"needs extra: {registration.card.extra}",
        f"pip install '{registration.origin.name}[{registration.card.extra}]'",
    )


def _format_error(error: BaseException) -> str:
    """Format the type and message of an exception on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
