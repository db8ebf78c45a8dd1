"""Cards: metadata of components in TOML, readable without importing the components.

Each kind of component has one file, with one table per name:

    [query]
    factory = "sca.mixers.query:QueryMixer"
    summary = "Learned queries in a two-way transformer."
    source = "SCA, arXiv 2312.00869"
    license = "Apache-2.0"

`factory` is required. The other fields are those of `Card`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sca_registry.errors import RegistryError, make_unknown_name_error

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
FACTORY_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Card:
    """Metadata of a component. None and empty values mean unspecified.

    Attributes:
        name: Name of the component.
        factory: Path of the factory, "package.module:attribute".
        options: Options passed to the factory unless the caller overrides them.
        summary: One sentence that describes the component.
        source: Paper, or Hub id and revision.
        license: License of the component and its weights.
        terms: Restrictions of the weights, such as gated access or no commercial use.
        parameters: Number of parameters.
        config: Model configuration for building without weights, passed to the factory as the option `config`.
        extra: Extra of the distribution that must be installed.
        provides:  Outputs (`PROVIDED_OUTPUTS`) that the component provides to the downstream component.
        requires: Outputs (`PROVIDED_OUTPUTS`) that the component requires from the upstream component.
        option_requires:  Outputs that an enabled option requires, by option.
        tiny_options:  Options that make a plugin tiny, for `sca check`.
        scores: Names of the scores of a metric; `class/*` for all scores with a prefix.
        code_options: Options that can run code. A checkpoint may only set them to a plain name.
    """

    name: str
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    source: str = ""
    license: str = ""
    terms: str = ""
    parameters: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: str = ""
    provides: tuple[str, ...] | None = None
    requires: tuple[str, ...] | None = None
    option_requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tiny_options: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[str, ...] | None = None
    code_options: tuple[str, ...] = ()

    @property
    def default_options(self) -> dict[str, Any]:
        """Options passed to the factory by default, including `config`."""
        return {**self.options, **({"config": self.config} if self.config else {})}


PROVIDED_OUTPUTS = ("masks", "boxes", "grid")
TOML_TYPES = {"str": str, "int": int, "Mapping": dict, "tuple": list}  # TOML type of each annotation
FIELD_TYPES = {
    each.name: TOML_TYPES[re.split(r"\W", str(each.type))[0]] for each in fields(Card) if each.name != "name"
}


def parse_cards(text: str) -> dict[str, Card | RegistryError]:
    """Parse a card file.

    Args:
        text: TOML document with a table per card.

    Returns:
        The card of each name, or the error of an invalid card.

    Raises:
        RegistryError: The text is not TOML.
    """
    import tomllib

    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"invalid TOML in the card file: {error}") from error
    cards: dict[str, Card | RegistryError] = {}
    for name, table in tables.items():
        try:
            cards[name] = _parse_card(name, table)
        except RegistryError as error:
            cards[name] = error
    return cards


@functools.cache
def read_builtin_cards(plural: str) -> dict[str, Card]:
    """Return the cards of this distribution for a kind, by name; empty for a kind without a card file.

    Args:
        plural: Plural name of the kind, such as "encoders".

    Returns:
        Cards by name.
    """
    from importlib.resources import files

    file = files("sca_registry") / "cards" / f"{plural}.toml"
    cards = parse_cards(file.read_text("utf-8")) if file.is_file() else {}
    valid_cards = {name: card for name, card in cards.items() if isinstance(card, Card)}
    assert len(valid_cards) == len(cards), cards
    return valid_cards


def check_name(name: object) -> None:
    """Check that a name is valid within `encoder+mixer+language-model`, `distribution:name` and a command line.

    Args:
        name: Name of a component.

    Raises:
        RegistryError: The name is invalid.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise RegistryError(
            f"{name!r} cannot be a name; use ASCII letters, digits, '.', '_' and '-', and start with a letter or digit"
        )


def check_factory(factory: str) -> None:
    """Check that the path of a factory has the form "package.module:attribute".

    Args:
        factory: Path of a factory.

    Raises:
        RegistryError: The path is invalid.
    """
    if not FACTORY_PATTERN.fullmatch(factory):
        raise RegistryError(f"{factory!r} is not a factory path; write it as 'package.module:attribute'")


def _parse_card(name: str, table: Any) -> Card:
    check_name(name)
    if not isinstance(table, dict) or "factory" not in table:
        raise RegistryError(
            f"card {name!r} has no factory; add factory = 'package.module:attribute' to the table [{name}]"
        )
    for key, value in table.items():
        if key not in FIELD_TYPES:
            raise make_unknown_name_error(f"card {name!r} has an unknown field {key!r}", key, FIELD_TYPES)
        if not isinstance(value, FIELD_TYPES[key]):
            raise RegistryError(
                f"{key} of card {name!r} is {value!r}; expected a value of type {FIELD_TYPES[key].__name__}"
            )
    check_factory(table["factory"])
    for output_name in (*table.get("requires", ()), *table.get("provides", ())):
        if output_name not in PROVIDED_OUTPUTS:
            raise make_unknown_name_error(
                f"card {name!r} has an unknown output {output_name!r} in requires or provides",
                str(output_name),
                PROVIDED_OUTPUTS,
            )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Card(name, **values)
