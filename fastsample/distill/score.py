"""Score distillation: what SiD and DMD2 share (a one- or few-step generator, a network that follows its scores)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import grids
from .adapters import bottleneck, outputs
from .batch import Batch
from .judge import Judging
from .limits import COUNT, POSITIVE, SHARE, WEIGHT, Limit
from .method import Method, squared
from .prediction import column, consistency_function, noised, predict, radius


@dataclass
class ScoreDistillation(Method):
    """A generator G whose noised samples shall have the teacher's scores; a fake network learns G's own.

    Args:
        init_rho: the noise level ``sigma / alpha`` that the generator starts from: the teacher's clean
            prediction there is a good first generator (SiD: 2.5).
        jumps: steps of the generator; each but the last puts noise back (DMD2, section 4.4).
        t_low, t_high: noise levels are drawn evenly between these shares of the range of angles.
        gan: weight of a discriminator in the generator's loss (DMD2, section 4.3; for SiD: Zhou et al. 2024,
            arXiv:2410.14919); it reads an inner output of the fake network. 0 is none, and no data are needed.
        gan_fake: its weight in the fake network's loss.
        at: the module whose output the discriminator reads; the narrowest is found by itself.
    """

    init_rho: float = 2.5
    jumps: int = 1
    t_low: float = 0.02
    t_high: float = 0.98
    gan: float = 1e-2
    gan_fake: float = 1e-2
    at: str | None = None

    limits: ClassVar[dict[str, Limit]] = {
        "init_rho": POSITIVE,
        "jumps": COUNT,
        "t_low": SHARE,
        "t_high": SHARE,
        "gan": WEIGHT,
        "gan_fake": WEIGHT,
    }
    converts: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-4
    betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    schedule: ClassVar[str] = "constant"
    # at a constant learning rate the weights wander, and a long average of them is better than what they pass through
    power_ema: ClassVar[tuple[float, ...]] = (0.25,)

    @property
    def trained(self) -> tuple[str, ...]:
        return ("student", "fake")

    @property
    def steps(self) -> tuple[int, ...]:  # type: ignore[override]
        """The numbers of steps that the generator was trained for."""
        return (self.jumps,)

    @property
    def solver_options(self) -> dict[str, Any]:
        return {"grid": "angle", "start": self.t_init, "end": "zero"}

    def _preferred(self, start: Any) -> str:
        return start.prediction  # the generator starts at less noise, where eps says enough

    def build(self) -> None:
        process = self.teacher.process
        low, high = float(process.rho(process.t_end)), float(process.rho(process.t_start))
        if not low < self.init_rho <= high:
            raise ValueError(
                f"init_rho={self.init_rho} must be a noise level of the process: ({low:g}, {high:g}]"
            )
        if self.t_low >= self.t_high:
            raise ValueError(f"t_low={self.t_low}, t_high={self.t_high}: need t_low < t_high")
        self.t_init = float(process.snap(process.t_of_rho(self.init_rho)))
        self.times = grids.make("angle", process, self.jumps, start=self.t_init, end="zero")
        self.nets["fake"] = self.fake()

    def fake(self) -> torch.nn.Module:
        """The network that follows the generator's scores: it starts as the student."""
        net = self.copy_of("student").requires_grad_(True).train()
        if not self.gan:
            return net
        x, told, conditions = self.example("student", {})
        seen = outputs(net, x, told, conditions)
        at = bottleneck(net, seen) if self.at is None else self.at
        if at not in seen:
            raise ValueError(f"at={at!r}: no module of that name ran with a tensor as its output")
        return Judging(net, at, seen[at][0])

    def generate(self, batch: Batch, name: str) -> Tensor:
        """The generator's samples; with several jumps, each sample stops at one of them, drawn at random."""
        process = self.teacher.process
        student = self.denoiser("student")
        x = float(process.sigma(self.t_init)) * batch.normal(name)
        stop = (batch.uniform(f"{name}.stop") * self.jumps).long()
        states, at = x, self.times[:-1][stop]
        for i in range(1, self.jumps):
            t = self.times[i - 1].expand(len(batch))
            with torch.no_grad():
                x0 = consistency_function(student, x, t, batch.conditions)
                x = noised(process, x0, batch.normal(f"{name}.{i}"), self.times[i].expand(len(batch)))
            states = torch.where(column(stop >= i, x) > 0, x, states)
        return consistency_function(student, states, at, batch.conditions)

    def time(self, batch: Batch, name: str) -> Tensor:
        """Times (B,) of the scores that are compared."""
        u = self.t_low + (self.t_high - self.t_low) * batch.uniform(name, stratified=True)
        return self.teacher.process.snap(self.time_of_angle(u))

    def following(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, conditions: Any) -> Tensor:
        """The fake network's denoising loss (B,), of its v."""
        process = self.teacher.process
        size = radius(process, t)
        v = column(process.alpha(t) / size, x0) * eps - column(process.sigma(t) / size, x0) * x0
        return squared(predict(self.denoiser("fake"), x_t, t, conditions, "v") - v)

    @property
    def uses_data(self) -> bool:  # type: ignore[override]
        """Whether there is a discriminator."""
        return self.gan > 0

    def judging(self) -> AbstractContextManager[list[Tensor]]:
        """The discriminator's logits (B,) of what passes through the fake network within; without one, none."""
        if not self.gan:
            return nullcontext([])
        # a launched training wraps the network
        return next(m for m in self.nets["fake"].modules() if isinstance(m, Judging)).listening()

    def objective(self, batch: Batch, role: str) -> Tensor:
        process = self.teacher.process
        if role == "student":
            x0, t = self.generate(batch, "z"), self.time(batch, "t")
            x_t = noised(process, x0, batch.normal("eps"), t)
            with self.judging() as logits:
                loss = self.generator_loss(batch, x0, x_t, t)
            return loss + sum(self.gan * F.softplus(-made) for made in logits)
        with torch.no_grad():
            x0 = self.generate(batch, "fake.z")
        t, eps = self.time(batch, "fake.t"), batch.normal("fake.eps")
        x_t = noised(process, x0, eps, t)
        with self.judging() as logits:
            loss = self.following(x_t, x0, eps, t, batch.conditions)
            if self.gan:
                predict(
                    self.denoiser("fake"),
                    noised(process, batch.data, batch.normal("real.eps"), t),
                    t,
                    batch.conditions,
                )
        if self.gan:
            made, real = logits
            loss = loss + self.gan_fake * (F.softplus(made) + F.softplus(-real))
        return loss

    def generator_loss(self, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The generator's loss (B,) without the discriminator, from its samples and the same noised to t.

        The noised samples pass through the fake network once, with gradients where there is a discriminator.
        """
        raise NotImplementedError
