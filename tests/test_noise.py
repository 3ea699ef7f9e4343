"""The counter-based noise: known answers, independence of the batch, distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastsample.noise import normal, philox

# Known answers of Philox4x32-10 (Random123's kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned one."""
    return value - (1 << 64) if value >= 1 << 63 else value


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    sample = torch.tensor([signed(counter[2] | counter[3] << 32)])
    words = philox(key[0] | key[1] << 32, torch.tensor([counter[0]]), counter[1], sample)
    assert tuple(int(w) for w in words) == result


def reference(seed: int, sample: int, stream: int, count: int) -> np.ndarray:
    """The definition in plain integers and NumPy's float32, one element at a time."""
    mask, found = 0xFFFFFFFF, []
    for block in range(-(-count // 4)):
        c = [block, stream & mask, sample & mask, sample >> 32 & mask]
        k = [seed & mask, seed >> 32 & mask]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        for u, v in ((c[0], c[1]), (c[2], c[3])):
            radius = math.sqrt(-2 * math.log(((u >> 8) + 1) * 2.0**-24))
            angle = (v >> 8) * 2 * math.pi * 2.0**-24
            found += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(found[:count])


@given(
    st.integers(-(2**63), 2**64 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
)
def test_normals_are_the_definition(seed: int, sample: int, stream: int, count: int) -> None:
    got = normal((1, count), seed, torch.tensor([sample]), stream)
    np.testing.assert_allclose(got[0].numpy(), reference(seed, sample, stream, count), atol=4e-6, rtol=1e-5)


@given(st.integers(1, 40), st.permutations(range(12)), st.integers(1, 12))
def test_a_sample_is_the_same_in_any_batch_order_and_chunk(size: int, order: list[int], chunk: int) -> None:
    index = torch.arange(12) + 5
    whole = normal((12, size), 3, index, 2)
    shuffled = normal((12, size), 3, index[order], 2)
    assert torch.equal(shuffled, whole[order])
    parts = [normal((len(i), size), 3, i, 2) for i in index.split(chunk)]
    assert torch.equal(torch.cat(parts), whole)


def test_large_samples_do_not_depend_on_internal_blocks() -> None:
    # two samples of more than the words that are made at once, in a size that no block divides
    size = 4 * (1 << 16) + 4 * 999 + 3
    pair = normal((2, size), 0, torch.tensor([7, 2**40]))
    assert torch.equal(pair[1], normal((1, size), 0, torch.tensor([2**40]))[0])
    # a prefix of a longer sample is the shorter sample
    assert torch.equal(pair[:, :1001], normal((2, 1001), 0, torch.tensor([7, 2**40])))


def test_shape_matters_only_by_its_size() -> None:
    index = torch.arange(3)
    flat = normal((3, 60), 0, index)
    assert torch.equal(normal((3, 3, 4, 5), 0, index).flatten(1), flat)
    assert normal((3,), 0, index).shape == (3,)


def test_wider_types_hold_the_same_numbers() -> None:
    index = torch.arange(3)
    single = normal((3, 7), 0, index)
    assert single.dtype == torch.float32
    double = normal((3, 7), 0, index, dtype=torch.float64)
    assert torch.equal(double, single.double())


def test_out_is_written() -> None:
    out = torch.empty(3, 2, 5)
    assert normal((3, 2, 5), 9, torch.arange(3), out=out) is out
    assert torch.equal(out, normal((3, 2, 5), 9, torch.arange(3)))


def test_distribution_is_normal() -> None:
    z = normal((256, 4096), 123, torch.arange(256)).double()
    n = z.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z.flatten()[:200_000].numpy(), "norm").pvalue > 1e-3
    assert float(z.abs().max()) < 5.9  # 24 bits: the radius ends at sqrt(48 log 2)


def test_elements_samples_streams_and_seeds_are_uncorrelated() -> None:
    n = 200_000
    base = normal((1, n), 5, torch.tensor([0]), 1).double()[0]
    others = {
        "the next sample": normal((1, n), 5, torch.tensor([1]), 1),
        "a far sample": normal((1, n), 5, torch.tensor([2**32]), 1),
        "the next stream": normal((1, n), 5, torch.tensor([0]), 2),
        "the next seed": normal((1, n), 6, torch.tensor([0]), 1),
        "a seed that differs in its high half": normal((1, n), 5 + 2**32, torch.tensor([0]), 1),
    }
    for name, other in others.items():
        assert not torch.equal(base, other.double()[0]), name
        assert abs(float((base * other.double()[0]).mean())) < 4.5 / math.sqrt(n), name
    for lag in (1, 2, 3, 4, 5):
        assert abs(float((base[lag:] * base[:-lag]).mean())) < 4.5 / math.sqrt(n), lag


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"index has shape \(2,\) but shape=\(3, 4\)"):
        normal((3, 4), 0, torch.arange(2))
    with pytest.raises(ValueError, match="64 bits"):
        normal((1, 4), 2**64, torch.arange(1))


@pytest.mark.gpu
def test_words_and_normals_on_a_gpu() -> None:
    index = torch.arange(5) + 2**33
    block = torch.arange(100)[None]
    ours = philox(77, block.cuda(), 3, index[:, None].cuda())
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(ours, philox(77, block, 3, index[:, None]), strict=True)
    )
    torch.testing.assert_close(
        normal((5, 401), 77, index.cuda()).cpu(), normal((5, 401), 77, index), rtol=2e-6, atol=2e-6
    )
