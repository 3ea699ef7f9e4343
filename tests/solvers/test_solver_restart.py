"""Restart sampling against its algorithm written out, and its rules for where and how often."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers_gaussian import Gaussian, check_for_every_prediction, moments, states
from torch import Tensor

import fastsample as fs
from fastsample import solvers
from fastsample.executor import Run, execute
from fastsample.plan import Plan
from fastsample.process import Process

EDM = fs.EDM()
VP = fs.VP.linear()


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth x0-network in EDM's process."""
    level = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh((x + 0.3 * x.roll(1, -1)) / (1 + level)) + 0.1 * torch.sin(x / (1 + level))


def drawn(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def karras(steps: int, high: float, low: float) -> list[float]:
    return [
        (high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(steps)
    ]


def heun(x: Tensor, times: list[float], order: int) -> Tensor:
    """Karras et al. 2022, algorithm 1, without the second order where it arrives at zero."""
    for s, t in itertools.pairwise(times):
        d = (x - denoise(x, torch.full((len(x),), s, dtype=x.dtype))) / s
        euler = x + (t - s) * d
        if t > 0 and order == 2:
            d = (d + (euler - denoise(euler, torch.full((len(x),), t, dtype=x.dtype))) / t) / 2
        x = x + (t - s) * d
    return x


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "restarts", [[(0.06, 0.30, 2, 3)], [(1.09, 1.92, 1, 4), (0.06, 0.30, 3, 3), (0.06, 0.2, 1, 2)]], ids=len
)
def test_edm(order: int, restarts: list[tuple[float, float, int, int]]) -> None:
    """Xu et al. 2023, algorithm 1, in EDM's coordinates: 18 steps of Heun and the restarts."""
    times = [*karras(18, 80.0, 0.002), 0.0]
    noises = drawn(20)
    plan = solvers.build("restart", EDM, 18, prediction="x0", restarts=restarts, order=order, s_noise=1.003)
    bound = fs.wrap(denoise, EDM, "x0").bind(2, {}, torch.device("cpu"))
    start = 80.0 * noises[-1]
    ours = execute(plan, start, Run(bound, lambda stream, like: noises[stream - 1]))

    fresh = iter(noises)
    x = start
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        x = heun(x, [s, t], order)
        for t_min, t_max, repeats, points in restarts:
            nearest = min(range(1, len(times)), key=lambda j: abs(times[j] - t_min))
            for _ in range(repeats if nearest == i + 1 else 0):
                x = x + 1.003 * math.sqrt(t_max**2 - t**2) * next(fresh)
                x = heun(x, karras(points, t_max, t), order)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
    inner = sum(repeats * (points - 1) for _, _, repeats, points in restarts)
    assert plan.nfe == (2 * 18 - 1 + 2 * inner if order == 2 else 18 + inner)


def test_paper_count() -> None:
    """18 main steps and the default restart, (0.06, 0.30) twice through 3 points: 43 evaluations."""
    assert solvers.build("restart", EDM, 18, prediction="x0").nfe == 43


@pytest.mark.parametrize("process", [VP, EDM, fs.Flow(), fs.TrigFlow()], ids=lambda p: f"{p!r:.12}")
def test_noise_is_consistent_at_every_row(process: Process) -> None:
    """On data of one point every state has exactly the marginal of its time, restarts included."""
    plan = solvers.build("restart", process, 9, prediction="v", end="sigma_min")
    for state, v in zip(states(plan, Gaussian(0.7, 0.0))[1:], plan.values, strict=True):
        mean, deviation = moments(state)
        assert mean == pytest.approx(v.alpha * 0.7, abs=1e-10 * (1 + v.sigma))
        assert deviation == pytest.approx(v.sigma, rel=1e-9)


def test_a_restart_mends_errors() -> None:
    """On Gaussian data restarts contract the error that a coarse main grid left."""
    data = Gaussian(0.0, 0.25)
    plain = moments(states(solvers.build("heun", EDM, 6, prediction="x0"), data)[-1])[1]
    again = solvers.build("restart", EDM, 6, prediction="x0", restarts=[(0.06, 2.0, 4, 9)])
    assert abs(moments(states(again, data)[-1])[1] - 0.5) < 0.5 * abs(plain - 0.5)


PROCESSES: list[Process] = [
    VP,
    fs.VP.cosine(),
    VP.rescaled_zero_snr(),
    fs.VE(),
    EDM,
    fs.Flow(),
    fs.Flow(3.0),
    fs.TrigFlow(),
    VP.quantized(torch.arange(1000)),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p!r:.34}")
def test_finite_everywhere(process: Process) -> None:
    for end, steps, order in itertools.product(("zero", "sigma_min"), (1, 2, 5, 50), (1, 2)):
        plan = solvers.build("restart", process, steps, prediction="v", end=end, order=order)
        check_for_every_prediction(plan)
        assert plan.stochastic
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order=3"),
        ({"s_noise": -1.0}, "s_noise=-1.0"),
        ({"space": "x0"}, "space='x0'"),
        ({"restarts": [(0.3, 0.06, 2, 3)]}, "t_min < t_max"),
        ({"restarts": [(0.06, 1e5, 2, 3)]}, "t_max <= 80"),
        ({"restarts": [(0.06, 0.3, 0, 3)]}, "K >= 1"),
        ({"restarts": [(0.06, 0.3, 2, 1)]}, "N >= 2"),
        ({"restarts": [(0.06, 0.3)]}, "give \\(t_min, t_max, K, N\\)"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.build("restart", EDM, 8, prediction="x0", **options)


def test_a_grid_without_a_point_below_t_max_is_refused() -> None:
    with pytest.raises(ValueError, match="nearest to t_min has noise 1, not below"):
        solvers.build("restart", EDM, grid=[80.0, 10.0, 1.0], prediction="x0")
    with pytest.raises(ValueError, match="towards more noise"):
        solvers.build("restart", EDM, grid=[0.1, 1.0], prediction="x0")
