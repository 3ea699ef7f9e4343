"""Pieces of a transformer block of a diffusion network (Peebles & Xie 2023, "DiT"), each in one pass over memory:

    layer_norm, rms_norm      y = norm(x) (1 + scale) + shift
    gated_residual_norm       h = x + gate * branch,  y = norm(h) (1 + scale) + shift
    norm_rope, qk_norm_rope   y = rotate(rms_norm(x))
    geglu, swiglu             y = hidden * activation(gate),  (hidden, gate) = x.chunk(2, -1)

with ``norm(x) = (x - mean) / sqrt(var + eps) * weight + bias`` over the last axis, or, for rms_norm,
``x / sqrt(mean(x^2) + eps) * weight``. Arithmetic is float32 whatever the tensors are. Layers: reference, tiles,
operators, functions; the Triton functions are in ``_dit_kernels.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime as runtime
from ._replay import remembered, replayed

Activation = Literal["gelu", "gelu_tanh", "silu"]
Norm = Literal["layer", "rms"]
MAX_DIM = 16384


# --- references: plain torch, what runs where Triton does not ---------------------------------------------------


def reference_norm(
    x: Tensor,
    norm: Norm,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """:func:`layer_norm` or :func:`rms_norm`; scale and shift broadcast against x."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    if norm == "layer":
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return y.to(x.dtype)


def reference_gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    norm: Norm,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gated_residual_norm`; gate, scale and shift broadcast against x."""
    h = (x + (branch if gate is None else gate * branch)).to(x.dtype)
    return h, reference_norm(h, norm, weight, bias, eps, scale=scale, shift=shift)


def reference_norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: bool = True,
    interleaved: bool = True,
) -> Tensor:
    """:func:`norm_rope`; cos and sin broadcast against x."""
    if norm:
        u = F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    else:
        u = x if weight is None else x * weight.to(x.dtype)
    if interleaved:
        a, b = u.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = u.chunk(2, -1)
        rotated = torch.cat((-b, a), -1)
    return (u * cos + rotated * sin).to(x.dtype)


def reference_glu(x: Tensor, activation: Activation) -> Tensor:
    """:func:`geglu` or :func:`swiglu`."""
    hidden, gate = x.chunk(2, -1)
    if activation == "silu":
        return hidden * F.silu(gate)
    return hidden * F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


# --- tiles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """How a call is cut up.

    Attributes:
        rows, block: rows and columns of a tile; block is a power of two.
        warps: of a program.
        chunk: rows of a sample that one program of a backward pass sums over.
        span: heads that a program rotates by the same angles.
    """

    rows: int
    block: int
    warps: int
    chunk: int = 1
    span: int = 1


# Chosen by time on an H200 (benchmarks/results/kernels-h200.md), with 1152 columns and heads of 128.
_PROGRAMS = 1024  # of a backward pass, where there are rows enough
_FEWEST = 256  # programs, where there are rows enough
_NORM = 8192  # elements of a tile of the norms
_ROPE = 2048  # and of the rotation
_HEADS = 16  # of a program of the rotation
_SUMMED = 16  # elements of a thread that keeps three sums of each
_BLOCK = 512  # elements of a tile of the gated linear units


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_tiles(samples: int, length: int, dim: int, elements: int = 2048, per_thread: int = 32) -> Tiles:
    """Tiles of kernels that hold whole rows of ``dim``; a pure function, so nothing is tuned at run time.

    Args:
        samples: whose rows are summed apart (of batch, or of batch times heads).
        length: rows of a sample.
        dim: of a row.
        elements: of a tile, where a row has fewer.
        per_thread: elements of a thread.
    """
    block = max(16, _power_of_two(dim))
    enough = samples * length // _FEWEST
    rows = max(1, min(elements // block, _power_of_two(length), _power_of_two(enough + 1) // 2))
    chunk = max(4 * rows, -(-samples * length // _PROGRAMS))
    chunk = min(-(-chunk // rows) * rows, -(-length // rows) * rows)
    return Tiles(rows, block, max(1, min(16, rows * block // (32 * per_thread))), chunk)


def rope_tiles(batch: int, heads: int, length: int, dim: int) -> Tiles:
    """Tiles of the rotation: as many heads share the angles that a program loads as leave programs enough."""
    tiles = row_tiles(batch * heads, length, dim, _ROPE)
    programs = batch * heads * -(-length // tiles.rows)
    span = max(1, min(_HEADS, heads, programs // _PROGRAMS))
    return replace(tiles, span=span)


def glu_tiles(features: int) -> Tiles:
    """Tiles of the gated linear units, a part of one row each."""
    block = min(_BLOCK, max(16, _power_of_two(features)))
    return Tiles(1, block, max(1, block // 256))


# --- operators: norm ----------------------------------------------------------------------------------------------
# Tensors are (B, L, D); gate, scale and shift (B, D); weight and bias (D,), or (B, D) under vmap.


def _none(x: Tensor) -> Tensor:
    """An output that was not asked for."""
    return runtime.empty((0,), x.dtype, x.device)


@torch.library.custom_op("fastsample_kernels::norm", mutates_args=())
@replayed()
def _norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """h, empty without a branch, and y."""
    from ._dit_kernels import norm_forward_launch

    y = runtime.empty(x.shape, x.dtype, x.device)
    h = None if branch is None else runtime.empty(x.shape, x.dtype, x.device)
    with runtime.on_device(x):
        norm_forward_launch(
            x,
            branch,
            gate,
            weight,
            bias,
            scale,
            shift,
            eps,
            rms,
            h,
            y,
            row_tiles(x.shape[0], x.shape[1], x.shape[2], _NORM),
        )()
    return _none(x) if h is None else h, y


@torch.library.custom_op("fastsample_kernels::norm_backward", mutates_args=())
@replayed()
def _norm_backward(
    h: Tensor,
    dh: Tensor | None,
    dy: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of branch (empty without one), and sums (B, 3, D) over the rows of each sample of dy, dy xhat
    and dh branch (empty where nothing needs them)."""
    from ._dit_kernels import norm_backward_launch

    batch, length, dim = h.shape
    tiles = row_tiles(batch, length, dim, per_thread=_SUMMED)
    dx = runtime.empty(h.shape, h.dtype, h.device)
    dbranch = None if branch is None else runtime.empty(h.shape, branch.dtype, h.device)
    chunks = -(-length // tiles.chunk)
    partial = runtime.empty((batch, chunks, 3, dim), runtime.accumulator(h.dtype), h.device)
    with runtime.on_device(h):
        norm_backward_launch(
            dh, dy, h, branch, gate, weight, scale, eps, rms, sums, dx, dbranch, partial, tiles
        )()
    wanted = sums or gate is not None
    return dx, _none(h) if dbranch is None else dbranch, partial.sum(1) if wanted else _none(partial)


@_norm.register_fake
def _(x, branch, gate, weight, bias, scale, shift, eps, rms):
    return _none(x) if branch is None else x.new_empty(x.shape), x.new_empty(x.shape)


@_norm_backward.register_fake
def _(h, dh, dy, branch, gate, weight, scale, eps, rms, sums):
    wanted = sums or gate is not None
    acc = h.new_empty(0, dtype=runtime.accumulator(h.dtype))
    return (
        h.new_empty(h.shape),
        _none(h) if branch is None else branch.new_empty(h.shape),
        acc.new_empty((h.shape[0], 3, h.shape[2])) if wanted else acc,
    )


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, branch, gate, weight, bias, scale, shift, ctx.eps, ctx.rms = inputs
    ctx.save_for_backward(x if branch is None else output[0], branch, gate, weight, bias, scale, shift)


def _norm_gradients(ctx: Any, dh: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    h, branch, gate, weight, bias, scale, shift = ctx.saved_tensors
    if dh is None and dy is None:
        return (None,) * 9
    if branch is None:
        dh = None  # of the empty output
    if dy is None:
        dy = torch.zeros_like(h)
    runtime.refuse_duals("the gradient of norms", dh, dy, h, branch, gate, weight, bias, scale, shift)
    sums = any(ctx.needs_input_grad[3:7])
    dx, dbranch, total = _call_norm_backward(h, dh, dy, branch, gate, weight, scale, ctx.eps, ctx.rms, sums)
    dgate = dweight = dbias = dscale = dshift = None
    if gate is not None:
        dgate = total[:, 2].to(gate.dtype)
    if sums:
        # y = (xhat w + b) (1 + scale) + shift
        sum_dy, sum_dy_xhat = total[:, 0], total[:, 1]
        modulation = 1.0 if scale is None else 1 + scale.to(total.dtype)

        def reduced(gradient: Tensor, p: Tensor) -> Tensor:
            return (gradient.sum(0) if p.dim() == 1 else gradient).to(p.dtype)

        if weight is not None:
            dweight = reduced(sum_dy_xhat * modulation, weight)
        if bias is not None:
            dbias = reduced(sum_dy * modulation, bias)
        if scale is not None:
            dscale = sum_dy_xhat if weight is None else sum_dy_xhat * weight
            dscale = (dscale if bias is None else dscale + sum_dy * bias).to(scale.dtype)
        if shift is not None:
            dshift = sum_dy.to(shift.dtype)
    return dx, None if branch is None else dbranch, dgate, dweight, dbias, dscale, dshift, None, None


_call_norm = runtime.differentiable(_norm, _norm_gradients, _save_norm)
_call_norm_backward = runtime.differentiable(_norm_backward)
runtime.batched(_norm, "nnnppnn--")
runtime.batched(_norm_backward, "nnnnnpn---")


# --- operators: norm and rotary embedding -------------------------------------------------------------------------
# x is (B, H, L, D); cos and sin (B, L, D), expanded; weight (D,), or (B, D) under vmap.


def _rope_like(x: Tensor) -> Tensor:
    """An output in the order of the axes of x: (batch, length, heads, dim) in memory where x has that."""
    batch, heads, length, dim = x.shape
    if x.stride(1) < x.stride(2):
        return runtime.empty((batch, length, heads, dim), x.dtype, x.device).transpose(1, 2)
    return runtime.empty(x.shape, x.dtype, x.device)


@torch.library.custom_op("fastsample_kernels::norm_rope", mutates_args=())
@replayed()
def _rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: bool,
    interleaved: bool,
) -> tuple[Tensor]:
    from ._dit_kernels import rope_forward_launch

    y = _rope_like(x)
    tiles = rope_tiles(*x.shape)
    with runtime.on_device(x):
        rope_forward_launch(x, cos, sin, weight, eps, norm, interleaved, y, tiles)()
    return (y,)


@torch.library.custom_op("fastsample_kernels::norm_rope_backward", mutates_args=())
@replayed()
def _rope_backward(
    dy: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and of weight for each sample (empty without one)."""
    from ._dit_kernels import rope_backward_launch

    batch, heads, length, dim = x.shape
    tiles = row_tiles(batch * heads, length, dim, per_thread=16)
    dx = _rope_like(x)
    chunks = -(-length // tiles.chunk)
    shape = (batch, heads, chunks, dim) if weight is not None else (batch, heads, chunks, 0)
    partial = runtime.empty(shape, runtime.accumulator(x.dtype), x.device)
    with runtime.on_device(x):
        rope_backward_launch(dy, x, cos, sin, weight, eps, norm, interleaved, dx, partial, tiles)()
    return dx, _none(partial) if weight is None else partial.sum((1, 2))


@_rope.register_fake
def _(x, cos, sin, weight, eps, norm, interleaved):
    return (_rope_like(x),)


@_rope_backward.register_fake
def _(dy, x, cos, sin, weight, eps, norm, interleaved):
    shape = (0,) if weight is None else (x.shape[0], x.shape[3])
    return _rope_like(x), x.new_empty(shape, dtype=runtime.accumulator(x.dtype))


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, cos, sin, weight, ctx.eps, ctx.norm, ctx.interleaved = inputs
    ctx.save_for_backward(x, cos, sin, weight)


def _rope_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    x, cos, sin, weight = ctx.saved_tensors
    if dy is None:
        return (None,) * 7
    runtime.refuse_duals("the gradient of norm_rope", dy, x, weight)
    dx, dweight = _call_rope_backward(dy, x, cos, sin, weight, ctx.eps, ctx.norm, ctx.interleaved)
    if weight is None:
        return dx, None, None, None, None, None, None
    dweight = (dweight.sum(0) if weight.dim() == 1 else dweight).to(weight.dtype)
    return dx, None, None, dweight, None, None, None


_call_rope = runtime.differentiable(_rope, _rope_gradients, _save_rope)
_call_rope_backward = runtime.differentiable(_rope_backward)
runtime.batched(_rope, "nnnp---")
runtime.batched(_rope_backward, "nnnnp---")


# --- operators: gated linear units ----------------------------------------------------------------------------------
# x is (N, 2 F).


@torch.library.custom_op("fastsample_kernels::glu", mutates_args=())
@replayed()
def _glu(x: Tensor, activation: str) -> tuple[Tensor]:
    from ._dit_kernels import glu_forward_launch

    y = runtime.empty((x.shape[0], x.shape[1] // 2), x.dtype, x.device)
    with runtime.on_device(x):
        glu_forward_launch(x, activation, y, glu_tiles(y.shape[1]))()
    return (y,)


@torch.library.custom_op("fastsample_kernels::glu_backward", mutates_args=())
@replayed()
def _glu_backward(dy: Tensor, x: Tensor, activation: str) -> tuple[Tensor]:
    from ._dit_kernels import glu_backward_launch

    dx = runtime.empty(x.shape, x.dtype, x.device)
    with runtime.on_device(x):
        glu_backward_launch(dy, x, activation, dx, glu_tiles(dy.shape[1]))()
    return (dx,)


@_glu.register_fake
def _(x, activation):
    return (x.new_empty((x.shape[0], x.shape[1] // 2)),)


@_glu_backward.register_fake
def _(dy, x, activation):
    return (x.new_empty(x.shape),)


def _save_glu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _glu_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    if dy is None:
        return None, None
    runtime.refuse_duals("the gradient of gated linear units", dy, x)
    return _call_glu_backward(dy, x, ctx.activation)[0], None


_call_glu = runtime.differentiable(_glu, _glu_gradients, _save_glu)
_call_glu_backward = runtime.differentiable(_glu_backward)
runtime.batched(_glu, "n-")
runtime.batched(_glu_backward, "nn-")


# --- the functions --------------------------------------------------------------------------------------------------


def supported(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take a norm or rotation of ``x``'s rows with these tensors; None when they can."""
    reason = runtime.why_not(x, *others)
    if reason is not None:
        return reason
    if x.shape[-1] > MAX_DIM:
        return f"dim {x.shape[-1]} is above {MAX_DIM}"
    if runtime.unpack_duals([x, *others])[1] is not None:
        return "forward-mode tangents run in plain torch"
    return None


def _check_norm(
    x: Tensor, branch: Tensor | None, vectors: dict[str, Tensor | None], modulations: dict[str, Tensor | None]
) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point, (batch, ..., dim)"
        )
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}; expected that of x, {tuple(x.shape)}")
    for name, p in vectors.items():
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}; expected ({x.shape[-1]},), the last axis of x"
            )
    sample = (x.shape[0], x.shape[-1])
    for name, p in modulations.items():
        if p is None or p.shape in (sample, x.shape):
            continue
        if p.dim() == x.dim() and (p.shape[0], p.shape[-1]) == sample and math.prod(p.shape[1:-1]) == 1:
            continue
        raise ValueError(
            f"{name} has shape {tuple(p.shape)}; expected (batch, dim) = {sample}, that with axes of 1 between, "
            f"or one number for each element of x, {tuple(x.shape)}"
        )
    runtime.check_devices("x", x, {"branch": branch, **vectors, **modulations})


def _check_gated(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
) -> None:
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm={norm!r} is not one of 'layer', 'rms'")
    if norm == "rms" and bias is not None:
        raise ValueError("norm='rms' takes no bias; use shift, or norm='layer'")
    vectors = {"weight": weight, "bias": bias}
    _check_norm(x, branch, vectors, {"gate": gate, "scale": scale, "shift": shift})


def _spread(p: Tensor | None, x: Tensor) -> Tensor | None:
    """(batch, dim) with axes of 1 in between, to broadcast against x."""
    if p is None or p.dim() == x.dim():
        return p
    return p.reshape(p.shape[0], *[1] * (x.dim() - 2), p.shape[1])


def _norm_call(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """The operator on tensors of any number of axes."""
    shape, dim = x.shape, x.shape[-1]
    per_sample = all(p is None or p.numel() == shape[0] * dim for p in (gate, scale, shift))
    # With one modulation for each token, every token is a sample.
    rows = (shape[0], -1, dim) if per_sample else (math.prod(shape[:-1]), 1, dim)

    def vectors(p: Tensor | None) -> Tensor | None:
        if p is None or per_sample:
            return None if p is None else p.reshape(shape[0], dim)
        spread = _spread(p, x)
        assert spread is not None
        return spread.expand(shape).reshape(-1, dim)

    h, y = _call_norm(
        x.reshape(rows),
        None if branch is None else branch.reshape(rows),
        vectors(gate),
        weight,
        bias,
        vectors(scale),
        vectors(shift),
        eps,
        norm == "rms",
    )
    return h if branch is None else h.reshape(shape), y.reshape(shape)


@remembered
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Layer normalisation over the last axis, then ``y * (1 + scale) + shift``.

    Differentiable once, in reverse mode by the kernels and in forward mode by plain torch. Under autocast the type
    of the result stays that of x, since the arithmetic is float32 anyway.

    Args:
        x: (batch, ..., dim), floating point.
        weight, bias: (dim,), or None for 1 and 0.
        eps: added to the variance.
        scale, shift: (batch, dim), or of the shape of x, for each token its own; None for 0.

    Returns:
        y, of the shape and dtype of x, contiguous where the kernels ran.

    Raises:
        ValueError: a shape or dtype that does not fit; the message says which.
        NotImplementedError: a second derivative through the kernels.
    """
    _check_norm(x, None, {"weight": weight, "bias": bias}, {"scale": scale, "shift": shift})
    if supported(x, weight, bias, scale, shift) is not None:
        return reference_norm(x, "layer", weight, bias, eps, scale=_spread(scale, x), shift=_spread(shift, x))
    return _norm_call(x, None, None, weight, bias, scale, shift, eps, "layer")[1]


@remembered
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Root-mean-square normalisation (Zhang & Sennrich 2019) over the last axis, then ``y * (1 + scale) + shift``.

    Arguments, result and errors are those of :func:`layer_norm`.
    """
    _check_norm(x, None, {"weight": weight}, {"scale": scale, "shift": shift})
    if supported(x, weight, scale, shift) is not None:
        return reference_norm(x, "rms", weight, None, eps, scale=_spread(scale, x), shift=_spread(shift, x))
    return _norm_call(x, None, None, weight, None, scale, shift, eps, "rms")[1]


@remembered
def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: Norm = "layer",
) -> tuple[Tensor, Tensor]:
    """The end of one part of a block and the start of the next: ``h = x + gate * branch``, and its modulated norm.

    Args:
        x: (batch, ..., dim), the residual stream.
        branch: of the shape of x, what attention or the MLP gave.
        gate: (batch, dim) or of the shape of x; None for 1.
        weight, bias, eps, scale, shift: as in :func:`layer_norm`.
        norm: "layer" or "rms" (which takes no bias).

    Returns:
        h and y, both of the shape and dtype of x.

    Raises:
        ValueError: a shape, dtype or name that does not fit; the message says which.
        NotImplementedError: a second derivative through the kernels.
    """
    _check_gated(x, branch, gate, weight, bias, scale, shift, norm)
    if supported(x, branch, gate, weight, bias, scale, shift) is not None:
        return reference_gated_residual_norm(
            x,
            branch,
            norm,
            _spread(gate, x),
            weight,
            bias,
            eps,
            scale=_spread(scale, x),
            shift=_spread(shift, x),
        )
    return _norm_call(x, branch, gate, weight, bias, scale, shift, eps, norm)


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> None:
    if x.dim() != 4 or x.shape[3] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point, (batch, heads, length, dim) "
            "with dim even"
        )
    runtime.check_devices("x", x, {"cos": cos, "sin": sin, "weight": weight})
    rows = (x.shape[0], x.shape[2], x.shape[3])
    for name, p in (("cos", cos), ("sin", sin)):
        if p.shape not in (rows[1:], rows):
            raise ValueError(f"{name} has shape {tuple(p.shape)}; expected {rows[1:]} or {rows}")
    if weight is not None and weight.shape != rows[2:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({rows[2]},), the last axis of x")


def _why_not_rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> str | None:
    reason = supported(x, cos, sin, weight)
    if reason is None and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos or sin requires a gradient"
    return reason


@remembered
def norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: bool = True,
    interleaved: bool = True,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of the RMS-normalised heads: ``u cos + rotate(u) sin``.

    Differentiable once in x and weight, in reverse mode by the kernels and in forward mode by plain torch.

    Args:
        x: (batch, heads, length, dim), queries or keys, dim even; any strides.
        cos, sin: (length, dim) or (batch, length, dim), each angle given for both members of its pair.
        weight: (dim,), of the norm; None for 1.
        eps: added to the mean square.
        norm: False leaves the normalisation out.
        interleaved: rotated pairs are columns (2i, 2i + 1); False: (i, i + dim / 2).

    Returns:
        y, of the shape, dtype and order of axes of x.

    Raises:
        ValueError: a shape that does not fit; the message says which.
        NotImplementedError: a second derivative through the kernels.
    """
    _check_rope(x, cos, sin, weight)
    if _why_not_rope(x, cos, sin, weight) is not None:
        cos, sin = (p if p.dim() == 2 else p.unsqueeze(1) for p in (cos, sin))
        return reference_norm_rope(x, cos, sin, weight, eps, norm=norm, interleaved=interleaved)
    rows = (x.shape[0], x.shape[2], x.shape[3])
    return _call_rope(x, cos.expand(rows), sin.expand(rows), weight, eps, norm, interleaved)[0]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`norm_rope` of queries and keys."""
    return (
        norm_rope(q, cos, sin, q_weight, eps, interleaved=interleaved),
        norm_rope(k, cos, sin, k_weight, eps, interleaved=interleaved),
    )


def _check_glu(x: Tensor, approximate: str = "none") -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} is not one of 'none', 'tanh'")
    if x.dim() == 0 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point, (..., 2 * features)"
        )


def _glu_call(x: Tensor, activation: Activation) -> Tensor:
    if glu_supported(x) is not None:
        return reference_glu(x, activation)
    y = _call_glu(x.reshape(-1, x.shape[-1]), activation)[0]
    return y.reshape(*x.shape[:-1], -1)


def glu_supported(x: Tensor) -> str | None:
    """Why the kernels cannot take a gated linear unit of ``x``; None when they can."""
    reason = runtime.why_not(x)
    if reason is None and runtime.unpack_duals([x])[1] is not None:
        return "forward-mode tangents run in plain torch"
    return reason


@remembered
def geglu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """``hidden * gelu(gate)`` with ``hidden, gate = x.chunk(2, -1)`` (Shazeer 2020, "GLU variants").

    Differentiable once, in reverse mode by the kernels and in forward mode by plain torch.

    Args:
        x: (..., 2 * features), floating point.
        approximate: of gelu, as in PyTorch.

    Returns:
        (..., features) in the dtype of x.

    Raises:
        ValueError: x has an odd last axis or is not floating point, or ``approximate`` is unknown.
        NotImplementedError: a second derivative through the kernels.
    """
    _check_glu(x, approximate)
    return _glu_call(x, "gelu_tanh" if approximate == "tanh" else "gelu")


@remembered
def swiglu(x: Tensor) -> Tensor:
    """``hidden * silu(gate)`` with ``hidden, gate = x.chunk(2, -1)``; otherwise as :func:`geglu`."""
    _check_glu(x)
    return _glu_call(x, "silu")


# --- explain ----------------------------------------------------------------------------------------------------


def _said(name: str, reason: str | None, tiles: Tiles) -> runtime.Answer:
    return runtime.Answer(name, reason, str(tiles))


def _explain_norm(function: Callable[..., Any], norm: str, args: Any, kwargs: Any) -> runtime.Answer:
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    x, branch, norm = given["x"], given.get("branch"), given.get("norm", norm)
    others = {name: given.get(name) for name in ("gate", "weight", "bias", "scale", "shift")}
    _check_gated(x, branch, norm=norm, **others)
    rows = row_tiles(x.shape[0], max(1, math.prod(x.shape[1:-1])), x.shape[-1], _NORM)
    return _said(function.__name__, supported(x, branch, *others.values()), rows)


@runtime.explains("layer_norm")
def _explain_layer_norm(*args: Any, **kwargs: Any) -> runtime.Answer:
    return _explain_norm(layer_norm, "layer", args, kwargs)


@runtime.explains("rms_norm")
def _explain_rms_norm(*args: Any, **kwargs: Any) -> runtime.Answer:
    return _explain_norm(rms_norm, "rms", args, kwargs)


@runtime.explains("gated_residual_norm")
def _explain_gated_residual_norm(*args: Any, **kwargs: Any) -> runtime.Answer:
    return _explain_norm(gated_residual_norm, "layer", args, kwargs)


@runtime.explains("norm_rope")
def _explain_norm_rope(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
) -> runtime.Answer:
    _check_rope(x, cos, sin, weight)
    rows = rope_tiles(*x.shape)
    return _said("norm_rope", _why_not_rope(x, cos, sin, weight), rows)


@runtime.explains("qk_norm_rope")
def _explain_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> runtime.Answer:
    of_q, of_k = _explain_norm_rope(q, cos, sin, q_weight), _explain_norm_rope(k, cos, sin, k_weight)
    reasons = [f"{name}: {a.reason}" for name, a in (("q", of_q), ("k", of_k)) if a.reason is not None]
    return runtime.Answer("qk_norm_rope", "; ".join(reasons) or None, f"q {of_q.how}; k {of_k.how}")


@runtime.explains("geglu")
def _explain_geglu(x: Tensor, *, approximate: str = "none") -> runtime.Answer:
    _check_glu(x, approximate)
    return _said("geglu", glu_supported(x), glu_tiles(x.shape[-1] // 2))


@runtime.explains("swiglu")
def _explain_swiglu(x: Tensor) -> runtime.Answer:
    _check_glu(x)
    return _said("swiglu", glu_supported(x), glu_tiles(x.shape[-1] // 2))
