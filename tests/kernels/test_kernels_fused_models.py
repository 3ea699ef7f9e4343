"""Patched diffusers models with the kernels running, under the interpreter: outputs and gradients agree."""

from __future__ import annotations

import copy
import functools
import pickle

import models
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close_enough
from diffusers.models import activations, normalization
from torch import Tensor, nn

import fastsample_kernels as fk
from fastsample_kernels import _forwards
from fastsample_kernels import _runtime as runtime


@pytest.mark.parametrize("name", models.CASES)
def test_outputs_and_gradients_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = models.CASES[name]()
    before, gradients = models.gradients(model, call)
    report = fk.patch(model)
    assert report.runs_here is None
    runs: list[str] = []
    for kernel in ("group_norm", "layer_norm", "rms_norm", "gated_residual_norm", "geglu", "swiglu"):
        original = getattr(_forwards, kernel)

        def counting(*args, kernel=kernel, original=original, **kwargs) -> Tensor:
            assert "Triton" in fk.explain(kernel, *args, **kwargs)
            modulated = "+modulate" if kwargs.get("scale") is not None else ""
            runs.append(kernel + ("+silu" if kwargs.get("activation") else modulated))
            return original(*args, **kwargs)

        monkeypatch.setattr(_forwards, kernel, counting)
    after, again = models.gradients(model, call)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert runs.count("group_norm+silu") == models.FUSED[name]
    assert sum(run.endswith("_norm+modulate") for run in runs) == models.MODULATED[name]
    assert runs.count("gated_residual_norm+modulate") == models.RESIDUAL[name]
    assert runs.count("geglu") == models.GATED[name]
    assert len(runs) >= len(report.replaced)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("UNet2DConditionModel", "Flux") else pytest.mark.slow)
        for name in models.CASES
    ],
)
def test_attention_on_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = models.CASES[name]()
    before, gradients = models.gradients(model, call)
    report = fk.patch(model, attention=True)
    modules = sum(what.endswith("attention") for what in report.replaced.values())
    assert modules == models.ATTENDING[name]
    original, shapes = _forwards.fused_attention, []

    def counting(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        assert "Triton" in fk.explain("attention", q, k, v, **options)
        shapes.append(q.shape)
        return original(q, k, v, **options)

    monkeypatch.setattr(_forwards, "fused_attention", counting)
    after, again = models.gradients(model, call)
    assert len(shapes) == modules
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    fk.unpatch(model)
    assert torch.equal(call(model), before)
    assert len(shapes) == modules


class Attending(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"is_causal": True, "scale": 0.3}, True),
        ({"attn_mask": torch.ones(3, 4, dtype=torch.bool).tril()}, True),
        ({"attn_mask": torch.linspace(-1, 1, 4)[None]}, True),
        ({"dropout_p": 0.5}, False),
        ({"enable_gqa": True}, False),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_pytorchs(options, taken, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator) for n in (3, 4, 4))
    if options.get("enable_gqa"):
        k, v = k[:, :1], v[:, :1]
    module = Attending()
    torch.manual_seed(1)
    wanted = module(q, k, v, **options)
    assert fk.patch(module, attention=True).replaced == {"Attending": "attention"}
    runs: list[Tensor] = []
    original = _forwards.fused_attention
    monkeypatch.setattr(
        _forwards, "fused_attention", lambda *args, **kw: runs.append(args) or original(*args, **kw)
    )
    torch.manual_seed(1)
    torch.testing.assert_close(module(q, k, v, **options), wanted)
    assert bool(runs) == taken


def test_a_module_that_attends_compiles_whole_and_in_autocast() -> None:
    q = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    module = Attending()
    wanted = module(q, q, q)
    fk.patch(module, attention=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, q), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(q, q.half(), q).dtype == torch.bfloat16


def test_a_modulation_that_is_not_per_channel_runs_the_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            x = self.norm(x)
            x = x * (1 + scale) + shift
            x = self.act(x)
            return x

    block = Block()
    x, wide = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    narrow = torch.randn(2, 4, 1)
    expected = [block(x, s, s) for s in (wide, narrow)]
    assert fk.patch(block).replaced == {"Block": "1 group_norm + silu"}
    for s, y in zip(
        (wide, narrow, 0.3), [*expected, block(x, torch.tensor(0.3), torch.tensor(0.3))], strict=True
    ):
        torch.testing.assert_close(block(x, s, s), y, rtol=1e-5, atol=1e-5)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.act(x)
        return x


@pytest.mark.parametrize(
    ("name", "other"),
    [("act", nn.GELU()), ("act", nn.Sequential(nn.SiLU(), nn.Tanh())), ("norm", nn.Identity())],
    ids=str,
)
def test_modules_exchanged_after_patching_run(name: str, other: nn.Module) -> None:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    block = Pair()
    assert fk.patch(block).replaced == {"Pair": "1 group_norm + silu"}
    setattr(block, name, other)
    assert torch.equal(block(x), block.act(block.norm(x)))


def test_a_forward_set_after_patching_runs() -> None:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    block = Pair()
    fk.patch(block)
    block.norm.forward = lambda x: 2 * x
    assert torch.equal(block(x), F.silu(2 * x))


def test_hooks_prevent_fusing() -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    fk.patch(net)
    seen: list[str] = []
    net[0].register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        net(x).sum().backward()
    finally:
        handle.remove()
    assert seen == ["GroupNorm", "SiLU", "Sequential", "backward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_rms_norm_without_eps_is_pytorchs(dtype: torch.dtype, size: float) -> None:
    norm = nn.RMSNorm(64, dtype=dtype)
    x = (size * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    plain = norm(x).double()
    eps = runtime.rms_norm_eps(dtype, "cpu")
    exact = F.rms_norm(x.double(), (64,), eps=eps)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(plain, exact, rtol=2 * ulp, atol=0)  # the right eps
    assert fk.patch(norm).replaced
    assert "Triton" in fk.explain("rms_norm", x, norm.weight)
    torch.testing.assert_close(norm(x).double(), exact, rtol=2 * ulp, atol=0)


# -- modulated norms -------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A block as in the code of DiT (Peebles & Xie 2023), with a gated linear unit."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(16, elementwise_affine=False, eps=1e-6)
        self.norm2 = norm(16, eps=1e-6)
        self.attn, self.mlp1, self.mlp2 = nn.Linear(16, 16), nn.Linear(16, 48), nn.Linear(24, 16)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 96))
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        h = self.norm2(x)
        h, gate = self.mlp1(modulate(h, shift_mlp, scale_mlp)).chunk(2, dim=-1)
        return x + gate_mlp.unsqueeze(1) * self.mlp2(h * self.act(gate))


class Counter:
    """Which kernels ran, with which arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[str] = []
        for kernel in ("layer_norm", "rms_norm", "gated_residual_norm", "geglu", "swiglu"):
            original = getattr(_forwards, kernel)

            def counting(*args, kernel=kernel, original=original, **kwargs) -> Tensor:
                assert "Triton" in fk.explain(kernel, *args, **kwargs)
                self.runs.append(kernel + (" + modulate" if kwargs.get("scale") is not None else ""))
                return original(*args, **kwargs)

            monkeypatch.setattr(_forwards, kernel, counting)


def results(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The output, and gradients of a weighting of it by everything that has some."""
    given = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    y = module(*given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    (y * weights).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    found |= {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    return {"y": y.detach()} | {name: g.detach().clone() for name, g in found.items()}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, normalization.RMSNorm])
def test_a_dit_block_is_as_exact_as_plain_torch(norm, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = DiTBlock(norm).to(dtype)
    x, c = randn(3, 5, 16, seed=1).to(dtype), randn(3, 8, seed=2).to(dtype)
    low = results(block, x, c)
    reference = copy.deepcopy(block).double()
    if norm is normalization.RMSNorm:
        reference.norm2 = nn.RMSNorm(16, eps=1e-6, dtype=torch.float64)
        reference.norm2.load_state_dict(block.norm2.state_dict())
    exact = results(reference, x.double(), c.double())
    keys = list(block.state_dict())
    report = fk.patch(block)
    name = "layer_norm" if norm is nn.LayerNorm else "rms_norm"
    expected = ["layer_norm + modulate", "gated_residual_norm + modulate", "geglu"]
    said = f"1 geglu, 1 layer_norm + modulate, 1 residual + {name} + modulate"
    assert report.replaced == {"DiTBlock": said}
    counter = Counter(monkeypatch)
    assert_close_enough(results(block, x, c), low, exact)
    assert counter.runs == expected
    assert list(block.state_dict()) == keys
    copied = copy.deepcopy(block)
    fk.unpatch(block)
    assert all(torch.equal(a, low[name]) for name, a in results(block, x, c).items())
    assert counter.runs == expected
    results(copied, x, c)
    assert counter.runs == 2 * expected
    results(pickle.loads(pickle.dumps(copied)), x, c)
    assert counter.runs == 2 * expected


def test_a_dit_block_compiles_whole() -> None:
    torch.manual_seed(0)
    block = DiTBlock(normalization.RMSNorm)
    x, c = randn(3, 5, 16), randn(3, 8, seed=1)
    wanted = results(block, x, c)
    fk.patch(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        {name.removeprefix("_orig_mod."): t for name, t in results(compiled, x, c).items()},
        wanted,
        rtol=1e-4,
        atol=1e-5,
    )


class Modulated(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(x)
        return x * (1 + scale) + shift


# shape of x, of scale and of shift, their types, and whether the kernel takes them
LOW = torch.bfloat16
FULL = torch.float32
CALLS = [
    ((2, 3, 8), (2, 1, 8), (2, 1, 8), FULL, FULL, True),
    ((2, 3, 8), (1, 1, 8), (2, 1, 8), FULL, FULL, True),
    ((2, 3, 8), (2, 3, 8), (2, 1, 8), FULL, FULL, True),  # one for each token
    ((2, 3, 4, 8), (2, 1, 1, 8), (2, 3, 4, 8), FULL, FULL, True),
    ((2, 8), (2, 8), (1, 8), FULL, FULL, True),
    ((2, 3, 8), (2, 1, 8), (2, 1, 8), FULL, LOW, True),
    ((2, 3, 8), (2, 1, 8), (2, 1, 8), LOW, FULL, False),  # the result is float32
    ((2, 2, 8), (2, 8), (2, 8), FULL, FULL, False),  # one for each position
    ((2, 3, 8), (8,), (8,), FULL, FULL, False),
    ((2, 3, 8), (2, 1, 1), (2, 1, 8), FULL, FULL, False),
    ((2, 3, 8), (), (), FULL, FULL, False),
    ((2, 3, 8), (1, 3, 8), (1, 3, 8), FULL, FULL, False),
    ((1, 3, 8), (2, 1, 8), (2, 1, 8), FULL, FULL, False),  # the result has another batch
    ((2, 3, 4, 8), (2, 3, 1, 8), (2, 3, 1, 8), FULL, FULL, False),
    ((8,), (8,), (8,), FULL, FULL, False),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_modulation_of_another_shape_or_type_runs_the_modules(
    call, monkeypatch: pytest.MonkeyPatch
) -> None:
    *shapes, dtype, low, taken = call
    x, scale, shift = (randn(*shape, seed=i) for i, shape in enumerate(shapes))
    x, scale, shift = x.to(dtype), scale.to(low), shift.to(low)
    module = Modulated(nn.LayerNorm(8).to(dtype))
    wanted = results(module, x, scale, shift)
    assert fk.patch(module).replaced == {"Modulated": "1 layer_norm + modulate"}
    counter = Counter(monkeypatch)
    got = results(module, x, scale, shift)
    assert ("layer_norm + modulate" in counter.runs) == taken
    assert (got["y"].dtype, got["y"].shape) == (wanted["y"].dtype, wanted["y"].shape)
    tolerance = 1e-5 if low == FULL == dtype else 3e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


class Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, gate: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        x = x + gate * branch
        y = self.norm(x)
        y = y * (1 + scale)
        return x.sin() * y


RESIDUALS = [
    # shapes of x, gate, branch and scale, type of all and of the branch, whether the kernel takes them
    ((2, 3, 8), (2, 1, 8), (2, 3, 8), (2, 1, 8), FULL, FULL, True),
    ((2, 3, 8), (2, 3, 8), (2, 1, 8), (2, 1, 8), FULL, FULL, True),  # the other one is the gate
    ((2, 3, 8), (1, 1, 8), (2, 3, 8), (2, 3, 8), FULL, FULL, True),
    ((2, 3, 8), (2, 3, 8), (2, 3, 8), (2, 3, 8), FULL, FULL, True),
    ((2, 3, 8), (2, 1, 8), (2, 3, 8), (2, 1, 8), FULL, LOW, True),
    ((2, 3, 8), (2, 1, 8), (2, 3, 8), (2, 1, 8), LOW, LOW, True),
    ((2, 3, 8), (2, 1, 8), (2, 3, 8), (2, 1, 8), LOW, FULL, False),
    ((2, 3, 8), (2, 1, 1), (2, 3, 8), (2, 1, 8), FULL, FULL, False),
    ((2, 3, 8), (2, 1, 8), (2, 1, 8), (2, 1, 8), FULL, FULL, False),
    ((1, 3, 8), (2, 1, 8), (2, 3, 8), (2, 1, 8), FULL, FULL, False),
    ((2, 3, 8), (2, 1, 8), (2, 3, 8), (8,), FULL, FULL, False),
]


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), normalization.FP32LayerNorm(8)], ids=repr)
@pytest.mark.parametrize("call", RESIDUALS, ids=str)
def test_gated_residuals(call, norm, monkeypatch: pytest.MonkeyPatch) -> None:
    *shapes, dtype, low, taken = call
    if type(norm) is nn.LayerNorm and (dtype, low) == (LOW, FULL):
        norm = nn.LayerNorm(8, elementwise_affine=False)  # PyTorch's takes no weights of another type
    inputs = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    inputs[2] = inputs[2].to(low)
    module = Residual(copy.deepcopy(norm).to(dtype))
    plain = results(module, *inputs)
    exact = copy.deepcopy(module).double()
    if isinstance(norm, normalization.FP32LayerNorm):
        exact.norm.forward = functools.partial(nn.LayerNorm.forward, exact.norm)
    fk.patch(module)
    counter = Counter(monkeypatch)
    got = results(module, *inputs)
    assert ("gated_residual_norm + modulate" in counter.runs) == taken
    assert {k: (t.dtype, t.shape) for k, t in got.items()} == {
        k: (t.dtype, t.shape) for k, t in plain.items()
    }
    assert_close_enough(got, plain, results(exact, *(t.double() for t in inputs)))


@pytest.mark.parametrize(
    ("norm", "taken"),
    [
        (normalization.RMSNorm(8, 1e-6), True),
        (normalization.RMSNorm(8, 1e-6, bias=True), True),
        (normalization.FP32LayerNorm(8), True),
        (nn.RMSNorm(8), True),
        (nn.LayerNorm((3, 8)), False),
        (nn.Identity(), False),
    ],
    ids=repr,
)
def test_norms_that_are_modulated(norm, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Modulated(norm)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    inputs = randn(2, 3, 8), randn(2, 1, 8, seed=1), randn(2, 1, 8, seed=2)
    wanted = results(module, *inputs)
    assert ("Modulated" in fk.patch(module).replaced) == taken
    counter = Counter(monkeypatch)
    torch.testing.assert_close(results(module, *inputs), wanted, rtol=1e-4, atol=1e-5)
    assert bool(counter.runs) == taken


def test_norms_with_hooks_and_exchanged_ones_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale, shift = randn(2, 3, 8), randn(2, 1, 8, seed=1), randn(2, 1, 8, seed=2)
    module = Modulated(nn.LayerNorm(8))
    wanted = module(x, scale, shift)
    fk.patch(module)
    counter = Counter(monkeypatch)
    seen: list[Tensor] = []
    handle = module.norm.register_forward_hook(lambda norm, args, y: seen.append(y))
    torch.testing.assert_close(module(x, scale, shift), wanted)
    assert counter.runs == ["layer_norm"]
    torch.testing.assert_close(seen[0], F.layer_norm(x, (8,)))
    handle.remove()
    module.norm.forward = lambda x: 2 * x
    assert torch.equal(module(x, scale, shift), 2 * x * (1 + scale) + shift)
    del module.norm.forward
    module(x, scale, shift)
    assert counter.runs.pop() == "layer_norm + modulate"
    norm = module.norm
    module.norm = nn.Identity()
    assert torch.equal(module(x, scale, shift), x * (1 + scale) + shift)
    module.norm = norm
    fk.unpatch(module.norm)
    assert torch.equal(module(x, scale, shift), wanted)
    assert counter.runs == ["layer_norm"]


def test_errors_are_those_of_the_code() -> None:
    module = Modulated(nn.LayerNorm(8))
    fk.patch(module)
    for scale, shift in ((None, torch.zeros(2, 1, 8)), (torch.zeros(2, 1, 8), None)):
        with pytest.raises(TypeError):
            module(randn(2, 3, 8), scale, shift)
    with pytest.raises(RuntimeError, match="must match"):
        module(randn(2, 3, 8), torch.zeros(3, 1, 8), torch.zeros(3, 1, 8))


# -- gated linear units ----------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.proj, self.act = nn.Linear(8, 32), act

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * self.act(gate)


class OfFunctions(Gated):
    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        (Gated(nn.SiLU()), "swiglu"),
        (Gated(nn.GELU()), "geglu"),
        (Gated(nn.GELU(approximate="tanh")), "geglu"),
        (OfFunctions(nn.Identity()), "geglu"),
        (activations.GEGLU(8, 16), "geglu"),
        (activations.SwiGLU(8, 16), "swiglu"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{type(v).__name__} {getattr(v, 'act', '')}",
)
def test_gated_linear_units(module, kernel, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = copy.deepcopy(module).to(dtype)
    x = 2 * randn(3, 5, 8).to(dtype)
    low, exact = results(module, x), results(copy.deepcopy(module).double(), x.double())
    assert fk.patch(module).replaced == {type(module).__name__: f"1 {kernel}"}
    counter = Counter(monkeypatch)
    got = results(module, x)
    assert_close_enough(got, low, exact)
    assert counter.runs == [kernel]
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), got["y"])
    fk.unpatch(module)
    assert torch.equal(module(x), low["y"])


def test_a_gate_with_hooks_or_another_activation_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, module = randn(3, 8), Gated(nn.SiLU())
    fk.patch(module)
    counter = Counter(monkeypatch)
    for act in (nn.ReLU(), nn.SiLU(inplace=True), nn.Sequential(nn.SiLU())):
        module.act = act
        with torch.no_grad():
            hidden, gate = module.proj(x).chunk(2, -1)
            torch.testing.assert_close(module(x), hidden * act(gate.clone()))
    module.act = nn.SiLU()
    seen: list[str] = []
    module.act.register_forward_hook(lambda *_: seen.append("act"))
    module(x)
    assert seen == ["act"]
    assert not counter.runs
    geglu = activations.GEGLU(8, 16)
    fk.patch(geglu)
    geglu.gelu = lambda gate: 0 * gate
    assert torch.equal(geglu(x), torch.zeros(3, 16))
    del geglu.gelu
    monkeypatch.setattr(activations.GEGLU, "gelu", lambda self, gate: 0 * gate)
    assert torch.equal(geglu(x), torch.zeros(3, 16))
    assert not counter.runs


# -- norms by themselves ---------------------------------------------------------------------------------------


def diffusers_norms() -> list:
    """(norm, input's type, whether the kernel gives what it gives)"""
    rms, layer, low, single = (
        normalization.RMSNorm,
        normalization.FP32LayerNorm,
        torch.bfloat16,
        torch.float32,
    )
    return [
        (rms(16, 1e-6), single, True),
        (rms(16, 0.1, elementwise_affine=False), low, True),
        (rms(16, 1e-6, bias=True), single, True),
        (rms(16, 1e-6, bias=True).to(low), low, True),
        (rms(16, 1e-6).half(), torch.float16, True),
        (rms(16, 1e-6), low, False),  # the result is float32
        (rms(16, 1e-6).to(low), single, False),  # the result is bfloat16
        (rms(16, 1e-6).half(), low, False),
        (rms(16, 1e-6).double(), torch.float64, False),  # its statistics are float32
        (rms(1, 1e-6), single, False),  # its weight is broadcast
        (layer(16), low, True),
        (layer(16).to(low), single, True),
        (layer(16, elementwise_affine=False), single, True),
    ]


@pytest.mark.parametrize("case", range(len(diffusers_norms())))
@pytest.mark.parametrize("shape", ["rows", "heads"])
def test_norms_of_diffusers_in_their_types(case: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, dtype, taken = diffusers_norms()[case]
    generator = torch.Generator().manual_seed(case)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(2, 3, 4, 16, generator=generator).to(dtype)
    x = (x.transpose(1, 2) if shape == "heads" else x).requires_grad_()

    def results(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
        y = norm(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
        inputs = [x, *norm.parameters()]
        gradients = torch.autograd.grad((y * weights).sum(), inputs)
        return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}

    low, strides = results(norm, x), norm(x).stride()
    if isinstance(norm, nn.LayerNorm):
        exact = copy.deepcopy(norm).double()
        exact.forward = functools.partial(nn.LayerNorm.forward, exact)
    else:
        exact = nn.RMSNorm(16, norm.eps, norm.weight is not None, dtype=torch.float64)
        exact.load_state_dict({k: v.expand(16) for k, v in norm.state_dict().items() if k != "bias"})
        if norm.bias is not None:
            rms, exact.bias = exact.forward, nn.Parameter(norm.bias.detach().double())
            exact.forward = lambda x: rms(x) + exact.bias
    runs: list[str] = []
    for kernel in ("layer_norm", "rms_norm"):
        original = getattr(_forwards, kernel)
        monkeypatch.setattr(
            _forwards, kernel, lambda *a, original=original, **kw: runs.append("") or original(*a, **kw)
        )
    assert fk.patch(norm).replaced
    got = results(norm, x)
    assert bool(runs) == taken
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in low.items()}
    if taken:
        assert_close_enough(got, low, results(exact, x.detach().double().requires_grad_()))
    else:
        assert all(torch.equal(got[name], low[name]) for name in low)
    if not isinstance(norm, nn.LayerNorm):
        assert norm(x).stride() == strides


@pytest.mark.parametrize("norm", [normalization.RMSNorm(8, 1e-6, bias=True), nn.LayerNorm(8)], ids=repr)
def test_a_norm_compiles_whole(norm: nn.Module) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    wanted = norm(x)
    fk.patch(norm)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), wanted)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_rows_of_another_size_are_refused_as_the_module_refuses_them(norm: nn.Module) -> None:
    fk.patch(norm)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.randn(2, 5))


def test_vectors_without_a_batch_run_the_modules() -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4)):
        wanted = norm(x)
        fk.patch(norm)
        assert torch.equal(norm(x), wanted)
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    fk.patch(net)
    with pytest.raises(RuntimeError, match=r"[Ee]xpected at least (2|two) dimensions"):  # PyTorch's error
        net(x)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_run_the_kernels_with_their_own_weights(copied, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Tensor] = []
    original = _forwards.layer_norm
    monkeypatch.setattr(
        _forwards, "layer_norm", lambda *args, **kw: runs.append(args[1]) or original(*args, **kw)
    )
    norm = nn.LayerNorm(4)
    fk.patch(norm)
    other = copied(norm)
    other._parameters = {"weight": nn.Parameter(torch.zeros(4)), "bias": None}
    assert torch.equal(other(torch.randn(2, 4)), torch.zeros(2, 4))
    assert [w is other.weight for w in runs] == [True]
