"""Streaming grouped moments: the sums are those of the whole set, however it arrives."""

import subprocess
import sys

import pytest
import torch

from fastsample.metrics import Gaussian, GroupedMoments


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.randn(257, 6, generator=generator, dtype=torch.float64) @ mix + 3


def test_moments_are_those_of_the_whole_set(features: torch.Tensor) -> None:
    moments = GroupedMoments(6)
    moments.update(features, range(257))
    gaussian = moments.gaussian()
    assert gaussian.n == 257
    torch.testing.assert_close(gaussian.mean, features.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian.cov, features.T.cov(), rtol=1e-11, atol=1e-11)


def test_order_batches_and_merging_do_not_matter(features: torch.Tensor) -> None:
    whole = GroupedMoments(6)
    whole.update(features, range(257))
    order = torch.randperm(257, generator=torch.Generator().manual_seed(1))
    first, second = GroupedMoments(6), GroupedMoments(6)
    for part in order[:100].split(7):
        first.update(features[part], part)
    for part in order[100:].split(50):
        second.update(features[part], part)
    merged = first.merge(second)
    assert torch.equal(merged.counts, whole.counts)
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.outer, whole.outer, rtol=1e-12, atol=1e-12)


def test_leaving_a_group_out(features: torch.Tensor) -> None:
    moments = GroupedMoments(6, groups=4)
    moments.update(features, range(257))
    rest = features[torch.arange(257) % 4 != 2]
    gaussian = moments.gaussian(without=2)
    assert gaussian.n == len(rest)
    torch.testing.assert_close(gaussian.cov, rest.T.cov(), rtol=1e-11, atol=1e-11)


def test_update_does_not_change_what_gaussian_returned_before(features: torch.Tensor) -> None:
    moments = GroupedMoments(6)
    moments.update(features[:100], range(100))
    before = moments.gaussian()
    cov = before.cov.clone()
    moments.update(features[100:], range(100, 257))
    assert torch.equal(before.cov, cov)


def test_memory_does_not_grow(features: torch.Tensor) -> None:
    moments = GroupedMoments(6)
    size = moments.outer.nbytes + moments.sums.nbytes
    for start in range(0, 2570, 257):
        moments.update(features, range(start, start + 257))
    assert moments.n == 2570
    assert moments.outer.nbytes + moments.sums.nbytes == size == 8 * 20 * 6 * 7


def test_moments_for_other_tools(features: torch.Tensor, tmp_path) -> None:
    """numpy's mean and covariance of the same features; read back as the harness reads train=FILE.npz."""
    import numpy as np

    from fastsample.bench.data import load_images

    moments = GroupedMoments(6)
    moments.update(features, range(257))
    gaussian = moments.gaussian()
    gaussian.save(tmp_path / "train.npz")
    with np.load(tmp_path / "train.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["mu", "sigma"]
        np.testing.assert_allclose(arrays["mu"], features.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(arrays["sigma"], np.cov(features.numpy(), rowvar=False), rtol=1e-10)
    found = load_images(str(tmp_path / "train.npz"), (3, 8, 8)).source
    assert isinstance(found, Gaussian)
    assert torch.equal(found.mean, gaussian.mean)
    assert torch.equal(found.cov, gaussian.cov)


@pytest.mark.slow
def test_fifty_thousand_samples_at_2048_dimensions_in_constant_memory() -> None:
    """The process's own peak, in a process of its own: what the sums take and no more."""
    code = (
        "import resource, torch\n"
        "from fastsample.metrics import GroupedMoments\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "moments, generator = GroupedMoments(2048), torch.Generator().manual_seed(0)\n"
        "for start in range(0, 50_000, 500):\n"
        "    moments.update(torch.randn(500, 2048, generator=generator), range(start, start + 500))\n"
        "    if start == 1000: early = peak()\n"
        "assert moments.n == 50_000\n"
        "print(early, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, late = map(int, done.stdout.split())
    assert late < early + 20_000  # kilobytes; the samples would be 400,000


def test_save_and_load_give_the_same_bits(features: torch.Tensor, tmp_path) -> None:
    moments = GroupedMoments(6)
    moments.update(features, range(257))
    moments.save(tmp_path / "m.safetensors")
    loaded = GroupedMoments.load(tmp_path / "m.safetensors")
    for name in ("counts", "sums", "outer"):
        assert torch.equal(getattr(loaded, name), getattr(moments, name))


def test_an_altered_byte_is_found(features: torch.Tensor, tmp_path) -> None:
    """safetensors itself loads it without a word."""
    moments = GroupedMoments(6)
    moments.update(features, range(257))
    file = tmp_path / "m.safetensors"
    moments.save(file)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was altered: its checksum does not match"):
        GroupedMoments.load(file)


def test_load_refuses_other_files(tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "noise").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        GroupedMoments.load(tmp_path / "noise")
    save_file({"counts": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="does not hold moments"):
        GroupedMoments.load(tmp_path / "other")


def test_bad_input_is_named(features: torch.Tensor) -> None:
    moments = GroupedMoments(6)
    with pytest.raises(ValueError, match=r"shape \[B, 6\]"):
        moments.update(features[:, :5], range(257))
    with pytest.raises(ValueError, match="one integer for each of 257 rows"):
        moments.update(features, range(3))
    features[41, 2] = float("nan")
    with pytest.raises(ValueError, match="first at sample index 1041"):
        moments.update(features, range(1000, 1257))
    assert moments.n == 0
    with pytest.raises(ValueError, match="at least 2 vectors"):
        moments.gaussian()
    with pytest.raises(ValueError, match="groups"):
        GroupedMoments(6, groups=1)
    with pytest.raises(ValueError, match="20 groups of dimension 6"):
        moments.merge(GroupedMoments(5))
    with pytest.raises(ValueError, match="non-finite"):
        Gaussian(torch.zeros(2), torch.full((2, 2), float("inf")))
    with pytest.raises(ValueError, match=r"\[d, d\]"):
        Gaussian(torch.zeros(2), torch.zeros(3, 3))
