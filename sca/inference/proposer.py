"""Construction of proposers by name. Importing the module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sca_registry import proposers
from sca_registry.contracts import Proposer
from sca_registry.spec import ComponentSpec

from sca.devices import resolve_device

if TYPE_CHECKING:
    import torch


def add_text(component: ComponentSpec, text: Sequence[str]) -> ComponentSpec:
    """Set the phrases to find in the options of a registered proposer.

    Args:
        component: Name and options.
        text: Phrases to find: the option `text`. Empty to leave the options unchanged.

    Returns:
        The proposer with the option.

    Raises:
        RegistryError: The proposer is unknown.
        ValueError: The proposer takes no text, or has it in its options, too.
    """
    if not text:
        return component
    if "text" not in proposers.load_entry(component.name).options:
        raise ValueError(
            f"the proposer {component.name!r} takes no text; omit it, or use another one, such as owlv2-base"
        )
    if "text" in component.options:
        raise ValueError(f"the proposer {component.name!r} has its text twice; omit the option text or --text")
    return ComponentSpec(component.name, {**component.options, "text": list(text)})


def lacks_text(component: ComponentSpec) -> bool:
    """Return whether a registered proposer takes phrases to find, and its options set none.

    Args:
        component: Name and options.

    Returns:
        Whether `add_text` can add phrases.

    Raises:
        RegistryError: The proposer is unknown.
    """
    return "text" in proposers.load_entry(component.name).options and "text" not in component.options


def build_proposer(component: ComponentSpec, device: str | torch.device = "cpu") -> Proposer:
    """Build a registered proposer.

    Args:
        component: Name and options.
        device: Device, unless the options set one.

    Returns:
        The proposer.

    Raises:
        RegistryError: The proposer is unknown or cannot be built.
    """
    option_names = proposers.load_entry(component.name).options
    return proposers.build(component.name, **{**make_device_options(device, option_names), **component.options})


def make_device_options(device: str | torch.device, option_names: Mapping[str, Any]) -> dict[str, str]:
    """Return the option `device` of a component; empty for one that has no such option.

    Args:
        device: Device by name.
        option_names: Options of the component.

    Returns:
        The option, or nothing.
    """
    return {"device": str(resolve_device(device))} if "device" in option_names else {}
