"""Counter-based normal noise: sample ``i`` draws the same numbers whatever the batch, order, shard or device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the 64-bit seed, on
the counter (block of four elements, stream, sample low, sample high). The 32-bit words are the same on every
device; the normals (Box-Muller in float32) agree to a few units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL_A, _MUL_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORDS_AT_ONCE = 1 << 16  # so that the ten rounds run in cache

START = 0  # the stream of the starting noise; row r of a plan draws from stream r + 1


def philox(seed: int, block: Tensor, stream: int, sample: Tensor) -> list[Tensor]:
    """Four 32-bit words (in int64 tensors) for each counter.

    Args:
        seed: 64-bit key.
        block: int64, the index of the block of four elements within a sample.
        stream: 32-bit stream number.
        sample: int64, global sample index; broadcasts with ``block``.
    """
    block, sample = torch.broadcast_tensors(block, sample)
    c0, c1 = block & _MASK, torch.full_like(block, stream & _MASK)
    c2, c3 = sample & _MASK, (sample >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64; their bits are those of the unsigned product.
        a, b = c0 * _MUL_A, c2 * _MUL_B
        c0 = (((b >> 32) & _MASK) ^ c1) ^ k0
        c2 = (((a >> 32) & _MASK) ^ c3) ^ k1
        c1, c3 = b & _MASK, a & _MASK
        k0, k1 = (k0 + _WEYL_A) & _MASK, (k1 + _WEYL_B) & _MASK
    return [c0, c1, c2, c3]


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # 24 bits each, exact in float32; the radius never sees log(0).
    radius = torch.sqrt(-2 * torch.log(((u >> 8) + 1).float() * 2.0**-24))
    angle = (v >> 8).float() * (2 * math.pi * 2.0**-24)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal(
    shape: Sequence[int],
    seed: int,
    index: Tensor,
    stream: int = START,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise for the samples ``index``.

    Args:
        shape: (B, ...), ``B`` equal to ``len(index)``.
        seed: 64-bit seed.
        index: int64 (B,), global sample indices; the result is on its device.
        stream: which independent draw of each sample.
        dtype: of the result; the numbers are float32 normals in any dtype.
        out: written when given, contiguous, of that shape.

    Raises:
        ValueError: ``index`` and ``shape`` disagree.
    """
    if len(shape) == 0 or index.shape != (shape[0],):
        raise ValueError(
            f"index has shape {tuple(index.shape)} but shape={tuple(shape)}; give one index a sample"
        )
    count = math.prod(shape[1:])
    result = out if out is not None else torch.empty(tuple(shape), dtype=dtype, device=index.device)
    flat = result.view(shape[0], count)
    blocks = -(-count // 4)
    rows_at_once = max(1, _WORDS_AT_ONCE // max(blocks, 1))
    blocks_at_once = min(blocks, _WORDS_AT_ONCE)
    on_cpu = index.device.type == "cpu"
    if not on_cpu:
        rows_at_once, blocks_at_once = shape[0], blocks
    for first in range(0, shape[0], max(rows_at_once, 1)):
        sample = index[first : first + rows_at_once, None]
        for start in range(0, blocks, max(blocks_at_once, 1)):
            stop = min(blocks, start + blocks_at_once)
            block = torch.arange(start, stop, dtype=torch.int64, device=index.device)[None]
            w0, w1, w2, w3 = philox(seed, block, stream, sample)
            normals = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1).flatten(1)
            last = min(count, 4 * stop)
            flat[first : first + rows_at_once, 4 * start : last] = normals[:, : last - 4 * start]
    return result
