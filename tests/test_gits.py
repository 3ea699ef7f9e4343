"""Grids fitted to a model: the dynamic programme, what it gains, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample import zoo
from fastsample.gits import _shortest, fit
from fastsample.process import Process

VP = fs.VP.linear()
PROCESSES: list[tuple[Process, str]] = [
    (VP, "eps"),
    (VP.rescaled_zero_snr(), "v"),
    (fs.VE(), "score"),
    (fs.EDM(), "x0"),
    (fs.Flow(3.0), "flow"),
    (fs.TrigFlow(), "v"),
]


def mixture(process: Process = VP, prediction: str = "eps", **settings: Any) -> fs.Denoiser:
    """Data at -1 and +1 of standard deviation 0.2, element by element."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (f(t.double()).to(x).reshape(shape) for f in (process.alpha, process.sigma))
        spread = 0.04 * alpha**2 + sigma**2
        mean = torch.tanh(alpha * x / spread)
        x0 = mean + 0.04 * alpha / spread * (x - alpha * mean)
        if prediction == "x0":
            return x0
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0, "flow": eps - x0}[
            prediction
        ]

    return fs.wrap(net, process, prediction, sample_shape=(4, 4), **settings)


@pytest.mark.parametrize(("steps", "coeff"), itertools.product([1, 2, 4, 7], [1.0, 1.15]))
def test_the_path_is_the_shortest(steps: int, coeff: float) -> None:
    """Against all paths."""
    costs = np.triu(np.random.default_rng(steps).random((8, 8)), 1)
    best = min(
        ([0, *inner, 7] for inner in itertools.combinations(range(1, 7), steps - 1)),
        key=lambda path: sum(coeff**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(path))),
    )
    assert _shortest(costs, steps, coeff) == best


@pytest.mark.parametrize(("process", "prediction"), PROCESSES, ids=lambda v: f"{v!r:.20}")
@pytest.mark.parametrize("metric", ["end", "l2"])
def test_a_plain_grid_for_any_process(process: Process, prediction: str, metric: str) -> None:
    model = mixture(process, prediction)
    for end, last in (("zero", process.t_zero), ("sigma_min", process.t_end)):
        times = fs.grids.gits(model, 5, n=4, fine=24, end=end, metric=metric)
        assert times.shape == (6,)
        assert (float(times[0]), float(times[-1])) == (process.t_start, last)
        assert torch.equal(times, fs.grids.check(times, process))
        samples = fs.Sampler(model, "dpmpp_2m", grid=times)(n=3)
        assert torch.isfinite(samples).all()


@pytest.mark.parametrize("steps", [5, 8])
def test_better_than_the_named_grids(steps: int) -> None:
    """On the digits mixture, on other samples than it was fitted to, for order 1 and for order 3."""
    model = zoo.load("digits-mixture")
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    true = fs.Sampler(model, "exp_adams", 150, order=3, corrector=True, end="sigma_min", grid="power")(
        noise=x
    )
    fitted = fit(model, steps, end="sigma_min")
    for solver in ("euler", "unipc"):

        def error(grid: Any, chosen: str = solver, **options: Any) -> float:
            result = fs.Sampler(model, chosen, grid=grid, **options)(noise=x)
            return float((result - true).square().mean().sqrt())

        names = ("uniform", "power", "logsnr", "karras")
        assert error(fitted) < min(error(name, steps=steps, end="sigma_min") for name in names)


def test_the_same_for_any_batch_size_and_seeded() -> None:
    model = mixture()
    one = fit(model, 6, n=10, batch_size=10)
    assert torch.equal(one, fit(model, 6, n=10, batch_size=3))
    assert not torch.equal(fit(model, 6, n=1, seed=0), fit(model, 6, n=1, seed=1))


def test_conditions_and_quantized_times() -> None:
    def net(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert labels.shape == (len(x),)
        assert t.dtype == torch.int64
        return mixture().net(x, t)

    model = fs.wrap(net, VP, "eps", quantize=True, sample_shape=(4, 4))
    times = fit(model, 4, n=6, batch_size=4, labels=torch.arange(6))
    assert torch.equal(times, times.round())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 65}, "steps=65 exceeds the 64 intervals"),
        ({"n": 0}, "n=0"),
        ({"metric": "l3"}, "metric='l3'"),
        ({"order": 0}, "order=0"),
        ({"coeff": 0.0}, "coeff=0.0"),
        ({"grid": [0.0, 500.0, 999.0], "steps": 1}, "from noise to data"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(mixture(), **{"steps": 5, **options})


def test_without_a_shape() -> None:
    with pytest.raises(ValueError, match="sample_shape="):
        fit(mixture().replace(sample_shape=None), 5)
