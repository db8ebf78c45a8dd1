"""Which components can work together, from what their cards or classes give and need."""

from __future__ import annotations

from sca_registry.messages import RegistryError
from sca_registry.overrides import PARTS
from sca_registry.registry import registry
from sca_registry.spec import ModelSpec, Part


def check_compatible(spec: ModelSpec) -> None:
    """Refuse unknown names and components that cannot work together, before anything is built.

    A component whose card does not say what it gives and needs is imported to read its class; one that says nothing at
    all fits everything.

    Raises:
        RegistryError: Names both components and the way out.
    """
    for kind in PARTS:
        part = getattr(spec, kind)
        if part is not None:
            registry(kind).card(part.name)
    segmenter = spec.segmenter
    if segmenter is not None:
        _check_fit("encoder", spec.encoder, "segmenter", segmenter)
    elif _needs("mixer", spec.mixer):
        brought = registry("encoder").stated(spec.encoder.name, "default_segmenter")
        segmenter = Part(brought) if brought else None
    if segmenter is not None:
        _check_fit("segmenter", segmenter, "mixer", spec.mixer)


def _check_fit(giver: str, upstream: Part, taker: str, part: Part) -> None:
    """Raises RegistryError if the part upstream is known not to give something that the part needs."""
    needs = _needs(taker, part)
    gives = registry(giver).stated(upstream.name, "gives") if needs else None
    if gives is None:
        return
    lacking = [thing for thing in needs if thing not in gives]
    if not lacking:
        return
    givers = [name for name in registry(giver).names() if set(needs) <= set(registry(giver).card(name).gives or ())]
    others = [registry(taker).card(name) for name in registry(taker).names() if name != part.name]
    takers = [card.name for card in others if card.needs is not None and set(card.needs) <= set(gives)]
    switches = [f"{taker}.{option}=false" for option in _switched_on(taker, part)]
    ways = [f"{giver}={name}" for name in givers] + switches + [f"{taker}={name}" for name in takers]
    raise RegistryError(
        f"{taker} {part.name!r} needs {' and '.join(lacking)}, and {giver} {upstream.name!r} gives "
        f"{' and '.join(gives) or 'none of that'}." + (f" Choose {' or '.join(ways)}." if ways else "")
    )


def _needs(kind: str, part: Part) -> list[str]:
    """What a part needs with the options that it has."""
    extra = registry(kind).card(part.name).needs_with
    always = registry(kind).stated(part.name, "needs") or ()
    return [*always, *(thing for option in _switched_on(kind, part) for thing in extra[option])]


def _switched_on(kind: str, part: Part) -> list[str]:
    """Options of the part that are on and need something."""
    card = registry(kind).card(part.name)
    return [option for option in card.needs_with if {**card.options, **part.options}.get(option)]
