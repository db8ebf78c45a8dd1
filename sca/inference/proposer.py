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


def build_proposer(component: ComponentSpec, device: str | torch.device = "cpu", text: Sequence[str] = ()) -> Proposer:
    """Build a registered proposer.

    Args:
        component: Name and options.
        device: Device, unless the options set one.
        text: Phrases to find: the option `text`.

    Returns:
        The proposer.

    Raises:
        RegistryError: The proposer is unknown or cannot be built.
        ValueError: The proposer takes no text, or has it in its options, too.
    """
    option_names = proposers.load_entry(component.name).options
    if text and "text" not in option_names:
        raise ValueError(
            f"the proposer {component.name!r} takes no text; omit it, or use another one, such as owlv2-base"
        )
    if text and "text" in component.options:
        raise ValueError(f"the proposer {component.name!r} has its text twice; omit the option text or --text")
    text_options = {"text": list(text)} if text else {}
    options = {**make_device_options(device, option_names), **component.options, **text_options}
    return proposers.build(component.name, **options)


def make_device_options(device: str | torch.device, option_names: Mapping[str, Any]) -> dict[str, str]:
    """Return the option `device` of a component; empty for one that has no such option.

    Args:
        device: Device by name.
        option_names: Options of the component.

    Returns:
        The option, or nothing.
    """
    return {"device": str(resolve_device(device))} if "device" in option_names else {}
