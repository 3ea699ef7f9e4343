"""Triton functions of group normalisation; the formulas and the launchers are in group_norm.py.

A tensor is (N, C, S) with either the channel or the spatial stride equal to one. Large groups take three
launches: ``statistics`` reduces each channel over a chunk of the spatial axis, ``combine`` merges the chunks
and channels of a group, ``apply`` normalises. Keeping the partial results per channel lets a tile straddle
groups, so that any group width loads whole cache lines in either layout. Small groups take one launch,
``fused``.

Means and centred sums are merged by the parallel formula of Chan, Golub & LeVeque (1983, eq. 2.1): nothing is
ever computed as E[h^2] - E[h]^2. Every output has one writer, so results are deterministic.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(c, s, stride_c, stride_s, CHANNELS_LAST: tl.constexpr):
    # The unit stride is left out of the product: that is what lets the compiler see 16-byte accesses.
    if CHANNELS_LAST:
        offsets = c[:, None] + s[None, :].to(tl.int64) * stride_s
    else:
        offsets = c[:, None].to(tl.int64) * stride_c + s[None, :]
    return offsets


@triton.jit
def _load(x, offsets, residual, residual_offsets, mask, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr):
    h = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        h += tl.load(residual + residual_offsets, mask=mask, other=0.0).to(ACC)
    return h


@triton.jit
def _affine(
    n, c, mask, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """gain = w (1 + scale) and offset = b (1 + scale) + shift of channels c."""
    gain = tl.full(c.shape, 1.0, ACC)
    offset = tl.zeros(c.shape, ACC)
    if HAS_SCALE:
        gain += tl.load(scale + n * scale_n + c, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        offset = gain * tl.load(bias + n * bias_n + c, mask=mask, other=0.0).to(ACC)
    if HAS_WEIGHT:
        gain *= tl.load(weight + n * weight_n + c, mask=mask, other=0.0).to(ACC)
    if HAS_SHIFT:
        offset += tl.load(shift + n * shift_n + c, mask=mask, other=0.0).to(ACC)
    return gain, offset


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _silu_derivative(z):
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def statistics(
    x, x_n, x_c, x_s, residual, residual_n, residual_c, residual_s, dx, dx_n, dx_c, dx_s,
    partial, C, S, chunk, chunks,
    HAS_RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, TANGENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of each channel over each chunk: mean and centred sum of squares of h = x + residual; with TANGENT also
    the mean of dx and the centred sum of products of dx and h.

    partial: (N, chunks, 2 or with TANGENT 4, C).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    k = pid % chunks
    n = (pid // (chunks * blocks)).to(tl.int64)
    c = pid // chunks % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    start = k * chunk
    end = tl.minimum(start + chunk, S)
    x += n * x_n
    residual += n * residual_n
    dx += n * dx_n

    mean = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    dmean = tl.zeros([BLOCK_C], ACC)
    cov = tl.zeros([BLOCK_C], ACC)
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < end)[None, :]
        h = _load(
            x, _offsets(c, s, x_c, x_s, CHANNELS_LAST),
            residual, _offsets(c, s, residual_c, residual_s, CHANNELS_LAST), mask, HAS_RESIDUAL, ACC,
        )  # fmt: skip
        count = tl.minimum(end - s0, BLOCK_S).to(ACC)
        seen = (s0 - start).to(ACC)
        share = count / (seen + count)
        m = tl.sum(h, axis=1) / count
        d = tl.where(mask, h - m[:, None], 0.0)
        delta = m - mean
        mean += delta * share
        m2 += tl.sum(d * d, axis=1) + delta * delta * seen * share
        if TANGENT:
            dh = tl.load(dx + _offsets(c, s, dx_c, dx_s, CHANNELS_LAST), mask=mask, other=0.0).to(ACC)
            dm = tl.sum(dh, axis=1) / count
            ddelta = dm - dmean
            dmean += ddelta * share
            cov += tl.sum(d * (dh - dm[:, None]), axis=1) + delta * ddelta * seen * share

    at = partial + (n * chunks + k) * (4 if TANGENT else 2) * C + c
    tl.store(at, mean, mask=c < C)
    tl.store(at + C, m2, mask=c < C)
    if TANGENT:
        tl.store(at + 2 * C, dmean, mask=c < C)
        tl.store(at + 3 * C, cov, mask=c < C)


@triton.jit
def combine(
    partial, moments, moments_n, C, S, G, width, chunk, chunks, eps,
    TANGENT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One group: merges ``partial`` over chunks and channels.

    moments: (N, planes, G): mean and rstd; with TANGENT also mean(dh) and mean(xhat (dh - mean(dh))).
    """
    pid = tl.program_id(0)
    g = pid % G
    n = (pid // G).to(tl.int64)
    row = (4 if TANGENT else 2) * C
    partial += n * chunks * row + g * width  # what follows, a sample's numbers, is counted in 32 bits
    count = tl.full([], 1.0, ACC) * width * S

    # First the means, relative to one of them so that a large common part does not round, then the rest about them.
    origin = tl.load(partial)
    total = tl.zeros([], ACC)
    dtotal = tl.zeros([], ACC)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        length = tl.maximum(tl.minimum(chunk, S - k * chunk), 0).to(ACC)
        for c0 in range(0, width, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (k < chunks)[:, None] & (c < width)[None, :]
            at = partial + (k[:, None] * row + c[None, :])
            means = tl.load(at, mask=mask, other=origin)
            total += tl.sum(tl.sum(length[:, None] * (means - origin), axis=1), axis=0)
            if TANGENT:
                dmeans = tl.load(at + 2 * C, mask=mask, other=0.0)
                dtotal += tl.sum(tl.sum(length[:, None] * dmeans, axis=1), axis=0)
    mean = origin + total / count
    dmean = dtotal / count

    m2 = tl.zeros([], ACC)
    cov = tl.zeros([], ACC)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        length = tl.maximum(tl.minimum(chunk, S - k * chunk), 0).to(ACC)
        for c0 in range(0, width, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (k < chunks)[:, None] & (c < width)[None, :]
            at = partial + (k[:, None] * row + c[None, :])
            d = tl.load(at, mask=mask, other=mean) - mean
            squares = tl.load(at + C, mask=mask, other=0.0) + length[:, None] * d * d
            m2 += tl.sum(tl.sum(squares, axis=1), axis=0)
            if TANGENT:
                dd = tl.load(at + 2 * C, mask=mask, other=0.0) - dmean
                products = tl.load(at + 3 * C, mask=mask, other=0.0) + length[:, None] * d * dd
                cov += tl.sum(tl.sum(products, axis=1), axis=0)

    rstd = 1 / tl.sqrt(m2 / count + eps)
    out = moments + n * moments_n + g
    tl.store(out, mean)
    tl.store(out + G, rstd)
    if TANGENT:
        tl.store(out + 2 * G, dmean)
        tl.store(out + 3 * G, rstd * cov / count)


@triton.jit
def apply(
    x, x_n, x_c, x_s, residual, residual_n, residual_c, residual_s, dx, dx_n, dx_c, dx_s,
    moments, moments_n, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n, dgain, doffset,
    y, y_n, y_c, y_s, dy, C, S, G, width, tiles,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, TANGENT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = act(xhat gain + offset); with TANGENT also dy, with dgain and doffset of shape (N, C).

    Tiles run from the end of the tensor to its start, so that the first ones find in cache what
    ``statistics`` read last. ``dy`` has the strides of ``y``.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    n = (pid // (tiles * blocks)).to(tl.int64)
    c = pid // tiles % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    s = pid % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = c < C
    mask = inside[:, None] & (s < S)[None, :]
    h = _load(
        x + n * x_n, _offsets(c, s, x_c, x_s, CHANNELS_LAST),
        residual + n * residual_n, _offsets(c, s, residual_c, residual_s, CHANNELS_LAST), mask, HAS_RESIDUAL,
        ACC,
    )  # fmt: skip
    gain, offset = _affine(
        n, c, inside, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, ACC,
    )  # fmt: skip
    at = moments + n * moments_n + c // width
    mean = tl.load(at, mask=inside, other=0.0)
    rstd = tl.load(at + G, mask=inside, other=0.0)
    xhat = (h - mean[:, None]) * rstd[:, None]
    z = xhat * gain[:, None] + offset[:, None]
    y_offsets = n * y_n + _offsets(c, s, y_c, y_s, CHANNELS_LAST)
    if TANGENT:
        dh = tl.load(dx + n * dx_n + _offsets(c, s, dx_c, dx_s, CHANNELS_LAST), mask=mask, other=0.0).to(ACC)
        dmean = tl.load(at + 2 * G, mask=inside, other=0.0)
        projection = tl.load(at + 3 * G, mask=inside, other=0.0)
        dxhat = rstd[:, None] * (dh - dmean[:, None] - xhat * projection[:, None])
        gain_tangent = tl.load(dgain + n * C + c, mask=inside, other=0.0).to(ACC)
        offset_tangent = tl.load(doffset + n * C + c, mask=inside, other=0.0).to(ACC)
        dz = dxhat * gain[:, None] + xhat * gain_tangent[:, None] + offset_tangent[:, None]
        tl.store(dy + y_offsets, dz * _silu_derivative(z) if SILU else dz, mask=mask)
    tl.store(y + y_offsets, _silu(z) if SILU else z, mask=mask)


@triton.jit
def fused(
    x, x_n, x_c, x_s, residual, residual_n, residual_c, residual_s,
    moments, moments_n, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
    y, y_n, y_c, y_s, C, S, G, width, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One group in one program: statistics, then the same tiles again, from cache."""
    pid = tl.program_id(0)
    g = pid % G
    n = (pid // G).to(tl.int64)
    x += n * x_n
    residual += n * residual_n
    y += n * y_n

    seen = tl.zeros([], ACC)
    mean = tl.zeros([], ACC)
    m2 = tl.zeros([], ACC)
    for c0 in range(0, width, BLOCK_C):
        c = g * width + c0 + tl.arange(0, BLOCK_C)
        inside = c < (g + 1) * width
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = inside[:, None] & (s < S)[None, :]
            h = _load(
                x, _offsets(c, s, x_c, x_s, CHANNELS_LAST),
                residual, _offsets(c, s, residual_c, residual_s, CHANNELS_LAST), mask, HAS_RESIDUAL, ACC,
            )  # fmt: skip
            count = (tl.minimum(width - c0, BLOCK_C) * tl.minimum(S - s0, BLOCK_S)).to(ACC)
            share = count / (seen + count)
            m = tl.sum(tl.sum(h, axis=1), axis=0) / count
            d = tl.where(mask, h - m, 0.0)
            delta = m - mean
            mean += delta * share
            m2 += tl.sum(tl.sum(d * d, axis=1), axis=0) + delta * delta * seen * share
            seen += count
    rstd = 1 / tl.sqrt(m2 / seen + eps)
    tl.store(moments + n * moments_n + g, mean)
    tl.store(moments + n * moments_n + G + g, rstd)

    for c0 in range(0, width, BLOCK_C):
        c = g * width + c0 + tl.arange(0, BLOCK_C)
        inside = c < (g + 1) * width
        gain, offset = _affine(
            n, c, inside, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
            HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, ACC,
        )  # fmt: skip
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = inside[:, None] & (s < S)[None, :]
            h = _load(
                x, _offsets(c, s, x_c, x_s, CHANNELS_LAST),
                residual, _offsets(c, s, residual_c, residual_s, CHANNELS_LAST), mask, HAS_RESIDUAL, ACC,
            )  # fmt: skip
            z = (h - mean) * rstd * gain[:, None] + offset[:, None]
            tl.store(y + _offsets(c, s, y_c, y_s, CHANNELS_LAST), _silu(z) if SILU else z, mask=mask)


@triton.jit
def _recompute(
    n, c, s, mask, x, x_c, x_s, residual, residual_c, residual_s, gy, gy_c, gy_s, mean, rstd, gain, offset,
    HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """xhat and the gradient with respect to z = xhat gain + offset."""
    h = _load(
        x, _offsets(c, s, x_c, x_s, CHANNELS_LAST),
        residual, _offsets(c, s, residual_c, residual_s, CHANNELS_LAST), mask, HAS_RESIDUAL, ACC,
    )  # fmt: skip
    gz = tl.load(gy + _offsets(c, s, gy_c, gy_s, CHANNELS_LAST), mask=mask, other=0.0).to(ACC)
    xhat = (h - mean[:, None]) * rstd[:, None]
    if SILU:
        gz *= _silu_derivative(xhat * gain[:, None] + offset[:, None])
    return tl.where(mask, xhat, 0.0), gz


@triton.jit
def backward_sums(
    x, x_n, x_c, x_s, residual, residual_n, residual_c, residual_s, gy, gy_n, gy_c, gy_s,
    moments, moments_n, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
    partial, C, S, G, width, chunk, chunks,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of each channel over each chunk: sum(gz xhat) and sum(gz). partial: (N, chunks, 2, C)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    k = pid % chunks
    n = (pid // (chunks * blocks)).to(tl.int64)
    c = pid // chunks % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    start = k * chunk
    end = tl.minimum(start + chunk, S)
    gain, offset = _affine(
        n, c, inside, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, ACC,
    )  # fmt: skip
    at = moments + n * moments_n + c // width
    mean = tl.load(at, mask=inside, other=0.0)
    rstd = tl.load(at + G, mask=inside, other=0.0)

    total_gain = tl.zeros([BLOCK_C], ACC)
    total_offset = tl.zeros([BLOCK_C], ACC)
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = inside[:, None] & (s < end)[None, :]
        xhat, gz = _recompute(
            n, c, s, mask, x + n * x_n, x_c, x_s, residual + n * residual_n, residual_c, residual_s,
            gy + n * gy_n, gy_c, gy_s, mean, rstd, gain, offset, HAS_RESIDUAL, SILU, CHANNELS_LAST, ACC,
        )  # fmt: skip
        total_gain += tl.sum(gz * xhat, axis=1)
        total_offset += tl.sum(gz, axis=1)
    out = partial + (n * chunks + k) * 2 * C + c
    tl.store(out, total_gain, mask=inside)
    tl.store(out + C, total_offset, mask=inside)


@triton.jit
def backward_combine(
    partial, weight, weight_n, scale, scale_n, sums, means, C, S, G, width, chunks,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One group. sums: (N, 2, C), ``partial`` summed over chunks, which are the gradients of gain and offset;
    means: (N, 2, G), the group's mean(g) and mean(g xhat) with g = gain gz.
    """
    pid = tl.program_id(0)
    g = pid % G
    n = (pid // G).to(tl.int64)
    first = tl.zeros([], ACC)
    second = tl.zeros([], ACC)
    for c0 in range(0, width, BLOCK_C):
        c = g * width + c0 + tl.arange(0, BLOCK_C)
        inside = c < (g + 1) * width
        ggain = tl.zeros([BLOCK_C], ACC)
        goffset = tl.zeros([BLOCK_C], ACC)
        for k0 in range(0, chunks, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = (k < chunks)[:, None] & inside[None, :]
            at = partial + (n * chunks + k)[:, None] * 2 * C + c[None, :]
            ggain += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
            goffset += tl.sum(tl.load(at + C, mask=mask, other=0.0), axis=0)
        tl.store(sums + 2 * n * C + c, ggain, mask=inside)
        tl.store(sums + (2 * n + 1) * C + c, goffset, mask=inside)
        gain, _ = _affine(
            n, c, inside, weight, weight_n, weight, 0, scale, scale_n, scale, 0,
            HAS_WEIGHT, False, HAS_SCALE, False, ACC,
        )  # fmt: skip
        first += tl.sum(gain * goffset, axis=0)
        second += tl.sum(gain * ggain, axis=0)
    count = tl.full([], 1.0, ACC) * width * S
    tl.store(means + 2 * n * G + g, first / count)
    tl.store(means + (2 * n + 1) * G + g, second / count)


@triton.jit
def backward_apply(
    x, x_n, x_c, x_s, residual, residual_n, residual_c, residual_s, gy, gy_n, gy_c, gy_s,
    moments, moments_n, means,
    weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n, gx, gx_n, gx_c, gx_s,
    C, S, G, width, tiles,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """gx = rstd (g - mean(g) - xhat mean(g xhat)) with g = gain gz; tiles from the end, as in ``apply``."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    n = (pid // (tiles * blocks)).to(tl.int64)
    c = pid // tiles % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    s = pid % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = c < C
    mask = inside[:, None] & (s < S)[None, :]
    gain, offset = _affine(
        n, c, inside, weight, weight_n, bias, bias_n, scale, scale_n, shift, shift_n,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, ACC,
    )  # fmt: skip
    at = moments + n * moments_n + c // width
    mean = tl.load(at, mask=inside, other=0.0)
    rstd = tl.load(at + G, mask=inside, other=0.0)
    at = means + 2 * n * G + c // width
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + G, mask=inside, other=0.0)
    xhat, gz = _recompute(
        n, c, s, mask, x + n * x_n, x_c, x_s, residual + n * residual_n, residual_c, residual_s,
        gy + n * gy_n, gy_c, gy_s, mean, rstd, gain, offset, HAS_RESIDUAL, SILU, CHANNELS_LAST, ACC,
    )  # fmt: skip
    result = rstd[:, None] * (gz * gain[:, None] - first[:, None] - xhat * second[:, None])
    tl.store(gx + n * gx_n + _offsets(c, s, gx_c, gx_s, CHANNELS_LAST), result, mask=mask)
