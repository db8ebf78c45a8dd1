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

from sca_registry.messages import RegistryError, unknown

PARTS = ("encoder", "segmenter", "mixer", "language_model")
MODEL = (*PARTS, "projection", "task_tokens", "trainable", "lora", "generation", "everything")
SHORT = {"projection": "kind", "lora": "rank"}  # what a lone value stands for; elsewhere it is the `name` of a part

WORD = re.compile(r"[^\W\d][\w-]*", re.ASCII)
BARE = re.compile(r"""[^\W\d][^\s"'\[\]{}=#,]*|[/~.][^\s"'\[\]{}=#,]*""")

IsText = Callable[[str], bool]  # whether an option takes text or a path and nothing else


def override(table: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of a nested table with assignments made in order.

    In [model] any field of a `ModelSpec` may be set, and a table with a `name` is a part that takes any option; both
    are checked when they are used. Elsewhere a key has to be there already, so give a table with all its defaults; a
    table within a table may be replaced by another, which is checked when it is used.

    Raises RegistryError for what is not `key=value`, for an unknown key, and for a value where a table should be.
    """
    changed = copy.deepcopy(dict(table))
    for assignment in assignments:
        path, text = _split(assignment)
        first = _spelt(path[0], (*changed, *MODEL))
        if first in MODEL and first not in changed:
            path = ("model", *path)
        elif first not in changed and first != "model":
            raise unknown(
                f"{assignment!r}: there is no {path[0]!r} to set", path[0], {**changed, **dict.fromkeys(MODEL)}
            )
        _assign(changed, (), path, text, assignment)
    return changed


def read_assignment(
    assignment: str, is_text: Callable[[tuple[str, ...]], bool] = lambda path: False
) -> tuple[tuple[str, ...], Any]:
    """'mixer.depth=2' -> (("mixer", "depth"), 2).

    is_text: whether a key takes text or a path and nothing else. Raises RegistryError if there is no `=`, the key is no
    dotted path, or the value is neither TOML nor a bare word.
    """
    path, text = _split(assignment)
    return path, _value(text, assignment, lambda: is_text(path))


def _split(assignment: str) -> tuple[tuple[str, ...], str]:
    key, equals, text = assignment.partition("=")
    path = tuple(word.strip() for word in key.split("."))
    if not equals or not all(map(WORD.fullmatch, path)):
        raise RegistryError(f"{assignment!r} does not set anything: write key=value, for example mixer.depth=2")
    return path, text.strip()


def read_assignments(assignments: Iterable[str], is_text: IsText = lambda option: False) -> dict[str, Any]:
    """The `key=value` options of one part. Raises RegistryError, also for a key with a dot in it."""
    options = {}
    for assignment in assignments:
        path, value = read_assignment(assignment, lambda path: is_text(path[-1]))
        if len(path) > 1:
            raise RegistryError(f"{assignment!r}: the options of a part have plain names, such as {path[-1]}=...")
        options[path[0]] = value
    return options


def _value(text: str, assignment: str, is_text: Callable[[], bool]) -> Any:
    import tomllib

    try:
        read = tomllib.loads(
            f"inline = {{ value = {text} }}"
        )  # a comment or a second key breaks out of it and is found
        if read.keys() == {"inline"} and read["inline"].keys() == {"value"}:
            value = read["inline"]["value"]
            return value if isinstance(value, str | list | dict) or not is_text() else text
    except (ValueError, RecursionError):  # not TOML, a number too long to read, or nested too deep
        if text and text[0] not in "'\"[{" and text.isprintable() and is_text():
            return text
        if text in ("True", "False"):
            raise RegistryError(f"{assignment!r}: TOML writes {text.lower()}") from None
        if BARE.fullmatch(text):
            return text
    raise RegistryError(
        f"{assignment!r}: the value is not TOML. Text that is more than one plain word goes in quotes: "
        f"'{assignment.partition('=')[0]}=\"...\"'"
    )


def _assign(table: dict[str, Any], above: tuple[str, ...], path: tuple[str, ...], text: str, assignment: str) -> None:
    """Sets what `path` leads to from `table`, which lies under the keys `above`."""
    fields = MODEL if above == ("model",) else tuple(table)
    key = _spelt(path[0], fields)
    closed = above == ("model",) or (bool(above) and above[0] != "model" and "name" not in table)
    if closed and key not in fields:
        raise unknown(f"{assignment!r}: {'.'.join(above)} has no {path[0]!r}", path[0], fields)
    if len(path) > 1:
        return _assign(_table(table, key, assignment), (*above, key), path[1:], text, assignment)
    before = table.get(key)
    value = _value(text, assignment, lambda: _takes_text(table, above, key))
    part = isinstance(before, dict) and "name" in before
    if isinstance(before, dict) and not (part or "model" in above or (above and isinstance(value, dict))):
        raise RegistryError(f"{assignment!r}: {key} is a table; set one of: {', '.join(before)}")
    table[key] = value


def _takes_text(table: Mapping[str, Any], above: tuple[str, ...], key: str) -> bool:
    """Whether a key takes text and nothing else: an option of a part by its factory, another by its default."""
    from sca_registry.registry import registry

    name = table.get("name")
    if isinstance(name, str):
        return registry(above[-1] if above and above[-1] in PARTS else "dataset").takes_text(name, key)
    return isinstance(table.get(key), str) and above[:1] != ("model",)


def _table(table: dict[str, Any], key: str, assignment: str) -> dict[str, Any]:
    """The table at `key`; a lone value becomes the table that it is short for."""
    below = table.get(key)
    if below is None:
        below = table[key] = {}
    elif key in SHORT and not isinstance(below, dict):
        below = table[key] = {SHORT[key]: below}
    elif isinstance(below, str) and key != "model":
        below = table[key] = {"name": below}
    if not isinstance(below, dict):
        fix = "; give model={encoder=..., mixer=..., language_model=...} to train a new model" if key == "model" else ""
        raise RegistryError(f"{assignment!r}: {key} is {below!r}, which has no options to set{fix}")
    return below


def _spelt(word: str, keys: Iterable[str]) -> str:
    """Hyphens stand for underscores, unless a key has hyphens itself."""
    return word if word in keys else word.replace("-", "_")
