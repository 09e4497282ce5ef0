"""What ``--list`` says of the objectives, read from their source: importing them would import torch, which takes seconds.

Only what a listing needs is evaluated: the config dataclass that ``@register`` names, a few class attributes, and the constants
in them, followed through imports within this package. Where that cannot be done the objectives are imported.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
LIGHT = ("nnssl.config", "nnssl.errors")
"""Modules of this package that import nothing heavy: they are imported as usual."""
SHOWN = ("title", "citation", "presets", "default_transfer", "transfer_reason")
UNREADABLE = (NameError, TypeError, ValueError, AttributeError, LookupError, OSError, SyntaxError)


class _Opaque:
    """Stands for what is not evaluated: functions, classes, what other packages give."""


def outlines() -> dict[str, Any]:
    """Name -> object with the attributes ``name``, ``Config`` and :data:`SHOWN` of an objective, sorted by name."""
    try:
        found = {outline.name: outline for outline in _read_all()}
        if not found:
            raise LookupError("no objectives")
    except UNREADABLE:
        from nnssl.pretrain.methods import list_methods

        return dict(list_methods())
    return dict(sorted(found.items()))


def source_value(module: str, name: str) -> Any:
    """What a name at the top level of one of this package's modules means: a constant or a config dataclass.

    The module is imported only where that cannot be read from its source.
    """
    try:
        found = _value(module, name)
    except UNREADABLE:
        found = _Opaque()
    return getattr(import_module(module), name) if isinstance(found, _Opaque) else found


def _read_all() -> Iterator[SimpleNamespace]:
    folder = ROOT / "pretrain" / "methods"
    for file in sorted(folder.rglob("*.py")):
        if "@register(" not in file.read_text(encoding="utf-8"):
            continue
        module = ".".join(("nnssl", *file.relative_to(ROOT).with_suffix("").parts))
        for node in _module(module).values():
            call = _registered(node)
            if isinstance(node, ast.ClassDef) and call is not None:
                (config,) = (_evaluate(module, k.value) for k in call.keywords if k.arg == "config")
                if not isinstance(config, type):
                    raise TypeError(f"{module}: the config of {node.name} cannot be read")
                yield SimpleNamespace(name=ast.literal_eval(call.args[0]), Config=config, **_shown(module, node))


def _registered(node: ast.AST) -> ast.Call | None:
    """The decorator ``@register(...)`` of a class."""
    calls = (d for d in getattr(node, "decorator_list", ()) if isinstance(d, ast.Call))
    return next((c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "register"), None)


def _shown(module: str, node: ast.ClassDef) -> dict[str, Any]:
    """Values of :data:`SHOWN` in a class, or in those of this package that it inherits from."""
    found: dict[str, Any] = {}
    for base in reversed(node.bases):
        base = base.value if isinstance(base, ast.Subscript) else base  # Method[Config]
        if isinstance(base, ast.Name):
            where, _, inherited = _definition(module, base.id)
            found |= _shown(where, inherited) if isinstance(inherited, ast.ClassDef) else {}
    return found | {k: _evaluate(module, v) for k, v in _assignments(node.body) if k in SHOWN}


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and value is not None:
            yield from ((t.id, value) for t in targets if isinstance(t, ast.Name))


@cache
def _module(name: str) -> dict[str, ast.AST]:
    """What a module's top level binds: name -> the statement, or the value that is assigned."""
    path = ROOT.joinpath(*name.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    bound: dict[str, ast.AST] = dict(_assignments(body))
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update({(a.asname or a.name).split(".")[0]: node for a in node.names})
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            bound[node.name] = node
    return bound


def _definition(module: str, name: str) -> tuple[str, str, ast.AST]:
    """Where and under which name it is defined, and the statement: an import where that is elsewhere or in :data:`LIGHT`."""
    node = _module(module)[name]
    while isinstance(node, ast.ImportFrom):
        source, original = node.module or "", _original(node, name)
        if source in LIGHT or not source.startswith("nnssl.") or original not in _module(source):
            break
        module, name = source, original
        node = _module(module)[name]
    return module, name, node


def _original(node: ast.ImportFrom, name: str) -> str:
    return next(a.name for a in node.names if (a.asname or a.name) == name)


@cache
def _value(module: str, name: str) -> Any:
    """What a name of a module's top level means."""
    module, name, node = _definition(module, name)
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        known = source in LIGHT or source.split(".")[0] in sys.stdlib_module_names
        return getattr(import_module(source), _original(node, name)) if known else _Opaque()
    if isinstance(node, ast.expr):
        return _evaluate(module, node)
    if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.dump(d) for d in node.decorator_list):
        return _Opaque()
    body = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    fields: Any = {f: getattr(node, f) for f in node._fields}
    config = ast.ClassDef(**{**fields, "body": body or [ast.Pass()]})
    scope = _scope(module, config)
    code = compile(ast.fix_missing_locations(ast.Module([config], [])), module, "exec", annotations.compiler_flag)
    exec(code, scope)  # this package's own source
    return scope[name]


def _evaluate(module: str, node: ast.expr) -> Any:
    return eval(compile(ast.Expression(node), module, "eval"), _scope(module, node))  # this package's own source


def _scope(module: str, node: ast.AST) -> dict[str, Any]:
    """The names that a statement uses, evaluated."""
    used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    known = {n: _value(module, n) for n in used if n in _module(module)}
    return {"__name__": __name__, "__builtins__": builtins, **known}  # dataclasses look for the module
