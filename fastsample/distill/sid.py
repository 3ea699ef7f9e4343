"""Score identity distillation (Zhou et al. 2024, arXiv:2404.04057)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .batch import Batch
from .limits import Limit
from .prediction import predict
from .score import ScoreDistillation


@dataclass
class SiD(ScoreDistillation):
    """SiD, algorithm 1: the teacher's scores and the generator's own, by score identities.

    ``(f_phi - f_psi)^T ((f_phi - x_g) - alpha (f_phi - f_psi))`` (eq. 23) with the teacher's f_phi and the fake
    network's f_psi, divided by the mean of ``|x_g - f_phi|`` (eq. 8 of the appendix). Gradients go through the
    inputs of both.

    Args:
        alpha: 1 is the score identity alone; the paper's best is 1.2.
        gan, gan_fake: as for every score distillation; the discriminator draws towards data that the teacher misses.
    """

    alpha: float = 1.2
    gan: float = 0.4
    gan_fake: float = 0.4

    limits: ClassVar[dict[str, Limit]] = {"alpha": Limit()}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("fake", "student")

    def generator_loss(self, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        real = predict(self.teacher, x_t, t, batch.conditions)
        fake = predict(self.denoiser("fake"), x_t, t, batch.conditions)
        weight = (x0 - real).detach().flatten(1).abs().mean(dim=1).clamp(min=1e-5)
        product = (real - fake) * ((real - x0) - self.alpha * (real - fake))
        return product.flatten(1).mean(dim=1) / weight
