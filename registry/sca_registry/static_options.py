"""The options of a factory, read from its source text: nothing is run, so that looking at a part costs nothing."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sca_registry.options import REQUIRED


def read_source_options(factory: str, num_positional: int) -> dict[str, Any] | None:
    """`options.read_options` of "module:name" without importing the module; its parent packages are.

    None where the text does not tell: a factory that is made rather than written, or a class that has its `__init__`
    from elsewhere.
    """
    module, _, name = factory.partition(":")
    module_spec = find_spec(module)
    if module_spec is None or not str(module_spec.origin).endswith(".py"):
        return None
    body = ast.parse(Path(str(module_spec.origin)).read_text("utf-8")).body
    definition = _find_definition(body, name)
    if isinstance(definition, ast.ClassDef):
        is_plain_class = not (definition.bases or definition.keywords or definition.decorator_list)
        definition = _find_definition(definition.body, "__init__")
        if definition is None and is_plain_class:
            return {}
        num_positional += 1  # self
    if not isinstance(definition, ast.FunctionDef):
        return None
    signature = definition.args
    positional = [*signature.posonlyargs, *signature.args]
    defaults = [*[None] * (len(positional) - len(signature.defaults)), *signature.defaults]
    arguments = [*positional[num_positional:], *signature.kwonlyargs]
    defaults = [*defaults[num_positional:], *signature.kw_defaults]
    return {
        argument.arg: _evaluate_default(default, body) for argument, default in zip(arguments, defaults, strict=True)
    }


def _find_definition(body: list[ast.stmt], name: str) -> ast.stmt | None:
    node_types = (ast.ClassDef, ast.FunctionDef)
    return next((each for each in body if isinstance(each, node_types) and each.name == name), None)


def _evaluate_default(default: ast.expr | None, body: list[ast.stmt]) -> Any:
    """A default, a constant of its module included; what would have to be computed stays text."""
    if default is None:
        return REQUIRED
    if isinstance(default, ast.Name):
        assignments = [
            each for each in body if isinstance(each, ast.Assign) and default.id in map(ast.unparse, each.targets)
        ]
        default = assignments[-1].value if assignments else default
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
