"""Memorisation and per-sample error."""

import pytest
import torch

from fastsample.metrics import memorisation, rmse


def draw(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_fresh_samples_have_ratio_one_whatever_the_sizes_of_the_splits() -> None:
    for sizes in ((600, 300), (300, 300), (900, 150)):
        m = memorisation(draw(0, 500), draw(1, sizes[0]), draw(2, sizes[1]))
        assert abs(m.ratio - 1) < 4 * m.ratio_se
        assert m.ratio_se < 0.02
        assert m.copies < 0.05
        assert m.n == 500


def test_copies_are_found() -> None:
    train = draw(1, 300)
    samples = train[:200] + 1e-3 * draw(3, 200)
    m = memorisation(samples, train, draw(2, 300))
    assert m.ratio < 0.01
    assert m.copies == 1.0


def test_memorisation_against_brute_force() -> None:
    x, a, b = draw(0, 25), draw(1, 9), draw(2, 4)

    def nearest(v: torch.Tensor, images: torch.Tensor) -> float:
        return min(float((v - i).norm()) for i in images)

    near = [(nearest(v, a[0::2][:4]) + nearest(v, a[1::2][:4])) / 2 for v in x]
    m = memorisation(x, a, b)
    assert m.ratio == pytest.approx(sum(near) / sum(nearest(v, b) for v in x), rel=1e-6)


def test_memorisation_refuses_bad_sets() -> None:
    with pytest.raises(ValueError, match="images of one shape"):
        memorisation(draw(0, 30), draw(1, 9), draw(2, 4)[..., :2])
    with pytest.raises(ValueError, match="at least 20, 2 and 1"):
        memorisation(draw(0, 19), draw(1, 9), draw(2, 4))
    with pytest.raises(ValueError, match="not defined"):
        memorisation(draw(0, 20), draw(1, 30), draw(0, 20))


def test_rmse() -> None:
    reference = torch.zeros(3, 1, 2, 2)
    samples = torch.stack([torch.full((1, 2, 2), v) for v in (1.0, -2.0, 10.0)])
    total, median = rmse(samples, reference)
    assert total == pytest.approx((105 / 3) ** 0.5)
    assert median == pytest.approx(2.0)
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        rmse(samples, reference[:2])
    with pytest.raises(ValueError, match="non-empty"):
        rmse(samples[:0], reference[:0])
