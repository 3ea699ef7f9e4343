"""Sampling functions for ``_target_``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsample as fs


def euler(denoiser: fs.Denoiser, noise: Tensor, steps: int, power: float = 1.0) -> Tensor:
    """DDIM on times 999 (1 - i/n)^power, by hand."""
    process = denoiser.process
    times = (process.t_start * (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64)) ** power)[:-1]
    x = noise
    for i, t in enumerate(times):
        x0 = denoiser(x, t)
        if i == steps - 1:
            return x0
        eps = (x - float(process.alpha(t)) * x0) / float(process.sigma(t))
        x = float(process.alpha(times[i + 1])) * x0 + float(process.sigma(times[i + 1])) * eps
    raise AssertionError


def flat(denoiser: fs.Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Of a wrong shape."""
    return denoiser(noise, 500.0).flatten(1)


def idle(denoiser: fs.Denoiser, noise: Tensor, steps: int, **conditions: Any) -> Tensor:
    """Never looks at the model."""
    return noise
