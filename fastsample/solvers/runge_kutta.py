"""Two-stage Runge-Kutta samplers: Heun (EDM) and DPM2, with EDM's churn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..builder import Builder, Expr, intervals
from ..errors import unknown
from .dpm import finite
from .exponential import reachable, update
from .first_order import step
from .registry import Claim, register

_SPACES = ("eps", "v", "flow")


@register("heun", Claim(order=2, moments="exact", space="eps", variable="rho"), grid="karras")
def heun(
    b: Builder,
    grid: Tensor,
    space: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> None:
    """Heun's method (Karras et al. 2022, algorithm 1; with ``s_churn`` algorithm 2).

    ``2 steps - 1`` evaluations to zero noise: the last step is Euler's.

    Args:
        b, grid: the builder and the times.
        space: whose derivative is averaged: "eps" (in ``sigma / alpha``, EDM's), "flow" (in the flow's own
            time) or "v" (in the angle). None is "eps", but "flow" for processes that start without signal,
            where ``sigma / alpha`` is infinite.
        s_churn, s_tmin, s_tmax, s_noise: EDM's stochasticity, in units of ``sigma / alpha``; the raised noise
            level stays within the process's times.

    Raises:
        ValueError: an unknown space, or churn settings that cannot be used.
    """
    if space is None:
        space = "eps" if bool(b.alpha(b.process.t_start) > 0) else "flow"
    if space not in _SPACES:
        raise unknown("space", space, _SPACES)
    gamma = _gamma(s_churn, s_noise, grid.numel() - 1)
    x = b.x
    for s, t in intervals(grid):
        x, s = _churn(b, x, s, t, gamma, s_tmin, s_tmax, s_noise)
        if not reachable(b, space, s):
            x = b.state(step(b, x, s, t), t)
            continue
        m = b.predict(x, space)
        euler = b.state(_step(b, space, x, s, t, m), t)
        if not finite(b, t):
            x = euler
            continue
        x = b.state(_step(b, space, x, s, t, 0.5 * (m + b.predict(euler, space))), t)


@register("dpm_2", Claim(order=2, moments="asymptotic", space="eps", variable="rho"), grid="karras")
def dpm_2(
    b: Builder,
    grid: Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> None:
    """k-diffusion's ``sample_dpm_2``: the midpoint rule in ``sigma / alpha``, its stage at the geometric
    mean.

    ``2 steps - 1`` evaluations to zero noise: the last step is Euler's.

    Args:
        b, grid: the builder and the times.
        s_churn, s_tmin, s_tmax, s_noise: as for :func:`heun`.

    Raises:
        ValueError: churn settings that cannot be used.
    """
    gamma = _gamma(s_churn, s_noise, grid.numel() - 1)
    x = b.x
    for s, t in intervals(grid):
        x, s = _churn(b, x, s, t, gamma, s_tmin, s_tmax, s_noise)
        if not finite(b, s, t):
            x = b.state(step(b, x, s, t), t)
            continue
        m = b.eps(x)
        middle = b.process.stage((b.lam(s) + b.lam(t)) / 2)
        m = b.eps(b.state(_step(b, "eps", x, s, middle, m), middle))
        x = b.state(_step(b, "eps", x, s, t, m), t)


def _step(b: Builder, space: str, x: Expr, s: Tensor, t: Tensor, m: Expr) -> Expr:
    """The exact step for a constant prediction."""
    return update(b, space, "lam", x, s, t, [(s, m)])


def _gamma(s_churn: float, s_noise: float, steps: int) -> float:
    """The relative rise of the noise level in each churned step (Karras et al. 2022, algorithm 2, line 2)."""
    if not s_churn >= 0:
        raise ValueError(f"s_churn={s_churn!r} must be at least 0")
    if not s_noise >= 0:
        raise ValueError(f"s_noise={s_noise!r} must be at least 0; 1 keeps the noise level consistent")
    return min(s_churn / steps, math.sqrt(2) - 1)


def _churn(
    b: Builder, x: Expr, s: Tensor, t: Tensor, gamma: float, low: float, high: float, s_noise: float
) -> tuple[Expr, Tensor]:
    """The state with fresh noise at a raised noise level, and the time of that level."""
    rho = b.process.rho(s)
    if not gamma or not bool((rho >= low) & (rho <= high)) or not finite(b, s) or bool(b.lam(t) < b.lam(s)):
        return x, s
    # no noisier than the network knows
    raised = b.process.stage(torch.maximum(b.lam(s) - math.log1p(gamma), b.lam(b.process.t_start)))
    rho_raised = b.process.rho(raised)
    if not bool(rho_raised > rho):
        return x, s
    fresh = s_noise * torch.sqrt(rho_raised**2 - rho**2) * b.noise()
    x = b.alpha(raised) / b.alpha(s) * x + b.alpha(raised) * fresh
    return b.state(x, raised), raised
