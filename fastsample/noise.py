"""Counter-based normal noise: sample ``i`` draws the same numbers whatever the batch, order, shard or device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the 64-bit seed,
on the counter (block of four elements, stream, sample low, sample high). The 32-bit words are the same on
every device; the normals (Box-Muller in float32) agree to a few units in the last place.
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

START = 0  # the stream of the starting noise; plans draw from streams 1, 2, ..


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
    a, b = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64; their bits are those of the unsigned product.
        torch.mul(c0, _MUL_A, out=a)
        torch.mul(c2, _MUL_B, out=b)
        # The high halves of c1 and c3 hold what does not matter until the end, when they are cut off.
        torch.bitwise_right_shift(b, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(a, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3, a, b = b, a, c3, c1
        k0, k1 = (k0 + _WEYL_A) & _MASK, (k1 + _WEYL_B) & _MASK
    return [c0, c1 & _MASK, c2, c3 & _MASK]


def _box_muller(u: Tensor, v: Tensor, out: Tensor) -> None:
    """Two normals in ``out`` (..., 2) from two words each."""
    # 24 bits each, exact in float32; the radius never sees log(0).
    radius = (u >> 8).add_(1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (v >> 8).float().mul_(2 * math.pi * 2.0**-24)
    torch.mul(radius, angle.cos(), out=out[..., 0])
    torch.mul(radius, angle.sin_(), out=out[..., 1])


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
        ValueError: ``index`` and ``shape`` disagree, or a seed of more than 64 bits.
    """
    if len(shape) == 0 or index.shape != (shape[0],):
        raise ValueError(
            f"index has shape {tuple(index.shape)} but shape={tuple(shape)}; give one index a sample"
        )
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed={seed!r} must be a whole number of 64 bits")
    count = math.prod(shape[1:])
    result = torch.empty(tuple(shape), dtype=dtype, device=index.device) if out is None else out
    flat = result.view(shape[0], count)
    blocks = -(-count // 4)
    on_cpu = index.device.type == "cpu"
    rows_at_once = max(1, _WORDS_AT_ONCE // max(blocks, 1)) if on_cpu else shape[0]
    blocks_at_once = min(blocks, _WORDS_AT_ONCE) if on_cpu else blocks
    for first in range(0, shape[0], rows_at_once):
        sample = index[first : first + rows_at_once, None]
        for start in range(0, blocks, blocks_at_once):
            stop = min(blocks, start + blocks_at_once)
            block = torch.arange(start, stop, dtype=torch.int64, device=index.device)[None]
            words = philox(seed, block, stream, sample)
            part = flat[first : first + rows_at_once, 4 * start : 4 * stop]
            whole = part.shape[1] == 4 * (stop - start)
            quads = part.unflatten(1, (-1, 4)) if whole else part.new_empty((*words[0].shape, 4))
            _box_muller(words[0], words[1], quads[..., :2])
            _box_muller(words[2], words[3], quads[..., 2:])
            if not whole:
                part.copy_(quads.flatten(1)[:, : part.shape[1]])
    return result
