"""First-order samplers: DDIM, Euler and DDPM's ancestral sampling, in closed form with their limits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..builder import Builder, Expr, intervals
from .exponential import update
from .registry import Claim, register


def step(b: Builder, x: Expr, s: Tensor, t: Tensor) -> Expr:
    """The first-order step from ``s`` to ``t``, finite at both ends of any process."""
    return update(b, "flow", "tau", x, s, t, [(s, b.predict(x, "flow"))])


@register("ddim", Claim(order=1, moments="exact", space="flow", variable="tau"))
def ddim(b: Builder, grid: Tensor, eta: float = 0.0) -> None:
    """DDIM (Song, Meng & Ermon 2021, eq. 12, 16); ``eta=0`` is deterministic, ``eta=1`` is DDPM's posterior.

    ``sigma_t(eta) = eta sqrt((sigma_t^2/sigma_s^2)(1 - alpha_s^2/alpha_t^2 ...))``, written for any process by the
    posterior variance of ``x_t`` given ``x_s`` and ``x_0``.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta!r} must lie in [0, 1]")
    x = b.x
    for s, t in intervals(grid):
        if eta == 0:
            x = b.state(step(b, x, s, t), t)
            continue
        noise = eta * posterior_std(b, s, t)
        rest = torch.sqrt((b.sigma(t) ** 2 - noise**2).clamp(min=0))
        x0 = b.x0(x)
        eps_weight = rest / b.sigma(s)
        x = b.state(eps_weight * x + (b.alpha(t) - eps_weight * b.alpha(s)) * x0 + noise * b.noise(), t)


def posterior_std(b: Builder, s: Tensor, t: Tensor) -> Tensor:
    """Standard deviation of ``x_t`` given ``x_s`` and ``x_0`` for less noise at t (Ho et al. 2020, eq. 7)."""
    ratio = (b.alpha(s) * b.sigma(t)) / (b.alpha(t) * b.sigma(s))
    return b.sigma(t) * torch.sqrt((1 - ratio**2).clamp(min=0))


@register("euler", Claim(order=1, moments="exact", space="flow", variable="tau"))
def euler(b: Builder, grid: Tensor) -> None:
    """Euler's method in ``sigma / alpha`` (Karras et al. 2022, algorithm 1 without its correction).

    The same step as DDIM's, and as Euler's on a flow: with x_0 and eps held, ``x_t = alpha_t x_0 + sigma_t eps``.
    """
    ddim(b, grid)
