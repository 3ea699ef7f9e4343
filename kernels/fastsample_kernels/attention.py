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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime as runtime
from ._replay import replayed

MAX_HEAD_DIM = 256
_LOG2E = math.log2(math.e)


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
    """:func:`attention` written out in plain torch: what the kernels are tested against, in any dtype. A bias is added
    in float32 (float64 for float64)."""
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    masks = [] if bias is None or bias.dtype != torch.bool else [bias]
    if is_causal:
        masks.append(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril())
    if bias is not None and bias.dtype != torch.bool:
        wide = runtime.accumulator(s.dtype)
        s = s.to(wide) + bias.to(wide)
    for mask in masks:
        s = s.masked_fill(~mask, -math.inf)
    # A row that is masked throughout gives zeros, as in PyTorch's attention.
    empty = (s == -math.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0).to(v.dtype) @ v


def _fallback(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's attention, and the reference for tangents, which PyTorch's fast backends do not carry."""
    if runtime.unpack_duals([q, k, v, bias])[1] is not None:
        return reference(q, k, v, bias=bias, is_causal=is_causal, scale=scale)
    if scale is not None and scale < 0:  # PyTorch's CPU kernel masks before it scales, and gives NaN
        q, scale = -q, -scale
    if bias is not None and is_causal:  # PyTorch takes one of the two
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        bias = bias & causal if bias.dtype == torch.bool else bias.masked_fill(~causal, -math.inf)
        is_causal = False
    if bias is not None and bias.dtype != torch.bool:
        kept = torch.finfo(q.dtype)  # finite numbers stay finite, as they do in the kernels
        bias = torch.where(bias.isinf(), bias, bias.clamp(kept.min, kept.max)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale)


# --- tiles ----------------------------------------------------------------------------------------------------

Pass = Literal["forward", "tangent", "dq", "dkdv"]


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


_T = Tiles
_Table = dict[Pass, tuple[tuple[int, Tiles], ...]]  # (largest padded head dim, tiles)

# Those of sm_80 and sm_100 are chosen without a GPU: the largest that spill no registers.
# Compute capability 8.x and 12.x: warp-wide tensor-core instructions, and the 99 KiB of shared memory all have.
_TILES_MMA: _Table = {
    "forward": (
        (96, _T(128, 64, 8, 2)),
        (128, _T(64, 64, 8, 2)),
        (160, _T(128, 32, 8, 2)),
        (256, _T(64, 32, 8, 2)),
    ),
    "tangent": (
        (64, _T(64, 32, 4, 2)),
        (128, _T(64, 32, 8, 2)),
        (160, _T(64, 16, 4, 2)),
        (256, _T(32, 16, 8, 2)),
    ),
    "dq": (
        (80, _T(64, 64, 8, 2)),
        (96, _T(64, 32, 8, 2)),  # in two parts of 64 and 32, which take more registers than one of 128
        (128, _T(64, 64, 8, 2)),
        (160, _T(64, 32, 8, 2)),
        (256, _T(64, 16, 8, 2)),
    ),
    "dkdv": (
        (64, _T(64, 128, 8, 2)),
        (80, _T(32, 64, 4, 2)),
        (128, _T(32, 64, 8, 2)),
        (256, _T(16, 64, 8, 2)),
    ),
}
# 9.x: tensor-core instructions of four warps, 227 KiB. By time on an H200 (benchmarks/results/kernels-h200.md).
_TILES_WGMMA: _Table = {
    "forward": (
        (80, _T(128, 64, 8, 3)),
        (96, _T(128, 128, 8, 3)),
        (128, _T(64, 64, 4, 3)),
        (160, _T(128, 64, 8, 3)),
        (256, _T(128, 32, 8, 3)),
    ),
    "tangent": (
        (48, _T(64, 64, 4, 2)),
        (160, _T(128, 32, 8, 3)),
        (256, _T(32, 16, 8, 2)),
    ),
    "dq": (
        (64, _T(128, 64, 8, 3)),
        (96, _T(64, 64, 4, 3)),
        (128, _T(128, 64, 8, 3)),
        (160, _T(128, 32, 8, 3)),
        (256, _T(128, 32, 8, 2)),
    ),
    "dkdv": (
        (48, _T(32, 64, 4, 2)),
        (64, _T(64, 64, 4, 4)),
        (80, _T(64, 64, 4, 3)),
        (96, _T(64, 64, 8, 2)),
        (128, _T(32, 64, 4, 3)),
        (160, _T(32, 128, 8, 3)),
        (256, _T(32, 64, 8, 3)),
    ),
}
# 10.x: accumulators in tensor memory (512 columns), through which masks and biases must pass.
_TILES_TCGEN05: _Table = {
    "forward": (
        (64, _T(128, 128, 8, 3)),
        (128, _T(128, 64, 8, 3)),
        (160, _T(128, 64, 8, 2)),
        (256, _T(128, 32, 8, 2)),
    ),
    "tangent": (
        (128, _T(128, 32, 8, 2)),
        (160, _T(64, 32, 8, 2)),
        (256, _T(64, 16, 8, 2)),
    ),
    "dq": ((64, _T(64, 128, 8, 2)), (160, _T(64, 64, 8, 2)), (256, _T(64, 32, 4, 2))),
    "dkdv": ((80, _T(64, 128, 8, 2)), (128, _T(64, 64, 8, 2)), (256, _T(32, 64, 8, 2))),
}
# Any of them, with a bias for each query (on 10.x with any bias): its tile takes registers too.
_TILES_BIASED: _Table = {
    "forward": ((96, _T(64, 32, 4, 2)), (256, _T(64, 16, 8, 2))),
    "tangent": ((96, _T(64, 16, 4, 2)), (160, _T(32, 16, 8, 2)), (256, _T(16, 16, 8, 1))),
    "dq": ((128, _T(64, 32, 8, 2)), (256, _T(64, 16, 8, 2))),
    "dkdv": (
        (64, _T(32, 64, 8, 1)),
        (96, _T(16, 64, 8, 2)),
        (128, _T(16, 64, 8, 1)),
        (256, _T(16, 16, 4, 1)),
    ),
}
# Any of them, float32 with TF32 products.
_TILES_TF32: _Table = {
    "forward": ((64, _T(64, 32, 4, 2)), (256, _T(32, 16, 4, 2))),
    "tangent": ((64, _T(32, 16, 4, 2)), (256, _T(16, 16, 8, 1))),
    "dq": ((64, _T(32, 32, 4, 2)), (128, _T(32, 16, 4, 2)), (256, _T(16, 16, 4, 1))),
    "dkdv": (
        (48, _T(16, 32, 4, 1)),  # two parts take more registers than one of the next power of two
        (64, _T(32, 32, 8, 1)),
        (80, _T(16, 32, 4, 1)),
        (96, _T(16, 16, 4, 1)),
        (128, _T(32, 32, 8, 1)),
        (256, _T(16, 16, 8, 1)),
    ),
}
_ONE_TILE = _T(64, 128, 8, 1)
_SHORT_WGMMA = _T(
    64, 16, 4, 3
)  # 77 keys are five of 16: faster than one of 128 at every head dim from 40 to 160


def tiles(
    which: Pass,
    head_dim: int,
    key_length: int,
    *,
    element_size: int,
    capability: tuple[int, int],
    bias: Literal["none", "per_key", "per_query"] = "none",
) -> Tiles:
    """Tiles of one pass; a pure function, so nothing is tuned at run time.

    Args:
        which: "forward", "tangent", "dq" or "dkdv".
        head_dim: D, at most 256.
        key_length: Lk. In the forward pass up to 128 keys (the 77 of CLIP) make one tile where that fits.
        element_size: bytes of an element of q, k and v.
        capability: compute capability of the GPU.
        bias: whether there is one, and whether it is the same for every query.
    """
    table = {9: _TILES_WGMMA, 10: _TILES_TCGEN05}.get(capability[0], _TILES_MMA)
    plain = bias == "none" or (bias == "per_key" and capability[0] != 10)
    if element_size > 2:
        table = _TILES_TF32
    elif not plain:
        table = _TILES_BIASED
    width = sum(split_head_dim(head_dim))
    chosen = next(t for largest, t in table[which] if width <= largest)
    if which == "dkdv":
        return chosen
    short = which == "forward" and element_size == 2 and plain and key_length <= 128
    if short and table is _TILES_WGMMA and key_length > 16 and width <= 160:
        return _SHORT_WGMMA
    if key_length <= chosen.block_n:
        # With one stage, Triton 3.6 makes wrong code for sm_90 where the head dim is in two parts.
        stages = chosen.num_stages if capability[0] == 9 else 1
        return replace(chosen, block_n=max(16, _power_of_two(key_length)), num_stages=stages)
    room = 80 if table is _TILES_MMA else 128
    return _ONE_TILE if short and width <= room else chosen


# --- operators ------------------------------------------------------------------------------------------------
# Beside o the forward operator returns lse (B, H, Lq), log2 of the sum of exp of the scores, which carries no
# gradient; where a bias is added (B, H, 2, Lq), their maximum m and log2 of the sum of exp(score - m), since the sum
# of the two has no digits left for the second at a mask of -1e9. Outputs are laid out as (batch, length, heads, dim),
# where the layers around attention want them.


def _capability(device: torch.device) -> tuple[int, int]:
    return runtime.capability(device.index or 0) if device.type == "cuda" else (9, 0)


def _tiles(which: Pass, q: Tensor, k: Tensor, bias: Tensor | None) -> Tiles:
    return tiles(
        which,
        q.shape[3],
        k.shape[2],
        element_size=q.element_size(),
        capability=_capability(q.device),
        bias="none" if bias is None else "per_query" if bias.dim() > 1 and bias.shape[-2] > 1 else "per_key",
    )


def _precision(which: Pass, q: Tensor) -> str:
    """Of the products: float32 is rounded to TF32, or, where that would spill registers, cut off. The interpreter does
    neither."""
    if q.dtype != torch.float32 or runtime.INTERPRET:
        return "ieee"
    dim = q.shape[3]
    cut = dim > 160 if which == "tangent" else which == "dkdv" and 64 < dim <= 80
    return "tf32" if cut else "rounded"


def _empty_like(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    return runtime.empty((batch, length, heads, dim), x.dtype, x.device).transpose(1, 2)


def _empty_rows(q: Tensor) -> Tensor:
    """One number for each query."""
    return runtime.empty(q.shape[:3], runtime.accumulator(q.dtype), q.device)


def _empty_sums(q: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dtype == torch.bool:
        return _empty_rows(q)
    batch, heads, queries = q.shape[:3]
    return runtime.empty((batch, heads, 2, queries), runtime.accumulator(q.dtype), q.device)


def _unit_columns(*tensors: Tensor | None) -> list[Any]:
    """The kernels read rows whose elements are neighbours."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


@torch.library.custom_op("fastsample_kernels::attention", mutates_args=())
@replayed(torch._C._get_cudnn_sdp_enabled)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from ._attention_kernels import forward_launch

    q, k, v = _unit_columns(q, k, v)
    if scale < 0:  # the kernel takes the scale out of the maximum
        q, scale = -q, -scale
    if _why_not_cudnn(q, k, v, bias, is_causal, scale) is None:
        return _cudnn_forward(q, k, v, is_causal, scale)
    o, lse = _empty_like(q), _empty_sums(q, bias)
    with runtime.on_device(q):
        forward_launch(
            q, k, v, bias, is_causal, scale, o, lse, _precision("forward", q), _tiles("forward", q, k, bias)
        )()
    return o, lse


def _why_not_cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> str | None:
    """Why the forward pass is our kernel's and not cuDNN's; None where that is at hand and was measured to be faster
    (benchmarks/results/kernels-h200.md)."""
    if not q.is_cuda:
        return "not on a GPU"
    if bias is not None:
        return "there is a bias"
    if q.dtype not in runtime.LOW_PRECISION:
        return "cuDNN's attention takes 16-bit types only"
    if scale == 0:
        return "scale=0, for which cuDNN gives NaN"
    if _capability(q.device)[0] != 9:
        return "measured on compute capability 9.0 only"
    return runtime.why_not_cudnn_attention(q, k, v, is_causal)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _cudnn(q, k, v, is_causal, scale, True)
    return _laid_out(out, q), lse.reshape(q.shape[:3]) * _LOG2E


def _laid_out(out: Tensor, q: Tensor) -> Tensor:
    """cuDNN's output, which has the order of q's axes, in the one that the kernels write."""
    o = _empty_like(q)
    return out if out.stride() == o.stride() else o.copy_(out)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, sums: bool) -> Any:
    """Its output, and the logarithms of its sums where they are wanted, which takes it longer."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(q, k, v, None, sums, 0.0, is_causal, scale=scale)[:2]


@torch.library.custom_op("fastsample_kernels::attention_tangent", mutates_args=())
@replayed()
def _tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor]:
    from ._attention_kernels import tangent_launch

    q, k, v, tq, tk, tv, o = _unit_columns(q, k, v, tq, tk, tv, o)
    to = _empty_like(q)
    with runtime.on_device(q):
        tangent_launch(
            q,
            k,
            v,
            bias,
            tq,
            tk,
            tv,
            is_causal,
            scale,
            o,
            lse.contiguous(),
            to,
            _precision("tangent", q),
            _tiles("tangent", q, k, bias),
        )()
    return (to,)


@torch.library.custom_op("fastsample_kernels::attention_backward", mutates_args=())
@replayed()
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias; the last is empty unless asked for."""
    from ._attention_kernels import dkdv_launch, dq_launch

    q, k, v, o, do = _unit_columns(q, k, v, o, do)
    lse = lse.contiguous()
    dq, dk, dv, delta = _empty_like(q), _empty_like(k), _empty_like(v), _empty_rows(q)
    dlogits = None
    if bias_needs_grad and bias is not None:
        batch, heads, queries, keys = *q.shape[:3], k.shape[2]
        if bias.shape[2] == 1:  # summed over the queries inside of the kernel
            dlogits = runtime.empty((batch, heads, keys), lse.dtype, q.device)
        else:
            dlogits = runtime.empty((batch, heads, queries, keys), lse.dtype, q.device)
            if is_causal:
                dlogits.zero_()
    with runtime.on_device(q):
        dq_launch(
            q,
            k,
            v,
            bias,
            is_causal,
            scale,
            o,
            lse,
            do,
            delta,
            dq,
            _precision("dq", q),
            _tiles("dq", q, k, bias),
        )()
        dkdv_launch(
            q,
            k,
            v,
            bias,
            is_causal,
            scale,
            lse,
            do,
            delta,
            dk,
            dv,
            dlogits,
            _precision("dkdv", q),
            _tiles("dkdv", q, k, bias),
        )()
    if dlogits is None or bias is None:
        return dq, dk, dv, runtime.empty((0,), q.dtype, q.device)
    if dlogits.dim() == 3:
        dlogits = dlogits.unsqueeze(2)
    return dq, dk, dv, dlogits.sum_to_size(bias.shape).to(bias.dtype, copy=True)


@_forward.register_fake
def _(q, k, v, bias, is_causal, scale):
    return _empty_like(q), _empty_sums(q, bias)


@_tangent.register_fake
def _(q, k, v, bias, tq, tk, tv, o, lse, is_causal, scale):
    return (_empty_like(q),)


@_backward.register_fake
def _(do, q, k, v, bias, o, lse, is_causal, scale, bias_needs_grad):
    wanted = bias_needs_grad and bias is not None
    dbias = bias.new_empty(bias.shape) if wanted else q.new_empty(0)
    return _empty_like(q), _empty_like(k), _empty_like(v), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, bias, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, o, lse = ctx.saved_tensors
    if do is None:
        return (None,) * 6
    runtime.refuse_duals("attention's gradient", do, q, k, v, bias)
    wanted = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _call_backward(do, q, k, v, bias, o, lse, ctx.is_causal, ctx.scale, wanted)
    return dq, dk, dv, dbias if wanted else None, None, None


_call_forward = runtime.differentiable(_forward, _gradients, _save)
_call_tangent = runtime.differentiable(_tangent)
_call_backward = runtime.differentiable(_backward)

runtime.autocasts(_forward, 3)
# The mapped dimension of vmap becomes part of the batch.
runtime.batched(_forward, "nnnn--")
runtime.batched(_tangent, "nnnnnnnnn--")
runtime.batched(_backward, "nnnnnnn---")


# --- the function ---------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; attention needs (batch, heads, length, dim): "
                "add the missing axes with unsqueeze"
            )
        if x.dtype != q.dtype or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}, q is {q.dtype} of shape {tuple(q.shape)}; "
                "all three need one dtype, batch and number of heads: convert or expand"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; convert it to a floating-point type")
    runtime.check_devices("q", q, {"k": k, "v": v, "bias": bias})
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has dim {k.shape[3]} and q has {q.shape[3]}; they must be equal")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has length {v.shape[2]} and k has {k.shape[2]}; they must be equal")
    if bias is None:
        return
    scores = (*q.shape[:3], k.shape[2])
    if bias.dim() > 4 or any(
        size not in (1, full) for size, full in zip(reversed(bias.shape), reversed(scores), strict=False)
    ):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, which does not broadcast to {scores}")
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(f"bias has dtype {bias.dtype}; use a floating-point bias or a Boolean mask")


def supported(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the kernels cannot take these arguments of :func:`attention`; None when they can."""
    reason = runtime.why_not(q, k, v, None if bias is None or bias.dtype == torch.bool else bias)
    if reason is not None:
        return reason
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head dim {q.shape[3]} is above {MAX_HEAD_DIM}"
    if v.shape[3] != q.shape[3]:
        return f"v has another head dim ({v.shape[3]}) than q ({q.shape[3]})"
    if q.is_cuda and q.dtype == torch.float32 and not runtime.tf32_allowed():
        return "float32 products may not be rounded to TF32 (torch.backends.cuda.matmul.allow_tf32 = True)"
    if bias is not None and runtime.unpack_duals([bias])[1] is not None:
        return "bias has a forward-mode tangent"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention, ``softmax(scale * q k^T + bias) v``; the arguments are those of PyTorch's
    ``scaled_dot_product_attention``.

    Differentiable in reverse mode and in forward mode (each once) in q, k, v and, in reverse mode, in bias;
    results do not change from run to run. Where the kernels do not run (``explain(attention, ...)`` says why)
    PyTorch's own attention does. Under autocast q, k and v are cast as PyTorch's attention casts them.

    Args:
        q: (batch, heads, Lq, dim), float16, bfloat16 or float32; any strides, read in place when elements of a
            row are neighbours.
        k, v: (batch, heads, Lk, dim), of the dtype of q.
        bias: broadcasts to (batch, heads, Lq, Lk); added to the scores, or, when Boolean, a mask whose True
            entries take part. A query whose keys are all masked, by False or -inf, gives zeros. The sum of scores
            and bias is rounded to float32 and nothing else happens to finite numbers, as in PyTorch's "math"
            attention: where a mask holds the lowest number of float32 or bfloat16 in place of -inf, a query with no
            other key gives the mean of v (the sum leaves nothing of the scores); where it holds -1e4, the softmax
            of the scores to 3 decimals.
        is_causal: query i sees the keys j <= i only (counted from the first, whatever Lq and Lk); may be
            combined with bias.
        scale: of the scores; None means dim ** -0.5.

    Returns:
        (batch, heads, Lq, dim) in the dtype of q, laid out as (batch, Lq, heads, dim) by the kernels.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message says which.
        NotImplementedError: a second derivative through the kernels.
    """
    q, k, v = runtime.autocast(q, k, v)  # before the kernels are chosen
    _check(q, k, v, bias)
    if supported(q, k, v, bias) is not None:
        return _fallback(q, k, v, bias, is_causal, scale)
    if scale is None:
        scale = q.shape[3] ** -0.5
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        if torch._C._are_functorch_transforms_active():  # vmap folds into the batch
            bias = bias.expand(q.shape[0], *bias.shape[1:])
    alone = not runtime.watched() and not runtime.transformed() and runtime.only_result((q, k, v, bias))
    if alone and scale > 0 and _why_not_cudnn(q, k, v, bias, is_causal, scale) is None:
        return _laid_out(_cudnn(q, k, v, is_causal, scale, False)[0], q)
    primals, tangents = runtime.unpack_duals((q, k, v, bias))
    o, lse = _call_forward(*primals, is_causal, scale)
    if tangents is None:
        return o
    (to,) = _call_tangent(*primals, *tangents[:3], o, lse, is_causal, scale)
    return runtime.make_dual(o, to)


@runtime.explains("attention")
def _explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> runtime.Answer:
    q, k, v = runtime.autocast(q, k, v)
    _check(q, k, v, bias)
    reason = supported(q, k, v, bias)
    if reason is not None:
        return runtime.Answer("attention", reason, "")
    first, second = split_head_dim(q.shape[3])
    passes: tuple[Pass, ...] = ("forward", "tangent", "dq", "dkdv")
    chosen = ", ".join(f"{which} {_tiles(which, q, k, bias)}" for which in passes)
    if _why_not_cudnn(q, k, v, bias, is_causal, scale) is None:
        chosen += "; the forward pass is cuDNN's, which is faster there"
    return runtime.Answer("attention", None, f"head dim {q.shape[3]} as {first} + {second}, {chosen}")
