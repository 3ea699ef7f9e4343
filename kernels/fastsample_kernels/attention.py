"""Softmax attention: forward, backward and forward-mode derivative, self and cross.

With s = scale * q k^T + bias and p = softmax(s) over the keys,

    o  = p v
    dv = p^T do,  dp = do v^T,  ds = p * (dp - sum(o * do)),  dq = scale * ds k,  dk = scale * ds^T q,  dbias = ds
    to = (p * ts) v - sum(p * ts) o + p tv,  ts = scale * (tq k^T + q tk^T)             (t: tangent)

The forward and backward passes follow FlashAttention-2 (Dao 2023, algorithms 1 and 2) with separate kernels for dq
and for dk and dv, so that nothing is summed by atomics; the tangent is that of Lu & Song 2024 ("Simplifying,
stabilizing and scaling continuous-time consistency models", appendix F).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime

MAX_HEAD_DIM = 256


# --- reference and fallback -----------------------------------------------------------------------------------


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """:func:`attention` written out in plain torch: what the kernels are tested against, in any dtype."""
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    masks = [] if bias is None or bias.dtype != torch.bool else [bias]
    if is_causal:
        masks.append(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril())
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(s.dtype)
    for mask in masks:
        s = s.masked_fill(~mask, -math.inf)
    # A row that is masked throughout gives zeros, as in PyTorch's attention.
    empty = (s == -math.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0) @ v


def _fallback(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's attention, and the reference for tangents, which PyTorch's fast backends do not carry."""
    if _runtime.unpack_duals([q, k, v, bias])[1] is not None:
        return reference(q, k, v, bias=bias, is_causal=is_causal, scale=scale)
    if bias is not None and is_causal:  # PyTorch takes one of the two
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        bias = bias & causal if bias.dtype == torch.bool else bias.masked_fill(~causal, -math.inf)
        is_causal = False
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale)


# --- tiles ----------------------------------------------------------------------------------------------------

Pass = Literal["forward", "jvp", "dq", "dkdv"]


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of one tile, and Triton's compile options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) with the smallest sum that is at least ``head_dim``; 16 at least each.

    40 = 32 + 16 (8 padded), 80 = 64 + 16, 96 = 64 + 32, 160 = 128 + 32; 120 = 128 + 0.
    """
    whole = max(16, _power_of_two(head_dim))
    first = whole // 2
    second = max(16, _power_of_two(max(1, head_dim - first)))
    return (whole, 0) if first < 16 or second >= first else (first, second)
