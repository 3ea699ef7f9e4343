"""``patch`` and ``unpatch``: the kernels put into a model and taken out again.

Only ``forward`` of single modules is replaced, by giving them a subclass of their class with the same name:
parameters, buffers, ``state_dict`` and the modules themselves stay, copies and replicas run with their own weights,
and a pickled model is the unpatched one. Where a kernel cannot take a call (a CPU tensor, hooks, a shape), the
module's own code runs. Attention is taken over only when asked for, by standing in for PyTorch's function while the
forward of a module that calls it runs: whatever the module or its processor does around that call stays.
"""

from __future__ import annotations

import ast
import copy
import copyreg
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import _runtime as runtime
from ._forwards import (
    MARK,
    METHODS,
    ROWS,
    activation_of,
    attending_forward,
    group_norm_forward,
    is_group_norm,
    rows_forward,
    rows_norm,
    run_gate,
    run_modulation,
    run_modulations,
    run_pair,
    run_residual,
    sequential_forward,
)
from ._patterns import gate_method
from ._rewrite import Fused, Guards, Site, Wanted, fused

_BASE = "_fastsample_base"  # on a patched class: the class that it was made of


@dataclass
class Report:
    """What :func:`patch` did.

    Attributes:
        replaced: module name -> what runs there now.
        kept: module name -> why it stays as it is.
        runs_here: why the kernels would not run on the model's device, or None.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    runs_here: str | None = None

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for what in self.replaced.values():
            counts[what] = counts.get(what, 0) + 1
        lines = [f"{n} x {what}" for what, n in sorted(counts.items())] or ["nothing replaced"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name)
        lines += [
            f"kept {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''}): {why}"
            for why, names in sorted(reasons.items())
        ]
        if self.runs_here is not None:
            lines.append(f"here the modules' own code runs: {self.runs_here}")
        return "\n".join(lines)


def patch(model: nn.Module, *, attention: bool = False) -> Report:
    """Put the kernels into a model, in place; :func:`unpatch` takes them out.

    GroupNorm, LayerNorm and RMSNorm modules run the kernels where these can take the call. GroupNorm followed
    by SiLU (with a modulation in between, too), LayerNorm and RMSNorm followed by a modulation, and gated linear units
    run as one, where the source of the module that holds their parts, or the order of an ``nn.Sequential``, proves
    that nobody sees the values in between.

    Args:
        model: any module; already patched ones are patched anew.
        attention: whether modules that call PyTorch's ``scaled_dot_product_attention``, themselves or by their
            diffusers processor, run :func:`attention` in its place. Dropout and grouped queries stay with PyTorch.
            Off unless asked for: on an H200 cuDNN's, which PyTorch has too, was the fastest without a bias (and is
            what :func:`attention` runs there); whole networks were not measured with it.

    Returns:
        What was replaced and what not and why.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module")
    unpatch(model)
    report = Report(runs_here=_runs_here(model))
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    fused_norms: set[int] = set()
    for name, module in model.named_modules():
        why = _why_not(module)
        if why is not None:
            if _is_a_norm(module) or why != _PARAMETRIZED:
                report.kept[name or type(module).__name__] = why
            continue
        forward, what, norms, missed = _fuse(module)
        fused_norms.update(map(id, norms))
        if forward is not None:
            forwards[module] = forward
            report.replaced[name or type(module).__name__] = what
        if missed:
            report.kept[name or type(module).__name__] = "; ".join(sorted(set(missed)))
    for name, module in model.named_modules():
        if module in forwards or _why_not(module) is not None:
            continue
        forward = _forward_of(module)
        if forward is not None and id(module) in fused_norms:
            if not is_group_norm(module):
                forwards[module] = forward  # as a part of what is reported already
        elif forward is not None:
            forwards[module] = forward
            report.replaced[name or type(module).__name__] = forward.__name__.removesuffix("_forward")
        elif _is_a_norm(module):
            report.kept[name or type(module).__name__] = _why_no_kernel(module)
    for name, module in model.named_modules():
        if _why_not(module) is not None:
            continue
        if _attends(module) and attention:
            forwards[module] = attending_forward(forwards.get(module, type(module).forward))
            before = report.replaced.get(name or type(module).__name__)
            report.replaced[name or type(module).__name__] = f"{before}, attention" if before else "attention"
        elif _attends(module):
            report.kept[name or type(module).__name__] = (
                "attention is PyTorch's; patch(model, attention=True) puts ours in"
            )
        elif hasattr(module, "processor") and hasattr(module, "to_q"):
            report.kept[name] = "its attention does not call PyTorch's scaled_dot_product_attention"
    for module, forward in forwards.items():
        cls: Any = type(module)
        module.__class__ = _patched(cls, forward)
        vars(module)[MARK] = True
    return report


def unpatch(model: nn.Module) -> None:
    """Take the kernels out of a model; nothing to do where there are none.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module")
    for module in model.modules():
        vars(module).pop(MARK, None)
        if _BASE in vars(type(module)):
            module.__class__ = getattr(type(module), _BASE)


# -- the classes of patched modules --------------------------------------------------------------------------

_REPLACED = "its forward was replaced already"
_DERIVED = "its class was derived from a patched one (fully_shard, parametrize): patch after that"
_PARAMETRIZED = "it is parametrized, which needs its class as it is"


def _why_not(module: nn.Module) -> str | None:
    """Why a module's class cannot be replaced."""
    if "forward" in vars(module):
        return _REPLACED
    if hasattr(type(module), _BASE):
        return _DERIVED
    if "parametrizations" in module._modules:
        return _PARAMETRIZED
    return None


@functools.cache
def _patched(cls: Any, forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass that looks like its base, with another forward for instances that carry the mark."""

    @functools.wraps(forward)
    def marked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Without the mark in classes that others derived from this one, after unpatch.
        return (forward if getattr(self, MARK, False) else cls.forward)(self, *args, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    content = {name: getattr(cls, name) for name in names} | {_BASE: cls, "forward": marked}
    content |= {ROWS: forward.rows} if hasattr(forward, "rows") else {}
    if cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__:
        content |= {"__reduce_ex__": _reduce_ex}
        if not hasattr(cls, "__copy__"):
            content["__copy__"] = _copy
        if not hasattr(cls, "__deepcopy__"):
            content["__deepcopy__"] = _deepcopy
    return type(cls)(cls.__name__, (cls,), content)


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For pickles: a module of the class that can be imported, without the mark."""
    reduced: Any = object.__reduce_ex__(self, max(2, int(protocol)))
    state, *rest = reduced[2:]
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key != MARK}
    return (copyreg._reconstructor, (getattr(type(self), _BASE), object, None), state, *rest)  # type: ignore[attr-defined]


def _copied(self: nn.Module, transform: Callable[[Any], Any], new: nn.Module) -> nn.Module:
    reduced: Any = object.__reduce_ex__(self, 4)
    new.__setstate__(transform(reduced[2]))
    return new


def _copy(self: nn.Module) -> nn.Module:
    """A copy is patched too; what :mod:`copy` does with a class that has no ``__copy__``."""
    new = type(self).__new__(type(self))
    return _copied(self, lambda state: dict(state) if isinstance(state, dict) else state, new)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    memo[id(self)] = new = type(self).__new__(type(self))
    return _copied(self, lambda state: copy.deepcopy(state, memo), new)


def _runs_here(model: nn.Module) -> str | None:
    parameter = next(iter(model.parameters()), None)
    return None if parameter is None else runtime.why_not(parameter.new_empty(1))


# -- what is found in a model ---------------------------------------------------------------------------------


def _is_a_norm(module: nn.Module) -> bool:
    """For the report: a norm by its class, or by its name where it holds no other modules."""
    named = "Norm" in type(module).__name__ and not any(True for _ in module.children())
    return named or isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a norm that the kernels know."""
    if is_group_norm(module):
        return group_norm_forward
    norm = rows_norm(module)
    return (
        rows_forward(norm, type(module).forward)
        if norm is not None and len(norm.shape(module)) == 1
        else None
    )


def _why_no_kernel(module: nn.Module) -> str:
    norm = rows_norm(module)
    if norm is None:
        return f"{type(module).__name__} is no norm that the kernels know"
    shape = norm.shape(module)
    return f"it normalises over {len(shape)} axes, {shape}; the kernels over the last"


# -- attention -----------------------------------------------------------------------------------------------

_ATTENTION = {
    "scaled_dot_product_attention",
    "dispatch_attention_fn",
}  # the second calls the first (diffusers)


def _attends(module: nn.Module) -> bool:
    """Whether the code of a module's forward, or of its processor, names PyTorch's attention."""
    processor = getattr(module, "processor", None)
    functions = [type(module).forward, *([] if processor is None else [type(processor).__call__])]
    codes = (getattr(inspect.unwrap(function), "__code__", None) for function in functions)
    return any(code is not None and not _ATTENTION.isdisjoint(code.co_names) for code in codes)


# -- forwards that are rewritten -------------------------------------------------------------------------------

_HELPERS: dict[str, Callable[..., Any]] = {
    "pair": run_pair,
    "modulate": run_modulation,
    "modulate_each": run_modulations,
    "residual": run_residual,
    "gate": run_gate,
}


@functools.cache
def _rewritten(forward: Any, wanted: Wanted) -> Fused:
    return fused(forward, wanted, _HELPERS)


def _fuse(module: nn.Module) -> tuple[Callable[..., Any] | None, str, list[nn.Module], list[str]]:
    """A forward that computes by one kernel what a module does in several, if any; what it fuses; the norms in that;
    and why what looks like more is left."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        modules = list(module)
        pairs = [a for a, b in itertools.pairwise(modules) if is_group_norm(a) and type(b) is nn.SiLU]
        return (
            (sequential_forward, f"{len(pairs)} group_norm + silu", pairs, [])
            if pairs
            else (None, "", [], [])
        )
    wanted = _wanted(module)
    if not wanted.pairs and not wanted.norms and "chunk" not in _names_in_forward(type(module)):
        return None, "", [], []
    found = _rewritten(type(module).forward, wanted)
    sites = [site for site in found.sites if not _never(module, site.guards)]
    missed = [why for why, guards in found.missed if not _never(module, guards)]
    counts = dict.fromkeys((_said(module, site) for site in sites), 0)
    pairs_seen: set[str | None] = set()
    for site in sites:
        counts[_said(module, site)] += site.kind != "pair" or site.norm not in pairs_seen
        pairs_seen.add(site.norm)
    norms = [getattr(module, site.norm) for site in sites if site.norm is not None]
    said = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    return found.forward if sites else None, said, norms, missed


def _wanted(module: nn.Module) -> Wanted:
    children = dict(module.named_children())
    acts: list[str | None] = [None, *(name for name, child in children.items() if type(child) is nn.SiLU)]
    pairs = ((name, act) for name, child in children.items() if is_group_norm(child) for act in acts)
    norms = (
        name
        for name, child in children.items()
        if rows_norm(child) is not None and _forward_of(child) is not None and _why_not(child) is None
    )
    cls: Any = type(module)
    names = (*children, *_gate_methods(cls))
    gates = (name for name in names if activation_of(module, name) is not None)
    return Wanted(frozenset(pairs), frozenset(norms), frozenset(gates))


def _names_in_forward(cls: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return () if code is None else code.co_names


@functools.cache
def _gate_methods(cls: Any) -> list[str]:
    """Methods that a class's forward may call and that are an activation."""
    found = []
    for name in _names_in_forward(cls):
        method = inspect.getattr_static(cls, name, None)
        if inspect.isfunction(method) and (kind := gate_method(method)) is not None:
            METHODS[method] = kind
            found.append(name)
    return found


def _said(module: nn.Module, site: Site) -> str:
    """What a site is called in the report."""
    if site.kind == "pair":
        return "group_norm + silu"
    if site.kind in ("modulate", "residual"):
        first = "residual + " if site.kind == "residual" else ""
        return first + f"{rows_norm(getattr(module, site.norm or '')).name} + modulate"  # type: ignore[union-attr]
    activation = site.activation or ""
    return "swiglu" if (activation_of(module, activation) or activation) == "silu" else "geglu"


def _never(module: nn.Module, guards: Guards) -> bool:
    """Whether a module's attributes, compared with texts, say that a piece of its code does not run."""
    return any(_truth(module, test) is (not value) for test, value in guards)


def _truth(module: nn.Module, test: ast.expr) -> bool | None:
    """A condition's value, where it is the same from call to call for all we know."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = _truth(module, operand)
            return None if value is None else not value
        case ast.BoolOp(op=op, values=parts):
            values = [_truth(module, part) for part in parts]
            decides = isinstance(op, ast.Or)
            if decides in values:
                return decides
            return None if None in values else not decides
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            owner, _, name = ast.unparse(left).partition(".")
            value = vars(module).get(name)
            try:
                other = ast.literal_eval(right)
            except ValueError:
                return None
            if owner != "self" or not isinstance(value, str):
                return None
            if isinstance(op, (ast.Eq, ast.NotEq)) and isinstance(other, str):
                return (value == other) is isinstance(op, ast.Eq)
            if isinstance(op, (ast.In, ast.NotIn)) and isinstance(other, (list, tuple, set)):
                return (value in other) is isinstance(op, ast.In)
    return None
