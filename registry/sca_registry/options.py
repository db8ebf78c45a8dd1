"""The options of a factory, as its signature tells them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import Parameter, formatannotation, signature
from numbers import Integral, Real
from os import PathLike
from typing import Any

from sca_registry.messages import RegistryError, choice, suggestion

TEXT = ("str", "Path", "PathLike", "PathLike[str]", "StrPath")
OPTIONAL = re.compile(r"^Optional\[(.*)\]$")
UNION = re.compile(r"^Union\[(.*)\]$")
NAMESPACE = re.compile(r"^(?:\w+\.)+")
REQUIRED = ...  # stands where an option has no default
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    **dict.fromkeys(TEXT, "text"),
    "None": "nothing",
}


def read_options(factory: Callable[..., Any], upstream: int) -> dict[str, Any]:
    """Option name -> default (`REQUIRED` without one); the first `upstream` parameters are not options.

    A factory that tells no signature has no known options.
    """
    named = _named(_parameters(factory) or [], upstream)
    return {each.name: REQUIRED if each.default is Parameter.empty else each.default for each in named}


def takes_text(factory: Callable[..., Any], upstream: int, option: str) -> bool:
    """Return whether an option is text or a path and nothing else, by its annotation or else its default."""
    for parameter in _named(_parameters(factory) or [], upstream):
        if parameter.name == option:
            if parameter.annotation is Parameter.empty:
                return isinstance(parameter.default, str)
            names = read_annotation(parameter.annotation) - {"None"}
            return bool(names) and names <= set(TEXT)
    return False


def read_annotation(annotation: Any) -> set[str]:
    """Return the types that an annotation allows, by name without module: {"int", "None"} for `Optional[int]`.

    Args:
        annotation: A type, a union of types, or either of them as text, which is not evaluated.
    """
    written = annotation if isinstance(annotation, str) else formatannotation(annotation)
    written = NAMESPACE.sub("", written.strip(" '\""))
    if match := OPTIONAL.match(written):
        return read_annotation(match[1]) | {"None"}
    if match := UNION.match(written):
        return set().union(*map(read_annotation, match[1].split(",")))
    members = written.split("|")
    return {written} if len(members) == 1 else set().union(*map(read_annotation, members))


def check_options(what: str, factory: Callable[..., Any], upstream: int, options: Mapping[str, Any]) -> None:
    """Raises RegistryError, opening with `what`, for an option that the factory does not take, one that it lacks, or a
    value of another type where the signature asks for a number, a truth value or text.
    """
    parameters = _parameters(factory)
    if parameters is None:
        return
    known = read_options(factory, upstream)
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        for option in options:
            if option not in known:
                raise RegistryError(f"{what} has no option {option!r}.{suggestion(option, known)}{_listed(known)}")
    for option, default in known.items():
        if default is REQUIRED and option not in options:
            raise RegistryError(f"{what} needs the option {option!r}.{_listed(known)}")
    for parameter in _named(parameters, upstream):
        if parameter.name in options:
            _check_value(what, parameter, options[parameter.name])


def _check_value(what: str, parameter: Parameter, value: Any) -> None:
    """Check a value against an annotation that allows numbers, truth values, text or None and nothing else."""
    names = read_annotation(parameter.annotation)
    if not names <= KINDS.keys() or value is parameter.default:
        return
    if not any(_is_kind(name, value) for name in names):
        wanted = " or ".join(dict.fromkeys(kind for name, kind in KINDS.items() if name in names))
        raise RegistryError(f"{what}: {parameter.name} is {value!r:.80}; give {wanted}")


def _is_kind(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name == "bool"
    if name == "None":
        return value is None
    if name in TEXT:
        return isinstance(value, str | PathLike)
    return isinstance(value, Integral if name == "int" else Real) and name != "bool"


def _parameters(factory: Callable[..., Any]) -> list[Parameter] | None:
    try:
        return list(signature(factory).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have none
        return None


def _named(parameters: list[Parameter], upstream: int) -> list[Parameter]:
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    taken = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)][:upstream]
    return [parameter for parameter in parameters if parameter.kind in by_name and parameter not in taken]


def _listed(known: dict[str, Any]) -> str:
    return choice([name if default is REQUIRED else f"{name}={default!r}" for name, default in known.items()])
