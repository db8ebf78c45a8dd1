"""Which components can work together, from what their cards or classes give and need."""

from __future__ import annotations

from sca_registry.errors import RegistryError
from sca_registry.overrides import MODEL_PARTS
from sca_registry.registry import get_registry
from sca_registry.spec import ModelSpec, Part


def check_compatible(spec: ModelSpec) -> None:
    """Refuse unknown names and components that cannot work together, before anything is built.

    A component whose card does not say what it gives and needs is imported to read its class; one that says nothing at
    all fits everything.

    Raises:
        RegistryError: Names both components and the way out.
    """
    for kind in MODEL_PARTS:
        part = getattr(spec, kind)
        if part is not None:
            get_registry(kind).get_card(part.name)
    segmenter = spec.segmenter
    if segmenter is not None:
        _check_fit("encoder", spec.encoder, "segmenter", segmenter)
    elif _list_needs("mixer", spec.mixer):
        segmenter_name = get_registry("encoder").get_declared(spec.encoder.name, "default_segmenter")
        segmenter = Part(segmenter_name) if segmenter_name else None
    if segmenter is not None:
        _check_fit("segmenter", segmenter, "mixer", spec.mixer)


def _check_fit(upstream_kind: str, upstream: Part, kind: str, part: Part) -> None:
    """Raises RegistryError if the part upstream is known not to give something that the part needs."""
    required = _list_needs(kind, part)
    provided = get_registry(upstream_kind).get_declared(upstream.name, "gives") if required else None
    if provided is None:
        return
    missing = [output_name for output_name in required if output_name not in provided]
    if not missing:
        return
    provider_names = [
        name
        for name in get_registry(upstream_kind).list_names()
        if set(required) <= set(get_registry(upstream_kind).get_card(name).gives or ())
    ]
    other_cards = [get_registry(kind).get_card(name) for name in get_registry(kind).list_names() if name != part.name]
    compatible_names = [
        card.name for card in other_cards if card.needs is not None and set(card.needs) <= set(provided)
    ]
    switched_off_options = [f"{kind}.{option}=false" for option in _list_enabled_options(kind, part)]
    fixes = (
        [f"{upstream_kind}={name}" for name in provider_names]
        + switched_off_options
        + [f"{kind}={name}" for name in compatible_names]
    )
    raise RegistryError(
        f"{kind} {part.name!r} needs {' and '.join(missing)}, and {upstream_kind} {upstream.name!r} gives "
        f"{' and '.join(provided) or 'none of that'}." + (f" Choose {' or '.join(fixes)}." if fixes else "")
    )


def _list_needs(kind: str, part: Part) -> list[str]:
    """What a part needs with the options that it has."""
    option_needs = get_registry(kind).get_card(part.name).needs_with
    base_needs = get_registry(kind).get_declared(part.name, "needs") or ()
    return [
        *base_needs,
        *(output_name for option in _list_enabled_options(kind, part) for output_name in option_needs[option]),
    ]


def _list_enabled_options(kind: str, part: Part) -> list[str]:
    """Options of the part that are on and need something."""
    card = get_registry(kind).get_card(part.name)
    return [option for option in card.needs_with if {**card.options, **part.options}.get(option)]
