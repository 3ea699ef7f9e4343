"""Distribution matching distillation (Yin et al. 2024, arXiv:2311.18828; DMD2: arXiv:2405.14867)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import bottleneck, outputs
from .batch import Batch
from .prediction import noised, predict
from .score import ScoreDistillation

HEAD_WIDTH = 256


@dataclass
class DMD2(ScoreDistillation):
    """DMD2: the generator follows the difference of the fake and the teacher's scores, and a discriminator.

    Args:
        ratio: updates of the fake network for one of the generator (two time scales; section 4.2: 5).
        gan: weight of the discriminator in the generator's loss (section 4.3); 0 is none, and no data.
        gan_fake: its weight in the fake network's loss.
        at: the module of the network whose output the discriminator reads; the narrowest is found by itself.
    """

    ratio: int = 5
    gan: float = 1e-2
    gan_fake: float = 1e-2
    at: str | None = None

    uses_data: ClassVar[bool] = True

    def build(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: at least 1 is needed")
        super().build()

    def fake(self) -> nn.Module:
        net = super().fake()
        if not self.gan:
            return net
        x, told, conditions = self.example("student", {})
        seen = outputs(net, x, told, conditions)
        at = bottleneck(net, seen) if self.at is None else self.at
        if at not in seen:
            raise ValueError(f"at={at!r}: no module of that name ran with a tensor as its output")
        return Judging(net, at, seen[at][0])

    def roles(self, step: int) -> tuple[str, ...]:
        return ("fake", "student") if step % self.ratio == 0 else ("fake",)

    def objective(self, batch: Batch, role: str) -> Tensor:
        if role == "student" or not self.gan:
            return super().objective(batch, role)
        with torch.no_grad():
            x0 = self.generate(batch, "fake.z")
        process = self.teacher.process
        t, eps = self.time(batch, "fake.t"), batch.normal("fake.eps")
        x_t = noised(process, x0, eps, t)
        loss = self.following(x_t, x0, eps, t, batch.conditions)
        real_t = noised(process, batch.data, batch.normal("real.eps"), t)
        made, real = (self.judged(x, t, batch.conditions) for x in (x_t, real_t))
        return loss + self.gan_fake * (F.softplus(made) + F.softplus(-real))

    def judged(self, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """The discriminator's logits (B,) for noised samples."""
        fake = self.denoiser("fake")
        told = fake.told(fake.process.network_time(t)).to(x.device, fake.time_dtype(x.dtype))
        return fake.net(x, told, judge=True, **{**fake.conditions, **conditions})

    def generator_loss(self, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            real = predict(self.teacher, x_t, t, batch.conditions)
            fake = predict(self.denoiser("fake"), x_t, t, batch.conditions)
            gradient = matching_gradient(x0, real, fake)
        # its gradient with respect to the samples is the one above
        loss = (x0 * gradient).flatten(1).mean(dim=1)
        if self.gan:
            loss = loss + self.gan * F.softplus(-self.judged(x_t, t, batch.conditions))
        return loss


def matching_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD's gradient at the samples: ``(f_fake - f_real) / mean |x - f_real|`` (Yin et al. 2024, eq. 7, 8)."""
    weight = (x0 - real).flatten(1).abs().mean(dim=1).clamp(min=1e-5)
    return (fake - real) / weight.reshape(-1, *[1] * (x0.ndim - 1))


class Judging(nn.Module):
    """A network with a discriminator on one of its inner outputs: ``net(..., judge=True)`` gives logits (B,).

    Args:
        net: the network.
        at: the name of the module that is read.
        features: an example of its output.
    """

    def __init__(self, net: nn.Module, at: str, features: Tensor) -> None:
        super().__init__()
        self.net, self.at = net, at
        size = features[0].numel()
        self.head = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, 1)
        ).to(features.device, features.dtype)
        self._read: Tensor | None = None
        net.get_submodule(at).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._read = output

    def forward(self, x: Tensor, t: Tensor, judge: bool = False, **conditions: Any) -> Any:
        try:
            out = self.net(x, t, **conditions)
            if not judge:
                return out
            assert self._read is not None
            return self.head(self._read.flatten(1))[:, 0]
        finally:
            self._read = None
