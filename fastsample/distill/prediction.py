"""A denoiser at one time for each sample: what training needs and sampling does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..prediction import coefficients
from ..process import Process

_NONE = 1e-9  # a fraction that is zero noise


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Of the states of a network in a precision: double for double, else single."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample (B,), shaped and typed to multiply ``like`` (B, ...)."""
    return values.to(like.device, like.dtype, non_blocking=True).reshape(-1, *[1] * (like.ndim - 1))


def noised(process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``x_t = alpha(t) x_0 + sigma(t) eps`` at times (B,), float64 on the CPU."""
    alpha, sigma, _ = process._look_up(t)
    return column(alpha, x0) * x0 + column(sigma, x0) * eps


def radius(process: Process, t: Tensor) -> Tensor:
    """``sqrt(alpha^2 + sigma^2)`` at times t: 1 for VP, and how much larger than that the states of others are."""
    alpha, sigma, _ = process._look_up(t)
    return torch.hypot(alpha, sigma)


def time_of_rho(process: Process, rho: Tensor) -> Tensor:
    """Times at noise levels ``sigma / alpha`` (B,), moved into the trained range; both ends are exact."""
    least, most = float(process.rho(process.t_end)), float(process.rho(process.t_start))
    inside = process.t_of_rho(rho.clamp(least, min(most, 1e12)))
    t = inside.clamp(*sorted((process.t_end, process.t_start)))
    return torch.where(rho >= most, process.t_start, t)


def time_of_phi(process: Process, phi: Tensor) -> Tensor:
    """Times at angles ``atan2(sigma, alpha)`` (B,), moved into the trained range; both ends are exact."""
    return torch.where(
        phi >= float(process.phi(process.t_start)), process.t_start, time_of_rho(process, torch.tan(phi))
    )


def time_of_fraction(process: Process, tau: Tensor) -> Tensor:
    """Times at fractions ``sigma / (alpha + sigma)`` (B,): a straight flow's time, on any process."""
    return time_of_rho(process, tau / (1 - tau))


def known_phi(process: Process, phi: Tensor) -> Tensor:
    """The angles nearest to ``phi`` (B,) whose times the network knows."""
    return phi if process.levels is None else process.phi(process.snap(time_of_phi(process, phi)))


def known_fraction(process: Process, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The times nearest to fractions (B,) that the network knows (zero noise at 0), and their fractions."""
    t = process.snap(time_of_fraction(process, tau))
    t = torch.where(tau <= _NONE, process.t_zero, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    return t, torch.where(tau <= _NONE, 0.0, sigma / (alpha + sigma))


def predict(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, Any],
    space: str = "x0",
    *,
    step: Tensor | None = None,
) -> Tensor:
    """The (guided) prediction of a denoiser, in any space.

    Args:
        denoiser: any network, process and prediction type.
        x: states (B, ...) of its process.
        t: their times (B,), float64 on the CPU.
        conditions: of the network.
        space: "x0", "eps", "v" or "flow", as in :func:`fastsample.prediction.coefficients`.
        step: (B,), a step size also told to the network.
    """
    process = denoiser.process
    t = process.snap(t)
    alpha, sigma, _ = process._look_up(t)
    p, q = coefficients(denoiser.prediction, alpha, sigma, space)
    told = denoiser.told(process.network_time(t))
    told = told.to(x.device, denoiser.time_dtype(x.dtype), non_blocking=True)
    if step is not None:
        step = step.to(x.device, x.dtype, non_blocking=True)
    out = _guided(denoiser, x, told, sigma / alpha, conditions, step)
    return column(p, x) * x + column(q, x) * out.to(x.dtype)


def _guided(
    denoiser: Denoiser,
    x: Tensor,
    told: Tensor,
    rho: Tensor,
    conditions: Mapping[str, Any],
    step: Tensor | None,
) -> Tensor:
    """The network's output; a guidance interval holds for each sample by itself."""
    guidance = denoiser.guidance
    if guidance is None or guidance.scale == 1 or guidance.interval == (0.0, math.inf):
        return denoiser.bind(len(x), conditions, x.device)(x, told, 1.0, step)
    low, high = guidance.interval
    always = denoiser.replace(guidance=dataclasses.replace(guidance, interval=(0.0, math.inf)))
    guided = always.bind(len(x), conditions, x.device)(x, told, 1.0, step)
    plain = denoiser.replace(guidance=None).bind(len(x), conditions, x.device)(x, told, 1.0, step)
    acts = ((rho >= low) & (rho <= high)).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(acts, guided, plain)


def boundary(denoiser: Denoiser, t: Tensor) -> Tensor:
    """``k`` of the consistency function ``f = k x + (1 - alpha k) x_0``, float64 (B,); ``alpha k`` is c_skip.

    A consistency function is the identity where no noise is left (Song et al. 2023, eq. 5). With eps, score,
    v and flow prediction ``x_0 = p x + q out`` is so by itself (p = 1, q = 0 at sigma = 0), and ``k`` is 0.
    An x0-prediction needs the skip ``alpha k = rho_min^2 / (rho^2 + rho_min^2)``, with ``rho_min`` the least noise
    that the network was trained at: 1 without noise, and gone wherever the network was trained.
    """
    if denoiser.prediction != "x0":
        return torch.zeros_like(t)
    process = denoiser.process
    rho_min = process.rho(process.t_end)
    alpha = process.alpha(t)
    return rho_min**2 * alpha / (process.sigma(t) ** 2 + (rho_min * alpha) ** 2)


def consistency_function(
    denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Mapping[str, Any], **told: Any
) -> Tensor:
    """``f(x_t, t)``: the end of the trajectory through ``x_t``; ``x_t`` itself where no noise is left.

    Args:
        denoiser, x, t, conditions, told: as for :func:`predict`.
    """
    process = denoiser.process
    t = process.snap(t)
    clean = t == process.t_zero
    # the network is not asked at sigma = 0, where its answer does not count
    asked = torch.where(clean, process.t_end, t)
    x0 = predict(denoiser, x, asked, conditions, "x0", **told)
    skip = boundary(denoiser, t)
    if bool((skip > 0).any()):
        x0 = column(skip, x) * x + column(1 - process.alpha(t) * skip, x) * x0
    if bool(clean.any()):
        x0 = torch.where(column(clean, x) > 0, x, x0)
    return x0
