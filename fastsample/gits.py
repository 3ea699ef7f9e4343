"""Grids fitted to a model without training: where its trajectories bend, steps are short.

times = fs.grids.gits(denoiser, steps=8, sample_shape=(3, 32, 32))
sampler = fs.Sampler(denoiser, "dpmpp_2m", grid=times)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import grids
from .denoiser import Denoiser, select
from .errors import unknown
from .executor import Step
from .noise import normal
from .sampler import Sampler

METRICS = ("end", "l2")


def fit(
    denoiser: Denoiser,
    steps: int,
    sample_shape: Sequence[int] | None = None,
    *,
    n: int = 32,
    fine: int = 64,
    grid: grids.Grid | None = None,
    start: float | None = None,
    end: str = "zero",
    metric: str = "end",
    order: int = 2,
    coeff: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    **conditions: Any,
) -> Tensor:
    """A grid by dynamic programming over Euler steps (GITS: Chen et al. 2024, section 4 and algorithm 1).

    A few trajectories are followed on a fine grid. The cost of a long step between two of its points is the
    distance between where Euler's step lands and where the trajectory is; the path of ``steps`` steps with
    the least total cost is the result. ``n * fine`` evaluations, once for a model and a number of steps.

    Args:
        denoiser: the model.
        steps: number of intervals of the result.
        sample_shape: of one sample, where the denoiser does not know it.
        n: number of trajectories.
        fine: number of intervals of the fine grid.
        grid: the fine grid; by default "power", or the process's own where that is not uniform in time.
        start, end: as for :func:`fastsample.grids.make`.
        metric: "end" weighs the distance by how far it still moves the end of the trajectory, which for data
            of standard deviation d is ``d / sqrt(d^2 + rho^2)``; "l2" does not (the paper's), and lets the
            errors of a network at very high noise decide.
        order: of the solver that the grid is for: a local error goes as the Euler error to the power of
            ``(order + 1) / 2``. 1 is the paper's.
        coeff: factor on the costs of each next step (the paper's gamma, 1.15 there).
        seed: of the noise.
        batch_size: trajectories at once.
        conditions: handed to the network; tensors with one value a sample need ``n`` of them.

    Returns:
        Times, float64 (steps + 1,), a grid for any solver.

    Raises:
        ValueError: an argument that cannot be used; the message names it.
    """
    process = denoiser.process
    shape = tuple(sample_shape) if sample_shape is not None else denoiser.sample_shape
    if shape is None:
        raise ValueError("give sample_shape=, the shape of one sample; this denoiser does not know it")
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    for name, value in (("n", n), ("order", order), ("batch_size", batch_size), ("steps", steps)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not coeff > 0:
        raise ValueError(f"coeff={coeff!r} must be positive")
    if grid is None:
        grid = "power" if process.grid == "uniform" else process.grid
    times = grids.make(grid, process, fine, start=start, end=end)
    if times.numel() - 1 < steps:
        raise ValueError(
            f"steps={steps} exceeds the {times.numel() - 1} intervals of the fine grid; raise fine="
        )
    if not bool(process.lam(times[-1]) > process.lam(times[0])):
        raise ValueError("the fine grid must go from noise to data")
    total = torch.zeros(times.numel(), times.numel(), dtype=torch.float64)
    for first in range(0, n, batch_size):
        samples = slice(first, min(n, first + batch_size))
        index = torch.arange(samples.start, samples.stop, device=denoiser.device)
        noise = normal((index.numel(), *shape), seed, index)
        total += _costs(denoiser, times, noise, metric, select(conditions, samples, n))
    return grids.check(times[_shortest((total / n).numpy() ** ((order + 1) / 2), steps, coeff)], process)


def _costs(
    denoiser: Denoiser, times: Tensor, noise: Tensor, metric: str, conditions: dict[str, Any]
) -> Tensor:
    """Summed over the samples, the cost of Euler's step from each point (row) to each later one (column)."""
    states: list[Tensor] = []
    clean: list[Tensor] = []

    def record(step: Step) -> None:
        states.append(step.x.double().flatten(1).cpu())
        clean.append(step.x0.double().flatten(1).cpu())

    sampler = Sampler(denoiser, "exp_adams", grid=times, order=2)
    last = sampler(noise=noise, callback=record, **conditions)
    process = denoiser.process
    alpha, sigma = process.alpha(times), process.sigma(times)
    rho = sigma / alpha
    # in y = x / alpha, where Euler's steps are straight lines; the first point is no step's target
    reached = torch.stack([*states[1:], last.double().flatten(1).cpu()]) / alpha[1:, None, None]
    spread = float(reached[-1].std())
    weight = spread / torch.sqrt(spread**2 + rho**2) if metric == "end" else torch.ones_like(rho)
    costs = torch.zeros(times.numel(), times.numel(), dtype=torch.float64)
    for i, (x, x0) in enumerate(zip(states, clean, strict=True)):
        eps = (x - alpha[i] * x0) / sigma[i]
        landed = x0 + rho[i + 1 :, None, None] * eps
        distance = (landed - reached[i:]).square().mean(dim=2).sqrt().sum(dim=1)
        costs[i, i + 1 :] = weight[i + 1 :] * distance
    return costs


def _shortest(costs: np.ndarray, steps: int, coeff: float) -> list[int]:
    """The path of so many steps from the first to the last point with the least ``sum_k coeff^k cost_k``."""
    last = len(costs) - 1
    best = np.full((steps + 1, last + 1), np.inf)  # best[k, i]: from i to the end by k steps
    best[0, last] = 0.0
    choice = np.zeros((steps + 1, last + 1), dtype=np.int64)
    for k in range(1, steps + 1):
        for i in range(last):
            through = costs[i, i + 1 :] + coeff * best[k - 1, i + 1 :]
            choice[k, i] = i + 1 + int(np.argmin(through))
            best[k, i] = through.min()
    path = [0]
    for k in range(steps, 0, -1):
        path.append(int(choice[k, path[-1]]))
    return path
