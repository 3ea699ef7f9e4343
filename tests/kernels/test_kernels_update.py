"""update under Triton's interpreter: against a float64 reference, and its noise against the library's."""

import importlib
import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compiled import assert_compiles_once
from torch import Tensor
from torch.library import opcheck

from fastsample import noise as generator
from fastsample_kernels import Noise, _runtime, explain, update
from fastsample_kernels._launch import Launch
from fastsample_kernels._update_kernels import words

module = importlib.import_module("fastsample_kernels.update")
reference = module.reference
NUMBERS = {"guidance": 3.5, "convert": (0.3, -1.2), "weight": 0.7}


def arguments(shape, terms=3, dtype=torch.float64, seed=0) -> list[Tensor]:
    """terms tensors, output and null."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(terms + 2)]


def coefficients(terms: int) -> list[float]:
    return [(-1) ** j * (0.4 + 0.3 * j) for j in range(terms)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick) if case < 4 else case for case in range(16)]
)
def test_fuzz(case):
    rng = random.Random(case)
    terms = 1 + case % module.MAX_TERMS
    shape = rng.choice([(2, 3, 5), (1, 1025), (3, 2, 2, 2), (2,), (4, 1, 7)])
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    *xs, output, null = arguments(shape, terms, dtype, seed=case)
    output, null = output.to(rng.choice([torch.bfloat16, torch.float32])), null.to(output.dtype)
    if len(shape) == 4 and rng.random() < 0.7:
        xs = [x.to(memory_format=rng.choice([torch.channels_last, torch.contiguous_format])) for x in xs]
    if case % 3 == 0:
        xs[0] = torch.cat([xs[0], xs[0]], dim=-1)[..., shape[-1] :]  # an offset, and gaps between rows
    options = dict(NUMBERS, state=rng.choice([None, *range(terms)]), keep=rng.random() < 0.7)
    options |= {"output": output, "null": null if rng.random() < 0.5 else None} if rng.random() < 0.8 else {}
    if rng.random() < 0.5:
        options["noise"] = Noise(0.6, rng.getrandbits(64), case, torch.arange(shape[0]) + (1 << 33))

    got = update(xs, coefficients(terms), **options)
    low = reference(xs, coefficients(terms), **options)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = reference([x.double() for x in xs], coefficients(terms), **wide)
    assert (got[1] is None) == (exact[1] is None) == (options.get("output") is None or not options["keep"])
    for a, b, wanted in zip(got, low, exact, strict=True):
        if wanted is not None:
            assert a.dtype == xs[0].dtype
            error = (a.double() - wanted).abs().max()
            assert error <= 2 * (b.double() - wanted).abs().max() + 16 * 2**-24 * wanted.abs().max()


def test_one_launch_in_memory_order(monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "__call__", lambda self: launched.append(self.args))
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    y, m = update([x, x], [1.0, 2.0], output=x)
    assert len(launched) == 1
    assert launched[0]["x0"] is x
    assert y.stride() == m.stride() == x.stride()
    y, _ = update([x], [1.0], noise=Noise(1.0, 0, 0, torch.arange(2)))
    assert y.is_contiguous()
    assert launched[1]["x0"].is_contiguous()


@pytest.mark.quick
def test_update_compiles_once_for_all_numbers():
    assert "Triton" in explain("update", [torch.randn(2, 8)], [1.0])
    assert_compiles_once()


@pytest.mark.quick
def test_samples_of_more_elements_than_32_bits_count(monkeypatch):
    """The last tile of such a sample, with the memory accesses recorded instead of made."""
    from triton.runtime import interpreter

    builder, x, size = interpreter.interpreter_builder, torch.zeros(1, 4096), 2**31 + 2048
    launch, y, _ = module.update_launch(
        [x], None, None, None, [1.0], 1.0, -1, 0.0, 1.0, 0.0, 0, 0, 0.0, False
    )
    tiles = -(-size // (4 * module._BLOCKS))
    seen: dict[str, list] = {"load": [], "store": []}

    def load(ptrs, mask, other, *_):
        seen["load"].append((ptrs.data, mask.data))
        return other

    def store(ptrs, value, mask, *_):
        seen["store"].append((ptrs.data, mask.data))

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    last = interpreter.TensorHandle(np.array([tiles - 1], dtype=np.int32), tl.int32)
    monkeypatch.setattr(builder, "create_get_program_id", lambda axis: last)
    Launch(launch.kernel, (1,), launch.args | {"size": size, "tiles": tiles}, 4, 1)()
    wanted = (tiles - 1) * 4 * module._BLOCKS + np.arange(4 * module._BLOCKS)
    for what, tensor in (("load", x), ("store", y)):
        ((addresses, mask),) = seen[what]
        offsets = (addresses.astype(np.int64) - tensor.data_ptr()) // 4
        assert mask.all() == (wanted < size).all()
        assert (offsets.ravel() == wanted).all()


# -- noise ---------------------------------------------------------------------------------------------------


@triton.jit
def store_words(out, index, seed, stream, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    w0, w1, w2, w3 = words(seed, block, stream, tl.load(index))
    tl.store(out + block, w0.to(tl.int64))
    tl.store(out + BLOCKS + block, w1.to(tl.int64))
    tl.store(out + 2 * BLOCKS + block, w2.to(tl.int64))
    tl.store(out + 3 * BLOCKS + block, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize(("stream", "sample"), [(0, 0), (1, 5), (2**32 - 1, 2**40 + 3)])
def test_words_are_those_of_the_library(seed, stream, sample):
    out = torch.empty(4, 32, dtype=torch.int64)
    index = torch.tensor([sample])
    store_words[(1,)](out, index, seed - (1 << 64) * (seed >> 63), stream, 32)
    block = torch.arange(32)
    wanted = torch.stack(generator.philox(seed, block, stream, index))
    assert torch.equal(out, wanted)
    assert torch.equal(torch.stack(module.philox(seed, block, stream, index)), wanted)


@pytest.mark.quick
def test_words_are_philox():
    # Known answers of Philox4x32-10 from Random123 (Salmon et al. 2011).
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key, answer = (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    sample = torch.tensor([counter[2] | counter[3] << 32])
    got = module.philox(key[0] | key[1] << 32, torch.tensor([counter[0]]), counter[1], sample)
    assert [int(w) for w in got] == answer


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(3, 4097), (2, 3, 5), (1, 2)])
def test_normals_are_those_of_the_library(shape):
    index = torch.tensor([7, 2**33 + 1, 0])[: shape[0]]
    seed, stream = 2**63 + 12345, 3
    wanted = generator.normal(shape, seed, index, stream)
    noise = Noise(1.0, seed, stream, index)
    zero = torch.zeros(shape)
    torch.testing.assert_close(reference([zero], [0.0], noise=noise)[0], wanted, rtol=0, atol=0)
    got, _ = update([zero], [0.0], noise=noise)
    ulps = (got - wanted).abs() / (2**-23 * wanted.abs().clamp(min=1))
    assert ulps.max() <= 4


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    index = torch.tensor([4, 1, 9])
    zero = torch.zeros(3, 1030)
    together, _ = update([zero], [0.0], noise=Noise(1.0, 11, 2, index))
    for i in range(3):
        alone, _ = update([zero[:1]], [0.0], noise=Noise(1.0, 11, 2, index[i : i + 1]))
        assert torch.equal(alone[0], together[i])
    other, _ = update([zero], [0.0], noise=Noise(1.0, 11, 3, index))
    assert (other == together).float().mean() < 0.01


# -- robustness ----------------------------------------------------------------------------------------------


def test_every_output_is_written(monkeypatch):
    *xs, output, null = arguments((2, 3, 350), dtype=torch.float32)
    options = dict(NUMBERS, output=output, null=null, state=1, noise=Noise(0.5, 1, 2, torch.arange(2)))
    clean = update(xs, coefficients(3), **options)
    empty = _runtime.empty
    monkeypatch.setattr(_runtime, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for a, b in zip(update(xs, coefficients(3), **options), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_where_they_are(bad):
    *xs, output, _ = arguments((2, 1030), dtype=torch.float32)
    clean, _ = update(xs, coefficients(3), output=output, weight=0.5)
    output = output.clone()
    output[1, 17] = bad
    got, m = update(xs, coefficients(3), output=output, weight=0.5)
    assert not got[1, 17].isfinite()
    assert not m[1, 17].isfinite()
    got[1, 17] = clean[1, 17]
    assert torch.equal(got, clean)


# -- derivatives ---------------------------------------------------------------------------------------------


def linear(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    *xs, output, null = tensors
    return update(xs, coefficients(len(xs)), output=output, null=null, state=1, **NUMBERS)


def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    *xs, output, null = tensors
    return reference(xs, coefficients(len(xs)), output=output, null=null, state=1, **NUMBERS)


@pytest.mark.quick
def test_gradcheck_both_modes_and_second_order():
    leaves = [t.requires_grad_() for t in arguments((2, 3))]
    assert torch.autograd.gradcheck(linear, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear, leaves, fast_mode=True)


def test_gradients_come_in_the_types_of_the_inputs():
    *xs, output, null = arguments((2, 3), dtype=torch.float32)
    tensors = [*xs, output.bfloat16(), null.bfloat16()]
    leaves = [t.requires_grad_() for t in tensors]
    for f in (linear, plain):
        gradients = torch.autograd.grad(sum(part.sum() for part in f(*leaves)), leaves)
        assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


@pytest.mark.quick
def test_noise_has_no_tangent():
    xs = arguments((2, 5))[:2]
    noise = Noise(0.5, 1, 2, torch.arange(2))
    y, dy = torch.func.jvp(lambda *xs: update(xs, [1.0, 2.0], noise=noise)[0], tuple(xs), tuple(xs))
    torch.testing.assert_close(dy, xs[0] + 2 * xs[1])
    torch.testing.assert_close(y, reference(xs, [1.0, 2.0], noise=noise)[0])


def test_transforms():
    tensors = tuple(arguments((2, 3)))
    mapped = [torch.stack([t, 2 * t]) if i % 2 == 0 else t for i, t in enumerate(tensors)]
    dims = tuple(0 if i % 2 == 0 else None for i in range(len(tensors)))
    for a, b in zip(torch.vmap(linear, dims)(*mapped), torch.vmap(plain, dims)(*mapped), strict=True):
        torch.testing.assert_close(a, b)
    everything = tuple(range(len(tensors)))
    got, wanted = (
        torch.func.grad(lambda *t, f=f: sum(part.sin().sum() for part in f(*t)), everything)(*tensors)
        for f in (linear, plain)
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_draws_each_sample_once_and_returns_no_empty_prediction():
    noise = Noise(1.0, 3, 1, torch.arange(2))
    x = torch.randn(3, 2, 5)
    y, _ = torch.vmap(lambda x: (update([x], [1.0], noise=noise)[0], x))(x)
    torch.testing.assert_close(y, torch.stack([reference([part], [1.0], noise=noise)[0] for part in x]))


def test_opcheck():
    a, b, output, null = (t.requires_grad_() for t in arguments((2, 3), terms=2, dtype=torch.float32))
    rest, numbers = [None] * (module.MAX_TERMS - 2), module._numbers
    opcheck(
        module._update,
        (
            a,
            b,
            *rest,
            output,
            null,
            torch.arange(2),
            numbers(2.0, 0.3, 0.4, 0.5, 0.6, 0.1, 0.2),
            1,
            3,
            4,
            True,
        ),
    )
    opcheck(
        module._update,
        (a, b, *rest, None, None, None, numbers(1.0, 0.0, 1.0, 0.0, 0.0, 0.1, 0.2), -1, 0, 0, False),
    )


def test_compiles_into_one_graph():
    leaves = [t.requires_grad_() for t in arguments((2, 3))]
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*leaves), plain(*leaves), strict=True):
        torch.testing.assert_close(a, b)
    got, wanted = (torch.autograd.grad(f(*leaves)[0].sin().sum(), leaves) for f in (compiled, plain))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_explain():
    x = torch.randn(2, 3, 4)
    assert (
        explain(update, [x, x], [1.0, 2.0])
        == "update: Triton, one launch, 2 tensors, 1024 elements a program"
    )
    assert "copied" in explain(update, [x, x.transpose(1, 2).contiguous().transpose(1, 2)], [1.0, 2.0])
    many = explain(update, [x] * 9, [1.0] * 9)
    assert "plain torch" in many
    assert "9 tensors" in many
    torch.testing.assert_close(update([x] * 9, [1.0] * 9)[0], 9 * x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": []}, "tensors is empty"),
        ({"coefficients": [1.0]}, "2 tensors but 1 coefficients"),
        ({"tensors": [torch.zeros(2, 3), torch.zeros(2, 4)]}, r"tensors\[1\] has shape"),
        ({"tensors": [torch.zeros(()), torch.zeros(())]}, "no axes"),
        ({"tensors": [torch.zeros(2, dtype=torch.int64)] * 2}, "dtype torch.int64"),
        ({"output": torch.zeros(3)}, "output has shape"),
        ({"null": torch.zeros(2, 3)}, "without output"),
        ({"state": 2}, "state=2"),
        ({"noise": Noise(1.0, 0, 0, torch.zeros(3, dtype=torch.int64))}, "noise.index has shape"),
        ({"noise": Noise(1.0, 0, 0, torch.zeros(2))}, "noise.index has shape"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        update(**({"tensors": [torch.zeros(2, 3)] * 2, "coefficients": [1.0, 2.0]} | change))
