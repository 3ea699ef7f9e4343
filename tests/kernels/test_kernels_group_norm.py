"""group_norm under Triton's interpreter against a float64 reference."""

import dataclasses
import importlib
import random

import pytest
import torch
from accuracy import assert_close_enough
from torch import Tensor
from torch.library import opcheck

from fastsample_kernels import _runtime, explain, group_norm
from fastsample_kernels._launch import Launch

module = importlib.import_module("fastsample_kernels.group_norm")
reference = module.reference


def split(spatial: int, block_c: int = 4, block_s: int = 8, blocks: int = 2, combine: int = 2) -> object:
    """Tiles of the three-launch path, small enough that every loop runs more than once."""
    chunk = blocks * block_s
    chunks = -(-spatial // chunk)
    return module.Tiles(False, 1, 1, block_c, block_s, chunk, chunks, 0, combine, combine, 8, 4, 4, 2)


def merged(spatial: int) -> object:
    """Tiles of the two-launch path: room for the pieces of five channels."""
    tiles = split(spatial, block_c=1)
    return dataclasses.replace(tiles, merged=1 << (5 * tiles.chunks - 1).bit_length())


def fused(spatial: int) -> object:
    """Tiles of the one-launch path, with loops over channels and positions."""
    return dataclasses.replace(split(spatial), fused=True, group_c=2, group_s=8)


@pytest.fixture
def use_tiles(monkeypatch):
    def use(tiles):
        monkeypatch.setattr(module, "tiles", lambda *args, **kwargs: tiles)

    return use


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    call = Launch.__call__

    def spy(self):
        names.append(self.kernel.__name__)
        call(self)

    monkeypatch.setattr(Launch, "__call__", spy)
    return names


def inputs(shape, dtype=torch.float64, seed=0, **without: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": shape, "weight": shape[1:2], "bias": shape[1:2]}
    sizes |= {"scale": shape[:2], "shift": shape[:2], "residual": shape}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for name, size in sizes.items()
        if without.get(name, True)
    }


def run(function, tensors: dict[str, Tensor], groups: int, gy: Tensor, activation="silu"):
    """The result and the gradients of every input."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(num_groups=groups, activation=activation, **leaves)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), gy), strict=True)
    )


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "channel_slice":  # offset, and a batch stride larger than the sample
        return torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "channels_last_slice":
        wide = torch.cat([x, x], dim=1).movedim(1, -1).contiguous().movedim(-1, 1)
        return wide[:, x.shape[1] :]
    if layout == "reversed":  # no layout that the kernels read
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "offset":  # not aligned to 16 bytes
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.contiguous()


LAYOUTS = ("contiguous", "channels_last", "channel_slice", "channels_last_slice", "reversed", "offset")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick) if case % 5 == 0 else case for case in range(24)]
)
def test_fuzz_forward_and_backward(case, use_tiles):
    rng = random.Random(case)
    groups, width = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5])
    axes = case % 4
    spatial = [rng.choice([(), (1, 9, 23), (1, 4, 7), (1, 2, 3)][axes]) for _ in range(axes)]
    shape = (rng.choice([1, 2]), groups * width, *spatial)
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][case // 4 % 4]
    optional = {name: rng.random() < 0.7 for name in ("weight", "bias", "scale", "shift", "residual")}
    tensors = inputs(shape, dtype, seed=100 + case, **optional)
    tensors["x"] = strided(tensors["x"], rng.choice(LAYOUTS))
    if "residual" in tensors:
        tensors["residual"] = strided(tensors["residual"], rng.choice(LAYOUTS))
    if "scale" in tensors and "shift" in tensors:  # as a projection of the time embedding gives them
        tensors["scale"], tensors["shift"] = torch.cat([tensors["scale"], tensors["shift"]], 1).chunk(
            2, dim=1
        )
    elements = torch.Size(spatial).numel()
    chosen = rng.choice([fused(elements), split(elements), split(elements, 2, 4, 1, 4)])
    use_tiles(merged(elements) if case % 3 == 2 else chosen)
    gy = strided(
        torch.randn(shape, generator=torch.Generator().manual_seed(case)).to(dtype), rng.choice(LAYOUTS)
    )
    activation = rng.choice([None, "silu"])

    got = run(group_norm, tensors, groups, gy, activation)
    low = run(reference, tensors, groups, gy, activation)
    exact = run(reference, {k: t.double() for k, t in tensors.items()}, groups, gy.double(), activation)
    assert got["y"].dtype == dtype
    assert {k: t.dtype for k, t in got.items()} == {"y": dtype} | dict.fromkeys(tensors, dtype)
    if dtype == torch.float64:  # the interpreter's float64 path is exact
        for name, wanted in exact.items():
            torch.testing.assert_close(got[name], wanted, rtol=1e-9, atol=1e-9)
    else:
        assert_close_enough(got, low, exact)


@pytest.mark.quick
@pytest.mark.parametrize("mean", [0.0, 300.0, 1e4])
@pytest.mark.parametrize("tiles", [fused(40), split(40), merged(40)], ids=["fused", "split", "merged"])
def test_large_mean(mean, tiles, use_tiles):
    use_tiles(tiles)
    x = torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(0)) + mean
    exact = reference(x.double(), 2)
    error = (group_norm(x, 2) - exact).abs().max()
    # All that float32 inputs leave to lose is the rounding of the mean.
    assert error <= 2 * (reference(x, 2) - exact).abs().max() + 4 * 2**-24 * max(mean, 1)


@pytest.mark.quick
@pytest.mark.parametrize("tiles", [fused(9), split(9), merged(9)], ids=["fused", "split", "merged"])
def test_zero_variance(tiles, use_tiles):
    use_tiles(tiles)
    tensors = inputs((2, 4, 9), torch.float32, residual=False)
    tensors["x"] = torch.full((2, 4, 9), 7.25)
    gy = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    got, low = run(group_norm, tensors, 2, gy), run(reference, tensors, 2, gy)
    exact = run(reference, {name: t.double() for name, t in tensors.items()}, 2, gy.double())
    assert_close_enough(got, low, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tiles", [fused(9), split(9), merged(9)], ids=["fused", "split", "merged"])
def test_non_finite_values_stay_in_their_sample(bad, tiles, use_tiles):
    use_tiles(tiles)
    tensors = inputs((2, 4, 9), torch.float32)
    gy = torch.ones(2, 4, 9)
    clean = run(group_norm, tensors, 2, gy)
    tensors["x"] = tensors["x"].clone()
    tensors["x"][1, 0, 3] = bad
    got = run(group_norm, tensors, 2, gy)
    for name in ("y", "x", "residual", "scale", "shift"):
        assert torch.equal(got[name][0], clean[name][0]), name
    assert torch.equal(got["y"][1, 2:], clean["y"][1, 2:])  # the other group of that sample
    assert got["y"][1, :2].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("tiles", [fused(11), split(11), merged(11)], ids=["fused", "split", "merged"])
def test_every_output_is_written(layout, tiles, use_tiles, monkeypatch):
    use_tiles(tiles)
    tensors = inputs((2, 6, 11), torch.float32)
    tensors["x"] = strided(tensors["x"], layout)
    gy = torch.ones(2, 6, 11)

    def everything():
        primals = tuple(tensors.values())
        return run(group_norm, tensors, 3, gy), torch.func.jvp(
            lambda *p: group_norm(num_groups=3, **dict(zip(tensors, p, strict=True))), primals, primals
        )

    clean = everything()
    empty, poisoned = _runtime.empty, []

    def poison(*args, **kwargs):
        poisoned.append(args)
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(_runtime, "empty", poison)
    got = everything()
    assert len(poisoned) >= 10
    assert all(torch.equal(got[0][name], clean[0][name]) for name in clean[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], clean[1], strict=True))


@pytest.mark.quick
def test_cpu_tensors_go_through_the_kernels(launched):
    x = torch.randn(1, 4, 9, dtype=torch.float64, requires_grad=True)
    group_norm(x, 2).sum().backward()
    assert launched == ["fused", "backward_sums", "backward_combine", "backward_apply"]
    assert "one launch" in explain(group_norm, x, 2)


@pytest.mark.quick
def test_large_groups_take_three_launches(launched, use_tiles):
    use_tiles(split(40))
    group_norm(torch.randn(1, 4, 40), 2)
    assert launched == ["statistics", "combine", "apply"]
    assert "three launches" in explain("group_norm", torch.randn(1, 4, 40), 2)


def test_layout_is_kept_and_slices_are_read_in_place():
    x = torch.randn(2, 8, 3, 5)
    last = x.to(memory_format=torch.channels_last)
    assert group_norm(x, 2).is_contiguous()
    assert group_norm(last, 2).is_contiguous(memory_format=torch.channels_last)
    for view in (x[:, 2:6], x[1:], last[:, 2:6], last[:, :, 1:], x[:, :, 0], x.expand(2, 8, 3, 5)):
        assert "copied" not in explain(group_norm, view, 2)
    assert "copied" in explain(group_norm, x.transpose(2, 3), 2)


def test_types_of_parameters_and_residual_may_differ():
    tensors = inputs((2, 4, 5), torch.bfloat16)
    parameters = {name: tensors[name].float() for name in ("weight", "bias", "scale", "shift")}
    got = group_norm(num_groups=2, **(tensors | parameters))
    exact = reference(num_groups=2, **{name: t.double() for name, t in tensors.items()})
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    wide = tensors | {"residual": tensors["residual"].float()}
    assert group_norm(num_groups=2, **wide).dtype == torch.float32
    torch.testing.assert_close(group_norm(num_groups=2, **wide).double(), exact, rtol=1e-5, atol=1e-5)


# -- derivatives ---------------------------------------------------------------------------------------------


def function(*tensors: Tensor) -> Tensor:
    names = ("x", "weight", "bias", "scale", "shift", "residual")
    return group_norm(num_groups=1, activation="silu", **dict(zip(names, tensors, strict=True)))


def plain(*tensors: Tensor) -> Tensor:
    names = ("x", "weight", "bias", "scale", "shift", "residual")
    return reference(num_groups=1, activation="silu", **dict(zip(names, tensors, strict=True)))


ALL = tuple(range(6))


def loss(f):
    return lambda *tensors: f(*tensors).sin().sum()


@pytest.mark.quick
@pytest.mark.parametrize("tiles", [fused(5), split(5), merged(5)], ids=["fused", "split", "merged"])
def test_gradcheck_both_modes(tiles, use_tiles):
    use_tiles(tiles)
    leaves = [t.requires_grad_() for t in inputs((1, 3, 5)).values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", [ALL, (0,), (3,), (1, 4), (5,)], ids=str)
def test_forward_mode(layout, given, use_tiles):
    use_tiles(split(11))
    tensors = list(inputs((2, 6, 11)).values())
    tensors[0] = strided(tensors[0], layout)
    tangents = [torch.randn_like(tensors[i]) for i in given]

    def along(f):
        def of(*some):
            full = list(tensors)
            for i, t in zip(given, some, strict=True):
                full[i] = t
            return f(*full)

        return torch.func.jvp(of, tuple(tensors[i] for i in given), tuple(tangents))

    for got, wanted in zip(along(function), along(plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.quick
def test_forward_mode_in_low_precision(use_tiles):
    use_tiles(split(40))
    tensors = inputs((1, 4, 40), torch.bfloat16)
    tangents = inputs((1, 4, 40), torch.bfloat16, seed=1)

    def along(f, dtype):
        primal, tangent = (tuple(t.to(dtype) for t in d.values()) for d in (tensors, tangents))
        return dict(zip("yt", torch.func.jvp(f, primal, tangent), strict=True))

    exact = along(plain, torch.float64)
    assert_close_enough(along(function, torch.bfloat16), along(plain, torch.bfloat16), exact)


def test_gradient_of_the_primal_inside_forward_mode():
    tensors = tuple(inputs((1, 2, 3)).values())

    def inside(x):
        y, _ = torch.func.jvp(function, (x, *tensors[1:]), tensors)
        return y.sin().sum()

    wanted = torch.func.grad(loss(plain))(*tensors)
    torch.testing.assert_close(torch.func.grad(inside)(tensors[0]), wanted)


@pytest.mark.parametrize(
    "dims", [(0, None, None, None, None, None), (1, 0, None, 2, None, 0), (None, 1, 0, None, 0, None)]
)
def test_vmap_of_value_and_gradient(dims):
    tensors = inputs((2, 3, 4)).values()
    mapped = [
        t if dim is None else torch.stack([t, 2 * t - 1, t + 1], dim)
        for t, dim in zip(tensors, dims, strict=True)
    ]
    torch.testing.assert_close(torch.vmap(function, dims)(*mapped), torch.vmap(plain, dims)(*mapped))
    got, wanted = (torch.vmap(torch.func.grad(loss(f), ALL), dims)(*mapped) for f in (function, plain))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("jacobian", [torch.func.jacfwd, torch.func.jacrev])
def test_jacobians(jacobian):
    tensors = tuple(inputs((1, 2, 2)).values())
    for a, b in zip(jacobian(function, ALL)(*tensors), jacobian(plain, ALL)(*tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused():
    tensors = tuple(inputs((1, 2, 3)).values())
    x = tensors[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(group_norm(x, 1).sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(NotImplementedError, match="detach the tangent"):
        torch.func.grad(lambda x: torch.func.jvp(function, (x, *tensors[1:]), tensors)[1].sum())(x.detach())
    with pytest.raises(NotImplementedError):
        torch.func.jvp(torch.func.grad(loss(function)), tensors, tensors)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = group_norm(dual, 1)
        with pytest.raises(NotImplementedError, match="second"):
            torch.autograd.grad(y.sin().sum(), x, create_graph=True)


# -- operators -----------------------------------------------------------------------------------------------


def test_opcheck():
    tensors = inputs((2, 4, 3), torch.float32)
    order = ("x", "residual", "weight", "bias", "scale", "shift")
    given = [tensors[name].requires_grad_() for name in order]
    opcheck(module._forward, (*given, 2, 1e-5, True))
    last = strided(tensors["x"].detach(), "channels_last").requires_grad_()
    opcheck(module._forward, (last, None, None, None, None, None, 2, 1e-5, False))
    plain = [t.detach() for t in given]
    moments = module._forward(*plain, 2, 1e-5, True)[1]
    opcheck(module._backward, (torch.randn(2, 4, 3), *plain, moments, 2, True))
    tangent = (torch.randn(2, 4, 3), torch.randn(2, 4), torch.randn(2, 4))
    opcheck(module._jvp, (*plain, *tangent, 2, 1e-5, True))


def test_compiles_into_one_graph():
    tensors = inputs((2, 4, 3))
    tensors["x"] = strided(tensors["x"], "channels_last")
    gy = torch.randn(2, 4, 3, dtype=torch.float64)
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    got, wanted = run(compiled, tensors, 2, gy), run(reference, tensors, 2, gy)
    assert got["y"].stride() == tensors["x"].stride()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])
    values = tuple(tensors.values())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward_mode(primals, tangents):
        return torch.func.jvp(function, primals, tangents)

    for a, b in zip(forward_mode(values, values), torch.func.jvp(plain, values, values), strict=True):
        torch.testing.assert_close(a, b)


def test_export_and_checkpointing_keep_the_operator():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return group_norm(x, 2, activation="silu")

    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(Norm(), (x.detach(),))
    assert any("fastsample_kernels.group_norm" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x.detach()), reference(x.detach(), 2, activation="silu"))
    torch.utils.checkpoint.checkpoint(Norm(), x, use_reentrant=False).sin().sum().backward()
    (wanted,) = torch.autograd.grad(reference(x, 2, activation="silu").sin().sum(), x)
    torch.testing.assert_close(x.grad, wanted)


# -- tiles ---------------------------------------------------------------------------------------------------


def is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def test_tiles_cover_every_shape():
    rng = random.Random(0)
    for _ in range(500):
        groups, width = rng.choice([1, 2, 8, 32]), rng.randint(1, 100)
        batch, spatial = rng.choice([1, 2, 64]), rng.choice([1, 49, 64, 4096, 65537, 1 << 22])
        t = module.tiles(
            batch,
            groups * width,
            spatial,
            groups,
            channels_last=rng.random() < 0.5,
            itemsize=rng.choice([2, 4]),
        )
        assert t.chunk % t.block_s == 0
        assert (t.chunks - 1) * t.chunk < spatial <= t.chunks * t.chunk
        sides = (t.group_c, t.group_s, t.block_c, t.block_s, t.combine_k, t.combine_c)
        assert all(map(is_power_of_2, sides))
        assert t.group_c * t.group_s <= 8192
        assert t.block_c * t.block_s <= 4096
        if t.merged:
            assert t.block_c == 1
            assert t.merged >= width * t.chunks
            assert is_power_of_2(t.merged)
        assert t.combine_k * t.combine_c <= 1024


@pytest.mark.parametrize(
    ("shape", "channels_last", "fused"),
    [
        ((2, 320, 64 * 64), False, False),  # Stable Diffusion 1.5
        ((2, 1280, 8 * 8), False, True),
        ((2, 1280, 8 * 8), True, True),
        ((2, 320, 64 * 64), True, False),
        ((1, 128, 20 * 256 * 256), False, False),  # a video autoencoder
        ((1, 512, 64 * 64), True, False),
    ],
)
def test_tiles_of_known_networks(shape, channels_last, fused):
    chosen = module.tiles(*shape, 32, channels_last=channels_last, itemsize=2)
    assert chosen.fused is fused
    assert bool(chosen.merged) is (shape == (2, 320, 64 * 64) and not channels_last)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "num_groups=3 does not divide the 4 channels"),
        ({"num_groups": 0}, "num_groups=0"),
        ({"x": torch.zeros(4)}, "x has shape"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
        ({"bias": torch.zeros(2, 4)}, "bias has shape"),
        ({"scale": torch.zeros(4)}, "scale has shape"),
        ({"shift": torch.zeros(2, 4, 1)}, "shift has shape"),
        ({"residual": torch.zeros(2, 4, 6)}, "residual has shape"),
        ({"activation": "relu"}, "activation='relu'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm(**({"x": torch.zeros(2, 4, 5), "num_groups": 2} | change))
