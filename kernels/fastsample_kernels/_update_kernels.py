"""Triton function of the solver update; the formulas and the launcher are in update.py."""

import triton
import triton.language as tl

_TO_UNIT = tl.constexpr(2.0**-24)
_TO_ANGLE = tl.constexpr(6.283185307179586 * 2.0**-24)


@triton.jit
def words(seed, block, stream, sample):
    """Philox4x32-10 on the counter (block, stream, sample low, sample high): four uint32 words each."""
    c0 = block.to(tl.uint32)
    none = tl.zeros_like(c0)
    return tl.philox(
        seed,
        c0,
        none + stream.to(tl.uint32),
        none + (sample & 0xFFFFFFFF).to(tl.uint32),
        none + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def _cos_sin(angle):
    """Of angles in [0, 2 pi], to an ulp or two: Cody & Waite's reduction and Cephes' polynomials. The functions
    of the CUDA library carry a path for huge angles that takes stack memory.
    """
    k = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in three parts, the first two exact in products with k <= 4
    r = ((angle - k * 1.5703125) - k * 4.837512969970703125e-4) - k * 7.549789954891882e-8
    z = r * r
    sin = r + r * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    quadrant = k.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def _box_muller(u, v):
    # 24 bits each, exact in float32; the radius never sees log(0).
    radius = tl.sqrt_rn(-2 * tl.log(((u >> 8) + 1).to(tl.float32) * _TO_UNIT))
    c, s = _cos_sin((v >> 8).to(tl.float32) * _TO_ANGLE)
    return radius * c, radius * s


@triton.jit
def _normals(seed, block, stream, sample, BLOCKS: tl.constexpr):
    """Elements 4 block .. 4 block + 3 of a sample's noise, for consecutive blocks: (4 BLOCKS,) float32."""
    w0, w1, w2, w3 = words(seed, block, stream, sample)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [4 * BLOCKS])


@triton.jit
def _term(x, a, at, mask, ACC: tl.constexpr):
    value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    return value, value * a


@triton.jit(do_not_specialize=["seed", "row"])
def update(
    x0, x1, x2, x3, x4, x5, x6, x7,
    a0, a1, a2, a3, a4, a5, a6, a7,
    output, null, guidance, p, q, b,
    index, seed: tl.int64, row: tl.int64, c,
    y, m, size, tiles,
    TERMS: tl.constexpr, STATE: tl.constexpr, HAS_OUTPUT: tl.constexpr, HAS_NULL: tl.constexpr,
    HAS_NOISE: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y = sum_j a_j x_j + b m + c z, m = p x_STATE + q (null + guidance (output - null)); (samples, size)."""
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    # One 64-bit address and 32-bit offsets: a sample may have more elements than 32 bits count.
    first = tile.to(tl.int64) * (4 * BLOCKS)
    at = tl.arange(0, 4 * BLOCKS)
    mask = at < size - first
    start = sample * size + first

    state, result = _term(x0 + start, a0, at, mask, ACC)
    if TERMS > 1:
        value, term = _term(x1 + start, a1, at, mask, ACC)
        result += term
        if STATE == 1:
            state = value
    if TERMS > 2:
        value, term = _term(x2 + start, a2, at, mask, ACC)
        result += term
        if STATE == 2:
            state = value
    if TERMS > 3:
        value, term = _term(x3 + start, a3, at, mask, ACC)
        result += term
        if STATE == 3:
            state = value
    if TERMS > 4:
        value, term = _term(x4 + start, a4, at, mask, ACC)
        result += term
        if STATE == 4:
            state = value
    if TERMS > 5:
        value, term = _term(x5 + start, a5, at, mask, ACC)
        result += term
        if STATE == 5:
            state = value
    if TERMS > 6:
        value, term = _term(x6 + start, a6, at, mask, ACC)
        result += term
        if STATE == 6:
            state = value
    if TERMS > 7:
        value, term = _term(x7 + start, a7, at, mask, ACC)
        result += term
        if STATE == 7:
            state = value
    if HAS_OUTPUT:
        out = tl.load(output + start + at, mask=mask, other=0.0).to(ACC)
        if HAS_NULL:
            base = tl.load(null + start + at, mask=mask, other=0.0).to(ACC)
            out = base + guidance * (out - base)
        prediction = q * out
        if STATE >= 0:
            prediction += p * state
        result += b * prediction
        if KEEP:
            tl.store(m + start + at, prediction, mask=mask)
    if HAS_NOISE:
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        z = _normals(seed, block, row, tl.load(index + sample), BLOCKS)
        result += c * z.to(ACC)
    tl.store(y + start + at, result, mask=mask)
