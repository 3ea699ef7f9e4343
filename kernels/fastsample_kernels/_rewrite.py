"""Finding what a kernel computes as one in the source of a module's ``forward``, and calling a helper instead.

Only what the text proves is touched: nobody may see the values in between, and what is evaluated earlier or later than
it was may change nothing. Found are

    v = self.norm(x); v = self.act(v)                   with v = v * (1 + scale) + shift between them, too
    self.norm(x) * (1 + scale) + shift                  in statements of its own, too, and as modulate(self.norm(x), ..)
    x = x + gate * branch; .. the second of x ..        with the product in a statement of its own, too
    a, b = x.chunk(2, dim=-1); .. a * self.act(b) ..

A statement of the second kind that follows an ``if`` is first moved to the end of each of its branches.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from . import _patterns as patterns

Guards = tuple[tuple[ast.expr, bool], ...]  # conditions around a piece of code, and what they have to be
_WATCHING = {"locals", "vars", "dir", "eval", "exec"}  # functions that see all names


class Wanted(NamedTuple):
    """What to look for, by attributes' names.

    Attributes:
        pairs: (norm, activation); None is the function ``F.silu``.
        norms: whose modulation the kernels compute with them.
        gates: activations of gated linear units.
    """

    pairs: frozenset[tuple[str, str | None]] = frozenset()
    norms: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()


class Site(NamedTuple):
    """A piece of code that calls a helper now.

    Attributes:
        kind: "pair", "modulate", "residual" or "gate".
        norm: attribute's name; None for a gate.
        activation: attribute's name, or the function's; None for a modulation, and for ``F.silu`` of a pair.
        guards: conditions around it.
    """

    kind: str
    norm: str | None
    activation: str | None
    guards: Guards


class Fused(NamedTuple):
    """A rewritten function, None where there is nothing to rewrite; what it calls; and (why, guards) for what looks
    like a pattern and is left."""

    forward: Callable[..., Any] | None
    sites: list[Site]
    missed: list[tuple[str, Guards]]


NOTHING = Fused(None, [], [])


def fused(function: Any, wanted: Wanted, helpers: Mapping[str, Callable[..., Any]]) -> Fused:
    """The function with its patterns replaced by calls of helpers.

    Args:
        function: a ``forward`` as the class has it.
        wanted: what to replace.
        helpers: called instead, ``norm`` and ``activation`` being attributes' names:
            "pair": ``(self, norm, activation, x, scale, shift)``;
            "modulate": ``(self, norm, x, one, scale[, shift])``;
            "modulate_each": ``(self, norm, x, *modulations)`` for a tuple, with (one, scale[, shift]) for each;
            "residual": ``(self, norm, x, a, b, one, scale[, shift])`` for (h, [modulated norm of h]), h = x + a * b;
            "gate": ``(self, x, activation, function)``, one of the last two None.
    """
    layers = 0
    while hasattr(function, "__wrapped__"):
        function, layers = function.__wrapped__, layers + 1
    definition = patterns.definition_of(function)
    # Decorators are applied anew; a layer that the source does not show would be lost.
    if definition is None or len(definition.decorator_list) != layers:
        return NOTHING
    parameters = definition.args.posonlyargs + definition.args.args
    if not parameters or parameters[0].arg != "self" or _binds(definition, "self"):
        return NOTHING
    rewriter = _Rewriter(wanted, function, definition)
    definition.body = rewriter.block(definition.body)
    if not rewriter.sites:
        return Fused(None, [], rewriter.missed)
    # Within a class of the name of the function's own, which private names (self.__name) are made with. That of a
    # class at the top does not hide the own one from the function.
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    owner = owner if owner.isidentifier() else "_"
    given = {_helper(name): helper for name, helper in helpers.items()} | {_KNOWN: tuple(rewriter.known)}
    outer = ast.parse(f"class {owner}:\n    def make({', '.join(given)}):\n        return None").body[0]
    assert isinstance(outer, ast.ClassDef)
    make = outer.body[0]
    assert isinstance(make, ast.FunctionDef)
    make.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.Module([outer], [])
    ast.fix_missing_locations(module)
    ast.increment_lineno(module, function.__code__.co_firstlineno - 1)
    made_names: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, made_names)
    made = made_names[owner].make(**given)
    inner = inspect.unwrap(made)
    inner.__defaults__, inner.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    inner.__qualname__ = made.__qualname__ = function.__qualname__
    return Fused(made, rewriter.sites, rewriter.missed)


_KNOWN = "__known__"


def _helper(name: str) -> str:
    return f"__{name}__"


def _call(helper: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(_helper(helper), ast.Load()), [ast.Name("self", ast.Load()), *args], [])


def _binds(definition: ast.FunctionDef, name: str) -> bool:
    found = (n for n in ast.walk(definition) if isinstance(n, ast.Name) and n.id == name)
    return any(not isinstance(n.ctx, ast.Load) for n in found)


class _Scope:
    """Who reads a function's names."""

    def __init__(self, definition: ast.FunctionDef) -> None:
        self._loads: dict[str, list[ast.Name]] = {}
        self._shared: set[str] = set()
        for node in ast.walk(definition):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Load, ast.Del)):
                self._loads.setdefault(node.id, []).append(node)
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                self._loads.setdefault(node.target.id, []).append(node.target)
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                self._shared.update(node.names)
            inner = isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp, ast.ClassDef)
            )
            if inner and node is not definition:
                self._shared.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        self.watched = not _WATCHING.isdisjoint(self._loads)

    def private(self, name: str, within: list[ast.stmt], loops: int) -> bool:
        """Whether what ``name`` holds between statements that follow each other is read by these alone."""
        if self.watched or name in self._shared:
            return False
        last = within[-1]
        if isinstance(last, ast.Return):
            return True
        if isinstance(last, ast.Assign) and any(
            isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
            for target in last.targets
            for n in ast.walk(target)
        ):
            return all(isinstance(t, (ast.Name, ast.Tuple)) for t in last.targets)
        inside = {id(n) for statement in within for n in patterns.loads(statement)}
        others = [n for n in self._loads.get(name, []) if id(n) not in inside]
        first = (within[0].lineno, within[0].col_offset)
        return not others or (not loops and all((n.lineno, n.col_offset) < first for n in others))


class _Rewriter:
    def __init__(self, wanted: Wanted, function: FunctionType, definition: ast.FunctionDef) -> None:
        self._wanted = wanted
        self._function = function
        self._scope = _Scope(definition)
        self._guards: Guards = ()
        self._loops = self._tries = 0
        # Names that hold the value of a norm somewhere.
        self._normed: dict[str, str] = {}
        for node in ast.walk(definition):
            found = patterns.call(node) if isinstance(node, ast.stmt) else None
            if found is not None and found[1] in wanted.norms:
                self._normed[found[0]] = found[1]
        self.sites: list[Site] = []
        self.missed: list[tuple[str, Guards]] = []
        self.known: list[Any] = []

    # -- statements --------------------------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """A list of statements, rewritten."""
        body = self._sunk(body)
        result: list[ast.stmt] = []
        i = 0
        while i < len(body):
            rest = body[i:]
            found = (
                self._residual(body, i)
                or self._pair(rest)
                or self._gate(rest)
                or self._each(rest)
                or self._conditional(rest)
            )
            if found is None and (self._apart(body, i) or self._across(body, i)):
                continue
            if found is None:
                self._inner(body[i])
                result.append(self._expressions(body[i]))
                i += 1
            else:
                replacement, used = found
                result += replacement
                i += used
        return result

    def _inner(self, statement: ast.stmt) -> None:
        """The blocks of a compound statement."""
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return
        outside = self._guards, self._loops, self._tries
        self._loops += isinstance(statement, (ast.For, ast.While))
        self._tries += isinstance(statement, ast.Try)
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if not isinstance(inner, list) or not inner:
                continue
            if isinstance(statement, ast.If):
                self._guards = (*outside[0], (statement.test, name == "body"))
            setattr(statement, name, self.block(inner))
        self._guards, self._loops, self._tries = outside

    def _expressions(self, statement: ast.stmt) -> ast.stmt:
        """The expressions of a statement itself, not those of its blocks."""
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return statement
        rewriter = _Expressions(self)
        for name, value in ast.iter_fields(statement):
            if isinstance(value, ast.expr):
                setattr(statement, name, rewriter.visit(value))
        return statement

    def _sunk(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Move what belongs to a norm, after an ``if``, to the end of its branches, where one ends in a norm."""
        result: list[ast.stmt] = []
        for statement in body:
            if result and isinstance(result[-1], ast.If):
                ends = patterns.leaves(result[-1])
                if any(self._continues(leaf, statement) for leaf in ends):
                    for leaf in ends:
                        if not (
                            leaf and isinstance(leaf[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))
                        ):
                            leaf.append(copy.deepcopy(statement))
                    continue
            result.append(statement)
        return result

    def _continues(self, leaf: list[ast.stmt], statement: ast.stmt) -> bool:
        """Whether a branch ends in a norm that the statement activates or, where its condition holds, modulates."""
        act = patterns.activation(statement)
        if act is not None:
            variable, activation = act
            for last in (leaf[-1:], leaf[-2:-1] if leaf and patterns.scale_and_shift(leaf[-1]) else []):
                norm = patterns.call(last[0]) if last else None
                if norm is not None and norm[0] == variable and (norm[1], activation) in self._wanted.pairs:
                    return True
        norm = patterns.call(leaf[-1]) if leaf else None
        if norm is None or norm[1] not in self._wanted.norms:
            return False
        return _condition(statement, norm[0]) is not None

    def _pair(self, rest: list[ast.stmt]) -> tuple[list[ast.stmt], int] | None:
        """A norm and its activation."""
        norm = patterns.call(rest[0])
        if norm is None:
            return None
        variable, attribute, argument = norm
        after, scale, shift = rest[1:3], None, None
        modulation = patterns.scale_and_shift(after[0]) if after else None
        if modulation is not None and modulation[0] == variable:
            scale, shift = modulation[1:]
            after = after[1:]
        act = patterns.activation(after[0]) if after else None
        if act is None or act[0] != variable or (attribute, act[1]) not in self._wanted.pairs:
            return None
        self._found("pair", attribute, act[1])
        call = _call(
            "pair",
            ast.Constant(attribute),
            ast.Constant(act[1]),
            argument,
            scale or ast.Constant(None),
            shift or ast.Constant(None),
        )
        replaced = ast.copy_location(ast.Assign([ast.Name(variable, ast.Store())], call), rest[0])
        return [replaced], 3 if scale is not None else 2

    def _found(
        self, kind: str, norm: str | None, activation: str | None = None, *more: tuple[ast.expr, bool]
    ) -> None:
        self.sites.append(Site(kind, norm, activation, (*self._guards, *more)))

    # -- modulation --------------------------------------------------------------------------------------------

    def is_norm(self, expression: ast.expr) -> bool:
        """Whether an expression is a call of a norm."""
        own = patterns.own_call(expression)
        return own is not None and own[0] in self._wanted.norms

    def _conditional(self, rest: list[ast.stmt]) -> tuple[list[ast.stmt], int] | None:
        """``v = self.norm(x)`` and the statement that modulates v on a condition."""
        norm = patterns.call(rest[0])
        if norm is None or norm[1] not in self._wanted.norms or self._tries or len(rest) < 2:
            return None
        test, choice = _condition(rest[1], norm[0]), rest[1]
        if test is None or not isinstance(choice, ast.If) or not patterns.pure(norm[2]):
            return None
        otherwise = copy.deepcopy(rest[0])
        merged = self._merged(rest[0], choice.body[0])
        if merged is None:
            return None
        guards, self._guards = self._guards, (*self._guards, (test, True))
        body = self._expressions(merged)
        self._guards = guards
        return [ast.copy_location(ast.If(test, [body], [otherwise]), choice)], 2

    def _apart(self, body: list[ast.stmt], i: int) -> bool:
        """``v = self.norm(x)`` and, maybe after some that do nothing, the statement that modulates v: the norm goes
        there."""
        norm = patterns.call(body[i])
        if norm is None or norm[1] not in self._wanted.norms or self._tries:
            return False
        variable, _, argument = norm
        j = i + 1
        while j < len(body) and not self._consumes(body[j], variable):
            bound = patterns.pure_assignment(body[j])
            if bound is None or variable in bound or variable in patterns.names(body[j]):
                return False
            if bound & patterns.names(argument):
                return False
            j += 1
        if j == len(body) or (j > i + 1 and not patterns.pure(argument)):
            return False
        merged = self._merged(body[i], body[j])
        if merged is None:
            return False
        body[j] = merged
        del body[i]
        return True

    def _across(self, body: list[ast.stmt], i: int) -> bool:
        """``v = self.norm(x)`` and the statement that modulates v, with other norms between them: v becomes the
        modulated value at once."""
        norm = patterns.call(body[i])
        if norm is None or norm[1] not in self._wanted.norms or self._tries:
            return False
        variable, bound, j = norm[0], set[str](), i + 1
        while j < len(body) and not self._consumes(body[j], variable):
            other = patterns.call(body[j])
            if other is not None and other[1] in self._wanted.norms and patterns.pure(other[2]):
                changed: set[str] | None = {other[0]}
            else:
                changed = patterns.pure_assignment(body[j])
            if changed is None or variable in changed or variable in patterns.names(body[j]):
                return False
            bound |= changed
            j += 1
        if j == len(body):
            return False
        consumer = body[j]
        place = self._place_of(consumer, variable)
        if place is None or not self._scope.private(variable, [body[i], consumer], self._loops):
            return False
        m = _modulates(place, variable)
        parts = () if m is None else (m.scale, *(() if m.shift is None else (m.shift,)))
        reads = [n for n in patterns.loads(consumer) if n.id == variable]
        if len(reads) != 1 or not all(map(patterns.pure, parts)) or bound & patterns.names(place):
            return False
        assert isinstance(consumer, (ast.Assign, ast.Return))
        assert consumer.value is not None
        consumer.value = _Replace({id(place): ast.Name(variable, ast.Load())}).visit(consumer.value)
        target: Any = patterns.assignment(body[i])
        value = _Replace({id(reads[0]): target[1]}).visit(place)
        body[i] = ast.copy_location(ast.Assign([ast.Name(variable, ast.Store())], value), body[i])
        return True

    def _place_of(self, consumer: ast.stmt, variable: str) -> ast.expr | None:
        """Where a statement modulates v, before it does anything else."""
        if not isinstance(consumer, (ast.Assign, ast.Return)):
            return None
        return _place(consumer.value, lambda e: _modulates(e, variable) or self._function_of(e, variable))

    def _consumes(self, statement: ast.stmt, variable: str) -> bool:
        return self._place_of(statement, variable) is not None

    def _merged(self, norm: ast.stmt, consumer: ast.stmt) -> ast.stmt | None:
        """The statement that modulates v with the call of the norm in the place of v."""
        found = patterns.call(norm)
        assert found is not None
        variable, _, argument = found
        modulated = self._place_of(consumer, variable)
        if modulated is None or not self._scope.private(variable, [norm, consumer], self._loops):
            return None
        assert isinstance(consumer, (ast.Assign, ast.Return))
        assert consumer.value is not None
        reads = [n for n in patterns.loads(consumer) if n.id == variable]
        devices = [
            n.value
            for n in ast.walk(modulated)
            if isinstance(n, ast.Attribute) and n.attr == "device" and isinstance(n.value, ast.Name)
        ]
        other = [n for n in reads if not any(n is d for d in devices)]
        if len(other) != 1 or (len(reads) > 1 and not isinstance(argument, ast.Name)):
            return None
        target: Any = patterns.assignment(norm)
        replacements = {id(n): copy.deepcopy(argument) for n in reads} | {id(other[0]): target[1]}
        merged = copy.copy(consumer)
        merged.value = _Replace(replacements).visit(consumer.value)
        return merged

    def _function_of(self, expression: ast.expr, variable: str) -> bool:
        match expression:
            case ast.Call(func=ast.Name() | ast.Attribute(), args=args) if any(
                isinstance(a, ast.Name) and a.id == variable for a in args
            ):
                bound = self.bound(expression, lambda e: isinstance(e, ast.Name) and e.id == variable)
                return isinstance(bound, patterns.Modulation)
        return False

    def bound(
        self, expression: ast.Call, normed: Callable[[ast.expr], bool]
    ) -> patterns.Modulation | str | None:
        """A call of a function that is a modulation, as that; why not, where it looks like one."""
        function = patterns.resolved(expression.func, self._function)
        keywords = {k.arg: k.value for k in expression.keywords}
        if not isinstance(function, FunctionType) or None in keywords:
            return None
        if any(isinstance(a, ast.Starred) for a in expression.args):
            return None
        if not any(map(normed, (*expression.args, *keywords.values()))):
            return None
        found = patterns.modulate(function)
        if not isinstance(found, patterns.Modulate):
            return found
        values = dict(zip(found.parameters, expression.args, strict=False)) | keywords
        if len(expression.args) + len(keywords) != len(values) or set(values) != set(found.parameters):
            return None
        if not normed(values[found.normed]):
            return None
        if not all(patterns.pure(value) for name, value in values.items() if name != found.normed):
            return None

        def given(part: ast.expr | None) -> ast.expr | None:
            if part is None:
                return None
            part = copy.deepcopy(part)
            return _Replace({id(n): copy.deepcopy(values[n.id]) for n in patterns.loads(part)}).visit(part)

        scale = given(found.scale)
        assert scale is not None
        return patterns.Modulation(values[found.normed], found.one, scale, given(found.shift))

    def _each(self, rest: list[ast.stmt]) -> tuple[list[ast.stmt], int] | None:
        """``v = self.norm(x)`` and several statements that modulate v, each its own way."""
        norm = patterns.call(rest[0])
        if norm is None or norm[1] not in self._wanted.norms or self._tries:
            return None
        variable, attribute, argument = norm
        targets: list[str] = []
        modulations: list[ast.expr] = []
        for statement in rest[1:]:
            found = patterns.assignment(statement)
            m = None if found is None else _modulates(found[1], variable)
            if found is None or m is None or found[0] in targets:
                break
            parts = [m.scale, *([] if m.shift is None else [m.shift])]
            if not all(map(patterns.pure, parts)) or not patterns.names(*parts).isdisjoint(
                [variable, *targets]
            ):
                break
            targets.append(found[0])
            modulations.append(ast.Tuple([m.one, *parts], ast.Load()))
            if found[0] == variable:
                break
        used = 1 + len(targets)
        if len(targets) < 2 or not self._scope.private(variable, rest[:used], self._loops):
            return None
        self._found("modulate", attribute)
        call = _call(
            "modulate_each", ast.Constant(attribute), _Expressions(self).visit(argument), *modulations
        )
        names: list[ast.expr] = [ast.Name(name, ast.Store()) for name in targets]
        return [ast.copy_location(ast.Assign([ast.Tuple(names, ast.Store())], call), rest[0])], used

    def modulated(self, m: patterns.Modulation) -> ast.expr | None:
        """The call that computes a modulation of a norm's call."""
        own = patterns.own_call(m.normed)
        assert own is not None
        parts = [m.scale, *([] if m.shift is None else [m.shift])]
        if not all(map(patterns.pure, parts)):
            return None
        self._found("modulate", own[0])
        return _call("modulate", ast.Constant(own[0]), _Expressions(self).visit(own[1]), m.one, *parts)

    def miss(self, expression: ast.expr) -> None:
        """Note a modulation of a norm's value that is left."""
        inside = [self._normed[n.id] for n in patterns.loads(expression) if n.id in self._normed]
        inside += [own[0] for n in ast.walk(expression) if (own := _own(n)) and own[0] in self._wanted.norms]
        if inside:
            why = f"{inside[0]} and its modulation stay apart: what is between them may be seen or changed"
            self.missed.append((why, self._guards))

    # -- gated residual ----------------------------------------------------------------------------------------

    def _residual(self, body: list[ast.stmt], i: int) -> tuple[list[ast.stmt], int] | None:
        """``x = x + gate * branch`` and the modulated norm of x in the next statement."""
        total = self._gated_sum(body, i)
        if total is None or self._tries or self._scope.watched:
            return None
        name, x, factors, used = total
        if i + used == len(body):
            return None
        self._apart(body, i + used)
        consumer = body[i + used]
        if not isinstance(consumer, (ast.Assign, ast.Return)) or consumer.value is None:
            return None
        place = _place(consumer.value, lambda e: self._modulated_norm(e, name) is not None, patterns.pure)
        found = None if place is None else self._modulated_norm(place, name)
        if place is None or found is None:
            return None
        own = patterns.own_call(found.normed)
        assert own is not None
        parts = [found.scale, *([] if found.shift is None else [found.shift])]
        self._found("residual", own[0])
        call = _call("residual", ast.Constant(own[0]), x, *factors, found.one, *parts)
        target = ast.Name(name, ast.Store())
        alone = patterns.assignment(consumer)
        if isinstance(place, ast.BinOp) and alone is not None and alone[1] is place and alone[0] != name:
            result = ast.List([ast.Name(alone[0], ast.Store())], ast.Store())
            both = ast.Assign([ast.Tuple([target, result], ast.Store())], call)
            return [self._expressions(ast.copy_location(both, body[i]))], used + 1
        # In a list, so that the value lives no longer than it did.
        held = f"__value{len(self.sites)}__"
        both = ast.Assign([ast.Tuple([target, ast.Name(held, ast.Store())], ast.Store())], call)
        statement: ast.stmt = self._expressions(ast.copy_location(both, body[i]))
        pop = ast.Call(ast.Attribute(ast.Name(held, ast.Load()), "pop", ast.Load()), [], [])
        if isinstance(place, ast.Call):
            kept = ast.Assign([ast.Name(held, ast.Store())], ast.List([copy.deepcopy(place)], ast.Load()))
            otherwise = [*body[i : i + used], ast.copy_location(kept, consumer)]
            chosen = ast.If(self._same(place), [statement], otherwise)
            statement = ast.copy_location(chosen, body[i])
        consumer.value = _Replace({id(place): pop}).visit(consumer.value)
        return [statement], used

    def _gated_sum(
        self, body: list[ast.stmt], i: int
    ) -> tuple[str, ast.expr, tuple[ast.expr, ast.expr], int] | None:
        """``h = x + a * b``, in one statement or two, as (h, x, (a, b), how many)."""
        first = patterns.assignment(body[i])
        if first is None:
            return None
        terms = patterns.terms(first[1])
        for x, product in (terms, terms[::-1]) if terms else ():
            factors = patterns.factors(product)
            if isinstance(x, ast.Name) and factors is not None:
                a, b = copy.deepcopy(factors)
                return first[0], x, (a, b), 1
        factors = patterns.factors(first[1])
        second = patterns.assignment(body[i + 1]) if i + 1 < len(body) else None
        terms = None if factors is None or second is None else patterns.terms(second[1])
        if factors is None or second is None or terms is None:
            return None
        for x, product in (terms, terms[::-1]):
            if not isinstance(x, ast.Name) or not isinstance(product, ast.Name):
                continue
            if product.id == first[0] != x.id and self._scope.private(first[0], body[i : i + 2], self._loops):
                a, b = copy.deepcopy(factors)
                return second[0], x, (a, b), 2
        return None

    def _modulated_norm(self, expression: ast.expr, name: str) -> patterns.Modulation | None:
        """A modulation of ``self.norm(name)`` that reads ``name`` nowhere else."""

        def normed(e: ast.expr) -> bool:
            own = patterns.own_call(e)
            return self.is_norm(e) and own is not None and isinstance(own[1], ast.Name) and own[1].id == name

        if isinstance(expression, ast.Call):
            bound = self.bound(expression, normed)
            found = bound if isinstance(bound, patterns.Modulation) else None
        else:
            found = patterns.modulation(expression, normed)
        if found is None:
            return None
        parts = [found.scale, *([] if found.shift is None else [found.shift])]
        return found if all(map(patterns.pure, parts)) and name not in patterns.names(*parts) else None

    def _same(self, call: ast.Call) -> ast.expr:
        """Whether the name of a function that is a modulation still means it."""
        self.known.append(patterns.resolved(call.func, self._function))
        known = ast.Subscript(ast.Name(_KNOWN, ast.Load()), ast.Constant(len(self.known) - 1), ast.Load())
        return ast.Compare(copy.deepcopy(call.func), [ast.Is()], [known])

    # -- gated linear units ------------------------------------------------------------------------------------

    def _gate(self, rest: list[ast.stmt]) -> tuple[list[ast.stmt], int] | None:
        """Halves and their product, one of them activated."""
        found = patterns.halves(rest[0], self._function)
        if found is None or len(rest) < 2:
            return None
        consumer = rest[1]
        if not isinstance(consumer, (ast.Assign, ast.Return)) or consumer.value is None:
            return None
        hidden, gate, x = found
        products = [
            n for n in _evaluated(consumer.value) if (act := self._product(n, hidden, gate)) is not None
        ]
        reads = [n for n in patterns.loads(consumer) if n.id in (hidden, gate)]
        if len(products) != 1:
            if any(self._product(n, gate, hidden) is not None for n in _evaluated(consumer.value)):
                self.missed.append(("its gate is the first half, the kernels' the second", self._guards))
            return None
        private = all(self._scope.private(name, rest[:2], self._loops) for name in (hidden, gate))
        if len(reads) != 2 or not private or self._tries:
            self.missed.append(("the halves of its gated linear unit may be seen by others", self._guards))
            return None
        act = self._product(products[0], hidden, gate)
        assert act is not None
        attribute, function = act
        self._found("gate", None, attribute or function)
        whole = ast.Name(hidden, ast.Load())
        call = _call("gate", whole, ast.Constant(attribute), ast.Constant(function))
        consumer.value = _Replace({id(products[0]): call}).visit(consumer.value)
        kept: list[ast.stmt] = []
        if not (isinstance(x, ast.Name) and x.id == hidden):
            kept = [ast.copy_location(ast.Assign([ast.Name(hidden, ast.Store())], x), rest[0])]
        return [*map(self._expressions, kept), self._expressions(consumer)], 2

    def _product(self, expression: ast.AST, hidden: str, gate: str) -> tuple[str | None, str | None] | None:
        """``hidden * activation(gate)`` as the activation's (attribute, function), one of them None."""
        match expression:
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                for value, activated in ((left, right), (right, left)):
                    if not isinstance(value, ast.Name) or value.id != hidden:
                        continue
                    own = patterns.own_call(activated)
                    if own is not None and isinstance(own[1], ast.Name) and own[1].id == gate:
                        return (own[0], None) if own[0] in self._wanted.gates else None
                    found = patterns.gate(activated, self._function)
                    if found is not None and found[0] == gate:
                        return None, found[1]
        return None


def _own(node: ast.AST) -> tuple[str, ast.expr] | None:
    return patterns.own_call(node) if isinstance(node, ast.expr) else None


def _modulates(expression: ast.expr, variable: str) -> patterns.Modulation | None:
    return patterns.modulation(expression, lambda e: isinstance(e, ast.Name) and e.id == variable)


def _condition(statement: ast.stmt, variable: str) -> ast.expr | None:
    """The condition of ``if ..: v = v * (1 + scale) + shift``, with nothing else in it."""
    match statement:
        case ast.If(test=test, body=[only], orelse=[]) if patterns.pure(
            test
        ) and variable not in patterns.names(test):
            found = patterns.assignment(only)
            if found is not None and found[0] == variable and _modulates(found[1], variable):
                return test
    return None


def _name(expression: ast.expr) -> bool:
    """A name or a constant, or an attribute of one."""
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return isinstance(expression, (ast.Name, ast.Constant))


def _place(
    expression: ast.expr | None,
    accepted: Callable[[ast.expr], Any],
    skipped: Callable[[ast.expr], bool] = _name,
) -> ast.expr | None:
    """The accepted part of an expression that is evaluated before everything else in it but what may be skipped."""
    if expression is None or accepted(expression):
        return expression
    parts: list[ast.expr] = []
    match expression:
        case ast.BinOp(left=left, right=right):
            parts = [left, right]
        case ast.Tuple(elts=elements):
            parts = elements
        case ast.Attribute(value=value) | ast.Subscript(value=value):
            parts = [value]
        case ast.Call(func=f, args=args):
            parts = [f, *args]
    for part in parts:
        found = _place(part, accepted, skipped)
        if found is not None:
            return found
        if not skipped(part):
            return None
    return None


def _evaluated(expression: ast.expr) -> list[ast.AST]:
    """The parts of an expression that are evaluated with it, once."""
    result: list[ast.AST] = [expression]
    for node in result:
        if not isinstance(node, _LATER):
            result += ast.iter_child_nodes(node)
    return result


_LATER = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _Replace(ast.NodeTransformer):
    """Other nodes in the place of some, by identity."""

    def __init__(self, replacements: dict[int, ast.expr]) -> None:
        self._replacements = replacements

    def visit(self, node: ast.AST) -> Any:
        return self._replacements.get(id(node)) or self.generic_visit(node)


class _Expressions(ast.NodeTransformer):
    """Modulations of a norm's call within an expression."""

    def __init__(self, rewriter: _Rewriter) -> None:
        self._rewriter = rewriter

    def visit(self, node: ast.AST) -> Any:
        return node if isinstance(node, _LATER) else super().visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        found = patterns.modulation(node, self._rewriter.is_norm)
        call = None if found is None else self._rewriter.modulated(found)
        if call is not None:
            return ast.copy_location(call, node)
        missed = patterns.modulation(node, lambda e: not isinstance(e, ast.Constant))
        if (
            missed is not None
            and missed.shift is not None
            and (found is None or not patterns.pure(found.scale))
        ):
            self._rewriter.miss(missed.normed)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        found = self._rewriter.bound(node, self._rewriter.is_norm)
        if isinstance(found, str):
            self._rewriter.missed.append((found, self._rewriter._guards))
        if not isinstance(found, patterns.Modulation):
            return self.generic_visit(node)
        call = self._rewriter.modulated(found)
        if call is None:
            return self.generic_visit(node)
        # The name may mean another function by then.
        return ast.copy_location(ast.IfExp(self._rewriter._same(node), call, copy.deepcopy(node)), node)
