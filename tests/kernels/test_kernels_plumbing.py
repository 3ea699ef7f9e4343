"""What surrounds the kernels: imports, dispatch, the plain-torch path under the transforms of PyTorch."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsample_kernels import Noise, _runtime, attention, dit, explain, group_norm, supported, update

norm = importlib.import_module("fastsample_kernels.group_norm")


@pytest.fixture
def capability(monkeypatch):
    """Pretend that CUDA devices have this compute capability; fake tensors need no real one."""

    def pretend(value):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: value)
        monkeypatch.setattr(_runtime, "multiprocessors", lambda device: 132)

    return pretend


def test_importing_is_cheap():
    code = (
        "import sys, fastsample_kernels as k, torch\n"
        "x = torch.randn(1, 4, 3); k.group_norm(x, 2); k.update([x], [1.0])\n"
        "print(sorted({'triton', 'torch._dynamo', 'fastsample', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- dispatch ------------------------------------------------------------------------------------------------


def test_cpu_runs_plain_torch_and_says_why():
    x, weight, bias = torch.randn(2, 4, 5), torch.randn(4), torch.randn(4)
    assert torch.equal(group_norm(x, 2, weight, bias), F.group_norm(x, 2, weight, bias))
    assert torch.equal(group_norm(x, 2, activation="silu"), F.silu(F.group_norm(x, 2)))
    assert explain(group_norm, x, 2).startswith("group_norm: plain torch, because CPU tensors")
    assert explain("update", [x], [1.0]).startswith("update: plain torch, because CPU tensors")
    assert not supported(group_norm, x, 2)
    assert not supported("qk_norm_rope", *[torch.zeros(1, 1, 3, 4)] * 2, *[torch.zeros(3, 4)] * 2)
    with pytest.raises(ValueError, match="'convolution' is not one of"):
        supported("convolution", x)


def test_cuda_tensors_take_the_kernels(capability):
    capability((9, 0))
    with FakeTensorMode():
        x = torch.empty(2, 320, 64, 64, device="cuda", dtype=torch.float16)
        assert explain(group_norm, x, 32).startswith("group_norm: Triton, channels first, two launches")
        last = x.to(memory_format=torch.channels_last)
        assert explain(group_norm, last, 32).startswith("group_norm: Triton, channels last, three launches")
        y = group_norm(last, 32, scale=torch.empty(2, 320, device="cuda"), activation="silu")
        assert (y.shape, y.stride(), y.dtype) == (x.shape, last.stride(), torch.float16)
        state = torch.empty(2, 4, 64, 64, device="cuda")
        noise = Noise(0.1, 0, 0, torch.empty(2, dtype=torch.int64, device="cuda"))
        y, m = update([state, state], [1.0, 2.0], output=state.half(), noise=noise)
        assert (y.dtype, m.dtype, y.shape) == (torch.float32, torch.float32, state.shape)


@pytest.mark.parametrize(
    ("version", "dtype", "shape", "reason"),
    [
        ((7, 5), torch.float16, (2, 4, 3), "capability"),
        ((9, 0), torch.float64, (2, 4, 3), "torch.float64"),
        ((9, 0), torch.float16, (0, 4, 3), "empty"),
        ((9, 0), torch.float16, (2, 4, 0), "empty"),
    ],
)
def test_unsupported_cuda_tensors_say_why(capability, version, dtype, shape, reason):
    capability(version)
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=dtype)
        told = explain(group_norm, x, 2)
        assert told.startswith("group_norm: plain torch, because")
        assert reason in told


def test_without_triton(monkeypatch):
    monkeypatch.setattr(_runtime, "HAS_TRITON", False)
    assert explain(group_norm, torch.randn(2, 4, 3), 2).endswith("triton is not installed")


X, META = torch.randn(2, 4, 6), {"device": "meta"}
ELSEWHERE = {
    "weight": lambda: group_norm(X, 2, torch.ones(4, **META)),
    "residual": lambda: group_norm(X, 2, residual=torch.ones(X.shape, **META)),
    "bias": lambda: dit.layer_norm(X, torch.ones(6), torch.ones(6, **META)),
    "gate": lambda: dit.gated_residual_norm(X, X, torch.ones(2, 6, **META)),
    "cos": lambda: dit.norm_rope(X[:, None], torch.ones(4, 6, **META), torch.ones(4, 6)),
    "v": lambda: attention(X[None], X[None], torch.ones(1, *X.shape, **META)),
    "tensors[1]": lambda: update([X, torch.ones(X.shape, **META)], [1.0, 2.0]),
    "output": lambda: update([X], [1.0], output=torch.ones(X.shape, **META)),
    "noise.index": lambda: update([X], [1.0], noise=Noise(1.0, 0, 0, torch.arange(2, **META))),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_another_device_are_refused(name):
    first = {"v": "q", "tensors[1]": "tensors[0]", "output": "tensors[0]", "noise.index": "tensors[0]"}
    message = f"{name} is on meta, {first.get(name, 'x')} on cpu; move one to the other"
    with pytest.raises(ValueError, match=re.escape(message)):
        ELSEWHERE[name]()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: update(X, [1.0]),
            TypeError,
            r"tensors is a tensor of shape \(2, 4, 6\); give a list, \[x\]",
        ),
        (lambda: group_norm(X, 2.0), ValueError, r"num_groups=2\.0 is a float; give an int"),
        (lambda: attention(*[X[None].long()] * 3), ValueError, r"q has dtype torch\.int64; convert it"),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("layer_norm", (X, torch.ones(3)), {}, "weight has shape (3,)"),
        ("gated_residual_norm", (X, X), {"norm": "batch"}, "norm='batch' is not one of"),
        ("norm_rope", (X, X, X), {}, "of shape (2, 4, 6); expected floating point, (batch, heads"),
        ("qk_norm_rope", (X[None], X[None], torch.ones(4, 3), X[0]), {}, "cos has shape (4, 3)"),
        ("geglu", (torch.ones(2, 7),), {}, "of shape (2, 7); expected floating point, (..., 2 * features)"),
        ("geglu", (X,), {"approximate": "erf"}, "approximate='erf' is not one of"),
        ("swiglu", (torch.ones(2, 7),), {}, "of shape (2, 7)"),
    ],
)
def test_explain_refuses_what_the_call_refuses(name, args, options, message):
    for call in (getattr(dit, name), lambda *args, **options: explain(name, *args, **options)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(*args, **options)


def test_explain_names_the_kernels():
    with pytest.raises(ValueError, match=r"kernel='conv' is not one of .*group_norm.*update"):
        explain("conv")


# -- the plain-torch path ------------------------------------------------------------------------------------


def block(x, weight, bias, scale, shift, residual):
    return group_norm(x, 2, weight, bias, activation="silu", scale=scale, shift=shift, residual=residual)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 5), (4,), (4,), (2, 4), (2, 4), (2, 4, 3, 5)]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def by_hand(x, weight, bias, scale, shift, residual):
    """The formulas at the top of the module, written out."""
    h = (x + residual).reshape(2, 2, -1)
    xhat = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    weight, bias = weight.view(1, 4, 1, 1), bias.view(1, 4, 1, 1)
    z = (xhat.view(x.shape) * weight + bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    return z / (1 + (-z).exp())


def test_reference_is_the_formula(tensors):
    torch.testing.assert_close(block(*tensors), by_hand(*tensors))


def test_compiles_into_one_graph(tensors):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*tensors), block(*tensors)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad(y.sin().sum(), tensors) for y in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    noise = Noise(0.5, 3, 1, torch.arange(2))
    step = torch.compile(
        lambda x, out: update([x], [0.9], output=out, state=0, convert=(1.0, -0.5), weight=0.3, noise=noise),
        fullgraph=True,
        backend="aot_eager",
    )
    x = tensors[0].detach()
    for a, b in zip(
        step(x, 2 * x),
        update([x], [0.9], output=2 * x, state=0, convert=(1.0, -0.5), weight=0.3, noise=noise),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_export_and_checkpointing(tensors):
    class Block(torch.nn.Module):
        def forward(self, *given):
            return block(*given)

    values = tuple(t.detach() for t in tensors)
    exported = torch.export.export(Block(), values)
    torch.testing.assert_close(exported.module()(*values), block(*values))
    again = torch.utils.checkpoint.checkpoint(block, *tensors, use_reentrant=False)
    got, wanted = (torch.autograd.grad(y.sin().sum(), tensors) for y in (again, block(*tensors)))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_type_of_x(tensors):
    x = tensors[0].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert group_norm(x, 2, tensors[1], tensors[2]).dtype == torch.bfloat16
        assert group_norm(x.float(), 2).dtype == torch.float32


def test_transforms(tensors):
    values = tuple(t.detach() for t in tensors)
    y, dy = torch.func.jvp(block, values, values)
    wanted = torch.func.jvp(by_hand, values, values)
    torch.testing.assert_close((y, dy), wanted)
    stacked = tuple(torch.stack([t, t + 1]) for t in values)
    torch.testing.assert_close(torch.vmap(block)(*stacked)[0], block(*values))


def test_update_compiles_once_for_all_numbers():
    assert_compiles_once()
