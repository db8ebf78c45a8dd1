"""Overrides: `key=value` assignments that change specs and recipes, on the command line, in sweeps and in code.

A key is a dotted path and a value is TOML. An unquoted name is a string, so `mixer=roi-pool` needs no quotes. An option
annotated as text or a path reads any value as text, except lists and tables: `root=2024`, `root=my photos`. The fields
of a model do not need the prefix `model.`.

    mixer.depth=2           set an option of the mixer
    mixer=roi-pool          replace the mixer and drop its options
    lora=16                 set the rank to 16; lora.alpha=8 sets its alpha, lora=0 disables LoRA
    train.steps=200         set a field of a recipe
    data.scenes.num_images=16    set an option of a dataset
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sca_registry.errors import RegistryError, make_unknown_name_error

MODEL_COMPONENTS = ("encoder", "segmenter", "mixer", "language_model")
MODEL_FIELDS = (
    *MODEL_COMPONENTS,
    *(
        "projection",
        "task_tokens",
        "tasks",
        "prompt_template",
        "geometry",
        "questions",
        "lengths",
        "trainable",
        "lora",
        "generation",
        "everything",
        "zoom",
    ),
)
SHORTHAND_KEYS = {"projection": "type", "lora": "rank"}  # key of a table that is written as a single value

KEY_PATTERN = re.compile(r"[^\W\d][\w-]*", re.ASCII)
BARE_STRING_PATTERN = re.compile(r"""[^\W\d][^\s"'\[\]{}=#,]*|[/~.][^\s"'\[\]{}=#,]*""")

IsText = Callable[[str], bool]  # returns whether an option only takes text or a path


def apply_overrides(table: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply assignments to a copy of a nested table.

    In [model], any field of a `ModelSpec` can be set. A table with a `name` is a component and takes any option. Both
    are validated on use, not here. Everywhere else a key must exist, so pass a table with all its defaults. A nested
    table can be replaced by another table, which is validated on use.

    Args:
        table: Nested table, such as a recipe.
        assignments: `key=value` assignments, applied in order.

    Returns:
        The changed copy.

    Raises:
        RegistryError: An assignment is not `key=value`, a key is unknown, or a value replaces a table.
    """
    result = copy.deepcopy(dict(table))
    for assignment in assignments:
        path, text = _split_assignment(assignment)
        root_key = _normalize_key(path[0], (*result, *MODEL_FIELDS))
        if root_key in MODEL_FIELDS and root_key not in result:
            path = ("model", *path)
        elif root_key not in result and root_key != "model":
            raise make_unknown_name_error(
                f"{assignment!r}: unknown key {path[0]!r}", path[0], {**result, **dict.fromkeys(MODEL_FIELDS)}
            )
        _set_value(result, (), path, text, assignment)
    return result


def parse_assignment(
    assignment: str, is_text: Callable[[tuple[str, ...]], bool] = lambda path: False
) -> tuple[tuple[str, ...], Any]:
    """Parse an assignment.

    Args:
        assignment: `key=value`, such as "mixer.depth=2".
        is_text: Returns whether the value of a key only takes text or a file path.

    Returns:
        Path and value, such as (("mixer", "depth"), 2).

    Raises:
        RegistryError: The assignment has no `=`, the key is not a dotted path, or the value is neither TOML nor an
            unquoted name.
    """
    path, text = _split_assignment(assignment)
    return path, _parse_value(text, assignment, lambda: is_text(path))


def _split_assignment(assignment: str) -> tuple[tuple[str, ...], str]:
    key, separator, text = assignment.partition("=")
    path = tuple(key_part.strip() for key_part in key.split("."))
    if not separator or not all(map(KEY_PATTERN.fullmatch, path)):
        raise RegistryError(f"{assignment!r} is not an assignment; write key=value, such as mixer.depth=2")
    return path, text.strip()


def parse_assignments(assignments: Iterable[str], is_text: IsText = lambda option: False) -> dict[str, Any]:
    """Parse the options of one component.

    Args:
        assignments: `option=value` assignments.
        is_text: Returns whether an option only takes text or a path.

    Returns:
        Values by option.

    Raises:
        RegistryError: An assignment is invalid, or a key contains a dot.
    """
    options = {}
    for assignment in assignments:
        path, value = parse_assignment(assignment, lambda path: is_text(path[-1]))
        if len(path) > 1:
            raise RegistryError(f"{assignment!r}: option names of a component contain no dots; write {path[-1]}=...")
        options[path[0]] = value
    return options


def _parse_value(text: str, assignment: str, is_text: Callable[[], bool]) -> Any:
    import tomllib

    try:
        # The inline table makes a comment or a second key in the text an error.
        parsed = tomllib.loads(f"inline = {{ value = {text} }}")
        if parsed.keys() == {"inline"} and parsed["inline"].keys() == {"value"}:
            value = parsed["inline"]["value"]
            return value if isinstance(value, str | list | dict) or not is_text() else text
    except (ValueError, RecursionError):  # not TOML, a number with too many digits, or nested too deep
        if text and text[0] not in "'\"[{" and text.isprintable() and is_text():
            return text
        if text in ("True", "False"):
            raise RegistryError(f"{assignment!r}: TOML booleans are lowercase; write {text.lower()}") from None
        if BARE_STRING_PATTERN.fullmatch(text):
            return text
    raise RegistryError(
        f"{assignment!r}: the value is not valid TOML; quote strings with spaces or special characters: "
        f"'{assignment.partition('=')[0]}=\"...\"'"
    )


def _set_value(
    table: dict[str, Any], parents: tuple[str, ...], path: tuple[str, ...], text: str, assignment: str
) -> None:
    """Set the value at `path` of `table`, which is the subtable at `parents`."""
    fields = MODEL_FIELDS if parents == ("model",) else tuple(table)
    key = _normalize_key(path[0], fields)
    has_fixed_keys = parents == ("model",) or (bool(parents) and parents[0] != "model" and "name" not in table)
    if has_fixed_keys and not fields:
        name = ".".join(parents)
        raise RegistryError(f"{assignment!r}: {name} is empty; set it first: {name}=PATH, or {name}={{{key}={{...}}}}")
    if has_fixed_keys and key not in fields:
        raise make_unknown_name_error(
            f"{assignment!r}: unknown key {path[0]!r} in {'.'.join(parents)}", path[0], fields
        )
    if len(path) > 1:
        return _set_value(_get_subtable(table, key, assignment), (*parents, key), path[1:], text, assignment)
    previous = table.get(key)
    value = _parse_value(text, assignment, lambda: _is_text_key(table, parents, key))
    is_component = isinstance(previous, dict) and "name" in previous
    if isinstance(previous, dict) and not (is_component or "model" in parents or (parents and isinstance(value, dict))):
        name = ".".join((*parents, key))
        raise RegistryError(
            f"{assignment!r}: {name} is a table; set one of its keys: "
            f"{', '.join(f'{name}.{each}' for each in previous)}"
        )
    table[key] = value


def _is_text_key(table: Mapping[str, Any], parents: tuple[str, ...], key: str) -> bool:
    """Return whether a key only takes text: an option according to its factory, another key to its current value."""
    from sca_registry.registry import get_registry

    name = table.get("name")
    if isinstance(name, str):
        kind = parents[-1] if parents and parents[-1] in MODEL_COMPONENTS else "dataset"
        return get_registry(kind).is_text_option(name, key)
    return isinstance(table.get(key), str) and parents[:1] != ("model",)


def _get_subtable(table: dict[str, Any], key: str, assignment: str) -> dict[str, Any]:
    """Return the table at `key`, after expanding a single value to the table that it abbreviates."""
    subtable = table.get(key)
    if subtable is None:
        subtable = table[key] = {}
    elif key in SHORTHAND_KEYS and not isinstance(subtable, dict):
        subtable = table[key] = {SHORTHAND_KEYS[key]: subtable}
    elif isinstance(subtable, str) and key != "model":
        subtable = table[key] = {"name": subtable}
    if not isinstance(subtable, dict):
        if key == "model":
            raise RegistryError(
                f"{assignment!r}: the components of the checkpoint {subtable!r} are fixed; set "
                "model={encoder=..., mixer=..., language_model=...} to train a new model"
            )
        raise RegistryError(f"{assignment!r}: {key} is {subtable!r}, which has no options to set")
    return subtable


def _normalize_key(name: str, keys: Iterable[str]) -> str:
    """Replace hyphens by underscores unless the name is a key."""
    return name if name in keys else name.replace("-", "_")
