"""MeanFlow (Geng et al. 2025, "Mean flows for one-step generative modeling", arXiv:2505.13447)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import unknown
from .batch import Batch
from .draws import Draws
from .limits import POSITIVE, SHARE, WEIGHT, Limit
from .prediction import column, known_fraction, time_of_fraction
from .shortcut import StepSized
from .tangent import WithTangents

TIMES = ("uniform", "logit_normal")


@dataclass
class MeanFlow(WithTangents, StepSized):
    """The average velocity u over [r, t] by its identity ``u = v - (t - r) du/dt`` (eq. 6), algorithm 1.

    Args:
        different: the share of samples with r != t (the paper: 0.25).
        full: the share of those whose r is 0, where sampling ends (the paper: none). A single step is from the noisiest
            time to there, a corner of the drawn intervals that a short training hardly sees.
        times: "uniform", so that one step from pure noise has its share in a short training, or "logit_normal"
            (the paper).
        p_mean, p_std: of logit-normal t and r (the paper: -0.4, 1).
        power: p of the adaptive weight ``1 / (|error|^2 + c)^p`` (eq. 22; the paper: 1, on CIFAR-10 0.75). The larger
            it is, the less the largest steps weigh, whose errors are the largest.
        c: of the adaptive weight.
        jvp: "auto", "forward", "difference" or "secant", see :class:`fastsample.distill.tangent.Tangent`.
        width: half of a secant, in flow time.
    """

    different: float = 0.5
    full: float = 0.1
    times: str = "uniform"
    p_mean: float = -0.4
    p_std: float = 1.0
    power: float = 0.5
    c: float = 1e-3
    jvp: str = "auto"
    width: float = 0.05

    limits: ClassVar[dict[str, Limit]] = {
        "different": SHARE,
        "full": SHARE,
        "p_mean": Limit(),
        "p_std": POSITIVE,
        "power": WEIGHT,
        "c": POSITIVE,
    }

    def build(self) -> None:
        super().build()
        if self.times not in TIMES:
            raise unknown("times", self.times, TIMES)
        self.adapt({})
        self.begin_tangents()
        rho_min = float(self.teacher.process.rho(self.teacher.process.t_end))
        self.tau_min = rho_min / (1 + rho_min)

    def objective(self, batch: Batch, role: str) -> Tensor:
        both = [self.tau_max * self.time(batch, name) for name in ("t", "r")]
        tau = torch.maximum(*both).clamp(min=self.tau_min)
        lower = torch.minimum(torch.minimum(*both), tau)
        chosen = batch.uniform("different")
        lower = torch.where(chosen < self.different, lower, tau)
        lower = torch.where(chosen < self.different * self.full, 0.0, lower)
        tau = known_fraction(self.teacher.process, tau)[1]
        lower = torch.minimum(lower, tau)
        t, rate = self.time_and_rate(tau)
        scale, grows = self.scale_and_rate(t)
        eps = batch.normal("eps")
        z = column(1 - tau, eps) * batch.data + column(tau, eps) * eps
        x = column(scale, z) * z
        v = self.instantaneous(batch, x, t, eps)
        # along the flow: dz/dtau = v, so x = scale(t) z moves with both
        dx = column(scale, z) * v + column(grows * rate, z) * z
        size = tau - lower
        draws = Draws(x.device)
        du = self._tangent(
            self.denoiser("student"),
            "flow",
            x,
            t,
            dx,
            rate,
            batch.conditions,
            size,
            torch.ones_like(size),
            secant=lambda: self.secant(z, v, tau, size, batch, draws),
            draws=draws,
        )
        draws.again()
        target = v - column(size, v) * du
        error = self.velocity("student", x, t, size, batch.conditions) - target
        square = error.flatten(1).square().sum(dim=1)
        weight = 1 / (square.detach() + self.c) ** self.power
        return weight * square

    @torch.no_grad()
    def secant(self, z: Tensor, v: Tensor, tau: Tensor, size: Tensor, batch: Batch, draws: Draws) -> Tensor:
        """``du/dt`` at fixed r from the two times ``tau +- width`` of the flow, as far as these lie in [r, 1].

        Where r = t it does not count and may be anything finite.
        """
        process = self.teacher.process
        ahead = (tau + self.width).clamp(max=self.tau_max) - tau
        behind = -torch.minimum(size, (tau - self.tau_min).clamp(max=self.width))
        values = []
        shifts = []
        for shift in (ahead, behind):
            t, there = known_fraction(process, tau + shift)
            shift = there - tau
            x = self.scale(t, z) * (z + column(shift, z) * v)
            draws.again()
            values.append(self.velocity("student", x, t, size + shift, batch.conditions))
            shifts.append(shift)
        span = (shifts[0] - shifts[1]).clamp(min=torch.finfo(torch.float32).eps)
        return (values[0] - values[1]) / column(span, z)

    def time(self, batch: Batch, name: str) -> Tensor:
        """Numbers in (0, 1) of the distribution of times."""
        if self.times == "uniform":
            return batch.uniform(name)
        return torch.sigmoid(self.p_mean + self.p_std * batch.gaussian(name))

    def time_and_rate(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Times at fractions tau (B,) and their derivatives."""
        with torch.enable_grad():
            fraction = tau.detach().clone().requires_grad_()
            t = self.teacher.process.t_of_rho(fraction / (1 - fraction))
            rate = torch.autograd.grad(t.sum(), fraction)[0]
        return time_of_fraction(self.teacher.process, tau), rate

    def scale_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha + sigma`` at times (B,) and its derivative."""
        process = self.teacher.process
        with torch.enable_grad():
            time = t.detach().clone().requires_grad_()
            total = process.alpha(time) + process.sigma(time)
            rate = torch.autograd.grad(total.sum(), time)[0] if total.requires_grad else torch.zeros_like(t)
        return total.detach(), rate
