"""`key=value`: one grammar for changing specs and recipes on a command line, in a sweep and in code.

A key is a dotted path and a value is TOML; a bare word is a string, so `mixer=roi-pool` needs no quotes. An option that
is annotated as text or a path takes any value but a list or a table as text: `root=2024`, `root=my photos`. The parts
and the other fields of a model are short for `model.*`.

    mixer.depth=2           edits an option of the mixer
    mixer=roi-pool          replaces the mixer and drops its options
    lora=16                 rank 16; lora.alpha=8 edits it, lora=0 takes it away
    train.steps=200         a recipe's own table
    data.scenes.count=16    an option of a dataset
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sca_registry.errors import RegistryError, make_unknown_name_error

MODEL_PARTS = ("encoder", "segmenter", "mixer", "language_model")
MODEL_FIELDS = (*MODEL_PARTS, "projection", "task_tokens", "trainable", "lora", "generation", "everything")
SHORTHAND_KEYS = {
    "projection": "kind",
    "lora": "rank",
}  # what a lone value stands for; elsewhere it is the `name` of a part

KEY_PATTERN = re.compile(r"[^\W\d][\w-]*", re.ASCII)
BARE_STRING_PATTERN = re.compile(r"""[^\W\d][^\s"'\[\]{}=#,]*|[/~.][^\s"'\[\]{}=#,]*""")

IsText = Callable[[str], bool]  # whether an option takes text or a path and nothing else


def apply_overrides(table: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of a nested table with assignments made in order.

    In [model] any field of a `ModelSpec` may be set, and a table with a `name` is a part that takes any option; both
    are checked when they are used. Elsewhere a key has to be there already, so give a table with all its defaults; a
    table within a table may be replaced by another, which is checked when it is used.

    Raises RegistryError for what is not `key=value`, for an unknown key, and for a value where a table should be.
    """
    result = copy.deepcopy(dict(table))
    for assignment in assignments:
        path, text = _split_assignment(assignment)
        root_key = _normalize_key(path[0], (*result, *MODEL_FIELDS))
        if root_key in MODEL_FIELDS and root_key not in result:
            path = ("model", *path)
        elif root_key not in result and root_key != "model":
            raise make_unknown_name_error(
                f"{assignment!r}: there is no {path[0]!r} to set", path[0], {**result, **dict.fromkeys(MODEL_FIELDS)}
            )
        _set_value(result, (), path, text, assignment)
    return result


def parse_assignment(
    assignment: str, is_text: Callable[[tuple[str, ...]], bool] = lambda path: False
) -> tuple[tuple[str, ...], Any]:
    """'mixer.depth=2' -> (("mixer", "depth"), 2).

    is_text: whether a key takes text or a path and nothing else. Raises RegistryError if there is no `=`, the key is no
    dotted path, or the value is neither TOML nor a bare word.
    """
    path, text = _split_assignment(assignment)
    return path, _parse_value(text, assignment, lambda: is_text(path))


def _split_assignment(assignment: str) -> tuple[tuple[str, ...], str]:
    key, separator, text = assignment.partition("=")
    path = tuple(key_part.strip() for key_part in key.split("."))
    if not separator or not all(map(KEY_PATTERN.fullmatch, path)):
        raise RegistryError(f"{assignment!r} does not set anything: write key=value, for example mixer.depth=2")
    return path, text.strip()


def parse_assignments(assignments: Iterable[str], is_text: IsText = lambda option: False) -> dict[str, Any]:
    """The `key=value` options of one part. Raises RegistryError, also for a key with a dot in it."""
    options = {}
    for assignment in assignments:
        path, value = parse_assignment(assignment, lambda path: is_text(path[-1]))
        if len(path) > 1:
            raise RegistryError(f"{assignment!r}: the options of a part have plain names, such as {path[-1]}=...")
        options[path[0]] = value
    return options


def _parse_value(text: str, assignment: str, is_text: Callable[[], bool]) -> Any:
    import tomllib

    try:
        parsed = tomllib.loads(
            f"inline = {{ value = {text} }}"
        )  # a comment or a second key breaks out of it and is found
        if parsed.keys() == {"inline"} and parsed["inline"].keys() == {"value"}:
            value = parsed["inline"]["value"]
            return value if isinstance(value, str | list | dict) or not is_text() else text
    except (ValueError, RecursionError):  # not TOML, a number too long to read, or nested too deep
        if text and text[0] not in "'\"[{" and text.isprintable() and is_text():
            return text
        if text in ("True", "False"):
            raise RegistryError(f"{assignment!r}: TOML writes {text.lower()}") from None
        if BARE_STRING_PATTERN.fullmatch(text):
            return text
    raise RegistryError(
        f"{assignment!r}: the value is not TOML. Text that is more than one plain word goes in quotes: "
        f"'{assignment.partition('=')[0]}=\"...\"'"
    )


def _set_value(
    table: dict[str, Any], parents: tuple[str, ...], path: tuple[str, ...], text: str, assignment: str
) -> None:
    """Sets what `path` leads to from `table`, which lies under the keys `above`."""
    fields = MODEL_FIELDS if parents == ("model",) else tuple(table)
    key = _normalize_key(path[0], fields)
    has_fixed_keys = parents == ("model",) or (bool(parents) and parents[0] != "model" and "name" not in table)
    if has_fixed_keys and key not in fields:
        raise make_unknown_name_error(f"{assignment!r}: {'.'.join(parents)} has no {path[0]!r}", path[0], fields)
    if len(path) > 1:
        return _set_value(_get_subtable(table, key, assignment), (*parents, key), path[1:], text, assignment)
    previous = table.get(key)
    value = _parse_value(text, assignment, lambda: _is_text_key(table, parents, key))
    is_part = isinstance(previous, dict) and "name" in previous
    if isinstance(previous, dict) and not (is_part or "model" in parents or (parents and isinstance(value, dict))):
        raise RegistryError(f"{assignment!r}: {key} is a table; set one of: {', '.join(previous)}")
    table[key] = value


def _is_text_key(table: Mapping[str, Any], parents: tuple[str, ...], key: str) -> bool:
    """Whether a key takes text and nothing else: an option of a part by its factory, another by its default."""
    from sca_registry.registry import get_registry

    name = table.get("name")
    if isinstance(name, str):
        return get_registry(parents[-1] if parents and parents[-1] in MODEL_PARTS else "dataset").is_text_option(
            name, key
        )
    return isinstance(table.get(key), str) and parents[:1] != ("model",)


def _get_subtable(table: dict[str, Any], key: str, assignment: str) -> dict[str, Any]:
    """The table at `key`; a lone value becomes the table that it is short for."""
    subtable = table.get(key)
    if subtable is None:
        subtable = table[key] = {}
    elif key in SHORTHAND_KEYS and not isinstance(subtable, dict):
        subtable = table[key] = {SHORTHAND_KEYS[key]: subtable}
    elif isinstance(subtable, str) and key != "model":
        subtable = table[key] = {"name": subtable}
    if not isinstance(subtable, dict):
        fix = "; give model={encoder=..., mixer=..., language_model=...} to train a new model" if key == "model" else ""
        raise RegistryError(f"{assignment!r}: {key} is {subtable!r}, which has no options to set{fix}")
    return subtable


def _normalize_key(name: str, keys: Iterable[str]) -> str:
    """Hyphens stand for underscores, unless a key has hyphens itself."""
    return name if name in keys else name.replace("-", "_")
