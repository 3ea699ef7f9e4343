"""Triton kernels of softmax attention, and the functions that set up their launches. The maths is in attention.py.

Head dims need not be powers of two: the columns of every tile come in two power-of-two parts, D1 + D2 >= D
(40 = 32 + 16, 80 = 64 + 16, 160 = 128 + 32), so that little is padded. Every output has one writer and a fixed order
of summation: results are deterministic.

Scores live in the log2 domain, ``p = exp2(z - lse)`` with ``z = log2(e) * scale * q k^T``. With a bias that is added
(KIND == "bias") they do not: it may be the lowest number of its type, which log2(e) times would overflow, or -1e9,
beside which the sum of a row is nothing. There ``z = scale * q k^T + bias``, ``p = exp2(log2(e) * (z - m) - log2(l))``
with m the maximum and l the sum of a row, kept as two numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._runtime import INTERPRET
from .attention import Tiles, split_head_dim

_LOG2E = tl.constexpr(1.4426950408889634)


# --- pieces ---------------------------------------------------------------------------------------------------


@triton.jit
def _load(
    ptr,
    stride,
    rows_left,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Columns START .. START + WIDTH of ROWS consecutive rows; zero outside of the tensor."""
    r = tl.arange(0, ROWS)[:, None]
    c = START + tl.arange(0, WIDTH)[None, :]
    p = ptr + r * (stride * VEC) + c
    if EVEN and START + WIDTH <= D:
        tile = tl.load(p)
    elif EVEN:
        tile = tl.load(p, mask=c < D, other=0.0)
    elif START + WIDTH <= D:
        tile = tl.load(p, mask=r < rows_left, other=0.0)
    else:
        tile = tl.load(p, mask=(r < rows_left) & (c < D), other=0.0)
    return tile


@triton.jit
def _store(
    ptr,
    stride,
    rows_left,
    tile,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
):
    r = tl.arange(0, ROWS)[:, None]
    c = START + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + r * (stride * VEC) + c, tile.to(ptr.dtype.element_ty), mask=(r < rows_left) & (c < D))


@triton.jit
def _to_nearest(x):
    """float32 rounded to TF32; tensor cores cut the digits off instead, twice the error and all of one sign."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "rounded":
        a = _to_nearest(a)
        b = _to_nearest(b)
    return tl.dot(
        a, b, acc, input_precision="tf32" if PRECISION == "rounded" else PRECISION, out_dtype=acc.dtype
    )


@triton.jit
def _dot_rows(a1, a2, b1, b2, acc, D2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b^T of two tiles of rows, over both parts of the head dim."""
    acc = _dot(a1, tl.trans(b1), acc, PRECISION, UPCAST)
    if D2 > 0:
        acc = _dot(a2, tl.trans(b2), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _logits(
    s,
    scale,
    BIAS,
    i0,
    j0,
    Lq,
    Lk,
    stride_bi,
    stride_bj,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """z of the tile at query i0 and key j0: -inf where masked, and in the log2 domain unless a bias is added."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    if KEYS_FIRST:
        i = i[None, :]
        j = j[:, None]
    else:
        i = i[:, None]
        j = j[None, :]
    z = s * (scale if KIND == "bias" else scale * _LOG2E)
    if KIND != "none":
        origin = BIAS + tl.cast(j0, tl.int64) * stride_bj
        if BIAS_PER_QUERY:
            origin += tl.cast(i0, tl.int64) * stride_bi
            b = tl.load(origin + (i * stride_bi + j * stride_bj), mask=(i < Lq - i0) & (j < Lk - j0), other=0)
        else:
            b = tl.load(origin + j * stride_bj, mask=j < Lk - j0, other=0)
        if KIND == "mask":
            z = tl.where(b, z, float("-inf"))
        else:
            z += b.to(z.dtype)
    if TAIL:
        z = tl.where(j < Lk - j0, z, float("-inf"))
    if CAUSAL:
        z = tl.where(j + j0 <= i + i0, z, float("-inf"))
    return z


@triton.jit
def _softmax_step(m, z, MAY_BE_EMPTY: tl.constexpr, KIND: tl.constexpr):
    """Online softmax: new maximum m', p = exp(z - m') and the factor exp(m - m') of what was summed so far."""
    m_new = tl.maximum(m, tl.max(z, 1))
    m_ref = m_new
    if MAY_BE_EMPTY:  # -inf - (-inf) is NaN
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
    if KIND == "bias":
        p, alpha = tl.exp2((z - m_ref[:, None]) * _LOG2E), tl.exp2((m - m_ref) * _LOG2E)
    else:
        p, alpha = tl.exp2(z - m_ref[:, None]), tl.exp2(m - m_ref)
    return m_new, p, alpha


@triton.jit
def _plain_softmax_step(m, s, c):
    """_softmax_step of z = c s without masks, the product inside of the exponent: one multiply-add an element."""
    m_new = tl.maximum(m, tl.max(s, 1) * c)
    return m_new, tl.exp2(s * c - m_new[:, None]), tl.exp2(m - m_new)


@triton.jit
def _load_number(ptr, i, Lq, other, EVEN: tl.constexpr):
    return tl.load(ptr + i) if EVEN else tl.load(ptr + i, mask=i < Lq, other=other)


@triton.jit
def _load_sums(LSE, i, Lq, KIND: tl.constexpr, EVEN: tl.constexpr):
    """(lse, unused) of rows i of one head, or (m, log2(l)); rows beyond the last get +inf, which makes p = 0."""
    lse = _load_number(LSE, i, Lq, float("inf"), EVEN)
    log_l = lse
    if KIND == "bias":
        log_l = _load_number(LSE, Lq + i, 2 * Lq, 0.0, EVEN)
    return lse, log_l


@triton.jit
def _softmax(z, lse, log_l, KIND: tl.constexpr):
    """p, given what _load_sums gives."""
    z = z - lse
    if KIND == "bias":
        z = z * _LOG2E - log_l
    return tl.exp2(z)


@triton.jit
def _tile_of(H, TILES, REVERSE: tl.constexpr):
    """This program's (tile, batch, head). Neighbours share a head, so that its keys stay in the cache."""
    pid = tl.program_id(0)
    tile = pid % TILES
    if REVERSE:  # causal: the longest first
        tile = TILES - 1 - tile
    bh = pid // TILES
    return tile, bh, (bh // H).to(tl.int64), (bh % H).to(tl.int64)


@triton.jit
def _key_range(tile, Lk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(middle, end): key tiles below ``middle`` need no mask; those up to ``end`` cross an edge."""
    end = Lk
    middle = Lk // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(Lk, (tile + 1) * BLOCK_M)
        middle = tl.minimum(middle, (tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
    return middle, end


# --- forward --------------------------------------------------------------------------------------------------


@triton.jit
def _forward_loop(
    acc1,
    acc2,
    m,
    l,
    q1,
    q2,
    K,
    V,
    BIAS,
    i0,
    lo,
    hi,
    Lq,
    Lk,
    stride_k,
    stride_v,
    stride_bi,
    stride_bj,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    K += tl.cast(lo, tl.int64) * stride_k * VEC
    V += tl.cast(lo, tl.int64) * stride_v * VEC
    for start in tl.range(lo, hi, BLOCK_N):
        k1 = _load(K, stride_k, Lk - start, BLOCK_N, 0, D1, D, VEC, not EDGE)
        k2 = k1
        if D2 > 0:
            k2 = _load(K, stride_k, Lk - start, BLOCK_N, D1, D2, D, VEC, not EDGE)
        s = _dot_rows(q1, q2, k1, k2, tl.zeros([BLOCK_M, BLOCK_N], l.dtype), D2, PRECISION, UPCAST)
        if EDGE or KIND != "none":
            z = _logits(
                s, scale, BIAS, i0, start, Lq, Lk, stride_bi, stride_bj,
                BLOCK_M, BLOCK_N, False, KIND, BIAS_PER_QUERY, EDGE, EDGE and CAUSAL,
            )  # fmt: skip
            m, p, alpha = _softmax_step(m, z, True, KIND)
        else:
            m, p, alpha = _plain_softmax_step(m, s, scale * _LOG2E)
        l = l * alpha + tl.sum(p, 1)
        v1 = _load(V, stride_v, Lk - start, BLOCK_N, 0, D1, D, VEC, not EDGE)
        p = p.to(v1.dtype)
        acc1 = _dot(p, v1, acc1 * alpha[:, None], PRECISION, UPCAST)
        if D2 > 0:
            v2 = _load(V, stride_v, Lk - start, BLOCK_N, D1, D2, D, VEC, not EDGE)
            acc2 = _dot(p, v2, acc2 * alpha[:, None], PRECISION, UPCAST)
        K += BLOCK_N * stride_k * VEC
        V += BLOCK_N * stride_v * VEC
    return acc1, acc2, m, l


@triton.jit
def attention_forward_kernel(
    Q,
    K,
    V,
    BIAS,
    O,
    LSE,
    stride_qb,
    stride_qh,
    stride_q,
    stride_kb,
    stride_kh,
    stride_k,
    stride_vb,
    stride_vh,
    stride_v,
    stride_bb,
    stride_bh,
    stride_bi,
    stride_bj,
    stride_ob,
    stride_oh,
    stride_o,
    H,
    Lq,
    Lk,
    tiles,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    EVEN_N: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, bh, b, h = _tile_of(H, tiles, CAUSAL)
    start_m = tl.cast(tile * BLOCK_M, tl.int64)
    K += (b * stride_kb + h * stride_kh) * VEC
    V += (b * stride_vb + h * stride_vh) * VEC
    BIAS_bh = BIAS
    if KIND != "none":
        BIAS_bh += b * stride_bb + h * stride_bh
    Q += (b * stride_qb + h * stride_qh + start_m * stride_q) * VEC
    q1 = _load(Q, stride_q, Lq - start_m, BLOCK_M, 0, D1, D, VEC, False)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc1 = tl.zeros([BLOCK_M, D1], ACC)
    q2 = q1  # placeholders, unused when D2 == 0
    acc2 = acc1
    if D2 > 0:
        q2 = _load(Q, stride_q, Lq - start_m, BLOCK_M, D1, D2, D, VEC, False)
        acc2 = tl.zeros([BLOCK_M, D2], ACC)

    middle, end = _key_range(tile, Lk, BLOCK_M, BLOCK_N, CAUSAL)
    if not ONE_TILE:
        acc1, acc2, m, l = _forward_loop(
            acc1, acc2, m, l, q1, q2, K, V, BIAS_bh, tile * BLOCK_M, 0, middle, Lq, Lk,
            stride_k, stride_v, stride_bi, stride_bj, scale,
            D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, False, CAUSAL, PRECISION, UPCAST,
        )  # fmt: skip
    if CAUSAL or not EVEN_N:
        acc1, acc2, m, l = _forward_loop(
            acc1, acc2, m, l, q1, q2, K, V, BIAS_bh, tile * BLOCK_M, middle, end, Lq, Lk,
            stride_k, stride_v, stride_bi, stride_bj, scale,
            D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, True, CAUSAL, PRECISION, UPCAST,
        )  # fmt: skip

    # A row with every key masked gives zeros, and lse = +inf (or m) makes its p = 0 in the backward pass.
    empty = l == 0
    l = tl.where(empty, 1.0, l)
    if KIND == "bias":
        LSE += tl.cast(bh, tl.int64) * 2 * Lq
        tl.store(LSE + i, tl.where(empty, float("inf"), m), mask=i < Lq)
        tl.store(LSE + Lq + i, tl.log2(l), mask=i < Lq)
    else:
        lse = tl.where(empty, float("inf"), m + tl.log2(l))
        tl.store(LSE + tl.cast(bh, tl.int64) * Lq + i, lse, mask=i < Lq)
    O += (b * stride_ob + h * stride_oh + start_m * stride_o) * VEC
    _store(O, stride_o, Lq - start_m, acc1 / l[:, None], BLOCK_M, 0, D1, D, VEC)
    if D2 > 0:
        _store(O, stride_o, Lq - start_m, acc2 / l[:, None], BLOCK_M, D1, D2, D, VEC)


# --- backward -------------------------------------------------------------------------------------------------


@triton.jit
def _dq_loop(
    dq1,
    dq2,
    q1,
    q2,
    do1,
    do2,
    lse,
    log_l,
    delta,
    K,
    V,
    BIAS,
    i0,
    lo,
    hi,
    Lq,
    Lk,
    stride_k,
    stride_v,
    stride_bi,
    stride_bj,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    K += tl.cast(lo, tl.int64) * stride_k * VEC
    V += tl.cast(lo, tl.int64) * stride_v * VEC
    for start in tl.range(lo, hi, BLOCK_N):
        k1 = _load(K, stride_k, Lk - start, BLOCK_N, 0, D1, D, VEC, not EDGE)
        v1 = _load(V, stride_v, Lk - start, BLOCK_N, 0, D1, D, VEC, not EDGE)
        k2 = k1
        v2 = v1
        if D2 > 0:
            k2 = _load(K, stride_k, Lk - start, BLOCK_N, D1, D2, D, VEC, not EDGE)
            v2 = _load(V, stride_v, Lk - start, BLOCK_N, D1, D2, D, VEC, not EDGE)
        zero = tl.zeros([BLOCK_M, BLOCK_N], lse.dtype)
        s = _dot_rows(q1, q2, k1, k2, zero, D2, PRECISION, UPCAST)
        z = _logits(
            s, scale, BIAS, i0, start, Lq, Lk, stride_bi, stride_bj,
            BLOCK_M, BLOCK_N, False, KIND, BIAS_PER_QUERY, EDGE, EDGE and CAUSAL,
        )  # fmt: skip
        p = _softmax(z, lse[:, None], log_l[:, None], KIND)
        dp = _dot_rows(do1, do2, v1, v2, zero, D2, PRECISION, UPCAST)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = _dot(ds, k1, dq1, PRECISION, UPCAST)
        if D2 > 0:
            dq2 = _dot(ds, k2, dq2, PRECISION, UPCAST)
        K += BLOCK_N * stride_k * VEC
        V += BLOCK_N * stride_v * VEC
    return dq1, dq2


@triton.jit
def attention_dq_kernel(
    Q,
    K,
    V,
    BIAS,
    O,
    LSE,
    DO,
    DELTA,
    DQ,
    stride_qb,
    stride_qh,
    stride_q,
    stride_kb,
    stride_kh,
    stride_k,
    stride_vb,
    stride_vh,
    stride_v,
    stride_bb,
    stride_bh,
    stride_bi,
    stride_bj,
    stride_ob,
    stride_oh,
    stride_o,
    stride_dob,
    stride_doh,
    stride_do,
    stride_dqb,
    stride_dqh,
    stride_dq,
    H,
    Lq,
    Lk,
    tiles,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    EVEN_N: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dq, and delta = sum(o * do) for the kernel of dk and dv."""
    tile, bh, b, h = _tile_of(H, tiles, CAUSAL)
    start_m = tl.cast(tile * BLOCK_M, tl.int64)
    left = Lq - start_m
    K += (b * stride_kb + h * stride_kh) * VEC
    V += (b * stride_vb + h * stride_vh) * VEC
    BIAS_bh = BIAS
    if KIND != "none":
        BIAS_bh += b * stride_bb + h * stride_bh
    Q += (b * stride_qb + h * stride_qh + start_m * stride_q) * VEC
    O += (b * stride_ob + h * stride_oh + start_m * stride_o) * VEC
    DO += (b * stride_dob + h * stride_doh + start_m * stride_do) * VEC
    DQ += (b * stride_dqb + h * stride_dqh + start_m * stride_dq) * VEC
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.cast(bh, tl.int64) * Lq + i

    q1 = _load(Q, stride_q, left, BLOCK_M, 0, D1, D, VEC, False)
    do1 = _load(DO, stride_do, left, BLOCK_M, 0, D1, D, VEC, False)
    delta = tl.sum(_load(O, stride_o, left, BLOCK_M, 0, D1, D, VEC, False).to(ACC) * do1.to(ACC), 1)
    dq1 = tl.zeros([BLOCK_M, D1], ACC)
    q2 = q1  # placeholders, unused when D2 == 0
    do2 = do1
    dq2 = dq1
    if D2 > 0:
        q2 = _load(Q, stride_q, left, BLOCK_M, D1, D2, D, VEC, False)
        do2 = _load(DO, stride_do, left, BLOCK_M, D1, D2, D, VEC, False)
        delta += tl.sum(_load(O, stride_o, left, BLOCK_M, D1, D2, D, VEC, False).to(ACC) * do2.to(ACC), 1)
        dq2 = tl.zeros([BLOCK_M, D2], ACC)
    tl.store(DELTA + rows, delta, mask=i < Lq)
    LSE += tl.cast(bh, tl.int64) * (2 * Lq if KIND == "bias" else Lq)
    lse, log_l = _load_sums(LSE, i, Lq, KIND, False)

    middle, end = _key_range(tile, Lk, BLOCK_M, BLOCK_N, CAUSAL)
    if CAUSAL:  # masked throughout: a loop of its own for the tiles that need no mask costs registers
        middle = 0
    if not ONE_TILE and not CAUSAL:
        dq1, dq2 = _dq_loop(
            dq1, dq2, q1, q2, do1, do2, lse, log_l, delta, K, V, BIAS_bh, tile * BLOCK_M, 0, middle, Lq, Lk,
            stride_k, stride_v, stride_bi, stride_bj, scale,
            D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, False, CAUSAL, PRECISION, UPCAST,
        )  # fmt: skip
    if CAUSAL or not EVEN_N:
        dq1, dq2 = _dq_loop(
            dq1, dq2, q1, q2, do1, do2, lse, log_l, delta, K, V, BIAS_bh, tile * BLOCK_M, middle, end, Lq, Lk,
            stride_k, stride_v, stride_bi, stride_bj, scale,
            D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, True, CAUSAL, PRECISION, UPCAST,
        )  # fmt: skip

    _store(DQ, stride_dq, left, dq1 * scale, BLOCK_M, 0, D1, D, VEC)
    if D2 > 0:
        _store(DQ, stride_dq, left, dq2 * scale, BLOCK_M, D1, D2, D, VEC)


@triton.jit
def _dkdv_loop(
    dk1,
    dk2,
    dv1,
    dv2,
    db,
    k1,
    k2,
    v1,
    v2,
    Q,
    DO,
    LSE,
    DELTA,
    BIAS,
    DBIAS,
    j0,
    lo,
    hi,
    Lq,
    Lk,
    stride_q,
    stride_do,
    stride_bi,
    stride_bj,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    EVEN_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tiles are (keys, queries), so that p^T and ds^T come out as the products want them."""
    Q += tl.cast(lo, tl.int64) * stride_q * VEC
    DO += tl.cast(lo, tl.int64) * stride_do * VEC
    for start in tl.range(lo, hi, BLOCK_M):
        q1 = _load(Q, stride_q, Lq - start, BLOCK_M, 0, D1, D, VEC, EVEN_M)
        do1 = _load(DO, stride_do, Lq - start, BLOCK_M, 0, D1, D, VEC, EVEN_M)
        q2 = q1
        do2 = do1
        if D2 > 0:
            q2 = _load(Q, stride_q, Lq - start, BLOCK_M, D1, D2, D, VEC, EVEN_M)
            do2 = _load(DO, stride_do, Lq - start, BLOCK_M, D1, D2, D, VEC, EVEN_M)
        i = start + tl.arange(0, BLOCK_M)
        EVEN: tl.constexpr = EVEN_M and KIND == "bias"  # elsewhere the masks cost no registers
        lse, log_l = _load_sums(LSE, i, Lq, KIND, EVEN)
        delta = _load_number(DELTA, i, Lq, 0.0, EVEN)
        zero = tl.zeros([BLOCK_N, BLOCK_M], dk1.dtype)
        s = _dot_rows(k1, k2, q1, q2, zero, D2, PRECISION, UPCAST)
        # Keys beyond the last need no mask: each fills its own row of dk and dv, which is not stored.
        z = _logits(
            s, scale, BIAS, start, j0, Lq, Lk, stride_bi, stride_bj,
            BLOCK_M, BLOCK_N, True, KIND, BIAS_PER_QUERY, False, CAUSAL,
        )  # fmt: skip
        p = _softmax(z, lse[None, :], log_l[None, :], KIND)
        pc = p.to(do1.dtype)
        dv1 = _dot(pc, do1, dv1, PRECISION, UPCAST)
        if D2 > 0:
            dv2 = _dot(pc, do2, dv2, PRECISION, UPCAST)
        dp = _dot_rows(v1, v2, do1, do2, zero, D2, PRECISION, UPCAST)
        ds = p * (dp - delta[None, :])
        if BIAS_GRAD == "per_key":
            db += tl.sum(ds, 1)
        elif BIAS_GRAD == "full":
            # One 64-bit address and 32-bit offsets: an address for each element takes registers.
            row, column = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
            tile = DBIAS + tl.cast(start, tl.int64) * Lk + j0
            tl.store(tile + (row * Lk + column), ds, mask=(row < Lq - start) & (column < Lk - j0))
        ds = ds.to(q1.dtype)
        dk1 = _dot(ds, q1, dk1, PRECISION, UPCAST)
        if D2 > 0:
            dk2 = _dot(ds, q2, dk2, PRECISION, UPCAST)
        Q += BLOCK_M * stride_q * VEC
        DO += BLOCK_M * stride_do * VEC
    return dk1, dk2, dv1, dv2, db


@triton.jit
def attention_dkdv_kernel(
    Q,
    K,
    V,
    BIAS,
    LSE,
    DO,
    DELTA,
    DK,
    DV,
    DBIAS,
    stride_qb,
    stride_qh,
    stride_q,
    stride_kb,
    stride_kh,
    stride_k,
    stride_vb,
    stride_vh,
    stride_v,
    stride_bb,
    stride_bh,
    stride_bi,
    stride_bj,
    stride_dob,
    stride_doh,
    stride_do,
    stride_dkb,
    stride_dkh,
    stride_dk,
    stride_dvb,
    stride_dvh,
    stride_dv,
    H,
    Lq,
    Lk,
    tiles,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    EVEN_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dk and dv of one tile of keys, and where asked the gradient of the bias."""
    tile, bh, b, h = _tile_of(H, tiles, False)
    bh = tl.cast(bh, tl.int64)
    start_n = tl.cast(tile * BLOCK_N, tl.int64)
    left = Lk - start_n
    Q += (b * stride_qb + h * stride_qh) * VEC
    DO += (b * stride_dob + h * stride_doh) * VEC
    LSE += bh * (2 * Lq if KIND == "bias" else Lq)
    DELTA += bh * Lq
    BIAS_bh = BIAS
    if KIND != "none":
        BIAS_bh += b * stride_bb + h * stride_bh
    DBIAS_bh = DBIAS
    if BIAS_GRAD == "full":
        DBIAS_bh += bh * Lq * Lk
    K += (b * stride_kb + h * stride_kh + start_n * stride_k) * VEC
    V += (b * stride_vb + h * stride_vh + start_n * stride_v) * VEC
    DK += (b * stride_dkb + h * stride_dkh + start_n * stride_dk) * VEC
    DV += (b * stride_dvb + h * stride_dvh + start_n * stride_dv) * VEC
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)

    k1 = _load(K, stride_k, left, BLOCK_N, 0, D1, D, VEC, False)
    v1 = _load(V, stride_v, left, BLOCK_N, 0, D1, D, VEC, False)
    dk1 = tl.zeros([BLOCK_N, D1], ACC)
    dv1 = tl.zeros([BLOCK_N, D1], ACC)
    db = tl.zeros([BLOCK_N], ACC)
    k2 = k1  # placeholders, unused when D2 == 0
    v2 = v1
    dk2 = dk1
    dv2 = dv1
    if D2 > 0:
        k2 = _load(K, stride_k, left, BLOCK_N, D1, D2, D, VEC, False)
        v2 = _load(V, stride_v, left, BLOCK_N, D1, D2, D, VEC, False)
        dk2 = tl.zeros([BLOCK_N, D2], ACC)
        dv2 = tl.zeros([BLOCK_N, D2], ACC)

    lo = 0
    if CAUSAL:  # queries before the first key see none of these
        lo = tile * BLOCK_N // BLOCK_M * BLOCK_M
    # With one loop, masked throughout when causal: a second one for the tiles that need no mask costs registers.
    dk1, dk2, dv1, dv2, db = _dkdv_loop(
        dk1, dk2, dv1, dv2, db, k1, k2, v1, v2, Q, DO, LSE, DELTA, BIAS_bh, DBIAS_bh, tile * BLOCK_N, lo, Lq,
        Lq, Lk, stride_q, stride_do, stride_bi, stride_bj, scale,
        D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, BIAS_GRAD, EVEN_M, CAUSAL, PRECISION, UPCAST,
    )  # fmt: skip

    _store(DK, stride_dk, left, dk1 * scale, BLOCK_N, 0, D1, D, VEC)
    _store(DV, stride_dv, left, dv1, BLOCK_N, 0, D1, D, VEC)
    if D2 > 0:
        _store(DK, stride_dk, left, dk2 * scale, BLOCK_N, D1, D2, D, VEC)
        _store(DV, stride_dv, left, dv2, BLOCK_N, D1, D2, D, VEC)
    if BIAS_GRAD == "per_key":
        tl.store(DBIAS + bh * Lk + j, db, mask=j < Lk)


# --- forward-mode derivative ----------------------------------------------------------------------------------


@triton.jit
def _tangent_loop(
    to1,
    to2,
    r,
    q1,
    q2,
    tq1,
    tq2,
    lse,
    log_l,
    K,
    V,
    TK,
    TV,
    BIAS,
    i0,
    lo,
    hi,
    Lq,
    Lk,
    stride_k,
    stride_v,
    stride_tk,
    stride_tv,
    stride_bi,
    stride_bj,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    K += tl.cast(lo, tl.int64) * stride_k * VEC
    if HAS_TQ or HAS_TK:
        V += tl.cast(lo, tl.int64) * stride_v * VEC
    if HAS_TK:
        TK += tl.cast(lo, tl.int64) * stride_tk * VEC
    if HAS_TV:
        TV += tl.cast(lo, tl.int64) * stride_tv * VEC
    for start in tl.range(lo, hi, BLOCK_N):
        left = Lk - start
        zero = tl.zeros([BLOCK_M, BLOCK_N], lse.dtype)
        k1 = _load(K, stride_k, left, BLOCK_N, 0, D1, D, VEC, not EDGE)
        k2 = k1
        if D2 > 0:
            k2 = _load(K, stride_k, left, BLOCK_N, D1, D2, D, VEC, not EDGE)
        s = _dot_rows(q1, q2, k1, k2, zero, D2, PRECISION, UPCAST)
        z = _logits(
            s, scale, BIAS, i0, start, Lq, Lk, stride_bi, stride_bj,
            BLOCK_M, BLOCK_N, False, KIND, BIAS_PER_QUERY, EDGE, EDGE and CAUSAL,
        )  # fmt: skip
        p = _softmax(z, lse[:, None], log_l[:, None], KIND)
        if HAS_TQ or HAS_TK:
            ts = zero
            if HAS_TQ:
                ts = _dot_rows(tq1, tq2, k1, k2, ts, D2, PRECISION, UPCAST)
            if HAS_TK:
                tk1 = _load(TK, stride_tk, left, BLOCK_N, 0, D1, D, VEC, not EDGE)
                tk2 = tk1
                if D2 > 0:
                    tk2 = _load(TK, stride_tk, left, BLOCK_N, D1, D2, D, VEC, not EDGE)
                ts = _dot_rows(q1, q2, tk1, tk2, ts, D2, PRECISION, UPCAST)
                TK += BLOCK_N * stride_tk * VEC
            tp = p * (ts * scale)
            r += tl.sum(tp, 1)
            v1 = _load(V, stride_v, left, BLOCK_N, 0, D1, D, VEC, not EDGE)
            tp = tp.to(v1.dtype)
            to1 = _dot(tp, v1, to1, PRECISION, UPCAST)
            if D2 > 0:
                v2 = _load(V, stride_v, left, BLOCK_N, D1, D2, D, VEC, not EDGE)
                to2 = _dot(tp, v2, to2, PRECISION, UPCAST)
            V += BLOCK_N * stride_v * VEC
        if HAS_TV:
            tv1 = _load(TV, stride_tv, left, BLOCK_N, 0, D1, D, VEC, not EDGE)
            pc = p.to(tv1.dtype)
            to1 = _dot(pc, tv1, to1, PRECISION, UPCAST)
            if D2 > 0:
                tv2 = _load(TV, stride_tv, left, BLOCK_N, D1, D2, D, VEC, not EDGE)
                to2 = _dot(pc, tv2, to2, PRECISION, UPCAST)
            TV += BLOCK_N * stride_tv * VEC
        K += BLOCK_N * stride_k * VEC
    return to1, to2, r


@triton.jit
def attention_tangent_kernel(
    Q,
    K,
    V,
    BIAS,
    TQ,
    TK,
    TV,
    O,
    LSE,
    TO,
    stride_qb,
    stride_qh,
    stride_q,
    stride_kb,
    stride_kh,
    stride_k,
    stride_vb,
    stride_vh,
    stride_v,
    stride_bb,
    stride_bh,
    stride_bi,
    stride_bj,
    stride_tqb,
    stride_tqh,
    stride_tq,
    stride_tkb,
    stride_tkh,
    stride_tk,
    stride_tvb,
    stride_tvh,
    stride_tv,
    stride_ob,
    stride_oh,
    stride_o,
    stride_tob,
    stride_toh,
    stride_to,
    H,
    Lq,
    Lk,
    tiles,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    EVEN_N: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tangent of o, given o and lse. One pass for both would save a sixth of the products, and spill from a head
    dim of 128 on."""
    tile, bh, b, h = _tile_of(H, tiles, CAUSAL)
    start_m = tl.cast(tile * BLOCK_M, tl.int64)
    left = Lq - start_m
    K += (b * stride_kb + h * stride_kh) * VEC
    V += (b * stride_vb + h * stride_vh) * VEC
    TK_bh = TK
    TV_bh = TV
    BIAS_bh = BIAS
    if HAS_TK:
        TK_bh += (b * stride_tkb + h * stride_tkh) * VEC
    if HAS_TV:
        TV_bh += (b * stride_tvb + h * stride_tvh) * VEC
    if KIND != "none":
        BIAS_bh += b * stride_bb + h * stride_bh
    Q += (b * stride_qb + h * stride_qh + start_m * stride_q) * VEC
    O += (b * stride_ob + h * stride_oh + start_m * stride_o) * VEC
    TO += (b * stride_tob + h * stride_toh + start_m * stride_to) * VEC
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    LSE += tl.cast(bh, tl.int64) * (2 * Lq if KIND == "bias" else Lq)
    lse, log_l = _load_sums(LSE, i, Lq, KIND, False)
    r = tl.zeros([BLOCK_M], ACC)
    q1 = _load(Q, stride_q, left, BLOCK_M, 0, D1, D, VEC, False)
    to1 = tl.zeros([BLOCK_M, D1], ACC)
    q2 = q1  # placeholders, unused when D2 == 0 or there is no tangent of q
    tq1 = q1
    tq2 = q1
    to2 = to1
    if D2 > 0:
        q2 = _load(Q, stride_q, left, BLOCK_M, D1, D2, D, VEC, False)
        to2 = tl.zeros([BLOCK_M, D2], ACC)
    if HAS_TQ:
        TQ_bh = TQ + (b * stride_tqb + h * stride_tqh + start_m * stride_tq) * VEC
        tq1 = _load(TQ_bh, stride_tq, left, BLOCK_M, 0, D1, D, VEC, False)
        if D2 > 0:
            tq2 = _load(TQ_bh, stride_tq, left, BLOCK_M, D1, D2, D, VEC, False)

    middle, end = _key_range(tile, Lk, BLOCK_M, BLOCK_N, CAUSAL)
    if CAUSAL:  # masked throughout: a loop of its own for the tiles that need no mask costs registers
        middle = 0
    if not ONE_TILE and not CAUSAL:
        to1, to2, r = _tangent_loop(
            to1, to2, r, q1, q2, tq1, tq2, lse, log_l, K, V, TK_bh, TV_bh, BIAS_bh, tile * BLOCK_M, 0, middle,
            Lq, Lk, stride_k, stride_v, stride_tk, stride_tv, stride_bi, stride_bj, scale,
            D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, False, CAUSAL, HAS_TQ, HAS_TK, HAS_TV,
            PRECISION, UPCAST,
        )  # fmt: skip
    if CAUSAL or not EVEN_N:
        to1, to2, r = _tangent_loop(
            to1, to2, r, q1, q2, tq1, tq2, lse, log_l, K, V, TK_bh, TV_bh, BIAS_bh, tile * BLOCK_M, middle, end,
            Lq, Lk, stride_k, stride_v, stride_tk, stride_tv, stride_bi, stride_bj, scale,
            D, D1, D2, VEC, BLOCK_M, BLOCK_N, KIND, BIAS_PER_QUERY, True, CAUSAL, HAS_TQ, HAS_TK, HAS_TV,
            PRECISION, UPCAST,
        )  # fmt: skip

    if HAS_TQ or HAS_TK:
        o1 = _load(O, stride_o, left, BLOCK_M, 0, D1, D, VEC, False)
        to1 -= r[:, None] * o1.to(ACC)
    _store(TO, stride_to, left, to1, BLOCK_M, 0, D1, D, VEC)
    if D2 > 0:
        if HAS_TQ or HAS_TK:
            o2 = _load(O, stride_o, left, BLOCK_M, D1, D2, D, VEC, False)
            to2 -= r[:, None] * o2.to(ACC)
        _store(TO, stride_to, left, to2, BLOCK_M, D1, D2, D, VEC)


# --- launches -------------------------------------------------------------------------------------------------


def _layout(**tensors: Tensor | None) -> dict[str, int]:
    """Strides of batch, head and row by the kernels' names, in units of VEC elements; the columns have stride 1.

    VEC elements are 16 bytes where all strides allow it: the compiler then sees that rows are aligned, also with a
    head dim such as 40, which is no multiple of the 16 elements that Triton looks for in an argument.
    """
    given = [tensor for tensor in tensors.values() if tensor is not None]
    vec = 16 // given[0].element_size()
    if any(stride % vec for tensor in given for stride in tensor.stride()[:3]):
        vec = 1
    strides = {"VEC": vec}
    for name, tensor in tensors.items():
        for axis, letter in enumerate(("b", "h", "")):
            strides[f"stride_{name}{letter}"] = 0 if tensor is None else tensor.stride(axis) // vec
    return strides


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    precision: str,
    tiles: Tiles,
) -> dict[str, Any]:
    """Arguments that every kernel takes."""
    d1, d2 = split_head_dim(q.shape[3])
    kind, per_query, strides = "none", False, [0, 0, 0, 0]
    if bias is not None:
        kind = "mask" if bias.dtype == torch.bool else "bias"
        per_query = bias.shape[2] > 1
        strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
    return {
        "Q": q,
        "K": k,
        "V": v,
        "BIAS": bias,
        "stride_bb": strides[0],
        "stride_bh": strides[1],
        "stride_bi": strides[2],
        "stride_bj": strides[3],
        "H": q.shape[1],
        "Lq": q.shape[2],
        "Lk": k.shape[2],
        "scale": scale,
        "D": q.shape[3],
        "D1": d1,
        "D2": d2,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "KIND": kind,
        "BIAS_PER_QUERY": per_query,
        "CAUSAL": is_causal,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "PRECISION": precision,
        "UPCAST": INTERPRET and q.dtype == torch.bfloat16,
    }


def _over_queries(kernel: Any, tiles: Tiles, args: dict[str, Any]) -> Launch:
    count = triton.cdiv(args["Lq"], tiles.block_m)
    args["tiles"] = count
    args["EVEN_N"] = args["Lk"] % tiles.block_n == 0
    args["ONE_TILE"] = args["Lk"] < tiles.block_n
    grid = (count * args["Q"].shape[0] * args["H"],)
    return Launch(kernel, grid, args, tiles.num_warps, tiles.num_stages)


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    o: Tensor,
    lse: Tensor,
    precision: str,
    tiles: Tiles,
) -> Launch:
    """Writes o (B, H, Lq, D) and lse (B, H, Lq), log2 of the sum of exp of the scores; where a bias is added
    (B, H, 2, Lq), their maximum m and log2 of the sum of exp(score - m)."""
    args = _common(q, k, v, bias, is_causal, scale, precision, tiles)
    args |= {"O": o, "LSE": lse, **_layout(q=q, k=k, v=v, o=o)}
    return _over_queries(attention_forward_kernel, tiles, args)


def tangent_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    is_causal: bool,
    scale: float,
    o: Tensor,
    lse: Tensor,
    to: Tensor,
    precision: str,
    tiles: Tiles,
) -> Launch:
    """Writes the tangent of o; a tangent that is None is zero and costs nothing."""
    args = _common(q, k, v, bias, is_causal, scale, precision, tiles)
    for name, tensor in (("Q", tq), ("K", tk), ("V", tv)):
        args |= {f"T{name}": tensor, f"HAS_T{name}": tensor is not None}
    args |= {"O": o, "TO": to, "LSE": lse, **_layout(q=q, k=k, v=v, tq=tq, tk=tk, tv=tv, o=o, to=to)}
    return _over_queries(attention_tangent_kernel, tiles, args)


def dq_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    dq: Tensor,
    precision: str,
    tiles: Tiles,
) -> Launch:
    """Writes dq, and delta = sum(o * do, -1), which :func:`dkdv_launch` needs."""
    args = _common(q, k, v, bias, is_causal, scale, precision, tiles)
    args |= {"O": o, "LSE": lse, "DO": do, "DELTA": delta, "DQ": dq}
    args |= _layout(q=q, k=k, v=v, o=o, do=do, dq=dq)
    return _over_queries(attention_dq_kernel, tiles, args)


def dkdv_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    precision: str,
    tiles: Tiles,
) -> Launch:
    """Writes dk and dv, and into dbias the gradient of the logits: (B, H, Lq, Lk), or (B, H, Lk) summed over queries.

    With ``is_causal``, dbias of the first shape must hold zeros: tiles above the diagonal are not visited.
    """
    args = _common(q, k, v, bias, is_causal, scale, precision, tiles)
    args |= {"LSE": lse, "DO": do, "DELTA": delta, "DK": dk, "DV": dv, "DBIAS": dbias}
    args |= _layout(q=q, k=k, v=v, do=do, dk=dk, dv=dv)
    args["BIAS_GRAD"] = "none" if dbias is None else "per_key" if dbias.dim() == 3 else "full"
    args["EVEN_M"] = args["Lq"] % tiles.block_m == 0
    args["tiles"] = triton.cdiv(args["Lk"], tiles.block_n)
    grid = (args["tiles"] * q.shape[0] * q.shape[1],)
    return Launch(attention_dkdv_kernel, grid, args, tiles.num_warps, tiles.num_stages)
