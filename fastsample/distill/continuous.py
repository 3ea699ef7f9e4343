"""Continuous-time consistency models, sCD and sCT (Lu & Song 2025, arXiv:2410.11081)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..process import Process
from .batch import Batch
from .consistency import ConsistencyModel
from .draws import Draws
from .limits import POSITIVE, WEIGHT, Limit
from .method import squared
from .prediction import column, known_phi, predict, radius, time_of_phi
from .tangent import WithTangents, one_sided


@dataclass
class SCM(WithTangents, ConsistencyModel):
    """sCM, algorithm 1: the consistency function's derivative along the teacher's (or the data's) trajectory.

    In TrigFlow's coordinates, of which any process is a scaled copy: angle ``phi = atan2(sigma, alpha)``, state
    ``z = x / sqrt(alpha^2 + sigma^2)``, network ``F = v``, ``f = cos(phi) z - sin(phi) F`` (eq. 4, with sigma_d
    = 1). The loss is eq. 8 with the rearranged and normalised tangent of section 4.1 (and appendix B):
    ``g = -cos^2 (F - dz/dphi) - r cos sin (z + dF/dphi)``, ``g / (|g| + c)``, where ``|g|`` is the root of the mean
    square, so that c is one for all numbers of pixels.

    Args:
        from_teacher: dz/dphi is the teacher's (sCD); False is that of the data (sCT), and the teacher where the
            training starts.
        p_mean, p_std: of the lognormal ``tan(phi)`` (the paper's sCT on CIFAR-10: -1.0, 1.4, with which a short
            training hardly ever draws the noisiest level, where one step of sampling begins).
        warmup: r goes from 0 to 1 over so many updates (the paper: 10,000 of 400,000); a number below 1 is a share
            of the training. Errors of large steps of the weights grow where r is 1.
        c: of the tangent's normalisation.
        jvp: "auto", "forward", "difference" or "secant", see :class:`fastsample.distill.tangent.Tangent`.
        width: of a secant, in angle.
    """

    from_teacher: bool = False
    p_mean: float = 0.0
    p_std: float = 2.0
    warmup: float = 0.7
    c: float = 0.1
    jvp: str = "auto"
    width: float = 0.05

    converts: ClassVar[bool] = True
    limits: ClassVar[dict[str, Limit]] = {
        "p_mean": Limit(),
        "p_std": POSITIVE,
        "warmup": WEIGHT,
        "c": WEIGHT,
    }

    def build(self) -> None:
        self.begin_tangents()
        process = self.teacher.process
        low, high = (float(process.phi(t)) for t in (process.t_end, process.t_start))
        self.angles = (low, min(high, math.pi / 2 - 1e-4))  # the least and the largest that are trained

    def warmed(self, step: int) -> float:
        """r at an update."""
        over = self.warmup
        if 0 < over < 1:
            over *= self.whole
        return 1.0 if over <= 0 else min(1.0, max(0, step - self.conversion) / over)

    def objective(self, batch: Batch, role: str) -> Tensor:
        process = self.teacher.process
        phi = torch.atan(torch.exp(self.p_mean + self.p_std * batch.gaussian("t", stratified=True)))
        phi = known_phi(process, phi.clamp(*self.angles))
        t, rate = angle_to_time(process, phi)
        cos, sin = torch.cos(phi), torch.sin(phi)
        eps, x0 = batch.normal("eps"), batch.data
        z = column(cos, x0) * x0 + column(sin, x0) * eps
        x = column(radius(process, t), z) * z
        if self.from_teacher:
            with torch.no_grad():
                direction = predict(self.teacher, x, t, batch.conditions, "v")
        else:
            direction = column(cos, x0) * eps - column(sin, x0) * x0
        draws = Draws(x.device)
        out = self.predict("student", x, t, batch, "v")
        tangent = self.tangent(out.detach(), x, z, direction, phi, t, rate, batch, draws)
        r = self.warmed(batch.step)
        c, s = column(cos, z), column(sin, z)
        g = -(c**2) * (out.detach() - direction) - r * (c * s * z + tangent)
        g = g / (column(squared(g).sqrt(), g) + self.c)
        return squared(out - out.detach() - g)

    def tangent(
        self,
        out: Tensor,
        x: Tensor,
        z: Tensor,
        direction: Tensor,
        phi: Tensor,
        t: Tensor,
        rate: Tensor,
        batch: Batch,
        draws: Draws,
    ) -> Tensor:
        """``cos sin dF/dphi`` of the student along the trajectory, all passes with the same draws."""
        process = self.teacher.process
        scaled = torch.cos(phi) * torch.sin(phi)
        with torch.enable_grad():
            time = t.detach().clone().requires_grad_()
            size = radius(process, time)
            grows = torch.autograd.grad(size.sum(), time)[0] if size.requires_grad else torch.zeros_like(time)
        # x = radius z; the factor cos sin keeps all tangents small (appendix B)
        dx = column(scaled * size.detach(), z) * direction + column(scaled * rate * grows, z) * z
        student = self.denoiser("student")
        return self._tangent(
            student,
            "v",
            x,
            t,
            dx,
            scaled * rate,
            batch.conditions,
            secant=lambda: column(scaled, z) * self.secant(out, z, direction, phi, batch, draws),
            draws=draws,
        )

    @torch.no_grad()
    def secant(
        self, out: Tensor, z: Tensor, direction: Tensor, phi: Tensor, batch: Batch, draws: Draws
    ) -> Tensor:
        """``dF/dphi`` by a parabola through F at ``phi``, ``phi - width`` and ``phi - 2 width`` of the trajectory.

        A consistency function is learnt from less noise towards more. With values from both sides the errors at
        more noise act upon those at less, which does not settle once r is 1.

        Args:
            out: F at phi.
        """
        process = self.teacher.process
        width = ((phi - self.angles[0]) / 2).clamp(max=self.width)
        values, gaps = [], []
        for k in (1, 2):
            angle = known_phi(process, phi - k * width)
            # z and dz/dphi turn into each other while the clean sample and the noise stay
            cos, sin = (column(f(angle - phi), z) for f in (torch.cos, torch.sin))
            t = time_of_phi(process, angle)
            x = column(radius(process, t), z) * (cos * z + sin * direction)
            draws.again()
            values.append(self.predict("student", x, t, batch, "v"))
            gaps.append(phi - angle)
        here, near, far = (column(w, z) for w in one_sided(*gaps))
        return here * out + near * values[0] + far * values[1]


def angle_to_time(process: Process, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Times at angles (B,) and their derivatives, float64."""
    with torch.enable_grad():
        angle = phi.detach().clone().requires_grad_()
        t = process.t_of_lam(-torch.log(torch.tan(angle)))
        rate = torch.autograd.grad(t.sum(), angle)[0]
    return time_of_phi(process, phi.detach()), rate
