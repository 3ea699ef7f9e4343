"""Group normalisation (Wu & He 2018) with what surrounds it in diffusion networks, in one operator:

    h    = x + residual
    xhat = (h - mean(h)) / sqrt(var(h) + eps)              over each group of channels of each sample
    z    = (xhat weight + bias) (1 + scale) + shift        = xhat gain + offset
    y    = silu(z) or z

Statistics are float32 whatever the tensors are. Layers: reference, tiles, launchers, operators,
``group_norm``; the Triton functions are in ``_group_norm_kernels.py``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime as runtime
from ._launch import Launch
from ._replay import remembered, replayed

ACTIVATIONS = (None, "silu")


# -- reference -----------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`group_norm` in plain torch: what runs where Triton does not, and what tests compare with."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    h = x if residual is None else x + residual
    weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    if weight is not None and bias is None:  # PyTorch's backward pass on a GPU wants both or none
        bias = torch.zeros_like(weight)
    elif bias is not None and weight is None:
        weight = torch.ones_like(bias)
    y = torch.group_norm(h, num_groups, weight, bias, eps)
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if scale is not None:
        y = y * (1 + scale.view(per_channel))
    if shift is not None:
        y = y + shift.view(per_channel)
    if activation == "silu":
        y = F.silu(y)
    return y.to(dtype)  # from a wider scale or shift, or from autocast


# -- tiles ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """How a call is cut up.

    Attributes:
        fused: one launch with one program a group, instead of three launches.
        group_c, group_s: channels and positions of a tile of the fused kernel, within one group.
        block_c, block_s: those of a tile of the other kernels, which may straddle groups.
        chunk, chunks: length and number of the pieces that the spatial axis is reduced in.
        merged: 0, or a power of two: the pieces of a group are so few that the kernel which reads them merges them.
        combine_k, combine_c: pieces and channels of a tile of the kernels that merge those.
        group_warps, warps, backward_warps, combine_warps: of the fused kernel, of the others that read the tensor, in
            the forward and the backward pass, and of those that merge.
    """

    fused: bool
    group_c: int
    group_s: int
    block_c: int
    block_s: int
    chunk: int
    chunks: int
    merged: int
    combine_k: int
    combine_c: int
    group_warps: int
    warps: int
    backward_warps: int
    combine_warps: int


# Chosen by time on an H200 (benchmarks/results/kernels-h200.md).
_FUSED_TILE = 16384  # bytes, with eight warps
_TILE = 4096  # elements, 32 a thread with four warps
_TILE_LAST = 2048  # of a channels-last tensor, with two warps
_NARROW_BYTES = 1 << 20  # of a channels-last tensor for which one launch beats wide loads
_MERGED = 128  # pieces of a group that every program merges for itself
_MERGED_BYTES = 1 << 25  # of a tensor: beyond, the launch that this saves is nothing


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def tiles(
    batch: int,
    channels: int,
    spatial: int,
    num_groups: int,
    *,
    channels_last: bool,
    itemsize: int,
    multiprocessors: int = 132,
) -> Tiles:
    """The tiles for a shape; a pure function, so nothing is tuned at run time."""
    width = channels // num_groups
    elements = width * spatial
    size = batch * channels * spatial * itemsize
    # A channels-last group is a narrow strip of cache lines that other programs read too.
    fused = elements * itemsize <= _FUSED_TILE and (not channels_last or size <= _NARROW_BYTES)
    group_c = min(_power_of_2(width), 64)
    group_s = min(_power_of_2(spatial), _FUSED_TILE // itemsize // group_c)
    if channels_last:
        block_c = min(_power_of_2(channels), 64)
        block_s = min(_power_of_2(spatial), _TILE_LAST // block_c)
    else:
        block_s = min(_power_of_2(spatial), _TILE)
        block_c = min(_power_of_2(channels), _TILE // block_s)
    programs = batch * -(-channels // block_c)
    wanted = -(-16 * multiprocessors // programs)
    blocks = -(-spatial // block_s)
    chunk = -(-blocks // min(wanted, blocks)) * block_s
    chunks = -(-spatial // chunk)
    pieces = width * chunks
    merge = not channels_last and block_c == 1 and pieces <= _MERGED and size <= _MERGED_BYTES
    combine_c = min(_power_of_2(width), 64)
    combine_k = min(_power_of_2(chunks), 1024 // combine_c)
    return Tiles(
        fused=fused,
        group_c=group_c,
        group_s=group_s,
        block_c=block_c,
        block_s=block_s,
        chunk=chunk,
        chunks=chunks,
        merged=_power_of_2(pieces) if merge else 0,
        combine_k=combine_k,
        combine_c=combine_c,
        group_warps=8,
        warps=2 if channels_last else 4,
        backward_warps=4 if channels_last or block_c == 1 else 16,
        combine_warps=4 if combine_k * combine_c > 256 else 2,
    )


# -- layout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A tensor as (N, C, S), with a unit stride along C (channels last) or S."""

    channels_last: bool
    strides: tuple[int, int, int]


def layout(x: Tensor) -> Layout | None:
    """The tensor's layout; None where the spatial axes do not merge into one or no stride is one."""
    if x.is_contiguous() and x.stride(1) > 1:
        return Layout(False, (x.stride(0), x.stride(1), 1))
    spatial, stride = 1, 0  # of the merged axis
    for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if spatial == 1:
            stride = step
        elif step != stride * spatial:
            return None
        spatial *= size
    batch, channels = x.stride()[:2]
    if spatial > 1 and stride == 1:
        return Layout(False, (batch, channels, 1))
    if channels == 1 or x.shape[1] == 1:
        return Layout(True, (batch, 1, stride))
    return Layout(False, (batch, channels, 1)) if spatial == 1 else None


def _empty_like(x: Tensor) -> Tensor:
    """An output in the layout of ``x``."""
    known = layout(x)
    if known is None or not known.channels_last:
        return runtime.empty(x.shape, x.dtype, x.device)
    return runtime.empty((x.shape[0], *x.shape[2:], x.shape[1]), x.dtype, x.device).movedim(-1, 1)


def _in_layout(x: Tensor, channels_last: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """The tensor, copied if need be, and its strides in the wanted layout."""
    known = layout(x)
    if known is not None and known.channels_last == channels_last:
        return x, known.strides
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
    batch, channels = x.stride()[:2]
    if channels_last:
        return x, (batch, 1, x.shape[1])
    return x, (batch, channels, 1)


# -- launchers -----------------------------------------------------------------------------------------------


class _Call:
    """The arguments that the kernels share, in the form they take them."""

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        affine: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        num_groups: int,
        silu: bool,
    ) -> None:
        known = layout(x)
        self.channels_last = known is not None and known.channels_last
        self.x, strides = _in_layout(x, self.channels_last)
        self.batch, self.channels, self.groups = *x.shape[:2], num_groups
        self.spatial = math.prod(x.shape[2:])
        self.acc = runtime.accumulator(x.dtype)
        self.device = x.device
        self.tiles = tiles(
            self.batch,
            self.channels,
            self.spatial,
            num_groups,
            channels_last=self.channels_last,
            itemsize=x.element_size(),
            multiprocessors=runtime.multiprocessors(x.device),
        )
        self.input = self._tensor("x", self.x, strides) | {
            **self.tensor("residual", self.x if residual is None else residual),
            "HAS_RESIDUAL": residual is not None,
        }
        self.size = {"C": self.channels, "S": self.spatial}
        self.grouping = {"G": num_groups, "width": self.channels // num_groups}
        self.flags = {"CHANNELS_LAST": self.channels_last, "ACC": runtime.triton_dtype(self.acc)}
        self.affine: dict[str, Any] = {}
        for name, p in zip(("weight", "bias", "scale", "shift"), affine, strict=True):
            self.affine[f"HAS_{name.upper()}"] = p is not None
            p = self.x if p is None else p if p.stride(-1) == 1 or self.channels == 1 else p.contiguous()
            self.affine |= {name: p, f"{name}_n": p.stride(0) if p.ndim == 2 else 0}
        self.act = {"SILU": silu}
        t = self.tiles
        self.block = {"BLOCK_C": t.block_c, "BLOCK_S": t.block_s}
        self.blocks = self.batch * -(-self.channels // t.block_c)
        self.chunking = {"chunk": t.chunk, "chunks": t.chunks}
        self.over_tiles = -(-self.spatial // t.block_s)
        self.merging = {"BLOCK_C": t.combine_c, "BLOCK_K": t.combine_k}

    @staticmethod
    def _tensor(name: str, t: Tensor, strides: tuple[int, int, int]) -> dict[str, Any]:
        return {name: t} | {f"{name}_{axis}": s for axis, s in zip("ncs", strides, strict=True)}

    def tensor(self, name: str, t: Tensor) -> dict[str, Any]:
        """A tensor of the shape of x and its strides, copied to the layout of x if need be."""
        return self._tensor(name, *_in_layout(t, self.channels_last))

    def empty(self, *shape: int) -> Tensor:
        return runtime.empty(shape, self.acc, self.device)

    def partial(self, planes: int) -> dict[str, Any]:
        """Room for each channel's sums over each chunk."""
        return {"partial": self.empty(self.batch, self.tiles.chunks, planes, self.channels)}

    def launch(self, kernel: Any, programs: int, warps: int, *arguments: dict[str, Any]) -> Launch:
        merged: dict[str, Any] = {}
        for argument in arguments:
            merged |= argument
        return Launch(kernel, (programs,), merged, warps, 1)


def forward_launches(
    call: _Call,
    eps: float,
    dx: Tensor | None = None,
    dgain: Tensor | None = None,
    doffset: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """The launches of the forward pass, with ``dx`` also of its tangent, and (y, dy, moments)."""
    from . import _group_norm_kernels as kernels

    t, tangent = call.tiles, dx is not None
    y = _empty_like(call.x)
    dy = _empty_like(call.x) if tangent else y
    planes = 4 if tangent else 2
    memory = call.empty(call.batch, planes, call.groups)
    moments = {"moments": memory, "moments_n": planes * call.groups}
    result = call.tensor("y", y)
    if t.fused and not tangent:
        block = {"BLOCK_C": t.group_c, "BLOCK_S": t.group_s}
        common = (call.input, moments, call.affine, result, call.size, call.act, call.flags, block)
        launch = call.launch(
            kernels.fused, call.batch * call.groups, t.group_warps, *common, call.grouping, {"eps": eps}
        )
        return [launch], y, dy, memory
    partial = call.partial(planes)
    tangents = call.tensor("dx", call.x if dx is None else dx)
    switch, groups = {"TANGENT": tangent}, call.grouping
    acc = {"ACC": call.flags["ACC"]}
    merged = 0 if tangent else t.merged
    warps = t.warps * (4 if tangent else 1)  # of twice the numbers
    launches = [
        call.launch(
            kernels.statistics, call.blocks * t.chunks, warps,
            call.input, tangents, partial, call.size, call.chunking, switch, call.flags, call.block,
        ),
        call.launch(
            kernels.apply, call.blocks * call.over_tiles, warps,
            call.input, tangents, moments, call.affine, result,
            {"dgain": y if dgain is None else dgain, "doffset": y if doffset is None else doffset, "dy": dy},
            partial, call.size, groups, {"tiles": call.over_tiles, "eps": eps, "MERGED": merged}, call.chunking,
            call.act, switch, call.flags, call.block,
        ),
    ]  # fmt: skip
    if not merged:
        combine = call.launch(
            kernels.combine, call.batch * call.groups, t.combine_warps,
            partial, moments, call.size, groups, call.chunking, {"eps": eps}, switch, acc, call.merging,
        )  # fmt: skip
        launches.insert(1, combine)
    return launches, y, dy, memory


def backward_launches(call: _Call, gy: Tensor, moments: Tensor) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of the backward pass, and the gradients of h and, (N, 2, C), of gain and offset."""
    from . import _group_norm_kernels as kernels

    t = call.tiles
    gx = _empty_like(call.x)
    gradient = call.tensor("gy", gy)
    partial = call.partial(2)
    sums = call.empty(call.batch, 2, call.channels)
    means = {"means": call.empty(call.batch, 2, call.groups)}
    saved = {"moments": moments.contiguous(), "moments_n": 2 * call.groups}
    groups, acc = call.grouping, {"ACC": call.flags["ACC"]}
    names = ("weight", "weight_n", "HAS_WEIGHT", "scale", "scale_n", "HAS_SCALE")
    launches = [
        call.launch(
            kernels.backward_sums, call.blocks * t.chunks, t.backward_warps,
            call.input, gradient, saved, call.affine, partial, call.size, groups, call.chunking, call.act,
            call.flags, call.block,
        ),
        call.launch(
            kernels.backward_combine, call.batch * call.groups, t.combine_warps,
            partial, {name: call.affine[name] for name in names}, {"sums": sums}, means, call.size, groups,
            {"chunks": t.chunks}, acc, call.merging,
        ),
        call.launch(
            kernels.backward_apply, call.blocks * call.over_tiles, t.backward_warps,
            call.input, gradient, saved, means, call.affine, call.tensor("gx", gx), call.size, groups,
            {"tiles": call.over_tiles}, call.act, call.flags, call.block,
        ),
    ]  # fmt: skip
    return launches, gx, sums


def _run(launches: list[Launch], device: Tensor) -> None:
    with runtime.on_device(device):
        for launch in launches:
            launch()


# -- operators -----------------------------------------------------------------------------------------------
# ``moments`` (N, 2, G), mean and rstd, is saved for the backward pass and carries no gradient of its own.


@torch.library.custom_op("fastsample_kernels::group_norm", mutates_args=())
@replayed()
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    call = _Call(x, residual, (weight, bias, scale, shift), num_groups, silu)
    launches, y, _, moments = forward_launches(call, eps)
    _run(launches, x)
    return y, moments


@torch.library.custom_op("fastsample_kernels::group_norm_jvp", mutates_args=())
def _jvp(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dh: Tensor,
    dgain: Tensor,
    doffset: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x, residual, (weight, bias, scale, shift), num_groups, silu)
    launches, y, dy, moments = forward_launches(call, eps, dh, dgain.contiguous(), doffset.contiguous())
    _run(launches, x)
    return y, moments[:, :2].clone(), dy


@torch.library.custom_op("fastsample_kernels::group_norm_backward", mutates_args=())
@replayed()
def _backward(
    gy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    call = _Call(x, residual, (weight, bias, scale, shift), num_groups, silu)
    launches, gx, sums = backward_launches(call, gy, moments)
    _run(launches, x)
    return gx, sums


def _fake_moments(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((x.shape[0], 2, num_groups), dtype=runtime.accumulator(x.dtype))


@_forward.register_fake
def _(x, residual, weight, bias, scale, shift, num_groups, eps, silu):
    return _empty_like(x), _fake_moments(x, num_groups)


@_jvp.register_fake
def _(x, residual, weight, bias, scale, shift, dh, dgain, doffset, num_groups, eps, silu):
    return _empty_like(x), _fake_moments(x, num_groups), _empty_like(x)


@_backward.register_fake
def _(gy, x, residual, weight, bias, scale, shift, moments, num_groups, silu):
    return _empty_like(x), x.new_empty((x.shape[0], 2, x.shape[1]), dtype=runtime.accumulator(x.dtype))


# -- reverse mode --------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.num_groups, ctx.silu = inputs[-3], inputs[-1]


def _gradients(ctx: Any, gy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight, bias, scale and shift."""
    x, residual, weight, bias, scale, shift, moments = ctx.saved_tensors
    if gy is None:
        return (None,) * 6
    runtime.refuse_duals("group_norm's gradient", gy, x, residual, weight, bias, scale, shift)
    gx, sums = _call_backward(gy, x, residual, weight, bias, scale, shift, moments, ctx.num_groups, ctx.silu)
    ggain, goffset = sums.unbind(1)

    def reduced(gradient: Tensor, p: Tensor) -> Tensor:
        return (gradient.sum(0) if p.ndim == 1 else gradient).to(p.dtype)

    # gain = w (1 + scale), offset = b (1 + scale) + shift
    modulation = 1.0 if scale is None else 1 + scale.to(ggain.dtype)
    gscale = None
    if scale is not None:
        gscale = ggain if weight is None else ggain * weight
        gscale = (gscale if bias is None else gscale + goffset * bias).to(scale.dtype)
    return (
        gx,
        None if residual is None else gx,
        None if weight is None else reduced(ggain * modulation, weight),
        None if bias is None else reduced(goffset * modulation, bias),
        gscale,
        None if shift is None else goffset.to(shift.dtype),
    )


def _forward_gradients(ctx: Any, gy: Tensor | None, gmoments: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, gy), None, None, None)


def _jvp_gradients(
    ctx: Any, gy: Tensor | None, gmoments: Tensor | None, gdy: Tensor | None
) -> tuple[Tensor | None, ...]:
    if gdy is not None:
        raise NotImplementedError(
            "gradient of a forward-mode derivative of group_norm: second derivatives are not implemented in "
            "the kernels; detach the tangent, or run the plain modules there (unpatch the model)"
        )
    return (*_gradients(ctx, gy), None, None, None, None, None, None)


_call_forward = runtime.differentiable(_forward, _forward_gradients, _save)
_call_jvp = runtime.differentiable(_jvp, _jvp_gradients, _save)
_call_backward = runtime.differentiable(_backward)


# The mapped dimension of vmap becomes part of the batch.
runtime.batched(_forward, "nnpppp---")
runtime.batched(_jvp, "nnppppnnn---")
runtime.batched(_backward, "nnnppppn--")


# -- the function --------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; group_norm needs (batch, channels, ...)")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; convert it to a floating-point type")
    channels = x.shape[1]
    if not isinstance(num_groups, (int, torch.SymInt)):
        raise ValueError(f"num_groups={num_groups!r} is a {type(num_groups).__name__}; give an int")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {channels} channels of x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}; expected ({channels},), one number a channel"
            )
    for name, p in (("scale", scale), ("shift", shift)):
        if p is not None and p.shape != x.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}; expected (batch, channels) = {tuple(x.shape[:2])}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected that of x, {tuple(x.shape)}")
    others = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    runtime.check_devices("x", x, others)


def supported(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors (and plain torch runs instead); None when they can."""
    return runtime.why_not(x, *others)


@remembered
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group normalisation of ``x + residual``, modulated and activated (formulas at the top of the module).

    Differentiable in reverse mode and in forward mode (each once) with respect to every tensor; results do
    not change from run to run. Under autocast the type of the result stays that of ``x``, since the
    arithmetic is float32 anyway.

    Args:
        x: (batch, channels, ...), any number of further axes, floating point. Read in place where it is
            contiguous or channels last (batch and channel slices included), copied once otherwise.
        num_groups: divides ``channels``; each group is normalised on its own.
        weight, bias: (channels,), or None for 1 and 0.
        eps: added to the variance.
        activation: ``"silu"`` or None.
        scale, shift: (batch, channels), the modulation ``y * (1 + scale) + shift`` before the activation.
        residual: of the shape of ``x``, added before the statistics are taken. The sum itself is not
            returned.

    Returns:
        y, of the shape and layout of ``x`` and the wider of the types of ``x`` and ``residual``.

    Raises:
        ValueError: a shape, type, device or name that does not fit; the message says which.
        NotImplementedError: a second derivative through the kernels.
    """
    _check(x, num_groups, weight, bias, activation, scale, shift, residual)
    if supported(x, weight, bias, scale, shift, residual) is not None:
        return reference(
            x,
            num_groups,
            weight,
            bias,
            eps,
            activation=activation,
            scale=scale,
            shift=shift,
            residual=residual,
        )
    if residual is not None and residual.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    silu = activation == "silu"
    primals, tangents = runtime.unpack_duals((x, residual, weight, bias, scale, shift))
    if tangents is None:
        return _call_forward(x, residual, weight, bias, scale, shift, num_groups, eps, silu)[0]
    dh, dgain, doffset = _tangents(primals, tangents)
    y, _, dy = _call_jvp(*primals, dh, dgain, doffset, num_groups, eps, silu)
    return runtime.make_dual(y, dy)


def _tangents(primals: list[Any], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of h, gain and offset (see the top of the module), the last two (N, C)."""
    x, _, weight, bias, scale, _ = primals
    dx, dresidual, dweight, dbias, dscale, dshift = tangents
    given = [t for t in (dx, dresidual) if t is not None]
    dh = sum(given[1:], given[0]) if given else torch.zeros_like(x)
    acc = runtime.accumulator(x.dtype)
    zero = torch.zeros(x.shape[:2], dtype=acc, device=x.device)
    modulation = 1 if scale is None else 1 + scale.to(acc)
    dgain = doffset = zero
    if dweight is not None:
        dgain = dgain + dweight * modulation
    if dbias is not None:
        doffset = doffset + dbias * modulation
    if dscale is not None:
        dgain = dgain + (dscale if weight is None else dscale * weight.to(acc))
        doffset = doffset if bias is None else doffset + dscale * bias.to(acc)
    if dshift is not None:
        doffset = doffset + dshift
    return dh, dgain, doffset


@runtime.explains("group_norm")
def _explain(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> runtime.Answer:
    _check(x, num_groups, weight, bias, activation, scale, shift, residual)
    reason = supported(x, weight, bias, scale, shift, residual)
    if reason is not None:
        return runtime.Answer("group_norm", reason, "")
    known = layout(x)
    where = "no layout that the kernels read (copied)" if known is None else "channels first"
    if known is not None and known.channels_last:
        where = "channels last"
    cut = tiles(
        x.shape[0],
        x.shape[1],
        math.prod(x.shape[2:]),
        num_groups,
        channels_last=where == "channels last",
        itemsize=x.element_size(),
        multiprocessors=runtime.multiprocessors(x.device),
    )
    launches = "one launch" if cut.fused else "two launches" if cut.merged else "three launches"
    how = f"{where}, {launches}, {cut}"
    return runtime.Answer("group_norm", None, how)
