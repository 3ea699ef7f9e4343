"""``patch`` and ``unpatch``: the kernels put into a model and taken out again.

Only ``forward`` of single modules is replaced, by giving them a subclass of their class with the same name:
parameters, buffers, ``state_dict`` and the modules themselves stay, copies and replicas run with their own weights,
and a pickled model is the unpatched one. Where a kernel cannot take a call (a CPU tensor, hooks, a shape), the
module's own code runs. Attention is taken over only when asked for, by standing in for PyTorch's function while the
forward of a module that calls it runs: whatever the module or its processor does around that call stays.
"""

from __future__ import annotations

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
    attending_forward,
    group_norm_forward,
    is_group_norm,
    rows_forward,
    rows_norm,
    run_pair,
    sequential_forward,
)
from ._rewrite import fused

_MARK = "_fastsample_patched"  # on an instance: whether the forward of its patched class runs
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
    by SiLU (with a modulation in between, too) runs as one, where the source of the module that holds
    both, or the order of an ``nn.Sequential``, proves that nobody sees the values in between.

    Args:
        model: any module; already patched ones are patched anew.
        attention: whether modules that call PyTorch's ``scaled_dot_product_attention``, themselves or by their
            diffusers processor, run :func:`attention` in its place. Dropout and grouped queries stay with PyTorch.
            Off unless asked for: which of the two is faster has not been measured.

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
        forward, pairs = _fuse(module)
        for norm in pairs:
            fused_norms.add(id(getattr(module, norm, None) if isinstance(norm, str) else norm))
        if forward is not None:
            forwards[module] = forward
            report.replaced[name or type(module).__name__] = f"{len(pairs)} group_norm + silu"
    for name, module in model.named_modules():
        if id(module) in fused_norms or module in forwards or _why_not(module) is not None:
            continue
        forward = _forward_of(module)
        if forward is not None:
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
        vars(module)[_MARK] = True
    return report


def unpatch(model: nn.Module) -> None:
    """Take the kernels out of a model; nothing to do where there are none.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module")
    for module in model.modules():
        vars(module).pop(_MARK, None)
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
        return (forward if getattr(self, _MARK, False) else cls.forward)(self, *args, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    content = {name: getattr(cls, name) for name in names} | {_BASE: cls, "forward": marked}
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
        state = {key: value for key, value in state.items() if key != _MARK}
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


@functools.cache
def _rewritten(forward: Any, pairs: frozenset[tuple[str, str | None]]) -> Any:
    return fused(forward, run_pair, lambda norm, act: (norm, act) in pairs)


def _fuse(module: nn.Module) -> tuple[Callable[..., Any] | None, list[Any]]:
    """A forward that fuses a module's pairs, if any; the group norms of these, by attribute or themselves."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        modules = list(module)
        pairs = [a for a, b in itertools.pairwise(modules) if is_group_norm(a) and type(b) is nn.SiLU]
        return (sequential_forward, pairs) if pairs else (None, [])
    children = dict(module.named_children())
    norms = [name for name, child in children.items() if is_group_norm(child)]
    if not norms:
        return None, []
    acts: list[str | None] = [None, *(name for name, child in children.items() if type(child) is nn.SiLU)]
    found = _rewritten(type(module).forward, frozenset((norm, act) for norm in norms for act in acts))
    if found is None:
        return None, []
    forward, pairs_found = found
    return forward, sorted({pair.norm for pair in pairs_found})
