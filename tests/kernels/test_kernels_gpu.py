"""The kernels as they are shipped, on a GPU: against float64 references, with graphs, compiled, and run to run.

pytest tests/kernels/test_kernels_gpu.py -o addopts= -m gpu
"""

import importlib
import random

import models
import pytest
import test_kernels_attention as attention_tests
import test_kernels_dit as dit_tests
import test_kernels_group_norm as norm_tests
import torch
import torch.nn.functional as F
from accuracy import assert_close_enough
from torch import Tensor

import fastsample_kernels as fk
from fastsample.noise import normal as library_normal
from fastsample_kernels import dit

attention, norms, updates = (
    importlib.import_module(f"fastsample_kernels.{name}") for name in ("attention", "group_norm", "update")
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def tf32():
    """Plain torch and our attention round float32 products alike."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def cuda(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the GPU, in the same layout."""
    return {name: t.cuda() if t.is_contiguous() else _moved(t) for name, t in tensors.items()}


def _moved(t: Tensor) -> Tensor:
    room = t.untyped_storage().nbytes() // t.element_size()
    whole = torch.as_strided(t, (room,), (1,), 0).cuda()
    return torch.as_strided(whole, t.shape, t.stride(), t.storage_offset())


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def low_precision(q, k, v, *, bias=None, **options) -> Tensor:
    """Plain torch with the kernel's precision: cuBLAS rounds float32 to TF32 only where rows are multiples of 16
    bytes, so further keys, which nobody sees, fill them up."""
    extra = -k.shape[-2] % 4 if q.dtype == torch.float32 else 0
    if extra:
        if bias is None:
            bias = torch.ones(1, k.shape[-2], dtype=torch.bool, device=q.device)
        bias = F.pad(bias, (0, extra), value=False if bias.dtype == torch.bool else -torch.inf)
        k, v = (F.pad(t, (0, 0, 0, extra)) for t in (k, v))
    return attention.reference(q, k, v, bias=bias, **options)


SHAPES = (
    ((2, 320, 64, 64), 32), ((2, 1280, 8, 8), 32), ((1, 128, 4, 64, 64), 32), ((2, 640, 33, 17), 32),
    ((3, 30, 7, 9), 3), ((2, 256, 256, 256), 32), ((5, 64), 8),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "offset"])
def test_group_norm(shape, groups, layout):
    rng = random.Random(str((shape, layout)))
    dtype = rng.choice(DTYPES)
    optional = {name: rng.random() < 0.7 for name in ("weight", "bias", "scale", "shift", "residual")}
    tensors = norm_tests.inputs(shape, dtype, **optional)
    tensors["x"] = norm_tests.strided(tensors["x"] + rng.choice([0, 100]), layout)
    tensors = cuda(tensors)
    gy = torch.randn(shape, device="cuda").to(dtype)
    activation = rng.choice([None, "silu"])
    assert "Triton" in fk.explain("group_norm", num_groups=groups, **tensors)
    got = norm_tests.run(fk.group_norm, tensors, groups, gy, activation)
    low = norm_tests.run(norms.reference, tensors, groups, gy, activation)
    exact = norm_tests.run(norms.reference, double(tensors), groups, gy.double(), activation)
    assert_close_enough(got, low, exact)
    again = norm_tests.run(fk.group_norm, tensors, groups, gy, activation)
    assert all(torch.equal(again[name], t) for name, t in got.items())

    tangents = {name: torch.randn_like(t) for name, t in tensors.items()}
    got, low, exact = (
        attention_tests.along(
            lambda f=function, **t: f(num_groups=groups, activation=activation, **t), convert(tensors),
            convert(tangents),
        )
        for function, convert in ((fk.group_norm, dict), (norms.reference, dict), (norms.reference, double))
    )  # fmt: skip
    assert_close_enough(got, low, exact)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(dim, torch.bfloat16) for dim in (8, 40, 64, 72, 80, 96, 128, 160, 256)]
    + [(dim, dtype) for dim in (40, 128) for dtype in (torch.float16, torch.float32)],
)
@pytest.mark.parametrize(
    ("queries", "keys", "kind"),
    [(1024, 1024, "none"), (1000, 77, "none"), (777, 1000, "key bias"), (300, 513, "bias"), (512, 512, "causal"),
     (400, 333, "key mask"), (300, 77, "key mask"), (200, 40, "bias")],
)  # fmt: skip
def test_attention(queries, keys, kind, dim, dtype):
    batch, heads = 2, 3
    tensors = attention_tests.inputs(batch, heads, queries, keys, dim, dtype)
    tensors = {name: attention_tests.strided(t, "blhd") for name, t in tensors.items()}
    causal = kind == "causal"
    if kind not in ("none", "causal"):
        tensors["bias"] = attention_tests.make_bias(kind, batch, heads, queries, keys, dtype)
    tensors = cuda(tensors)
    do = torch.randn(batch, heads, queries, dim, device="cuda").to(dtype)
    assert "Triton" in fk.explain("attention", is_causal=causal, **tensors)
    options = {"is_causal": causal}
    got = attention_tests.run(fk.attention, tensors, do, **options)
    low = attention_tests.run(low_precision, tensors, do, **options)
    exact = attention_tests.run(attention.reference, double(tensors), do.double(), **options)
    assert_close_enough(got, low, exact)
    again = attention_tests.run(fk.attention, tensors, do, **options)
    assert all(torch.equal(again[name], t) for name, t in got.items())

    tangents = {name: torch.randn_like(tensors[name]) for name in ("q", "k", "v")}
    got, low, exact = (
        attention_tests.along(function, convert(tensors), convert(tangents), **options)
        for function, convert in (
            (fk.attention, dict),
            (low_precision, dict),
            (attention.reference, double),
        )
    )
    assert_close_enough(got, low, exact)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_attention_scale(scale):
    tensors = cuda(attention_tests.inputs(2, 2, 500, 300, 64, torch.float16))
    do = torch.randn(2, 2, 500, 64, device="cuda").half()
    got, low = (attention_tests.run(f, tensors, do, scale=scale) for f in (fk.attention, attention.reference))
    assert_close_enough(
        got, low, attention_tests.run(attention.reference, double(tensors), do.double(), scale=scale)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 1024, 1152), (3, 77, 320), (1, 5, 3072)])
def test_norms(shape, residual, norm, dtype):
    batch, _, dim = shape
    sizes = {"x": shape, "scale": (batch, dim), "shift": (batch, dim), "weight": (dim,)}
    sizes |= {"branch": shape, "gate": (batch, dim)} if residual else {}
    tensors = cuda({name: dit_tests.normal(*s, seed=i) for i, (name, s) in enumerate(sizes.items())})
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    fused = dit_tests.fused_residual(norm) if residual else dit_tests.fused_norm(norm)
    plain = dit_tests.plain_residual(norm) if residual else dit_tests.plain_norm(norm)
    _compare(fused, plain, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "length", "dim"), [(16, 1024, 128), (3, 77, 64), (24, 300, 72)])
def test_rope(heads, length, dim, interleaved, dtype):
    cos, sin = (torch.randn(length, dim, device="cuda") for _ in range(2))
    tensors = {
        "x": torch.randn(2, length, heads, dim, device="cuda").transpose(1, 2),
        "weight": torch.randn(dim, device="cuda"),
    }
    tensors = {name: t.to(dtype) for name, t in tensors.items()}

    def fused(x, weight):
        return dit.norm_rope(x, cos, sin, weight, interleaved=interleaved)

    def plain(x, weight):
        angles = (t.to(x.dtype) if x.dtype == torch.float64 else t for t in (cos, sin))
        return dit.reference_norm_rope(x, *angles, weight, interleaved=interleaved)

    _compare(fused, plain, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gate", "activation"), [(fk.geglu, "gelu"), (fk.swiglu, "silu")])
def test_gated_units(gate, activation, dtype):
    tensors = {"x": torch.randn(3, 100, 2 * 1234, device="cuda").to(dtype)}
    _compare(gate, lambda x: dit.reference_glu(x, activation), tensors)


def _compare(function, plain, tensors: dict[str, Tensor]) -> None:
    def run(f, given):
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        out = f(**leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(0)
        dtype = next(iter(tensors.values())).dtype
        gradients = [torch.randn(y.shape, device="cuda").to(dtype).to(y.dtype) for y in out]
        found = torch.autograd.grad(out, tuple(leaves.values()), gradients)
        return {f"out{i}": y.detach() for i, y in enumerate(out)} | dict(zip(leaves, found, strict=True))

    got = run(function, tensors)
    assert_close_enough(got, run(plain, tensors), run(plain, double(tensors)))
    again = run(function, tensors)
    assert all(torch.equal(again[name], t) for name, t in got.items())


def test_update_and_its_noise():
    xs = [torch.randn(4, 3, 65, 33, device="cuda") for _ in range(4)]
    index = torch.arange(4, device="cuda") + 2**33
    options = {"output": xs[3].bfloat16(), "null": xs[2].bfloat16(), "guidance": 5.0, "state": 1}
    options |= {"convert": (0.3, -1.2), "weight": 0.7, "noise": fk.Noise(0.5, 2**63 + 7, 3, index)}
    got = fk.update(xs[:3], [0.5, -0.3, 0.2], **options)
    for ours, plain in zip(got, updates.reference(xs[:3], [0.5, -0.3, 0.2], **options), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=4e-6)
    still = [torch.zeros(4, 3, 65, 33, device="cuda")]
    z, _ = fk.update(still, [1.0], noise=fk.Noise(1.0, 2**63 + 7, 3, index))
    cpu = library_normal((4, 3, 65, 33), 2**63 + 7, index.cpu(), 3)
    torch.testing.assert_close(z.cpu(), cpu, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "DiT", "SD3.5", "Flux"])
def test_patched_models(name):
    model, call = models.CASES[name]()
    before, gradients = models.gradients(model.cuda(), lambda m: _cuda_call(call, m))
    report = fk.patch(model, attention=True)
    assert report.runs_here is None
    after, again = models.gradients(model, lambda m: _cuda_call(call, m))
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
    largest = max(a.norm() for a in gradients)
    for a, b in zip(gradients, again, strict=True):
        if (
            a.norm() <= 1e-6 * largest
        ):  # zero: softmax does not see the bias of keys; products are rounded to TF32
            assert b.norm() <= 1e-5 * largest
        else:
            assert (a - b).norm() <= 2e-2 * max(1e-3, a.norm())

    run = torch.compile(model, fullgraph=False)
    torch.testing.assert_close(_cuda_call(call, run), after, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        for _ in range(3):
            _cuda_call(call, model)
    fk.unpatch(model)


def _cuda_call(call, model) -> Tensor:
    """The call with the tensors that it holds on the GPU."""

    def moved(value):
        if isinstance(value, Tensor):
            return value.cuda()
        if isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        return value

    for cell in call.__closure__ or ():
        cell.cell_contents = moved(cell.cell_contents)
    with torch.device("cuda"):
        return call(model)


def test_a_patched_model_in_a_cuda_graph():
    x = torch.randn(2, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    net = torch.nn.Sequential(
        torch.nn.GroupNorm(32, 64), torch.nn.SiLU(), torch.nn.Conv2d(64, 64, 3, padding=1),
        torch.nn.GroupNorm(8, 64), torch.nn.SiLU(),
    ).to(x)  # fmt: skip
    fk.patch(net)
    with torch.no_grad():
        wanted = net(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, net(x))
    assert wanted.shape == y.shape


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "euler_ancestral"])
def test_sampler_with_kernels(solver):
    import fastsample as fs

    net = torch.nn.Conv2d(3, 3, 3, padding=1).cuda()
    sampler = fs.Sampler(fs.wrap(lambda x, t: net(x) * 0.1, fs.VP.linear(), "eps"), solver, 6)
    call = {"shape": (4, 3, 32, 32), "seed": 3, "device": "cuda"}
    plain = sampler(**call)
    fused = sampler(kernels=True, **call)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    replayed = sampler(kernels=True, graph=True, **call)
    if sampler.plan.stochastic:
        # A graph's noise is drawn before it runs, by PyTorch, whose logarithms and cosines end in other bits.
        torch.testing.assert_close(replayed, fused, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(replayed, fused)
