"""Inception score, PSNR, sliced Wasserstein: against torch-fidelity or in closed form, errors against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.metrics import SlicedReference, inception_score, sliced_wasserstein
from fastsample.metrics.scores import of_means, psnr
from fastsample.metrics.sliced import project
from fastsample.metrics.statistics import GroupSums, Rows


def draw(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_inception_score_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * draw(500, 12, 0)
    theirs = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits).plain == pytest.approx(theirs, rel=1e-12)
    # its ten splits are the scores of ten tenths
    parts = [inception_score(part).plain for part in logits.split(50)]
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)["inception_score_mean"]
    assert np.mean(parts) == pytest.approx(theirs, rel=1e-12)


def test_the_inception_scores_bias_is_removed_and_its_error_right() -> None:
    """Few samples score too low; the truth is taken from very many."""
    truth = inception_score(2 * draw(200_000, 40, 1)).plain
    found = [inception_score(2 * draw(200, 40, 2 + i)) for i in range(150)]
    bias = np.mean([f.plain for f in found]) - truth
    values, errors = (np.array([getattr(f, key) for f in found]) for key in ("value", "se"))
    assert bias < -0.06
    assert abs(values.mean() - truth) < 0.4 * abs(bias)
    assert np.median(errors) == pytest.approx(values.std(ddof=1), rel=0.2)
    assert 0.88 < (np.abs(values - truth) <= 2 * errors).mean() <= 1


def test_sums_do_not_depend_on_batches_or_processes() -> None:
    x = draw(257, 3, 3)
    whole, first, second = GroupSums(3), GroupSums(3), GroupSums(3)
    whole.update(x, range(257))
    for part in torch.randperm(257, generator=torch.Generator().manual_seed(0)).split(60):
        (first if len(part) == 60 else second).update(x[part], part)
    second.reduce(lambda t: t + (first.counts if t.dtype == torch.int64 else first.sums))
    assert torch.equal(second.counts, whole.counts)
    torch.testing.assert_close(second.sums, whole.sums, rtol=1e-12, atol=1e-12)
    mean, without = whole.means()
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(without[4], x[torch.arange(257) % 20 != 4].mean(0))
    with pytest.raises(ValueError, match="first at sample index 7"):
        whole.update(torch.tensor([[1.0, math.nan, 0.0]]), range(7, 8))


def test_rows_keep_the_first_and_no_more() -> None:
    rows, x = Rows(10, 2), draw(30, 2, 4)
    for start in (20, 0, 7, 14):
        rows.update(x[start : start + 7], range(start, min(30, start + 7)))
    assert torch.equal(rows.values, x[:10].float())
    assert rows.values.nbytes == 4 * 10 * 2
    with pytest.raises(ValueError, match="first at sample index 12"):
        rows.update(torch.tensor([[math.inf, 0.0]]), range(12, 13))


def test_psnr_of_a_mean() -> None:
    assert psnr(torch.tensor([0.04])) == pytest.approx(20 * math.log10(2 / 0.2))
    assert psnr(torch.zeros(1)) == math.inf
    errors = draw(400, 1, 5).square() * 0.01
    sums = GroupSums(1)
    sums.update(errors, range(400))
    found = of_means(sums, psnr)
    assert found.value == found.plain == pytest.approx(10 * math.log10(4 / float(errors.mean())))
    # the delta method: 10 / ln 10 times the relative error of the mean
    relative = float(errors.std() / errors.mean()) / 20
    assert found.se == pytest.approx(10 / math.log(10) * relative, rel=0.3)


# -- sliced Wasserstein


@pytest.mark.parametrize(("n", "m"), [(50, 50), (60, 40), (45, 27)])
def test_sliced_distances_are_the_transport_costs_of_scipy(n: int, m: int) -> None:
    """In one dimension: an optimal assignment of copies, lcm(n, m) on both sides."""
    from scipy.optimize import linear_sum_assignment

    a, b = draw(n, 1, 6), draw(m, 1, 7) + 0.3
    copies = math.lcm(n, m)
    x, y = (v.repeat_interleave(copies // len(v), 0) for v in (a, b))
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    expected = math.sqrt(cost[rows, columns].mean())
    assert sliced_wasserstein(a, b, projections=1) == pytest.approx(expected, rel=1e-9)
    assert SlicedReference(b).distance(a).plain == pytest.approx(expected, rel=1e-9)


def test_sliced_leave_one_out_and_errors() -> None:
    y = draw(300, 4, 8)
    reference = SlicedReference(project(y, 64))
    index = torch.randperm(90, generator=torch.Generator().manual_seed(9))
    x = draw(90, 4, 10) + 0.3
    found = reference.distance(project(x, 64), index)
    assert found.value == found.plain == pytest.approx(sliced_wasserstein(x, y, 64), rel=1e-9)
    for g, value in enumerate(found.leave_one_out):
        assert value == pytest.approx(sliced_wasserstein(x[index % 20 != g], y, 64), rel=1e-9)
    repeats = [reference.distance(project(draw(150, 4, 20 + i) + 0.3, 64)) for i in range(30)]
    spread = np.std([r.value for r in repeats], ddof=1)
    assert np.median([r.se for r in repeats]) == pytest.approx(spread, rel=0.35)
    with pytest.raises(ValueError, match="30 samples are too few"):
        reference.distance(project(x[:30], 64))
