"""The rules of every operator of the package, called as an operator: autocast, vmap, opcheck."""

import importlib

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

import fastsample_kernels as fk
from fastsample_kernels import dit
from fastsample_kernels.attention import attention, reference

norm, softmax, solver = (
    importlib.import_module(f"fastsample_kernels.{name}") for name in ("group_norm", "attention", "update")
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _samples() -> dict[str, tuple]:
    """A call of each operator, all optional tensors given."""
    x, wide, rows = normal(2, 4, 3), normal(2, 4), normal(2, 2)
    row = normal(4, seed=1)
    given = (x, 2 * x, row, row, wide, wide)
    moments = norm._forward(*given, 2, 1e-5, True)[1]
    q, k, v = (normal(2, 1, n, 8, seed=n) for n in (3, 4, 4))
    bias = normal(2, 1, 1, 4, seed=5)
    o, lse = softmax._forward(q, k, v, bias, False, 0.5)
    tokens, vector, heads = normal(2, 3, 4), normal(2, 4, seed=2), normal(2, 2, 3, 4)
    angles = normal(3, 4, seed=7).expand(2, 3, 4)
    return {
        "group_norm": (*given, 2, 1e-5, True),
        "group_norm_jvp": (*given, x, wide, wide, 2, 1e-5, True),
        "group_norm_backward": (x, *given, moments, 2, True),
        "attention": (q, k, v, bias, False, 0.5),
        "attention_tangent": (q, k, v, bias, q, k, v, o, lse, False, 0.5),
        "attention_backward": (o, q, k, v, bias, o, lse, False, 0.5, True),
        "norm": (tokens, tokens, vector, row, row, vector, vector, 1e-5, False),
        "norm_backward": (tokens, tokens, tokens, tokens, vector, row, vector, 1e-5, False, True),
        "norm_rope": (heads, angles.cos(), angles.sin(), row, 1e-6, True, True),
        "norm_rope_backward": (heads, heads, angles.cos(), angles.sin(), row, 1e-6, True, False),
        "glu": (normal(3, 8), "gelu"),
        "glu_backward": (normal(3, 4), normal(3, 8), "silu"),
        "update": (
            *[rows, 2 * rows, *[None] * (solver.MAX_TERMS - 2), rows, -rows, torch.arange(2)],
            *[solver._numbers(2.0, 0.3, 0.4, 0.5, 0.6, 0.1, 0.2), 1, 3, 4, True],
        ),
    }


SAMPLES = _samples()
each = pytest.mark.parametrize("name", SAMPLES)


def operator(name: str):
    return getattr(torch.ops.fastsample_kernels, name)


def called(name: str, *args) -> tuple[Tensor, ...]:
    out = operator(name)(*args)
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def test_every_operator_is_here():
    names = {name.split("::")[1] for name in OPDEFS if name.startswith("fastsample_kernels::")}
    assert names == set(SAMPLES)


@pytest.mark.quick
@each
def test_autocast(name):
    """Attention is cast as PyTorch's is; the others keep the types they are given, and their float32 arithmetic."""
    args = SAMPLES[name]
    plain = called(name, *args)
    with torch.autocast("cpu", torch.bfloat16):
        got = called(name, *args)
    if name == "attention":
        plain = called(name, *(t.bfloat16() for t in args[:3]), *args[3:])
        assert got[0].dtype == torch.bfloat16
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.quick
def test_autocast_of_mixed_types_and_its_gradients():
    q, k, v = (t.clone().requires_grad_() for t in SAMPLES["attention"][:3])
    mixed = (q, k.half(), v)
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(*mixed)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(*mixed)
    assert o.dtype == compiled.dtype == torch.bfloat16
    assert torch.equal(o, compiled)
    gradients = torch.autograd.grad(o.float().square().sum(), (q, k, v))
    wanted = torch.autograd.grad(reference(q, k, v).square().sum(), (q, k, v))
    for got, exact in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*(t.double() for t in SAMPLES["attention"][:3])).dtype == torch.float64


@each
def test_vmap(name):
    args = SAMPLES[name]
    mapped = [isinstance(a, Tensor) and a.dtype == torch.float32 for a in args]  # not the numbers of update
    other = [1.5 * a if is_mapped else a for a, is_mapped in zip(args, mapped, strict=True)]
    stacked = [torch.stack([a, b], 1) if m else a for a, b, m in zip(args, other, mapped, strict=True)]
    dims = tuple(1 if m else None for m in mapped)
    got = torch.vmap(operator(name), dims)(*stacked)
    got = got if isinstance(got, (tuple, list)) else (got,)
    for together, *alone in zip(got, called(name, *args), called(name, *other), strict=True):
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


@each
def test_opcheck(name):
    torch.library.opcheck(operator(name).default, SAMPLES[name])


def test_pieces_take_the_types_of_autocast():
    """As in a block under autocast: a float32 residual stream, a branch and a modulation in half precision."""
    x = normal(2, 3, 4)
    half = normal(2, 3, 4, seed=1).bfloat16()
    vector = normal(2, 4, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        h, y = dit.gated_residual_norm(x, half, vector, scale=vector)
    wide = dit.reference_gated_residual_norm(
        x, half.float(), "layer", vector.float()[:, None], scale=vector.float()[:, None]
    )
    assert h.dtype == y.dtype == torch.float32
    torch.testing.assert_close((h, y), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_derivatives_of_vmap_say_that_vmap_goes_outside():
    x = normal(3, 1, 1, 4, 8)

    def f(z):
        return attention(z, z, z)

    with pytest.raises(NotImplementedError, match=r"put vmap outside, vmap\(jvp\(f\)\)"):
        torch.func.jvp(torch.vmap(f), (x,), (x,))
    q = normal(1, 1, 4, 8, seed=1)
    one_sided = torch.vmap(lambda k: torch.func.jvp(lambda q: attention(q, k, k), (q,), (q,))[1])(x)
    exact = torch.func.jvp(lambda q: reference(q.expand(3, 1, 1, 4, 8), x, x), (q,), (q,))[1]
    torch.testing.assert_close(one_sided, exact, rtol=1e-4, atol=1e-5)
    got = torch.vmap(lambda z, t: torch.func.jvp(f, (z,), (t,))[1])(x, 2 * x)
    wanted = torch.func.jvp(lambda z: reference(z, z, z), (x.double(),), (2 * x.double(),))[1]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_views_that_negate_are_read_as_what_they_are():
    x = torch.randn(2, 24, 40)
    torch.testing.assert_close(fk.layer_norm(torch._neg_view(x)), torch.nn.functional.layer_norm(-x, (40,)))
    torch.testing.assert_close(fk.group_norm(torch._neg_view(x), 8), torch.nn.functional.group_norm(-x, 8))
