"""The Fréchet distance, its bias and its interval."""

import math

import numpy as np
import pytest
import torch

from fastsample.metrics import (
    Difference,
    FrechetEstimate,
    FrechetReference,
    Gaussian,
    GroupedMoments,
    average,
    estimate,
    frechet_distance,
    paired_difference,
)

D = 8


def grouped(features: torch.Tensor) -> GroupedMoments:
    moments = GroupedMoments(features.shape[1])
    moments.update(features, range(len(features)))
    return moments


def gaussian(seed: int, d: int, rank: int | None = None) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, rank or 2 * d, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(d, generator=generator, dtype=torch.float64), root @ root.T)


@pytest.mark.parametrize("d", [1, 5, 64])
def test_agrees_with_torch_fidelity(d: int) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    generator = torch.Generator().manual_seed(d)
    a = torch.randn(400, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, d)
    b = torch.randn(300, d, generator=generator, dtype=torch.float64) + 0.1
    if d == 1:  # np.cov of one feature is a scalar, which torch-fidelity does not take
        expected = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    else:
        stats = [fid_features_to_statistics(x) for x in (a, b)]
        expected = fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(grouped(a).gaussian(), grouped(b).gaussian()) == pytest.approx(expected, rel=1e-6)


def test_commuting_covariances_in_closed_form() -> None:
    a, b = torch.linspace(0.1, 3, D).double(), torch.linspace(2, 0.5, D).double()
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    shift = torch.arange(D).double()
    x = Gaussian(shift, q @ torch.diag(a) @ q.T)
    y = Gaussian(torch.zeros(D).double(), q @ torch.diag(b) @ q.T)
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(3, None), (None, 3), (3, 3), (1, 7)])
def test_deficient_rank(rank_a: int | None, rank_b: int | None) -> None:
    from scipy.linalg import sqrtm

    a, b = gaussian(1, 12, rank_a), gaussian(2, 12, rank_b)
    # the textbook formula on slightly regularised covariances, with the regularisation extrapolated away
    values = []
    for e in (1e-8, 1e-10):
        sa, sb = (g.cov.numpy() + e * np.eye(12) for g in (a, b))
        values.append(np.trace(sa + sb - 2 * np.real(sqrtm(sa @ sb))))
    expected = float((a.mean - b.mean).square().sum()) + values[1] + (values[1] - values[0]) / 9
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(a.cov.trace()))


def test_intervals_cover_the_truth_and_the_plain_value_is_biased() -> None:
    """At N/d = 24 two standard errors cover the truth about 95% of the time (200 repeats: 90 to 99%)."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
    truth = float((scale - 1).square().sum()) + D * 0.1**2
    reference = FrechetReference(Gaussian(torch.zeros(D).double(), torch.eye(D).double()))
    covered, error, plain_error, repeats = 0, 0.0, 0.0, 200
    for _ in range(repeats):
        e = estimate(grouped(torch.randn(24 * D, D, generator=generator).double() * scale + 0.1), reference)
        assert e.reliable
        covered += abs(e.value - truth) <= 2 * e.se
        error += (e.value - truth) / repeats
        plain_error += (e.plain - truth) / repeats
    assert 0.90 <= covered / repeats <= 0.99
    assert plain_error > 0.03
    assert abs(error) < 0.2 * plain_error


def test_paired_differences_cover_and_are_sharper_than_independent_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = FrechetReference(Gaussian(torch.zeros(D).double(), torch.eye(D).double()))
    truth = D * (0.3**2 - 0.25**2)
    covered, repeats = 0, 150
    for _ in range(repeats):
        noise = torch.randn(24 * D, D, generator=generator).double()
        a, b = (estimate(grouped(noise + shift), reference) for shift in (0.3, 0.25))
        difference = paired_difference(a, b)
        covered += abs(difference.value - truth) <= 2 * difference.se
    assert 0.89 <= covered / repeats <= 0.99
    assert difference.se < math.hypot(a.se, b.se) / 3
    assert difference.significant
    assert paired_difference(b, a).value == pytest.approx(-difference.value)
    assert not paired_difference(a, a).significant


def test_groups_of_unequal_size_reduce_to_the_plainjackknife_of_a_mean() -> None:
    """For a statistic that is linear in the sums the delete-m_j jackknife has no bias to remove."""
    from fastsample.metrics.frechet import jackknife

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(107, generator=generator, dtype=torch.float64)
    group = torch.arange(107) % 20
    sizes = torch.bincount(group)
    leave = torch.stack([x[group != g].mean() for g in range(20)])
    value, se = jackknife(float(x.mean()), leave, sizes)
    assert value == pytest.approx(float(x.mean()), abs=1e-12)
    assert se == pytest.approx(float(x.std() / math.sqrt(107)), rel=0.5)


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    moments = grouped(torch.randn(30, 30, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"30 samples are too few .* 30 dimensions; at least 31 are needed, 720"
    ):
        estimate(moments, gaussian(0, 30))
    few = grouped(torch.randn(12, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="group is empty"):
        estimate(few, gaussian(0, 4))
    assert not estimate(grouped(torch.randn(64, 4, dtype=torch.float64)), gaussian(0, 4)).reliable


def test_mismatches_are_refused() -> None:
    with pytest.raises(ValueError, match="dimension 4 is needed, got 5"):
        frechet_distance(gaussian(0, 5), gaussian(0, 4))
    a = estimate(grouped(torch.randn(100, 4, dtype=torch.float64)), gaussian(0, 4))
    b = estimate(grouped(torch.randn(120, 4, dtype=torch.float64)), gaussian(0, 4))
    with pytest.raises(ValueError, match="n=100, d=4 and n=120"):
        paired_difference(a, b)
    with pytest.raises(ValueError, match="at least one"):
        average([])


def test_average_over_seeds() -> None:
    mean = average([Difference(1.0, 0.3), Difference(3.0, 0.4)])
    assert (mean.value, mean.se) == pytest.approx((2.0, 0.25))


def test_dict_round_trip() -> None:
    a = estimate(grouped(torch.randn(100, 4, dtype=torch.float64)), gaussian(0, 4))
    assert FrechetEstimate.from_dict(a.to_dict()) == a
