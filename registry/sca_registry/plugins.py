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

from sca_registry.cards import Card, check_factory, check_name, parse_cards, read_builtin_cards
from sca_registry.errors import RegistryError

if TYPE_CHECKING:
    from email.message import Message
    from importlib.metadata import Distribution, EntryPoint

API_VERSION = "v1"
BUILTIN_DISTRIBUTION = "segment-caption-anything"


@dataclass(frozen=True)
class Origin:
    """Where a name comes from."""

    name: str
    version: str = ""
    summary: str = ""
    license: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True)
class Offer:
    """One name offered by one distribution, or by code that registered it."""

    card: Card
    origin: Origin
    problem: str = ""  # why it cannot be used, where that is known beforehand
    registered_factory: Callable[..., Any] | None = None  # the factory, where code registered it

    @property
    def is_builtin(self) -> bool:
        return self.origin.name == BUILTIN_DISTRIBUTION


@functools.cache
def get_builtin_offers(plural: str) -> tuple[Offer, ...]:
    """The names of this distribution, for one kind."""
    origin = _get_builtin_origin()
    return tuple(Offer(card, origin) for card in read_builtin_cards(plural).values())


@functools.cache
def find_plugin_offers(group: str) -> tuple[Offer, ...]:
    """The names of all other distributions, for one entry-point group."""
    return tuple(offer for distribution in _find_distributions() for offer in _iter_offers(distribution, group))


def refresh_plugins() -> None:
    """Forgets what was read of installed distributions: those installed since then are seen from now on."""
    importlib.invalidate_caches()
    for cached_function in (
        get_builtin_offers,
        find_plugin_offers,
        is_extra_installed,
        _get_builtin_origin,
        _find_distributions,
    ):
        cached_function.cache_clear()


@functools.cache
def is_extra_installed(distribution: str, extra: str) -> bool | None:
    """Whether all that an extra asks for is installed; None if the distribution does not declare that extra."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        requirements = metadata(distribution).get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return None
    pattern = re.compile(rf"""([\w.-]+)[^;]*;\s*extra\s*==\s*['"]{re.escape(extra)}['"]\s*""")
    distributions = [match[1] for match in map(pattern.fullmatch, requirements) if match]
    return all(map(is_installed, distributions)) if distributions else None


def is_same_distribution(one: str, other: str) -> bool:
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
def _get_builtin_origin() -> Origin:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return _make_origin(distribution(BUILTIN_DISTRIBUTION))
    except PackageNotFoundError:  # run from a checkout
        return Origin(BUILTIN_DISTRIBUTION)


@functools.cache
def _find_distributions() -> tuple[Distribution, ...]:
    """Distributions with an entry point of ours. Of two with the same name, Python imports the first on the path."""
    from importlib.metadata import distribution, distributions

    distributions_by_name = {}
    for candidate in distributions():
        try:
            if "[sca_" in (candidate.read_text("entry_points.txt") or ""):
                imported = distribution(candidate.metadata["Name"])
                imported.entry_points  # noqa: B018  a file that cannot be parsed is found out here
                distributions_by_name[imported.metadata["Name"]] = imported
        except Exception:  # metadata so damaged that there is no name to hold it against
            continue
    return tuple(distributions_by_name.values())


def _make_origin(distribution: Distribution) -> Origin:
    metadata = cast("Message", distribution.metadata)  # which it is; its stated type lacks `get`
    return Origin(
        name=metadata["Name"],
        version=metadata.get("Version", ""),
        summary=metadata.get("Summary", ""),
        license=metadata.get("License-Expression") or metadata.get("License", "").partition("\n")[0],
    )


def _iter_offers(distribution: Distribution, group: str) -> Iterator[Offer]:
    origin = _make_origin(distribution)
    entry_points = distribution.entry_points
    versions = {entry_point.value for entry_point in entry_points.select(group="sca_api", name="version")}
    version_problem = f"made for version {', '.join(sorted(versions))} of the contracts, and this is {API_VERSION}"
    if any(re.fullmatch(r"v\d+", version) and int(version[1:]) > int(API_VERSION[1:]) for version in versions):
        version_problem += f"; {BUILTIN_DISTRIBUTION} is the older of the two: pip install -U {BUILTIN_DISTRIBUTION}"
    elif not all(re.fullmatch(r"v\d+", version) for version in versions):
        version_problem += f"; a version is written as {API_VERSION} is"
    offers = [
        offer for entry_point in entry_points.select(group=group) for offer in _read_entry_point(entry_point, origin)
    ]
    counts = Counter(offer.card.name for offer in offers)
    for name, offer in {offer.card.name: offer for offer in offers}.items():
        problem = offer.problem or ("the distribution offers this name twice" if counts[name] > 1 else "")
        yield Offer(offer.card, origin, version_problem if versions - {API_VERSION} else problem)


def _read_entry_point(entry_point: EntryPoint, origin: Origin) -> list[Offer]:
    """One name, or the names of a card file. What is wrong with the file is held against the label that named it."""
    name, value = entry_point.name, re.sub(r"\s|\[.*\]", "", entry_point.value)
    label_card = Card(name, value, summary=origin.summary, license=origin.license)
    try:
        if value.endswith(".toml"):
            cards = parse_cards(_find_card_file(value).read_text("utf-8"))
        else:
            check_name(name)
            check_factory(value)
            cards = {name: label_card}
    except Exception as error:  # whatever is wrong with other people's files, only these names suffer
        return [Offer(label_card, origin, str(error))]
    return [
        Offer(card, origin) if isinstance(card, Card) else Offer(Card(name, value), origin, str(card))
        for name, card in cards.items()
    ]


def _find_card_file(value: str) -> Path:
    """package.folder:cards.toml -> the file's path, found without importing the package.

    Raises RegistryError if there is none.
    """
    module, _, file = value.partition(":")
    package, *folders = module.split(".")
    try:
        spec = importlib.util.find_spec(package)  # a name without dots is located, not imported
    except Exception as error:  # finders of editable installs are other people's code
        raise RegistryError(f"the package {package!r} cannot be located: {error}") from error
    locations = spec.submodule_search_locations if spec else None
    for location in locations or ():
        path = Path(location, *folders, file)
        if path.is_file():
            return path
    raise RegistryError(f"there is no card file {'/'.join((package, *folders, file))}")
