"""Cards: the facts about a named part that a chooser wants, in TOML, readable without importing the part.

One file for each kind of part, one table for each name:

    [query]
    factory = "sca.mixers.query:QueryMixer"
    summary = "Learned queries in a two-way transformer."
    source = "SCA, arXiv 2312.00869"
    license = "Apache-2.0"

`factory` is required; the other fields are those of `Card`.
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
    """What is known of a name before anything is imported. None or empty: the card does not say."""

    name: str
    factory: str  # "module:attribute"
    options: Mapping[str, Any] = field(default_factory=dict)  # given to the factory unless the caller says otherwise
    summary: str = ""
    source: str = ""  # a paper, or a hub id and its revision
    license: str = ""
    terms: str = ""  # what a person should know before the weights are fetched: not for commercial use, gated
    parameters: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # an option too: what building without weights has to know
    extra: str = ""  # the optional dependencies of the distribution that must be installed
    gives: tuple[str, ...] | None = None  # of masks, boxes, grid: what the kind downstream can rely on
    needs: tuple[str, ...] | None = None  # of masks, boxes, grid: what the kind upstream must give
    needs_with: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # option -> what it needs when it is on
    small: Mapping[str, Any] = field(default_factory=dict)  # of a plugin: options that make it tiny, for `sca check`
    scores: tuple[str, ...] | None = None  # of a metric: the names of its scores; `class/*` for any that begin so
    code_options: tuple[str, ...] = ()  # that can run code: a checkpoint may set them to a plain name at most

    @property
    def default_options(self) -> dict[str, Any]:
        """The options that the factory gets unless the caller says otherwise."""
        return {**self.options, **({"config": self.config} if self.config else {})}


PROVIDED_OUTPUTS = ("masks", "boxes", "grid")  # what parts give and need
TOML_TYPES = {"str": str, "int": int, "Mapping": dict, "tuple": list}  # how values of fields are written
FIELD_TYPES = {
    each.name: TOML_TYPES[re.split(r"\W", str(each.type))[0]] for each in fields(Card) if each.name != "name"
}


def parse_cards(text: str) -> dict[str, Card | RegistryError]:
    """Every name in a card file, with its card or with what is wrong with it.

    Raises RegistryError if the text is not TOML at all.
    """
    import tomllib

    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"not a card file: {error}") from error
    cards: dict[str, Card | RegistryError] = {}
    for name, table in tables.items():
        try:
            cards[name] = _parse_card(name, table)
        except RegistryError as error:
            cards[name] = error
    return cards


@functools.cache
def read_builtin_cards(plural: str) -> dict[str, Card]:
    """The cards of this distribution for one kind; a kind without a card file has none."""
    from importlib.resources import files

    file = files("sca_registry") / "cards" / f"{plural}.toml"
    cards = parse_cards(file.read_text("utf-8")) if file.is_file() else {}
    valid_cards = {name: card for name, card in cards.items() if isinstance(card, Card)}
    assert len(valid_cards) == len(cards), cards
    return valid_cards


def check_name(name: object) -> None:
    """Raises RegistryError unless `name` can be a name: it has to survive `a+b`, `dist:name` and a command line."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise RegistryError(f"{name!r} cannot be a name: use ASCII letters, digits, '.', '_' and '-'")


def check_factory(factory: str) -> None:
    """Raises RegistryError unless `factory` reads like module:attribute."""
    if not FACTORY_PATTERN.fullmatch(factory):
        raise RegistryError(f"{factory!r} is not a factory: write it as 'package.module:attribute'")


def _parse_card(name: str, table: Any) -> Card:
    check_name(name)
    if not isinstance(table, dict) or "factory" not in table:
        raise RegistryError(
            f"the card {name!r} has no factory: write [{name}] and factory = 'package.module:attribute'"
        )
    for key, value in table.items():
        if key not in FIELD_TYPES:
            raise make_unknown_name_error(f"the card {name!r} has an unknown field {key!r}", key, FIELD_TYPES)
        if not isinstance(value, FIELD_TYPES[key]):
            raise RegistryError(
                f"{key} of the card {name!r} is {value!r} and should be of type {FIELD_TYPES[key].__name__}"
            )
    check_factory(table["factory"])
    for output_name in (*table.get("needs", ()), *table.get("gives", ())):
        if output_name not in PROVIDED_OUTPUTS:
            raise make_unknown_name_error(
                f"the card {name!r} needs or gives {output_name!r}, which nothing is called",
                str(output_name),
                PROVIDED_OUTPUTS,
            )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Card(name, **values)
