"""Plugins: components of installed distributions, found by their metadata without importing them.

A distribution adds components with entry points in the group of a kind. An entry point refers to a factory, or to a
card file inside a package, which contains any number of components with their metadata (see `cards`):

    [project.entry-points.sca_mixers]
    mean = "sca_hello.mixers:MeanMixer"         # the component `mean`
    hello = "sca_hello:mixers.toml"             # all components in sca_hello/mixers.toml; `hello` is only a label

A value that ends in `.toml` is a card file; its package is located but not imported. A distribution may declare the
version of the contracts that it requires; the default is the current version:

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
    """Distribution or module that provides a component.

    Attributes:
        name: Name of the distribution, or of the module that registered the component.
        version: Version of the distribution.
        summary: Summary of the distribution.
        license: License of the distribution.
    """

    name: str
    version: str = ""
    summary: str = ""
    license: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True)
class Registration:
    """Component offered by a distribution, or registered in code.

    Attributes:
        card: Metadata of the component.
        origin: Distribution or module that provides it.
        problem: Problem found in the metadata; "" if there is none.
        registered_factory: Factory of a component registered in code.
    """

    card: Card
    origin: Origin
    problem: str = ""
    registered_factory: Callable[..., Any] | None = None

    @property
    def is_builtin(self) -> bool:
        """Whether the component is part of this distribution."""
        return self.origin.name == BUILTIN_DISTRIBUTION


@functools.cache
def get_builtin_registrations(plural: str) -> tuple[Registration, ...]:
    """Return the components of this distribution.

    Args:
        plural: Plural name of the kind, such as "encoders".

    Returns:
        Offers in the order of the card file.
    """
    origin = get_builtin_origin()
    return tuple(Registration(card, origin) for card in read_builtin_cards(plural).values())


@functools.cache
def find_plugin_registrations(group: str) -> tuple[Registration, ...]:
    """Return the components of all other distributions.

    Args:
        group: Entry-point group of the kind, such as "sca_encoders".

    Returns:
        Offers of the installed distributions.
    """
    return tuple(
        registration
        for distribution in _find_distributions()
        for registration in _iter_registrations(distribution, group)
    )


def refresh_plugins() -> None:
    """Clear the cached metadata of installed distributions, to find plugins installed in the meantime."""
    importlib.invalidate_caches()
    for cached_function in (
        get_builtin_registrations,
        find_plugin_registrations,
        is_extra_installed,
        is_installed,
        get_builtin_origin,
        _find_distributions,
        _make_origin,
        _read_requirements,
    ):
        cached_function.cache_clear()


@functools.cache
def is_extra_installed(distribution: str, extra: str) -> bool | None:
    """Return whether all requirements of an extra are installed; None if the distribution does not declare the extra.

    Args:
        distribution: Name of the distribution.
        extra: Name of the extra.

    Returns:
        Whether the extra is installed, or None.
    """
    requirements = _read_requirements(distribution)
    pattern = re.compile(rf"""([\w.-]+)[^;]*;\s*extra\s*==\s*['"]{re.escape(extra)}['"]\s*""")
    distributions = [match[1] for match in map(pattern.fullmatch, requirements) if match]
    return all(map(is_installed, distributions)) if distributions else None


@functools.cache
def _read_requirements(distribution_name: str) -> tuple[str, ...]:
    """Return the requirements of a distribution, those of all extras included; none if it is not installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return tuple(distribution(distribution_name).requires or ())
    except PackageNotFoundError:
        return ()


def is_same_distribution(one: str, other: str) -> bool:
    """Return whether two distribution names are equal after normalizing case and the separators `.`, `_` and `-`."""
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


@functools.cache
def is_installed(distribution_name: str) -> bool:
    """Return whether a distribution is installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(distribution_name)
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def get_builtin_origin() -> Origin:
    """Return the name, version, summary and license of this distribution."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return _make_origin(distribution(BUILTIN_DISTRIBUTION))
    except PackageNotFoundError:  # a checkout that is not installed
        return Origin(BUILTIN_DISTRIBUTION)


@functools.cache
def _find_distributions() -> tuple[Distribution, ...]:
    """Find distributions with sca entry points. Of several with one name, return the first on `sys.path`."""
    from importlib.metadata import distribution, distributions

    distributions_by_name = {}
    for candidate in distributions():
        try:
            if "[sca_" in (candidate.read_text("entry_points.txt") or ""):
                imported = distribution(candidate.metadata["Name"])
                imported.entry_points  # noqa: B018  raises here if the file cannot be parsed
                distributions_by_name[imported.metadata["Name"]] = imported
        except Exception:  # damaged metadata without a name to report
            continue
    return tuple(distributions_by_name.values())


@functools.cache
def _make_origin(distribution: Distribution) -> Origin:
    metadata = cast("Message", distribution.metadata)  # its annotated type has no `get`
    return Origin(
        name=metadata["Name"],
        version=metadata.get("Version", ""),
        summary=metadata.get("Summary", ""),
        license=metadata.get("License-Expression") or metadata.get("License", "").partition("\n")[0],
    )


def _iter_registrations(distribution: Distribution, group: str) -> Iterator[Registration]:
    origin = _make_origin(distribution)
    entry_points = distribution.entry_points
    versions = {entry_point.value for entry_point in entry_points.select(group="sca_api", name="version")}
    required = ", ".join(sorted(versions))
    version_problem = f"contracts {required} required, but {BUILTIN_DISTRIBUTION} provides {API_VERSION}"
    if any(re.fullmatch(r"v\d+", version) and int(version[1:]) > int(API_VERSION[1:]) for version in versions):
        version_problem += f"; upgrade it: pip install -U {BUILTIN_DISTRIBUTION}"
    elif not all(re.fullmatch(r"v\d+", version) for version in versions):
        version_problem += f"; write the version as {API_VERSION}"
    registrations = [
        registration
        for entry_point in entry_points.select(group=group)
        for registration in _read_entry_point(entry_point, origin)
    ]
    counts = Counter(registration.card.name for registration in registrations)
    for name, registration in {registration.card.name: registration for registration in registrations}.items():
        problem = registration.problem or ("the distribution defines this name twice" if counts[name] > 1 else "")
        yield Registration(registration.card, origin, version_problem if versions - {API_VERSION} else problem)


def _read_entry_point(entry_point: EntryPoint, origin: Origin) -> list[Registration]:
    """Read one name or all names of a card file; an error of the file becomes the problem of its label."""
    name, value = entry_point.name, re.sub(r"\s|\[.*\]", "", entry_point.value)
    label_card = Card(name, value, summary=origin.summary, license=origin.license)
    try:
        if value.endswith(".toml"):
            cards = parse_cards(_find_card_file(value).read_text("utf-8"))
        else:
            check_name(name)
            check_factory(value)
            cards = {name: label_card}
    except Exception as error:  # third-party files can fail in any way; only this entry point is affected
        return [Registration(label_card, origin, str(error))]
    return [
        Registration(card, origin) if isinstance(card, Card) else Registration(Card(name, value), origin, str(card))
        for name, card in cards.items()
    ]


def _find_card_file(value: str) -> Path:
    """Find the file of "package.folder:cards.toml" without importing the package."""
    module, _, file = value.partition(":")
    package, *folders = module.split(".")
    try:
        spec = importlib.util.find_spec(package)  # does not import a top-level package
    except Exception as error:  # finders of editable installs are third-party code
        raise RegistryError(f"package {package!r} cannot be located: {error}") from error
    locations = spec.submodule_search_locations if spec else None
    for location in locations or ():
        path = Path(location, *folders, file)
        if path.is_file():
            return path
    raise RegistryError(f"card file {'/'.join((package, *folders, file))} not found")
