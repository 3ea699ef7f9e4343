"""Few-step samplers of distilled models: the network's x0 is taken as it is, and noise is put back on it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..builder import Builder, Expr, intervals
from ..process import Process
from .registry import Claim, register
from .sde import check_noise

SIGMA_DATA = 0.5
TRAINED_STEPS = 1000


@register("consistency", Claim(order=None, stochastic=True))
def consistency(
    b: Builder, grid: Tensor, sigma_min: float = 0.0, s_noise: float = 1.0, boundary: float = 0.0
) -> None:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to x0, put noise back, again.

    One evaluation a step; the last one is the sample. The same loop is that of few-step flow models.

    Args:
        b, grid: the builder and the times.
        sigma_min: the noise level ``sigma / alpha`` that the model's "clean" samples still have (the paper's
            epsilon, 0.002 there); so much less is put back.
        s_noise: factor of the noise.
        boundary: the noise level up to which the state itself is kept, ``c_skip = boundary^2 / (rho^2 +
            boundary^2)``: the boundary condition of students that predict x0; 0 for all others.
    """
    _descending(b, grid, sigma_min=sigma_min, s_noise=s_noise, boundary=boundary)
    x = b.x
    for s, t in intervals(grid):
        x0 = b.x0(x)
        if boundary:
            # c_skip / alpha, finite where alpha = 0
            kept = boundary**2 * b.alpha(s) / (b.sigma(s) ** 2 + (boundary * b.alpha(s)) ** 2)
            x0 = kept * x + (1 - kept * b.alpha(s)) * x0
        x = _renoise(b, x0, t, sigma_min, s_noise)


@register("shortcut", Claim(order=None, sized=True), grid="fraction")
def shortcut(b: Builder, grid: Tensor) -> None:
    """Shortcut and MeanFlow sampling (Frans et al. 2025, algorithm 2; Geng et al. 2025, eq. 12).

    Euler steps of a straight flow, whose network is told the step as well: it predicts the *average* velocity
    over it. On other processes the state is that flow's times ``alpha + sigma``, and a flow's time is
    ``sigma / (alpha + sigma)``; the step is told in this time.

    Args:
        b, grid: the builder and the times.
    """
    x = b.x
    for s, t in intervals(grid):
        total_s, total_t = b.alpha(s) + b.sigma(s), b.alpha(t) + b.sigma(t)
        step = b.sigma(s) / total_s - b.sigma(t) / total_t
        velocity = b.predict(x, "flow", step=step)
        x = b.state(total_t * (x / total_s - step * velocity), t)


@register("lcm", Claim(order=None, stochastic=True))
def lcm(b: Builder, grid: Tensor, timestep_scaling: float = 10.0, s_noise: float = 1.0) -> None:
    """Latent consistency sampling (Luo et al. 2023, algorithm 3, with the boundary scalings of appendix C).

    The clean sample is ``c_skip x + c_out x0`` with ``c_skip = d^2 / (u^2 + d^2)``, ``c_out = u / sqrt(u^2
    + d^2)``, ``d = 0.5``, where ``u`` is the training index (of 1,000, from the least noisy one on) times
    the scaling.

    Args:
        b, grid: the builder and the times.
        timestep_scaling: how fast the boundary condition is left.
        s_noise: factor of the noise.
    """
    _descending(b, grid, timestep_scaling=timestep_scaling, s_noise=s_noise)
    x = b.x
    for s, t in intervals(grid):
        skip, out = lcm_boundary(b.process, s, timestep_scaling)
        x = _renoise(b, skip * x + out * b.x0(x), t, 0.0, s_noise)


def lcm_boundary(process: Process, t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out`` of :func:`lcm` at times of any shape, float64."""
    low, high = process.uniform_of_t(torch.tensor([process.t_end, process.t_start])).unbind()
    fraction = (process.uniform_of_t(t) - low) / (high - low)
    u = fraction * (getattr(process, "num_train_steps", TRAINED_STEPS) - 1) * timestep_scaling
    return SIGMA_DATA**2 / (u**2 + SIGMA_DATA**2), u / torch.sqrt(u**2 + SIGMA_DATA**2)


@register("tcd", Claim(order=None, stochastic=True))
def tcd(b: Builder, grid: Tensor, gamma: float = 0.3, s_noise: float = 1.0) -> None:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4).

    Each step jumps along the ODE to ``(1 - gamma) t`` (the network's x0 and noise held) and is noised up to
    ``t``; none is put back in the last step.

    Args:
        b, grid: the builder and the times.
        gamma: 0 is deterministic (DDIM), 1 is ``consistency``.
        s_noise: factor of the noise.
    """
    _descending(b, grid, gamma=gamma, s_noise=s_noise)
    if gamma > 1:
        raise ValueError(f"gamma={gamma!r} must lie in [0, 1]")
    process = b.process
    x = b.x
    for i, (s, t) in enumerate(intervals(grid)):
        last = i == grid.numel() - 2
        # time 0 is the clean end of every process; the index -1 of discrete ones stays where it is
        lower = t if gamma == 0 or last or not bool(t > 0) else process.snap((1 - gamma) * t)
        if not bool(b.lam(lower) >= b.lam(t)):
            lower = t
        x0 = b.x0(x)
        eps = (x - b.alpha(s) * x0) / b.sigma(s)
        jumped = b.alpha(lower) * x0 + b.sigma(lower) * eps
        if lower is t:
            x = b.state(jumped, t)
            continue
        signal = b.alpha(t) / b.alpha(lower)
        added = torch.sqrt((b.sigma(t) ** 2 - (signal * b.sigma(lower)) ** 2).clamp(min=0))
        x = b.state(signal * jumped + s_noise * added * b.noise(), t)


def _descending(b: Builder, grid: Tensor, **options: float) -> None:
    check_noise(b, grid, False, **options)
    if not bool(b.lam(grid[-1]) > b.lam(grid[0])):
        raise ValueError("consistency sampling goes towards less noise; reverse the grid")


def _renoise(b: Builder, x0: Expr, t: Tensor, sigma_min: float, s_noise: float) -> Expr:
    """A clean sample (of noise ``sigma_min``) noised up to t."""
    level = b.process.rho(t)
    clean = b.alpha(t) * x0
    if not bool(level > sigma_min):
        return b.state(clean, t)
    return b.state(clean + s_noise * b.alpha(t) * torch.sqrt(level**2 - sigma_min**2) * b.noise(), t)
