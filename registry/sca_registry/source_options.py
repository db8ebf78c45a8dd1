"""Options of a factory, read from its source code without importing it."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sca_registry.options import REQUIRED


def read_source_options(factory: str, num_positional: int) -> dict[str, Any] | None:
    """Read the options of a factory without importing its module; the parent packages are imported.

    Args:
        factory: Path of the factory, "package.module:name".
        num_positional: Number of leading parameters that are not options.

    Returns:
        Defaults by option as in `options.get_factory_options`, but a default that is not a literal is its source code.
        None if the options are not in the source code: the factory is not defined by a `def` or `class` statement, or
        its class inherits `__init__`.
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


def read_class_constant(factory: str, name: str) -> Any:
    """Read a constant of a class without importing its module; the parent packages are imported.

    Args:
        factory: Path of the class, "package.module:name".
        name: Name of the constant.

    Returns:
        The value; None if the factory is not a class of the module that sets the constant to a literal.
    """
    module, _, class_name = factory.partition(":")
    module_spec = find_spec(module)
    if module_spec is None or not str(module_spec.origin).endswith(".py"):
        return None
    definition = _find_definition(ast.parse(Path(str(module_spec.origin)).read_text("utf-8")).body, class_name)
    for statement in definition.body if isinstance(definition, ast.ClassDef) else ():
        if isinstance(statement, ast.Assign) and [name] == list(map(ast.unparse, statement.targets)):
            try:
                return ast.literal_eval(statement.value)
            except ValueError:
                return None
    return None


def _find_definition(body: list[ast.stmt], name: str) -> ast.stmt | None:
    node_types = (ast.ClassDef, ast.FunctionDef)
    return next((each for each in body if isinstance(each, node_types) and each.name == name), None)


def _evaluate_default(default: ast.expr | None, body: list[ast.stmt]) -> Any:
    """Evaluate a literal or a constant of the module; return the source code of any other default."""
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
