"""Small changes of a Python source, one at a time: what a test suite that guards the code should notice.

Operators, comparisons, numbers, branches, guards, dropped calls (``detach``, ``relu``, ``gather_with_grad``), swapped ones
(``amax``/``amin``, ``any``/``all``), exchanged arguments of ``where`` and statements left out. Docstrings, messages, logging,
annotations, exceptions and option tables are left alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Mutation", "functions", "mutations"]

_BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_SWAP = {
    "amax": "amin", "amin": "amax", "max": "min", "min": "max", "any": "all", "all": "any", "argmax": "argmin",
    "argmin": "argmax", "sum": "mean", "mean": "sum", "maximum": "minimum", "minimum": "maximum", "ceil": "floor",
    "floor": "ceil", "zeros_like": "ones_like", "ones_like": "zeros_like", "clamp_min": "clamp_max", "clamp_max": "clamp_min",
}  # fmt: skip
_DROP = {
    "abs", "clamp", "clamp_min", "detach", "exp", "flip", "log", "mean_over_ranks", "gather_with_grad", "normalize", "relu",
    "round", "rsqrt", "safe_normalise", "sigmoid", "softplus", "sort", "sorted", "sqrt", "square", "standardise",
}  # fmt: skip
_QUIET = {"option", "NnsslError", "ValueError", "TypeError", "warn", "warning", "info", "debug", "error", "register"}


@dataclass(frozen=True)
class Mutation:
    """One change: ``source`` is the whole changed file; ``where`` the function, ``line`` its first line in the original."""

    line: int
    where: str
    before: str
    after: str
    source: str

    @property
    def label(self) -> str:
        """What changed, without line numbers: it survives edits elsewhere in the file."""
        return f"{self.where}: {' '.join(self.before.split())} -> {' '.join(self.after.split())}"


def functions(source: str) -> dict[str, tuple[int, int]]:
    """First and last line of each function, by qualified name."""
    found: dict[str, tuple[int, int]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}" if prefix else child.name
                if not isinstance(child, ast.ClassDef):
                    found[name] = (child.body[0].lineno, child.end_lineno or child.lineno)
            visit(child, name)

    visit(ast.parse(source), "")
    return found


def mutations(source: str) -> list[Mutation]:
    """All changes of a source, in the order of its lines; each one compiles and differs from the others."""
    raw = source.encode()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    out, seen, original = [], set(), ast.dump(ast.parse(source))
    for node, changed, where in _changes(ast.parse(source)):
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        before = raw[first:last].decode()
        text = "pass" if changed is None else ast.unparse(ast.fix_missing_locations(changed))
        text = f"({text})" if isinstance(changed, ast.expr) and not isinstance(changed, _ATOMS) else text
        if "\n" in text:
            continue
        mutated = (raw[:first] + text.encode() + raw[last:]).decode()
        if mutated in seen or ast.dump(ast.parse(mutated)) == original:
            continue
        seen.add(mutated)
        out.append(Mutation(node.lineno, where, _line(before), _line(text), mutated))
    return sorted(out, key=lambda m: m.line)


_ATOMS = (ast.Call, ast.Name, ast.Attribute, ast.Constant, ast.Subscript)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST | None, str]]:
    """``(node, what stands in its place or None for ``pass``, qualified name)``."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[ast.AST, ast.AST | None, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}" if where else node.name
            for default in [] if isinstance(node, ast.ClassDef) else [*node.args.defaults, *node.args.kw_defaults]:
                if default is not None:
                    yield from visit(default, where)
            for child in node.body:
                yield from visit(child, where)
            return
        if _left_alone(node):
            return
        for changed in _replacements(node):
            yield node, changed, where
        if isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            yield node.test, ast.UnaryOp(ast.Not(), copy.deepcopy(node.test)), where
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "ctx", "op", "ops", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, where)

    for statement in tree.body:
        yield from visit(statement, "")


def _left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Global):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return True
    if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or _left_alone(node.value)):
        return True
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
        return True
    return isinstance(node, ast.Call) and (_name(node) in _QUIET or ast.unparse(node.func) == "super().__init__")


def _name(call: ast.Call) -> str:
    f = call.func
    return f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""


def _with(node: ast.AST, change: Callable[[ast.AST], None]) -> ast.AST:
    new = copy.deepcopy(node)
    change(new)
    return new


def _replacements(node: ast.AST) -> Iterator[ast.AST | None]:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield _with(node, lambda n: setattr(n, "op", _BINARY[type(n.op)]()))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        yield _with(node, lambda n: setattr(n, "ops", [_COMPARE[type(n.ops[0])]()]))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield _with(node, lambda n: setattr(n, "op", other()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.IfExp):
        yield _with(node, _exchange)
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield None
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Break):
        yield ast.Continue()


def _exchange(n: ast.IfExp) -> None:
    n.body, n.orelse = n.orelse, n.body


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
    elif isinstance(value, float):
        yield ast.Constant(1.0 if value == 0 else float(f"{value * (100 if abs(value) < 1e-3 else 1.5):.3g}"))


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    name = _name(node)
    if name in _SWAP:
        yield _with(node, lambda n: _rename(n, _SWAP[name]))
    if name in _DROP:
        method = isinstance(node.func, ast.Attribute) and not _module(node.func.value)
        inner = node.func.value if method else node.args[0] if node.args else None
        if inner is not None:
            yield copy.deepcopy(inner)
    if name == "where" and len(node.args) == 3:
        yield _with(node, lambda n: setattr(n, "args", [n.args[0], n.args[2], n.args[1]]))


def _module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in (
        "torch",
        "F",
        "np",
        "math",
        "losses",
        "masking",
        "geometry",
        "dist",
    )


def _rename(n: ast.Call, name: str) -> None:
    if isinstance(n.func, ast.Attribute):
        n.func.attr = name
    else:
        n.func = ast.Name(name)
