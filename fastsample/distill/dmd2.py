"""Distribution matching distillation (Yin et al. 2024, arXiv:2311.18828; DMD2: arXiv:2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .batch import Batch
from .limits import COUNT, Limit
from .prediction import predict
from .score import ScoreDistillation


@dataclass
class DMD2(ScoreDistillation):
    """DMD2: the generator follows the difference of the fake network's and the teacher's scores.

    Args:
        ratio: updates of the fake network for one of the generator (two time scales; the paper, section 4.2: 5).
    """

    ratio: int = 2
    gan: float = 3e-2
    gan_fake: float = 3e-2

    limits: ClassVar[dict[str, Limit]] = {"ratio": COUNT}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("fake", "student") if step % self.ratio == 0 else ("fake",)

    def generator_loss(self, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gan > 0):  # the discriminator's gradient alone
            fake = predict(self.denoiser("fake"), x_t, t, batch.conditions)
        with torch.no_grad():
            real = predict(self.teacher, x_t, t, batch.conditions)
            gradient = matching_gradient(x0, real, fake)
        # its gradient with respect to the samples is the one above
        return (x0 * gradient).flatten(1).mean(dim=1)


def matching_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD's gradient at the samples: ``(f_fake - f_real) / mean |x - f_real|`` (Yin et al. 2024, eq. 7, 8)."""
    weight = (x0 - real).flatten(1).abs().mean(dim=1).clamp(min=1e-5)
    return (fake - real) / weight.reshape(-1, *[1] * (x0.ndim - 1))
