"""The state of a component: ok, unchecked (of a plugin, not imported), broken, or needs an extra."""

from __future__ import annotations

from typing import NamedTuple

from sca_registry.plugins import Offer, is_extra_installed


class ComponentState(NamedTuple):
    """The state of a component, as in `sca_registry.Entry`."""

    name: str  # "ok", "unchecked", "broken", or "needs extra: NAME"
    reason: str = ""


def infer_state(offer: Offer) -> ComponentState:
    """Return the state of a component according to metadata; nothing is imported."""
    if offer.problem:
        return ComponentState("broken", offer.problem)
    extra_state = _make_needs_extra_state(offer)
    if extra_state and is_extra_installed(offer.origin.name, offer.card.extra) is False:
        return extra_state
    return ComponentState("ok" if offer.is_builtin or offer.registered_factory else "unchecked")


def classify_failure(offer: Offer, error: BaseException) -> ComponentState:
    """Return the state of a component whose import or construction raised an error.

    An import error means a missing extra if the card names one, it is not known to be installed, and the module that
    was not found is not the component's own.
    """
    extra_state, package = _make_needs_extra_state(offer), offer.card.factory.partition(":")[0].partition(".")[0]
    is_other_module = isinstance(error, ImportError) and (error.name or "").partition(".")[0] != package
    if extra_state and is_other_module and not is_extra_installed(offer.origin.name, offer.card.extra):
        return extra_state
    return ComponentState("broken", _format_error(error))


def is_memory_error(error: BaseException) -> bool:
    """Whether an error is the machine's rather than the part's: Python's own, CUDA's, or torch's on the CPU."""
    return isinstance(error, MemoryError) or any(
        phrase in str(error).lower() for phrase in ("out of memory", "can't allocate memory")
    )


def _make_needs_extra_state(offer: Offer) -> ComponentState | None:
    """The state of a part whose extra is not installed, with the command that installs it; None if it needs none."""
    if not offer.card.extra:
        return None
    return ComponentState(f"needs extra: {offer.card.extra}", f"pip install '{offer.origin.name}[{offer.card.extra}]'")


def _format_error(error: BaseException) -> str:
    """An exception's type and text, short enough for a listing."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
