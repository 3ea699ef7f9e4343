"""Consistency models trained from data: iCT (Song & Dhariwal 2024, arXiv:2310.14189) and ECT (Geng et al.
2024, "Consistency models made easy", arXiv:2406.14548)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .batch import Batch
from .consistency import ConsistencyModel
from .draws import Draws
from .limits import COUNT, POSITIVE, WEIGHT, Limit
from .method import pseudo_huber
from .prediction import column, consistency_function, noised, time_of_rho


@dataclass
class _DataDriven(ConsistencyModel):
    """Pairs (x_t, x_r) of the same clean sample and the same noise, instead of a teacher's step.

    Args:
        p_mean, p_std: of the lognormal noise level ``sigma / alpha`` (the papers: -1.1, 2.0, with which a short
            training hardly ever draws the noisiest level, where one step of sampling begins).
    """

    p_mean: float = 0.0
    p_std: float = 2.0

    limits: ClassVar[dict[str, Limit]] = {"p_mean": Limit(), "p_std": POSITIVE}
    converts: ClassVar[bool] = False  # r = 0 is denoising: the first pairs teach the prediction type

    def progress(self, batch: Batch) -> float:
        """The share of the training that is over."""
        return min(1.0, batch.step / self.whole)

    def ends(self, batch: Batch, t: Tensor, r: Tensor) -> Tensor:
        """``f(x_t, t) - sg f(x_r, r)`` with one dropout mask for both (Song & Dhariwal 2024, section 3.2)."""
        process = self.teacher.process
        eps, clean = batch.normal("eps"), batch.data
        student = self.denoiser("student")
        t, r = process.snap(t), process.snap(r)
        draws = Draws(eps.device)
        with torch.no_grad():
            x_r = torch.where(column(r == process.t_zero, clean) > 0, clean, noised(process, clean, eps, r))
            target = consistency_function(student, x_r, r, batch.conditions)
        draws.again()
        return consistency_function(student, noised(process, clean, eps, t), t, batch.conditions) - target


@dataclass
class ICT(_DataDriven):
    """Improved consistency training: lognormal noise levels on a grid that is refined as training goes on.

    ``N(k) = min(s0 2^floor(k / K'), s1) + 1`` with ``K' = floor(K / (log2(s1 / s0) + 1))`` (eq. 10), weights
    ``1 / (sigma_{i+1} - sigma_i)`` (section 3.5), pseudo-Huber with ``c = 0.00054 sqrt(d)`` (section 3.3), no
    moving average in the target (section 3.2).

    Args:
        s0, s1: the first and the last number of intervals.
    """

    s0: int = 10
    s1: int = 1280

    limits: ClassVar[dict[str, Limit]] = {"s0": COUNT, "s1": COUNT}

    def build(self) -> None:
        super().build()
        if self.s1 < self.s0:
            raise ValueError(f"s1={self.s1} is less than s0={self.s0}; intervals grow from s0 to s1")

    def intervals(self, step: int) -> int:
        """``N(k) - 1`` at an update (eq. 10)."""
        every = self.whole // (int(math.log2(self.s1 // self.s0)) + 1)
        return min(self.s0 * 2 ** (step // max(1, every)), self.s1)

    def levels(self, intervals: int) -> Tensor:
        """Karras' noise levels, ascending, ``intervals + 1`` of them (Karras et al. 2022, eq. 5)."""
        process = self.teacher.process
        low, high = (float(process.rho(t)) for t in (process.t_end, process.t_start))
        high = min(high, 1e4)
        u = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
        return (low ** (1 / 7) + u * (high ** (1 / 7) - low ** (1 / 7))) ** 7

    def probabilities(self, levels: Tensor) -> Tensor:
        """Of each interval: those of the lognormal noise level, discretised (section 3.5)."""
        z = (levels.log() - self.p_mean) / (math.sqrt(2) * self.p_std)
        mass = torch.erf(z[1:]) - torch.erf(z[:-1])
        return mass / mass.sum()

    def objective(self, batch: Batch, role: str) -> Tensor:
        levels = self.levels(self.intervals(batch.step))
        chance = self.probabilities(levels).cumsum(0)
        i = torch.searchsorted(chance, batch.uniform("t", stratified=True)).clamp(max=len(levels) - 2)
        process = self.teacher.process
        error = self.ends(batch, *(time_of_rho(process, levels[j]) for j in (i + 1, i)))
        weight = 1 / (levels[i + 1] - levels[i])
        return weight.to(error.device, error.dtype, non_blocking=True) * pseudo_huber(error)


@dataclass
class ECT(_DataDriven):
    """Easy consistency tuning: from a diffusion model, with r going from 0 to t as training goes on.

    ``r / t = 1 - n(t) / q^(stage + 1)`` with ``n(t) = 1 + k sigmoid(-b t)`` (eq. 16), where noise levels are
    meant by r and t; weights ``1 / (t - r)``; adaptive weights by the pseudo-Huber with c.

    Args:
        q: by how much t - r shrinks from stage to stage (2 for small data; 4 for ImageNet).
        k, b: of n(t).
        stages: their number (the paper: 8 for 400,000 updates). A small network stands still at the discretisation of
            each after some hundred updates, so that one step gets better by more of them.
        c: of the pseudo-Huber (0.06 for CIFAR-10 in the authors' configuration).
    """

    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 7
    c: float = 0.06

    limits: ClassVar[dict[str, Limit]] = {
        "q": Limit(1, above=True),
        "k": WEIGHT,
        "b": WEIGHT,
        "stages": COUNT,
        "c": WEIGHT,
    }

    def lower(self, rho: Tensor, stage: int) -> Tensor:
        """The noise level r that goes with t (B,)."""
        n = 1 + self.k * torch.sigmoid(-self.b * rho)
        return (rho * (1 - n / self.q ** (stage + 1))).clamp(min=0)

    def objective(self, batch: Batch, role: str) -> Tensor:
        stage = min(self.stages - 1, int(self.progress(batch) * self.stages))
        process = self.teacher.process
        t = time_of_rho(process, torch.exp(self.p_mean + self.p_std * batch.gaussian("t", stratified=True)))
        rho = process.rho(t)
        lower = self.lower(rho, stage)
        zero = lower < process.rho(process.t_end)
        r = torch.where(zero, process.t_zero, time_of_rho(process, lower))
        lower = torch.where(zero, 0.0, lower)
        error = self.ends(batch, t, r)
        weight = 1 / (rho - lower)
        return weight.to(error.device, error.dtype, non_blocking=True) * pseudo_huber(error, self.c)
