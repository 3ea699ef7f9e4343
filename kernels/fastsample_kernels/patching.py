"""``patch`` and ``unpatch``: the kernels put into a model and taken out again.

Only ``forward`` of single modules is replaced, on the instance: parameters, buffers, ``state_dict`` and the
modules themselves stay. Where a kernel cannot take a call (a CPU tensor, hooks, a shape), the module's own code
runs. Attention is taken over only when asked for, by standing in for PyTorch's function while the forward of a
module that calls it runs: whatever the module or its processor does around that call stays.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
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

_MARK = "_fastsample_patched"


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
    fused_norms: set[int] = set()
    for name, module in model.named_modules():
        if "forward" in vars(module):
            report.kept[name or type(module).__name__] = "its forward was replaced already"
            continue
        pairs = _fuse(module)
        for norm in pairs:
            fused_norms.add(id(getattr(module, norm, None) if isinstance(norm, str) else norm))
        if pairs:
            report.replaced[name or type(module).__name__] = f"{len(pairs)} group_norm + silu"
    for name, module in model.named_modules():
        if id(module) in fused_norms or "forward" in vars(module):
            continue
        forward = _forward_of(module)
        if forward is not None:
            _set(module, forward)
            report.replaced[name or type(module).__name__] = forward.__name__.removeprefix("_")
        elif _is_a_norm(module):
            report.kept[name] = f"{type(module).__name__} is no norm that the kernels know"
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        if own is not None and _MARK not in vars(module):
            continue
        if _attends(module) and attention:
            _set(module, _attending(type(module).forward if own is None else own.__func__))
            before = report.replaced.get(name or type(module).__name__)
            report.replaced[name or type(module).__name__] = f"{before}, attention" if before else "attention"
        elif _attends(module):
            report.kept[name or type(module).__name__] = (
                "attention is PyTorch's; patch(model, attention=True) puts ours in"
            )
        elif hasattr(module, "processor") and hasattr(module, "to_q"):
            report.kept[name] = "its attention does not call PyTorch's scaled_dot_product_attention"
    return report


def unpatch(model: nn.Module) -> None:
    """Take the kernels out of a model; nothing to do where there are none."""
    for module in model.modules():
        if vars(module).pop(_MARK, False):
            vars(module).pop("forward", None)


def _set(module: nn.Module, forward: Callable[..., Any]) -> None:
    vars(module)[_MARK] = True
    vars(module)["forward"] = MethodType(forward, module)


def _runs_here(model: nn.Module) -> str | None:
    parameter = next(iter(model.parameters()), None)
    return None if parameter is None else runtime.why_not(parameter.new_empty(1))


def _plain(x: Tensor) -> bool:
    """Whether the module's own code runs at once: the commonest reason, found first."""
    return x.device.type == "cpu" and not runtime.INTERPRET


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


# -- single norms --------------------------------------------------------------------------------------------


def _group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    if _plain(x) or supported(x, self.weight, self.bias) is not None:
        return nn.GroupNorm.forward(self, x)
    return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    if _plain(x) or rows_supported(x, self.weight, self.bias) is not None:
        return nn.LayerNorm.forward(self, x)
    return layer_norm(x, self.weight, self.bias, self.eps)


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    if _plain(x) or rows_supported(x, self.weight) is not None:
        return nn.RMSNorm.forward(self, x)
    eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
    return rms_norm(x, self.weight, eps)


def _is_a_norm(module: nn.Module) -> bool:
    """For the report: a norm by its class, or by its name where it holds no other modules."""
    named = "Norm" in type(module).__name__ and not any(True for _ in module.children())
    return named or isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a norm that the kernels know; subclasses with a forward of their own stay."""
    for cls, forward in ((nn.GroupNorm, _group_norm), (nn.LayerNorm, _layer_norm), (nn.RMSNorm, _rms_norm)):
        if isinstance(module, cls) and type(module).forward is cls.forward:
            shape = getattr(module, "normalized_shape", (0,))
            return forward if len(shape) == 1 else None
    return None


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


def _run_pair(
    norm: nn.GroupNorm, activation: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """``activation(norm(x) * (1 + scale) + shift)`` by one kernel, or by the modules themselves."""
    hooked = _hooked(norm) or (isinstance(activation, nn.Module) and _hooked(activation))
    if not _plain(x) and not hooked:
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


def _per_channel(value: Tensor | None, x: Tensor) -> Tensor | None:
    """(N, C, 1, ..) as (N, C); None for other shapes."""
    if value is None or value.ndim != x.ndim or value.numel() != x.shape[0] * x.shape[1]:
        return None
    return value.flatten(1) if value.shape[:2] == x.shape[:2] else None


def _run_named(
    self: nn.Module, norm: str, activation: str | None, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    act = F.silu if activation is None else getattr(self, activation)
    return _run_pair(getattr(self, norm), act, x, scale, shift)


def _sequential(self: nn.Sequential, x: Any) -> Any:
    modules = list(self)
    i = 0
    while i < len(modules):
        pair = i + 1 < len(modules) and _is_group_norm(modules[i]) and type(modules[i + 1]) is nn.SiLU
        x = _run_pair(modules[i], modules[i + 1], x) if pair else modules[i](x)  # type: ignore[arg-type]
        i += 2 if pair else 1
    return x


@functools.cache
def _rewritten(forward: Any, pairs: frozenset[tuple[str, str | None]]) -> Any:
    return fused(forward, _run_named, lambda norm, act: (norm, act) in pairs)


def _fuse(module: nn.Module) -> list[Any]:
    """Fuse a module's pairs; the group norms that are run with their activation, by attribute or themselves."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        modules = list(module)
        pairs = [a for a, b in itertools.pairwise(modules) if _is_group_norm(a) and type(b) is nn.SiLU]
        if pairs:
            _set(module, _sequential)
        return pairs
    children = dict(module.named_children())
    norms = [name for name, child in children.items() if _is_group_norm(child)]
    if not norms:
        return []
    acts: list[str | None] = [None, *(name for name, child in children.items() if type(child) is nn.SiLU)]
    found = _rewritten(type(module).forward, frozenset((norm, act) for norm in norms for act in acts))
    if found is None:
        return []
    forward, pairs_found = found
    _set(module, forward)
    return sorted({pair.norm for pair in pairs_found})
