"""Restart sampling: an ODE solver that goes back to more noise a few times and comes down again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..builder import Builder, Expr, intervals
from ..process import Process
from .exponential import reachable, update
from .first_order import step
from .registry import Claim, register

RHO = 7.0  # the spacing of the points within a restart (Karras et al. 2022, eq. 5)

# t_min, t_max, K, N of one restart, and what the paper uses on CIFAR-10 (table 6)
Restart = tuple[float, float, int, int]
CIFAR10: tuple[Restart, ...] = ((0.06, 0.30, 2, 3),)


@register("restart", Claim(order=None, stochastic=True))
def restart(
    b: Builder,
    grid: Tensor,
    restarts: Sequence[Restart] = CIFAR10,
    order: int = 2,
    s_noise: float = 1.0,
    space: str | None = None,
) -> None:
    """Restart sampling (Xu et al. 2023, algorithm 1 and eq. 3, 4) around Heun's or Euler's method.

    The main steps follow the grid. On arrival at the grid point nearest to ``t_min``, noise is added up to
    ``t_max`` and the ODE solved down again by ``N - 1`` steps, ``K`` times. With Heun a restart costs ``2 K
    (N - 1)`` evaluations (one less each time where it ends without noise).

    Args:
        b, grid: the builder and the times.
        restarts: (t_min, t_max, K, N) each, in the order in which they happen: noise levels ``sigma / alpha``
            (EDM's time), how often, and the number of points from t_max to t_min.
        order: of the ODE solver: 2 is Heun, 1 is Euler.
        s_noise: factor of the noise added.
        space: whose derivative Heun averages, "eps", "flow" or "v"; None is "eps" (in ``sigma / alpha``, the
            paper's), but "flow" on processes that start without signal.

    Raises:
        ValueError: a restart that cannot be used, naming it.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order!r} must be 1 (Euler) or 2 (Heun)")
    if not 0 <= s_noise < math.inf:
        raise ValueError(f"s_noise={s_noise!r} must be a number of at least 0")
    if not bool(b.lam(grid[-1]) > b.lam(grid[0])):
        raise ValueError("restart draws noise and cannot run towards more noise; reverse the grid")
    if space is None:
        space = "eps" if bool(b.alpha(b.process.t_start) > 0) else "flow"
    elif space not in ("eps", "flow", "v"):
        raise ValueError(f"space={space!r} must be 'eps', 'flow' or 'v'")
    planned = _plan(b.process, grid, restarts)
    x = b.x
    for i, (s, t) in enumerate(intervals(grid)):
        x = _ode(b, x, s, t, order, space)
        for times, repeats in planned.get(i + 1, ()):
            for _ in range(repeats):
                top = times[0]
                signal = b.alpha(top) / b.alpha(t)
                added = torch.sqrt(b.sigma(top) ** 2 - (signal * b.sigma(t)) ** 2)
                x = b.state(signal * x + s_noise * added * b.noise(), top)
                for u, v in intervals(times):
                    x = _ode(b, x, u, v, order, space)


def _plan(process: Process, grid: Tensor, restarts: Sequence[Restart]) -> dict[int, list[tuple[Tensor, int]]]:
    """For each grid index, the times of the restarts that happen there and their numbers of repetitions."""
    levels = [float(level) for level in process.rho(grid.detach())]
    highest = float(process.rho(process.t_start))
    planned: dict[int, list[tuple[Tensor, int]]] = {}
    for entry in restarts:
        if len(entry) != 4:
            raise ValueError(f"restarts has {entry!r}; give (t_min, t_max, K, N), such as (0.06, 0.3, 2, 3)")
        t_min, t_max, repeats, points = entry
        if not 0 <= t_min < t_max <= highest or int(repeats) != repeats or int(points) != points:
            raise ValueError(
                f"restarts has {entry!r}: need noise levels 0 <= t_min < t_max <= {highest:g} and whole K, N"
            )
        if repeats < 1 or points < 2:
            raise ValueError(f"restarts has {entry!r}: need K >= 1 repetitions and N >= 2 points")
        at = min(range(1, len(levels)), key=lambda i: abs(levels[i] - t_min))
        if not levels[at] < t_max:
            raise ValueError(
                f"restarts has {entry!r}, but the grid point nearest to t_min has noise {levels[at]:g}, "
                "not below t_max; use a grid that comes closer to t_min, or a higher t_max"
            )
        ramp = torch.linspace(0.0, 1.0, int(points), dtype=torch.float64)
        high, low = t_max ** (1 / RHO), process.rho(grid[at]) ** (1 / RHO)
        inner = process.snap(process.t_of_rho((high + ramp[:-1] * (low - high)) ** RHO))
        if process.levels is not None:  # points that fall on the same level are one point
            apart = process.lam(inner).diff(append=process.lam(grid[at : at + 1].detach())) > 0
            inner = inner[apart]
            if inner.numel() == 0:
                raise ValueError(f"restarts has {entry!r}: the network knows no time between t_min and t_max")
        planned.setdefault(at, []).append((torch.cat([inner, grid[at : at + 1]]), int(repeats)))
    return planned


def _ode(b: Builder, x: Expr, s: Tensor, t: Tensor, order: int, space: str) -> Expr:
    """One step of Euler or Heun; Euler where a step has an end without noise or without signal."""
    if not reachable(b, space, s):
        return b.state(step(b, x, s, t), t)
    m = b.predict(x, space)
    euler = b.state(update(b, space, "lam", x, s, t, [(s, m)]), t)
    if order == 1 or not bool(torch.isfinite(b.lam(t))):
        return euler
    average = 0.5 * (m + b.predict(euler, space))
    return b.state(update(b, space, "lam", x, s, t, [(s, average)]), t)
