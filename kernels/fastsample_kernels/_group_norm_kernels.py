"""Triton functions of group normalisation; the formulas and the launchers are in group_norm.py.

A tensor is (N, C, S) with either the channel or the spatial stride equal to one. Large groups take three
launches: ``statistics`` reduces each channel over a chunk of the spatial axis, ``combine`` merges the chunks
and channels of a group, ``apply`` normalises. Keeping the partial results per channel lets a tile straddle
groups, so that any group width loads whole cache lines in either layout. Small groups take one launch,
``fused``; where a group has few partial results, ``apply`` merges them itself.

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
def _row_statistics(
    x, x_c, x_s, residual, residual_c, residual_s, dx, dx_c, dx_s, c, C, start, end,
    HAS_RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, TANGENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Statistics of each channel over a chunk, tile by tile."""
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
    return mean, m2, dmean, cov


@triton.jit
def _position_statistics(
    x, x_c, x_s, residual, residual_c, residual_s, dx, dx_c, dx_s, c, C, start, end,
    HAS_RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, TANGENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The same, where the threads that share a channel would have to meet for every tile: each position of the tile
    sums on its own (Welford 1962), and they meet once.
    """
    offset = tl.arange(0, BLOCK_S)
    mean = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    dmean = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    cov = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    seen = tl.zeros([], ACC)
    for s0 in range(start, end, BLOCK_S):
        s = s0 + offset
        mask = (c < C)[:, None] & (s < end)[None, :]
        h = _load(
            x, _offsets(c, s, x_c, x_s, CHANNELS_LAST),
            residual, _offsets(c, s, residual_c, residual_s, CHANNELS_LAST), mask, HAS_RESIDUAL, ACC,
        )  # fmt: skip
        seen += 1
        d = tl.where(mask, h - mean, 0.0)
        mean += d * (1 / seen)
        m2 += d * (h - mean)
        if TANGENT:
            dh = tl.load(dx + _offsets(c, s, dx_c, dx_s, CHANNELS_LAST), mask=mask, other=0.0).to(ACC)
            dmean += tl.where(mask, dh - dmean, 0.0) * (1 / seen)
            cov += d * (dh - dmean)

    length = end - start
    counts = tl.maximum(tl.cdiv(length - offset, BLOCK_S), 0).to(ACC)[None, :]
    # Relative to one of them, so that a large common part does not round.
    origin = tl.sum(tl.where((offset == 0)[None, :], mean, 0.0), axis=1)
    total = origin + tl.sum(counts * (mean - origin[:, None]), axis=1) / length
    d = mean - total[:, None]
    m2 = tl.sum(m2 + counts * d * d, axis=1)
    dtotal = tl.sum(counts * dmean, axis=1) / length
    cov = tl.sum(cov + counts * d * (dmean - dtotal[:, None]), axis=1)
    return total, m2, dtotal, cov


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
    if CHANNELS_LAST:
        mean, m2, dmean, cov = _position_statistics(
            x, x_c, x_s, residual, residual_c, residual_s, dx, dx_c, dx_s, c, C, start, end,
            HAS_RESIDUAL, CHANNELS_LAST, TANGENT, ACC, BLOCK_C, BLOCK_S,
        )  # fmt: skip
    else:
        mean, m2, dmean, cov = _row_statistics(
            x, x_c, x_s, residual, residual_c, residual_s, dx, dx_c, dx_s, c, C, start, end,
            HAS_RESIDUAL, CHANNELS_LAST, TANGENT, ACC, BLOCK_C, BLOCK_S,
        )  # fmt: skip
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
    y, y_n, y_c, y_s, dy, partial, C, S, G, width, tiles, chunk, chunks, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, TANGENT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """y = act(xhat gain + offset); with TANGENT also dy, with dgain and doffset of shape (N, C).

    With MERGED, a power of two of at least width * chunks, each program merges its group's ``partial`` itself (tiles
    have one channel then), and the group's first one writes the moments; without (0) ``combine`` has written them.

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
    if MERGED > 0:
        channel = pid // tiles % blocks
        first = channel // width * width
        part = tl.arange(0, MERGED)
        valid = part < width * chunks
        piece = part // width
        source = partial + n * chunks * 2 * C + piece * 2 * C + first + part % width
        length = tl.where(valid, tl.minimum(chunk, S - piece * chunk), 0).to(ACC)
        origin = tl.load(partial + n * chunks * 2 * C + first)
        means = tl.load(source, mask=valid, other=0.0)
        squares = tl.load(source + C, mask=valid, other=0.0)
        count = tl.full([], 1.0, ACC) * width * S
        group_mean = origin + tl.sum(length * (means - origin)) / count
        d = means - group_mean
        mean = tl.zeros([BLOCK_C], ACC) + group_mean
        rstd = 1 / tl.sqrt(tl.zeros([BLOCK_C], ACC) + tl.sum(squares + length * d * d) / count + eps)
        if channel == first and pid % tiles == 0:
            tl.store(at, mean)
            tl.store(at + G, rstd)
    else:
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

    total_gain = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    total_offset = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = inside[:, None] & (s < end)[None, :]
        xhat, gz = _recompute(
            n, c, s, mask, x + n * x_n, x_c, x_s, residual + n * residual_n, residual_c, residual_s,
            gy + n * gy_n, gy_c, gy_s, mean, rstd, gain, offset, HAS_RESIDUAL, SILU, CHANNELS_LAST, ACC,
        )  # fmt: skip
        total_gain += gz * xhat
        total_offset += gz
    out = partial + (n * chunks + k) * 2 * C + c
    tl.store(out, tl.sum(total_gain, axis=1), mask=inside)
    tl.store(out + C, tl.sum(total_offset, axis=1), mask=inside)


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
