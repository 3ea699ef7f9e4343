"""``match=``: a Frechet distance as least squares, and plans whose samples have the data's moments."""

from __future__ import annotations

import pytest
import torch
from helpers_tuning import QUICK, model
from torch import Tensor

import fastsample as fs
from fastsample.metrics import Gaussian, frechet_distance
from fastsample.tuning import Moments
from fastsample.tuning.moments import summed_changes, summed_moments


def gaussian(seed: int, d: int = 5) -> Gaussian:
    """A covariance with eigenvalues over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scale = torch.logspace(-1, 1, d, dtype=torch.float64)
    return Gaussian(torch.randn(d, generator=generator, dtype=torch.float64), q * scale @ q.T)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_squares_are_the_frechet_distance_near_the_target(seed: int) -> None:
    target = gaussian(seed)
    match = Moments(lambda x: x, target.mean, target.cov)
    generator = torch.Generator().manual_seed(seed + 10)
    direction = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    shift = torch.randn(5, generator=generator, dtype=torch.float64)
    errors = []
    for size in (1e-2, 5e-3):
        near = Gaussian(target.mean + size * shift, target.cov + size * 0.05 * (direction + direction.T))
        n = 1000.0
        second = near.cov + torch.outer(near.mean, near.mean)
        sums = torch.cat([torch.tensor([n]).double(), n * near.mean, n * second.flatten()])
        squares = float(match.residual(sums).square().sum())
        errors.append(abs(squares / frechet_distance(near, target) - 1))
    assert errors[1] < 0.01
    assert errors[1] < 0.7 * errors[0]  # the difference is of higher order


def test_the_derivative_is_that_of_the_squares() -> None:
    target = gaussian(3)
    match = Moments(lambda x: x, target.mean, target.cov)
    generator = torch.Generator().manual_seed(0)
    f, df = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    sums = summed_moments(f)
    (column,) = match.jacobian(sums, summed_changes(f, df)[None])
    h = 1e-6
    ahead, behind = (match.residual(summed_moments(f + sign * h * df)) for sign in (1, -1))
    torch.testing.assert_close(column, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


def test_batches_add_up() -> None:
    f = torch.randn(30, 5, dtype=torch.float64)
    torch.testing.assert_close(summed_moments(f), summed_moments(f[:11]) + summed_moments(f[11:]))


def features(x: Tensor) -> Tensor:
    """Not only the samples themselves: their moments do not follow from two means."""
    return torch.cat([x.flatten(1), x.flatten(1).tanh()], dim=1)


def test_a_matched_plan_has_the_moments() -> None:
    """Nearer in distribution on new noise than the plan fitted to the error alone, and a better plan than its start."""
    denoiser = model()
    fine = fs.Sampler(denoiser, steps=100)(n=4000, seed=5)
    shifted = features(1.05 * fine)  # data that the model's own solution misses a little
    target = Gaussian(shifted.mean(0).double(), torch.cov(shifted.T).double())
    quick = QUICK | {"trajectories": 512, "heldout": 256, "iterations": 12}
    match = Moments(features, target.mean, target.cov)
    plain, matched = fs.tune(denoiser, 3, **quick), fs.tune(denoiser, 3, match=match, **quick)

    def distance(plan: fs.Plan) -> float:
        f = features(fs.Sampler(denoiser, plan=plan)(n=4000, seed=9)).double()
        return frechet_distance(Gaussian(f.mean(0), torch.cov(f.T)), target)

    assert distance(matched) < 0.5 * distance(plain)
    record = matched.options["record"]
    assert record["heldout_moments"] < 0.5 * record["start_moments"]
    assert record["heldout_rmse"] < record["start_rmse"]


def test_the_start_knows_of_the_moments() -> None:
    """Where the data is as one solver's samples are, the fit begins with that solver, however large its error."""
    denoiser = model()
    coarse = features(fs.Sampler(denoiser, "ddim", 3)(n=4000, seed=5)).double()
    settings = QUICK | {"trajectories": 512, "iterations": 1}
    match = Moments(features, coarse.mean(0), torch.cov(coarse.T))
    plain, matched = fs.tune(denoiser, 3, **settings), fs.tune(denoiser, 3, match=match, **settings)
    assert plain.options["start"] != "ddim"
    assert matched.options["start"] == "ddim"
    slight = Moments(features, match.mean, match.cov, weight=1e-6)
    assert fs.tune(denoiser, 3, match=slight, **settings).options["start"] == plain.options["start"]


def test_what_cannot_be_matched_is_refused() -> None:
    target = gaussian(0)
    with pytest.raises(ValueError, match="use one of them"):
        fs.tune(model(), 3, relax=0.1, match=Moments(features, target.mean, target.cov), **QUICK)
    with pytest.raises(ValueError, match=r"gave shape \(\d+, 4\).* the mean has 5 entries"):
        fs.tune(model(), 3, match=Moments(features, target.mean, target.cov), **QUICK)
    with pytest.raises(ValueError, match="cov \\(d, d\\) are needed"):
        Moments(features, target.mean, target.cov[:3])
    with pytest.raises(ValueError, match="more than 512"):
        Moments(features, torch.zeros(600), torch.eye(600))
    with pytest.raises(ValueError, match="weight=0"):
        Moments(features, target.mean, target.cov, weight=0)
