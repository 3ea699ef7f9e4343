"""The update between two network evaluations of a sampler, in one pass over memory:

    m = p x_s + q (null + guidance (output - null))        conversion of the network's output, guided
    y = sum_j a_j x_j + b m + c z                          the solver's row; z is counter-based normal noise

``x_j`` are earlier states and predictions, ``x_s`` one of them: the state that the network was evaluated at. Both y
and m are written. Layers: noise, reference, launcher, operator, ``update``; the Triton function is in
``_update_kernels.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _runtime as runtime
from ._launch import Launch

MAX_TERMS = 8
_BLOCKS = 256  # of four elements: the tile of one program
_SEED = 1 << 64


# -- noise ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """One draw of counter-based normal noise for every sample of a batch.

    Philox4x32-10 (Salmon et al. 2011) keyed by ``seed`` on the counter (block of four elements, stream, sample low,
    sample high), then Box-Muller: what a sample draws depends on neither the batch nor the device.

    Attributes:
        coefficient: c, the noise's weight.
        seed: 64-bit key.
        stream: 32-bit number of the draw.
        index: int64 (batch,), the samples' global numbers.
    """

    coefficient: float
    seed: int
    stream: int
    index: Tensor


def philox(seed: int, block: Tensor, stream: int, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each counter, in int64 tensors; ``block`` and ``sample`` (int64) broadcast."""
    mask = 0xFFFFFFFF
    block, sample = torch.broadcast_tensors(block, sample)
    c0, c1, c2, c3 = block & mask, torch.full_like(block, stream & mask), sample & mask, (sample >> 32) & mask
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # The products wrap modulo 2^64; their bits are those of the unsigned product.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & mask) ^ c1 ^ k0, b & mask, ((a >> 32) & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def normal(like: Tensor, seed: int, stream: int, index: Tensor) -> Tensor:
    """The noise z of :class:`Noise` in plain torch: float32 normals, (batch, ...), in the type of ``like``."""
    count = math.prod(like.shape[1:])
    block = torch.arange(-(-count // 4), device=like.device)
    normals = []
    w = philox(seed, block, stream, index[:, None])
    for u, v in (w[:2], w[2:]):
        radius = torch.sqrt(-2 * torch.log(((u >> 8) + 1).float() * 2.0**-24))
        angle = (v >> 8).float() * (2 * math.pi * 2.0**-24)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :count].reshape(like.shape).to(like.dtype)


# -- reference -----------------------------------------------------------------------------------------------


def reference(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    output: Tensor | None = None,
    null: Tensor | None = None,
    guidance: float = 1.0,
    state: int | None = None,
    convert: tuple[float, float] = (0.0, 1.0),
    weight: float = 0.0,
    noise: Noise | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`update` in plain torch: what runs where Triton does not, and what the kernel is tested against."""
    like = tensors[0] if tensors else output
    assert like is not None
    acc = runtime.accumulator(like.dtype)
    y = torch.zeros_like(like, dtype=acc) if not tensors else tensors[0].to(acc) * coefficients[0]
    for x, a in zip(tensors[1:], coefficients[1:], strict=True):
        y = torch.add(y, x.to(acc), alpha=a)
    m = None
    if output is not None:
        p, q = convert
        out = output.to(acc)
        m = q * (out if null is None else torch.lerp(null.to(acc), out, guidance))
        m = m if state is None else torch.add(m, tensors[state].to(acc), alpha=p)
        y = torch.add(y, m, alpha=weight)
    if noise is not None:
        y = torch.add(y, normal(y, noise.seed, noise.stream, noise.index), alpha=noise.coefficient)
    return y.to(like.dtype), m.to(like.dtype) if m is not None and keep else None


# -- launcher and operator -----------------------------------------------------------------------------------


def _same_memory_order(tensors: Sequence[Tensor]) -> bool:
    """Whether element i in memory is the same element of every tensor, without gaps."""
    first = tensors[0]
    dense = torch.empty_like(first, device="meta").stride() == first.stride()
    return dense and all(t.stride() == first.stride() for t in tensors)


def update_launch(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    output: Tensor | None,
    null: Tensor | None,
    guidance: float,
    state: int,
    p: float,
    q: float,
    weight: float,
    index: Tensor | None,
    seed: int,
    stream: int,
    c: float,
    keep: bool,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch, y and m (empty unless kept)."""
    from ._update_kernels import update as kernel

    given = [t for t in (*tensors, output, null) if t is not None]
    in_place = index is None and _same_memory_order(given)
    # Noise is counted in the order of the elements, so it needs them in that order.
    xs = list(tensors) if in_place else [t.contiguous() for t in tensors]
    output, null = (t if in_place or t is None else t.contiguous() for t in (output, null))
    like = xs[0] if xs else output
    assert like is not None
    y = runtime.empty_like(like)
    m = runtime.empty_like(like) if keep else like.new_empty(0)
    samples = like.shape[0] if index is not None else 1
    size = like.numel() // samples
    tiles = -(-size // (4 * _BLOCKS))
    arguments: dict[str, Any] = {}
    for j in range(MAX_TERMS):
        arguments[f"x{j}"] = xs[j] if j < len(xs) else like
        arguments[f"a{j}"] = float(coefficients[j]) if j < len(xs) else 0.0
    arguments |= {
        "output": like if output is None else output,
        "null": like if null is None else null,
        "guidance": float(guidance),
        "p": float(p),
        "q": float(q),
        "b": float(weight),
        "index": like if index is None else index.contiguous(),
        "seed": seed,
        "stream": stream,
        "c": float(c),
        "y": y,
        "m": m if keep else y,
        "size": size,
        "tiles": tiles,
        "TERMS": len(xs),
        "STATE": state,
        "HAS_OUTPUT": output is not None,
        "HAS_NULL": null is not None,
        "HAS_NOISE": index is not None,
        "KEEP": keep,
        "ACC": runtime.triton_dtype(runtime.accumulator(like.dtype)),
        "BLOCKS": _BLOCKS,
    }
    return Launch(kernel, (samples * tiles,), arguments, 4, 1), y, m


@torch.library.custom_op("fastsample_kernels::update", mutates_args=())
def _update(
    tensors: list[Tensor],
    coefficients: list[float],
    output: Tensor | None,
    null: Tensor | None,
    guidance: float,
    state: int,
    p: float,
    q: float,
    weight: float,
    index: Tensor | None,
    seed: int,
    stream: int,
    c: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    launch, y, m = update_launch(
        tensors, coefficients, output, null, guidance, state, p, q, weight, index, seed, stream, c, keep
    )
    with runtime.on_device(y):
        launch()
    return y, m
