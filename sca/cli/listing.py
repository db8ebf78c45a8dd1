"""`sca list` and `sca show`: list and inspect components, models and recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Annotated, Any

import typer
from sca_registry import REGISTRIES, get_registry

from sca.cli.options import check_option_choice, print_document, print_json, print_line, print_stderr, print_table
from sca.io.terminal import Table

WILDCARDS = frozenset("*?[")
INTERFACE_FIELDS = {  # what `sca show` prints of the interfaces between components, by kind
    "encoders": ("default_segmenter",),
    "segmenters": ("provides", "requires"),
    "mixers": ("requires", "option_requires"),
}
COMPONENT_STATES = ("ok", "unchecked", "broken", "needs extra")


def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            help="Kind to list: encoders, mixers, ..., models or recipes. A wildcard, such as '*sam*', lists the "
            "matching names of all kinds. Defaults to all kinds.",
            show_default=False,
        ),
    ] = "",
    pattern: Annotated[
        str,
        typer.Argument(
            help="Show only names of this kind that match the wildcard, such as 'sam2*'.", show_default=False
        ),
    ] = "",
    search: Annotated[
        str,
        typer.Option(
            help="Show only components with this text in their name, summary, source or license.",
            rich_help_panel="Filters",
        ),
    ] = "",
    state: Annotated[
        str,
        typer.Option(
            help="Show only components in this state: ok, unchecked, broken or 'needs extra'.",
            rich_help_panel="Filters",
        ),
    ] = "",
    extra: Annotated[
        str,
        typer.Option(
            help="Show only components that need this extra (optional dependency).", rich_help_panel="Filters"
        ),
    ] = "",
    long: Annotated[
        bool,
        typer.Option("--long", help="Also show the license, package and version.", rich_help_panel="Output"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all known fields as a JSON list.", rich_help_panel="Output")
    ] = False,
) -> None:
    """List the available components, models and recipes."""
    from sca_registry import zoo

    if kind and not pattern and WILDCARDS.intersection(kind):
        kind, pattern = "", kind
    kinds = [_resolve_kind(kind)] if kind else [*REGISTRIES, "models", "recipes"]
    if state:
        check_option_choice("state", state, COMPONENT_STATES)
    rows = [row for kind_name in kinds for row in _collect_rows(kind_name)]
    rows = [row for row in rows if row["state"].startswith(state) and (not extra or row.get("extra") == extra)]
    rows = [row for row in rows if _is_match(row, pattern, search)]
    if not rows and (pattern or search):
        raise ValueError(f"nothing matches {pattern or search!r}; run `sca list` to print all names")
    if as_json:
        print_json(rows)
        return
    for plural, kind_rows in groupby(rows, key=lambda row: _resolve_kind(row["kind"])):
        if not kind:
            print_document(f"\n{plural.replace('_', ' ').upper()}")
        print_table(_build_table([*kind_rows], long))
    if kinds == ["models"]:
        print_stderr(zoo.describe_photograph_models())


def _is_match(row: Mapping[str, Any], pattern: str, search: str) -> bool:
    """Return whether the name matches a wildcard and a field contains a text, both ignoring case; "" matches all."""
    fields = [row[field] for field in ("name", "summary", "source", "license")]
    is_named = not pattern or fnmatchcase(row["name"].lower(), pattern.lower())
    return is_named and any(search.lower() in text.lower() for text in fields)


def _build_table(rows: Sequence[Mapping[str, Any]], long: bool) -> Table:
    """Return a table of the components of one kind, without empty columns."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "name": lambda row: row["name"],
        "parameters": lambda row: f"{row['parameters']:,}" if row["parameters"] else "",
        "domain": lambda row: row.get("domain", ""),
        "state": lambda row: row["state"] + (f": {row['reason']}" if row["reason"] else ""),
        "license": lambda row: row["license"],
        "from": lambda row: f"{row['distribution']} {row['version']}",
        "summary": lambda row: row["summary"],
    }
    if not long:
        del columns["license"], columns["from"]
        columns["parameters"] = lambda row: _format_count(row["parameters"])
        columns["state"] = lambda row: "" if row["state"] == "ok" else row["state"]
    cells_by_column = {name: cells for name, cell in columns.items() if any(cells := [cell(row) for row in rows])}
    table = Table(tuple(cells_by_column), right_aligned=("parameters",), has_frame=False)
    for row in zip(*cells_by_column.values(), strict=True):
        table.add_row(*row)
    return table


def _format_count(count: int | None) -> str:
    """Format a count with a unit: 19.1 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count and count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count or "")


def show(
    kind: Annotated[
        str, typer.Argument(help="Kind of component, singular or plural, such as mixer, encoders, model or recipe.")
    ],
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the component. For models, also a checkpoint folder or run folder.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Show the details and options of a component, model or recipe."""
    from sca_registry import zoo

    if not name:
        raise ValueError(_describe_missing_argument(kind))
    kind = _resolve_kind(kind)
    if kind == "recipes":
        from sca.training.recipe import read_recipe_text

        print_document(read_recipe_text(name))
        return
    facts = _describe_model(name) if kind == "models" else _describe_component(kind, name)
    _print_facts(facts)
    if kind == "models" and (note := zoo.describe_domain(name)):
        print_stderr(note)


def _describe_missing_argument(argument: str) -> str:
    """Return the message for `sca show` with a kind and no name, or with a name and no kind."""
    from sca_registry import zoo

    from sca.training.recipe import list_recipes

    names_by_kind = {registry.kind.singular: registry.list_names() for registry in REGISTRIES.values()}
    names_by_kind |= {"model": zoo.list_names(), "recipe": list_recipes()}
    kinds = [kind for kind, names in names_by_kind.items() if argument in names]
    if kinds:
        commands = " or ".join(f"`sca show {kind.replace('_', '-')} {argument}`" for kind in kinds)
        return f"the kind of {argument!r} is missing; use {commands}"
    kind = _resolve_kind(argument)  # raises for text that is neither
    return f"the name of the {kind.removesuffix('s').replace('_', ' ')} is missing; `sca list {kind}` lists all names"


def _print_facts(facts: dict[str, Any]) -> None:
    options = facts.pop("options", {})
    labeled_facts = {f"{key.replace('_', ' ')}:": value for key, value in facts.items() if value not in (None, "")}
    width = max(14, *(len(key) + 1 for key in labeled_facts))
    for key, value in labeled_facts.items():
        print_line(f"{key:<{width}}{value}")
    if options:
        print_line("options:")
        for option, value in options.items():
            print_line(f"  {option} = {'(required)' if value is ... else value}")


def _resolve_kind(name: str) -> str:
    """Return the plural of a kind; raise RegistryError, with the closest one, if it is unknown."""
    from sca_registry.contracts import COMPONENT_KINDS
    from sca_registry.errors import make_unknown_name_error

    plurals = {kind.singular: plural for plural, kind in COMPONENT_KINDS.items()} | {
        "model": "models",
        "recipe": "recipes",
    }
    normalized = name.lower().replace("-", "_")
    if plurals.get(normalized, normalized) not in plurals.values():
        raise make_unknown_name_error(f"unknown kind {name!r}", name, plurals.values())
    return plurals.get(normalized, normalized)


def _collect_rows(kind: str) -> list[dict[str, Any]]:
    from sca_registry import zoo

    if kind == "models":
        return [_describe_zoo_model(name) for name in zoo.list_names()]
    return (
        _describe_recipes()
        if kind == "recipes"
        else [_entry_to_dict(entry) for entry in get_registry(kind).list_entries()]
    )


def _describe_component(kind: str, name: str) -> dict[str, Any]:
    """Return the facts of a component. Built-in components are read without an import; plugins are loaded."""
    from sca_registry.plugins import BUILTIN_DISTRIBUTION
    from sca_registry.source_options import read_class_constant, read_source_options

    registry = get_registry(kind)
    entry = next(
        (each for each in registry.list_entries() if each.name == name and each.distribution == BUILTIN_DISTRIBUTION),
        None,
    )
    options = (
        read_source_options(entry.factory, bool(registry.kind.upstream_kind or registry.kind.first_argument))
        if entry
        else None
    )
    fields = INTERFACE_FIELDS.get(registry.kind.plural, ())
    if entry is None or options is None:
        interface = _describe_interface({field: registry.get_declared(name, field) for field in fields})
        return _entry_to_dict(registry.load_entry(name)) | interface
    card = registry.get_card(name)
    constants = {field: read_class_constant(entry.factory, field) for field in fields}
    interface = _describe_interface({field: getattr(card, field, None) for field in fields}, constants)
    return _entry_to_dict(entry) | interface | {"options": options | dict(entry.options)}


def _describe_interface(declared: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Describe what a component provides to the next one and requires from the one before, if that is declared."""
    facts = {field: (defaults or {}).get(field) if value is None else value for field, value in declared.items()}
    needs = [
        f"{', '.join(names)} with {option}" for option, names in (facts.pop("option_requires", None) or {}).items()
    ]
    descriptions = {
        field: value if isinstance(value, str) else ", ".join(value) or "none"
        for field, value in facts.items()
        if value is not None
    }
    if needs:
        descriptions["requires"] = "; ".join([descriptions.get("requires", "none"), *needs])
    return descriptions


def _entry_to_dict(entry: Any) -> dict[str, Any]:
    """Convert an entry to plain JSON; options that JSON cannot represent are written as Python literals."""
    return vars(entry) | {"options": {key: _convert_to_json_value(value) for key, value in entry.options.items()}}


def _describe_zoo_model(name: str) -> dict[str, Any]:
    from sca_registry import zoo

    entry = zoo.get_entry(name)
    entry_facts = {
        key: value
        for key, value in asdict(entry).items()
        if key not in ("is_noncommercial", "download_bytes", "config")
    }
    facts = {"name": entry.name, "kind": "model", **_get_builtin_facts(), **entry_facts}
    if entry.download_bytes:
        facts["download"] = f"{entry.download_bytes / 1e9:.1f} GB"
    if entry.folder and not (entry.folder / "weights.safetensors").is_file():
        remedy = f"restore the folder, or install {facts['distribution']} again"
        facts |= {"state": "broken", "reason": f"no weights in {entry.folder}; {remedy}"}
    return facts


def _describe_model(name: str) -> dict[str, Any]:
    """Return the facts of a model and its components, by name, checkpoint folder or run folder."""
    from sca_registry import RegistryError, zoo

    if name in zoo.list_names():
        from sca_registry.spec import ModelSpec

        from sca.checkpoints.inspection import describe_spec
        from sca.io.json import read_json

        spec_path = (folder := zoo.get_entry(name).folder) and folder / "spec.json"
        facts = _describe_zoo_model(name)
        if config := zoo.get_entry(name).config:
            from sca.checkpoints.pam import build_published_pam_spec

            return facts | describe_spec(build_published_pam_spec(config))
        return facts | (
            describe_spec(ModelSpec.from_dict(read_json(spec_path))) if spec_path and spec_path.is_file() else {}
        )
    from sca.io.hub import find_local_folder, suggest_path

    folder = find_local_folder(name)
    if folder is not None:
        from sca.checkpoints.inspection import describe_checkpoint

        return describe_checkpoint(folder)
    try:
        return _describe_zoo_model(name)
    except RegistryError as error:
        raise RegistryError(
            f"{error} A checkpoint folder or run folder is also accepted{suggest_path(name)}."
        ) from None


def _describe_recipes() -> list[dict[str, Any]]:
    import tomllib

    from sca.training.recipe import list_recipes, read_recipe_text

    tables = {name: tomllib.loads(read_recipe_text(name)) for name in list_recipes()}
    return [
        {
            "name": name,
            "kind": "recipe",
            "summary": table.get("summary", ""),
            "source": table.get("source", ""),
            "license": "Apache-2.0",
            "parameters": None,
            **_get_builtin_facts(),
        }
        for name, table in tables.items()
    ]


def _get_builtin_facts() -> dict[str, str]:
    from sca_registry.plugins import get_builtin_origin

    origin = get_builtin_origin()
    return {"distribution": origin.name, "version": origin.version, "state": "ok", "reason": ""}


def _convert_to_json_value(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict | None) or value is ... else repr(value)
