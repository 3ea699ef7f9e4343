"""Kernel distances against torch-fidelity's and against closed forms; their intervals cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.metrics import KernelReference, kernel_distance, paired_difference, sliced_wasserstein


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_kid_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import mmd2

    x, y = draw(200, 16, 0), draw(200, 16, 1, 0.3)

    def kernel(u: Tensor, v: Tensor) -> np.ndarray:
        return ((u @ v.T / 16 + 1) ** 3).numpy()

    theirs = float(mmd2(kernel(x, x), kernel(x, y), kernel(y, y)))
    assert kernel_distance(x, y).plain == pytest.approx(theirs, rel=1e-9)


def test_blocks_and_leave_one_out_are_the_definition() -> None:
    """Every leave-one-out value is the statistic of the remaining samples, whatever their order."""
    x, y = draw(63, 3, 2), draw(41, 3, 3, 0.5)
    index = torch.randperm(63, generator=torch.Generator().manual_seed(4))

    def statistic(a: Tensor) -> float:
        def k(u: Tensor, v: Tensor) -> Tensor:
            return torch.exp(-(u[:, None] - v[None]).square().sum(2) / 200)

        n, m = len(a), len(y)
        own = (k(a, a).sum() - n) / (n * (n - 1)) + (k(y, y).sum() - m) / (m * (m - 1))
        return float(own - 2 * k(a, y).mean())

    found = kernel_distance(x, y, index, kernel="gaussian")
    assert found.plain == pytest.approx(statistic(x), rel=1e-9)
    for g, value in enumerate(found.leave_one_out):
        assert value == pytest.approx(statistic(x[index % 20 != g]), rel=1e-9)


def test_intervals_cover_the_truth() -> None:
    """Gaussians with means apart by delta: the polynomial kernel's discrepancy in closed form."""
    d, delta, runs = 4, 0.4, 200
    # E k over independent pairs, for means a and b and unit covariance: with s = x.y / d,
    # E (1 + s)^3 = 1 + 3 E s + 3 E s^2 + E s^3
    a, b = np.zeros(d), np.full(d, delta)

    def mean_kernel(u: np.ndarray, v: np.ndarray) -> float:
        dot = float(u @ v)
        second = dot**2 + float(u @ u) + float(v @ v) + d
        # E (x.y)^3 = E_x [ (x.v)^3 + 3 (x.v) |x|^2 ], and both in closed form
        uv, uu, vv = dot, float(u @ u), float(v @ v)
        third = uv**3 + 3 * uv * vv + 3 * (uv * (uu + d) + 2 * uv)
        return 1 + 3 * dot / d + 3 * second / d**2 + third / d**3

    truth = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
    reference = KernelReference(draw(4000, d, 10_000, delta))
    found = [reference.distance(draw(400, d, i)) for i in range(runs)]
    values = np.array([f.value for f in found])
    errors = np.array([f.se for f in found])
    assert values.mean() == pytest.approx(truth, rel=0.1)  # the fixed reference set has an error of its own
    assert np.median(errors) == pytest.approx(values.std(), rel=0.2)
    assert 0.9 < (np.abs(values - values.mean()) <= 2 * errors).mean() <= 1


def test_paired_differences_are_more_certain() -> None:
    base = draw(400, 8, 20)
    y = draw(400, 8, 21)
    near, far = (kernel_distance(base + s, y) for s in (0.1, 0.12))
    difference = paired_difference(far, near)
    assert difference.value == pytest.approx(far.plain - near.plain, rel=0.05)
    assert difference.significant
    assert difference.se < 0.5 * math.hypot(near.se, far.se)


def test_sliced_wasserstein() -> None:
    """A shift by a vector moves every projection by its share: shift / sqrt(d) in the mean square."""
    x = draw(300, 5, 30)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=torch.float64)
    expected = float(shift.norm()) / math.sqrt(5)
    assert sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(expected, rel=0.03)
    assert sliced_wasserstein(x, x[torch.randperm(300)]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(x, torch.cat([x, x])) < 0.05
    images = x.view(300, 1, 5, 1)
    assert sliced_wasserstein(images, images + 1) == pytest.approx(sliced_wasserstein(x, x + 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(draw(10, 3, 0), draw(10, 3, 1)), "10 samples are too few; at least 40"),
        (lambda: kernel_distance(draw(50, 3, 0), draw(50, 4, 1)), r"\[n, d\] and \[m, d\]"),
        (lambda: kernel_distance(draw(50, 3, 0) / 0, draw(50, 3, 1)), "features: values that are not finite"),
        (lambda: kernel_distance(draw(50, 3, 0), draw(50, 3, 1), kernel="poly"), "did you mean 'polynomial'"),
        (lambda: kernel_distance(draw(50, 3, 0), draw(50, 3, 1), torch.zeros(50)), "group is empty"),
        (lambda: sliced_wasserstein(draw(5, 3, 0), draw(5, 4, 0)), "samples of one shape"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
