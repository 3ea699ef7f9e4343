"""Finding a normalisation that feeds an activation in the source of a module's ``forward``, and fusing the two.

Only what the text proves is touched: two consecutive assignments ``v = self.norm(x)``, ``v = self.act(v)`` (or
with ``v = v * (1 + scale) + shift`` between them), after which nobody can see the values in between. An
activation that follows an ``if`` is first moved to the end of each of its branches.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

_HELPER = "__fused__"
_SILU = {"F.silu", "nn.functional.silu", "torch.nn.functional.silu"}

# (norm, activation or None for F.silu) by their attributes' names -> whether to fuse
Wanted = Callable[[str, str | None], bool]


class Pair(NamedTuple):
    """A normalisation and its activation, by attribute; None is the function ``F.silu``."""

    norm: str
    activation: str | None


def fused(
    function: Any, helper: Callable[..., Any], wanted: Wanted
) -> tuple[Callable[..., Any], list[Pair]] | None:
    """The function with its pairs replaced by ``helper(self, norm, activation, x, scale, shift)``.

    Args:
        function: a ``forward`` as the class has it.
        helper: called instead of a pair; ``norm`` and ``activation`` are attributes' names.
        wanted: which pairs to replace.

    Returns:
        The new function and the pairs, or None where there is none or the source cannot be had.
    """
    layers = 0
    while hasattr(function, "__wrapped__"):
        function, layers = function.__wrapped__, layers + 1
    if not isinstance(function, FunctionType) or function.__closure__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None
    definition = tree.body[0]
    # Decorators are applied anew; a layer that the source does not show would be lost.
    if not isinstance(definition, ast.FunctionDef) or len(definition.decorator_list) != layers:
        return None
    rewriter = _Rewriter(wanted)
    definition.body = rewriter.block(definition.body)
    if not rewriter.pairs:
        return None
    # Within a class of the name of the function's own, which private names (self.__name) are made with. That of a
    # class at the top does not hide the own one from the function.
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    owner = owner if owner.isidentifier() else "_"
    outer = ast.parse(f"class {owner}:\n    def make({_HELPER}):\n        return None").body[0]
    assert isinstance(outer, ast.ClassDef)
    make = outer.body[0]
    assert isinstance(make, ast.FunctionDef)
    make.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.Module([outer], [])
    ast.fix_missing_locations(module)
    ast.increment_lineno(module, function.__code__.co_firstlineno - 1)
    names: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, names)
    made = names[owner].make(helper)
    inner = inspect.unwrap(made)
    inner.__defaults__, inner.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    inner.__qualname__ = made.__qualname__ = function.__qualname__
    return made, rewriter.pairs


class _Rewriter:
    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.pairs: list[Pair] = []

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """A list of statements, rewritten."""
        body = self._sunk(body)
        for statement in body:
            for name in ("body", "orelse", "finalbody"):
                inner = getattr(statement, name, None)
                if (
                    isinstance(inner, list)
                    and inner
                    and not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
                ):
                    setattr(statement, name, self.block(inner))
        result: list[ast.stmt] = []
        i = 0
        while i < len(body):
            found = self._match(body[i : i + 3])
            if found is None:
                result.append(body[i])
                i += 1
            else:
                replacement, used = found
                result.append(replacement)
                i += used
        return result

    def _sunk(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Move an activation after an ``if`` to the end of its branches, where one of them ends in a norm."""
        result: list[ast.stmt] = []
        for statement in body:
            if result and isinstance(result[-1], ast.If):
                act = _activation(statement)
                if act is not None and any(self._ends_in(leaf, act) for leaf in _leaves(result[-1])):
                    for leaf in _leaves(result[-1]):
                        if not (
                            leaf and isinstance(leaf[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))
                        ):
                            leaf.append(copy.deepcopy(statement))
                    continue
            result.append(statement)
        return result

    def _ends_in(self, leaf: list[ast.stmt], act: tuple[str, str | None]) -> bool:
        variable, activation = act
        for last in (leaf[-1:], leaf[-2:-1] if leaf and _modulation(leaf[-1]) else []):
            norm = _call(last[0]) if last else None
            if norm is not None and norm[0] == variable and self._wanted(norm[1], activation):
                return True
        return False

    def _match(self, window: list[ast.stmt]) -> tuple[ast.stmt, int] | None:
        norm = _call(window[0])
        if norm is None:
            return None
        variable, attribute, argument = norm
        rest, scale, shift = window[1:], None, None
        modulation = _modulation(rest[0]) if rest else None
        if modulation is not None and modulation[0] == variable:
            scale, shift = modulation[1:]
            rest = rest[1:]
        act = _activation(rest[0]) if rest else None
        if act is None or act[0] != variable or not self._wanted(attribute, act[1]):
            return None
        self.pairs.append(Pair(attribute, act[1]))
        call = ast.Call(
            ast.Name(_HELPER, ast.Load()),
            [
                ast.Name("self", ast.Load()),
                ast.Constant(attribute),
                ast.Constant(act[1]),
                argument,
                scale or ast.Constant(None),
                shift or ast.Constant(None),
            ],
            [],
        )
        replaced = ast.copy_location(ast.Assign([ast.Name(variable, ast.Store())], call), window[0])
        return replaced, 3 if scale is not None else 2


def _leaves(statement: ast.If) -> list[list[ast.stmt]]:
    """The bodies of an if/elif/else chain, the missing else included."""
    if len(statement.orelse) == 1 and isinstance(statement.orelse[0], ast.If):
        return [statement.body, *_leaves(statement.orelse[0])]
    return [statement.body, statement.orelse]


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """``v = value`` as (v, value)."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            return target.id, statement.value
    return None


def _call(statement: ast.stmt) -> tuple[str, str, ast.expr] | None:
    """``v = self.attribute(argument)`` as (v, attribute, argument)."""
    found = _assignment(statement)
    if found is None or not isinstance(found[1], ast.Call):
        return None
    call, f = found[1], found[1].func
    own = isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "self"
    if not own or call.keywords or len(call.args) != 1 or isinstance(call.args[0], ast.Starred):
        return None
    assert isinstance(f, ast.Attribute)
    return found[0], f.attr, call.args[0]


def _activation(statement: ast.stmt) -> tuple[str, str | None] | None:
    """``v = self.attribute(v)`` as (v, attribute); ``v = F.silu(v)`` as (v, None)."""
    found = _assignment(statement)
    if found is None or not isinstance(found[1], ast.Call):
        return None
    call = found[1]
    if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Name):
        return None
    if call.args[0].id != found[0]:
        return None
    if ast.unparse(call.func) in _SILU:
        return found[0], None
    own = _call(statement)
    return None if own is None else (own[0], own[1])


def _modulation(statement: ast.stmt) -> tuple[str, ast.expr, ast.expr] | None:
    """``v = v * (1 + scale) + shift`` as (v, scale, shift), with names for scale and shift."""
    found = _assignment(statement)
    if found is None:
        return None
    match found[1]:
        case ast.BinOp(
            left=ast.BinOp(
                left=ast.Name(id=name),
                op=ast.Mult(),
                right=ast.BinOp(left=ast.Constant(value=1), op=ast.Add(), right=ast.Name() as scale),
            ),
            op=ast.Add(),
            right=ast.Name() as shift,
        ) if name == found[0] and name not in (scale.id, shift.id):  # they would be read before the norm
            return name, scale, shift
    return None
