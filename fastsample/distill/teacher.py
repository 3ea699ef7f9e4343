"""Steps along the teacher's ODE, with one time for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..process import Process
from .prediction import column, predict


def ddim_coefficients(process: Process, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a DDIM step from times ``s`` to ``t`` (B,) takes of the state and of the clean sample, float64 (B,)."""
    (alpha_s, sigma_s, _), (alpha_t, sigma_t, _) = process._look_up(s), process._look_up(t)
    ratio = sigma_t / sigma_s
    return ratio, alpha_t - ratio * alpha_s


def ddim_step(process: Process, x: Tensor, x0: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """From times ``s`` to ``t`` (B,) with the clean sample held (Song, Meng & Ermon 2021, eq. 12, eta = 0)."""
    of_state, of_clean = ddim_coefficients(process, s, t)
    return column(of_state, x) * x + column(of_clean, x) * x0


@torch.no_grad()
def teacher_step(
    teacher: Denoiser,
    x: Tensor,
    s: Tensor,
    t: Tensor,
    conditions: Mapping[str, Any],
    order: int = 2,
    told: Tensor | None = None,
) -> Tensor:
    """One step of the teacher's ODE from times ``s`` to ``t`` (B,); ``told`` is the step size that its network is told.

    Heun's rule in the time of a straight flow, ``tau = sigma / (alpha + sigma)``, of whose state ``x / (alpha +
    sigma)`` any process's is a scaled copy: its Euler step is DDIM's, it is Heun's in sigma where there is little
    noise, and finite at alpha = 0. A step to zero noise stays of first order, as in EDM (Karras et al. 2022,
    algorithm 1).
    """
    process = teacher.process
    s, t = process.snap(s), process.snap(t)
    (alpha_s, sigma_s, _), (alpha_t, sigma_t, _) = process._look_up(s), process._look_up(t)
    before, after = alpha_s + sigma_s, alpha_t + sigma_t
    step = sigma_t / after - sigma_s / before

    def moved(velocity: Tensor) -> Tensor:
        return column(after / before, x) * x + column(after * step, x) * velocity

    velocity = predict(teacher, x, s, conditions, "flow", step=told)
    there = moved(velocity)
    clean = t == process.t_zero
    if order == 1 or bool(clean.all()):
        return there
    end = predict(teacher, there, torch.where(clean, process.t_end, t), conditions, "flow", step=told)
    corrected = moved((velocity + end) / 2)
    return torch.where(column(clean, x) > 0, there, corrected) if bool(clean.any()) else corrected
