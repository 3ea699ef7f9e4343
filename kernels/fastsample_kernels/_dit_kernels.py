"""Triton kernels of the pieces of a DiT block, and the functions that set up their launches. See dit.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _runtime as runtime
from ._launch import Launch
from .dit import Tiles

# --- norm, modulation, gated residual -------------------------------------------------------------------------


@triton.jit
def _moments(x, valid, D, eps, RMS: tl.constexpr):
    """(xhat, rstd) of the rows; entries beyond the last column give 0."""
    if not RMS:
        # The rows are in registers, so the mean is taken off first: exact for large means.
        x = tl.where(valid, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    return x * rstd[:, None], rstd


@triton.jit
def norm_forward(
    X,
    BRANCH,
    GATE,
    WEIGHT,
    BIAS,
    SCALE,
    SHIFT,
    H,
    Y,
    x_b,
    x_l,
    branch_b,
    branch_l,
    gate_b,
    weight_b,
    bias_b,
    scale_b,
    shift_b,
    L,
    D,
    tiles,
    eps,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RMS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    l = (pid % tiles * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    column = d < D  # vectors of the sample are loaded once for all rows
    valid = (l < L) & column
    n = b * L + l
    x = tl.load(X + b * x_b + l * x_l + d, mask=valid, other=0.0).to(ACC)
    if HAS_BRANCH:
        branch = tl.load(BRANCH + b * branch_b + l * branch_l + d, mask=valid, other=0.0).to(ACC)
        if HAS_GATE:
            branch *= tl.load(GATE + b * gate_b + d, mask=column, other=0.0).to(ACC)
        h = (x + branch).to(H.dtype.element_ty)
        tl.store(H + n * D + d, h, mask=valid)
        x = h.to(ACC)  # what the backward pass will read
    y, _ = _moments(x, valid, D, eps, RMS)
    if HAS_WEIGHT:
        y *= tl.load(WEIGHT + b * weight_b + d, mask=column, other=0.0).to(ACC)
    if HAS_BIAS:
        y += tl.load(BIAS + b * bias_b + d, mask=column, other=0.0).to(ACC)
    if HAS_SCALE:
        y *= 1.0 + tl.load(SCALE + b * scale_b + d, mask=column, other=0.0).to(ACC)
    if HAS_SHIFT:
        y += tl.load(SHIFT + b * shift_b + d, mask=column, other=0.0).to(ACC)
    tl.store(Y + n * D + d, y.to(Y.dtype.element_ty), mask=valid)


@triton.jit
def norm_backward(
    DH,
    DY,
    H,
    BRANCH,
    GATE,
    WEIGHT,
    SCALE,
    DX,
    DBRANCH,
    PARTIAL,
    dh_b,
    dh_l,
    dy_b,
    dy_l,
    h_b,
    h_l,
    branch_b,
    branch_l,
    gate_b,
    weight_b,
    scale_b,
    L,
    D,
    chunk,
    chunks,
    eps,
    HAS_DH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SUMS: tl.constexpr,
    RMS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of the rows of one sample. PARTIAL (B, chunks, 3, D): sums over the chunk of dy, of dy xhat and
    of dh branch, from which the gradients of all parameters follow."""
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    first = pid % chunks * chunk
    last = tl.minimum(first + chunk, L)
    d = tl.arange(0, BLOCK)[None, :]
    gain = tl.full([1, BLOCK], 1.0, ACC)
    if HAS_WEIGHT:
        gain *= tl.load(WEIGHT + b * weight_b + d, mask=d < D, other=0.0).to(ACC)
    if HAS_SCALE:
        gain *= 1.0 + tl.load(SCALE + b * scale_b + d, mask=d < D, other=0.0).to(ACC)
    gate = tl.full([1, BLOCK], 1.0, ACC)
    if HAS_GATE:
        gate = tl.load(GATE + b * gate_b + d, mask=d < D, other=0.0).to(ACC)
    sum_dy = tl.zeros([ROWS, BLOCK], ACC)
    sum_dy_xhat = tl.zeros([ROWS, BLOCK], ACC)
    sum_dh_branch = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(first, last, ROWS):
        l = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        valid = (l < last) & (d < D)
        out = (b * L + l) * D + d
        h = tl.load(H + b * h_b + l * h_l + d, mask=valid, other=0.0).to(ACC)
        dy = tl.load(DY + b * dy_b + l * dy_l + d, mask=valid, other=0.0).to(ACC)
        xhat, rstd = _moments(h, valid, D, eps, RMS)
        if SUMS:
            sum_dy += dy
            sum_dy_xhat += dy * xhat
        g = dy * gain
        dx = g - xhat * (tl.sum(g * xhat, 1) / D)[:, None]
        if not RMS:
            dx -= (tl.sum(g, 1) / D)[:, None]
        dx *= rstd[:, None]
        if HAS_DH:
            dx += tl.load(DH + b * dh_b + l * dh_l + d, mask=valid, other=0.0).to(ACC)
        tl.store(DX + out, dx.to(DX.dtype.element_ty), mask=valid)
        if HAS_BRANCH:
            tl.store(DBRANCH + out, (dx * gate).to(DBRANCH.dtype.element_ty), mask=valid)
            if HAS_GATE:
                branch = tl.load(BRANCH + b * branch_b + l * branch_l + d, mask=valid, other=0.0).to(ACC)
                sum_dh_branch += dx * branch
    partial = PARTIAL + pid.to(tl.int64) * 3 * D + d
    if SUMS:
        tl.store(partial, tl.sum(sum_dy, 0)[None, :], mask=d < D)
        tl.store(partial + D, tl.sum(sum_dy_xhat, 0)[None, :], mask=d < D)
    if HAS_GATE:
        tl.store(partial + 2 * D, tl.sum(sum_dh_branch, 0)[None, :], mask=d < D)


# --- norm and rotary embedding --------------------------------------------------------------------------------


@triton.jit
def _load_pairs(ptr, rows, l, stop, D, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Both members of each rotated pair, (ROWS, HALF): columns (2i, 2i + 1), or (i, i + D / 2)."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(ptr + rows + d, mask=(l < stop) & (d < D), other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
    else:
        d = tl.arange(0, HALF)[None, :]
        valid = (l < stop) & (d < D // 2)
        a = tl.load(ptr + rows + d, mask=valid, other=0.0)
        b = tl.load(ptr + rows + D // 2 + d, mask=valid, other=0.0)
    return a, b


@triton.jit
def _store_pairs(ptr, rows, l, stop, D, a, b, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        d = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(a, b), [a.shape[0], 2 * HALF])
        tl.store(ptr + rows + d, x, mask=(l < stop) & (d < D))
    else:
        d = tl.arange(0, HALF)[None, :]
        valid = (l < stop) & (d < D // 2)
        tl.store(ptr + rows + d, a, mask=valid)
        tl.store(ptr + rows + D // 2 + d, b, mask=valid)


@triton.jit
def rope_forward(
    X,
    COS,
    SIN,
    WEIGHT,
    Y,
    x_b,
    x_h,
    x_l,
    cos_b,
    cos_l,
    sin_b,
    sin_l,
    weight_b,
    y_b,
    y_h,
    y_l,
    heads,
    L,
    D,
    tiles,
    span,
    eps,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rows of ``span`` heads, for which the angles are loaded once."""
    pid = tl.program_id(0)
    spans = tl.cdiv(heads, span)
    first = pid % spans * span
    last = tl.minimum(first + span, heads)
    b = (pid // spans // tiles).to(tl.int64)
    l = (pid // spans % tiles * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    c0, c1 = _load_pairs(COS, b * cos_b + l * cos_l, l, L, D, INTERLEAVED, HALF)
    s0, s1 = _load_pairs(SIN, b * sin_b + l * sin_l, l, L, D, INTERLEAVED, HALF)
    if HAS_WEIGHT:
        one = tl.arange(0, 1)[:, None]
        w0, w1 = _load_pairs(WEIGHT, b * weight_b + one, one, 1, D, INTERLEAVED, HALF)
    for head in range(first, last):
        h = tl.cast(head, tl.int64)
        u0, u1 = _load_pairs(X, b * x_b + h * x_h + l * x_l, l, L, D, INTERLEAVED, HALF)
        u0 = u0.to(ACC)
        u1 = u1.to(ACC)
        if NORM:
            rstd = (1.0 / tl.sqrt((tl.sum(u0 * u0, 1) + tl.sum(u1 * u1, 1)) / D + eps))[:, None]
            u0 *= rstd
            u1 *= rstd
        if HAS_WEIGHT:
            u0 *= w0.to(ACC)
            u1 *= w1.to(ACC)
        y0 = u0 * c0.to(ACC) - u1 * s0.to(ACC)
        y1 = u1 * c1.to(ACC) + u0 * s1.to(ACC)
        _store_pairs(Y, b * y_b + h * y_h + l * y_l, l, L, D, y0, y1, INTERLEAVED, HALF)


@triton.jit
def rope_backward(
    DY,
    X,
    COS,
    SIN,
    WEIGHT,
    DX,
    PARTIAL,
    dy_b,
    dy_h,
    dy_l,
    x_b,
    x_h,
    x_l,
    cos_b,
    cos_l,
    sin_b,
    sin_l,
    weight_b,
    dx_b,
    dx_h,
    dx_l,
    heads,
    L,
    D,
    chunk,
    chunks,
    eps,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One chunk of the rows of one head. PARTIAL (B, heads, chunks, D): its sum for the gradient of the weight."""
    pid = tl.program_id(0)
    bh = pid // chunks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    first = pid % chunks * chunk
    last = tl.minimum(first + chunk, L)
    sum0 = tl.zeros([ROWS, HALF], ACC)
    sum1 = tl.zeros([ROWS, HALF], ACC)
    for start in range(first, last, ROWS):
        l = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        c0, c1 = _load_pairs(COS, b * cos_b + l * cos_l, l, last, D, INTERLEAVED, HALF)
        s0, s1 = _load_pairs(SIN, b * sin_b + l * sin_l, l, last, D, INTERLEAVED, HALF)
        g0, g1 = _load_pairs(DY, b * dy_b + h * dy_h + l * dy_l, l, last, D, INTERLEAVED, HALF)
        g0 = g0.to(ACC)
        g1 = g1.to(ACC)
        # The transposed rotation.
        d0 = g0 * c0.to(ACC) + g1 * s1.to(ACC)
        d1 = g1 * c1.to(ACC) - g0 * s0.to(ACC)
        if NORM or HAS_WEIGHT:
            u0, u1 = _load_pairs(X, b * x_b + h * x_h + l * x_l, l, last, D, INTERLEAVED, HALF)
            u0 = u0.to(ACC)
            u1 = u1.to(ACC)
        if NORM:
            rstd = (1.0 / tl.sqrt((tl.sum(u0 * u0, 1) + tl.sum(u1 * u1, 1)) / D + eps))[:, None]
            u0 *= rstd
            u1 *= rstd
        if HAS_WEIGHT:
            sum0 += d0 * u0
            sum1 += d1 * u1
            w0, w1 = _load_pairs(WEIGHT, b * weight_b + l * 0, l, last, D, INTERLEAVED, HALF)
            d0 *= w0.to(ACC)
            d1 *= w1.to(ACC)
        if NORM:
            mean = ((tl.sum(d0 * u0, 1) + tl.sum(d1 * u1, 1)) / D)[:, None]
            d0 = (d0 - u0 * mean) * rstd
            d1 = (d1 - u1 * mean) * rstd
        _store_pairs(DX, b * dx_b + h * dx_h + l * dx_l, l, last, D, d0, d1, INTERLEAVED, HALF)
    if HAS_WEIGHT:
        one = tl.arange(0, 1)[:, None]
        sum0 = tl.sum(sum0, 0)[None, :]
        sum1 = tl.sum(sum1, 0)[None, :]
        _store_pairs(PARTIAL, pid.to(tl.int64) * D, one, 1, D, sum0, sum1, INTERLEAVED, HALF)


# --- gated linear units ---------------------------------------------------------------------------------------


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        s = _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return g * s, s + g * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        s = _sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def glu_forward(X, Y, x_n, F, tiles, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    f = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.load(X + n * x_n + f, mask=f < F, other=0.0).to(ACC)
    gate = tl.load(X + n * x_n + F + f, mask=f < F, other=0.0).to(ACC)
    act, _ = _activation(gate, ACTIVATION)
    tl.store(Y + n * F + f, (hidden * act).to(Y.dtype.element_ty), mask=f < F)


@triton.jit
def glu_backward(
    DY, X, DX, dy_n, x_n, F, tiles, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    f = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.load(X + n * x_n + f, mask=f < F, other=0.0).to(ACC)
    gate = tl.load(X + n * x_n + F + f, mask=f < F, other=0.0).to(ACC)
    dy = tl.load(DY + n * dy_n + f, mask=f < F, other=0.0).to(ACC)
    act, slope = _activation(gate, ACTIVATION)
    tl.store(DX + n * 2 * F + f, (dy * act).to(DX.dtype.element_ty), mask=f < F)
    tl.store(DX + n * 2 * F + F + f, (dy * hidden * slope).to(DX.dtype.element_ty), mask=f < F)


# --- launches -------------------------------------------------------------------------------------------------


def _per_sample(**tensors: Tensor | None) -> dict[str, Any]:
    """Vectors (D,) or (B, D) with the stride of the batch, 0 for the first."""
    args: dict[str, Any] = {}
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1:
            t = t.contiguous()
        args |= {name.upper(): t, f"HAS_{name.upper()}": t is not None}
        args[f"{name}_b"] = t.stride(0) if t is not None and t.dim() == 2 else 0
    return args


def _rows(axes: str, **tensors: Tensor | None) -> dict[str, Any]:
    """Tensors whose last stride is 1, with their other strides."""
    args: dict[str, Any] = {}
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1:
            t = t.contiguous()
        args[name.upper()] = t
        for position, axis in enumerate(axes):
            args[f"{name}_{axis}"] = 0 if t is None else t.stride(position)
    return args


def norm_forward_launch(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool,
    h: Tensor | None,
    y: Tensor,
    tiles: Tiles,
) -> Launch:
    """Writes y and, with a branch, h; both (B, L, D) contiguous."""
    batch, length, dim = x.shape
    args = _rows("bl", x=x, branch=branch)
    args |= _per_sample(gate=gate, weight=weight, bias=bias, scale=scale, shift=shift)
    count = triton.cdiv(length, tiles.rows)
    args |= {"H": h, "Y": y, "L": length, "D": dim, "tiles": count, "eps": eps}
    args |= {"HAS_BRANCH": branch is not None, "RMS": rms, "ACC": _acc(x)}
    args |= {"ROWS": tiles.rows, "BLOCK": tiles.block}
    return Launch(norm_forward, (batch * count,), args, tiles.warps, 1)


def norm_backward_launch(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    sums: bool,
    dx: Tensor,
    dbranch: Tensor | None,
    partial: Tensor,
    tiles: Tiles,
) -> Launch:
    """Writes dx, dbranch (both contiguous) and partial (B, chunks, 3, D)."""
    batch, length, dim = h.shape
    args = _rows("bl", dh=dh, dy=dy, h=h, branch=branch)
    args |= _per_sample(gate=gate, weight=weight, scale=scale)
    args |= {"DX": dx, "DBRANCH": dbranch, "PARTIAL": partial, "L": length, "D": dim, "eps": eps}
    args |= {"chunk": tiles.chunk, "chunks": partial.shape[1], "HAS_DH": dh is not None}
    args |= {"HAS_BRANCH": branch is not None, "SUMS": sums, "RMS": rms, "ACC": _acc(h)}
    args |= {"ROWS": tiles.rows, "BLOCK": tiles.block}
    return Launch(norm_backward, (batch * partial.shape[1],), args, tiles.warps, 1)


def rope_forward_launch(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: bool,
    interleaved: bool,
    y: Tensor,
    tiles: Tiles,
) -> Launch:
    """Writes y (B, H, L, D)."""
    batch, heads, length, dim = x.shape
    count = triton.cdiv(length, tiles.rows)
    args = _rows("bhl", x=x, y=y) | _rows("bl", cos=cos, sin=sin) | _per_sample(weight=weight)
    args |= {"heads": heads, "L": length, "D": dim, "tiles": count, "span": tiles.span, "eps": eps}
    args |= {"NORM": norm, "INTERLEAVED": interleaved, "ACC": _acc(x)}
    args |= {"ROWS": tiles.rows, "HALF": tiles.block // 2}
    return Launch(rope_forward, (batch * count * triton.cdiv(heads, tiles.span),), args, tiles.warps, 1)


def rope_backward_launch(
    dy: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: bool,
    interleaved: bool,
    dx: Tensor,
    partial: Tensor,
    tiles: Tiles,
) -> Launch:
    """Writes dx and, with a weight, partial (B, H, chunks, D)."""
    batch, heads, length, dim = x.shape
    args = _rows("bhl", dy=dy, x=x, dx=dx) | _rows("bl", cos=cos, sin=sin) | _per_sample(weight=weight)
    args |= {"PARTIAL": partial, "heads": heads, "L": length, "D": dim, "eps": eps}
    args |= {"chunk": tiles.chunk, "chunks": partial.shape[2]}
    args |= {"NORM": norm, "INTERLEAVED": interleaved, "ACC": _acc(x)}
    args |= {"ROWS": tiles.rows, "HALF": tiles.block // 2}
    return Launch(rope_backward, (batch * heads * partial.shape[2],), args, tiles.warps, 1)


def glu_forward_launch(x: Tensor, activation: str, y: Tensor, tiles: Tiles) -> Launch:
    """Writes y (N, F), contiguous, from x (N, 2 F)."""
    count = triton.cdiv(y.shape[1], tiles.block)
    args = _rows("n", x=x) | {"Y": y, "F": y.shape[1], "tiles": count}
    args |= {"ACTIVATION": activation, "ACC": _acc(x), "BLOCK": tiles.block}
    return Launch(glu_forward, (x.shape[0] * count,), args, tiles.warps, 1)


def glu_backward_launch(dy: Tensor, x: Tensor, activation: str, dx: Tensor, tiles: Tiles) -> Launch:
    """Writes dx (N, 2 F), contiguous."""
    count = triton.cdiv(dy.shape[1], tiles.block)
    args = _rows("n", dy=dy, x=x) | {"DX": dx, "F": dy.shape[1], "tiles": count}
    args |= {"ACTIVATION": activation, "ACC": _acc(x), "BLOCK": tiles.block}
    return Launch(glu_backward, (x.shape[0] * count,), args, tiles.warps, 1)


def _acc(x: Tensor) -> Any:
    return runtime.triton_dtype(runtime.accumulator(x.dtype))
