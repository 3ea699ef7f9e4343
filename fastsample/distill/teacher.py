"""Steps along the teacher's ODE, with one time for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..process import Process
from .prediction import column, predict


def ddim_step(process: Process, x: Tensor, x0: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """From times ``s`` to ``t`` (B,) with the clean sample held (Song, Meng & Ermon 2021, eq. 12, eta = 0)."""
    (alpha_s, sigma_s, _), (alpha_t, sigma_t, _) = process._look_up(s), process._look_up(t)
    ratio = sigma_t / sigma_s
    return column(ratio, x) * x + column(alpha_t - ratio * alpha_s, x) * x0


@torch.no_grad()
def teacher_step(
    teacher: Denoiser, x: Tensor, s: Tensor, t: Tensor, conditions: Mapping[str, Any], order: int = 2
) -> Tensor:
    """One step of the teacher's ODE from times ``s`` to ``t`` (B,).

    Heun's rule on the clean sample (the predictor is DDIM; the corrector takes the mean of both ends'
    predictions): second order, as Heun in sigma, and finite at alpha = 0. A step to zero noise stays of first
    order, as in EDM (Karras et al. 2022, algorithm 1).
    """
    process = teacher.process
    s, t = process.snap(s), process.snap(t)
    x0 = predict(teacher, x, s, conditions)
    there = ddim_step(process, x, x0, s, t)
    if order == 1:
        return there
    clean = t == process.t_zero
    if bool(clean.all()):
        return there
    after = predict(teacher, there, torch.where(clean, process.t_end, t), conditions)
    corrected = ddim_step(process, x, (x0 + after) / 2, s, t)
    return torch.where(column(clean, x) > 0, there, corrected) if bool(clean.any()) else corrected
