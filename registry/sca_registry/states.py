"""The state of a component: ok, unchecked (of a plugin, not imported), broken, or needs an extra."""

from __future__ import annotations

from typing import NamedTuple

from sca_registry.plugins import Offer, extra_installed


class State(NamedTuple):
    """The state of a component, as in `sca_registry.Entry`."""

    name: str  # "ok", "unchecked", "broken", or "needs extra: NAME"
    reason: str = ""


def read_state(offer: Offer) -> State:
    """Return the state of a component according to metadata; nothing is imported."""
    if offer.fault:
        return State("broken", offer.fault)
    needs = _needs_extra(offer)
    if needs and extra_installed(offer.origin.name, offer.card.extra) is False:
        return needs
    return State("ok" if offer.builtin or offer.registered else "unchecked")


def blame(offer: Offer, error: BaseException) -> State:
    """Return the state of a component whose import or construction raised an error.

    An import error means a missing extra if the card names one, it is not known to be installed, and the module that
    was not found is not the component's own.
    """
    needs, top = _needs_extra(offer), offer.card.factory.partition(":")[0].partition(".")[0]
    elsewhere = isinstance(error, ImportError) and (error.name or "").partition(".")[0] != top
    if needs and elsewhere and not extra_installed(offer.origin.name, offer.card.extra):
        return needs
    return State("broken", _one_line(error))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the machine's rather than the part's: Python's own, CUDA's, or torch's on the CPU."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory")
    )


def _needs_extra(offer: Offer) -> State | None:
    """The state of a part whose extra is not installed, with the command that installs it; None if it needs none."""
    if not offer.card.extra:
        return None
    return State(f"needs extra: {offer.card.extra}", f"pip install '{offer.origin.name}[{offer.card.extra}]'")


def _one_line(error: BaseException) -> str:
    """An exception's type and text, short enough for a listing."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
