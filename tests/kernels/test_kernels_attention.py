"""attention under Triton's interpreter against a float64 reference."""

import importlib
import random

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close_enough
from torch import Tensor
from torch.library import opcheck

from fastsample_kernels import _runtime, explain
from fastsample_kernels._launch import Launch
from fastsample_kernels.attention import attention, reference, split_head_dim

module = importlib.import_module("fastsample_kernels.attention")
shipped_tiles = module.tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small enough that every loop runs more than once."""
    small = lambda *args, **kwargs: module.Tiles(16, 16, 4, 1)  # noqa: E731
    monkeypatch.setattr(module, "tiles", small)


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


def inputs(batch=1, heads=1, queries=20, keys=18, dim=8, dtype=torch.float64) -> dict[str, Tensor]:
    return {
        "q": normal(batch, heads, queries, dim, seed=1, dtype=dtype),
        "k": normal(batch, heads, keys, dim, seed=2, dtype=dtype),
        "v": normal(batch, heads, keys, dim, seed=3, dtype=dtype),
    }


def run(function, tensors: dict[str, Tensor], do: Tensor, **options) -> dict[str, Tensor]:
    """The result and the gradients of every floating-point input."""
    leaves = {name: t.detach() for name, t in tensors.items()}
    wanted = [name for name, t in leaves.items() if t.is_floating_point()]
    for name in wanted:
        leaves[name].requires_grad_()
    o = function(**leaves, **options)
    gradients = torch.autograd.grad(o, [leaves[name] for name in wanted], do)
    return {"o": o.detach()} | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def along(function, tensors: dict[str, Tensor], tangents: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The result and its derivative along the tangents, in forward mode."""
    fixed = {name: t for name, t in tensors.items() if name not in tangents}
    names = list(tangents)

    def of(*moved):
        return function(**fixed, **dict(zip(names, moved, strict=True)), **options)

    o, to = torch.func.jvp(of, tuple(tensors[name] for name in names), tuple(tangents.values()))
    return {"o": o, "to": to}


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "blhd":  # heads split from the features of a token
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":  # a third of a joint projection
        return torch.stack([x, x, x], 3).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :, 1]
    if layout == "transposed":  # elements of a row are not neighbours
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":  # not aligned to 16 bytes
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.contiguous()


LAYOUTS = ("contiguous", "blhd", "packed", "transposed", "offset")
BIASES = ("none", "mask", "key mask", "bias", "key bias", "head bias", "row")


def make_bias(kind: str, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    if kind.endswith("mask"):
        mask = normal(batch, 1, 1 if kind == "key mask" else queries, keys, seed=4) > -0.5
        mask[..., 0] = True  # rows without a key have a test of their own
        return mask
    shape = {
        "bias": (batch, heads, queries, keys),
        "key bias": (batch, 1, 1, keys),
        "head bias": (heads, queries, keys),
        "row": (queries, 1),
    }[kind]
    return normal(*shape, seed=4, dtype=dtype)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick) if case < 4 else case for case in range(14)]
)
def test_fuzz_forward_backward_and_tangent(case):
    rng = random.Random(case)
    batch, heads = rng.choice([(1, 1), (2, 1), (1, 2)])
    queries, keys = rng.choice([(20, 18), (16, 32), (5, 33), (33, 7), (1, 20), (19, 1)])
    dim = rng.choice([3, 8, 16, 24, 40, 80])
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][case % 4]
    tensors = inputs(batch, heads, queries, keys, dim, dtype)
    tensors = {name: strided(t, rng.choice(LAYOUTS)) for name, t in tensors.items()}
    kind = BIASES[case % 7]
    if kind != "none":
        tensors["bias"] = make_bias(kind, batch, heads, queries, keys, dtype)
    options = {"is_causal": rng.random() < 0.4, "scale": rng.choice([None, 0.3, -0.7])}
    do = strided(normal(batch, heads, queries, dim, seed=5, dtype=dtype), rng.choice(LAYOUTS))
    tangents = {
        name: strided(normal(*tensors[name].shape, seed=6, dtype=dtype), rng.choice(LAYOUTS))
        for name in "qkv"
    }

    got = run(attention, tensors, do, **options) | along(attention, tensors, tangents, **options)
    low = run(reference, tensors, do, **options) | along(reference, tensors, tangents, **options)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    exact = run(reference, wide, do.double(), **options)
    exact |= along(reference, wide, {name: t.double() for name, t in tangents.items()}, **options)
    assert {t.dtype for t in got.values()} == {dtype}
    if kind == "row":  # which softmax does not see: its gradient is 0 but for the rounding of o
        size = (do * got["o"]).double().abs().sum(-1).max()
        assert got.pop("dbias").abs().max() <= 8 * torch.finfo(dtype).eps * size
        del low["dbias"], exact["dbias"]
    if dtype == torch.float64:  # the interpreter's float64 path is exact
        for name, wanted in exact.items():
            torch.testing.assert_close(got[name], wanted, rtol=1e-9, atol=1e-9)
    else:
        assert_close_enough(got, low, exact)


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "is_causal", "bias"),
    [(70, 77, 40, False, None), (150, 140, 8, True, None), (70, 90, 8, False, "bias")],
)
def test_shipped_tiles(queries, keys, dim, is_causal, bias, monkeypatch):
    monkeypatch.setattr(module, "tiles", shipped_tiles)
    tensors = inputs(1, 1, queries, keys, dim, torch.bfloat16)
    if bias:
        tensors["bias"] = make_bias(bias, 1, 1, queries, keys, torch.bfloat16)
    do = normal(1, 1, queries, dim, seed=5, dtype=torch.bfloat16)
    got, low = (run(f, tensors, do, is_causal=is_causal) for f in (attention, reference))
    wide = {name: t.double() for name, t in tensors.items()}
    assert_close_enough(got, low, run(reference, wide, do.double(), is_causal=is_causal))


@pytest.mark.parametrize("given", ["q", "k", "v", "qv", "qk", "kv"])
def test_forward_mode_in_some_arguments(given):
    tensors = inputs()
    tangents = {name: normal(*tensors[name].shape, seed=6) for name in given}
    got, wanted = along(attention, tensors, tangents), along(reference, tensors, tangents)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_same_as_pytorch():
    tensors = inputs(2, 2)
    mask = make_bias("mask", 2, 2, 20, 18, torch.float64)
    for bias, is_causal in ((None, False), (None, True), (mask, False), (mask[0, 0].double(), False)):
        wanted = F.scaled_dot_product_attention(**_named(tensors), attn_mask=bias, is_causal=is_causal)
        torch.testing.assert_close(attention(**tensors, bias=bias, is_causal=is_causal), wanted)


def _named(tensors):
    return {"query": tensors["q"], "key": tensors["k"], "value": tensors["v"]}


@pytest.mark.quick
def test_rows_without_keys_give_zeros():
    tensors = inputs() | {"bias": torch.ones(20, 18, dtype=torch.bool)}
    tensors["bias"][3] = False
    do = normal(1, 1, 20, 8, seed=5)
    got, wanted = run(attention, tensors, do), run(reference, tensors, do)
    assert (got["o"][0, 0, 3] == 0).all()
    assert (got["dq"][0, 0, 3] == 0).all()
    torch.testing.assert_close(got, wanted)
    tangents = {name: normal(*tensors[name].shape, seed=6) for name in "qkv"}
    torch.testing.assert_close(along(attention, tensors, tangents), along(reference, tensors, tangents))


def test_large_scores_do_not_overflow():
    tensors = inputs(dtype=torch.float32)
    tensors["q"], tensors["k"] = tensors["q"] * 300, tensors["k"] * 300  # scores of 1e5 and more
    do = normal(1, 1, 20, 8, seed=5, dtype=torch.float32)
    got, low = run(attention, tensors, do), run(reference, tensors, do)
    exact = reference(**{name: t.double() for name, t in tensors.items()})
    assert_close_enough({"o": got["o"]}, {"o": low["o"]}, {"o": exact})
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sample(bad):
    tensors = inputs(batch=2, dtype=torch.float32)
    do = torch.ones(2, 1, 20, 8)
    clean = run(attention, tensors, do)
    k = tensors["k"].clone()
    k[1, 0, 3, 2] = bad
    got = run(attention, tensors | {"k": k}, do)
    for name in got:
        assert torch.equal(got[name][0], clean[name][0]), name
    assert got["o"][1].isnan().any()
    q = tensors["q"].clone()
    q[1, 0, 3, 2] = bad
    o = attention(q, tensors["k"], tensors["v"])
    assert o[1, 0, 3].isnan().all()
    o[1, 0, 3] = clean["o"][1, 0, 3]
    assert torch.equal(o, clean["o"])


@pytest.mark.quick
def test_every_output_is_written(monkeypatch):
    tensors = inputs(dim=40, dtype=torch.float32)
    tensors["bias"] = make_bias("bias", 1, 1, 20, 18, torch.float32)
    do = normal(1, 1, 20, 40, seed=5, dtype=torch.float32)

    def everything():
        results = {}
        for is_causal in (False, True):
            for bias in (tensors["bias"], tensors["bias"][:, :, :1]):
                some = run(attention, tensors | {"bias": bias}, do, is_causal=is_causal)
                results |= {f"{name} {is_causal} {bias.shape[2]}": t for name, t in some.items()}
        return results | along(attention, tensors, {name: tensors[name] for name in "qkv"})

    clean = everything()
    empty, poisoned = _runtime.empty, []

    def poison(*args, **kwargs):
        poisoned.append(args)
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(_runtime, "empty", poison)
    got = everything()
    assert len(poisoned) >= 4 * 7
    assert all(torch.equal(got[name], clean[name]) for name in clean)


@pytest.mark.quick
def test_cpu_tensors_go_through_the_kernels(launched):
    q, k, v = (t.requires_grad_() for t in inputs().values())
    attention(q, k, v).sum().backward()
    assert launched == ["attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel"]
    torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))
    assert launched[3:] == ["attention_forward_kernel", "attention_tangent_kernel"]
    assert "Triton, head dim 8 as 16 + 0" in explain(attention, q, k, v)


def test_result_is_laid_out_for_the_projection():
    o = attention(**inputs(2, 3))
    assert o.transpose(1, 2).is_contiguous()


# -- masks of large negative numbers -------------------------------------------------------------------------

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32)}


def number_mask(value: float, per_query: bool, dtype: torch.dtype) -> Tensor:
    """Six kinds of rows, as a mask of each query of one sample, or of the keys of six samples."""
    keys = 18
    kinds = torch.zeros(6, keys, dtype=torch.float64)
    kinds[1, 5:] = value  # open in part, as padded prompts are
    kinds[2] = value
    kinds[3, ::2], kinds[3, 1::2] = value, -float("inf")
    kinds[4] = -float("inf")
    kinds[5, :3], kinds[5, 9:] = value, -float("inf")
    kinds = kinds.to(dtype)
    return kinds[torch.arange(20) % 6].reshape(1, 1, 20, keys) if per_query else kinds[:, None, None]


def grid(x: Tensor) -> Tensor:
    """Few bits a number: scores are then the same in every type and order of summation, and so is their sum with a
    mask, however it is rounded."""
    return (x * 4).round() / 4


def masked_by_numbers(value: float, per_query: bool, dtype: torch.dtype, bias_dtype: torch.dtype):
    tensors = inputs(1 if per_query else 6, dtype=dtype)
    tensors |= {"q": grid(tensors["q"]), "k": grid(tensors["k"])}
    return tensors | {"bias": number_mask(value, per_query, bias_dtype)}


@pytest.mark.parametrize("per_query", [True, False])
@pytest.mark.parametrize(
    ("dtype", "value", "bias_dtype"),
    [
        pytest.param(torch.float32, LOWEST[torch.float32], torch.float32, marks=pytest.mark.quick),
        pytest.param(torch.float32, -1e9, torch.float32, marks=pytest.mark.quick),
        (torch.float32, -1e4, torch.float32),
        (torch.float32, LOWEST[torch.bfloat16], torch.bfloat16),
        pytest.param(torch.bfloat16, LOWEST[torch.bfloat16], torch.bfloat16, marks=pytest.mark.quick),
        (torch.bfloat16, -1e9, torch.bfloat16),
        (torch.bfloat16, -1e4, torch.bfloat16),
        pytest.param(torch.float16, LOWEST[torch.float16], torch.float16, marks=pytest.mark.quick),
        (torch.float16, -1e9, torch.float16),  # -inf
        (torch.float16, -1e4, torch.float16),
        (torch.float16, LOWEST[torch.float32], torch.float32),
        (torch.float64, torch.finfo(torch.float64).min, torch.float64),
        (torch.float64, -1e9, torch.float64),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_of_large_numbers(dtype, value, bias_dtype, per_query, is_causal):
    """Against float64 that is given the scores with their mask as the accumulators hold the sum."""
    tensors = masked_by_numbers(value, per_query, dtype, bias_dtype)
    bias, options = tensors["bias"], {"is_causal": is_causal, "scale": 0.25}
    do = normal(*tensors["q"].shape, seed=5, dtype=dtype)
    tangents = {name: normal(*tensors[name].shape, seed=6, dtype=dtype) for name in "qkv"}
    got, low = (
        run(f, tensors, do, **options) | along(f, tensors, tangents, **options)
        for f in (attention, reference)
    )

    wide = {name: t.double() for name, t in tensors.items()}
    scores = wide["q"] @ wide["k"].mT * 0.25
    held = _runtime.accumulator(dtype)
    wide["bias"] = (scores.to(held) + bias.to(held)).double() - scores
    exact = run(reference, wide, do.double(), **options)
    exact |= along(reference, wide, {name: t.double() for name, t in tangents.items()}, **options)
    exact["dbias"] = exact["dbias"].sum_to_size(bias.shape)
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    else:
        assert_close_enough(got, low, exact)


@pytest.mark.parametrize("per_query", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["lowest", -1e4, -1e9, -float("inf")])
def test_masks_of_large_numbers_are_as_pytorchs(dtype, value, per_query):
    value = LOWEST[dtype] if value == "lowest" else value
    tensors = masked_by_numbers(value, per_query, dtype, dtype)
    do = normal(*tensors["q"].shape, seed=5, dtype=dtype)

    def pytorchs(q, k, v, bias, scale):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    got, wanted = (run(f, tensors, do, scale=0.25) for f in (attention, pytorchs))
    for name, of in wanted.items():
        close = 16 * torch.finfo(dtype).eps * of.abs().max()
        torch.testing.assert_close(
            got[name], of, rtol=0, atol=close.item(), msg=lambda m, n=name: f"{n}: {m}"
        )
    masked = (tensors["bias"] == -float("inf")).all(-1).expand(got["o"].shape[:3])
    assert (got["o"][masked] == 0).all()
    assert masked.any()
    assert (got["o"][~masked] != 0).any(-1).all()


@pytest.mark.quick
def test_plain_torch_keeps_finite_masks_finite(launched):
    """A float32 mask beside float16 q, k and v, whose range it leaves."""
    tensors = masked_by_numbers(LOWEST[torch.float32], True, torch.float16, torch.float32)
    tensors["v"] = tensors["v"][..., :5]
    o = attention(**tensors, scale=0.25)
    assert launched == []
    wide = {name: t.double() for name, t in tensors.items()}
    kinds = torch.arange(20) % 6
    wanted = reference(**wide, scale=0.25)[0, 0]
    rows = torch.isin(kinds, torch.tensor([0, 1, 4, 5]))  # a key is open, or none
    torch.testing.assert_close(o[0, 0, rows].double(), wanted[rows], rtol=2e-3, atol=2e-3)
    assert (o[0, 0, ~rows] != 0).all()
    tangents = {name: tensors[name] for name in "qkv"}
    forward = along(attention, tensors, tangents, scale=0.25)["o"][0, 0]
    torch.testing.assert_close(forward.double(), wanted, rtol=2e-3, atol=2e-3)


# -- derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_gradcheck_both_modes():
    leaves = [t.requires_grad_() for t in inputs(queries=5, keys=4, dim=4).values()]
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("kind", ["bias", "key bias", "head bias", "row"])
def test_gradcheck_of_the_bias(kind):
    tensors = inputs(queries=5, keys=4, dim=4)
    bias = make_bias(kind, 1, 1, 5, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b: attention(**tensors, bias=b, is_causal=True), bias, fast_mode=True
    )


def test_tangent_of_the_bias_takes_plain_torch():
    tensors = inputs() | {"bias": make_bias("bias", 1, 1, 20, 18, torch.float64)}
    tangents = {name: normal(*t.shape, seed=6) for name, t in tensors.items()}
    torch.testing.assert_close(along(attention, tensors, tangents), along(reference, tensors, tangents))


def test_gradient_of_the_primal_inside_forward_mode():
    tensors = inputs(queries=5, keys=4)

    def loss(function):
        def of(q):
            primals = (q, tensors["k"], tensors["v"])
            o, to = torch.func.jvp(function, primals, primals)
            return (o.sin() * to.detach()).sum()

        return torch.func.grad(of)(tensors["q"])

    torch.testing.assert_close(loss(attention), loss(reference))


@pytest.mark.parametrize("dims", [(0, None, None, None), (1, 0, 2, None), (None, 1, 0, 0)])
def test_vmap_of_value_and_gradient(dims):
    tensors = [*inputs(queries=5, keys=4).values(), make_bias("key bias", 1, 1, 5, 4, torch.float64)]
    mapped = [
        t if dim is None else torch.stack([t, 2 * t - 1, t + 1], dim)
        for t, dim in zip(tensors, dims, strict=True)
    ]

    def value(function):
        return lambda q, k, v, bias: function(q, k, v, bias=bias)

    def gradient(function):
        return torch.func.grad(lambda *t: value(function)(*t).sin().sum(), (0, 1, 2, 3))

    for of in (value, gradient):
        got, wanted = (torch.vmap(of(f), dims)(*mapped) for f in (attention, reference))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("jacobian", [torch.func.jacfwd, torch.func.jacrev])
def test_jacobians(jacobian):
    tensors = tuple(inputs(queries=2, keys=3, dim=2).values())
    got, wanted = (jacobian(f, (0, 1, 2))(*tensors) for f in (attention, reference))
    torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_refused():
    q, k, v = inputs(queries=3, keys=4).values()
    q.requires_grad_()
    (first,) = torch.autograd.grad(attention(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        torch.autograd.grad(first.sum(), q)
    with pytest.raises(NotImplementedError, match="second"):
        torch.func.grad(lambda q: torch.func.jvp(attention, (q, k, v), (q, k, v))[1].sum())(q.detach())
    with pytest.raises(NotImplementedError):
        torch.func.jvp(torch.func.grad(lambda q: attention(q, k, v).sin().sum()), (q,), (q,))


# -- operators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "key bias"])
def test_opcheck(kind):
    tensors = [t.requires_grad_() for t in inputs(2, 1, 3, 4, dtype=torch.float32).values()]
    bias = None if kind == "none" else make_bias(kind, 2, 1, 3, 4, torch.float32).requires_grad_()
    opcheck(module._forward, (*tensors, bias, False, 0.5))
    plain = [t.detach() for t in tensors]
    fixed = None if bias is None else bias.detach()
    o, lse = module._forward(*plain, fixed, False, 0.5)
    opcheck(module._tangent, (*plain, fixed, *plain, o, lse, False, 0.5))
    opcheck(module._backward, (torch.randn_like(o), *plain, fixed, o, lse, False, 0.5, bias is not None))


@pytest.mark.quick
def test_compiles_into_one_graph():
    tensors = inputs(2, 2, 5, 4) | {"bias": make_bias("head bias", 2, 2, 5, 4, torch.float64)}
    do = normal(2, 2, 5, 8, seed=5)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got, wanted = run(compiled, tensors, do, is_causal=True), run(reference, tensors, do, is_causal=True)
    torch.testing.assert_close(got, wanted)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward_mode(primals, tangents):
        return torch.func.jvp(attention, primals, tangents)

    primals = tuple(tensors[name] for name in "qkv")
    torch.testing.assert_close(forward_mode(primals, primals), torch.func.jvp(reference, primals, primals))


def test_export_and_checkpointing_keep_the_operator():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    tensors = tuple(inputs(queries=5, keys=4).values())
    exported = torch.export.export(Attention(), tensors)
    assert any("fastsample_kernels.attention" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*tensors), reference(*tensors))
    q = tensors[0].clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        Attention(), q, *tensors[1:], use_reentrant=False
    ).sin().sum().backward()
    (wanted,) = torch.autograd.grad(reference(q, *tensors[1:]).sin().sum(), q)
    torch.testing.assert_close(q.grad, wanted)


def test_autocast():
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(**tensors)
        assert F.scaled_dot_product_attention(**_named(tensors)).dtype == o.dtype == torch.bfloat16
    assert torch.equal(o, attention(**{name: t.bfloat16() for name, t in tensors.items()}))


# -- fallback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"q": normal(1, 1, 2, 257), "k": normal(1, 1, 3, 257)}, {}, "head dim 257 is above 256"),
        ({"v": normal(1, 1, 18, 5)}, {}, "v has another head dim"),
        ({"v": normal(1, 1, 18, 5)}, {"scale": -0.5}, "v has another head dim"),
        ({"q": normal(1, 1, 0, 8)}, {}, "a tensor is empty"),
    ],
)
@pytest.mark.parametrize("kind", ["none", "mask", "bias"])
def test_plain_torch_where_the_kernels_do_not_run(change, options, reason, kind, launched):
    tensors = inputs() | change
    if "head dim" in reason and "q" in change:
        tensors["v"] = normal(1, 1, 3, 257, seed=3)
    queries, keys = tensors["q"].shape[2], tensors["k"].shape[2]
    bias = (
        None
        if kind == "none"
        else make_bias(kind, 1, 1, max(queries, 1), keys, torch.float64)[:, :, :queries]
    )
    options = options | {"bias": bias, "is_causal": True}
    wanted = reference(**tensors, **options)
    torch.testing.assert_close(attention(**tensors, **options), wanted)
    assert reason in explain("attention", **tensors, **options)
    assert launched == []
    tangents = {name: tensors[name] for name in "qkv"}
    got = along(attention, tensors, tangents, **options)
    torch.testing.assert_close(got, along(reference, tensors, tangents, **options))


# -- tiles ---------------------------------------------------------------------------------------------------


def test_head_dims_are_padded_little():
    assert [split_head_dim(d) for d in (40, 80, 160)] == [(32, 16), (64, 16), (128, 32)]
    for dim in range(1, 257):
        parts = split_head_dim(dim)
        assert sum(parts) >= dim
        assert all(p == 0 or (p >= 16 and p & (p - 1) == 0) for p in parts)
        # No other pair of powers of two from 16 on is smaller.
        powers = [0, 16, 32, 64, 128, 256]
        assert sum(parts) == min(a + b for a in powers for b in powers if a + b >= dim)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_tiles_exist_for_every_call(capability):
    for which in ("forward", "tangent", "dq", "dkdv"):
        for dim in range(1, 257):
            for element_size in (2, 4, 8):
                for bias in ("none", "per_key", "per_query"):
                    for keys in (1, 77, 4096):
                        t = shipped_tiles(
                            which, dim, keys, element_size=element_size, capability=capability, bias=bias
                        )
                        assert t.block_m in (16, 32, 64, 128)
                        assert t.block_n in (16, 32, 64, 128)


@pytest.mark.parametrize("dim", [40, 64, 80])
@pytest.mark.parametrize(("capability", "block"), [((8, 0), 128), ((9, 0), 16), ((10, 0), 128)])
def test_77_keys_are_one_tile_or_five_small_ones(dim, capability, block):
    assert shipped_tiles("forward", dim, 77, element_size=2, capability=capability).block_n == block


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 8)}, "q has shape"),
        ({"k": torch.zeros(2, 1, 5, 8)}, "k is torch.float32"),
        ({"v": torch.zeros(1, 1, 5, 8, dtype=torch.float16)}, "v is torch.float16"),
        ({"k": torch.zeros(1, 1, 5, 16)}, "k has dim 16"),
        ({"v": torch.zeros(1, 1, 6, 8)}, "v has length 6"),
        ({"bias": torch.zeros(3, 5)}, "bias has shape"),
        ({"bias": torch.zeros(4, 5, dtype=torch.int32)}, "bias has dtype torch.int32"),
    ],
)
def test_bad_input(change, message):
    tensors = {"q": torch.zeros(1, 1, 4, 8), "k": torch.zeros(1, 1, 5, 8), "v": torch.zeros(1, 1, 5, 8)}
    with pytest.raises(ValueError, match=message):
        attention(**(tensors | change))


@pytest.mark.quick
def test_cudnn_is_asked_for_sums_only_where_they_are_needed(monkeypatch):
    asked = []

    def cudnn(q, k, v, is_causal, scale, sums):  # in its place: there is no GPU here
        asked.append(sums)
        s = q @ k.transpose(-1, -2) * scale
        return s.softmax(-1) @ v, torch.logsumexp(s, -1)

    monkeypatch.setattr(module, "_cudnn", cudnn)
    own = module._why_not_cudnn
    monkeypatch.setattr(
        module,
        "_why_not_cudnn",
        lambda q, *rest: own(q, *rest) if rest[2] is not None or rest[4] == 0 else None,
    )
    tensors = inputs(2, 3, 5, 7, 8)
    wanted = reference(**tensors)
    got = attention(**tensors)
    torch.testing.assert_close(got, wanted)
    assert got.transpose(1, 2).is_contiguous()  # as the kernels lay it out
    assert asked == [False]
    got = run(attention, tensors, torch.ones_like(wanted))
    plain = run(reference, tensors, torch.ones_like(wanted))
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, plain[name])
    torch.func.jvp(attention, tuple(tensors.values()), tuple(tensors.values()))
    torch.testing.assert_close(attention(**tensors, scale=-0.3), reference(**tensors, scale=-0.3))
    assert asked == [False, True, True, True]
    assert attention(**tensors, scale=0.0).isfinite().all()  # by our kernel: cuDNN gives NaN
    assert len(asked) == 4
