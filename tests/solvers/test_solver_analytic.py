"""Analytic-DPM: its variance is exact on Gaussian data, its statistics are what they say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers_gaussian import Gaussian, check_for_every_prediction, moments, states
from torch import Tensor

import fastsample as fs
from fastsample import solvers
from fastsample.plan import Plan
from fastsample.process import Process
from fastsample.solvers.analytic import Statistics, estimate

NAMES = ("analytic_ddpm", "analytic_ddim")
VP = fs.VP.linear()
DATA = Gaussian(0.3, 0.25)
PROCESSES: list[Process] = [
    VP,
    fs.VP.cosine(),
    VP.rescaled_zero_snr(),
    fs.VE(),
    fs.EDM(),
    fs.Flow(),
    fs.TrigFlow(),
    VP.quantized(torch.arange(1000)),
]


def network(process: Process) -> fs.Denoiser:
    """The perfect v-network of Gaussian data, elementwise."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t[:1].double()).to(x) for f in (process.alpha, process.sigma))
        gain = alpha * DATA.variance / (alpha**2 * DATA.variance + sigma**2)
        x0 = DATA.mean + gain * (x - alpha * DATA.mean)
        # eps = (x - alpha x0) / sigma, and where sigma = 0 nothing depends on it
        eps = torch.where(sigma > 0, (x - alpha * x0) / sigma, torch.zeros_like(x))
        return alpha * eps - sigma * x0

    return fs.wrap(net, process, "v", sample_shape=(4, 8))


def exact(process: Process, grid: Tensor) -> Statistics:
    """What a perfect network's statistics converge to: ``gamma = 1 - alpha^2 Var(x_0 | x_t) / sigma^2``."""
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    variance = DATA.variance * sigma**2 / (alpha**2 * DATA.variance + sigma**2)
    gamma = 1 - alpha**2 * variance / sigma**2
    return Statistics(
        tuple(grid.tolist()), tuple(gamma.tolist()), tuple(variance.tolist()), process.fingerprint, 1
    )


@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow()], ids=lambda p: f"{p!r:.12}")
@pytest.mark.parametrize(("name", "steps"), itertools.product(NAMES, [1, 3, 8]))
def test_exact_on_gaussian_data(name: str, steps: int, process: Process) -> None:
    """With the optimal variance every state has the true deviation after any number of steps."""
    grid = fs.grids.make("logsnr", process, steps, end="sigma_min")
    plan = solvers.build(
        name,
        process,
        grid=grid,
        prediction="v",
        statistics=exact(process, grid[:-1]),
        clip_noise=math.inf,
        low=-9.0,
        high=9.0,
    )
    for state, v in zip(states(plan, DATA)[1:], plan.values, strict=True):
        mean, deviation = DATA.marginal(v.alpha, v.sigma)
        assert moments(state) == (pytest.approx(mean, abs=1e-9), pytest.approx(deviation, rel=1e-9))


@pytest.mark.parametrize("process", [VP, fs.Flow()], ids=lambda p: f"{p!r:.12}")
@pytest.mark.parametrize("own", [True, False])
def test_estimate(process: Process, own: bool) -> None:
    """The estimates are within their sampling error of the truth, from data or the model's own samples."""
    generator = torch.Generator().manual_seed(0)
    data = DATA.mean + 0.5 * torch.randn(512, 4, 8, generator=generator)
    made = estimate(network(process), 12, None if own else data, n=512, steps=200, seed=1, batch_size=200)
    true = exact(process, torch.tensor(made.times, dtype=torch.float64))
    assert made.samples == 512
    for gamma, mse, g, v in zip(made.gamma, made.mse, true.gamma, true.mse, strict=True):
        # a mean of 16384 squares of unit normals has standard deviation 0.011
        assert gamma == pytest.approx(g, rel=0.05)
        assert mse == pytest.approx(v, rel=0.06)


def test_estimate_does_not_depend_on_the_batch_size() -> None:
    data = DATA.mean + 0.5 * torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(0))
    one, other = (estimate(network(VP), 5, data, batch_size=size) for size in (10, 3))
    assert one.gamma == pytest.approx(other.gamma, rel=1e-6)


def test_between_the_times() -> None:
    """A coarse table serves a fine grid: the variance is interpolated to a few percent."""
    coarse = exact(VP, fs.grids.make("logsnr", VP, 24, end="sigma_min"))
    for t in torch.linspace(1.0, 998.0, 40, dtype=torch.float64):
        assert coarse.variance(VP, t) == pytest.approx(exact(VP, t[None]).mse[0], rel=0.03)


def test_json(tmp_path: Path) -> None:
    known = exact(VP, torch.tensor([900.0, 500.0, 10.0], dtype=torch.float64))
    path = tmp_path / "statistics.json"
    known.save(path)
    assert Statistics.load(path) == known
    plans = (
        solvers.build("analytic_ddpm", VP, grid=[900.0, 500.0, 10.0, 0.0], statistics=given)
        for given in (known, str(path))
    )
    assert next(plans).values == next(plans).values
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "gamma"}))
    with pytest.raises(ValueError, match=r"statistics\.json: not statistics .*'gamma'"):
        Statistics.load(path)


def test_noise_before_the_last_step_is_clipped() -> None:
    """Bao et al. 2022: there ``E |noise|`` is at most y / 255 of the data's range, and none in the last step."""
    grid = torch.tensor([900.0, 600.0, 300.0, -1.0], dtype=torch.float64)
    plan = solvers.build("analytic_ddpm", VP, grid=grid, statistics=exact(VP, grid[:-1]), clip_noise=1.0)
    first, second, third = (v.c for v in plan.values[1:])
    assert first[0] > 0.1
    assert second[0] * math.sqrt(2 / math.pi) == pytest.approx(2 / 255)
    assert third == ()


def test_the_variance_is_bounded_by_the_range() -> None:
    """Data in [low, high] cannot vary by more than a quarter of the squared range (corollary 1)."""
    grid = torch.tensor([990.0, 500.0, 100.0, -1.0], dtype=torch.float64)
    wild = dataclasses.replace(exact(VP, grid[:-1]), gamma=(-1e6, -1e6, -1e6))
    bounded = dataclasses.replace(
        wild, gamma=tuple(1 - 1.0 / float(VP.rho(t)) ** 2 for t in grid[:-1])
    )  # Var(x_0) = 1
    a, b = (solvers.build("analytic_ddim", VP, grid=grid, statistics=s) for s in (wild, bounded))
    assert a.values[1].c == pytest.approx(b.values[1].c)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p!r:.34}")
@pytest.mark.parametrize("name", NAMES)
def test_finite_everywhere(name: str, process: Process) -> None:
    known = estimate(network(process), 20, torch.full((2, 4, 8), 0.5))
    for end, steps in itertools.product(("zero", "sigma_min"), (1, 2, 5, 50)):
        plan = solvers.build(name, process, steps, prediction="v", end=end, statistics=known)
        check_for_every_prediction(plan)
        assert Plan.from_json(plan.to_json()) == plan
    sampler = fs.Sampler(network(process), name, steps=6, statistics=known)
    assert torch.isfinite(sampler(n=3)).all()


def test_errors() -> None:
    known = exact(VP, torch.tensor([900.0, 100.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"needs statistics=.*analytic\.estimate"):
        solvers.build("analytic_ddpm", VP, 5)
    with pytest.raises(ValueError, match="another noise process"):
        solvers.build("analytic_ddpm", fs.VP.cosine(), 5, statistics=known)
    with pytest.raises(ValueError, match="from t=900 to t=100, but the grid has t=999"):
        solvers.build("analytic_ddpm", VP, 5, statistics=known)
    with pytest.raises(ValueError, match=r"low=1\.0 must be below high=0\.0"):
        solvers.build("analytic_ddpm", VP, grid=[900, 100, 0], statistics=known, low=1.0, high=0.0)
    with pytest.raises(ValueError, match="strictly towards less noise"):
        estimate(network(VP), [10.0, 500.0], torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="sample_shape="):
        estimate(network(VP).replace(sample_shape=None), 5)
