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

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _runtime as runtime
from ._rewrite import fused
from .attention import attention as fused_attention
from .attention import supported as attention_supported
from .dit import layer_norm, rms_norm
from .dit import supported as rows_supported
from .group_norm import group_norm, supported

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
            report.replaced[name or type(module).__name__] = forward.__name__.removeprefix("_")
        elif _is_a_norm(module):
            report.kept[name or type(module).__name__] = _why_no_kernel(module)
    for name, module in model.named_modules():
        if _why_not(module) is not None:
            continue
        if _attends(module) and attention:
            forwards[module] = _attending(forwards.get(module, type(module).forward))
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


def _plain(x: Tensor) -> bool:
    """Whether the module's own code runs at once: the commonest reason, found first."""
    return x.device.type == "cpu" and not runtime.INTERPRET


def _shaped(x: Tensor) -> bool:
    """Whether a norm's kernel knows the axes of the input: (batch, ..., channels)."""
    return x.ndim >= 2


# -- single norms --------------------------------------------------------------------------------------------
# The parameters' names are those of PyTorch.


def _group_norm(self: nn.GroupNorm, input: Tensor) -> Tensor:
    if _plain(input) or not _shaped(input) or supported(input, self.weight, self.bias) is not None:
        return nn.GroupNorm.forward(self, input)
    return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _layer_norm(self: nn.LayerNorm, input: Tensor) -> Tensor:
    if _plain(input) or not _shaped(input) or rows_supported(input, self.weight, self.bias) is not None:
        return nn.LayerNorm.forward(self, input)
    return layer_norm(input, self.weight, self.bias, self.eps)


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    if _plain(x) or not _shaped(x) or rows_supported(x, self.weight) is not None:
        return nn.RMSNorm.forward(self, x)
    eps = runtime.rms_norm_eps(x.dtype, x.device.type) if self.eps is None else self.eps
    return rms_norm(x, self.weight, eps)


def _is_a_norm(module: nn.Module) -> bool:
    """For the report: a norm by its class, or by its name where it holds no other modules."""
    named = "Norm" in type(module).__name__ and not any(True for _ in module.children())
    return named or isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))


_NORMS: tuple[tuple[type[nn.Module], Callable[..., Any]], ...] = (
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _rms_norm),
)


def _known(module: nn.Module) -> Callable[..., Any] | None:
    """The forward for a norm's class; subclasses with a forward of their own stay."""
    for cls, forward in _NORMS:
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return forward
    return None


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a norm that the kernels know."""
    return _known(module) if len(getattr(module, "normalized_shape", (0,))) == 1 else None


def _why_no_kernel(module: nn.Module) -> str:
    if _known(module) is None:
        return f"{type(module).__name__} is no norm that the kernels know"
    axes = len(module.normalized_shape)  # type: ignore[arg-type]
    return f"it normalises over {axes} axes, {tuple(module.normalized_shape)}; the kernels over the last"  # type: ignore[arg-type]


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


def _kernel_or_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention, by the kernels where these can take the call."""
    alike = query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    if not _plain(query) and alike and dropout_p == 0:
        q, k, v = runtime.autocast(query, key, value)
        if q.dtype == k.dtype == v.dtype and attention_supported(q, k, v, attn_mask) is None:
            return fused_attention(q, k, v, bias=attn_mask, is_causal=is_causal, scale=scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Attention(TorchFunctionMode):
    """While it is active, PyTorch's attention is :func:`_kernel_or_pytorch`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = _kernel_or_pytorch
        return func(*args, **(kwargs or {}))


@functools.cache
def _attending(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward during which :class:`_Attention` is active."""

    @functools.wraps(forward)
    def attending(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Attention():
            return forward(self, *args, **kwargs)

    return attending


# -- group norm and its activation ---------------------------------------------------------------------------


def _is_group_norm(module: Any) -> bool:
    return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward


def _is_pair(norm: Any, activation: Any) -> bool:
    """Whether the kernel is what these two do now, one after the other: modules may be exchanged after patching."""
    if not _is_group_norm(norm) or runtime.hooked(norm) or "forward" in vars(norm):
        return False
    if activation is F.silu:
        return True
    return (
        type(activation) is nn.SiLU and not runtime.hooked(activation) and "forward" not in vars(activation)
    )


def _run_pair(norm: Any, activation: Any, x: Any, scale: Any = None, shift: Any = None) -> Any:
    """``activation(norm(x) * (1 + scale) + shift)`` by one kernel, or by the modules themselves."""
    if isinstance(x, Tensor) and not _plain(x) and _shaped(x) and _is_pair(norm, activation):
        flat = [_per_channel(t, x) for t in (scale, shift)]
        known = all(f is not None or t is None for f, t in zip(flat, (scale, shift), strict=True))
        if known and supported(x, norm.weight, norm.bias, *flat) is None:
            return group_norm(
                x,
                norm.num_groups,
                norm.weight,
                norm.bias,
                norm.eps,
                activation="silu",
                scale=flat[0],
                shift=flat[1],
            )
    y = norm(x)
    if scale is not None:
        y = y * (1 + scale) + shift
    return activation(y)


def _per_channel(value: Any, x: Tensor) -> Tensor | None:
    """(N, C, 1, ..) as (N, C); None for other shapes, and numbers."""
    if not isinstance(value, Tensor) or value.ndim != x.ndim or value.numel() != x.shape[0] * x.shape[1]:
        return None
    return value.flatten(1) if value.shape[:2] == x.shape[:2] else None


def _run_named(self: nn.Module, norm: str, activation: str | None, x: Any, scale: Any, shift: Any) -> Any:
    act = F.silu if activation is None else getattr(self, activation)
    return _run_pair(getattr(self, norm), act, x, scale, shift)


def _sequential(self: nn.Sequential, input: Any) -> Any:
    modules = list(self)
    i = 0
    while i < len(modules):
        pair = i + 1 < len(modules) and _is_group_norm(modules[i]) and type(modules[i + 1]) is nn.SiLU
        input = _run_pair(modules[i], modules[i + 1], input) if pair else modules[i](input)
        i += 2 if pair else 1
    return input


@functools.cache
def _rewritten(forward: Any, pairs: frozenset[tuple[str, str | None]]) -> Any:
    return fused(forward, _run_named, lambda norm, act: (norm, act) in pairs)


def _fuse(module: nn.Module) -> tuple[Callable[..., Any] | None, list[Any]]:
    """A forward that fuses a module's pairs, if any; the group norms of these, by attribute or themselves."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        modules = list(module)
        pairs = [a for a, b in itertools.pairwise(modules) if _is_group_norm(a) and type(b) is nn.SiLU]
        return (_sequential, pairs) if pairs else (None, [])
    children = dict(module.named_children())
    norms = [name for name, child in children.items() if _is_group_norm(child)]
    if not norms:
        return None, []
    acts: list[str | None] = [None, *(name for name, child in children.items() if type(child) is nn.SiLU)]
    found = _rewritten(type(module).forward, frozenset((norm, act) for norm in norms for act in acts))
    if found is None:
        return None, []
    forward, pairs_found = found
    return forward, sorted({pair.norm for pair in pairs_found})
