"""Plans on Gaussian data: what a table does to mean and covariance, exactly and without drawing a sample.

On data ``N(mean, variance)`` the perfect network is linear, so every state of a plan is a linear function of
its independent sources: the start, and each stream of noise. Nothing here uses the package's executor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastsample.plan import Plan
from fastsample.prediction import coefficients
from fastsample.prediction import names as predictions


@dataclass(frozen=True)
class Gaussian:
    """One-dimensional data ``x_0 ~ N(mean, variance)``."""

    mean: float = 0.7
    variance: float = 0.25

    def x0(self, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """``E[x_0 | x_t = x]`` for x written as (constant, sources...)."""
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        result = gain * x
        result[0] += self.mean * (1 - gain * alpha)
        return result

    def marginal(self, alpha: float, sigma: float) -> tuple[float, float]:
        """Mean and standard deviation of ``x_t``."""
        return alpha * self.mean, math.sqrt(alpha**2 * self.variance + sigma**2)


def states(plan: Plan, data: Gaussian, *, exact_start: bool = True) -> list[np.ndarray]:
    """Every state of a plan as (constant, coefficient of the start, coefficients of the noises...).

    The start is the marginal at its time, or with ``exact_start=False`` the noise that samplers start from.
    """
    rows, values = plan.rows, plan.values
    streams = sorted({s for row in rows for s in row.noises})
    alpha, sigma = ends_of(plan)[0]
    start = np.zeros(2 + len(streams))
    start[:2] = data.marginal(alpha, sigma) if exact_start else (0.0, sigma)
    found = [start]
    predictions: dict[int, np.ndarray] = {}
    for r, (row, v) in enumerate(zip(rows, values, strict=True)):
        x = np.zeros_like(start)
        for j, c in zip(row.states, v.a, strict=True):
            x += c * found[j]
        for k, c in zip(row.predictions, v.b, strict=True):
            x += c * predictions[k]
        for s, c in zip(row.noises, v.c, strict=True):
            x[2 + streams.index(s)] += c
        found.append(x)
        if row.evaluates:
            x0 = data.x0(x, v.alpha, v.sigma)
            eps = (x - v.alpha * x0) / v.sigma if v.sigma else np.zeros_like(x)
            predictions[r] = {
                "x0": x0,
                "eps": eps,
                "flow": eps - x0,
                "v": (v.alpha * eps - v.sigma * x0) / math.hypot(v.alpha, v.sigma),
            }[str(row.space)]
    return found


def ends_of(plan: Plan) -> tuple[tuple[float, float], tuple[float, float]]:
    """(alpha, sigma) at the first and the last time."""
    first = next(v for v in plan.values if v.t == plan.t0)
    last = plan.values[-1]
    return (first.alpha, first.sigma), (last.alpha, last.sigma)


def moments(state: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a state."""
    return float(state[0]), float(np.linalg.norm(state[1:]))


def weak_error(plan: Plan, data: Gaussian) -> tuple[float, float]:
    """Errors of mean and standard deviation at the end, the start being exact."""
    mean, deviation = moments(states(plan, data)[-1])
    true = data.marginal(*ends_of(plan)[1])
    return abs(mean - true[0]), abs(deviation - true[1])


def check_for_every_prediction(plan: Plan) -> None:
    """The same table for other prediction types differs in ``p`` and ``q`` alone: all of them are finite.

    A plan checks its own numbers when it is made. At zero signal eps and score are refused (tested apart).
    """
    for row, v in zip(plan.rows, plan.values, strict=True):
        for prediction in predictions() if row.evaluates else ():
            if v.alpha > 0 or prediction not in ("eps", "score"):
                at = (torch.tensor(c, dtype=torch.float64) for c in (v.alpha, v.sigma))
                assert all(torch.isfinite(c) for c in coefficients(prediction, *at, str(row.space)))
