"""The update between two network evaluations of a sampler, in one pass over memory:

    m = p x_s + q (null + guidance (output - null))        conversion of the network's output, guided
    y = sum_j a_j x_j + b m + c z                          the solver's row; z is counter-based normal noise

``x_j`` are earlier states and predictions, ``x_s`` one of them: the state that the network was evaluated at.
Both y and m are written. Layers: noise, reference, launcher, operator, ``update``; the Triton function is in
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

    Philox4x32-10 (Salmon et al. 2011) keyed by ``seed`` on the counter (block of four elements, stream,
    sample low, sample high), then Box-Muller: what a sample draws depends on neither the batch nor the
    device.

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
    """The z of :class:`Noise` in plain torch: float32 normals in the type and shape of ``like``."""
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
    """:func:`update` in plain torch: what runs where Triton does not, and what tests compare with."""
    # Products only: the compiler makes a constant of each other use of a number, and gives up after eight values.
    acc = runtime.accumulator(tensors[0].dtype)
    y = tensors[0].to(acc) * coefficients[0]
    for x, a in zip(tensors[1:], coefficients[1:], strict=True):
        y = y + x.to(acc) * a
    m = None
    if output is not None:
        p, q = convert
        m = output.to(acc)
        if null is not None:
            base = null.to(acc)
            m = base + (m - base) * guidance
        m = m * q
        m = m if state is None else m + tensors[state].to(acc) * p
        y = y + m * weight
    if noise is not None:
        y = y + normal(y, noise.seed, noise.stream, noise.index) * noise.coefficient
    dtype = tensors[0].dtype
    return y.to(dtype), m.to(dtype) if m is not None and keep else None


# -- launcher and operator -----------------------------------------------------------------------------------


def _same_memory_order(tensors: Sequence[Tensor]) -> bool:
    """Whether element i in memory is the same element of every tensor, without gaps."""
    first = tensors[0]
    dense = torch.empty_like(first, device="meta").stride() == first.stride()
    return dense and all(t.stride() == first.stride() for t in tensors)


def _empty_outputs(
    tensors: Sequence[Tensor], output: Tensor | None, null: Tensor | None, index: Tensor | None, keep: bool
) -> tuple[bool, Tensor, Tensor]:
    """Whether the kernel runs in memory order; y; m (without elements unless kept)."""
    first = tensors[0]
    # Noise is counted in the logical order of the elements.
    in_place = index is None and _same_memory_order([t for t in (*tensors, output, null) if t is not None])
    strides = first.stride() if in_place else None
    y = runtime.empty(first.shape, first.dtype, first.device, strides)
    m = runtime.empty(first.shape if keep else (0,), first.dtype, first.device, strides if keep else None)
    return in_place, y, m


def update_launch(
    tensors: Sequence[Tensor],
    output: Tensor | None,
    null: Tensor | None,
    index: Tensor | None,
    coefficients: Sequence[float],
    guidance: float,
    state: int,
    p: float,
    q: float,
    weight: float,
    seed: int,
    stream: int,
    c: float,
    keep: bool,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch, y and m. ``state`` is -1 for none; m has no elements unless kept."""
    from ._update_kernels import update as kernel

    in_place, y, m = _empty_outputs(tensors, output, null, index, keep)
    xs = [t if in_place else t.contiguous() for t in tensors]
    samples = y.shape[0] if index is not None else 1
    size = y.numel() // samples
    tiles = -(-size // (4 * _BLOCKS))

    def pointer(t: Tensor | None) -> Tensor:
        return xs[0] if t is None else t if in_place else t.contiguous()

    padding = MAX_TERMS - len(xs)
    arguments: dict[str, Any] = {f"x{j}": x for j, x in enumerate([*xs, *xs[:1] * padding])}
    arguments |= {f"a{j}": float(a) for j, a in enumerate([*coefficients, *[0.0] * padding])}
    arguments |= {
        "output": pointer(output),
        "null": pointer(null),
        "guidance": guidance,
        "p": p,
        "q": q,
        "b": weight,
        "index": pointer(index),
        "seed": seed,
        "row": stream,  # Triton keeps the name `stream` for itself
        "c": c,
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
        "ACC": runtime.triton_dtype(runtime.accumulator(y.dtype)),
        "BLOCKS": _BLOCKS,
    }
    return Launch(kernel, (samples * tiles,), arguments, 4, 1), y, m


_NUMBERS = 5  # guidance, p, q, b and c, in front of the coefficients


def _numbers(*numbers: float) -> Tensor:
    """An operator's numbers as a tensor: the compiler makes constants of those of its arguments that are floats."""
    if torch.compiler.is_compiling():  # which follows numbers into products, but not into torch.tensor
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * a for a in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


@torch.library.custom_op("fastsample_kernels::update", mutates_args=())
def _update(
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    x3: Tensor | None,
    x4: Tensor | None,
    x5: Tensor | None,
    x6: Tensor | None,
    x7: Tensor | None,
    output: Tensor | None,
    null: Tensor | None,
    index: Tensor | None,
    numbers: Tensor,
    state: int,
    seed: int,
    stream: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    given = [x for x in (x0, x1, x2, x3, x4, x5, x6, x7) if x is not None]
    guidance, p, q, weight, c, *coefficients = numbers.tolist()
    launch, y, m = update_launch(
        given, output, null, index, coefficients, guidance, state, p, q, weight, seed, stream, c, keep
    )
    with runtime.on_device(y):
        launch()
    return y, m


@_update.register_fake
def _(*args):
    given = [x for x in args[:MAX_TERMS] if x is not None]
    output, null, index = args[MAX_TERMS : MAX_TERMS + 3]
    return _empty_outputs(given, output, null, index, args[-1])[1:]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[: MAX_TERMS + 2]]
    numbers, ctx.state, _, _, ctx.keep = inputs[MAX_TERMS + 3 :]
    ctx.save_for_backward(numbers)


def _gradients(ctx: Any, gy: Tensor | None, gm: Tensor | None) -> tuple[Any, ...]:
    """The update is linear, so its gradients are multiples of those of y and m."""
    if not ctx.keep:
        gm = None
    (numbers,) = ctx.saved_tensors
    terms = sum(dtype is not None for dtype in ctx.dtypes[:MAX_TERMS])
    guidance, p, q, weight, _, *coefficients = numbers.unbind()[: _NUMBERS + terms]

    def total(*terms: tuple[Tensor | float, Tensor | None]) -> Tensor | None:
        parts = [g * a for a, g in terms if g is not None]
        return sum(parts[1:], parts[0]) if parts else None

    at_m = total((1.0, gm), (weight, gy))
    gradients = [total((a, gy)) for a in coefficients] + [None] * (MAX_TERMS - terms)
    if ctx.state >= 0:
        gradients[ctx.state] = total((1.0, gradients[ctx.state]), (p, at_m))
    share = 1.0 if ctx.dtypes[-1] is None else guidance
    gradients += [total((q * share, at_m)), total((q * (1 - share), at_m))]
    cast = [
        None if g is None or dtype is None else g.to(dtype)
        for g, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
    return (*cast, *[None] * 6)


_call_update = runtime.differentiable(_update, _gradients, _save)
runtime.batched(_update, "n" * (MAX_TERMS + 3) + "-" * 5)


# -- the function --------------------------------------------------------------------------------------------


def _check(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    output: Tensor | None,
    null: Tensor | None,
    state: int | None,
    noise: Noise | None,
) -> None:
    if isinstance(tensors, Tensor):
        raise TypeError(f"tensors is a tensor of shape {tuple(tensors.shape)}; give a list, [x]")
    if not tensors:
        raise ValueError("tensors is empty; give at least one state")
    if len(coefficients) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors but {len(coefficients)} coefficients; give one for each")
    shape = tensors[0].shape
    if not shape:
        raise ValueError("tensors[0] has no axes; expected (batch, ...)")
    named = [(f"tensors[{j}]", x) for j, x in enumerate(tensors)] + [("output", output), ("null", null)]
    for name, t in named:
        if t is not None and t.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; expected that of tensors[0], {tuple(shape)}"
            )
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}; convert it to a floating-point type")
    runtime.check_devices("tensors[0]", tensors[0], dict(named[1:]))
    if null is not None and output is None:
        raise ValueError("null is given without output; guidance combines the two")
    if state is not None and not 0 <= state < len(tensors):
        raise ValueError(f"state={state} is not the position of one of the {len(tensors)} tensors")
    if noise is not None and (noise.index.shape != shape[:1] or noise.index.dtype != torch.int64):
        raise ValueError(
            f"noise.index has shape {tuple(noise.index.shape)} and dtype {noise.index.dtype}; expected "
            f"int64 {tuple(shape[:1])}, one number a sample"
        )
    if noise is not None:
        runtime.check_devices("tensors[0]", tensors[0], {"noise.index": noise.index})


def supported(tensors: Sequence[Tensor], *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these tensors (and plain torch runs instead); None when it can."""
    if len(tensors) > MAX_TERMS:
        return f"there are {len(tensors)} tensors, more than {MAX_TERMS}"
    return runtime.why_not(*tensors, *others)


def update(
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
    """A solver's update in one pass (formulas at the top of the module).

    Sums are float32, or float64 for float64 states. Differentiable with respect to every tensor, in both
    modes.

    Args:
        tensors: the x_j, earlier states and predictions, all of one shape (batch, ...).
        coefficients: the a_j, one for each tensor.
        output: the network's output, of that shape and any floating-point type.
        null: the network's unconditional output, for guidance.
        guidance: w in ``null + w (output - null)``; only read with ``null``.
        state: position in ``tensors`` of the state x_s that the network was evaluated at, if m reads it; give
            it the coefficient 0 where only m does.
        convert: (p, q).
        weight: b, the coefficient of m in y.
        noise: the noise term.
        keep: whether m is wanted; it is not written otherwise.

    Returns:
        (y, m), both of the type of ``tensors[0]``; m is None without ``output`` or with ``keep=False``. Their
        memory order is that of the arguments where all share one and there is no noise, else contiguous.

    Raises:
        ValueError: shapes, types, devices or counts that do not fit; the message says which.
        TypeError: ``tensors`` is one tensor.
    """
    _check(tensors, coefficients, output, null, state, noise)
    index = None if noise is None else noise.index
    if supported(tensors, output, null) is not None:
        return reference(
            tensors,
            coefficients,
            output=output,
            null=null,
            guidance=guidance,
            state=state,
            convert=convert,
            weight=weight,
            noise=noise,
            keep=keep,
        )
    keep = keep and output is not None
    seed = 0 if noise is None else noise.seed % _SEED
    c = 0.0 if noise is None else noise.coefficient
    numbers = _numbers(guidance, *convert, weight, c, *coefficients)
    at = -1 if state is None or output is None else state
    # A signed 64-bit integer with the bits of the seed.
    draw = (0, 0) if noise is None else (seed - _SEED * (seed >> 63), noise.stream)
    padding = [None] * (MAX_TERMS - len(tensors))
    inputs = [*tensors, *padding, output, null]
    primals, tangents = runtime.unpack_duals(inputs)
    y, m = _call_update(*primals, index, numbers, at, *draw, keep)
    if tangents is not None:  # of a linear map: the map itself, without noise
        known = [
            torch.zeros_like(x) if t is None and x is not None else t
            for x, t in zip(primals, tangents, strict=True)
        ]
        dy, dm = _call_update(*known, None, numbers, at, 0, 0, keep)
        y, m = runtime.make_dual(y, dy), runtime.make_dual(m, dm) if keep else m
    return y, m if keep else None


@runtime.explains("update")
def _explain(tensors: Sequence[Tensor], coefficients: Sequence[float], **options: Any) -> runtime.Answer:
    output, null, noise = (options.get(name) for name in ("output", "null", "noise"))
    _check(tensors, coefficients, output, null, options.get("state"), noise)
    reason = supported(tensors, output, null)
    given = [t for t in (*tensors, output, null) if t is not None]
    as_is = (noise is None and _same_memory_order(given)) or all(t.is_contiguous() for t in given)
    copies = "" if as_is else ", tensors that are not contiguous are copied"
    how = f"one launch, {len(tensors)} tensors, {4 * _BLOCKS} elements a program{copies}"
    return runtime.Answer("update", reason, how)
