"""The options of a factory, read from its source text: nothing is run, so that looking at a part costs nothing."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sca_registry.options import REQUIRED


def written_options(factory: str, upstream: int) -> dict[str, Any] | None:
    """`options.read_options` of "module:name" without importing the module; its parent packages are.

    None where the text does not tell: a factory that is made rather than written, or a class that has its `__init__`
    from elsewhere.
    """
    module, _, name = factory.partition(":")
    found = find_spec(module)
    if found is None or not str(found.origin).endswith(".py"):
        return None
    body = ast.parse(Path(str(found.origin)).read_text("utf-8")).body
    written = _definition(body, name)
    if isinstance(written, ast.ClassDef):
        alone = not (written.bases or written.keywords or written.decorator_list)
        written = _definition(written.body, "__init__")
        if written is None and alone:
            return {}
        upstream += 1  # self
    if not isinstance(written, ast.FunctionDef):
        return None
    taken = written.args
    positional = [*taken.posonlyargs, *taken.args]
    defaults = [*[None] * (len(positional) - len(taken.defaults)), *taken.defaults]
    arguments = [*positional[upstream:], *taken.kwonlyargs]
    defaults = [*defaults[upstream:], *taken.kw_defaults]
    return {argument.arg: _value(default, body) for argument, default in zip(arguments, defaults, strict=True)}


def _definition(body: list[ast.stmt], name: str) -> ast.stmt | None:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next((each for each in body if isinstance(each, kinds) and each.name == name), None)


def _value(default: ast.expr | None, body: list[ast.stmt]) -> Any:
    """A default, a constant of its module included; what would have to be computed stays text."""
    if default is None:
        return REQUIRED
    if isinstance(default, ast.Name):
        assigned = [
            each for each in body if isinstance(each, ast.Assign) and default.id in map(ast.unparse, each.targets)
        ]
        default = assigned[-1].value if assigned else default
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
