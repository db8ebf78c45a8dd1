"""Options of a factory, read from its signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import Parameter, formatannotation, signature
from numbers import Integral, Real
from os import PathLike
from typing import Any

from sca_registry.errors import RegistryError, format_choices, suggest_name

TEXT_TYPES = ("str", "Path", "PathLike", "PathLike[str]", "StrPath")
OPTIONAL_PATTERN = re.compile(r"^Optional\[(.*)\]$")
UNION_PATTERN = re.compile(r"^Union\[(.*)\]$")
NAMESPACE_PATTERN = re.compile(r"^(?:\w+\.)+")
REQUIRED = ...  # default of a required option
TYPE_DESCRIPTIONS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    **dict.fromkeys(TEXT_TYPES, "a string"),
    "None": "None",
}


def get_factory_options(factory: Callable[..., Any], num_positional: int) -> dict[str, Any]:
    """Return the options of a factory.

    Args:
        factory: Factory of a component.
        num_positional: Number of leading parameters that are not options.

    Returns:
        Defaults by option, `REQUIRED` for an option without a default; empty if the factory has no signature.
    """
    parameters = _filter_option_parameters(_get_parameters(factory) or [], num_positional)
    return {each.name: REQUIRED if each.default is Parameter.empty else each.default for each in parameters}


def is_text_option(factory: Callable[..., Any], num_positional: int, option: str) -> bool:
    """Return whether an option only takes text or a path, according to its annotation or else its default.

    Args:
        factory: Factory of a component.
        num_positional: Number of leading parameters that are not options.
        option: Name of the option.

    Returns:
        True if the option takes text.
    """
    for parameter in _filter_option_parameters(_get_parameters(factory) or [], num_positional):
        if parameter.name == option:
            if parameter.annotation is Parameter.empty:
                return isinstance(parameter.default, str)
            names = parse_annotation(parameter.annotation) - {"None"}
            return bool(names) and names <= set(TEXT_TYPES)
    return False


def parse_annotation(annotation: Any) -> set[str]:
    """Parse the types that an annotation allows.

    Args:
        annotation: A type, a union of types, or the source code of either, which is not evaluated.

    Returns:
        Names of the types without modules, such as {"int", "None"} for `Optional[int]`.
    """
    text = annotation if isinstance(annotation, str) else formatannotation(annotation)
    text = NAMESPACE_PATTERN.sub("", text.strip(" '\""))
    if match := OPTIONAL_PATTERN.match(text):
        return parse_annotation(match[1]) | {"None"}
    if match := UNION_PATTERN.match(text):
        return set().union(*map(parse_annotation, match[1].split(",")))
    members = text.split("|")
    return {text} if len(members) == 1 else set().union(*map(parse_annotation, members))


def check_options(subject: str, factory: Callable[..., Any], num_positional: int, options: Mapping[str, Any]) -> None:
    """Check options against the signature of a factory.

    Args:
        subject: Subject of the error messages, such as "mixer 'query'".
        factory: Factory of a component.
        num_positional: Number of leading parameters that are not options.
        options: Values by option.

    Raises:
        RegistryError: An option is unknown, a required option is missing, or a value has a type other than the
            annotated number, boolean, text or None.
    """
    parameters = _get_parameters(factory)
    if parameters is None:
        return
    defaults = get_factory_options(factory, num_positional)
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        for option in options:
            if option not in defaults:
                raise RegistryError(
                    f"{subject} has no option {option!r}.{suggest_name(option, defaults)}{_format_options(defaults)}"
                )
    for option, default in defaults.items():
        if default is REQUIRED and option not in options:
            raise RegistryError(f"{subject} requires the option {option!r}.{_format_options(defaults)}")
    for parameter in _filter_option_parameters(parameters, num_positional):
        if parameter.name in options:
            _check_value(subject, parameter, options[parameter.name])


def _check_value(subject: str, parameter: Parameter, value: Any) -> None:
    """Check a value against an annotation of numbers, booleans, text and None; ignore other annotations."""
    type_names = parse_annotation(parameter.annotation)
    if not type_names <= TYPE_DESCRIPTIONS.keys() or value is parameter.default:
        return
    if not any(_is_of_type(name, value) for name in type_names):
        expected = " or ".join(
            dict.fromkeys(description for name, description in TYPE_DESCRIPTIONS.items() if name in type_names)
        )
        raise RegistryError(f"{subject}: {parameter.name} is {value!r:.80}; expected {expected}")


def _is_of_type(type_name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return type_name == "bool"
    if type_name == "None":
        return value is None
    if type_name in TEXT_TYPES:
        return isinstance(value, str | PathLike)
    return isinstance(value, Integral if type_name == "int" else Real) and type_name != "bool"


def _get_parameters(factory: Callable[..., Any]) -> list[Parameter] | None:
    try:
        return list(signature(factory).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None


def _filter_option_parameters(parameters: list[Parameter], num_positional: int) -> list[Parameter]:
    positional_kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    option_kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    upstream = [parameter for parameter in parameters if parameter.kind in positional_kinds][:num_positional]
    return [parameter for parameter in parameters if parameter.kind in option_kinds and parameter not in upstream]


def _format_options(defaults: dict[str, Any]) -> str:
    return format_choices(
        [name if default is REQUIRED else f"{name}={default!r}" for name, default in defaults.items()]
    )
