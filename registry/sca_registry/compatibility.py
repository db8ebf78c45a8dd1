"""Compatibility of components, from the `provides` and `requires` of their cards or classes."""

from __future__ import annotations

from sca_registry.errors import RegistryError
from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.registry import get_registry
from sca_registry.spec import ComponentSpec, ModelSpec


def check_compatible(spec: ModelSpec) -> None:
    """Check the names and the compatibility of the components of a model, without building them.

    A component whose card declares no `provides` or `requires` is imported to read them from its class. A component
    that declares neither is compatible with everything.

    Args:
        spec: Model spec to check.

    Raises:
        RegistryError: A name is unknown, or a component needs an output that the upstream component does not provide.
    """
    for kind in MODEL_COMPONENTS:
        component = getattr(spec, kind)
        if component is not None:
            get_registry(kind).get_card(component.name)
    segmenter = spec.segmenter
    if segmenter is not None:
        _check_fit("encoder", spec.encoder, "segmenter", segmenter)
    elif _list_needs("mixer", spec.mixer):
        segmenter_name = get_registry("encoder").get_declared(spec.encoder.name, "default_segmenter")
        segmenter = ComponentSpec(segmenter_name) if segmenter_name else None
    if segmenter is not None:
        _check_fit("segmenter", segmenter, "mixer", spec.mixer)


def _check_fit(upstream_kind: str, upstream: ComponentSpec, kind: str, component: ComponentSpec) -> None:
    required = _list_needs(kind, component)
    provided = get_registry(upstream_kind).get_declared(upstream.name, "provides") if required else None
    if provided is None:
        return
    missing = [output_name for output_name in required if output_name not in provided]
    if not missing:
        return
    provider_names = [
        name
        for name in get_registry(upstream_kind).list_names()
        if set(required) <= set(get_registry(upstream_kind).get_card(name).provides or ())
    ]
    other_names = [name for name in get_registry(kind).list_names() if name != component.name]
    other_cards = [get_registry(kind).get_card(name) for name in other_names]
    compatible_names = [
        card.name for card in other_cards if card.requires is not None and set(card.requires) <= set(provided)
    ]
    switched_off_options = [f"{kind}.{option}=false" for option in _list_enabled_options(kind, component)]
    fixes = (
        [f"{upstream_kind}={name}" for name in provider_names]
        + switched_off_options
        + [f"{kind}={name}" for name in compatible_names]
    )
    provided_text = f"only {' and '.join(provided)}" if provided else "none"
    raise RegistryError(
        f"{kind} {component.name!r} needs {' and '.join(missing)}, but {upstream_kind} {upstream.name!r} provides "
        f"{provided_text}" + (f"; use {' or '.join(fixes)}" if fixes else "")
    )


def _list_needs(kind: str, component: ComponentSpec) -> list[str]:
    """List the outputs that a component needs with its options."""
    option_needs = get_registry(kind).get_card(component.name).option_requires
    base_needs = get_registry(kind).get_declared(component.name, "requires") or ()
    enabled_options = _list_enabled_options(kind, component)
    return [*base_needs, *(output_name for option in enabled_options for output_name in option_needs[option])]


def _list_enabled_options(kind: str, component: ComponentSpec) -> list[str]:
    """List the enabled options of a component that need outputs of the upstream component."""
    card = get_registry(kind).get_card(component.name)
    return [option for option in card.option_requires if {**card.options, **component.options}.get(option)]
