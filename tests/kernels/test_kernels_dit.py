"""The pieces of a DiT block under Triton's interpreter against float64 references."""

import random

import pytest
import torch
from accuracy import assert_close_enough
from torch import Tensor
from torch.library import opcheck

from fastsample_kernels import _runtime, dit, explain, supported
from fastsample_kernels._launch import Launch


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


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(function, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The results and the gradients of every input, for output gradients that are exact in ``dtype``."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    gradients = [normal(*y.shape, seed=9 + i, dtype=dtype).to(y.dtype) for i, y in enumerate(out)]
    got = torch.autograd.grad(out, tuple(leaves.values()), gradients)
    results = {f"out{i}": y.detach() for i, y in enumerate(out)}
    return results | {f"d{name}": g for name, g in zip(leaves, got, strict=True)}


def compare(function, plain, tensors: dict[str, Tensor]) -> None:
    dtype = next(iter(tensors.values())).dtype
    got = run(function, tensors, dtype)
    exact = run(plain, {name: t.double() for name, t in tensors.items()}, dtype)
    assert {name: t.dtype for name, t in got.items()} == dict.fromkeys(exact, dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    else:
        assert_close_enough(got, run(plain, tensors, dtype), exact)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "tokens":  # some of the tokens of a joint sequence
        return torch.cat([x, x], 1)[:, x.shape[1] :]
    if layout == "features":  # a part of a joint projection
        return torch.cat([x, x], -1)[..., x.shape[-1] :]
    if layout == "transposed":  # elements of a row are not neighbours
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x.contiguous()


LAYOUTS = ("contiguous", "tokens", "features", "transposed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def broadcast(p: Tensor | None, x: Tensor) -> Tensor | None:
    return p[:, None] if p is not None and p.dim() < x.dim() else p


def plain_norm(norm):
    def of(x, weight=None, bias=None, eps=1e-6, scale=None, shift=None):
        modulation = {"scale": broadcast(scale, x), "shift": broadcast(shift, x)}
        return dit.reference_norm(x, norm, weight, bias, eps, **modulation)

    return of


def plain_residual(norm):
    def of(x, branch, gate=None, weight=None, bias=None, eps=1e-6, scale=None, shift=None):
        modulation = {"scale": broadcast(scale, x), "shift": broadcast(shift, x)}
        gate = broadcast(gate, x)
        return dit.reference_gated_residual_norm(x, branch, norm, gate, weight, bias, eps, **modulation)

    return of


def fused_norm(norm):
    if norm == "layer":
        return lambda **t: dit.layer_norm(**t, eps=1e-6)
    return dit.rms_norm


def fused_residual(norm):
    return lambda **t: dit.gated_residual_norm(**t, norm=norm)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick) if case < 4 else case for case in range(24)]
)
def test_fuzz_norms(case):
    rng = random.Random(case)
    batch, length, dim = rng.choice([1, 2]), rng.choice([1, 5, 23]), rng.choice([7, 16, 40, 72])
    dtype = DTYPES[case % 4]
    norm, residual = rng.choice(["layer", "rms"]), rng.random() < 0.5
    modulation = (batch, length, dim) if rng.random() < 0.2 else (batch, dim)
    x = strided(normal(batch, length, dim, dtype=dtype), rng.choice(LAYOUTS))
    tensors = {"x": x}
    if residual:
        tensors["branch"] = strided(normal(batch, length, dim, seed=1, dtype=dtype), rng.choice(LAYOUTS))
    names = {"gate": modulation, "weight": (dim,), "bias": (dim,), "scale": modulation, "shift": (batch, dim)}
    for seed, (name, shape) in enumerate(names.items(), 2):
        possible = (residual or name != "gate") and (norm == "layer" or name != "bias")
        if possible and rng.random() < 0.7:
            tensors[name] = normal(*shape, seed=seed, dtype=dtype)
    if residual:
        compare(fused_residual(norm), plain_residual(norm), tensors)
    else:
        compare(fused_norm(norm), plain_norm(norm), tensors)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_where_one_result_is_used(which):
    tensors = {"x": normal(2, 3, 8), "branch": normal(2, 3, 8, seed=1), "gate": normal(2, 8, seed=2)}
    got, wanted = (
        run(lambda f=f, **t: f(**t)[which], tensors)
        for f in (fused_residual("layer"), plain_residual("layer"))
    )
    torch.testing.assert_close(got, wanted)


def test_any_number_of_axes():
    for shape in ((3, 8), (2, 3, 2, 8)):
        x = normal(*shape)
        scale = normal(shape[0], 8, seed=1)
        wanted = dit.reference_norm(x, "rms", scale=scale.reshape(shape[0], *[1] * (len(shape) - 2), 8))
        torch.testing.assert_close(dit.rms_norm(x, scale=scale), wanted)
        between = scale.reshape(shape[0], *[1] * (len(shape) - 2), 8)
        assert torch.equal(dit.rms_norm(x, scale=between), dit.rms_norm(x, scale=scale))


def test_types_of_parameters_may_differ():
    x, scale, weight = normal(2, 5, 8, dtype=torch.bfloat16), normal(2, 8, seed=1), normal(8, seed=2)
    got = dit.layer_norm(x, weight.float(), scale=scale.float())
    exact = dit.reference_norm(x.double(), "layer", weight, eps=1e-5, scale=scale[:, None])
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.quick
@pytest.mark.parametrize("mean", [0.0, 300.0, 1e4])
def test_large_mean(mean):
    x = normal(1, 3, 40, dtype=torch.float32) + mean
    exact = dit.reference_norm(x.double(), "layer")
    error = (dit.layer_norm(x, eps=1e-6) - exact).abs().max()
    # All that float32 inputs leave to lose is the rounding of the mean.
    assert error <= 2 * (dit.reference_norm(x, "layer") - exact).abs().max() + 4 * 2**-24 * max(mean, 1)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("value", [0.0, 7.25])
def test_zero_variance(norm, value):
    x = torch.full((2, 3, 8), value)
    compare(fused_norm(norm), plain_norm(norm), {"x": x, "scale": normal(2, 8, dtype=torch.float32)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(bad):
    shapes = {"x": (2, 3, 8), "branch": (2, 3, 8), "gate": (2, 8), "scale": (2, 8)}
    tensors = {
        name: normal(*shape, seed=i, dtype=torch.float32) for i, (name, shape) in enumerate(shapes.items())
    }
    clean = run(fused_residual("layer"), tensors)
    x = tensors["x"].clone()
    x[1, 2, 3] = bad
    got = run(fused_residual("layer"), tensors | {"x": x})
    for name in clean:
        assert torch.equal(got[name][0], clean[name][0]), name
    for name in ("out0", "out1", "dx", "dbranch"):
        assert torch.equal(got[name][1, :2], clean[name][1, :2]), name
    assert got["out1"][1, 2].isnan().all()


# -- rotary embedding ----------------------------------------------------------------------------------------


def angles(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    theta = normal(*shape, seed=7)
    return theta.cos().to(dtype), theta.sin().to(dtype)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick) if case < 4 else case for case in range(16)]
)
def test_fuzz_norm_rope(case):
    rng = random.Random(case)
    batch, heads, length, dim = 2, rng.choice([1, 3]), rng.choice([1, 5, 70]), rng.choice([2, 6, 16, 40])
    dtype = DTYPES[case % 4]
    options = {"norm": case % 3 > 0, "interleaved": rng.random() < 0.5}
    cos, sin = angles(
        *rng.choice([(length, dim), (batch, length, dim)]), dtype=rng.choice([dtype, torch.float32])
    )
    if dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    x = normal(batch, heads, length, dim, dtype=dtype)
    if rng.random() < 0.5:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = {"x": x} | ({"weight": normal(dim, seed=2, dtype=dtype)} if rng.random() < 0.7 else {})
    c, s = (p if p.dim() == 2 else p[:, None] for p in (cos, sin))
    compare(
        lambda **t: dit.norm_rope(cos=cos, sin=sin, **t, **options),
        lambda **t: dit.reference_norm_rope(cos=c, sin=s, **t, **options),
        tensors,
    )


def test_rotation_by_hand():
    # 90 degrees: (a, b) becomes (-b, a).
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)
    got = dit.norm_rope(x, cos, sin, norm=False)
    assert got.flatten().tolist() == [-2, 1, -4, 3]
    got = dit.norm_rope(x, cos, sin, norm=False, interleaved=False)
    assert got.flatten().tolist() == [-3, -4, 1, 2]


def test_queries_and_keys_keep_their_layout():
    cos, sin = angles(5, 8, dtype=torch.float32)
    q = normal(2, 5, 3, 8, dtype=torch.float32).transpose(1, 2)
    k = normal(2, 3, 5, 8, seed=1, dtype=torch.float32)
    weights = normal(8, seed=2, dtype=torch.float32), normal(8, seed=3, dtype=torch.float32)
    rotated = dit.qk_norm_rope(q, k, cos, sin, *weights)
    assert rotated[0].stride() == q.stride()
    assert rotated[1].stride() == k.stride()
    for x, weight, y in zip((q, k), weights, rotated, strict=True):
        torch.testing.assert_close(y, dit.reference_norm_rope(x, cos, sin, weight))


# -- gated linear units --------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gated_linear_units(activation, dtype):
    functions = {
        "gelu": dit.geglu,
        "gelu_tanh": lambda x: dit.geglu(x, approximate="tanh"),
        "silu": dit.swiglu,
    }
    for shape, layout in (((2, 3, 38), "contiguous"), ((3, 2), "contiguous"), ((2, 3, 16), "features")):
        x = strided(3 * normal(*shape, dtype=dtype), layout)
        compare(functions[activation], lambda x: dit.reference_glu(x, activation), {"x": x})


def test_gated_linear_units_of_more_than_one_tile(monkeypatch):
    monkeypatch.setattr(dit, "_BLOCK", 16)
    compare(dit.geglu, lambda x: dit.reference_glu(x, "gelu"), {"x": normal(2, 74)})


def test_gated_linear_units_far_out():
    x = torch.tensor([1.0, 1, 1, 1, -200, 200, -1e4, 1e4], requires_grad=True)
    for function in (dit.geglu, lambda x: dit.geglu(x, approximate="tanh"), dit.swiglu):
        y = function(x)
        assert y.tolist() == pytest.approx([0, 200, 0, 1e4])
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.isfinite().all()


# -- all of them ---------------------------------------------------------------------------------------------

COS, SIN = angles(3, 8, dtype=torch.float64)
NORM_NAMES = ("x", "weight", "bias", "scale", "shift")
RESIDUAL_NAMES = ("x", "branch", "gate", "weight", "bias", "scale", "shift")
CALLS = {
    "layer_norm": (
        lambda *t: dit.layer_norm(t[0], t[1], t[2], 1e-6, scale=t[3], shift=t[4]),
        lambda *t: plain_norm("layer")(**dict(zip(NORM_NAMES, t, strict=True))),
        ((2, 3, 8), (8,), (8,), (2, 8), (2, 8)),
    ),
    "gated_residual_norm": (
        lambda *t: dit.gated_residual_norm(*t[:5], scale=t[5], shift=t[6]),
        lambda *t: plain_residual("layer")(**dict(zip(RESIDUAL_NAMES, t, strict=True))),
        ((2, 3, 8), (2, 3, 8), (2, 8), (8,), (8,), (2, 8), (2, 8)),
    ),
    "norm_rope": (
        lambda x, w: dit.norm_rope(x, COS, SIN, w),
        lambda x, w: dit.reference_norm_rope(x, COS, SIN, w),
        ((2, 2, 3, 8), (8,)),
    ),
    "geglu": (dit.geglu, lambda x: dit.reference_glu(x, "gelu"), ((2, 8),)),
    "swiglu": (dit.swiglu, lambda x: dit.reference_glu(x, "silu"), ((2, 8),)),
}
each = pytest.mark.parametrize("name", CALLS)


def arguments(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(CALLS[name][2])]


@pytest.mark.quick
@each
def test_gradcheck(name):
    leaves = [t.requires_grad_() for t in arguments(name)]
    assert torch.autograd.gradcheck(CALLS[name][0], leaves, fast_mode=True)


@each
def test_forward_mode_takes_plain_torch(name, launched):
    function, plain, _ = CALLS[name]
    primals, tangents = tuple(arguments(name)), tuple(2 * t for t in arguments(name))
    got, wanted = (torch.func.jvp(f, primals, tangents) for f in (function, plain))
    torch.testing.assert_close(got, wanted)
    assert launched == []
    leaves = [t.requires_grad_() for t in primals]
    assert torch.autograd.gradcheck(
        function, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False
    )


@each
def test_every_output_is_written(name, monkeypatch):
    function = CALLS[name][0]
    tensors = {str(i): t for i, t in enumerate(arguments(name, torch.float32))}
    clean = run(lambda **t: function(*[p.to(torch.float32) for p in t.values()]), tensors)
    empty, poisoned = _runtime.empty, []

    def poison(*args, **kwargs):
        poisoned.append(args)
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(_runtime, "empty", poison)
    got = run(lambda **t: function(*[p.to(torch.float32) for p in t.values()]), tensors)
    assert len(poisoned) >= 2
    assert all(torch.equal(got[key], clean[key]) for key in clean)


def gradient(function, count: int):
    def loss(*tensors):
        out = function(*tensors)
        return sum(y.sin().sum() for y in (out if isinstance(out, tuple) else (out,)))

    return torch.func.grad(loss, tuple(range(count)))


@each
def test_vmap_of_value_and_gradient(name):
    function, plain, shapes = CALLS[name]
    tensors = arguments(name)
    patterns = [tuple(0 for _ in shapes), tuple(1 if i % 2 else None for i in range(len(shapes)))]
    for dims in patterns:
        if all(dim is None for dim in dims):
            continue
        mapped = [
            t if dim is None else torch.stack([t, 2 * t - 1, t + 1], dim)
            for t, dim in zip(tensors, dims, strict=True)
        ]

        for of in (lambda f: f, lambda f: gradient(f, len(shapes))):
            got, wanted = (torch.vmap(of(f), dims)(*mapped) for f in (function, plain))
            torch.testing.assert_close(got, wanted)


@each
def test_compiles_into_one_graph(name):
    function, plain, _ = CALLS[name]
    tensors = {str(i): t for i, t in enumerate(arguments(name))}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, wanted = (run(lambda f=f, **t: f(*t.values()), tensors) for f in (compiled, plain))
    torch.testing.assert_close(got, wanted)


@each
def test_export_and_checkpointing_keep_the_operator(name):
    class Module(torch.nn.Module):
        def forward(self, *t):
            return CALLS[name][0](*t)

    tensors = tuple(arguments(name))
    exported = torch.export.export(Module(), tensors)
    assert any("fastsample_kernels." in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*tensors), CALLS[name][1](*tensors))
    named = {str(i): t for i, t in enumerate(tensors)}
    checkpointed = torch.utils.checkpoint.checkpoint
    got = run(lambda **t: checkpointed(Module(), *t.values(), use_reentrant=False), named)
    torch.testing.assert_close(got, run(lambda **t: CALLS[name][1](*t.values()), named))


@each
def test_second_derivatives_are_refused(name):
    leaves = [t.requires_grad_() for t in arguments(name)]
    out = CALLS[name][0](*leaves)
    out = out[-1] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.sin().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        torch.autograd.grad(first.sum(), leaves[0])


@pytest.mark.quick
@each
def test_cpu_tensors_go_through_the_kernels(name, launched):
    run(lambda **t: CALLS[name][0](*t.values()), {str(i): t for i, t in enumerate(arguments(name))})
    assert len(launched) == 2
    assert launched[1].endswith("_backward")


def test_opcheck():
    x, branch = (normal(2, 3, 8, seed=i, dtype=torch.float32).requires_grad_() for i in (0, 1))
    vectors = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 8), (8,), (8,), (2, 8))]
    gate, weight, bias, scale = vectors
    opcheck(dit._norm, (x, branch, gate, weight, bias, scale, scale, 1e-5, False))
    opcheck(dit._norm, (x, None, None, None, None, None, None, 1e-5, True))
    plain = [t.detach() for t in (x, x, x, branch, gate, weight, scale)]
    opcheck(dit._norm_backward, (*plain, 1e-5, False, True))
    heads = normal(2, 2, 3, 8, dtype=torch.float32).requires_grad_()
    cos, sin = (p.float().expand(2, 3, 8) for p in (COS, SIN))
    opcheck(dit._rope, (heads, cos, sin, weight, 1e-6, True, True))
    opcheck(
        dit._rope_backward, (heads.detach(), heads.detach(), cos, sin, weight.detach(), 1e-6, True, False)
    )
    flat = normal(3, 8, dtype=torch.float32).requires_grad_()
    opcheck(dit._glu, (flat, "gelu"))
    opcheck(dit._glu_backward, (normal(3, 4, dtype=torch.float32), flat.detach(), "silu"))


# -- fallback and bad input ----------------------------------------------------------------------------------


def test_plain_torch_where_the_kernels_do_not_run(launched, monkeypatch):
    monkeypatch.setattr(dit, "MAX_DIM", 4)
    for name in ("layer_norm", "gated_residual_norm", "norm_rope"):
        function, plain, _ = CALLS[name]
        tensors = arguments(name)
        torch.testing.assert_close(function(*tensors), plain(*tensors))
    assert launched == []
    x = normal(2, 3, 8)
    assert explain(dit.layer_norm, x) == "layer_norm: plain torch, because dim 8 is above 4"
    cos = COS.clone().requires_grad_()
    monkeypatch.undo()
    assert "cos or sin requires" in explain("norm_rope", normal(1, 1, 3, 8), cos, SIN)
    assert "a tensor is empty" in explain("geglu", torch.zeros(0, 8))


@pytest.mark.quick
def test_explain_names_the_tiles():
    x = normal(2, 3, 8)
    heads = normal(1, 1, 3, 8)
    calls = [
        (dit.layer_norm, x),
        (dit.rms_norm, x),
        (dit.gated_residual_norm, x, x),
        (dit.norm_rope, heads, COS, SIN),
        (dit.qk_norm_rope, heads, heads, COS, SIN),
        (dit.geglu, x),
        (dit.swiglu, x),
    ]
    for call in calls:
        said = explain(*call)
        assert said.startswith(f"{call[0].__name__}: Triton, ")
        assert "Tiles(" in said
        assert supported(*call)
    turned = COS.clone().requires_grad_()
    assert not supported("qk_norm_rope", heads, heads, turned, SIN)
    assert "because q: cos or sin requires a gradient; k:" in explain(
        "qk_norm_rope", heads, heads, turned, SIN
    )


def test_tiles_cover_every_shape():
    rng = random.Random(0)
    for _ in range(500):
        samples, length = rng.choice([1, 2, 64, 4096]), rng.choice([1, 77, 4096, 65537])
        dim = rng.choice([1, 72, 128, 1152, 3072, 16384])
        t = dit.row_tiles(samples, length, dim)
        assert t.block >= dim
        assert t.block & (t.block - 1) == 0
        assert t.rows & (t.rows - 1) == 0
        assert t.chunk % t.rows == 0
        assert 1 <= t.warps <= 16
        assert (-(-length // t.chunk) - 1) * t.chunk < length
        spun = dit.rope_tiles(1, samples, length, min(dim, 256))
        assert 1 <= spun.span <= samples


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dit.layer_norm(torch.zeros(4)), "x is torch.float32 of shape"),
        (lambda: dit.rms_norm(torch.zeros(2, 4, dtype=torch.int32)), "x is torch.int32"),
        (lambda: dit.layer_norm(torch.zeros(2, 4), torch.zeros(3)), "weight has shape"),
        (lambda: dit.layer_norm(torch.zeros(2, 4), None, torch.zeros(2, 4)), "bias has shape"),
        (lambda: dit.layer_norm(torch.zeros(2, 5, 4), scale=torch.zeros(4)), "scale has shape"),
        (lambda: dit.layer_norm(torch.zeros(2, 5, 4), shift=torch.zeros(5, 4)), "shift has shape"),
        (lambda: dit.gated_residual_norm(torch.zeros(2, 4), torch.zeros(2, 5)), "branch has shape"),
        (lambda: dit.gated_residual_norm(*[torch.zeros(2, 4)] * 2, torch.zeros(4)), "gate has shape"),
        (lambda: dit.gated_residual_norm(*[torch.zeros(2, 4)] * 2, norm="batch"), "norm='batch'"),
        (
            lambda: dit.gated_residual_norm(*[torch.zeros(2, 4)] * 2, bias=torch.zeros(4), norm="rms"),
            "takes no bias",
        ),
        (lambda: dit.norm_rope(torch.zeros(1, 2, 3, 5), COS, SIN), r"of shape \(1, 2, 3, 5\); expected"),
        (lambda: dit.norm_rope(torch.zeros(1, 2, 3, 8), COS[:2], SIN), "cos has shape"),
        (lambda: dit.norm_rope(torch.zeros(1, 2, 3, 8), COS, SIN[:, :4]), "sin has shape"),
        (lambda: dit.norm_rope(torch.zeros(1, 2, 3, 8), COS, SIN, torch.zeros(2)), "weight has shape"),
        (lambda: dit.geglu(torch.zeros(2, 5)), "x is torch.float32 of shape"),
        (lambda: dit.geglu(torch.zeros(2, 4), approximate="sigmoid"), "approximate='sigmoid'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
