"""What runs in the place of modules' own code: each takes a kernel where that computes the same, and else runs what
the modules would have run, to the bit.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _runtime as runtime
from ._replay import remembered
from .attention import attention as fused_attention
from .attention import supported as attention_supported
from .dit import Norm, gated_residual_norm, geglu, glu_supported, layer_norm, rms_norm, swiglu
from .dit import supported as rows_supported
from .group_norm import group_norm, supported

# Of a norm over the last axis: size of its rows unless any will do, weight, bias and eps.
Parts = tuple[int | None, Tensor | None, Tensor | None, float | None]


def plain(x: Tensor) -> bool:
    """Whether the module's own code runs at once: the commonest reason, found first."""
    return x.device.type == "cpu" and not runtime.INTERPRET


def shaped(x: Tensor) -> bool:
    """Whether a norm's kernel knows the axes of the input: (batch, ..., channels)."""
    return x.ndim >= 2


# -- group norm ------------------------------------------------------------------------------------------------


@remembered
def _grouped(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    scale: Any = None,
    shift: Any = None,
) -> Tensor | None:
    """``activation(norm(x) * (1 + scale) + shift)``, where the kernel takes it."""
    if not shaped(x):
        return None
    flat = [_per_channel(t, x) for t in (scale, shift)]
    known = all(f is not None or t is None for f, t in zip(flat, (scale, shift), strict=True))
    if not known or supported(x, weight, bias, *flat) is not None:
        return None
    return group_norm(x, num_groups, weight, bias, eps, activation=activation, scale=flat[0], shift=flat[1])


def group_norm_forward(self: nn.GroupNorm, input: Tensor) -> Tensor:
    """That of ``nn.GroupNorm``; the parameter's name is PyTorch's."""
    y = None if plain(input) else _grouped(input, self.num_groups, self.weight, self.bias, self.eps, None)
    return nn.GroupNorm.forward(self, input) if y is None else y


# -- norms over the last axis ----------------------------------------------------------------------------------


def _rows(x: Tensor, size: int | None, *parameters: Tensor | None) -> bool:
    """Whether the kernels take the rows of x, which are of this size unless it is None."""
    if not shaped(x):
        return False
    return (size is None or x.shape[-1] == size) and rows_supported(x, *parameters) is None


class LayerNorm:
    """``nn.LayerNorm``, and diffusers' FP32LayerNorm, whose arithmetic and types are those of the kernel anyway."""

    name = "layer_norm"
    kind: Norm = "layer"
    takes = staticmethod(_rows)

    @staticmethod
    def shape(norm: Any) -> tuple[int, ...]:
        return tuple(norm.normalized_shape)

    @staticmethod
    def parts(norm: Any) -> Parts:
        return norm.normalized_shape[0], norm.weight, norm.bias, norm.eps

    @staticmethod
    def run(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: Any,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        return layer_norm(x, weight, bias, eps, scale=scale, shift=shift)


def _eps(eps: float | None, x: Tensor) -> float:
    return runtime.rms_norm_eps(x.dtype, x.device.type) if eps is None else eps


class RMSNorm:
    """``nn.RMSNorm``."""

    name = "rms_norm"
    kind: Norm = "rms"
    takes = staticmethod(_rows)
    shape = staticmethod(LayerNorm.shape)

    @staticmethod
    def parts(norm: Any) -> Parts:
        return norm.normalized_shape[0], norm.weight, None, norm.eps

    @staticmethod
    def run(
        x: Tensor,
        weight: Tensor | None,
        bias: None,
        eps: float | None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        return rms_norm(x, weight, _eps(eps, x), scale=scale, shift=shift)


class DiffusersRMSNorm:
    """diffusers' RMSNorm: statistics in float32, and a result of the weight's type where that has 16 bits, of the
    wider of weight and input otherwise. The kernel's is that of the input, so all types have to be the same."""

    name = "rms_norm"
    kind: Norm = "rms"

    @staticmethod
    def shape(norm: Any) -> tuple[int, ...]:
        return tuple(norm.dim)

    @staticmethod
    def parts(norm: Any) -> Parts:
        weight = norm.weight
        return None if weight is None else weight.shape[0], weight, getattr(norm, "bias", None), norm.eps

    @staticmethod
    def takes(x: Tensor, size: int | None, weight: Tensor | None, bias: Tensor | None) -> bool:
        if not _rows(x, size, weight, bias):
            return False
        return x.dtype != torch.float64 and all(p is None or p.dtype == x.dtype for p in (weight, bias))

    @staticmethod
    def run(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        if scale is not None or shift is not None:
            if bias is None:
                return rms_norm(x, weight, eps, scale=scale, shift=shift)
            y = DiffusersRMSNorm.run(x, weight, bias, eps)
            y = y if scale is None else y * (1 + scale)
            return y if shift is None else y + shift
        # In the order of the axes in memory, as the module gives it: heads are often a transposed view.
        swapped = x.ndim == 4 and x.stride(1) < x.stride(2)
        if swapped:
            x = x.transpose(1, 2)
        if bias is not None:  # its gradient is summed over the samples: in float32
            bias = bias.to(runtime.accumulator(x.dtype)).expand(x.shape[0], -1)
        y = rms_norm(x, weight, eps, shift=bias)
        return y.transpose(1, 2) if swapped else y


# (module of the class, its name, what it is)
_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("torch.nn", "LayerNorm", LayerNorm),
    ("torch.nn", "RMSNorm", RMSNorm),
    ("diffusers.models.normalization", "FP32LayerNorm", LayerNorm),
    ("diffusers.models.normalization", "RMSNorm", DiffusersRMSNorm),
)


def rows_norm(module: nn.Module) -> Any | None:
    """Which norm over the last axis a module is: one of the classes above, or None. Subclasses with a forward of their
    own are none."""
    for place, name, norm in _ROWS:
        cls = getattr(sys.modules.get(place), name, None)
        if cls is not None and isinstance(module, cls) and type(module).forward is cls.forward:
            return norm
    return None


@functools.cache
def rows_forward(norm: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a norm over the last axis; ``own`` is that of its class."""
    parameter = own.__code__.co_varnames[1]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(parameter)
        alone = len(args) + len(kwargs) == 1
        y = _normed(norm, x, *norm.parts(self)) if alone and isinstance(x, Tensor) and not plain(x) else None
        return own(self, *args, **kwargs) if y is None else y

    forward.__name__ = norm.name
    forward.__dict__["rows"] = norm
    return forward


@remembered
def _normed(
    rows: Any,
    x: Tensor,
    size: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    *modulation: Any,
) -> Tensor | None:
    """``norm(x) * (1 + scale) + shift``, where the kernel takes it; modulation is empty, (scale,) or (scale, shift)."""
    if not rows.takes(x, size, weight, bias):
        return None
    vectors = [_vectors(p, x) for p in modulation]
    if any(p is None for p in vectors) or rows_supported(x, *vectors) is not None:
        return None
    return rows.run(x, weight, bias, eps, *vectors)


# -- modulation ------------------------------------------------------------------------------------------------

MARK = "_fastsample_patched"  # on an instance: whether the forward of its patched class runs
ROWS = "_fastsample_rows"  # on the patched class of a norm over the last axis: which one it is


def _vectors(p: Any, x: Tensor) -> Tensor | None:
    """A scale or shift as the kernels take it: for each sample or for each token, broadcast as PyTorch does it, and
    no wider than x, whose type the result has; None for all else."""
    if not isinstance(p, Tensor) or p.ndim != x.ndim or p.shape[-1] != x.shape[-1] or p.device != x.device:
        return None
    if p.dtype != x.dtype and torch.promote_types(x.dtype, p.dtype) != x.dtype:
        return None
    if p.shape == x.shape:
        return p
    if any(size != 1 for size in p.shape[1:-1]):
        return None
    if p.shape[0] == x.shape[0]:
        return p
    return p.expand(x.shape[0], *p.shape[1:]) if p.shape[0] == 1 else None


def _rows_of(norm: Any, x: Any) -> Any | None:
    """Which norm a module is that was patched and still is as it was, where x may be for the kernels."""
    if not isinstance(x, Tensor) or plain(x):
        return None
    rows = getattr(norm, ROWS, None)
    if rows is None or not getattr(norm, MARK, False) or runtime.hooked(norm) or "forward" in vars(norm):
        return None
    return rows


def _run_modulation(norm: Any, x: Any, *modulation: Any) -> Tensor | None:
    """``norm(x) * (1 + scale) + shift`` by one kernel, where the norm is still one that was patched."""
    rows = _rows_of(norm, x)
    return None if rows is None else _normed(rows, x, *rows.parts(norm), *modulation)


def _modulate(y: Any, one: Any, scale: Any, *shift: Any) -> Any:
    y = y * (one + scale)
    return y + shift[0] if shift else y


def run_modulation(self: nn.Module, norm: str, x: Any, *modulation: Any) -> Any:
    """``norm(x) * (one + scale) + shift``; modulation is (one, scale) or (one, scale, shift)."""
    module = getattr(self, norm)
    y = _run_modulation(module, x, *modulation[1:])
    return _modulate(module(x), *modulation) if y is None else y


def run_modulations(self: nn.Module, norm: str, x: Any, *modulations: tuple[Any, ...]) -> tuple[Any, ...]:
    """Several modulations of the same norm's value: each is cheaper with the norm than without it."""
    module = getattr(self, norm)
    results = []
    for modulation in modulations:
        y = _run_modulation(module, x, *modulation[1:])
        if y is None:
            break
        results.append(y)
    if len(results) < len(modulations):
        y = module(x)
        results += [_modulate(y, *modulation) for modulation in modulations[len(results) :]]
    return tuple(results)


def _run_residual(norm: Any, x: Any, a: Any, b: Any, *modulation: Any) -> tuple[Tensor, Tensor] | None:
    """h = x + a * b and its modulated norm by one kernel; one of a and b is the gate, the other of the shape of x."""
    rows = _rows_of(norm, x)
    return None if rows is None else _gated(rows, x, a, b, *rows.parts(norm), *modulation)


@remembered
def _gated(
    rows: Any,
    x: Tensor,
    a: Any,
    b: Any,
    size: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    *modulation: Any,
) -> tuple[Tensor, Tensor] | None:
    if (rows.kind == "rms" and bias is not None) or not rows.takes(x, size, weight, bias):
        return None
    vectors = [_vectors(p, x) for p in modulation]
    for gate, branch in ((_vectors(a, x), b), (_vectors(b, x), a)):
        if gate is None or not isinstance(branch, Tensor) or branch.shape != x.shape:
            continue
        if any(p is None for p in (_vectors(branch, x), *vectors)):
            continue
        if rows_supported(x, branch, gate, *vectors) is None:
            scale, shift = vectors if len(vectors) == 2 else (vectors[0], None)
            return gated_residual_norm(
                x, branch, gate, weight, bias, _eps(eps, x), scale=scale, shift=shift, norm=rows.kind
            )
    return None


def run_residual(
    self: nn.Module, norm: str, x: Any, a: Any, b: Any, *modulation: Any
) -> tuple[Any, list[Any]]:
    """``h = x + a * b`` and, in a list, ``norm(h) * (one + scale) + shift``."""
    found = _run_residual(getattr(self, norm), x, a, b, *modulation[1:])
    if found is not None:
        return found[0], [found[1]]
    h = x + a * b
    del x, a, b
    return h, [run_modulation(self, norm, h, *modulation)]


# -- gated linear units ----------------------------------------------------------------------------------------

METHODS: dict[Any, str] = {}  # methods that are an activation, and which


def activation_of(self: nn.Module, name: str) -> str | None:
    """What the kernels call the activation that an attribute of a module is now."""
    method = METHODS.get(getattr(type(self), name, None))
    if method is not None:
        return None if name in vars(self) else method
    module = getattr(self, name, None)
    if not isinstance(module, nn.Module) or runtime.hooked(module) or "forward" in vars(module):
        return None
    if type(module) is nn.SiLU:
        return None if module.inplace else "silu"
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return None


@remembered
def _gated_unit(x: Tensor, kind: str) -> Tensor | None:
    """``hidden * activation(gate)``, where the kernel takes it."""
    if not x.ndim or x.shape[-1] % 2 or glu_supported(x) is not None:
        return None
    return swiglu(x) if kind == "silu" else geglu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def run_gate(self: nn.Module, x: Any, name: str | None, function: str | None) -> Any:
    """``hidden * activation(gate)`` with ``hidden, gate = x.chunk(2, dim=-1)``."""
    if isinstance(x, Tensor) and not plain(x):
        kind = function if name is None else activation_of(self, name)
        y = None if kind is None else _gated_unit(x, kind)
        if y is not None:
            return y
    hidden, gate = x.chunk(2, dim=-1)
    if name is not None:
        return hidden * getattr(self, name)(gate)
    if function == "silu":
        return hidden * F.silu(gate)
    return hidden * F.gelu(gate, approximate="tanh" if function == "gelu_tanh" else "none")


# -- group norm and its activation ---------------------------------------------------------------------------


def is_group_norm(module: Any) -> bool:
    return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward


def _is_pair(norm: Any, activation: Any) -> bool:
    """Whether the kernel is what these two do now, one after the other: modules may be exchanged after patching."""
    if not is_group_norm(norm) or runtime.hooked(norm) or "forward" in vars(norm):
        return False
    if activation is F.silu:
        return True
    return (
        type(activation) is nn.SiLU and not runtime.hooked(activation) and "forward" not in vars(activation)
    )


def _run_pair(norm: Any, activation: Any, x: Any, scale: Any = None, shift: Any = None) -> Any:
    """``activation(norm(x) * (1 + scale) + shift)`` by one kernel, or by the modules themselves."""
    if isinstance(x, Tensor) and not plain(x) and _is_pair(norm, activation):
        y = _grouped(x, norm.num_groups, norm.weight, norm.bias, norm.eps, "silu", scale, shift)
        if y is not None:
            return y
    y = norm(x)
    if scale is not None:
        y = y * (1 + scale) + shift
    return activation(y)


def _per_channel(value: Any, x: Tensor) -> Tensor | None:
    """(N, C, 1, ..) as (N, C); None for other shapes, and numbers."""
    if not isinstance(value, Tensor) or value.ndim != x.ndim or value.numel() != x.shape[0] * x.shape[1]:
        return None
    return value.flatten(1) if value.shape[:2] == x.shape[:2] else None


def run_pair(self: nn.Module, norm: str, activation: str | None, x: Any, scale: Any, shift: Any) -> Any:
    act = F.silu if activation is None else getattr(self, activation)
    return _run_pair(getattr(self, norm), act, x, scale, shift)


def sequential_forward(self: nn.Sequential, input: Any) -> Any:
    modules = list(self)
    i = 0
    while i < len(modules):
        pair = i + 1 < len(modules) and is_group_norm(modules[i]) and type(modules[i + 1]) is nn.SiLU
        input = _run_pair(modules[i], modules[i + 1], input) if pair else modules[i](input)
        i += 2 if pair else 1
    return input


# -- attention -----------------------------------------------------------------------------------------------


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
    if not plain(query) and alike and dropout_p == 0:
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
def attending_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward during which :class:`_Attention` is active."""

    @functools.wraps(forward)
    def attending(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Attention():
            return forward(self, *args, **kwargs)

    return attending
