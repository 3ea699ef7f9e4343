"""The shapes of statements and expressions that :mod:`._rewrite` looks for in the source of a ``forward``."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

_SILU = {"F.silu", "nn.functional.silu", "torch.nn.functional.silu"}
# Methods of tensors that change nothing.
_PURE = {
    "chunk", "expand", "flatten", "float", "movedim", "permute", "reshape", "size", "split", "squeeze", "to",
    "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
_OF_MODULES = {"float", "to"}  # names that modules have, too, where they change the module


def definition_of(function: Any) -> ast.FunctionDef | None:
    """The source of a function, where it can be had."""
    if not isinstance(function, FunctionType) or function.__closure__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None
    definition = tree.body[0] if tree.body else None
    return definition if isinstance(definition, ast.FunctionDef) else None


def resolved(expression: ast.expr, function: FunctionType) -> Any:
    """What a global name, or one of a module's (``F.silu``), is; None for all else."""
    path: list[str] = []
    while isinstance(expression, ast.Attribute):
        path.append(expression.attr)
        expression = expression.value
    code = function.__code__
    if not isinstance(expression, ast.Name):
        return None
    if expression.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        return None
    value = function.__globals__.get(expression.id)
    for name in reversed(path):
        value = getattr(value, name, None) if isinstance(value, ModuleType) else None
    return value


# -- parts of expressions --------------------------------------------------------------------------------------


def loads(node: ast.AST) -> Iterator[ast.Name]:
    """The names that a piece of code reads."""
    return (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))


def names(*nodes: ast.AST | None) -> set[str]:
    """What :func:`loads` reads, by name."""
    return {name.id for node in nodes if node is not None for name in loads(node)}


def pure(expression: ast.expr) -> bool:
    """Whether evaluating an expression changes nothing, so that it may come a little earlier or later."""
    match expression:
        case ast.Name() | ast.Constant():
            return True
        case ast.Attribute(value=value):
            return pure(value)
        case ast.Subscript(value=value, slice=index):
            return pure(value) and pure(index)
        case ast.Slice(lower=lower, upper=upper, step=step):
            return all(part is None or pure(part) for part in (lower, upper, step))
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.BoolOp(values=parts):
            return all(map(pure, parts))
        case ast.UnaryOp(operand=value):
            return pure(value)
        case ast.BinOp(left=left, right=right):
            return pure(left) and pure(right)
        case ast.Compare(left=left, comparators=others):
            return all(map(pure, (left, *others)))
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=keywords):
            if name not in _PURE or (name in _OF_MODULES and isinstance(value, ast.Attribute)):
                return False
            return all(map(pure, (value, *args, *(k.value for k in keywords))))
    return False


def own_call(expression: ast.expr) -> tuple[str, ast.expr] | None:
    """``self.attribute(argument)`` as (attribute, argument)."""
    match expression:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr=attribute), args=[argument], keywords=[]
        ) if not isinstance(argument, ast.Starred):
            return attribute, argument
    return None


# -- statements ------------------------------------------------------------------------------------------------


def assignment(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """``v = value`` as (v, value)."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return name, value
    return None


def call(statement: ast.stmt) -> tuple[str, str, ast.expr] | None:
    """``v = self.attribute(argument)`` as (v, attribute, argument)."""
    found = assignment(statement)
    own = None if found is None else own_call(found[1])
    return None if found is None or own is None else (found[0], *own)


def activation(statement: ast.stmt) -> tuple[str, str | None] | None:
    """``v = self.attribute(v)`` as (v, attribute); ``v = F.silu(v)`` as (v, None)."""
    match statement:
        case ast.Assign(
            targets=[ast.Name(id=name)], value=ast.Call(func=f, args=[ast.Name(id=argument)], keywords=[])
        ) if name == argument:
            if ast.unparse(f) in _SILU:
                return name, None
            own = call(statement)
            return None if own is None else own[:2]
    return None


def scale_and_shift(statement: ast.stmt) -> tuple[str, ast.expr, ast.expr] | None:
    """``v = v * (1 + scale) + shift`` as (v, scale, shift), with names for scale and shift."""
    match statement:
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.BinOp(
                left=ast.BinOp(
                    left=ast.Name(id=name),
                    op=ast.Mult(),
                    right=ast.BinOp(left=ast.Constant(value=1), op=ast.Add(), right=ast.Name() as scale),
                ),
                op=ast.Add(),
                right=ast.Name() as shift,
            ),
        ) if name == target and name not in (scale.id, shift.id):  # they would be read before the norm
            return name, scale, shift
    return None


def leaves(statement: ast.If) -> list[list[ast.stmt]]:
    """The bodies of an if/elif/else chain, the missing else included."""
    if len(statement.orelse) == 1 and isinstance(statement.orelse[0], ast.If):
        return [statement.body, *leaves(statement.orelse[0])]
    return [statement.body, statement.orelse]


def pure_assignment(statement: ast.stmt) -> set[str] | None:
    """The names that a statement binds which does nothing else."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if pure(value):
            return {name}
        case ast.Assign(targets=[ast.Tuple(elts=parts)], value=value) if pure(value):
            if all(isinstance(part, ast.Name) for part in parts):
                return {part.id for part in parts if isinstance(part, ast.Name)}
    return None


# -- modulation ------------------------------------------------------------------------------------------------


class Modulation(NamedTuple):
    """``normed * (one + scale) + shift``, with the one as it is written; shift None where nothing is added."""

    normed: ast.expr
    one: ast.Constant
    scale: ast.expr
    shift: ast.expr | None


def _one(expression: ast.expr) -> bool:
    return (
        isinstance(expression, ast.Constant)
        and type(expression.value) in (int, float)
        and expression.value == 1
    )


def _only_adds_axes(index: ast.expr) -> bool:
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(part, ast.Constant) and part.value in (None, ...))
        or (isinstance(part, ast.Slice) and part.lower is part.upper is part.step is None)
        for part in parts
    )


def _gain(expression: ast.expr) -> tuple[ast.Constant, ast.expr] | None:
    """``1 + scale`` as (1, scale); axes that are added to the sum are added to the scale."""
    match expression:
        case ast.BinOp(left=ast.Constant() as one, op=ast.Add(), right=scale) if _one(one):
            return one, scale
        case ast.BinOp(left=scale, op=ast.Add(), right=ast.Constant() as one) if _one(one):
            return one, scale
        case ast.Subscript(value=value, slice=index) if _only_adds_axes(index):
            found = _gain(value)
            if found is not None:
                return found[0], ast.Subscript(found[1], index, ast.Load())
        case ast.Call(func=ast.Attribute(value=value, attr="unsqueeze"), args=[axis], keywords=[]) if pure(
            axis
        ):
            found = _gain(value)
            if found is not None:
                return found[0], ast.Call(ast.Attribute(found[1], "unsqueeze", ast.Load()), [axis], [])
    return None


def modulation(expression: ast.expr, normed: Callable[[ast.expr], bool]) -> Modulation | None:
    """A modulation of what ``normed`` accepts, in any order of its terms and factors."""
    if not isinstance(expression, ast.BinOp):
        return None
    left, right = expression.left, expression.right
    if isinstance(expression.op, ast.Add):
        for product, shift in ((left, right), (right, left)):
            found = modulation(product, normed)
            if found is not None and found.shift is None:
                return found._replace(shift=shift)
    if isinstance(expression.op, ast.Mult):
        for value, factor in ((left, right), (right, left)):
            gain = _gain(factor) if normed(value) else None
            if gain is not None:
                return Modulation(value, *gain, None)
    return None


class Modulate(NamedTuple):
    """A function that is a modulation of its parameters: their names in order, and which they are."""

    parameters: list[str]
    normed: str
    one: ast.Constant
    scale: ast.expr
    shift: ast.expr | None


def modulate(function: Any) -> Modulate | str | None:
    """A plain function as a modulation; why not, where it looks like one; None otherwise."""
    definition = definition_of(function)
    if definition is None:
        return None
    a = definition.args
    looks = any(_gain(node) is not None for node in ast.walk(definition) if isinstance(node, ast.expr))
    why = f"{definition.name}() is not just x * (1 + scale) + shift" if looks else None
    if definition.decorator_list or hasattr(function, "__wrapped__"):
        return why
    if a.posonlyargs or a.vararg or a.kwonlyargs or a.kwarg or a.defaults:
        return why
    parameters = [p.arg for p in a.args]
    body = [s for s in definition.body if not _is_text(s)]
    match body:
        case [ast.Return(value=ast.expr() as value)]:
            pass
        case [ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Return(value=ast.Name(id=other))]:
            if name != other:
                return why
        case _:
            return why
    found = modulation(value, lambda n: isinstance(n, ast.Name) and n.id in parameters)
    if found is None:
        return why
    assert isinstance(found.normed, ast.Name)
    rest = [part for part in (found.scale, found.shift) if part is not None]
    used = [found.normed.id, *(n.id for part in rest for n in loads(part))]
    if sorted(used) != sorted(parameters) or not all(map(pure, rest)):
        return why
    return Modulate(parameters, found.normed.id, found.one, found.scale, found.shift)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


# -- gated residual --------------------------------------------------------------------------------------------


def terms(expression: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """``a + b`` as (a, b)."""
    match expression:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return left, right
    return None


def factors(expression: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """``a * b`` as (a, b), where evaluating one of them does nothing else and neither binds a name."""
    match expression:
        case ast.BinOp(left=left, op=ast.Mult(), right=right) if pure(left) or pure(right):
            binds = any(isinstance(n, (ast.NamedExpr, ast.Await, ast.Yield)) for n in ast.walk(expression))
            return None if binds else (left, right)
    return None


# -- gated linear units ----------------------------------------------------------------------------------------


def halves(statement: ast.stmt, function: FunctionType) -> tuple[str, str, ast.expr] | None:
    """``a, b = x.chunk(2, dim=-1)`` as (a, b, x)."""
    match statement:
        case ast.Assign(
            targets=[ast.Tuple(elts=[ast.Name(id=a), ast.Name(id=b)])],
            value=ast.Call(func=f, args=args, keywords=keywords),
        ) if a != b:
            if isinstance(f, ast.Attribute) and f.attr == "chunk" and resolved(f, function) is None:
                args = [f.value, *args]
            elif resolved(f, function) is not torch.chunk:
                return None
            given = [*map(ast.unparse, args[1:]), *(f"{k.arg}={ast.unparse(k.value)}" for k in keywords)]
            if given in (["2", "-1"], ["2", "dim=-1"]):
                return a, b, args[0]
    return None


_ACTIVATIONS = {F.silu: "silu", F.gelu: "gelu"}


def gate(expression: ast.expr, function: FunctionType) -> tuple[str, str] | None:
    """``F.silu(v)`` and ``F.gelu(v)`` as (v, name of the kernel's activation)."""
    match expression:
        case ast.Call(func=f, args=[ast.Name(id=variable)], keywords=keywords):
            target = resolved(f, function)
            kind = _ACTIVATIONS.get(target) if callable(target) else None
            given = [(k.arg, k.value.value) for k in keywords if isinstance(k.value, ast.Constant)]
            if len(given) != len(keywords) or kind is None:
                return None
            if not given or given == [("approximate", "none")]:
                return (variable, kind) if kind == "gelu" or not given else None
            if kind == "gelu" and given == [("approximate", "tanh")]:
                return variable, "gelu_tanh"
    return None


def gate_method(function: Any) -> str | None:
    """The kernel's activation that a method ``(self, v)`` computes on every device but mps, or None."""
    if hasattr(function, "__wrapped__") or {"gelu", "silu"}.isdisjoint(function.__code__.co_names):
        return None
    definition = definition_of(function)
    if definition is None or definition.decorator_list:
        return None
    a = definition.args
    if a.posonlyargs or a.vararg or a.kwonlyargs or a.kwarg or a.defaults or len(a.args) != 2:
        return None
    variable = a.args[1].arg
    body = [s for s in definition.body if not _is_text(s)]
    on_mps = f"{variable}.device.type == 'mps'"
    while body and isinstance(body[0], ast.If) and not body[0].orelse:
        test = body[0].test
        parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
        if ast.unparse(parts[0]) != on_mps:
            return None
        body = body[1:]
    match body:
        case [ast.Return(value=ast.expr() as value)]:
            found = gate(value, function)
            return found[1] if found is not None and found[0] == variable else None
    return None
