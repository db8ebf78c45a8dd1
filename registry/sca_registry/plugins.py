"""Names that other distributions offer, read from their metadata; no plugin is imported here.

A distribution offers parts through entry points in the group of a kind. An entry point is either one factory, or a card
file inside a package, which holds many names and what a chooser wants to know of each (see `cards`):

    [project.entry-points.sca_mixers]
    mean = "sca_hello.mixers:MeanMixer"         # the name `mean`
    hello = "sca_hello:mixers.toml"             # every name in sca_hello/mixers.toml; `hello` is only a label

An object path that ends in `.toml` is a card file; its package is located and not imported. A distribution may say
which version of the contracts it was made for; without this it is taken to be the present one:

    [project.entry-points.sca_api]
    version = "v1"
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sca_registry.cards import Card, builtin_cards, check_factory, check_name, read_cards
from sca_registry.messages import RegistryError

if TYPE_CHECKING:
    from email.message import Message
    from importlib.metadata import Distribution, EntryPoint

API = "v1"
BUILTIN = "segment-caption-anything"


@dataclass(frozen=True)
class Origin:
    """Where a name comes from."""

    name: str
    version: str = ""
    summary: str = ""
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True)
class Offer:
    """One name offered by one distribution, or by code that registered it."""

    card: Card
    origin: Origin
    fault: str = ""  # why it cannot be used, where that is known beforehand
    registered: Callable[..., Any] | None = None  # the factory, where code registered it

    @property
    def builtin(self) -> bool:
        return self.origin.name == BUILTIN


@functools.cache
def builtin_offers(plural: str) -> tuple[Offer, ...]:
    """The names of this distribution, for one kind."""
    origin = _builtin_origin()
    return tuple(Offer(card, origin) for card in builtin_cards(plural).values())


@functools.cache
def plugin_offers(group: str) -> tuple[Offer, ...]:
    """The names of all other distributions, for one entry-point group."""
    return tuple(offer for distribution in _distributions() for offer in _offers(distribution, group))


def refresh() -> None:
    """Forgets what was read of installed distributions: those installed since then are seen from now on."""
    importlib.invalidate_caches()
    for cached in (builtin_offers, plugin_offers, extra_installed, _builtin_origin, _distributions):
        cached.cache_clear()


@functools.cache
def extra_installed(distribution: str, extra: str) -> bool | None:
    """Whether all that an extra asks for is installed; None if the distribution does not declare that extra."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        requirements = metadata(distribution).get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return None
    of_extra = re.compile(rf"""([\w.-]+)[^;]*;\s*extra\s*==\s*['"]{re.escape(extra)}['"]\s*""")
    wanted = [found[1] for found in map(of_extra.fullmatch, requirements) if found]
    return all(map(is_installed, wanted)) if wanted else None


def same_distribution(one: str, other: str) -> bool:
    """Distribution names differ neither by case nor by which of . _ - they use."""
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed, by its metadata."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def _builtin_origin() -> Origin:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return _origin(distribution(BUILTIN))
    except PackageNotFoundError:  # run from a checkout
        return Origin(BUILTIN)


@functools.cache
def _distributions() -> tuple[Distribution, ...]:
    """Distributions with an entry point of ours. Of two with the same name, Python imports the first on the path."""
    from importlib.metadata import distribution, distributions

    found = {}
    for candidate in distributions():
        try:
            if "[sca_" in (candidate.read_text("entry_points.txt") or ""):
                first = distribution(candidate.metadata["Name"])
                first.entry_points  # noqa: B018  a file that cannot be parsed is found out here
                found[first.metadata["Name"]] = first
        except Exception:  # metadata so damaged that there is no name to hold it against
            continue
    return tuple(found.values())


def _origin(distribution: Distribution) -> Origin:
    facts = cast("Message", distribution.metadata)  # which it is; its stated type lacks `get`
    return Origin(
        name=facts["Name"],
        version=facts.get("Version", ""),
        summary=facts.get("Summary", ""),
        licence=facts.get("License-Expression") or facts.get("License", "").partition("\n")[0],
    )


def _offers(distribution: Distribution, group: str) -> Iterator[Offer]:
    origin = _origin(distribution)
    entry_points = distribution.entry_points
    spoken = {entry_point.value for entry_point in entry_points.select(group="sca_api", name="version")}
    wrong = f"made for version {', '.join(sorted(spoken))} of the contracts, and this is {API}"
    if any(re.fullmatch(r"v\d+", version) and int(version[1:]) > int(API[1:]) for version in spoken):
        wrong += f"; {BUILTIN} is the older of the two: pip install -U {BUILTIN}"
    elif not all(re.fullmatch(r"v\d+", version) for version in spoken):
        wrong += f"; a version is written as {API} is"
    offers = [
        offer for entry_point in entry_points.select(group=group) for offer in _entry_point_offers(entry_point, origin)
    ]
    times = Counter(offer.card.name for offer in offers)
    for name, offer in {offer.card.name: offer for offer in offers}.items():
        fault = offer.fault or ("the distribution offers this name twice" if times[name] > 1 else "")
        yield Offer(offer.card, origin, wrong if spoken - {API} else fault)


def _entry_point_offers(entry_point: EntryPoint, origin: Origin) -> list[Offer]:
    """One name, or the names of a card file. What is wrong with the file is held against the label that named it."""
    name, value = entry_point.name, re.sub(r"\s|\[.*\]", "", entry_point.value)
    label = Card(name, value, summary=origin.summary, licence=origin.licence)
    try:
        if value.endswith(".toml"):
            cards = read_cards(_card_file(value).read_text("utf-8"))
        else:
            check_name(name)
            check_factory(value)
            cards = {name: label}
    except Exception as error:  # whatever is wrong with other people's files, only these names suffer
        return [Offer(label, origin, str(error))]
    return [
        Offer(card, origin) if isinstance(card, Card) else Offer(Card(name, value), origin, str(card))
        for name, card in cards.items()
    ]


def _card_file(value: str) -> Path:
    """package.folder:cards.toml -> the file's path, found without importing the package.

    Raises RegistryError if there is none.
    """
    module, _, file = value.partition(":")
    top, *folders = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a name without dots is located, not imported
    except Exception as error:  # finders of editable installs are other people's code
        raise RegistryError(f"the package {top!r} cannot be located: {error}") from error
    places = spec.submodule_search_locations if spec else None
    for place in places or ():
        path = Path(place, *folders, file)
        if path.is_file():
            return path
    raise RegistryError(f"there is no card file {'/'.join((top, *folders, file))}")
